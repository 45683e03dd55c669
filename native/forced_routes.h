// Routing from outside: the ids that a router selected are replaced by given ones, for measuring with models whose
// random weights route meaninglessly.
//
// Rows are used up token by token, prompt batches and decoded tokens alike; the first of the layers counts them. Where
// llama.cpp computes a layer for the last tokens of a batch only, these get the last rows of the batch.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "ggml_abi.h"

namespace edgemoe {

class ForcedRoutes {
   public:
    // ids: [n_tokens, layers.size(), n_used], of which the first token's are next. No layers: natural routing again.
    void set(std::vector<int> layers, std::vector<int32_t> ids, int64_t n_used);
    bool forces(int layer) const { return layer < static_cast<int>(column_.size()) && column_[layer] >= 0; }

    // Overwrites the selected ids, a view of the argsort. Throws SystemError when no rows are left, or for another
    // number of experts per token.
    void apply(int layer, ggml::Tensor* top_k);
    // What a predictor would say of the same tokens, [any, ids]: one layer ahead, then two, and so on; or nothing.
    void set_predictions(std::vector<int32_t> ids);
    bool predicts() const { return !predictions_.empty(); }
    // For the last of the tokens under way, [n_tokens, n_used]; nothing where nothing is predicted.
    std::vector<int32_t> predicted(int layer, int ahead, int64_t n_tokens) const;

   private:
    int64_t at(int layer, int64_t token) const { return (token * n_columns_ + column_[layer]) * n_used_; }

    std::vector<int> column_;  // by layer: its place among the given ones, or -1
    int first_layer_ = -1;
    std::vector<int32_t> ids_, predictions_;
    int64_t n_used_ = 0, n_columns_ = 0, n_rows_ = 0;
    int64_t batch_end_ = 0;  // rows used up, those of the batch under way included
};

// The same for a plain llama.cpp context, which has no store: an eval callback that does nothing else.
class RouteForcer {
   public:
    static bool on_node(ggml::Tensor* node, bool ask, void* self);  // ggml_backend_sched_eval_callback

    void force(std::vector<int> layers, std::vector<int32_t> ids, int64_t n_used);
    std::string failure() const;

   private:
    ForcedRoutes routes_;
    mutable std::mutex mutex_;
    std::string failure_;
};

}  // namespace edgemoe
