// The memory that llama.cpp computes its graphs in. A prompt batch fills it, a single token hardly any of it, and
// between two graphs nothing in it is of use: each one writes its inputs anew (llama_context::process_ubatch,
// set_inputs of every input) and its outputs are copied out (llama_context's own output buffer).
#pragma once

#include <cstdint>

#include "ggml_abi.h"

namespace edgemoe {

class BatchMemory {
   public:
    // A node of the graph that is being computed.
    void learn(const ggml::Tensor* node) { buffer_ = node->buffer; }
    // Between two graphs: gives all of its pages back. False, and nothing is given back, where it is not known or has
    // less than `least` bytes. What was learnt is forgotten: llama.cpp may have other memory for the next graph.
    bool give_back(uint64_t least);

   private:
    ggml::Buffer* buffer_ = nullptr;
};

}  // namespace edgemoe
