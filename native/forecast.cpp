#include "forecast.h"

#include <algorithm>
#include <cmath>
#include <iterator>

namespace edgemoe {

namespace {

constexpr double kHalfLives[] = {0, 1, 4, 16, 64};  // tokens; the prior has none
constexpr double kLearn = 0.02;                     // weight of one token against all before it
constexpr double kShared = 0.02;                    // part of the weights that all forecasters have alike, to come back
constexpr double kLeast = 1e-12;                    // averages never become denormal
constexpr int64_t kMost = 32;  // tokens that a prompt batch counts as: it must not wipe out what was

}  // namespace

void Forecast::resize(const std::vector<int>& n_expert) {
    first_.assign(1, 0);
    for (const int n : n_expert) {
        first_.push_back(first_.back() + n);
    }
    const auto n = static_cast<size_t>(first_.back());
    used_ = 0;
    preferred_.assign(n_expert.size(), {});
    passed_.assign(n_expert.size(), false);
    for (std::vector<double>& forecast : forecasts_) {
        forecast.assign(n, kLeast);
    }
    std::fill(std::begin(weights_), std::end(weights_), 1.0 / kForecasters);
    probability_.assign(n, kLeast);
    present_.assign(n, false);
}

// The first token: nothing is known but how many experts it uses.
void Forecast::start(double used) {
    used_ = used;
    for (size_t layer = 0; layer < preferred_.size(); ++layer) {
        prefer(static_cast<int>(layer), std::vector<int32_t>(preferred_[layer]));
    }
}

void Forecast::prefer(int layer, const std::vector<int32_t>& experts) {
    preferred_[layer] = experts;
    if (used_ == 0) {
        return;
    }
    const int32_t first = first_[layer];
    const int32_t n = first_[layer + 1] - first;
    // The fewer experts a task has, the less of what is routed goes to them.
    const double m = static_cast<double>(experts.size()), share = std::sqrt(m / n);
    std::fill(forecasts_[0].begin() + first, forecasts_[0].begin() + first + n,
              used_ * (experts.empty() ? 1 : 1 - share) / n);
    for (const int32_t expert : experts) {
        forecasts_[0][first + expert] += used_ * share / m;
    }
    if (!passed_[layer]) {  // nothing better is known of this layer
        for (int i = 1; i < kForecasters; ++i) {
            std::copy_n(forecasts_[0].begin() + first, n, forecasts_[i].begin() + first);
        }
    }
    mix(layer);
}

void Forecast::routed(int layer, int64_t n_tokens, const std::vector<int32_t>& experts) {
    if (n_tokens <= 0) {
        return;
    }
    if (used_ == 0) {
        start(static_cast<double>(experts.size()) / static_cast<double>(n_tokens));
    }
    passed_[layer] = true;
    const int32_t first = first_[layer];
    const int32_t n = first_[layer + 1] - first;
    if (n_tokens == 1) {  // the order within a prompt batch is not looked at, so it teaches nothing
        learn(first, experts);
    }
    count_.assign(static_cast<size_t>(n), 0);
    for (const int32_t expert : experts) {
        ++count_[expert];
    }
    for (int i = 1; i < kForecasters; ++i) {
        const double kept = std::exp2(-static_cast<double>(std::min(n_tokens, kMost)) / kHalfLives[i]);
        double* average = forecasts_[i].data() + first;
        for (int32_t expert = 0; expert < n; ++expert) {
            const double share = static_cast<double>(count_[expert]) / static_cast<double>(n_tokens);
            average[expert] = std::max(kLeast, kept * average[expert] + (1 - kept) * share);
        }
    }
    mix(layer);
}

void Forecast::learn(int32_t first, const std::vector<int32_t>& experts) {
    double shares[kForecasters] = {};
    for (const int32_t expert : experts) {
        double total = 0;
        for (int i = 0; i < kForecasters; ++i) {
            total += weights_[i] * forecasts_[i][first + expert];
        }
        for (int i = 0; i < kForecasters; ++i) {
            shares[i] += weights_[i] * forecasts_[i][first + expert] / total / static_cast<double>(experts.size());
        }
    }
    for (int i = 0; i < kForecasters; ++i) {
        weights_[i] = (1 - kLearn) * weights_[i] + kLearn * ((1 - kShared) * shares[i] + kShared / kForecasters);
    }
}

void Forecast::mix(int layer) {
    for (int32_t entry = first_[layer]; entry < first_[layer + 1]; ++entry) {
        double sum = 0;
        for (int i = 0; i < kForecasters; ++i) {
            sum += weights_[i] * forecasts_[i][entry];
        }
        probability_[entry] = sum;
    }
}

void Forecast::seek(int layer) {
    layer_ = layer;
    sought_ = false;
}

int32_t Forecast::next_victim() {
    const auto later = [](const Candidate& a, const Candidate& b) {
        return a.key > b.key || (a.key == b.key && a.entry > b.entry);
    };
    if (!sought_) {  // most requests need nobody to leave
        sought_ = true;
        candidates_.clear();
        const auto n_layer = static_cast<int>(preferred_.size());
        for (int layer = 0; layer < n_layer; ++layer) {
            const int distance = 1 + (layer - layer_ - 1 + n_layer) % n_layer;  // until it is passed again
            const double worth = layer == 0 ? first_layer_ : 1.0;
            const double factor = worth / (static_cast<double>(distance) / n_layer + 1.0);
            for (int32_t entry = first_[layer]; entry < first_[layer + 1]; ++entry) {
                if (present_[entry]) {
                    candidates_.push_back({probability_[entry] * factor, entry});
                }
            }
        }
        std::make_heap(candidates_.begin(), candidates_.end(), later);
    }
    if (candidates_.empty()) {
        return kNone;
    }
    std::pop_heap(candidates_.begin(), candidates_.end(), later);
    const int32_t victim = candidates_.back().entry;
    candidates_.pop_back();
    return victim;
}

}  // namespace edgemoe
