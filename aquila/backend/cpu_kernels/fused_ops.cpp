// RMSNorm, SwiGLU and the rotary embedding, forward and backward, each as one pass over memory; the embedding's
// gradient, AdamW and a sum of squares likewise.
//
// Arithmetic is in fp32, and a result is rounded once. Tensors are dense, in bf16 or fp32.

#include <algorithm>
#include <cmath>
#include <vector>

#include "row_passes.h"

namespace {

constexpr int64_t ROWS = 32;        // rows a partial sum of the weight's gradient covers, whatever the threads
constexpr int64_t CHUNK = 1 << 14;  // elements a task of an elementwise pass
constexpr int64_t PART = 1024;      // elements that a sum in fp32 covers

template <class T>
void norm(const T* x, const T* weight, T* y, float* scale, int64_t rows, int64_t dim, float eps, int threads) {
    if (rows * dim <= CHUNK) threads = 1;  // waking the others takes longer
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) scale[r] = norm_row(x + r * dim, weight, y + r * dim, dim, eps);
}

// The gradient of a table of rows: for each row the sum over the tokens that took it, in their order; others zero.
// taken: the tokens' rows in ascending order, which the tokens `order` took.
template <class T>
void table(const T* grad_output, const int64_t* taken, const int64_t* order, T* gradient, int64_t tokens, int64_t rows,
           int64_t dim, int threads) {
    constexpr int64_t BLOCK = 512;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sum(dim);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < rows; first += BLOCK) {
            int64_t at = std::lower_bound(taken, taken + tokens, first) - taken;
            for (int64_t row = first; row < std::min(rows, first + BLOCK); row++) {
                T* to = gradient + row * dim;
                if (at == tokens || taken[at] != row) {
                    std::memset(to, 0, dim * sizeof(T));
                    continue;
                }
                std::fill(sum.begin(), sum.end(), 0.0f);
                for (; at < tokens && taken[at] == row; at++)
                    for (int64_t i = 0; i < dim; i++) sum[i] += float(grad_output[order[at] * dim + i]);
                for (int64_t i = 0; i < dim; i++) store(to + i, sum[i]);
            }
        }
    }
}

// With n = x * scale and g = dy * weight: dx = scale (g - n mean(g n)), dweight = sum of dy n.
template <class T>
void norm_backward(const T* x, const T* weight, const float* scale, const T* dy, T* dx, T* dweight, int64_t rows,
                   int64_t dim, int threads) {
    const int64_t parts = (rows + ROWS - 1) / ROWS;
    std::vector<float> sums(parts * dim, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < parts; part++) {
        float* own = sums.data() + part * dim;
        for (int64_t r = part * ROWS; r < std::min(rows, (part + 1) * ROWS); r++) {
            const T *from = x + r * dim, *dy_row = dy + r * dim;
            T* to = dx + r * dim;
            const float by = scale[r];
            float mean = 0;
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < dim; i++) {
                const float n = float(from[i]) * by, g = float(dy_row[i]);
                own[i] += g * n;
                mean += g * float(weight[i]) * n;
            }
            mean /= dim;
#pragma omp simd
            for (int64_t i = 0; i < dim; i++)
                store(to + i, by * (float(dy_row[i]) * float(weight[i]) - float(from[i]) * by * mean));
        }
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < dim; i++) {
        double sum = 0;
        for (int64_t part = 0; part < parts; part++) sum += sums[part * dim + i];
        store(dweight + i, float(sum));
    }
}

// gate and up: rows that begin `step` elements after one another; y is dense.
template <class T>
void gated(const T* gate, const T* up, T* y, int64_t rows, int64_t width, int64_t step, int threads) {
    if (rows * width <= CHUNK) threads = 1;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t first = 0; first < width; first += CHUNK) {
            const T *g = gate + r * step, *u = up + r * step;
            T* to = y + r * width;
            const int64_t last = std::min(width, first + CHUNK);
            gate_row(g + first, u + first, to + first, last - first);
        }
}

template <class T>
void gated_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t rows, int64_t width,
                    int64_t step, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t first = 0; first < width; first += CHUNK) {
            const T *g_row = gate + r * step, *u_row = up + r * step, *from = dy + r * width;
            T *to_gate = dgate + r * step, *to_up = dup + r * step;
            const int64_t last = std::min(width, first + CHUNK);
#pragma omp simd
            for (int64_t i = first; i < last; i++) {
                const float g = g_row[i], s = sigmoid(g), dy_i = from[i];
                store(to_up + i, dy_i * g * s);
                store(to_gate + i, dy_i * float(u_row[i]) * s * (1.0f + g * (1.0f - s)));
            }
        }
}

struct Pair {
    float even, odd;
};
inline Pair load(const float* x, int64_t i) { return {x[2 * i], x[2 * i + 1]}; }
inline Pair load(const bf16* x, int64_t i) {
    uint32_t word;
    std::memcpy(&word, x + 2 * i, 4);
    const uint32_t even = word << 16, odd = word & 0xffff0000u;
    Pair pair;
    std::memcpy(&pair.even, &even, 4);
    std::memcpy(&pair.odd, &odd, 4);
    return pair;
}
inline void store(float* x, int64_t i, Pair p) { x[2 * i] = p.even, x[2 * i + 1] = p.odd; }
inline void store(bf16* x, int64_t i, Pair p) {
    bf16 even, odd;
    store(&even, p.even);
    store(&odd, p.odd);
    const uint32_t word = uint32_t(even.bits) | uint32_t(odd.bits) << 16;
    std::memcpy(x + 2 * i, &word, 4);
}

// x (batch, positions, heads, 2 half); cosines and sines (batch, or 1 with batch_step 0, positions, half).
template <class T>
void rotary(const T* x, const float* cosines, const float* sines, T* y, int64_t batch, int64_t positions,
            int64_t heads, int64_t half, int64_t batch_step, float direction, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t p = 0; p < positions; p++) {
            const float *c = cosines + b * batch_step + p * half, *s = sines + b * batch_step + p * half;
            for (int64_t h = 0; h < heads; h++) {
                const int64_t at = ((b * positions + p) * heads + h) * 2 * half;
#pragma omp simd
                for (int64_t i = 0; i < half; i++) {
                    const Pair v = load(x + at, i);
                    const float sine = direction * s[i];
                    store(y + at, i, Pair{v.even * c[i] - v.odd * sine, v.even * sine + v.odd * c[i]});
                }
            }
        }
}

// The sum of squares: in fp32 over parts, in fp64 over their sums, in an order that no thread changes.
template <class T>
void squares(const T* x, double* out, int64_t count, int threads) {
    const int64_t parts = (count + PART - 1) / PART;
    std::vector<double> sums(parts);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < parts; part++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = part * PART; i < std::min(count, (part + 1) * PART); i++) sum += float(x[i]) * float(x[i]);
        sums[part] = sum;
    }
    *out = 0;
    for (double sum : sums) *out += sum;
}

struct Adam {
    float rest1, beta2, rest2, eps;  // rest: 1 - beta
    float decay, step_size, root;    // 1 - lr weight_decay, lr / (1 - beta1^step), sqrt(1 - beta2^step)
    float factor;                    // of the gradient
};

// AdamW (arXiv 1711.05101) over fp32 master weights and moments; the gradient times factor; weights: their copy.
// Operation for operation as torch's fused AdamW rounds them. Frozen: the operations on an element and their order;
// free: parts and threads. Guarded by tests/unit/backend/cpu_kernels/test_fused_ops.py, bit for bit.
template <class T>
void adamw(T* weights, float* master, const T* gradient, float* first, float* second, const Adam& a, int64_t count,
           int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += PART) {
        const int64_t last = std::min(count, start + PART);
        // A loop of its own, for compilers would join this product with the difference below, and round once.
#pragma omp simd
        for (int64_t i = start; i < last; i++) master[i] *= a.decay;
#pragma omp simd
        for (int64_t i = start; i < last; i++) {
            const float g = float(gradient[i]) * a.factor;
            const float m = std::fma(a.rest1, g - first[i], first[i]);
            const float v = std::fma(a.rest2 * g, g, second[i] * a.beta2);
            const float w = master[i] - a.step_size * m / (std::sqrt(v) / a.root + a.eps);
            first[i] = m, second[i] = v, master[i] = w;
            store(weights + i, w);
        }
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                             \
    extern "C" void norm_##NAME(const void* x, const void* w, void* y, float* scale, int64_t rows, int64_t dim,     \
                                float eps, int threads) {                                                           \
        norm((const T*)x, (const T*)w, (T*)y, scale, rows, dim, eps, threads);                                      \
    }                                                                                                               \
    extern "C" void norm_backward_##NAME(const void* x, const void* w, const float* scale, const void* dy, void* dx, \
                                         void* dw, int64_t rows, int64_t dim, int threads) {                        \
        norm_backward((const T*)x, (const T*)w, scale, (const T*)dy, (T*)dx, (T*)dw, rows, dim, threads);           \
    }                                                                                                               \
    extern "C" void gated_##NAME(const void* gate, const void* up, void* y, int64_t rows, int64_t width,            \
                                 int64_t step, int threads) {                                                       \
        gated((const T*)gate, (const T*)up, (T*)y, rows, width, step, threads);                                     \
    }                                                                                                               \
    extern "C" void gated_backward_##NAME(const void* gate, const void* up, const void* dy, void* dgate, void* dup, \
                                          int64_t rows, int64_t width, int64_t step, int threads) {                 \
        gated_backward((const T*)gate, (const T*)up, (const T*)dy, (T*)dgate, (T*)dup, rows, width, step, threads); \
    }                                                                                                               \
    extern "C" void rotary_##NAME(const void* x, const float* c, const float* s, void* y, int64_t batch,            \
                                  int64_t positions, int64_t heads, int64_t half, int64_t batch_step,               \
                                  float direction, int threads) {                                                   \
        rotary((const T*)x, c, s, (T*)y, batch, positions, heads, half, batch_step, direction, threads);            \
    }                                                                                                               \
    extern "C" void table_##NAME(const void* grad_output, const int64_t* taken, const int64_t* order, void* gradient,     \
                                 int64_t tokens, int64_t rows, int64_t dim, int threads) {                          \
        table((const T*)grad_output, taken, order, (T*)gradient, tokens, rows, dim, threads);                             \
    }                                                                                                               \
    extern "C" void squares_##NAME(const void* x, double* out, int64_t count, int threads) {                        \
        squares((const T*)x, out, count, threads);                                                                  \
    }                                                                                                               \
    extern "C" void adamw_##NAME(void* weights, float* master, const void* gradient, float* first, float* second,   \
                                 const Adam* settings, int64_t count, int threads) {                                \
        adamw((T*)weights, master, (const T*)gradient, first, second, *settings, count, threads);                   \
    }

EXPORT(bf16, bf16)
EXPORT(float, fp32)
