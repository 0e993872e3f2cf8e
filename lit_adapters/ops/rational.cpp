// Rational functions, one pass over memory in each direction: the C++ path of rational.py, for the CPU.
// _rational_native.py compiles this file for one form, degree m = M of the numerator and n = N of the denominator. The
// formulas are those of _rational_math.py.
//
// Tensors are (outer, G, K), contiguous, float32 or bfloat16; coefficients are (G, degree), float32. LANES neighbouring
// elements of a group are computed at a time: in float32, or in float64 if the powers of one of them might overflow.
#include "vectors.h"

constexpr int WIDTH = M + 1 + N;  // coefficients of a group
constexpr float LARGE = 1e4f;     // powers up to 7 are far from overflow for |x| <= LARGE

struct Group {  // coefficients of one group, and those of the base, the function that is subtracted; null without one
    const float *a, *b, *a0, *b0;
};

template <class V> struct Point {
    V reciprocal, y, slope, by_b1, power;  // 1/Q, R, dR/dx; dR/db_j = -by_b1 power^(j-1) R / Q
};

// EXACT divides by Q: a multiplication by 1/Q might be fused with a subtraction that follows, and the difference of two
// equal functions would not be 0.
template <bool EXACT, class V> static inline Point<V> value_and_slope(V x, const float *a, const float *b) {
    V p = all<V>(a[M]), p_slope = {};
    for (int i = M - 1; i >= 0; --i) {
        p_slope = p_slope * x + p;
        p = p * x + a[i];
    }
#if ABS_OF_SUM
    V power = x, v = all<V>(b[N - 1]), v_slope = {};
    for (int j = N - 2; j >= 0; --j) {
        v_slope = v_slope * power + v;
        v = v * power + b[j];
    }
    V inner = power * v, sign = inner >= 0 ? all<V>(1) : all<V>(-1);
    V q = sign * inner + 1, q_slope = sign * (v + power * v_slope), by_b1 = sign * x;
#else
    V power = absolute(x), v = all<V>(absolute_of(b[N - 1])), v_slope = {};
    for (int j = N - 2; j >= 0; --j) {
        v_slope = v_slope * power + v;
        v = v * power + absolute_of(b[j]);
    }
    V sign = x >= 0 ? all<V>(1) : all<V>(-1);
    V q = power * v + 1, q_slope = sign * (v + power * v_slope), by_b1 = power;
#endif
    V reciprocal = 1 / q, y = EXACT ? p / q : p * reciprocal;
    V slope = p_slope - q_slope * y;
    return {reciprocal, y, EXACT ? slope / q : slope * reciprocal, by_b1, power};
}

template <class V> static inline V value(V x, const Group &c) {
    if (!c.a0) return value_and_slope<false>(x, c.a, c.b).y;
    return value_and_slope<true>(x, c.a, c.b).y - value_and_slope<true>(x, c.a0, c.b0).y;
}

// The gradient of x. Adds the gradients of the coefficients to `sums`, lane by lane.
template <class V> static inline V gradient(V g, V x, const Group &c, V *sums) {
    Point<V> at = c.a0 ? value_and_slope<true>(x, c.a, c.b) : value_and_slope<false>(x, c.a, c.b);
    if (sums) {
        V term = g * at.reciprocal, other = -term * at.y * at.by_b1;
        for (int i = 0; i <= M; ++i) {
            sums[i] += term;
            term *= x;
        }
        for (int j = 0; j < N; ++j) {
            sums[M + 1 + j] += other;
            other *= at.power;
        }
    }
    return g * (c.a0 ? at.slope - value_and_slope<true>(x, c.a0, c.b0).slope : at.slope);
}

static inline Floats value_of(Floats x, const Group &c) {
    if (__builtin_expect(all_within(x, LARGE), 1)) return value(x, c);
    return __builtin_convertvector(value(__builtin_convertvector(x, Doubles), c), Floats);
}

static inline Floats gradient_of(Floats g, Floats x, const Group &c, Floats *lanes, double *total) {
    if (__builtin_expect(all_within(x, LARGE), 1)) return gradient(g, x, c, lanes);
    Doubles sums[WIDTH] = {};
    Doubles d = gradient(__builtin_convertvector(g, Doubles), __builtin_convertvector(x, Doubles), c,
                         lanes ? sums : nullptr);
    for (int w = 0; lanes && w < WIDTH; ++w)
        for (int l = 0; l < LANES; ++l) total[w] += sums[w][l];
    return __builtin_convertvector(d, Floats);
}

static inline Group group(const float *a, const float *b, const float *a0, const float *b0, int64_t g) {
    return {a + g * (M + 1), b + g * N, a0 ? a0 + g * (M + 1) : nullptr, b0 ? b0 + g * N : nullptr};
}

template <class T>
static void forward(const T *x, T *y, const float *a, const float *b, const float *a0, const float *b0, int64_t outer,
                    int64_t G, int64_t K, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < outer * G; ++row) {
        const Group c = group(a, b, a0, b0, row % G);
        const T *from = x + row * K;
        T *to = y + row * K;
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) store(to + k, value_of(load(from + k), c));
        if (k < K) store_partial(to + k, value_of(load_partial(from + k, K - k), c), K - k);
    }
}

// Threads take chunks of a fixed number of rows, so that the sums of the chunks (chunks, G, WIDTH) do not depend on the
// number of threads. Within a chunk each coefficient has a vector of sums, whose lanes are added up at the end.
template <class T>
static void backward(const T *g, const T *x, T *d, double *sums, const float *a, const float *b, const float *a0,
                     const float *b0, int64_t outer, int64_t G, int64_t K, int64_t rows, int threads) {
    const int64_t chunks = (outer + rows - 1) / rows;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t last = (chunk + 1) * rows < outer ? (chunk + 1) * rows : outer;
        // Allocated as in C, so that the C++ runtime need not be linked, whether the compiler is called gcc or g++.
        Floats *chunk_lanes = sums ? (Floats *)aligned_alloc(64, (G * WIDTH * sizeof(Floats) + 63) / 64 * 64) : nullptr;
        if (sums) memset(chunk_lanes, 0, G * WIDTH * sizeof(Floats));
        double *totals = sums ? sums + chunk * G * WIDTH : nullptr;
        for (int64_t row = chunk * rows; row < last; ++row)
            for (int64_t i = 0; i < G; ++i) {
                const Group c = group(a, b, a0, b0, i);
                const int64_t at = (row * G + i) * K;
                const T *from = x + at, *grad = g + at;
                T *to = d + at;
                double *total = sums ? totals + i * WIDTH : nullptr;
                Floats row_sums[WIDTH], *lanes = sums ? row_sums : nullptr;  // in registers for the length of a row
                if (sums) memcpy(row_sums, &chunk_lanes[i * WIDTH], sizeof row_sums);
                int64_t k = 0;
                for (; k + LANES <= K; k += LANES)
                    store(to + k, gradient_of(load(grad + k), load(from + k), c, lanes, total));
                if (k < K) {
                    Floats g_end = load_partial(grad + k, K - k), x_end = load_partial(from + k, K - k);
                    store_partial(to + k, gradient_of(g_end, x_end, c, lanes, total), K - k);
                }
                if (sums) memcpy(&chunk_lanes[i * WIDTH], row_sums, sizeof row_sums);
            }
        for (int64_t i = 0; sums && i < G * WIDTH; ++i)
            for (int l = 0; l < LANES; ++l) totals[i] += chunk_lanes[i][l];
        free(chunk_lanes);
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
}
