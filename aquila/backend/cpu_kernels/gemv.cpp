// y = x w^T for a few rows of x: as fast as the weights can be read from memory.
//
// A thread takes a stretch of output rows and streams their weights once for up to ROWS rows of x, so that
// time is bandwidth and not arithmetic. Sums are in fp32. w (n, k) is bf16, or int8 with one fp32 scale a
// row; x (m, k) and y (m, n) are fp32 or bf16. Any m, n, k.

#include <vector>

#include "amx/amx.h"
#include "gemv.h"

namespace {

constexpr int TILE_ROWS = 16;  // x rows a pass over the weights serves with matrix tiles

template <int M, class X, class W>
void rows(const X* x, const W* w, const float* scale, X* y, int64_t m, int64_t n, int64_t k, int threads) {
    constexpr int R = SUMS / M;
    const X* from[M];
    rows_of<M>(x, m, k, from);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < n; row += R)
        products<M>(from, w, scale, row, m, n, k,
                    [&](int64_t r, int64_t i, float value) { store(y + i * n + row + r, value); });
}

#if defined(TILES)
// For more than a few x rows the products of `tile` take longer than the memory; matrix tiles do not. (At one row
// they take as long as the memory, as `tile` does.)
// y^T = w x^T in tiles of 16 weights' rows by 32 k. x is packed once a call into pairs of k by x rows.

inline const void* tile_rows(const bf16* w, int64_t k, bf16*, int64_t* stride) {
    *stride = 2 * k;
    return w;
}
inline const void* tile_rows(const int8_t* w, int64_t k, bf16* buffer, int64_t* stride) {
    for (int r = 0; r < 16; r++) _mm512_store_si512(buffer + 32 * r, (__m512i)load(w + r * k));
    *stride = 64;
    return buffer;
}

template <class W>
void by_tiles(const bf16* x, const W* w, const float* scale, bf16* y, int64_t m, int64_t n, int64_t k, int threads) {
    constexpr int64_t STEP = 32;
    // packed[step][pair][row]: two neighbours in k of one x row lie together.
    static thread_local std::vector<uint32_t> packed;
    packed.assign(k / 2 * TILE_ROWS, 0);
    for (int64_t pair = 0; pair < k / 2; pair++)
        for (int64_t i = 0; i < m; i++) std::memcpy(&packed[pair * TILE_ROWS + i], x + i * k + 2 * pair, 4);
    const uint32_t* pairs = packed.data();
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        alignas(64) float out[16 * TILE_ROWS];
        alignas(64) bf16 buffer[16 * STEP];
#pragma omp for schedule(static)
        for (int64_t group = 0; group < n / 16; group++) {
            const W* rows = w + group * 16 * k;
            const char* ahead = (const char*)(rows + 16 * k);  // the next 16 rows follow these in memory
            const int64_t share = STEP * 16 * sizeof(W);
            _tile_zero(0);
            for (int64_t i = 0; i < k; i += STEP) {
                for (int64_t line = 0; line < share; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T1);
                ahead += share;
                int64_t stride;
                const void* from = tile_rows(rows + i, k, buffer, &stride);
                _tile_loadd(1, from, stride);
                _tile_loadd(2, pairs + i / 2 * TILE_ROWS, 4 * TILE_ROWS);
                _tile_dpbf16ps(0, 1, 2);
            }
            _tile_stored(0, out, 4 * TILE_ROWS);
            for (int64_t i = 0; i < m; i++)
                for (int64_t r = 0; r < 16; r++) {
                    const float value = out[r * TILE_ROWS + i];
                    store(y + i * n + group * 16 + r, scale ? value * scale[group * 16 + r] : value);
                }
        }
    }
}

template <class W>
bool fit_for_tiles(const bf16*, const W*, int64_t n, int64_t k) {
    // Whatever m: a row's sums must not depend on how many rows come with it.
    return n % 16 == 0 && k % 32 == 0 && tiles_allowed();
}
template <class W>
bool fit_for_tiles(const float*, const W*, int64_t, int64_t) {
    return false;
}
template <class W>
void by_tiles(const float*, const W*, const float*, float*, int64_t, int64_t, int64_t, int) {}
#endif

template <class X, class W>
void linear(const X* x, const W* w, const float* scale, X* y, int64_t m, int64_t n, int64_t k, int threads) {
#if defined(TILES)
    for (; m > 0 && fit_for_tiles(x, w, n, k); m -= TILE_ROWS, x += TILE_ROWS * k, y += TILE_ROWS * n)
        by_tiles(x, w, scale, y, std::min<int64_t>(m, TILE_ROWS), n, k, threads);
#endif
    for (; m > 0; m -= ROWS, x += ROWS * k, y += ROWS * n) {
        const int64_t now = std::min<int64_t>(m, ROWS);
        if (now == 1) rows<1>(x, w, scale, y, now, n, k, threads);
        else if (now == 2) rows<2>(x, w, scale, y, now, n, k, threads);
        else if (now <= 4) rows<4>(x, w, scale, y, now, n, k, threads);
        else rows<8>(x, w, scale, y, now, n, k, threads);
    }
}

}  // namespace

// How many x rows a pass serves with matrix tiles; 0 where the machine has none.
extern "C" int tile_rows() {
    return tiles_allowed() ? TILE_ROWS : 0;
}

#define EXPORT(NAME, X, W)                                                                               \
    extern "C" void NAME(const void* x, const void* w, const float* scale, void* y, int64_t m, int64_t n, \
                         int64_t k, int threads) {                                                       \
        linear((const X*)x, (const W*)w, scale, (X*)y, m, n, k, threads);                                \
    }

EXPORT(bf16_by_bf16, bf16, bf16)
EXPORT(bf16_by_int8, bf16, int8_t)
EXPORT(fp32_by_int8, float, int8_t)
