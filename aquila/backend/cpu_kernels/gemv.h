// Sums of a few rows of x with rows of a large matrix, at the speed at which memory gives the matrix.
#pragma once

#include <algorithm>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "bf16.h"

namespace {

constexpr int ROWS = 8;  // x rows a pass over the weights serves

// A tile of SUMS dot products: R rows of w with M rows of x, R M = SUMS; out[r * M + m].
constexpr int SUMS = 16;

// The definition. The weights' rows stay in the first cache after the first m.
template <int M, class X, class W>
void tile(const X* const* x, const W* const* w, int64_t k, float* out) {
    for (int s = 0; s < SUMS; s++) {
        const X* a = x[s % M];
        const W* b = w[s / M];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < k; i++) sum += float(a[i]) * float(b[i]);
        out[s] = sum;
    }
}

#if defined(__AVX512BF16__)
constexpr int AT_ONCE = 32;  // products at once
constexpr int AHEAD = 2048;  // bytes fetched ahead

inline __m512bh load(const bf16* p, uint32_t some) { return (__m512bh)_mm512_maskz_loadu_epi16(some, p); }
inline __m512bh load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh widen(__m256i bytes) {  // int8 is exact in bf16
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return _mm512_cvtne2ps_pbh(high, low);
}
inline __m512bh load(const int8_t* p, uint32_t some) { return widen(_mm256_maskz_loadu_epi8(some, p)); }
inline __m512bh load(const int8_t* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }

// Lane s of the result is the sum of v[s]: four rounds that halve the vectors, instead of 16 reductions.
inline __m512 sums_of(__m512* v) {
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee));
    for (int i = 0; i < 4; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 4], 0x88), _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd));
    for (int i = 0; i < 2; i++)
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 2]), _mm512_unpackhi_ps(v[i], v[i + 2]));
    v[0] = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    return _mm512_shuffle_f32x4(v[0], v[0], 0xd8);
}

// One row of w after the other, so that memory is read as one stream; 8 sums in flight hide the latency.
template <int M, class W>
void tile(const bf16* const* x, const W* const* w, int64_t k, float* out) {
    constexpr int R = SUMS / M, U = 8 / M;
    __m512 sums[SUMS];
    for (int r = 0; r < R; r++) {
        __m512 sum[U][M];
        for (int u = 0; u < U; u++)
            for (int m = 0; m < M; m++) sum[u][m] = _mm512_setzero_ps();
        const W* row = w[r];
        int64_t i = 0;
        for (; i + U * AT_ONCE <= k; i += U * AT_ONCE) {
#pragma GCC unroll 8
            for (int u = 0; u < U; u++) {
                const int64_t at = i + u * AT_ONCE;
                _mm_prefetch((const char*)(row + at) + AHEAD, _MM_HINT_T0);
                const __m512bh b = load(row + at);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) sum[u][m] = _mm512_dpbf16_ps(sum[u][m], load(x[m] + at), b);
            }
        }
        for (; i < k; i += AT_ONCE) {
            const uint32_t some = k - i < AT_ONCE ? (1u << (k - i)) - 1 : ~0u;
            const __m512bh b = load(row + i, some);
            for (int m = 0; m < M; m++) sum[0][m] = _mm512_dpbf16_ps(sum[0][m], load(x[m] + i, some), b);
        }
        for (int m = 0; m < M; m++) {
            __m512 all = sum[0][m];
            for (int u = 1; u < U; u++) all = _mm512_add_ps(all, sum[u][m]);
            sums[r * M + m] = all;
        }
    }
    _mm512_storeu_ps(out, sums_of(sums));
}
#endif

// M rows of x (n, k), of which m count: where there are fewer than M, the last is taken again.
template <int M, class X>
inline void rows_of(const X* x, int64_t m, int64_t k, const X** from) {
    for (int64_t i = 0; i < M; i++) from[i] = x + std::min(i, m - 1) * k;
}

// The products of M rows of x with the R = SUMS / M rows of w (n, k) from `row` on: each(r, i, value) for row + r of w
// and row i of x. scale: of the rows of w, or null.
template <int M, class X, class W, class Each>
inline void products(const X* const* from, const W* w, const float* scale, int64_t row, int64_t m, int64_t n, int64_t k,
                     Each each) {
    constexpr int R = SUMS / M;
    const W* weights[R];
    float out[SUMS];
    for (int64_t r = 0; r < R; r++) weights[r] = w + std::min(row + r, n - 1) * k;
    tile<M>(from, weights, k, out);
    for (int64_t r = 0; r < std::min<int64_t>(R, n - row); r++)
        for (int64_t i = 0; i < m; i++) each(r, i, scale ? out[r * M + i] * scale[row + r] : out[r * M + i]);
}

}  // namespace
