// The three products of a linear layer in bf16, on matrix tiles.
//
// Forward, x w^T, and the input's gradient, y w: the weight is packed once, by all threads together, into parts
// that stay in a core's second cache while it takes 32 tokens after the other. The weight's gradient, y^T x, summed
// over tokens: its left operand is transposed in the cache, a block at a time.

#include <algorithm>

#include "amx.h"

namespace {
#if defined(TILES)
constexpr int64_t ROWS = 256;   // outputs a block of the weight's gradient
constexpr int64_t COLUMNS = 512;  // inputs a block: its sums, and a packed block of y, stay in the second cache
constexpr int64_t DEPTH = 512;  // tokens a block: two panels of x stay in the first cache
constexpr int64_t PAD = 32;     // rows a power of two apart would share few places of a cache
constexpr int64_t LEFT = DEPTH + PAD;
constexpr int64_t PART = 1 << 20;  // bytes of a packed weight that a thread keeps close

// Sums (32, columns) to bf16.
inline void put(const float* sums, int64_t sums_row, int64_t rows, int64_t columns, bf16* out, int64_t out_row) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < columns; c += 32) {
            const float* from = sums + i * sums_row + c;
            const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_load_ps(from + 16), _mm512_load_ps(from));
            _mm512_storeu_si512(out + i * out_row + c, (__m512i)both);
        }
}

// out (rows, n) = x (rows, k) b (k, n), b being w (k, n) or, `transposed`, the transpose of w (n, k).
void product(const bf16* x, int64_t x_row, const bf16* w, bool transposed, bf16* out, int64_t rows, int64_t n, int64_t k,
             int threads) {
    const int64_t part = std::min(n, std::max<int64_t>(32, PART / int64_t(2 * k) / 32 * 32));
    static thread_local Memory shared;
    shared.start(n * k * sizeof(bf16));
    bf16* packed = shared.take<bf16>(n * k);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        static thread_local Memory memory;
        memory.start(32 * (k * sizeof(bf16) + (part + 16) * sizeof(float)) + 128);
        bf16* last = memory.take<bf16>(32 * k);
        float* sums = memory.take<float>(32 * (part + 16));
#pragma omp for schedule(static)
        for (int64_t c = 0; c < n; c += PACKED) {
            const int64_t wide = std::min(PACKED, n - c);
            if (transposed) pack_transposed(w + c * k, k, wide, k, wide, packed + c * k);
            else pack(w + c, n, k, wide, k, packed + c * k);
        }
        for (int64_t first = 0; first < n; first += part) {
            const int64_t columns = std::min(part, n - first), row = k > DEPTH ? part + 16 : 32;
#pragma omp for schedule(static) nowait
            for (int64_t r = 0; r < rows; r += 32) {
                const int64_t own = std::min<int64_t>(32, rows - r);
                const bf16* a = x + r * x_row;
                int64_t a_row = x_row;
                if (own < 32) {
                    for (int64_t i = 0; i < own; i++) std::memcpy(last + i * k, a + i * x_row, k * sizeof(bf16));
                    std::memset(last + own * k, 0, (32 - own) * k * sizeof(bf16));
                    a = last, a_row = k;
                }
                for (int64_t s = 0; s < k; s += DEPTH) {
                    const int64_t now = std::min(DEPTH, k - s);
                    for (int64_t c = first; c < first + columns; c += 32) {
                        float* to = k > DEPTH ? sums + c - first : sums;
                        const bf16* b = packed + c * k + 16 * s;
                        begin(to, row, s > 0);
                        accumulate<true>(a + s, a_row, b, b + 16 * k, now, nothing);
                        end(to, row);
                        if (k <= DEPTH) put(to, row, own, 32, out + r * n + c, n);
                    }
                }
                if (k > DEPTH) put(sums, row, own, columns, out + r * n + first, n);
            }
        }
    }
}

template <class W>
void gradient(const bf16* y, int64_t y_row, const bf16* x, W* w, int64_t tokens, int64_t outputs,
              int64_t inputs, bool add, int threads) {
    const int64_t deep = (tokens + 31) / 32 * 32;
    static thread_local Memory shared;
    shared.start(deep * inputs * sizeof(bf16));
    bf16* packed = shared.take<bf16>(deep * inputs);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        static thread_local Memory memory;
        memory.start(ROWS * (LEFT * sizeof(bf16) + (COLUMNS + PAD) * sizeof(float)) + 128);
        bf16* left = memory.take<bf16>(ROWS * LEFT);
        float* sums = memory.take<float>(ROWS * (COLUMNS + PAD));
#pragma omp for schedule(static)
        for (int64_t c = 0; c < inputs; c += PACKED)
            pack(x + c, inputs, tokens, std::min(PACKED, inputs - c), deep, packed + c * deep);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t c = 0; c < inputs; c += COLUMNS)
            for (int64_t o = 0; o < outputs; o += ROWS) {
                const int64_t own = std::min(ROWS, outputs - o), columns = std::min(COLUMNS, inputs - c);
                for (int64_t t = 0; t < deep; t += DEPTH) {
                    const int64_t now = std::min(DEPTH, deep - t), whole = own / 16 * 16;
                    transpose(y + t * y_row + o, y_row, tokens - t, whole, now, left, LEFT);
                    for (int64_t i = whole; i < own; i++)  // what a vector does not fill
                        for (int64_t s = 0; s < now; s++)
                            left[i * LEFT + s] = t + s < tokens ? y[(t + s) * y_row + o + i] : bf16{0};
                    multiply(left, LEFT, packed + c * deep + 16 * t, 16 * deep, sums, COLUMNS + PAD, (own + 31) / 32 * 32,
                             columns, now, t > 0);
                }
                for (int64_t i = 0; i < own; i++) {
                    W* to = w + (o + i) * inputs + c;
                    const float* from = sums + i * (COLUMNS + PAD);
                    if (add)
                        for (int64_t j = 0; j < columns; j++) store(to + j, float(to[j]) + from[j]);
                    else
                        for (int64_t j = 0; j < columns; j++) store(to + j, from[j]);
                }
            }
    }
}
#endif
}  // namespace

extern "C" {
int amx_available() { return tiles_allowed(); }

// out (rows, n) = x (rows, k) b, rows x_row elements apart; b is w (k, n) or, `transposed`, the transpose of w (n, k).
// n and k: multiples of 32.
void product_bf16(const void* x, int64_t x_row, const void* w, int transposed, void* out, int64_t rows, int64_t n, int64_t k,
                  int threads) {
#if defined(TILES)
    product((const bf16*)x, x_row, (const bf16*)w, transposed, (bf16*)out, rows, n, k, threads);
#endif
}

// w (outputs, inputs) = y^T x, or += with `add`; inputs: a multiple of 32. y's rows are y_row elements apart.
// w is bf16 or, where `wide` is not 0, fp32.
void weight_gradient(const void* y, int64_t y_row, const void* x, void* w, int wide, int64_t tokens, int64_t outputs,
                     int64_t inputs, int add, int threads) {
#if defined(TILES)
    if (wide) gradient((const bf16*)y, y_row, (const bf16*)x, (float*)w, tokens, outputs, inputs, add, threads);
    else gradient((const bf16*)y, y_row, (const bf16*)x, (bf16*)w, tokens, outputs, inputs, add, threads);
#endif
}
}
