#include "router_copy.h"

#include <algorithm>
#include <cmath>

#include "float_rows.h"

namespace edgemoe {

namespace {

constexpr float kMostWeight = 127, kMostState = 4095;
constexpr int64_t kStretch = 4096;  // products of the largest numbers whose sum is an int32_t

float largest(const float* row, int64_t n) {
    float most = 0;
    for (int64_t i = 0; i < n; ++i) {
        most = std::max(most, std::fabs(row[i]));  // a NaN is none
    }
    return std::isfinite(most) ? most : 0;
}

// Whole numbers up to `most`, and what they have to be multiplied by.
template <typename Number>
float round_to(Number* to, const float* row, int64_t n, float most) {
    const float scale = largest(row, n) / most;
    for (int64_t i = 0; i < n; ++i) {
        to[i] = scale > 0 && row[i] == row[i] ? static_cast<Number>(std::lrint(row[i] / scale)) : Number{0};
    }
    return scale;
}

// Of a stretch at most. Integer sums may be reordered, so that compilers turn this into vector instructions.
int32_t dot(const int8_t* weights, const int16_t* state, int64_t n) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        sum += static_cast<int32_t>(weights[i]) * static_cast<int32_t>(state[i]);
    }
    return sum;
}

}  // namespace

RouterCopy::RouterCopy(const ggml::Tensor& weights)
    : rows_(static_cast<size_t>(weights.ne[0] * weights.ne[1])), scales_(static_cast<size_t>(weights.ne[1])) {
    for (int64_t row = 0; row < weights.ne[1]; ++row) {
        scales_[row] = round_to(&rows_[row * weights.ne[0]], row_of(&weights, row), weights.ne[0], kMostWeight);
    }
}

std::vector<float> RouterCopy::scores(const std::vector<float>& state) const {
    const auto n = static_cast<int64_t>(state.size());
    std::vector<int16_t> rounded(state.size());
    const float scale = round_to(rounded.data(), state.data(), n, kMostState);
    std::vector<float> scores(scales_.size());
    for (size_t row = 0; row < scales_.size(); ++row) {
        const int8_t* weights = &rows_[row * state.size()];
        float sum = 0;
        for (int64_t i = 0; i < n; i += kStretch) {
            sum += static_cast<float>(dot(weights + i, &rounded[i], std::min(kStretch, n - i)));
        }
        scores[row] = sum * scales_[row] * scale;
    }
    return scores;
}

}  // namespace edgemoe
