// W0 + s f(z) and the gradient through it, each in one pass over memory; called by _merged_native.py for
// merged_linear.py. f has the form
//
//     s f(z) = c1 z + (c2 + c3 z) sin(w z + phase)
//
// z is float32; W0 and the result are float32 or bfloat16 (uint16_t); all are contiguous. The argument of the sine is
// thousands of radians for LoRAN's constants, so it is formed and reduced in float64; the rest is float32.
#include "vectors.h"

#include <math.h>

struct Sinusoid {
    double c1, c2, c3, w, phase;
};

constexpr double PI = 3.14159265358979323846;
constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves a whole number in the lowest bits
constexpr double LARGE = 1e8;                 // radians; below, subtracting multiples of PI errs by less than 1e-7

// sin p and cos p for p = w z + phase. With k PI the multiple of PI nearest to p and r = p - k PI, they are (-1)^k sin r
// and (-1)^k cos r, which power series give.
static inline void sine_and_cosine(Floats z, const Sinusoid &f, Floats *sine, Floats *cosine) {
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

static inline Floats value(Floats z, Floats sine, const Sinusoid &f) {
    return (float)f.c1 * z + ((float)f.c2 + (float)f.c3 * z) * sine;
}

template <class W, class T>
static void merge(const float *z, const W *w0, T *merged, const Sinusoid *sinusoid, int64_t n, int64_t chunk,
                  int threads) {
    const Sinusoid f = *sinusoid;
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

// Multiplies d, the gradient of the weight, by s f'(z). Also writes W0 + s f(z) to `merged` and the sums of d s df/dw
// over the chunks to `sums`, each if it is given.
template <class W, class T>
static void backward(const float *z, float *d, const W *w0, T *merged, double *sums, const Sinusoid *sinusoid,
                     int64_t n, int64_t chunk, int threads) {
    const Sinusoid f = *sinusoid;
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
            Floats g = take(d, i, end);
            Floats by_phase = ((float)f.c2 + (float)f.c3 * at) * cosine;  // the derivative of s f by the phase
            if (sums) {
                Floats by_frequency = g * at * by_phase;
                for (int l = 0; l < LANES; ++l) sum += by_frequency[l];
            }
            put(d, g * ((float)f.c1 + (float)f.c3 * sine + (float)f.w * by_phase), i, end);
        }
        if (sums) sums[begin / chunk] = sum;
    }
}

#define FUNCTIONS(W, W_NAME, T, T_NAME)                                                                               \
    void merge_##W_NAME##_##T_NAME(const float *z, const W *w0, T *merged, const Sinusoid *f, int64_t n,              \
                                   int64_t chunk, int threads) {                                                      \
        merge(z, w0, merged, f, n, chunk, threads);                                                                   \
    }                                                                                                                 \
    void backward_##W_NAME##_##T_NAME(const float *z, float *d, const W *w0, T *merged, double *sums,                 \
                                      const Sinusoid *f, int64_t n, int64_t chunk, int threads) {                     \
        backward(z, d, w0, merged, sums, f, n, chunk, threads);                                                       \
    }

extern "C" {
FUNCTIONS(float, float32, float, float32)
FUNCTIONS(float, float32, uint16_t, bfloat16)
FUNCTIONS(uint16_t, bfloat16, float, float32)
FUNCTIONS(uint16_t, bfloat16, uint16_t, bfloat16)
}
