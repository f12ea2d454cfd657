// All layers of a generation step, a few rows of one new token each, in one parallel region: norm, products, rotary
// embedding, cache, attention, gate and sums, with a barrier between them where calls and their waking were.
//
// Operation for operation what gemv.cpp, step_attention.cpp and fused_ops.cpp compute, in bf16 rounding for rounding.

#include <cstdlib>
#include <memory>

#include "gemv.h"
#include "row_passes.h"
#include "step_attention.h"

namespace {

// Memory on the border of a cache line: a vector across two takes twice as long to load.
template <class T>
struct Buffer {
    std::unique_ptr<T, decltype(&std::free)> memory;

    explicit Buffer(int64_t count)
        : memory((T*)std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64), &std::free) {}
    T* data() { return memory.get(); }
};

struct Matrix {
    const void* weight;
    const float* scale;  // of int8's rows; null for others
};

struct Layer {
    const void* attention_norm;
    Matrix qkv, wo;
    const void* ffn_norm;
    Matrix gate_up, w2;
};

struct Model {
    int64_t layers, dim, ffn, cache_step;  // cache_step: elements from one layer of the cache to the next
    float eps;
};

// y = x + what the rows of `by` give: each thread the columns of its rows.
template <int M, class X, class W>
void add_product(const X* from, const Matrix& by, X* x, int64_t m, int64_t n, int64_t k) {
    constexpr int R = SUMS / M;
    const X* rows[M];
    rows_of<M>(from, m, k, rows);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < n; row += R)
        products<M>(rows, (const W*)by.weight, by.scale, row, m, n, k, [&](int64_t r, int64_t i, float value) {
            X narrow;
            store(&narrow, value);
            X* to = x + i * n + row + r;
            store(to, float(*to) + float(narrow));
        });
}

template <int M, class X, class W>
void step(X* x, const Layer* layers, const Model& model, X* cache, const float* cosines, const float* sines,
          const int64_t* places, const Shape& s, int threads) {
    constexpr int R = SUMS / M;
    const int64_t m = s.rows, dim = model.dim, ffn = model.ffn, width = s.heads * s.size;
    const int64_t wide = (s.heads + 2 * s.kv_heads) * s.size;
    const Tasks tasks(places, s);
    Sums sums(tasks, s);
    Buffer<X> qkv(m * wide), mixed(m * width), gated(m * ffn);
#pragma omp parallel num_threads(threads)
    {
        // Each thread norms all rows for itself: that is shorter than waiting for one another.
        Buffer<X> normed(m * dim);
        const X* rows[M];
        rows_of<M>(normed.data(), m, dim, rows);
        for (int64_t l = 0; l < model.layers; l++) {
            const Layer& layer = layers[l];
            for (int64_t i = 0; i < m; i++)
                norm_row(x + i * dim, (const X*)layer.attention_norm, normed.data() + i * dim, dim, model.eps);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < wide; row += R)
                products<M>(rows, (const W*)layer.qkv.weight, layer.qkv.scale, row, m, wide, dim,
                            [&](int64_t r, int64_t i, float value) { store(qkv.data() + i * wide + row + r, value); });
            attend_rows(qkv.data(), cosines, sines, cache + l * model.cache_step, places, mixed.data(), s, tasks, sums);
            add_product<M, X, W>(mixed.data(), layer.wo, x, m, dim, width);
            for (int64_t i = 0; i < m; i++)
                norm_row(x + i * dim, (const X*)layer.ffn_norm, normed.data() + i * dim, dim, model.eps);
            const W* weights = (const W*)layer.gate_up.weight;
            const float* scale = layer.gate_up.scale;
#pragma omp for schedule(static)
            for (int64_t first = 0; first < ffn; first += SUMS) {
                X gate[M * SUMS], up[M * SUMS];
                const int64_t last = std::min<int64_t>(ffn, first + SUMS);
                const auto fill = [&](X* to, const W* weights, const float* scale) {
                    for (int64_t row = first; row < last; row += R)
                        products<M>(rows, weights, scale, row, m, ffn, dim, [&](int64_t r, int64_t i, float value) {
                            store(to + i * SUMS + row - first + r, value);
                        });
                };
                fill(gate, weights, scale);
                fill(up, weights + ffn * dim, scale ? scale + ffn : nullptr);
                for (int64_t i = 0; i < m; i++)
                    gate_row(gate + i * SUMS, up + i * SUMS, gated.data() + i * ffn + first, last - first);
            }
            add_product<M, X, W>(gated.data(), layer.w2, x, m, dim, ffn);
        }
    }
}

}  // namespace

// x (rows, dim): replaced by the last layer's result. cache: (layers, rows, 2 kv_heads, places, size). The rest as in
// step_attention.cpp. At most 8 rows.
#define EXPORT(NAME, X, W)                                                                                            \
    extern "C" void NAME(void* x, const Layer* layers, void* cache, const float* c, const float* s,                   \
                         const int64_t* places, int64_t count, int64_t dim, int64_t ffn, int64_t cache_step,          \
                         int64_t rows, int64_t heads, int64_t kv_heads, int64_t size, int64_t row_step,               \
                         int64_t head_step, float eps, int threads) {                                                 \
        const auto by = rows == 1 ? step<1, X, W> : rows == 2 ? step<2, X, W> : rows <= 4 ? step<4, X, W>             \
                                                                                          : step<8, X, W>;            \
        by((X*)x, layers, {count, dim, ffn, cache_step, eps}, (X*)cache, c, s, places,                                \
           {rows, heads, kv_heads, size, row_step, head_step}, threads);                                              \
    }

EXPORT(bf16_by_bf16, bf16, bf16)
EXPORT(bf16_by_int8, bf16, int8_t)
EXPORT(fp32_by_int8, float, int8_t)
