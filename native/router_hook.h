// The native eval callback: it reads which experts the router selected and has them in memory before they are used.
//
// llama.cpp calls it for every node of the graph (llama_context_params.cb_eval). A layer's node `ffn_moe_topk-<layer>`
// holds the selected ids; the computation stops there for a moment. Usually all the selected experts' slabs are then
// acquired at once. When a prompt batch selects more than the arena holds, the hook instead acquires each expert
// tensor's share right before the MUL_MAT_ID that needs it.
//
// A failure aborts the graph and is kept for `take_failure`: the caller must ask after each llama_decode.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "expert_buffer.h"
#include "expert_store.h"
#include "ggml_abi.h"

namespace edgemoe {

class RouterHook {
   public:
    RouterHook(ExpertStore& store, const ExpertBuffer& buffer, const ggml::Api& api)
        : store_(store), buffer_(buffer), api_(api) {}

    static bool on_node(ggml::Tensor* node, bool ask, void* self);  // ggml_backend_sched_eval_callback
    static bool on_abort(void* self);                               // ggml_abort_callback

    void begin();      // before each llama_decode
    void interrupt();  // from any thread: stop the running llama_decode
    bool interrupted() const { return stop_; }
    // What went wrong since `begin`, or empty.
    std::string take_failure();
    uint64_t staged_layers() const { return staged_layers_; }  // layers served tensor by tensor so far

   private:
    bool before_node(ggml::Tensor* node);
    bool after_node(ggml::Tensor* node);
    void read_ids(const ggml::Tensor* ids);
    void fail(const std::string& what);

    ExpertStore& store_;
    const ExpertBuffer& buffer_;
    const ggml::Api& api_;
    std::vector<int32_t> ids_;
    int served_layer_ = -1;  // ids_ and the pinned slabs belong to this layer
    bool staged_ = false;    // the expert tensors of served_layer_ are acquired one by one
    std::atomic<bool> stop_{false};
    std::atomic<uint64_t> staged_layers_{0};
    std::mutex mutex_;
    std::string failure_;
};

}  // namespace edgemoe
