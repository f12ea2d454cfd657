// RMSNorm and SwiGLU of one row. Arithmetic is in fp32, and a result is rounded once.
#pragma once

#include <cmath>

#include "bf16.h"

namespace {

// Returns what the row was multiplied by.
template <class T>
inline float norm_row(const T* x, const T* weight, T* y, int64_t dim, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; i++) sum += float(x[i]) * float(x[i]);
    const float by = 1.0f / std::sqrt(sum / dim + eps);
#pragma omp simd
    for (int64_t i = 0; i < dim; i++) {
        T narrow;  // the definition rounds before the weight, too
        store(&narrow, float(x[i]) * by);
        store(y + i, float(narrow) * float(weight[i]));
    }
    return by;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(x < -87.0f ? 87.0f : -x)); }

template <class T>
inline void gate_row(const T* gate, const T* up, T* y, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) store(y + i, float(gate[i]) * sigmoid(gate[i]) * float(up[i]));
}

}  // namespace
