// A router in 8 bits. Guessing the next layer's experts multiplies its whole router on the thread that computes; with
// the weights as they are (f32) that alone reads 1 MB a layer of Qwen3-30B-A3B for each token.
#pragma once

#include <cstdint>
#include <vector>

#include "ggml_abi.h"

namespace edgemoe {

class RouterCopy {
   public:
    explicit RouterCopy(const ggml::Tensor& weights);  // f32 [n_embd, n_expert], each row with a scale of its own

    // The product with a state [n_embd], which is rounded to 13 bits: scores [n_expert].
    std::vector<float> scores(const std::vector<float>& state) const;

   private:
    std::vector<int8_t> rows_;
    std::vector<float> scales_;  // of each row
};

}  // namespace edgemoe
