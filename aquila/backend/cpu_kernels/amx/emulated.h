// AMX tiles in plain C++, for tests on processors without: the same source, compiled with -DEMULATED_AMX.
//
// Eight tiles of 16 rows by 64 bytes in each thread. The product follows Intel's manual for TDPBF16PS: for each
// pair of k first the left numbers, then the right ones, are multiplied and added in fp32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct EmulatedTile {
    alignas(64) unsigned char bytes[16][64];
};
inline EmulatedTile& tile_register(int t) {
    static thread_local EmulatedTile tiles[8];
    return tiles[t];
}
inline void tile_load(int t, const void* base, int64_t stride) {
    for (int r = 0; r < 16; r++) std::memcpy(tile_register(t).bytes[r], (const char*)base + r * stride, 64);
}
inline void tile_store(int t, void* base, int64_t stride) {
    for (int r = 0; r < 16; r++) std::memcpy((char*)base + r * stride, tile_register(t).bytes[r], 64);
}
inline void tile_zero(int t) { std::memset(&tile_register(t), 0, sizeof(EmulatedTile)); }
inline float half_of(uint32_t pair, int high) {
    const uint32_t word = high ? pair & 0xffff0000u : pair << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}
inline void tile_dot_bf16(int sums, int left, int right) {
    for (int m = 0; m < 16; m++) {
        float c[16];
        uint32_t a[16], b[16];
        std::memcpy(c, tile_register(sums).bytes[m], 64);
        std::memcpy(a, tile_register(left).bytes[m], 64);
        for (int k = 0; k < 16; k++) {
            std::memcpy(b, tile_register(right).bytes[k], 64);
            for (int n = 0; n < 16; n++)
                for (int high = 0; high < 2; high++)
                    c[n] = std::fma(half_of(a[k], high), half_of(b[n], high), c[n]);
        }
        std::memcpy(tile_register(sums).bytes[m], c, 64);
    }
}

}  // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_loadd(t, base, stride) tile_load(t, base, stride)
#define _tile_stream_loadd(t, base, stride) tile_load(t, base, stride)
#define _tile_stored(t, base, stride) tile_store(t, base, stride)
#define _tile_zero(t) tile_zero(t)
#define _tile_dpbf16ps(sums, left, right) tile_dot_bf16(sums, left, right)
