// The native eval callback: it reads which experts the router selected and has them in memory before they are used.
//
// llama.cpp calls it for every node of the graph (llama_context_params.cb_eval). A layer's node `ffn_moe_topk-<layer>`
// holds the selected ids; the computation stops there for a moment. Usually all the selected experts' slabs are then
// asked for at once; one token's products wait for theirs themselves (TokenProducts), a batch's are stopped for. When a
// batch selects more than the arena holds, the hook instead acquires each expert tensor's share right before the
// MUL_MAT_ID that needs it.
//
// On the way it can record what the routers say (`trace`), limit what they may choose (`mask`), and end a graph early:
// a prompt's first router answers before any expert is read. Where low-weight misses may be skipped, experts are
// acquired a few nodes later, once their weights are known.
//
// A failure aborts the graph and is kept for `take_failure`: the caller must ask after each llama_decode.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "batch_memory.h"
#include "expert_buffer.h"
#include "expert_mask.h"
#include "expert_store.h"
#include "forced_routes.h"
#include "ggml_abi.h"
#include "graph_node.h"
#include "look_ahead.h"
#include "router_trace.h"
#include "skipping.h"
#include "stand_ins.h"
#include "token_products.h"

namespace edgemoe {

class RouterHook {
   public:
    RouterHook(ExpertStore& store, const ExpertBuffer& buffer, const ggml::Api& api)
        : store_(store),
          buffer_(buffer),
          api_(api),
          skipping_(store),
          look_ahead_(store, buffer),
          stand_ins_(store, buffer),
          products_(store, api) {}

    static bool on_node(ggml::Tensor* node, bool ask, void* self);  // ggml_backend_sched_eval_callback
    static bool on_abort(void* self);                               // ggml_abort_callback

    // Before each llama_decode, of so many tokens that start there.
    void begin(int64_t position = 0, int64_t n_tokens = 0);
    // Experts may have so much of the memory that batches are computed in while tokens are decoded one by one.
    void lend(uint64_t n_bytes) { lent_bytes_ = n_bytes; }
    void interrupt();  // from any thread: stop the running llama_decode
    bool interrupted() const { return stop_; }
    // What went wrong since `begin`, or empty.
    std::string take_failure();
    uint64_t staged_layers() const { return staged_layers_; }  // layers served tensor by tensor so far

    // Between two llama_decodes only. Layers without experts are refused with a SystemError.
    void keep(int layer, const std::vector<int32_t>& experts) { mask_.keep(layer, store_.n_expert(layer), experts); }
    void watch(const std::vector<int>& layers, bool outputs);
    LayerTrace take_trace(int layer) { return trace_.take(layer); }
    ForcedRoutes& routes() { return routes_; }
    Skipping& skipping() { return skipping_; }
    // End each graph once this layer has been watched, before what it does not need is computed; -1: compute it all.
    void cut_after(int layer) { cut_layer_ = layer; }

   private:
    bool before_node(ggml::Tensor* node);
    bool before_experts(ggml::Tensor* node, int id);
    bool after_node(ggml::Tensor* node);
    bool wants(const ggml::Tensor* node, Node is) const;
    bool select(int layer, ggml::Tensor* top_k);
    bool serve(int layer, const ggml::Tensor* top_k);
    void finish_waiting();
    void count_hits(int layer, const ggml::Tensor* top_k) const;
    void complete(int layer);
    void look_ahead(int layer, int ahead, const ggml::Tensor* top_k);
    bool in_parallel() const;
    std::function<void()> expect_later();
    void read_table(const ggml::Tensor* node);
    void fail(const std::string& what);

    ExpertStore& store_;
    const ExpertBuffer& buffer_;
    const ggml::Api& api_;
    ExpertMask mask_;
    RouterTrace trace_;
    ForcedRoutes routes_;
    Skipping skipping_;
    LookAhead look_ahead_;
    StandIns stand_ins_;
    TokenProducts products_;
    BatchMemory batch_memory_;
    uint64_t lent_bytes_ = 0;
    int64_t n_tokens_ = 0;  // of the batch
    int cut_layer_ = -1;
    int asked_layer_ = -1;  // this layer's router has answered, but its experts are not yet selected
    std::vector<int32_t> ids_, rows_;
    std::vector<std::pair<int, std::vector<int32_t>>> expectations_;  // layers and experts the store was not told yet
    int served_layer_ = -1;                                           // ids_ and the pinned slabs belong to this layer
    bool staged_ = false;    // the expert tensors of served_layer_ are acquired one by one
    uint32_t arriving_ = 0;  // parts of served_layer_ that have not been waited for
    std::atomic<bool> stop_{false};
    std::atomic<uint64_t> staged_layers_{0};
    std::mutex mutex_;
    std::string failure_;
};

}  // namespace edgemoe
