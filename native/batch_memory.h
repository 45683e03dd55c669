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
    // Right after that graph, as llama.cpp may have other memory for a later one: gives all of its pages back. False
    // where it is not known, has less than `least` bytes, or the system keeps it.
    bool give_back(uint64_t least) const;

   private:
    ggml::Buffer* buffer_ = nullptr;
};

}  // namespace edgemoe
