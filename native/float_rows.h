// Rows of f32 tensors, and their products: what looking ahead and tracing compute themselves.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ggml_abi.h"

namespace edgemoe {

inline const float* row_of(const ggml::Tensor* tensor, int64_t i1, int64_t i2 = 0) {
    return reinterpret_cast<const float*>(static_cast<const char*>(tensor->data) +
                                          static_cast<size_t>(i1) * tensor->nb[1] +
                                          static_cast<size_t>(i2) * tensor->nb[2]);
}

// Eight sums at a time, which a compiler turns into vector instructions without being allowed to reorder a float sum.
inline float dot(const float* a, const float* b, int64_t n) {
    constexpr int kLanes = 8;
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            lanes[lane] += a[i + lane] * b[i + lane];
        }
    }
    float sum = 0;
    for (; i < n; ++i) {
        sum += a[i] * b[i];
    }
    for (const float lane : lanes) {
        sum += lane;
    }
    return sum;
}

}  // namespace edgemoe
