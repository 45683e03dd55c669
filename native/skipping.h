// Skipping of experts that would have to be read and count for little (--skip-mass).
//
// While an answer is decoded token by token: of the experts that a token selected in a layer, those of the lowest
// weights are left out if they would be misses, as long as their share of the token's weights in this layer stays
// within a bound. Their slots get weight 0 and the expert of another slot, which is needed anyway; the other weights
// grow to the same sum. The graph's own weights are changed, the last before they are multiplied, so that it works for
// every way to get them from a router.
//
// A miss is what a virtual cache does not hold, which forgets when a conversation starts: the same tokens always give
// the same answer, however fast the disk is and whatever was spoken of before. Prompts are never skipped: a token
// counts as decoded if it is alone in its batch and goes on where the batch before ended.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "expert_store.h"
#include "ggml_abi.h"
#include "graph_node.h"
#include "virtual_cache.h"

namespace edgemoe {

struct SkipCounts {
    uint64_t routed_slots = 0;   // experts that decoded tokens selected, in all layers
    uint64_t skipped_slots = 0;  // those of them that were skipped
    uint64_t routed_layers = 0;  // layers that decoded tokens passed
    double skipped_mass = 0;     // sum over these of the skipped experts' share of the weights
};

class Skipping {
   public:
    explicit Skipping(const ExpertStore& store) : store_(store) {}

    // At most this share of a token's weights in a layer, 0 (nothing is skipped) to 0.5; bytes of the virtual cache.
    // Between two llama_decodes only. Throws SystemError for another share.
    void bound(double mass, uint64_t cache_bytes);
    bool on() const { return bound_ > 0; }
    SkipCounts counts() const { return {routed_slots_, skipped_slots_, routed_layers_, skipped_mass_}; }

    // -------- while a graph runs, if `on`
    void begin(int64_t position, int64_t n_tokens);  // of the batch: before each llama_decode
    void learn(int layer, const ggml::Tensor* weighted);
    // The layer's router selected. True: the experts are not to be served before the weights are known.
    bool postpones(int layer, ggml::Tensor* top_k, const std::vector<int32_t>& ids);
    bool awaits(const ggml::Tensor* node) const;  // the weights of what was postponed
    int postponed_layer() const { return top_k_ != nullptr ? layer_ : -1; }
    // Changes the weights and the selected ids, which it returns.
    const ggml::Tensor* skip(ggml::Tensor* weights, const std::vector<int32_t>& ids);
    static std::string refusal(int layer);  // the layer's experts are used before weights were seen

   private:
    std::vector<size_t> skippable(const std::vector<double>& shares, const std::vector<int32_t>& ids) const;

    const ExpertStore& store_;
    double bound_ = 0;
    VirtualCache cache_;
    std::vector<std::string> weights_name_;  // by layer: the node that its experts are multiplied with
    int64_t next_position_ = -1;             // of the token that goes on
    bool decoding_ = false;
    ggml::Tensor* top_k_ = nullptr;  // selected, not yet served
    int layer_ = -1;                 // of the last postponed
    std::atomic<uint64_t> routed_slots_{0}, skipped_slots_{0}, routed_layers_{0};
    std::atomic<double> skipped_mass_{0};
};

}  // namespace edgemoe
