// Which experts each layer's router may choose: all of them, or a task's set (PreMoe's pruned model, without pruning).
//
// The result is what a model would compute whose other experts had been cut out of the file. Scores get -inf where a
// softmax or a choice of groups reads them; the selected ids are taken again from the full ranking, so that an
// excluded expert cannot even win a tie.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ggml_abi.h"

namespace edgemoe {

class ExpertMask {
   public:
    // Throws SystemError when the ids are not some of the layer's n_expert. No ids, or all: every expert again.
    void keep(int layer, int n_expert, const std::vector<int32_t>& experts);
    bool limits(int layer) const { return layer < static_cast<int>(kept_.size()) && !kept_[layer].empty(); }

    // Scores [n_expert, n_tokens]: -inf for what is not kept.
    void exclude(int layer, ggml::Tensor* scores) const;
    // The selected ids, a view of the argsort over all experts: its first n_expert_used that are kept.
    // Throws SystemError when they are something else (a table's, say), or too few are kept.
    void select_again(int layer, ggml::Tensor* top_k) const;
    [[noreturn]] static void refuse(int layer);  // SystemError: the layer's routing is not one that can be limited

   private:
    std::vector<std::vector<uint8_t>> kept_;  // by layer: a flag for each expert, or empty for no limit
};

}  // namespace edgemoe
