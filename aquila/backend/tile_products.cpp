// Two products of bf16 matrices that libraries take their time over, on matrix tiles.
//
// The gradient of a weight, y^T x, summed over tokens, for y (tokens, outputs) and x (tokens, inputs): its left
// operand is turned in the cache, a block at a time. And the product of a few long rows, such as the gradients of
// a vocabulary's logits, with a long matrix: the sum is long and the result small, and threads divide the rows.

#include <algorithm>

#include "tiles.h"

namespace {
#if defined(TILES)
constexpr int64_t ROWS = 128;   // outputs a block
constexpr int64_t DEPTH = 512;  // tokens a block: two panels of x stay in the first cache
constexpr int64_t PAD = 32;     // rows a power of two apart would share few places of a cache
constexpr int64_t LEFT = DEPTH + PAD;

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
        memory.start(ROWS * (LEFT * sizeof(bf16) + (inputs + PAD) * sizeof(float)) + 128);
        bf16* left = memory.take<bf16>(ROWS * LEFT);
        float* sums = memory.take<float>(ROWS * (inputs + PAD));
#pragma omp for schedule(static)
        for (int64_t c = 0; c < inputs; c += 16) pack(x + c, inputs, tokens, 16, deep, packed + c * deep);
#pragma omp for schedule(dynamic)
        for (int64_t o = 0; o < outputs; o += ROWS) {
            const int64_t own = std::min(ROWS, outputs - o);
            for (int64_t t = 0; t < deep; t += DEPTH) {
                const int64_t now = std::min(DEPTH, deep - t), whole = own / 16 * 16;
                transpose(y + t * y_row + o, y_row, tokens - t, whole, now, left, LEFT);
                for (int64_t i = whole; i < own; i++)  // what a vector does not fill
                    for (int64_t s = 0; s < now; s++)
                        left[i * LEFT + s] = t + s < tokens ? y[(t + s) * y_row + o + i] : bf16{0};
                multiply(left, LEFT, packed + 16 * t, 16 * deep, sums, inputs + PAD, (own + 31) / 32 * 32, inputs, now, t > 0);
            }
            for (int64_t i = 0; i < own; i++) {
                W* to = w + (o + i) * inputs;
                const float* from = sums + i * (inputs + PAD);
                if (add)
                    for (int64_t c = 0; c < inputs; c++) store(to + c, float(to[c]) + from[c]);
                else
                    for (int64_t c = 0; c < inputs; c++) store(to + c, from[c]);
            }
        }
    }
}
#endif
}  // namespace

extern "C" {
int products_available() { return tiles_allowed(); }

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
