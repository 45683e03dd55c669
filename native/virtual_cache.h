// What a cache of experts would hold that sees nothing but routing: no clock, no disk, no reading ahead.
//
// It evicts as the store does and has a fixed capacity, so that its content follows from the routed tokens alone. The
// store's own content depends on what has arrived by when, which must not decide over an answer.
#pragma once

#include <cstdint>
#include <vector>

#include "forecast.h"

namespace edgemoe {

class VirtualCache {
   public:
    // By MoE layer: its experts, and the bytes of one of them. Empty afterwards.
    void resize(std::vector<int> n_expert, std::vector<uint64_t> expert_bytes, uint64_t capacity);
    void clear();
    bool holds(int layer, int32_t expert) const { return held_[first_[layer] + expert] != 0; }
    // So many tokens pass the layer and chose these, each as often as it was chosen.
    void routed(int layer, int64_t n_tokens, const std::vector<int32_t>& experts) {
        order_.routed(layer, n_tokens, experts);
    }
    // The layer computes with these: as many of them as have room are held from now on, and others leave for them.
    void use(int layer, const std::vector<int32_t>& experts);

   private:
    bool make_room(uint64_t n_bytes);

    std::vector<int> n_expert_;
    std::vector<uint64_t> expert_bytes_;
    std::vector<int32_t> first_;  // entry of each layer's first expert
    std::vector<int32_t> layer_of_;
    std::vector<uint8_t> held_, wanted_;  // by entry
    uint64_t capacity_ = 0, used_ = 0;
    Forecast order_;
};

}  // namespace edgemoe
