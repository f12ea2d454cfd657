// Softmax cross-entropy and its gradient for rows of logits, in place: each row is read from memory once.
//
// A row of a real vocabulary fits a core's second cache: the largest value, the sum of exponentials and the
// gradient are three passes over it there. Sums are in fp32. Logits (rows, vocab) are bf16 or fp32.

#include <cmath>

#include "bf16.h"

namespace {

constexpr int64_t PART = 2048;

template <class T>
void rows_of(T* logits, const int64_t* labels, const float* scale, float* losses, int64_t rows, int64_t vocab,
             float z_loss, int gradient, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        T* x = logits + row * vocab;
        float top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < vocab; i++) top = float(x[i]) > top ? float(x[i]) : top;
        double total = 0;  // over parts, so that a hundred thousand terms lose nothing
        for (int64_t first = 0; first < vocab; first += PART) {
            const int64_t last = first + PART < vocab ? first + PART : vocab;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = first; i < last; i++) sum += exponential(float(x[i]) - top);
            total += sum;
        }
        const float lse = float(std::log(total) + top), target = float(x[labels[row]]);
        losses[row] = lse - target + z_loss * lse * lse;
        if (!gradient) continue;
        const float grad_logit = scale[row] * (1 + 2 * z_loss * lse), factor = float(grad_logit / total);
        const float own = exponential(target - top) * factor - scale[row];
#pragma omp simd
        for (int64_t i = 0; i < vocab; i++) store(x + i, exponential(float(x[i]) - top) * factor);
        store(x + labels[row], own);
    }
}

}  // namespace

extern "C" {
void cross_entropy_bf16(void* logits, const int64_t* labels, const float* scale, float* losses, int64_t rows,
                        int64_t vocab, float z_loss, int gradient, int threads) {
    rows_of((bf16*)logits, labels, scale, losses, rows, vocab, z_loss, gradient, threads);
}
void cross_entropy_fp32(void* logits, const int64_t* labels, const float* scale, float* losses, int64_t rows,
                        int64_t vocab, float z_loss, int gradient, int threads) {
    rows_of((float*)logits, labels, scale, losses, rows, vocab, z_loss, gradient, threads);
}
}
