// An eviction policy that forecasts use: whoever is least likely to be needed soon leaves.
//
// Each expert has a probability that the next token to pass its layer uses it: a mixture of averages of its use with
// half-lives of 1, 4, 16 and 64 tokens and of a prior, uniform or an active task's experts. The weights of the mixture
// are learnt while tokens are decoded, one step of expectation maximization each, so that no half-life has to be
// tuned, and a task's pattern counts as much as it has proved right. A prompt batch counts as its tokens' mean: what
// few of them used does not push out what most used.
//
// Layers are passed in turn, so that of two equally likely experts the one whose layer comes later leaves: the
// probability is divided by 1 + the share of a token that passes until then. benchmarks/policy_sim.py compares it with
// other policies, on real routes, and agrees with it victim for victim.
//
// Nobody looks ahead to the first layer, so that each of its misses is waited for from its beginning: where look-ahead
// hides the others', its experts count for more.
#pragma once

#include <cstdint>
#include <vector>

#include "eviction.h"

namespace edgemoe {

class Forecast final : public Eviction {
   public:
    // How many times as much a miss in the first layer costs as one in another.
    explicit Forecast(double first_layer = 1) : first_layer_(first_layer) {}

    void resize(const std::vector<int>& n_expert) override;
    void routed(int layer, int64_t n_tokens, const std::vector<int32_t>& experts) override;
    void touch(int32_t entry) override { present_[entry] = true; }
    void admit(int32_t entry) override { present_[entry] = true; }
    void remove(int32_t entry) override { present_[entry] = false; }
    void prefer(int layer, const std::vector<int32_t>& experts) override;
    void seek(int layer) override;
    int32_t next_victim() override;

    double probability(int32_t entry) const { return probability_[entry]; }

   private:
    static constexpr int kForecasters = 5;  // the prior, then the averages
    struct Candidate {
        double key;
        int32_t entry;
    };

    void start(double used);
    void learn(int32_t first, const std::vector<int32_t>& experts);
    void mix(int layer);

    const double first_layer_;
    std::vector<int32_t> first_;                   // by layer, and one past the end
    double used_ = 0;                              // experts of a token; 0 until one has passed
    std::vector<std::vector<int32_t>> preferred_;  // by layer
    std::vector<bool> passed_;                     // layers that a token has passed
    std::vector<double> forecasts_[kForecasters];
    double weights_[kForecasters];
    std::vector<double> probability_;
    std::vector<bool> present_;
    std::vector<int32_t> count_;
    int layer_ = 0;
    bool sought_ = false;
    std::vector<Candidate> candidates_;  // a heap, the next victim on top
};

}  // namespace edgemoe
