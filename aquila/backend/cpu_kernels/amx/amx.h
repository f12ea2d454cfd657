// Products of bf16 matrices on the processor's matrix tiles (AMX), and the layouts that they take.
//
// A product's left operand is read as it lies in memory, row by row. Its right operand is packed: panels of 16
// columns, in which two neighbours in k lie together, `[k / 2][16][2]`. Sums are in fp32.
#pragma once

#if defined(__AVX512BF16__) && defined(__linux__) && (defined(__AMX_BF16__) || defined(EMULATED_AMX))
#define TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#endif

#include "../bf16.h"
#if defined(TILES) && defined(EMULATED_AMX)
#include "emulated.h"
#endif

namespace {

#if defined(TILES) && defined(EMULATED_AMX)
bool tiles_allowed() { return true; }
#elif defined(TILES)
bool tiles_allowed() {
    static const bool allowed = [] {
        constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, request, tile_data) == 0;
    }();
    return allowed;
}
#else
bool tiles_allowed() { return false; }
#endif

#if defined(TILES)

// Tiles of 16 rows by 64 bytes, for as long as it lives, in the thread that made it.
class Tiles {
    struct alignas(64) Config {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };

   public:
    Tiles() {
        Config config;
        for (int t = 0; t < 8; t++) config.rows[t] = 16, config.bytes[t] = 64;
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

// A thread's working memory, on a cache line's border, not filled. A thread that comes again finds what it had:
// fresh memory would be faulted in page by page at every call.
class Memory {
    char* data_ = nullptr;
    int64_t size_ = 0, used_ = 0;

   public:
    ~Memory() { std::free(data_); }
    // Forgets what was taken, and makes room for `bytes` in all.
    void start(int64_t bytes) {
        used_ = 0;
        if (bytes <= size_) return;
        std::free(data_);
        data_ = (char*)std::aligned_alloc(64, (bytes + 63) / 64 * 64);
        size_ = data_ ? bytes : 0;
        if (!data_) throw std::bad_alloc();
    }
    template <class T>
    T* take(int64_t count) {
        T* start = (T*)(data_ + used_);
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return start;
    }
};

// Tiles 0 to 3, which are 32 by 32 sums, += a (32, k) b (k, 32), b as two panels. What is not kept for a next call
// in the first cache is loaded past it: that raised the share of the processor's peak from 57 to 80 %.
// `beside` is called once in 32 of k, for work that the processor's vectors do while the tiles multiply.
template <bool KEEP_A, class Work>
inline void accumulate(const bf16* a, int64_t a_row, const bf16* left, const bf16* right, int64_t k, Work&& beside) {
    const bf16* below = a + 16 * a_row;
    for (int64_t s = 0; s < k; s += 32) {
        if (KEEP_A) {
            _tile_loadd(4, a + s, 2 * a_row);
            _tile_stream_loadd(6, left + 16 * s, 64);
            _tile_stream_loadd(7, right + 16 * s, 64);
            _tile_loadd(5, below + s, 2 * a_row);
        } else {
            _tile_stream_loadd(4, a + s, 2 * a_row);
            _tile_loadd(6, left + 16 * s, 64);
            _tile_loadd(7, right + 16 * s, 64);
            _tile_stream_loadd(5, below + s, 2 * a_row);
        }
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        beside();
    }
}
inline void nothing() {}

// The sums that `accumulate` adds to: from c, or zeros.
inline void begin(const float* c, int64_t c_row, bool add) {
    if (add) {
        _tile_loadd(0, c, 4 * c_row);
        _tile_loadd(1, c + 16, 4 * c_row);
        _tile_loadd(2, c + 16 * c_row, 4 * c_row);
        _tile_loadd(3, c + 16 * c_row + 16, 4 * c_row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
}
inline void end(float* c, int64_t c_row) {
    _tile_stored(0, c, 4 * c_row);
    _tile_stored(1, c + 16, 4 * c_row);
    _tile_stored(2, c + 16 * c_row, 4 * c_row);
    _tile_stored(3, c + 16 * c_row + 16, 4 * c_row);
}

// Brings memory into the second cache, a few lines at each call.
struct Ahead {
    const char *at, *end;
    int lines;
    Ahead(const void* from, int64_t bytes, int64_t calls)
        : at((const char*)from), end(at + bytes), lines(int((bytes / 64 + calls - 1) / calls)) {}
    void operator()() {
        for (int i = 0; i < lines && at < end; i++, at += 64) _mm_prefetch(at, _MM_HINT_T1);
    }
};

// c (m, n) = a (m, k) b (k, n), or += with `add`. m and n are multiples of 32, as is k; `panel` counts the
// elements from one panel of b to the next. Fastest where two panels of b fill no more than the first cache.
inline void multiply(const bf16* a, int64_t a_row, const bf16* b, int64_t panel, float* c, int64_t c_row,
                     int64_t m, int64_t n, int64_t k, bool add) {
    for (int64_t j = 0; j < n; j += 32) {
        const bf16 *left = b + j / 16 * panel, *right = left + panel;
        const int64_t more = j + 32 < n ? k * 32 : 0, calls = m / 32 * (k / 32);
        Ahead next_left(left + 2 * panel, more, calls), next_right(right + 2 * panel, more, calls);
        for (int64_t i = 0; i < m; i += 32) {
            float* sums = c + i * c_row + j;
            begin(sums, c_row, add);
            accumulate<false>(a + i * a_row, a_row, left, right, k, [&] { next_left(), next_right(); });
            end(sums, c_row);
        }
    }
}

// 16 values of two rows, side by side: lane i is (above[i], below[i]).
inline __m512i pairs(const bf16* above, const bf16* below) {
    const __m512i low = above ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)above)) : __m512i{};
    const __m512i high = below ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)below)) : __m512i{};
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// A 16 by 16 matrix of 32-bit values, transposed over its diagonal.
inline void turn(__m512i* v) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int h = 0; h < 2; h++) {
            v[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + 2 + h]);
            v[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + 2 + h]);
        }
    // Row i of each group of four holds, for its 128-bit parts p, column 4 p + i of the group's rows.
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88), b = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) v[i] = t[i];
}

// x (rows, columns) as a right operand, k = rows; rows up to `deep` are zeros. columns: a multiple of 16.
// Four panels at a time: what lies beside one another in x is read at once, and few places are written to by turns.
constexpr int64_t PACKED = 64;
inline void pack(const bf16* x, int64_t row, int64_t rows, int64_t columns, int64_t deep, bf16* out) {
    for (int64_t first = 0; first < columns; first += PACKED)
        for (int64_t r = 0; r < deep; r += 2)
            for (int64_t c = first; c < std::min(columns, first + PACKED); c += 16) {
                const bf16* at = x + r * row + c;
                _mm512_store_si512(out + c * deep + 16 * r, pairs(r < rows ? at : nullptr, r + 1 < rows ? at + row : nullptr));
            }
}

// The transpose of x (rows, columns) as a right operand, k = columns, rows up to `wide` zeros.
// wide: a multiple of 16; columns: of 32.
inline void pack_transposed(const bf16* x, int64_t row, int64_t rows, int64_t columns, int64_t wide, bf16* out) {
    for (int64_t r = 0; r < wide; r += 16)
        for (int64_t c = 0; c < columns; c += 32) {
            __m512i v[16];
            for (int i = 0; i < 16; i++) v[i] = r + i < rows ? _mm512_loadu_si512(x + (r + i) * row + c) : __m512i{};
            turn(v);
            for (int i = 0; i < 16; i++) _mm512_store_si512(out + r * columns + (c + 2 * i) * 16, v[i]);
        }
}

// The transpose of x (rows, columns), row by row: out (columns, out_row), rows up to `long_` zeros.
// long_: a multiple of 32; columns: of 16.
inline void transpose(const bf16* x, int64_t row, int64_t rows, int64_t columns, int64_t long_, bf16* out,
                      int64_t out_row) {
    for (int64_t r = 0; r < long_; r += 32)
        for (int64_t c = 0; c < columns; c += 16) {
            __m512i v[16];
            for (int i = 0; i < 16; i++) {
                const int64_t at = r + 2 * i;
                v[i] = pairs(at < rows ? x + at * row + c : nullptr, at + 1 < rows ? x + (at + 1) * row + c : nullptr);
            }
            turn(v);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (c + i) * out_row + r, v[i]);
        }
}

// e^x for x <= 88: as in narrow.h, 16 at a time.
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // in this order NaN stays NaN
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.38888889e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.33333333e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.16666667e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.66666667e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// Two rows of a left operand, and the same as a pair of rows of a right operand.
inline __m512i paired(__m256i above, __m256i below) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(above), _mm512_slli_epi32(_mm512_cvtepu16_epi32(below), 16));
}
inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
// 2^x, x not above 127: 2^n 2^r, |r| <= 1/2, the polynomial of degree 5 with the smallest relative error, 2.4e-7.
inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-125.0f), x);  // in this order NaN stays NaN; smaller ones would be subnormal
    const __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.32764725e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.67554189e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55071309e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40221202e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93146944e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.00000012f));
    return _mm512_scalef_ps(p, n);
}
inline __m512 widened(const bf16* x) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16);
}
#endif

}  // namespace
