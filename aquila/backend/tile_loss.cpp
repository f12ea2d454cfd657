// The loss of a whole batch and both of its gradients in bf16 on matrix tiles, never holding more than a block of
// logits.
//
// The softmax over the vocabulary is FlashAttention's (arXiv 2205.14135) with hidden states for queries and the
// output matrix for keys and values: one pass over the matrix, a block after the other, gives each token's sum of
// exponentials and, with it, the hidden state's gradient. A second pass computes the logits again for the matrix's
// gradient, whose blocks are each summed over all tokens in the cache and rounded once. Two products more than with
// kept logits, and neither their memory nor its traffic. Logits are held vocabulary by tokens: a vector's lanes are
// tokens, and no sum runs across lanes. Sums and logits are in fp32; the softmax is rounded for its products.

#include <algorithm>
#include <cmath>

#include "tiles.h"

namespace {

struct Loss {
    int64_t tokens, vocab, dim;
    float z_loss;
    int32_t threads;
};

#if defined(TILES)
constexpr int64_t WORDS = 256;      // of the vocabulary, a block
constexpr int64_t SPAN = 32;        // tokens whose logits are held at once
constexpr int64_t PARTS = SPAN / 16;
constexpr int64_t PAD = 32;         // rows a power of two apart would share few places of a cache
constexpr int64_t CACHE = 1 << 19;  // bytes of the second cache that the sums of a pass may take
constexpr int64_t DEEPEST = 512;    // terms a product: its right operand stays in the first cache
constexpr float NOTHING = -1e30f;
constexpr float ROOM = 8.0f;  // a maximum may be this far exceeded before sums are scaled down to a new one

inline int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

// Tokens whose sums of `dim` values fit the cache.
int64_t tokens_at_once(const Loss& s) {
    const int64_t share = whole((s.tokens + s.threads - 1) / s.threads, SPAN);
    return std::max(SPAN, std::min(share, CACHE / int64_t(s.dim * sizeof(float)) / SPAN * SPAN));
}

// A block of the output matrix, its rows apart from a power of two; what no word fills is zeros.
void block_of(const Loss& s, const bf16* weight, int64_t first, bf16* out) {
    const int64_t rows = std::min(WORDS, s.vocab - first);
    for (int64_t r = 0; r < WORDS; r++) {
        if (r < rows) std::memcpy(out + r * (s.dim + PAD), weight + (first + r) * s.dim, s.dim * sizeof(bf16));
        else std::memset(out + r * (s.dim + PAD), 0, s.dim * sizeof(bf16));
    }
}

void logits_of(const Loss& s, const bf16* words, const bf16* tokens, float* logits) {
    for (int64_t d = 0; d < s.dim; d += DEEPEST)
        multiply(words + d, s.dim + PAD, tokens + 16 * d, 16 * s.dim, logits, SPAN, WORDS, SPAN,
                 std::min(DEEPEST, s.dim - d), d > 0);
}

// Of a span of tokens: the maximum that exponentials are taken against, and their sum.
struct Softmax {
    alignas(64) float top[SPAN], sum[SPAN], target[SPAN];
};

// e^(logit - top) as a right operand. Returns whether sums had to be scaled, and then `fade` by how much.
bool softmax_block(const float* logits, int64_t rows, Softmax& softmax, float* fade, bf16* out) {
    bool faded = false;
    for (int part = 0; part < PARTS; part++) {
        const float* column = logits + 16 * part;
        __m512 best = _mm512_set1_ps(NOTHING), top = _mm512_load_ps(softmax.top + 16 * part);
        for (int64_t r = 0; r < rows; r++) best = _mm512_max_ps(_mm512_load_ps(column + r * SPAN), best);
        const __mmask16 risen = _mm512_cmp_ps_mask(best, _mm512_add_ps(top, _mm512_set1_ps(ROOM)), _CMP_GT_OQ);
        const __m512 now = _mm512_mask_mov_ps(top, risen, best), by = exponential(_mm512_sub_ps(top, now));
        __m512 total = _mm512_setzero_ps();
        faded |= risen != 0;
        for (int64_t r = 0; r < WORDS; r += 2) {
            __m512 p[2];
            for (int h = 0; h < 2; h++) {
                p[h] = exponential(_mm512_sub_ps(_mm512_load_ps(column + (r + h) * SPAN), now));
                if (r + h >= rows) p[h] = _mm512_setzero_ps();
                total = _mm512_add_ps(total, p[h]);
            }
            if (out) _mm512_store_si512(out + part * 16 * WORDS + 16 * r, paired(rounded(p[0]), rounded(p[1])));
        }
        _mm512_store_ps(fade + 16 * part, by);
        _mm512_store_ps(softmax.top + 16 * part, now);
        _mm512_store_ps(softmax.sum + 16 * part, _mm512_fmadd_ps(_mm512_load_ps(softmax.sum + 16 * part), by, total));
    }
    return faded;
}

// The hidden states' gradient, from sums (dim, SPAN): factor * sums - scale * the label's row.
void hidden_gradient(const Loss& s, const float* sums, const float* factor, const float* scale, const int64_t* labels,
                     const bf16* weight, int64_t own, bf16* out) {
    for (int64_t c = 0; c < own; c += 16)
        for (int64_t d = 0; d < s.dim; d += 16) {
            __m512i v[16];
            const __m512 by = _mm512_load_ps(factor + c);
            for (int i = 0; i < 16; i++) v[i] = (__m512i)_mm512_mul_ps(_mm512_load_ps(sums + (d + i) * SPAN + c), by);
            turn(v);
            for (int64_t i = 0; i < std::min<int64_t>(16, own - c); i++) {
                const __m512 label = widened(weight + labels[c + i] * s.dim + d);
                const __m512 x = _mm512_fnmadd_ps(_mm512_set1_ps(scale[c + i]), label, (__m512)v[i]);
                _mm256_storeu_si256((__m256i*)(out + (c + i) * s.dim + d), rounded(x));
            }
        }
}

// Losses, the logarithm of each token's sum, and the hidden states' gradient, or null for none.
void forward(const Loss& s, const bf16* hidden, const bf16* weight, const int64_t* labels, const float* scale,
             float* losses, float* lse, bf16* gradient) {
    const int64_t dim = s.dim, at_once = tokens_at_once(s), blocks = whole(s.vocab, WORDS) / WORDS;
#pragma omp parallel num_threads(s.threads)
    {
        Tiles tiles;
        static thread_local Memory memory;
        memory.start((WORDS * (dim + PAD) + dim * (WORDS + PAD) + at_once * dim + SPAN * WORDS) * sizeof(bf16) +
                     (SPAN * WORDS + at_once * dim) * sizeof(float) + at_once / SPAN * sizeof(Softmax) + 512);
        bf16 *words = memory.take<bf16>(WORDS * (dim + PAD)), *turned_words = memory.take<bf16>(dim * (WORDS + PAD));
        bf16 *states = memory.take<bf16>(at_once * dim), *shares = memory.take<bf16>(SPAN * WORDS);
        float *logits = memory.take<float>(SPAN * WORDS), *sums = memory.take<float>(at_once * dim);
        Softmax* softmax = memory.take<Softmax>(at_once / SPAN);
        alignas(64) float fade[SPAN], factor[SPAN];
#pragma omp for schedule(dynamic)
        for (int64_t from = 0; from < s.tokens; from += at_once) {
            const int64_t own = std::min(at_once, s.tokens - from), spans = whole(own, SPAN) / SPAN;
            pack_transposed(hidden + from * dim, dim, own, dim, spans * SPAN, states);
            for (int64_t t = 0; t < spans; t++)
                for (int64_t i = 0; i < SPAN; i++) softmax[t].top[i] = NOTHING, softmax[t].sum[i] = softmax[t].target[i] = 0;
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t first = block * WORDS, rows = std::min(WORDS, s.vocab - first);
                block_of(s, weight, first, words);
                if (gradient) transpose(words, dim + PAD, WORDS, dim, WORDS, turned_words, WORDS + PAD);
                for (int64_t t = 0; t < spans; t++) {
                    logits_of(s, words, states + t * SPAN * dim, logits);
                    for (int64_t i = 0; i < std::min(SPAN, own - t * SPAN); i++) {
                        const int64_t label = labels[from + t * SPAN + i] - first;
                        if (label >= 0 && label < rows) softmax[t].target[i] = logits[label * SPAN + i];
                    }
                    const bool faded = softmax_block(logits, rows, softmax[t], fade, gradient ? shares : nullptr);
                    if (!gradient) continue;
                    float* sum = sums + t * SPAN * dim;
                    if (faded && block > 0)
                        for (int64_t at = 0; at < dim * SPAN; at += 16)
                            _mm512_store_ps(sum + at, _mm512_mul_ps(_mm512_load_ps(sum + at), _mm512_load_ps(fade + at % SPAN)));
                    multiply(turned_words, WORDS + PAD, shares, 16 * WORDS, sum, SPAN, dim, SPAN, WORDS, block > 0);
                }
            }
            for (int64_t t = 0; t < spans; t++) {
                const int64_t at = from + t * SPAN, here = std::min(SPAN, own - t * SPAN);
                for (int64_t i = 0; i < SPAN; i++) {
                    if (i >= here) { factor[i] = 0; continue; }
                    const float log_sum = softmax[t].top[i] + std::log(softmax[t].sum[i]);
                    lse[at + i] = log_sum;
                    losses[at + i] = log_sum - softmax[t].target[i] + s.z_loss * log_sum * log_sum;
                    factor[i] = scale[at + i] * (1 + 2 * s.z_loss * log_sum) / softmax[t].sum[i];
                }
                if (gradient)
                    hidden_gradient(s, sums + t * SPAN * dim, factor, scale + at, labels + at, weight, here, gradient + at * dim);
            }
        }
    }
}

// The gradient of a span's logits as a left operand, rows of words: factor * e^(logit - lse).
void slopes(const float* logits, const float* lse, const float* factor, bf16* out, int64_t out_row) {
    for (int part = 0; part < PARTS; part++) {
        const __m512 own_lse = _mm512_loadu_ps(lse + 16 * part), by = _mm512_loadu_ps(factor + 16 * part);
        for (int64_t r = 0; r < WORDS; r++) {
            const __m512 p = exponential(_mm512_sub_ps(_mm512_load_ps(logits + r * SPAN + 16 * part), own_lse));
            _mm256_storeu_si256((__m256i*)(out + r * out_row + 16 * part), rounded(_mm512_mul_ps(p, by)));
        }
    }
}

// The output matrix's gradient (vocab, dim), from the logarithms that `forward` gave.
void backward(const Loss& s, const bf16* hidden, const bf16* weight, const int64_t* labels, const float* scale,
              const float* lse, bf16* gradient) {
    constexpr int64_t DEPTH = 256;  // tokens a product
    const int64_t dim = s.dim, deep = whole(s.tokens, DEPTH), row = DEPTH + PAD;
    static thread_local Memory shared;
    shared.start(2 * deep * dim * sizeof(bf16) + 2 * deep * sizeof(float) + 256);
    bf16 *states = shared.take<bf16>(deep * dim), *pairs_of_states = shared.take<bf16>(deep * dim);
    float *own_lse = shared.take<float>(deep), *factor = shared.take<float>(deep);
    for (int64_t i = 0; i < deep; i++) {
        own_lse[i] = i < s.tokens ? lse[i] : 0;
        factor[i] = i < s.tokens ? scale[i] * (1 + 2 * s.z_loss * lse[i]) : 0;
    }
#pragma omp parallel num_threads(s.threads)
    {
        Tiles tiles;
        static thread_local Memory memory;
        memory.start((WORDS * (dim + PAD) + WORDS * row) * sizeof(bf16) + (SPAN * WORDS + WORDS * (dim + PAD)) * sizeof(float) + 256);
        bf16 *words = memory.take<bf16>(WORDS * (dim + PAD)), *slope = memory.take<bf16>(WORDS * row);
        float *logits = memory.take<float>(SPAN * WORDS), *sums = memory.take<float>(WORDS * (dim + PAD));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < deep; t += SPAN)
            pack_transposed(hidden + t * dim, dim, s.tokens - t, dim, SPAN, states + t * dim);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < deep; t += DEPTH)
            pack(hidden + t * dim, dim, s.tokens - t, dim, DEPTH, pairs_of_states + t * dim);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < s.vocab; first += WORDS) {
            const int64_t rows = std::min(WORDS, s.vocab - first);
            block_of(s, weight, first, words);
            for (int64_t from = 0; from < deep; from += DEPTH) {
                for (int64_t t = from; t < from + DEPTH; t += SPAN) {
                    logits_of(s, words, states + t * dim, logits);
                    slopes(logits, own_lse + t, factor + t, slope + t - from, row);
                    for (int64_t i = t; i < std::min(t + SPAN, s.tokens); i++) {
                        const int64_t label = labels[i] - first;
                        if (label < 0 || label >= rows) continue;
                        const float share = std::exp(logits[label * SPAN + i - t] - own_lse[i]);
                        store(slope + label * row + i - from, share * factor[i] - scale[i]);
                    }
                }
                multiply(slope, row, pairs_of_states + from * dim, 16 * DEPTH, sums, dim + PAD, WORDS, dim, DEPTH, from > 0);
            }
            for (int64_t r = 0; r < rows; r++)
                for (int64_t d = 0; d < dim; d++) store(gradient + (first + r) * dim + d, sums[r * (dim + PAD) + d]);
        }
    }
}
#endif

}  // namespace

extern "C" {
int loss_available() { return tiles_allowed(); }

// hidden (tokens, dim), weight (vocab, dim), dim a multiple of 32; labels within the vocabulary; scale, losses,
// lse fp32 (tokens). Gradients are of the sum of scale * loss, and may be null.
void tile_loss(const Loss* s, const void* hidden, const void* weight, const int64_t* labels, const float* scale,
               float* losses, float* lse, void* hidden_gradient, void* weight_gradient) {
#if defined(TILES)
    forward(*s, (const bf16*)hidden, (const bf16*)weight, labels, scale, losses, lse, (bf16*)hidden_gradient);
    if (weight_gradient)
        backward(*s, (const bf16*)hidden, (const bf16*)weight, labels, scale, lse, (bf16*)weight_gradient);
#endif
}
}
