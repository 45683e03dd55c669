// Which experts the next layers are likely to select: their routers are asked about this layer's hidden state, which
// each layer's experts and attention change only a little.
//
// The router's input is found in the graph: the MUL_MAT with this layer's `ffn_gate_inp` behind the selected ids. Where
// a model's routers are built in another way, nothing is guessed. How often guesses of each rank and layer come true is
// watched, of those only that would have to be read, and by how far ahead they were made: what is wrong too often is
// not passed on, and watched further.
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

    // The experts of `layer`, so many MoE layers ahead of the one whose selected ids are given, for its last n_tokens;
    // likeliest first. Where rows [n_tokens, n_used] are told, they stand in for what the router says; it is asked all
    // the same, so that a measurement pays for it.
    std::vector<int32_t> guess(int layer, int ahead, const ggml::Tensor* top_k, int64_t n_tokens,
                               const std::vector<int32_t>& told = {});
    std::vector<int32_t> guess_from(int layer, int ahead, const std::vector<int32_t>& rows, size_t n_used);
    // The layer's router has spoken.
    void settle(int layer, const std::vector<int32_t>& experts);
    // Another graph, of so many tokens: what was guessed in the one before does not come true any more.
    void begin(int64_t n_tokens);
    // Layers ahead that are worth guessing. A second one levels what the disk has to do from layer to layer; it pays
    // where the disk is busy most of the time, and for single tokens: in a batch the next layer keeps it busy enough.
    int farthest() const;

   private:
    static constexpr int kFarthest = 2;
    static constexpr size_t kRanks = 32, kCounts = 8;
    struct Guess {
        int32_t expert;
        size_t rank;  // kRanks and more in a batch: by how many tokens make it
    };
    struct Router {
        std::string prefix, name;  // of the layer's tensors; of its weights
        const ggml::Tensor *weights, *bias, *selection_bias;
        std::optional<RouterCopy> copy;  // once it has been asked
    };
    struct Trust {  // the share of guesses that came true, the older ones fading
        double share = 0, watched = 0;
        void add(bool right);
    };
    struct Record {  // of guesses made so far ahead
        Trust all, by_rank[kRanks + kCounts + 1];
        std::vector<Trust> by_layer;
        std::vector<std::vector<Guess>> absent;  // by layer: of the guesses for it, those that were not in memory

        void watch(int layer, const Guess& guess, bool right);
        double chance(int layer, size_t rank) const;
    };

    Router& router_of(int layer);
    std::vector<int32_t> rows_of(int layer, const ggml::Tensor* top_k, int64_t n_tokens);
    std::vector<int32_t> worthwhile(int layer, int ahead, const std::vector<Guess>& guesses);

    const ExpertStore& store_;
    const ExpertBuffer& buffer_;
    std::unordered_map<int, Router> routers_;  // found once: this is done for every token
    Record records_[kFarthest];
    int64_t n_tokens_ = 0;                 // of the graph under way
    uint64_t began_ns_ = 0, busy_ns_ = 0;  // when it began
    double busy_share_ = 1;                // of the time between tokens, the older ones fading
};

}  // namespace edgemoe
