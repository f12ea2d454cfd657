// Vectors of fp32 as wide as the processor's registers, by the compiler's portable vectors: AVX-512, AVX2, NEON.
//
// Values are read in blocks of 2 LANES. A block of bf16 is read as LANES words of two values: the even ones are the
// words' high halves after a shift, the odd ones after a mask. So a block's values lie apart by parity, for fp32 too.
#pragma once

#include "bf16.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int BLOCK = 2 * LANES;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Places __attribute__((vector_size(4 * LANES)));

struct Block {
    Vector even, odd;
};

inline Block read(const bf16* x) {
    Words words;
    std::memcpy(&words, x, sizeof words);
    return {(Vector)(words << 16), (Vector)(words & 0xffff0000u)};
}

// Lane i of `evens` and `odds` picks value 2 i (2 i + 1) of two vectors beside one another.
struct Picks {
    Places evens, odds;
};
inline Picks picks() {
    Picks p;
    for (int i = 0; i < LANES; i++) p.evens[i] = 2 * i, p.odds[i] = 2 * i + 1;
    return p;
}
inline Block parted(Vector first, Vector second) {
    const Picks p = picks();
    return {__builtin_shuffle(first, second, p.evens), __builtin_shuffle(first, second, p.odds)};
}
// fp32 needs no parting: what is read one way is multiplied with what was read the same way.
inline Block read(const float* x) {
    Block block;
    std::memcpy(&block.even, x, sizeof block.even);
    std::memcpy(&block.odd, x + LANES, sizeof block.odd);
    return block;
}

// Where value i of a block stands in memory.
inline int place(const bf16*, int lane, bool odd) { return 2 * lane + odd; }
inline int place(const float*, int lane, bool odd) { return lane + (odd ? LANES : 0); }

// The first `count` values of a block; the others are zeros.
template <class T>
inline Block read_some(const T* x, int64_t count) {
    T whole[BLOCK] = {};
    std::memcpy(whole, x, count * sizeof(T));
    return read(whole);
}

// Lane i of the result is the sum of v[i]. Overwrites v.
inline Vector totals(Vector* v) {
    for (int count = LANES; count > 1; count /= 2)
        for (int i = 0; i < count / 2; i++) {
            const Block parts = parted(v[2 * i], v[2 * i + 1]);
            v[i] = parts.even + parts.odd;
        }
    return v[0];
}

}  // namespace
