// What the routers said while a batch was computed: their logits, and, when asked, what the chosen experts gave.
//
// Rows are appended as the graph runs and taken by the caller after each llama_decode, so no more than one batch is
// ever held; after one that failed, whose rows are incomplete, it watches again. The hook writes and the caller takes
// in turn; nothing here is shared between threads. The last layer has rows only for tokens whose logits were asked for.
#pragma once

#include <cstdint>
#include <vector>

#include "ggml_abi.h"

namespace edgemoe {

struct LayerTrace {
    int64_t n_expert = 0;
    int64_t n_used = 0;
    std::vector<float> logits;   // [n_tokens, n_expert]
    std::vector<int32_t> ids;    // [n_tokens, n_used]
    std::vector<float> weights;  // [n_tokens, n_used]: what the router multiplies an expert's output with
    std::vector<float> norms;    // [n_tokens, n_used]: length of what it adds to the residual stream, over the weight
    std::vector<float> change;   // [n_tokens]: 1 - cos(residual stream before, after the experts); NaN if unknown
};

class RouterTrace {
   public:
    // Watch these layers from now on, and their experts' outputs if `outputs`. Forgets what was not taken.
    void watch(const std::vector<int>& layers, bool outputs);
    bool watches(int layer) const { return layer < static_cast<int>(watched_.size()) && watched_[layer]; }
    bool watches_outputs(int layer) const { return outputs_ && watches(layer); }
    void forget();

    void add_logits(int layer, const ggml::Tensor* logits);
    // To the rows just added: a router's own bias is part of what it says.
    void add_router_bias(int layer, const ggml::Tensor* biased);
    void add_residual(int layer, const ggml::Tensor* residual);
    void add_ids(int layer, const std::vector<int32_t>& ids, int64_t n_used);
    // After `add_ids`, the product with the weights. False: of the experts' inputs, so their outputs are yet to come.
    bool add_weighted(int layer, const ggml::Tensor* weighted);
    bool awaits_outputs(int layer) const { return layer == weighted_layer_; }
    void add_outputs(int layer, const ggml::Tensor* outputs);

    LayerTrace take(int layer);

   private:
    LayerTrace& of(int layer);
    void add_contributions(int layer, const ggml::Tensor* parts);

    std::vector<bool> watched_;
    bool outputs_ = false;
    std::vector<LayerTrace> layers_;
    std::vector<float> residual_;  // a copy: the graph may use its memory again before the experts have answered
    std::vector<float> sum_;
    int residual_layer_ = -1;  // residual_ is this layer's
    int routed_layer_ = -1;    // this layer's ids are known, but not its weights
    int weighted_layer_ = -1;  // this layer's weights are known, but not its outputs
};

}  // namespace edgemoe
