// Causal attention and its backward in bf16 on matrix tiles, never holding more than a block of scores.
//
// The online softmax is that of FlashAttention (arXiv 2205.14135, 2307.08691). Scores are held as S^T, keys by
// queries: a vector's lanes are queries, so that maxima, sums and the backward's per-query terms need no
// reduction across lanes, and P^T lies in memory as every product wants it. Sums are in fp32; P and dS are
// rounded to bf16 for their products.

#include <algorithm>
#include <cmath>

#include "amx.h"

namespace {

// q, out (batch, queries, heads, dim); k, v (batch, keys, kv_heads, dim), keys = start + queries. Strides count
// elements; dim lies dense. first: the first key that a query sees, int32 (batch, queries), or null for 0.
struct Shape {
    int64_t batch, queries, keys, heads, kv_heads, dim;
    int64_t q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head;
    const int32_t* first;
    float scale;
    int32_t threads;
};

#if defined(TILES)
constexpr int64_t BLOCK = 64;  // queries, and keys, a block
constexpr int64_t PARTS = BLOCK / 16;
constexpr int64_t PAD = 32;  // rows a power of two apart would share few places of a cache
constexpr float NEG_INF = -1e30f;

inline int64_t padded(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// What the queries of a block see. Padded queries see what their position says: nobody looks at them.
struct CausalDocumentMask {
    __m512i last[PARTS], first[PARTS];
    int32_t lowest, highest;  // of first

    CausalDocumentMask(const Shape& s, int64_t batch, int64_t block) {
        alignas(64) int32_t from[BLOCK];
        lowest = INT32_MAX, highest = 0;
        for (int64_t i = 0; i < BLOCK; i++) {
            const int64_t query = block * BLOCK + i;
            from[i] = s.first && query < s.queries ? s.first[batch * s.queries + query] : 0;
            if (query >= s.queries) continue;
            lowest = std::min(lowest, from[i]), highest = std::max(highest, from[i]);
        }
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        for (int part = 0; part < PARTS; part++) {
            first[part] = _mm512_load_si512(from + 16 * part);
            const int32_t position = int32_t(s.keys - s.queries + block * BLOCK + 16 * part);
            last[part] = _mm512_add_epi32(lanes, _mm512_set1_epi32(position));
        }
    }
    // Whether all keys of a block are seen by all of the block's queries.
    bool wholly(int64_t first_key, int64_t first_position) const {
        return first_key + BLOCK - 1 <= first_position && first_key >= highest;
    }
    __mmask16 operator()(int64_t key, int part) const {
        const __m512i k = _mm512_set1_epi32(int32_t(key));
        return _mm512_cmple_epi32_mask(k, last[part]) & _mm512_cmple_epi32_mask(first[part], k);
    }
};

void copy(const bf16* x, int64_t row, int64_t rows, int64_t dim, int64_t high, bf16* out) {
    for (int64_t r = 0; r < high; r++) {
        if (r < rows) std::memcpy(out + r * dim, x + r * row, 2 * dim);
        else std::memset(out + r * dim, 0, 2 * dim);
    }
}

// x (dim, columns) fp32, transpose_rounded and rounded: out rows of dim; factor (columns) or null.
void transpose_rounded(const float* x, int64_t x_row, int64_t dim, int64_t columns, const float* factor, bf16* out, int64_t out_row) {
    for (int64_t c = 0; c < columns; c += 16)
        for (int64_t d = 0; d < dim; d += 16) {
            __m512i v[16];
            const __m512 by = factor ? _mm512_loadu_ps(factor + c) : _mm512_set1_ps(1.0f);
            for (int i = 0; i < 16; i++) v[i] = (__m512i)_mm512_mul_ps(_mm512_loadu_ps(x + (d + i) * x_row + c), by);
            turn(v);
            for (int64_t i = 0; i < std::min<int64_t>(16, columns - c); i++)
                _mm256_storeu_si256((__m256i*)(out + (c + i) * out_row + d), rounded((__m512)v[i]));
        }
}

// The rows of scores that a block of keys gives, kept as the right operand of the product with V^T.
// Returns whether any maximum rose.
bool softmax_block(const float* scores, int64_t first_key, const CausalDocumentMask& seen, bool whole, float scale, __m512* top,
                   __m512* sum, __m512* fade, bf16* out) {
    bool risen = false;
    for (int part = 0; part < PARTS; part++) {
        const float* column = scores + 16 * part;
        __m512 best = top[part];
        for (int64_t r = 0; r < BLOCK; r++) {
            const __m512 x = _mm512_mul_ps(_mm512_load_ps(column + r * BLOCK), _mm512_set1_ps(scale));
            best = whole ? _mm512_max_ps(best, x) : _mm512_mask_max_ps(best, seen(first_key + r, part), best, x);
        }
        risen |= _mm512_cmp_ps_mask(best, top[part], _CMP_GT_OQ) != 0;
        fade[part] = exponential(_mm512_sub_ps(top[part], best));
        top[part] = best;
        __m512 total = _mm512_mul_ps(sum[part], fade[part]);
        for (int64_t r = 0; r < BLOCK; r += 2) {
            __m512 p[2];
            for (int h = 0; h < 2; h++) {
                p[h] = exponential(_mm512_fmsub_ps(_mm512_load_ps(column + (r + h) * BLOCK), _mm512_set1_ps(scale), best));
                if (!whole) p[h] = _mm512_maskz_mov_ps(seen(first_key + r + h, part), p[h]);
                total = _mm512_add_ps(total, p[h]);
            }
            _mm512_store_si512(out + part * 16 * BLOCK + 16 * r, paired(rounded(p[0]), rounded(p[1])));
        }
        sum[part] = total;
    }
    return risen;
}

void forward(const Shape& s, const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse) {
    const int64_t dim = s.dim, queries = padded(s.queries), keys = padded(s.keys), groups = s.heads / s.kv_heads;
    const int64_t start = s.keys - s.queries;
#pragma omp parallel num_threads(s.threads)
    {
        Tiles tiles;
        static thread_local Memory memory;
        const int64_t long_row = keys + PAD;
        memory.start((keys + long_row + queries) * dim * sizeof(bf16) + BLOCK * BLOCK * 6 + dim * BLOCK * sizeof(float));
        bf16 *key_rows = memory.take<bf16>(keys * dim), *values = memory.take<bf16>(dim * long_row);
        bf16 *query = memory.take<bf16>(queries * dim), *weights = memory.take<bf16>(BLOCK * BLOCK);
        float *scores = memory.take<float>(BLOCK * BLOCK), *sums = memory.take<float>(dim * BLOCK);
        alignas(64) float inverse[BLOCK];
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.batch * s.kv_heads; task++) {
            const int64_t b = task / s.kv_heads, kv = task % s.kv_heads;
            copy(k + b * s.k_batch + kv * s.k_head, s.k_row, s.keys, dim, keys, key_rows);
            transpose(v + b * s.v_batch + kv * s.v_head, s.v_row, s.keys, dim, keys, values, long_row);
            for (int64_t h = kv * groups; h < (kv + 1) * groups; h++) {
                pack_transposed(q + b * s.q_batch + h * s.q_head, s.q_row, s.queries, dim, queries, query);
                for (int64_t i = 0; i < queries / BLOCK; i++) {
                    const CausalDocumentMask seen(s, b, i);
                    const int64_t position = start + i * BLOCK;
                    const int64_t last = std::min(position + BLOCK - 1, s.keys - 1);
                    __m512 top[PARTS], sum[PARTS], fade[PARTS];
                    for (int part = 0; part < PARTS; part++) top[part] = _mm512_set1_ps(NEG_INF), sum[part] = _mm512_setzero_ps();
                    const int64_t from = seen.lowest / BLOCK;
                    for (int64_t j = from; j * BLOCK <= last; j++) {
                        multiply(key_rows + j * BLOCK * dim, dim, query + i * BLOCK * dim, 16 * dim, scores, BLOCK,
                                 BLOCK, BLOCK, dim, false);
                        const bool risen = softmax_block(scores, j * BLOCK, seen, seen.wholly(j * BLOCK, position),
                                                         s.scale, top, sum, fade, weights);
                        if (risen && j > from)
                            for (int64_t d = 0; d < dim; d++)
                                for (int part = 0; part < PARTS; part++) {
                                    float* at = sums + d * BLOCK + 16 * part;
                                    _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), fade[part]));
                                }
                        multiply(values + j * BLOCK, long_row, weights, 16 * BLOCK, sums, BLOCK, dim, BLOCK, BLOCK, j > from);
                    }
                    const int64_t own = std::min(BLOCK, s.queries - i * BLOCK);
                    alignas(64) float most[BLOCK], total[BLOCK];
                    for (int part = 0; part < PARTS; part++) {
                        _mm512_store_ps(inverse + 16 * part, _mm512_div_ps(_mm512_set1_ps(1.0f), sum[part]));
                        _mm512_store_ps(most + 16 * part, top[part]), _mm512_store_ps(total + 16 * part, sum[part]);
                    }
                    bf16* to = out + ((b * s.queries + i * BLOCK) * s.heads + h) * dim;
                    transpose_rounded(sums, BLOCK, dim, own, inverse, to, s.heads * dim);
                    for (int64_t r = 0; r < own; r++)
                        lse[(b * s.heads + h) * s.queries + i * BLOCK + r] = most[r] + std::log(total[r]);
                }
            }
        }
    }
}

// P^T and dS^T of a block, as left operands; dS^T as a right operand, too.
void score_gradients(const float* scores, const float* dp, int64_t first_key, const CausalDocumentMask& seen, bool whole, float scale,
            const float* lse, const float* delta, bf16* p_rows, bf16* ds_rows, bf16* ds_pairs) {
    for (int part = 0; part < PARTS; part++) {
        const __m512 own_lse = _mm512_load_ps(lse + 16 * part), own_delta = _mm512_load_ps(delta + 16 * part);
        for (int64_t r = 0; r < BLOCK; r += 2) {
            __m256i grad_score[2];
            for (int h = 0; h < 2; h++) {
                const int64_t at = (r + h) * BLOCK + 16 * part;
                __m512 p = exponential(_mm512_fmsub_ps(_mm512_load_ps(scores + at), _mm512_set1_ps(scale), own_lse));
                if (!whole) p = _mm512_maskz_mov_ps(seen(first_key + r + h, part), p);
                const __m512 d = _mm512_sub_ps(_mm512_load_ps(dp + at), own_delta);
                grad_score[h] = rounded(_mm512_mul_ps(_mm512_mul_ps(p, d), _mm512_set1_ps(scale)));
                _mm256_store_si256((__m256i*)(p_rows + at), rounded(p));
                _mm256_store_si256((__m256i*)(ds_rows + at), grad_score[h]);
            }
            _mm512_store_si512(ds_pairs + part * 16 * BLOCK + 16 * r, paired(grad_score[0], grad_score[1]));
        }
    }
}

void backward(const Shape& s, const bf16* q, const bf16* k, const bf16* v, const bf16* out, const float* lse,
              const bf16* grad, bf16* dq, bf16* dk, bf16* dv) {
    const int64_t dim = s.dim, n = s.queries, high = padded(n), groups = s.heads / s.kv_heads, row = s.heads * dim;
#pragma omp parallel num_threads(s.threads)
    {
        Tiles tiles;
        static thread_local Memory memory;
        memory.start((high + PAD) * dim * (7 * sizeof(bf16) + 3 * sizeof(float)) + BLOCK * BLOCK * (3 * 2 + 2 * 4) + 8 * high + 128);
        const int64_t all = high * dim, square = BLOCK * BLOCK, long_row = high + PAD;
        bf16 *key_rows = memory.take<bf16>(all), *value_rows = memory.take<bf16>(all);
        bf16 *keys_transposed = memory.take<bf16>(long_row * dim), *query_transposed = memory.take<bf16>(all);
        bf16 *query_pairs = memory.take<bf16>(all), *grad_transposed = memory.take<bf16>(all);
        bf16 *grad_pairs = memory.take<bf16>(all), *p_rows = memory.take<bf16>(square);
        bf16 *ds_rows = memory.take<bf16>(square), *ds_pairs = memory.take<bf16>(square);
        float *scores = memory.take<float>(square), *dp = memory.take<float>(square);
        float *own_lse = memory.take<float>(high), *delta = memory.take<float>(high);
        float *sum_q = memory.take<float>(all), *sum_k = memory.take<float>(all), *sum_v = memory.take<float>(all);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.batch * s.kv_heads; task++) {
            const int64_t b = task / s.kv_heads, kv = task % s.kv_heads;
            const bf16* own_k = k + b * s.k_batch + kv * s.k_head;
            copy(own_k, s.k_row, n, dim, high, key_rows);
            copy(v + b * s.v_batch + kv * s.v_head, s.v_row, n, dim, high, value_rows);
            transpose(own_k, s.k_row, n, dim, high, keys_transposed, long_row);
            for (int64_t h = kv * groups; h < (kv + 1) * groups; h++) {
                const bf16* own_q = q + b * s.q_batch + h * s.q_head;
                const bf16 *own_grad = grad + b * n * row + h * dim, *own_out = out + b * n * row + h * dim;
                pack_transposed(own_q, s.q_row, n, dim, high, query_transposed);
                pack(own_q, s.q_row, n, dim, high, query_pairs);
                pack_transposed(own_grad, row, n, dim, high, grad_transposed);
                pack(own_grad, row, n, dim, high, grad_pairs);
                for (int64_t i = 0; i < high; i++) {
                    float sum = 0;
                    if (i < n)
                        for (int64_t d = 0; d < dim; d++) sum += float(own_grad[i * row + d]) * float(own_out[i * row + d]);
                    delta[i] = sum;
                    own_lse[i] = i < n ? lse[(b * s.heads + h) * n + i] : INFINITY;
                }
                std::memset(sum_q, 0, all * sizeof(float));
                for (int64_t i = 0; i < high / BLOCK; i++) {
                    const CausalDocumentMask seen(s, b, i);
                    for (int64_t j = seen.lowest / BLOCK; j <= i; j++) {
                        const bool more = h > kv * groups || i > j;  // the first to see a key sets its sums
                        multiply(key_rows + j * BLOCK * dim, dim, query_transposed + i * BLOCK * dim, 16 * dim, scores,
                                 BLOCK, BLOCK, BLOCK, dim, false);
                        multiply(value_rows + j * BLOCK * dim, dim, grad_transposed + i * BLOCK * dim, 16 * dim, dp, BLOCK,
                                 BLOCK, BLOCK, dim, false);
                        score_gradients(scores, dp, j * BLOCK, seen, seen.wholly(j * BLOCK, i * BLOCK), s.scale,
                               own_lse + i * BLOCK, delta + i * BLOCK, p_rows, ds_rows, ds_pairs);
                        multiply(p_rows, BLOCK, grad_pairs + i * BLOCK * 16, 16 * high, sum_v + j * BLOCK * dim, dim,
                                 BLOCK, dim, BLOCK, more);
                        multiply(ds_rows, BLOCK, query_pairs + i * BLOCK * 16, 16 * high, sum_k + j * BLOCK * dim, dim,
                                 BLOCK, dim, BLOCK, more);
                        multiply(keys_transposed + j * BLOCK, long_row, ds_pairs, 16 * BLOCK, sum_q + i * BLOCK * dim, BLOCK,
                                 dim, BLOCK, BLOCK, true);
                    }
                }
                bf16* to = dq + b * n * row + h * dim;
                for (int64_t i = 0; i < high / BLOCK; i++)
                    transpose_rounded(sum_q + i * BLOCK * dim, BLOCK, dim, std::min(BLOCK, n - i * BLOCK), nullptr,
                           to + i * BLOCK * row, row);
            }
            const int64_t kv_row = s.kv_heads * dim;
            for (int64_t r = 0; r < n; r++)
                for (int64_t d = 0; d < dim; d++) {
                    const int64_t at = (b * n + r) * kv_row + kv * dim + d;
                    store(dk + at, sum_k[r * dim + d]);
                    store(dv + at, sum_v[r * dim + d]);
                }
        }
    }
}
#endif

}  // namespace

extern "C" {
int amx_available() { return tiles_allowed(); }

// dim: a multiple of 32. lse: fp32 (batch, heads, queries), the logarithm of each softmax's sum.
void attention_forward(const Shape* s, const void* q, const void* k, const void* v, void* out, float* lse) {
#if defined(TILES)
    forward(*s, (const bf16*)q, (const bf16*)k, (const bf16*)v, (bf16*)out, lse);
#endif
}

// keys = queries. out, grad and the gradients lie dense.
void attention_backward(const Shape* s, const void* q, const void* k, const void* v, const void* out,
                        const float* lse, const void* grad, void* dq, void* dk, void* dv) {
#if defined(TILES)
    backward(*s, (const bf16*)q, (const bf16*)k, (const bf16*)v, (const bf16*)out, lse, (const bf16*)grad, (bf16*)dq,
             (bf16*)dk, (bf16*)dv);
#endif
}
}
