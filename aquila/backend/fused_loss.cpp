// Softmax cross-entropy and its gradient for rows of logits, in place: each row is read from memory once.
//
// A row of a real vocabulary fits a core's second cache: the largest value, the sum of exponentials and the
// gradient are three passes over it there. Sums are in fp32. Logits (rows, vocab) are bf16 or fp32.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t PART = 2048;

struct bf16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) {
    uint32_t word = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}
inline void store(float* to, float value) { *to = value; }
inline void store(bf16* to, float value) {  // to nearest, ties to even; NaN stays NaN
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    to->bits = value != value ? uint16_t(0x7fc0) : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// e^x for x <= 0 (or NaN): x = n ln 2 + r, |r| <= ln 2 / 2, Taylor's polynomial of degree 7 for e^r. It is
// written so that any compiler turns a loop of it into vectors. Relative error below 2e-7.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f;  // rounds to a whole number, which sits in the low bits
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t word;
    std::memcpy(&word, &shifted, sizeof word);
    word = (word + 127u) << 23;  // 2^n
    float power;
    std::memcpy(&power, &word, sizeof power);
    return p * power;
}

template <class T>
void rows_of(T* logits, const int64_t* labels, const float* scale, float* losses, int64_t rows, int64_t vocab,
             float z_loss, int gradient, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        T* x = logits + row * vocab;
        float top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < vocab; i++) top = load(x[i]) > top ? load(x[i]) : top;
        double total = 0;  // over parts, so that a hundred thousand terms lose nothing
        for (int64_t first = 0; first < vocab; first += PART) {
            const int64_t last = first + PART < vocab ? first + PART : vocab;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = first; i < last; i++) sum += exponential(load(x[i]) - top);
            total += sum;
        }
        const float lse = float(std::log(total) + top), target = load(x[labels[row]]);
        losses[row] = lse - target + z_loss * lse * lse;
        if (!gradient) continue;
        const float slope = scale[row] * (1 + 2 * z_loss * lse), factor = float(slope / total);
        const float own = exponential(target - top) * factor - scale[row];
#pragma omp simd
        for (int64_t i = 0; i < vocab; i++) store(x + i, exponential(load(x[i]) - top) * factor);
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
