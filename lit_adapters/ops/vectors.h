// Short vectors of neighbouring elements, for the kernels in this folder: float32 in registers, float32 or bfloat16 in
// memory.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__aarch64__)
#define LANES 4
#else
#define LANES 8
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int64_t Longs __attribute__((vector_size(8 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <class V> static inline V all(float c) { return V{} + c; }
template <class V> static inline V absolute(V x) { return x >= 0 ? x : -x; }
static inline float absolute_of(float c) { return c >= 0 ? c : -c; }

static inline bool all_within(Floats x, float limit) {  // all |x| <= limit; false if one is NaN
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)absolute(x), _mm512_set1_ps(limit), _CMP_LE_OQ) == 0xffff;
#elif defined(__AVX__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)absolute(x), _mm256_set1_ps(limit), _CMP_LE_OQ)) == 0xff;
#elif defined(__aarch64__)
    return vminvq_u32(vcaleq_f32((float32x4_t)x, vdupq_n_f32(limit))) != 0;
#else
    bool all_fit = true;
    for (int i = 0; i < LANES; ++i) all_fit &= absolute_of(x[i]) <= limit;
    return all_fit;
#endif
}

static inline Floats load(const float *from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}
static inline Floats load(const uint16_t *from) {  // bfloat16 is the upper half of a float32
    Halves h;
    memcpy(&h, from, sizeof h);
    return (Floats)(__builtin_convertvector(h, Words) << 16);
}
static inline void store(float *to, Floats x) { memcpy(to, &x, sizeof x); }
// Rounded to nearest, ties to even; a NaN stays NaN. The processor's instruction makes 0 of numbers below 1.2e-38.
static inline Halves halves_of(Floats x) {
#ifdef __AVX512BF16__
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    Words w = (Words)x;
    Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : (w >> 16) | 0x40, Halves);
#endif
}
static inline void store(uint16_t *to, Floats x) {
    Halves h = halves_of(x);
    memcpy(to, &h, sizeof h);
}

// The value, which the compiler may not fuse with a sum that follows.
static inline Floats unfused(Floats x) {
#if defined(__AVX__)
    asm("" : "+v"(x));
    return x;
#elif defined(__aarch64__)
    asm("" : "+w"(x));
    return x;
#else
    volatile Floats kept = x;
    return kept;
#endif
}

// Fewer than LANES elements, at the end of a row. The other lanes are zero, which adds nothing to any sum.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
static inline Floats load_partial(const float *from, int64_t count) {
    return (Floats)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
}
static inline Floats load_partial(const uint16_t *from, int64_t count) {
    Halves h = (Halves)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), from);
    return (Floats)(__builtin_convertvector(h, Words) << 16);
}
static inline void store_partial(float *to, Floats x, int64_t count) {
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)x);
}
static inline void store_partial(uint16_t *to, Floats x, int64_t count) {
    _mm256_mask_storeu_epi16(to, (__mmask16)((1u << count) - 1), (__m256i)halves_of(x));
}
#else
template <class T> static inline Floats load_partial(const T *from, int64_t count) {
    T padded[LANES] = {};
    memcpy(padded, from, count * sizeof(T));
    return load(padded);
}
template <class T> static inline void store_partial(T *to, Floats x, int64_t count) {
    T padded[LANES];
    store(padded, x);
    memcpy(to, padded, count * sizeof(T));
}
#endif

// Half a vector from each of two places.
#ifdef __AVX512DQ__
static inline Floats load_two(const float *low, const float *high) {
    return (Floats)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1);
}
static inline Floats load_two(const uint16_t *low, const uint16_t *high) {
    __m128i l = _mm_loadu_si128((const __m128i *)low), h = _mm_loadu_si128((const __m128i *)high);
    Halves both = (Halves)_mm256_inserti128_si256(_mm256_castsi128_si256(l), h, 1);
    return (Floats)(__builtin_convertvector(both, Words) << 16);
}
static inline void store_two(float *low, float *high, Floats x) {
    _mm256_storeu_ps(low, _mm512_castps512_ps256((__m512)x));
    _mm256_storeu_ps(high, _mm512_extractf32x8_ps((__m512)x, 1));
}
static inline void store_two(uint16_t *low, uint16_t *high, Floats x) {
    __m256i h = (__m256i)halves_of(x);
    _mm_storeu_si128((__m128i *)low, _mm256_castsi256_si128(h));
    _mm_storeu_si128((__m128i *)high, _mm256_extracti128_si256(h, 1));
}
#else
template <class T> static inline Floats load_two(const T *low, const T *high) {
    T both[LANES];
    memcpy(both, low, sizeof both / 2);
    memcpy(both + LANES / 2, high, sizeof both / 2);
    return load(both);
}
template <class T> static inline void store_two(T *low, T *high, Floats x) {
    T both[LANES];
    store(both, x);
    memcpy(low, both, sizeof both / 2);
    memcpy(high, both + LANES / 2, sizeof both / 2);
}
#endif

// Reads or writes the LANES elements from i on, or the rest up to `end`.
template <class T> static inline Floats take(const T *from, int64_t i, int64_t end) {
    return i + LANES <= end ? load(from + i) : load_partial(from + i, end - i);
}
template <class T> static inline void put(T *to, Floats x, int64_t i, int64_t end) {
    if (i + LANES <= end)
        store(to + i, x);
    else
        store_partial(to + i, x, end - i);
}
