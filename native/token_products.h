// What one token's MUL_MAT_IDs are replaced by: the same products with ggml's own kernels, bit for bit, computed by
// llama.cpp's own threads (GGML_OP_CUSTOM), but of each expert wherever it is, and with those first that are in memory.
// The others are waited for here, so that the graph need not stop for them. What follows at once and multiplies the
// same vector, as up follows gate, is computed together with it: more to do until the others have arrived.
//
// MUL_MAT_ID itself would touch a cache line for each slot that there is, several thousand in each call.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <unordered_map>
#include <vector>

#include "expert_store.h"
#include "ggml_abi.h"

namespace edgemoe {

class TokenProducts {
   public:
    TokenProducts(ExpertStore& store, const ggml::Api& api) : store_(store), api_(api) {}

    // For each node in the order in which they are computed: makes a MUL_MAT_ID again of what was put in, since
    // llama.cpp keeps the graph of a token for the next one.
    void pass(ggml::Tensor* node);
    // Whether a MUL_MAT_ID can be replaced: it is of one token, whose row is not too long.
    bool suit(const ggml::Tensor* node) const;
    // Replaces the node that was passed last, of the store's tensor, whose experts were requested. `meanwhile`, unless
    // it is null, is done by the calling thread before it takes part in the computation.
    void put_in(int id, std::function<void()> meanwhile);

   private:
    struct Part {  // one MUL_MAT_ID
        const ggml::Tensor* node;
        int id;
        ggml::VecDot vec_dot;
    };
    struct Term {  // one of its experts
        size_t part;
        int32_t expert;
        const std::byte* weights;
        int64_t column;  // of the result, and of the input if it has as many
    };
    struct Product {
        ExpertStore* store;
        const ggml::Tensor* input;
        ggml::FromFloat from_float;  // null: the input is used as it is
        std::vector<Part> parts;
        std::vector<Term> terms;
        std::function<void()> meanwhile;
        std::atomic<int64_t> next_chunk;
    };
    static void compute(ggml::Tensor* node, int thread, int n_threads, void* product);  // ggml_custom_op_t
    static void computed_before(ggml::Tensor* node, int thread, int n_threads, void* product);
    int input_type(const ggml::Tensor* node) const { return api_.type_traits(node->src[0]->type)->vec_dot_type; }
    bool joins(const ggml::Tensor* node) const;

    ExpertStore& store_;
    const ggml::Api& api_;
    ggml::Tensor *passed_ = nullptr, *passed_before_ = nullptr;
    Product* latest_ = nullptr;
    std::unordered_map<const ggml::Tensor*, Product> products_;                   // by their first node
    std::unordered_map<const ggml::Tensor*, std::array<int32_t, 16>> op_params_;  // of MUL_MAT_IDs
    std::vector<int32_t> selected_;
};

}  // namespace edgemoe
