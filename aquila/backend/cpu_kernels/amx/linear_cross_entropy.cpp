// The loss of a whole batch and both of its gradients in bf16 on matrix tiles, never holding more than a block of
// logits.
//
// The softmax over the vocabulary is FlashAttention's (arXiv 2205.14135) with hidden states for queries and the
// output matrix for keys and values: one pass over the matrix, a block after the other, gives each token's sum of
// exponentials and, with it, the hidden state's gradient. A second pass computes the logits again for the matrix's
// gradient, whose blocks are each summed over all tokens in the cache and rounded once. Two products more than with
// kept logits, and neither their memory nor its traffic. Logits are held vocabulary by tokens: a vector's lanes are
// tokens, and no sum runs across lanes. While the tiles multiply, the vectors take the exponentials of the tile
// before. Sums and logits are in fp32; the softmax is rounded for its products.

#include <algorithm>
#include <cmath>

#include "amx.h"

namespace {

struct Loss {
    int64_t tokens, vocab, dim;
    float z_loss;
    int32_t threads;
    int64_t block;  // rows of the vocabulary at a time, a multiple of TILE
};

#if defined(TILES)
constexpr int64_t SPAN = 32;        // tokens whose logits are held at once
constexpr int64_t TILE = 32;        // rows of them
constexpr int64_t DEPTH = 256;      // tokens a product of the matrix's gradient
constexpr int64_t PAD = 32;         // rows a power of two apart would share few places of a cache
constexpr int64_t CACHE = 1 << 20;  // bytes that a pass's sums may take, most of a second cache
constexpr int64_t BLOCK = 3 << 16;  // values of the output matrix that a block may have
constexpr int64_t DEEPEST = 512;    // terms a product: its right operand stays in the first cache
constexpr float NEG_INF = -1e30f, LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr float ROOM = 30.0f;  // a maximum may be exceeded by so many powers of two before sums are scaled down

inline int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

int64_t block_words(int64_t dim) { return std::max(2 * TILE, std::min<int64_t>(512, BLOCK / dim / TILE * TILE)); }

// Tokens whose sums of `dim` values fit the cache.
int64_t tokens_at_once(const Loss& s) {
    const int64_t share = whole((s.tokens + s.threads - 1) / s.threads, SPAN);
    return std::max(SPAN, std::min(share, CACHE / int64_t(s.dim * sizeof(float)) / SPAN * SPAN));
}

// A block of the output matrix, its rows apart from a power of two; what no word fills is zeros.
void block_of(const Loss& s, const bf16* weight, int64_t first, bf16* out) {
    const int64_t rows = std::min(s.block, s.vocab - first);
    for (int64_t r = 0; r < s.block; r++) {
        if (r < rows) std::memcpy(out + r * (s.dim + PAD), weight + (first + r) * s.dim, s.dim * sizeof(bf16));
        else std::memset(out + r * (s.dim + PAD), 0, s.dim * sizeof(bf16));
    }
}

// What becomes of a tile of logits (TILE, SPAN): two rows at each call, as long as there are any.
struct Exponentials {  // of which pass 1 takes the sum: 2^(logit log2(e) - top), as a right operand
    const float* logits;
    int64_t row = TILE, rows, panel;  // of the tile; the vocabulary ends after `rows`
    bf16* out;                 // null for none
    __m512 top[2], sum[2], best[2];

    void start(const float* tile, int64_t vocab_rows, bf16* to) { logits = tile, row = 0, rows = vocab_rows, out = to; }
    void operator()() {
        if (row == TILE) return;
        for (int part = 0; part < 2; part++) {
            __m512 p[2];
            for (int h = 0; h < 2; h++) {
                p[h] = _mm512_setzero_ps();
                if (row + h >= rows) continue;
                const __m512 x = _mm512_mul_ps(_mm512_load_ps(logits + (row + h) * SPAN + 16 * part), _mm512_set1_ps(LOG2E));
                best[part] = _mm512_max_ps(x, best[part]);
                p[h] = power_of_two(_mm512_sub_ps(x, top[part]));
                sum[part] = _mm512_add_ps(sum[part], p[h]);
            }
            if (out) _mm512_store_si512(out + part * panel + 16 * row, paired(rounded(p[0]), rounded(p[1])));
        }
        row += 2;
    }
    void finish() { while (row < TILE) (*this)(); }
};

struct LogitGradients {  // of the sum of scale * loss, as a left operand
    const float* logits;
    int64_t row = TILE, out_row;
    bf16* out;
    __m512 lse[2], factor[2];

    void start(const float* tile, bf16* to) { logits = tile, row = 0, out = to; }
    void operator()() {
        if (row == TILE) return;
        for (int h = 0; h < 2; h++) {
            __m512 p[2];
            for (int part = 0; part < 2; part++) {
                const __m512 x = _mm512_load_ps(logits + (row + h) * SPAN + 16 * part);
                p[part] = _mm512_mul_ps(power_of_two(_mm512_fmsub_ps(x, _mm512_set1_ps(LOG2E), lse[part])), factor[part]);
            }
            _mm512_storeu_si512(out + (row + h) * out_row, (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
        }
        row += 2;
    }
    void finish() { while (row < TILE) (*this)(); }
};

// A tile of logits, from 32 rows of a block and a span of packed tokens.
template <class Work>
inline void logits_of(const Loss& s, const bf16* vocab_rows, const bf16* tokens, float* logits, Work&& beside) {
    for (int64_t d = 0; d < s.dim; d += DEEPEST) {
        const bf16* right = tokens + 16 * d;
        begin(logits, SPAN, d > 0);
        accumulate<false>(vocab_rows + d, s.dim + PAD, right, right + 16 * s.dim, std::min(DEEPEST, s.dim - d), beside);
        end(logits, SPAN);
    }
}

// Of a span of tokens: the power of two that exponentials are taken against, their sum, the label's logit.
struct Softmax {
    alignas(64) float top[SPAN], sum[SPAN], target[SPAN];
};

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

// The first pass over one block for one span: adds to its softmax and, with `shares`, fills them.
// Returns whether a maximum rose out of reach: then it is the new top, `fade` says how sums shrink, and all is to
// be done again.
template <class Work>
bool softmax_block(const Loss& s, const bf16* vocab_rows, int64_t rows, const bf16* tokens, const int64_t* labels, int64_t own,
                   float* tiles, Softmax& softmax, float* fade, bf16* shares, Work&& beside) {
    Exponentials exponentials;
    exponentials.panel = 16 * s.block;
    for (int part = 0; part < 2; part++) {
        exponentials.top[part] = _mm512_load_ps(softmax.top + 16 * part);
        exponentials.best[part] = _mm512_set1_ps(NEG_INF), exponentials.sum[part] = _mm512_setzero_ps();
    }
    for (int64_t w = 0; w < s.block; w += TILE) {
        float* tile = tiles + w / TILE % 2 * TILE * SPAN;
        logits_of(s, vocab_rows + w * (s.dim + PAD), tokens, tile, [&] { exponentials(), beside(); });
        exponentials.finish();
        exponentials.start(tile, rows - w, shares ? shares + 16 * w : nullptr);
        for (int64_t i = 0; i < own; i++)
            if (labels[i] >= w && labels[i] < w + TILE) softmax.target[i] = tile[(labels[i] - w) * SPAN + i];
    }
    exponentials.finish();
    bool risen = false;
    for (int part = 0; part < 2; part++) {
        const __m512 top = exponentials.top[part], best = exponentials.best[part];
        const __mmask16 above = _mm512_cmp_ps_mask(best, _mm512_add_ps(top, _mm512_set1_ps(ROOM)), _CMP_GT_OQ);
        const __m512 now = _mm512_mask_mov_ps(top, above, best);
        _mm512_store_ps(fade + 16 * part, power_of_two(_mm512_sub_ps(top, now)));
        _mm512_store_ps(softmax.top + 16 * part, now);
        risen |= above != 0;
    }
    for (int part = 0; part < 2; part++) {
        float* sum = softmax.sum + 16 * part;
        const __m512 more = risen ? _mm512_setzero_ps() : exponentials.sum[part];
        _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_load_ps(sum), _mm512_load_ps(fade + 16 * part), more));
    }
    return risen;
}

// Losses, each token's log2 of its sum and gradient of its label's logit, and the hidden states' gradient, or null.
void forward(const Loss& s, const bf16* hidden, const bf16* weight, const int64_t* labels, const float* scale,
             float* losses, float* lse, float* label_gradient, bf16* gradient) {
    const int64_t dim = s.dim, at_once = tokens_at_once(s);
#pragma omp parallel num_threads(s.threads)
    {
        Tiles tile_unit;
        static thread_local Memory memory;
        memory.start((s.block * (dim + PAD) + dim * (s.block + PAD) + at_once * dim + SPAN * s.block) * sizeof(bf16) +
                     (2 * TILE * SPAN + at_once * dim) * sizeof(float) + at_once / SPAN * sizeof(Softmax) + 512);
        bf16 *vocab_rows = memory.take<bf16>(s.block * (dim + PAD)), *transposed_vocab = memory.take<bf16>(dim * (s.block + PAD));
        bf16 *states = memory.take<bf16>(at_once * dim), *shares = memory.take<bf16>(SPAN * s.block);
        float *tiles = memory.take<float>(2 * TILE * SPAN), *sums = memory.take<float>(at_once * dim);
        Softmax* softmax = memory.take<Softmax>(at_once / SPAN);
        alignas(64) float fade[SPAN], factor[SPAN];
        int64_t own_labels[SPAN];
#pragma omp for schedule(dynamic)
        for (int64_t from = 0; from < s.tokens; from += at_once) {
            const int64_t own = std::min(at_once, s.tokens - from), spans = whole(own, SPAN) / SPAN;
            pack_transposed(hidden + from * dim, dim, own, dim, spans * SPAN, states);
            for (int64_t t = 0; t < spans; t++)
                for (int64_t i = 0; i < SPAN; i++) softmax[t].top[i] = NEG_INF, softmax[t].sum[i] = softmax[t].target[i] = 0;
            for (int64_t first = 0; first < s.vocab; first += s.block) {
                block_of(s, weight, first, vocab_rows);
                if (gradient) transpose(vocab_rows, dim + PAD, s.block, dim, s.block, transposed_vocab, s.block + PAD);
                const int64_t next = std::min(s.block, std::max<int64_t>(0, s.vocab - first - s.block));
                Ahead ahead(weight + (first + s.block) * dim, next * dim * sizeof(bf16), spans * s.block / TILE * dim / 32);
                for (int64_t t = 0; t < spans; t++) {
                    const int64_t here = std::min(SPAN, own - t * SPAN);
                    for (int64_t i = 0; i < here; i++) own_labels[i] = labels[from + t * SPAN + i] - first;
                    float* sum = sums + t * SPAN * dim;
                    while (softmax_block(s, vocab_rows, s.vocab - first, states + t * SPAN * dim, own_labels, here, tiles,
                                         softmax[t], fade, gradient ? shares : nullptr, ahead))
                        if (gradient && first > 0)
                            for (int64_t at = 0; at < dim * SPAN; at += 16)
                                _mm512_store_ps(sum + at, _mm512_mul_ps(_mm512_load_ps(sum + at), _mm512_load_ps(fade + at % SPAN)));
                    if (gradient) multiply(transposed_vocab, s.block + PAD, shares, 16 * s.block, sum, SPAN, dim, SPAN, s.block, first > 0);
                }
            }
            for (int64_t t = 0; t < spans; t++) {
                const int64_t at = from + t * SPAN, here = std::min(SPAN, own - t * SPAN);
                for (int64_t i = 0; i < SPAN; i++) {
                    factor[i] = 0;
                    if (i >= here) continue;
                    const float log2_sum = softmax[t].top[i] + std::log2(softmax[t].sum[i]), log_sum = log2_sum * LN2;
                    const float grad_logit = scale[at + i] * (1 + 2 * s.z_loss * log_sum), target = softmax[t].target[i];
                    lse[at + i] = log2_sum;
                    losses[at + i] = log_sum - target + s.z_loss * log_sum * log_sum;
                    label_gradient[at + i] = grad_logit * std::exp(target - log_sum) - scale[at + i];
                    factor[i] = grad_logit / softmax[t].sum[i];
                }
                if (gradient)
                    hidden_gradient(s, sums + t * SPAN * dim, factor, scale + at, labels + at, weight, here, gradient + at * dim);
            }
        }
    }
}

// The output matrix's gradient (vocab, dim), from what `forward` gave.
void backward(const Loss& s, const bf16* hidden, const bf16* weight, const int64_t* labels, const float* scale,
              const float* lse, const float* label_gradient, bf16* gradient) {
    const int64_t dim = s.dim, deep = whole(s.tokens, DEPTH), row = DEPTH + PAD;
    static thread_local Memory shared;
    shared.start(2 * deep * dim * sizeof(bf16) + 2 * deep * sizeof(float) + 256);
    bf16 *states = shared.take<bf16>(deep * dim), *pairs_of_states = shared.take<bf16>(deep * dim);
    float *own_lse = shared.take<float>(deep), *factor = shared.take<float>(deep);
    for (int64_t i = 0; i < deep; i++) {
        own_lse[i] = i < s.tokens ? lse[i] : 0;
        factor[i] = i < s.tokens ? scale[i] * (1 + 2 * s.z_loss * LN2 * lse[i]) : 0;
    }
#pragma omp parallel num_threads(s.threads)
    {
        Tiles tile_unit;
        static thread_local Memory memory;
        memory.start((s.block * (dim + PAD) + s.block * row) * sizeof(bf16) + (2 * TILE * SPAN + s.block * (dim + PAD)) * sizeof(float) + 256);
        bf16 *vocab_rows = memory.take<bf16>(s.block * (dim + PAD)), *grad_logit = memory.take<bf16>(s.block * row);
        float *tiles = memory.take<float>(2 * TILE * SPAN), *sums = memory.take<float>(s.block * (dim + PAD));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < deep; t += SPAN)
            pack_transposed(hidden + t * dim, dim, s.tokens - t, dim, SPAN, states + t * dim);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < deep; t += DEPTH)
            pack(hidden + t * dim, dim, s.tokens - t, dim, DEPTH, pairs_of_states + t * dim);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < s.vocab; first += s.block) {
            const int64_t rows = std::min(s.block, s.vocab - first);
            block_of(s, weight, first, vocab_rows);
            LogitGradients logit_gradients;
            logit_gradients.out_row = row;
            for (int64_t from = 0; from < deep; from += DEPTH) {
                for (int64_t t = from; t < from + DEPTH; t += SPAN) {
                    Ahead next_states(states + (t + SPAN) * dim, t + SPAN < deep ? SPAN * dim * sizeof(bf16) : 0, s.block / TILE * dim / 32);
                    Ahead pairs_ahead(pairs_of_states + from * dim + (t - from) * dim, SPAN * dim * sizeof(bf16), s.block / TILE * dim / 32);
                    for (int part = 0; part < 2; part++) {
                        logit_gradients.lse[part] = _mm512_loadu_ps(own_lse + t + 16 * part);
                        logit_gradients.factor[part] = _mm512_loadu_ps(factor + t + 16 * part);
                    }
                    for (int64_t w = 0; w < s.block; w += TILE) {
                        float* tile = tiles + w / TILE % 2 * TILE * SPAN;
                        logits_of(s, vocab_rows + w * (dim + PAD), states + t * dim, tile, [&] { logit_gradients(), next_states(), pairs_ahead(); });
                        logit_gradients.finish();
                        logit_gradients.start(tile, grad_logit + w * row + t - from);
                    }
                    logit_gradients.finish();
                    for (int64_t i = t; i < std::min(t + SPAN, s.tokens); i++) {
                        const int64_t label = labels[i] - first;
                        if (label >= 0 && label < rows) store(grad_logit + label * row + i - from, label_gradient[i]);
                    }
                }
                multiply(grad_logit, row, pairs_of_states + from * dim, 16 * DEPTH, sums, dim + PAD, s.block, dim, DEPTH, from > 0);
            }
            for (int64_t r = 0; r < rows; r++)
                for (int64_t d = 0; d < dim; d++) store(gradient + (first + r) * dim + d, sums[r * (dim + PAD) + d]);
        }
    }
}
#endif

}  // namespace

extern "C" {
int amx_available() { return tiles_allowed(); }

// hidden (tokens, dim), weight (vocab, dim), dim a multiple of 32; labels within the vocabulary; scale and losses
// fp32 (tokens), room fp32 (2 tokens). Gradients are of the sum of scale * loss, and may be null.
void tile_loss(const Loss* given, const void* hidden, const void* weight, const int64_t* labels, const float* scale,
               float* losses, float* room, void* hidden_gradient, void* weight_gradient) {
#if defined(TILES)
    Loss s = *given;
    s.block = block_words(s.dim);
    const bf16 *h = (const bf16*)hidden, *w = (const bf16*)weight;
    float *lse = room, *label_gradient = room + s.tokens;
    forward(s, h, w, labels, scale, losses, lse, label_gradient, (bf16*)hidden_gradient);
    if (weight_gradient) backward(s, h, w, labels, scale, lse, label_gradient, (bf16*)weight_gradient);
#endif
}
}
