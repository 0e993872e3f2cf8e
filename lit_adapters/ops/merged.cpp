// W0 + s f(z) and the gradient through it in one pass over memory, which merged_linear.py asks for (_merged_native.py),
// for functions of the form
//
//     s f(z) = c1 z + (c2 + c3 z) sin(w z + phase)
//
// z is float32, W0 and the result float32 or bfloat16 (uint16_t), all contiguous. The argument of the sine, thousands of
// radians for LoRAN's constants, is formed and reduced in float64; the rest is float32.
#include "vectors.h"

#include <math.h>

struct Wave {
    double c1, c2, c3, w, phase;
};

constexpr double PI = 3.14159265358979323846;
constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves a whole number in the lowest bits
constexpr double LARGE = 1e8;                 // radians up to which subtracting multiples of PI errs by less than 1e-7

// sin p and cos p: with the nearest multiple k of PI, (-1)^k times those of r = p - k PI, by their series.
static inline void sine_and_cosine(Floats z, const Wave &f, Floats *sine, Floats *cosine) {
    Doubles p = __builtin_convertvector(z, Doubles) * f.w + f.phase;
    if (__builtin_expect(!all_within(__builtin_convertvector(p, Floats), LARGE), 0)) {
        for (int l = 0; l < LANES; ++l) {
            (*sine)[l] = sin(p[l]);
            (*cosine)[l] = cos(p[l]);
        }
        return;
    }
    Doubles shifted = p * (1 / PI) + ROUND;
    Words sign = __builtin_convertvector((Longs)shifted, Words) << 31;
    Floats r = __builtin_convertvector(p - (shifted - ROUND) * PI, Floats), t = r * r;
    Floats s = t * (1.f / 6227020800) - 1.f / 39916800;
    s = s * t + 1.f / 362880;
    s = s * t - 1.f / 5040;
    s = s * t + 1.f / 120;
    s = s * t - 1.f / 6;
    s = s * t * r + r;
    Floats c = t * (1.f / 479001600) - 1.f / 3628800;
    c = c * t + 1.f / 40320;
    c = c * t - 1.f / 720;
    c = c * t + 1.f / 24;
    c = c * t - 0.5f;
    c = c * t + 1;
    *sine = (Floats)((Words)s ^ sign);
    *cosine = (Floats)((Words)c ^ sign);
}

static inline Floats value(Floats z, Floats sine, const Wave &f) {
    return (float)f.c1 * z + ((float)f.c2 + (float)f.c3 * z) * sine;
}

template <class W, class T>
static void merge(const float *z, const W *w0, T *merged, const Wave *wave, int64_t n, int64_t chunk, int threads) {
    const Wave f = *wave;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t begin = 0; begin < n; begin += chunk) {
        const int64_t end = begin + chunk < n ? begin + chunk : n;
        for (int64_t i = begin; i < end; i += LANES) {
            Floats at = take(z, i, end), sine, cosine;
            sine_and_cosine(at, f, &sine, &cosine);
            Floats y = value(at, sine, f);
            put(merged, w0 ? take(w0, i, end) + y : y, i, end);
        }
    }
}

// d becomes d s f'(z). Where `merged` is given it is written too, and where `sums` is, the sum of d s df/dw of each chunk.
template <class W, class T>
static void backward(const float *z, float *d, const W *w0, T *merged, double *sums, const Wave *wave, int64_t n,
                     int64_t chunk, int threads) {
    const Wave f = *wave;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t begin = 0; begin < n; begin += chunk) {
        const int64_t end = begin + chunk < n ? begin + chunk : n;
        double sum = 0;
        for (int64_t i = begin; i < end; i += LANES) {
            Floats at = take(z, i, end), sine, cosine;
            sine_and_cosine(at, f, &sine, &cosine);
            if (merged) {
                Floats y = value(at, sine, f);
                put(merged, w0 ? take(w0, i, end) + y : y, i, end);
            }
            Floats g = take(d, i, end), lever = ((float)f.c2 + (float)f.c3 * at) * cosine;
            if (sums) {
                Floats by_frequency = g * at * lever;
                for (int l = 0; l < LANES; ++l) sum += by_frequency[l];
            }
            put(d, g * ((float)f.c1 + (float)f.c3 * sine + (float)f.w * lever), i, end);
        }
        if (sums) sums[begin / chunk] = sum;
    }
}

#define FUNCTIONS(W, W_NAME, T, T_NAME)                                                                               \
    void merge_##W_NAME##_##T_NAME(const float *z, const W *w0, T *merged, const Wave *f, int64_t n, int64_t chunk,   \
                                   int threads) {                                                                     \
        merge(z, w0, merged, f, n, chunk, threads);                                                                   \
    }                                                                                                                 \
    void backward_##W_NAME##_##T_NAME(const float *z, float *d, const W *w0, T *merged, double *sums, const Wave *f,  \
                                      int64_t n, int64_t chunk, int threads) {                                        \
        backward(z, d, w0, merged, sums, f, n, chunk, threads);                                                       \
    }

extern "C" {
FUNCTIONS(float, float32, float, float32)
FUNCTIONS(float, float32, uint16_t, bfloat16)
FUNCTIONS(uint16_t, bfloat16, float, float32)
FUNCTIONS(uint16_t, bfloat16, uint16_t, bfloat16)
}
