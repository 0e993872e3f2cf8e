// The gain of an output, one pass over memory in each direction; called by _rescaled_native.py for rescaled.py:
//
//     h = y + c (y - b)          dy = g + c g          dc = sum over rows of g (y - b)
//
// c is the gain minus one, b the bias; both are (columns), float32. y, h and their gradients are
// (rows, columns), float32 or bfloat16 (uint16_t).
#include "vectors.h"

static inline Floats without_bias(Floats y, const float *b, int64_t i, int64_t end) {
    return b ? y - take(b, i, end) : y;
}

template <class T>
static void forward(const T *y, T *h, const float *c, const float *b, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const T *from = y + row * columns;
        T *to = h + row * columns;
        for (int64_t i = 0; i < columns; i += LANES) {
            Floats at = take(from, i, columns);
            put(to, at + take(c, i, columns) * without_bias(at, b, i, columns), i, columns);
        }
    }
}

// Threads take chunks of a fixed number of rows, so that the sums of the chunks (chunks, columns) do not depend on the
// number of threads.
template <class T>
static void backward(const T *g, const T *y, T *d, float *sums, const float *c, const float *b, int64_t rows,
                     int64_t columns, int64_t chunk, int threads) {
    const int64_t chunks = (rows + chunk - 1) / chunk;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t number = 0; number < chunks; ++number) {
        const int64_t last = (number + 1) * chunk < rows ? (number + 1) * chunk : rows;
        float *sum = sums ? sums + number * columns : nullptr;
        for (int64_t row = number * chunk; row < last; ++row) {
            const T *from = y + row * columns, *grad = g + row * columns;
            T *to = d + row * columns;
            for (int64_t i = 0; i < columns; i += LANES) {
                Floats slope = take(grad, i, columns);
                put(to, slope + take(c, i, columns) * slope, i, columns);
                if (sum) {
                    Floats product = slope * without_bias(take(from, i, columns), b, i, columns);
                    put(sum, take(sum, i, columns) + product, i, columns);
                }
            }
        }
    }
}

#define FUNCTIONS(T, NAME)                                                                                            \
    void forward_##NAME(const T *y, T *h, const float *c, const float *b, int64_t rows, int64_t columns,              \
                        int threads) {                                                                                \
        forward(y, h, c, b, rows, columns, threads);                                                                  \
    }                                                                                                                 \
    void backward_##NAME(const T *g, const T *y, T *d, float *sums, const float *c, const float *b,                   \
                         int64_t rows, int64_t columns, int64_t chunk, int threads) {                                 \
        backward(g, y, d, sums, c, b, rows, columns, chunk, threads);                                                 \
    }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(uint16_t, bfloat16)
}
