// bf16 in plain C++, and e^x in a form that compilers turn into vectors.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
    uint16_t bits;
    operator float() const {
        uint32_t word = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &word, sizeof value);
        return value;
    }
};

inline void store(float* to, float value) { *to = value; }
inline void store(bf16* to, float value) {  // to nearest, ties to even; NaN stays NaN
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    to->bits = value != value ? uint16_t(0x7fc0) : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// e^x for x <= 88 (or NaN): x = n ln 2 + r, |r| <= ln 2 / 2, Taylor's polynomial of degree 7 for e^r.
// Relative error below 2e-7. Below -87 it stays at e^-87, which is nothing beside one.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f;  // rounds to a whole number, which sits in the low bits
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t word;
    std::memcpy(&word, &shifted, sizeof word);
    word = (word + 127u) << 23;  // 2^n
    float power;
    std::memcpy(&power, &word, sizeof power);
    return p * power;
}

}  // namespace
