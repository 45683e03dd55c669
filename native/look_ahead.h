// Which experts the next layer is likely to select: its router is asked about this layer's hidden state, which the
// layer's own experts and the next attention change only a little.
//
// The router's input is found in the graph: the MUL_MAT with this layer's `ffn_gate_inp` behind the selected ids. Where
// a model's routers are built in another way, nothing is guessed. How often guesses of each rank and layer come true is
// watched, of those only that would have to be read: what is wrong too often is not passed on, and watched further.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "expert_buffer.h"
#include "expert_store.h"
#include "ggml_abi.h"
#include "router_copy.h"

namespace edgemoe {

class LookAhead {
   public:
    LookAhead(const ExpertStore& store, const ExpertBuffer& buffer) : store_(store), buffer_(buffer) {}

    // The experts of `layer` for the last n_tokens of those in the layer before it, whose selected ids are given;
    // likeliest first. Where rows [n_tokens, n_used] are told, they stand in for what the router says; it is asked all
    // the same, so that a measurement pays for it.
    std::vector<int32_t> guess(int layer, const ggml::Tensor* top_k, int64_t n_tokens,
                               const std::vector<int32_t>& told = {});
    std::vector<int32_t> guess_from(int layer, const std::vector<int32_t>& rows, size_t n_used);
    // The layer's router has spoken.
    void settle(int layer, const std::vector<int32_t>& experts);

   private:
    static constexpr size_t kRanks = 32, kCounts = 8;
    struct Guess {
        int32_t expert;
        size_t rank;  // kRanks and more in a batch: by how many tokens make it
    };
    struct Router {  // of a layer, and how the one before it is known in the graph
        std::string before, before_weights;
        const ggml::Tensor *weights, *bias, *selection_bias;
        std::optional<RouterCopy> copy;  // once it has been asked
    };
    struct Trust {  // the share of guesses that came true, the older ones fading
        double share = 0, watched = 0;
        void add(bool right);
    };

    Router& router_of(int layer);
    std::vector<int32_t> rows_of(int layer, const ggml::Tensor* top_k, int64_t n_tokens);
    std::vector<int32_t> worthwhile(int layer, std::vector<Guess> guesses);
    double chance(int layer, size_t rank) const;

    const ExpertStore& store_;
    const ExpertBuffer& buffer_;
    std::unordered_map<int, Router> routers_;  // found once: this is done for every token
    int guessed_layer_ = -1;
    std::vector<Guess> absent_;  // of the guesses for that layer, those that were not in memory
    Trust all_, by_rank_[kRanks + kCounts + 1];
    std::vector<Trust> by_layer_;
};

}  // namespace edgemoe
