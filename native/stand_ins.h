// What MUL_MAT_ID is given where experts are in slots: instead of an expert tensor the stretch of memory that holds
// that part of every slot, and instead of the selected experts' numbers those of their slots.
//
// The nodes of a graph keep their stand-ins, since llama.cpp may compute the same graph again for the next token.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "expert_buffer.h"
#include "expert_store.h"
#include "ggml_abi.h"

namespace edgemoe {

class StandIns {
   public:
    StandIns(const ExpertStore& store, const ExpertBuffer& buffer) : store_(store), buffer_(buffer) {}

    // The store's tensor behind an expert tensor or the stand-in of one, or -1.
    int expert_tensor(const ggml::Tensor* tensor) const;
    // Before a MUL_MAT_ID of that tensor is computed, and after its experts were requested.
    void put_in(ggml::Tensor* node, int id);

   private:
    struct StandIn {
        ggml::Tensor experts;
        ggml::Tensor ids;
        const ggml::Tensor* selected = nullptr;  // what `ids` stands in for
        std::vector<int32_t> slots;
    };
    StandIn& of(int id, const ggml::Tensor* experts);

    const ExpertStore& store_;
    const ExpertBuffer& buffer_;
    std::unordered_map<int, std::unique_ptr<StandIn>> by_id_;
    std::unordered_map<const ggml::Tensor*, int> experts_;
};

}  // namespace edgemoe
