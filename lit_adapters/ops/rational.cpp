// Rational functions, one pass over memory in each direction: the C++ path of rational.py, for the CPU.
// _rational_native.py compiles this file for one form, degree m = M of the numerator and n = N of the denominator. The
// formulas are those of _rational_math.py.
//
// Tensors are (outer, G, K), contiguous, float32 or bfloat16; coefficients are (G, degree), float32. LANES neighbouring
// elements of a group are computed at a time: in float32, or in float64 if the powers of one of them might overflow.
// Where each channel is a group (K = 1), they are elements of LANES groups, and coefficients are vectors.
#include "vectors.h"

constexpr int WIDTH = M + 1 + N;  // coefficients of a group
constexpr int IN_FLOAT = 16;      // terms of a channel that are added up in float32
constexpr float LARGE = 1e4f;     // powers up to 7 are far from overflow for |x| <= LARGE

// Coefficients of one group, and those of the base, the function that is subtracted; null without one. C is float, or a
// vector of the coefficients of LANES groups.
template <class C> struct Group {
    const C *a, *b, *a0, *b0;
};

template <class V> static inline V spread(float c) { return all<V>(c); }
template <class V> static inline V spread(V c) { return c; }
static inline Floats absolute_of(Floats c) { return absolute(c); }
static inline Doubles absolute_of(Doubles c) { return absolute(c); }

template <class V> struct Point {
    V reciprocal, y, slope, sign;  // 1/Q, R, dR/dx; dR/db_j = -sign x^j R / Q, of |x| in the other form
};

// p / q by 1/q. With EXACT the product is not fused with a subtraction that follows, which would make the difference of
// two equal functions other than 0.
template <bool EXACT, class V> static inline V quotient(V p, V q, V reciprocal) {
    if (!EXACT) return p * reciprocal;
    if constexpr (sizeof(V) == sizeof(Floats)) return unfused(p * reciprocal);
    return p / q;
}

template <bool EXACT, class V, class C> static inline Point<V> value_and_slope(V x, const C *a, const C *b) {
    V p = spread<V>(a[M]), p_slope = {};
    for (int i = M - 1; i >= 0; --i) {
        p_slope = p_slope * x + p;
        p = p * x + a[i];
    }
#if ABS_OF_SUM
    V power = x, v = spread<V>(b[N - 1]), v_slope = {};
    for (int j = N - 2; j >= 0; --j) {
        v_slope = v_slope * power + v;
        v = v * power + b[j];
    }
    V inner = power * v, sign = inner >= 0 ? all<V>(1) : all<V>(-1);
    V q = sign * inner + 1, q_slope = sign * (v + power * v_slope);
#else
    V power = absolute(x), v = spread<V>(absolute_of(b[N - 1])), v_slope = {};
    for (int j = N - 2; j >= 0; --j) {
        v_slope = v_slope * power + v;
        v = v * power + absolute_of(b[j]);
    }
    V sign = all<V>(1);
    V q = power * v + 1, q_slope = (x >= 0 ? all<V>(1) : all<V>(-1)) * (v + power * v_slope);
#endif
    V reciprocal = 1 / q, y = quotient<EXACT>(p, q, reciprocal);
    return {reciprocal, y, quotient<EXACT>(p_slope - q_slope * y, q, reciprocal), sign};
}

template <class V, class C> static inline V value(V x, const Group<C> &c) {
    if (!c.a0) return value_and_slope<false>(x, c.a, c.b).y;
    return value_and_slope<true>(x, c.a, c.b).y - value_and_slope<true>(x, c.a0, c.b0).y;
}

// The gradient of x. Adds the gradients of the coefficients to `sums`, lane by lane.
template <class V, class C> static inline V gradient(V g, V x, const Group<C> &c, V *sums) {
    Point<V> at = c.a0 ? value_and_slope<true>(x, c.a, c.b) : value_and_slope<false>(x, c.a, c.b);
    if (sums) {
        V powers[(M > N ? M : N) + 1];
        powers[1] = x;
        for (int i = 2; i <= (M > N ? M : N); ++i) powers[i] = powers[i / 2] * powers[i - i / 2];
        V term = g * at.reciprocal, other = -term * at.y * at.sign;
        sums[0] += term;
        for (int i = 1; i <= M; ++i) sums[i] += term * powers[i];
        for (int j = 1; j <= N; ++j) sums[M + j] += other * (ABS_OF_SUM ? powers[j] : absolute(powers[j]));
    }
    return g * (c.a0 ? at.slope - value_and_slope<true>(x, c.a0, c.b0).slope : at.slope);
}

static inline Floats value_of(Floats x, const Group<float> &c) {
    if (__builtin_expect(all_within(x, LARGE), 1)) return value(x, c);
    return __builtin_convertvector(value(__builtin_convertvector(x, Doubles), c), Floats);
}

static inline Floats gradient_of(Floats g, Floats x, const Group<float> &c, Floats *lanes, double *total) {
    if (__builtin_expect(all_within(x, LARGE), 1)) return gradient(g, x, c, lanes);
    Doubles sums[WIDTH] = {};
    Doubles d = gradient(__builtin_convertvector(g, Doubles), __builtin_convertvector(x, Doubles), c,
                         lanes ? sums : nullptr);
    for (int w = 0; lanes && w < WIDTH; ++w)
        for (int l = 0; l < LANES; ++l) total[w] += sums[w][l];
    return __builtin_convertvector(d, Floats);
}

static inline Group<float> group(const float *a, const float *b, const float *a0, const float *b0, int64_t g) {
    return {a + g * (M + 1), b + g * N, a0 ? a0 + g * (M + 1) : nullptr, b0 ? b0 + g * N : nullptr};
}

// Rows of K elements, D apart, all of one group. Where half a vector is left at the end of a row, two rows share one.
template <class T>
static inline void forward_rows(const T *x, T *y, const Group<float> &c, int64_t rows, int64_t K, int64_t D) {
    const int64_t whole = K / LANES * LANES;
    const bool halves = K - whole == LANES / 2;
    for (int64_t row = 0; row < rows; ++row) {
        const T *from = x + row * D;
        T *to = y + row * D;
        for (int64_t k = 0; k < whole; k += LANES) store(to + k, value_of(load(from + k), c));
        if (halves && row % 2)
            store_two(to - D + whole, to + whole, value_of(load_two(from - D + whole, from + whole), c));
        else if (whole < K && (!halves || row + 1 == rows))
            store_partial(to + whole, value_of(load_partial(from + whole, K - whole), c), K - whole);
    }
}

template <class T>
static inline void backward_rows(const T *g, const T *x, T *d, Floats *lanes, double *total, const Group<float> &c,
                                 int64_t rows, int64_t K, int64_t D) {
    const int64_t whole = K / LANES * LANES;
    const bool halves = K - whole == LANES / 2;
    for (int64_t row = 0; row < rows; ++row) {
        const T *grad = g + row * D, *from = x + row * D;
        T *to = d + row * D;
        for (int64_t k = 0; k < whole; k += LANES)
            store(to + k, gradient_of(load(grad + k), load(from + k), c, lanes, total));
        if (halves && row % 2) {
            Floats g_ends = load_two(grad - D + whole, grad + whole), x_ends = load_two(from - D + whole, from + whole);
            store_two(to - D + whole, to + whole, gradient_of(g_ends, x_ends, c, lanes, total));
        } else if (whole < K && (!halves || row + 1 == rows)) {
            Floats g_end = load_partial(grad + whole, K - whole), x_end = load_partial(from + whole, K - whole);
            store_partial(to + whole, gradient_of(g_end, x_end, c, lanes, total), K - whole);
        }
    }
}

// Rows that are read together: several where groups are so narrow that a row of one is over before it has begun.
static inline int64_t together(int64_t K) { return K < 4 * LANES ? 8 : 1; }

template <class T>
static void forward(const T *x, T *y, const float *a, const float *b, const float *a0, const float *b0, int64_t outer,
                    int64_t G, int64_t K, int threads) {
    const int64_t rows = together(K), blocks = (outer + rows - 1) / rows;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t i = 0; i < G; ++i) {
            const int64_t first = block * rows, at = (first * G + i) * K;
            forward_rows(x + at, y + at, group(a, b, a0, b0, i), first + rows < outer ? rows : outer - first, K, G * K);
        }
}

// Threads take chunks of a fixed number of rows, so that the sums of the chunks (chunks, G, WIDTH) do not depend on the
// number of threads. Within a chunk each coefficient has a vector of sums, whose lanes are added up at the end.
template <class T>
static void backward(const T *g, const T *x, T *d, double *sums, const float *a, const float *b, const float *a0,
                     const float *b0, int64_t outer, int64_t G, int64_t K, int64_t chunk_rows, int threads) {
    const int64_t rows = together(K), chunks = (outer + chunk_rows - 1) / chunk_rows;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t last = (chunk + 1) * chunk_rows < outer ? (chunk + 1) * chunk_rows : outer;
        // Allocated as in C, so that the C++ runtime need not be linked, whether the compiler is called gcc or g++.
        Floats *chunk_lanes = sums ? (Floats *)aligned_alloc(64, (G * WIDTH * sizeof(Floats) + 63) / 64 * 64) : nullptr;
        if (sums) memset(chunk_lanes, 0, G * WIDTH * sizeof(Floats));
        double *totals = sums ? sums + chunk * G * WIDTH : nullptr;
        for (int64_t row = chunk * chunk_rows; row < last; row += rows)
            for (int64_t i = 0; i < G; ++i) {
                const int64_t at = (row * G + i) * K, count = row + rows < last ? rows : last - row;
                const Group<float> c = group(a, b, a0, b0, i);
                if (!sums) {
                    backward_rows(g + at, x + at, d + at, nullptr, nullptr, c, count, K, G * K);
                    continue;
                }
                Floats row_sums[WIDTH];  // in registers for these rows
                memcpy(row_sums, &chunk_lanes[i * WIDTH], sizeof row_sums);
                backward_rows(g + at, x + at, d + at, row_sums, totals + i * WIDTH, c, count, K, G * K);
                memcpy(&chunk_lanes[i * WIDTH], row_sums, sizeof row_sums);
            }
        for (int64_t i = 0; sums && i < G * WIDTH; ++i)
            for (int l = 0; l < LANES; ++l) totals[i] += chunk_lanes[i][l];
        free(chunk_lanes);
    }
}

// The functions of LANES neighbouring channels; coefficients are (degree, D) in memory.
template <class V> struct Columns {
    V a[M + 1], b[N], a0[M + 1], b0[N];
    bool subtracts;

    Group<V> group() const { return {a, b, subtracts ? a0 : nullptr, subtracts ? b0 : nullptr}; }
};

static inline Columns<Floats> columns(const float *a, const float *b, const float *a0, const float *b0, int64_t d,
                                      int64_t D) {
    Columns<Floats> c = {};
    c.subtracts = a0 != nullptr;
    for (int i = 0; i <= M; ++i) c.a[i] = take(a + i * D, d, D);
    for (int j = 0; j < N; ++j) c.b[j] = take(b + j * D, d, D);
    for (int i = 0; a0 && i <= M; ++i) c.a0[i] = take(a0 + i * D, d, D);
    for (int j = 0; a0 && j < N; ++j) c.b0[j] = take(b0 + j * D, d, D);
    return c;
}

static inline Columns<Doubles> widened(const Columns<Floats> &c) {
    Columns<Doubles> wide = {};
    wide.subtracts = c.subtracts;
    for (int i = 0; i <= M; ++i) wide.a[i] = __builtin_convertvector(c.a[i], Doubles);
    for (int j = 0; j < N; ++j) wide.b[j] = __builtin_convertvector(c.b[j], Doubles);
    for (int i = 0; i <= M; ++i) wide.a0[i] = __builtin_convertvector(c.a0[i], Doubles);
    for (int j = 0; j < N; ++j) wide.b0[j] = __builtin_convertvector(c.b0[j], Doubles);
    return wide;
}

// Tensors are (outer, D). Threads take chunks of `rows` rows; the coefficients of LANES channels are loaded once a chunk.
template <class T>
static void forward_channels(const T *x, T *y, const float *a, const float *b, const float *a0, const float *b0,
                             int64_t outer, int64_t D, int64_t rows, int threads) {
    const int64_t chunks = (outer + rows - 1) / rows;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t last = (chunk + 1) * rows < outer ? (chunk + 1) * rows : outer;
        for (int64_t d = 0; d < D; d += LANES) {
            const Columns<Floats> c = columns(a, b, a0, b0, d, D);
            for (int64_t row = chunk * rows; row < last; ++row) {
                Floats at = take(x + row * D, d, D), result;
                if (__builtin_expect(all_within(at, LARGE), 1))
                    result = value(at, c.group());
                else
                    result = __builtin_convertvector(
                        value(__builtin_convertvector(at, Doubles), widened(c).group()), Floats);
                put(y + row * D, result, d, D);
            }
        }
    }
}

// As `backward`, for one function a channel: the sums of the chunks are (chunks, D, WIDTH).
template <class T>
static void backward_channels(const T *g, const T *x, T *dx, double *sums, const float *a, const float *b,
                              const float *a0, const float *b0, int64_t outer, int64_t D, int64_t rows, int threads) {
    const int64_t chunks = (outer + rows - 1) / rows;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t last = (chunk + 1) * rows < outer ? (chunk + 1) * rows : outer;
        for (int64_t d = 0; d < D; d += LANES) {
            const Columns<Floats> c = columns(a, b, a0, b0, d, D);
            Floats lanes[WIDTH] = {};
            Doubles totals[WIDTH] = {};
            for (int64_t row = chunk * rows; row < last; ++row) {
                Floats at = take(x + row * D, d, D), grad = take(g + row * D, d, D), result;
                if (__builtin_expect(all_within(at, LARGE), 1)) {
                    result = gradient(grad, at, c.group(), sums ? lanes : nullptr);
                } else {
                    const Columns<Doubles> wide = widened(c);
                    result = __builtin_convertvector(
                        gradient(__builtin_convertvector(grad, Doubles), __builtin_convertvector(at, Doubles),
                                 wide.group(), sums ? totals : nullptr),
                        Floats);
                }
                put(dx + row * D, result, d, D);
                if (sums && ((row + 1) % IN_FLOAT == 0 || row + 1 == last))
                    for (int w = 0; w < WIDTH; ++w) {
                        totals[w] += __builtin_convertvector(lanes[w], Doubles);
                        lanes[w] = Floats{};
                    }
            }
            for (int l = 0; sums && l < LANES && d + l < D; ++l)
                for (int w = 0; w < WIDTH; ++w)
                    sums[(chunk * D + d + l) * WIDTH + w] = totals[w][l];
        }
    }
}

extern "C" {
void forward_float32(const float *x, float *y, const float *a, const float *b, const float *a0, const float *b0,
                     int64_t outer, int64_t G, int64_t K, int threads) {
    forward(x, y, a, b, a0, b0, outer, G, K, threads);
}
void forward_bfloat16(const uint16_t *x, uint16_t *y, const float *a, const float *b, const float *a0, const float *b0,
                      int64_t outer, int64_t G, int64_t K, int threads) {
    forward(x, y, a, b, a0, b0, outer, G, K, threads);
}
void backward_float32(const float *g, const float *x, float *d, double *sums, const float *a, const float *b,
                      const float *a0, const float *b0, int64_t outer, int64_t G, int64_t K, int64_t rows, int threads) {
    backward(g, x, d, sums, a, b, a0, b0, outer, G, K, rows, threads);
}
void backward_bfloat16(const uint16_t *g, const uint16_t *x, uint16_t *d, double *sums, const float *a, const float *b,
                       const float *a0, const float *b0, int64_t outer, int64_t G, int64_t K, int64_t rows,
                       int threads) {
    backward(g, x, d, sums, a, b, a0, b0, outer, G, K, rows, threads);
}
#define CHANNELS(NAME, T)                                                                                              \
    void forward_channels_##NAME(const T *x, T *y, const float *a, const float *b, const float *a0, const float *b0,    \
                                 int64_t outer, int64_t D, int64_t rows, int threads) {                                \
        forward_channels(x, y, a, b, a0, b0, outer, D, rows, threads);                                                 \
    }                                                                                                                  \
    void backward_channels_##NAME(const T *g, const T *x, T *d, double *sums, const float *a, const float *b,          \
                                  const float *a0, const float *b0, int64_t outer, int64_t D, int64_t rows,            \
                                  int threads) {                                                                       \
        backward_channels(g, x, d, sums, a, b, a0, b0, outer, D, rows, threads);                                       \
    }
CHANNELS(float32, float)
CHANNELS(bfloat16, uint16_t)
}
