#include "router_hook.h"

#include <cstring>
#include <utility>

namespace edgemoe {

namespace {

constexpr char kTopK[] = "ffn_moe_topk-";

// The layer of a node named exactly `ffn_moe_topk-<layer>`, or -1. (A cast of it is named `ffn_moe_topk-3 (copy)`.)
int top_k_layer(const char* name) {
    if (std::strncmp(name, kTopK, sizeof(kTopK) - 1) != 0) {
        return -1;
    }
    const char* digits = name + sizeof(kTopK) - 1;
    int layer = 0;
    if (*digits == '\0') {
        return -1;
    }
    for (; *digits != '\0'; ++digits) {
        if (*digits < '0' || *digits > '9' || layer > 100000) {
            return -1;
        }
        layer = layer * 10 + (*digits - '0');
    }
    return layer;
}

}  // namespace

bool RouterHook::on_node(ggml::Tensor* node, bool ask, void* self) {
    auto* hook = static_cast<RouterHook*>(self);
    try {
        return ask ? hook->before_node(node) : hook->after_node(node);
    } catch (const std::exception& error) {
        hook->fail(error.what());
        return ask;  // when asked: have this node alone computed, so that the abort is noticed at once
    }
}

bool RouterHook::on_abort(void* self) { return static_cast<RouterHook*>(self)->stop_; }

// True: compute up to and including this node, then call `after_node`.
bool RouterHook::before_node(ggml::Tensor* node) {
    if (node->op == api_.op_mul_mat_id) {
        const int id = buffer_.expert_tensor(node->src[0]);
        if (id >= 0) {
            const int layer = store_.tensor(id).layer;
            if (staged_ && layer == served_layer_) {
                // Each user of experts is computed at once, so none of those asked about earlier still needs its own.
                store_.acquire(layer, 1U << store_.part_of(id), ids_);
                return true;
            }
            if (layer != served_layer_ && !store_.settled(layer)) {
                fail("layer " + std::to_string(layer) + " uses experts that its router never announced; " +
                     "this architecture needs a newer edgemoe");
                return true;
            }
        }
    }
    const int layer = top_k_layer(node->name);
    const int n_parts = layer < 0 ? 0 : store_.n_parts(layer);
    if (n_parts == 0) {
        return false;
    }
    if (store_.settled(layer)) {
        store_.count_hits(static_cast<uint64_t>(node->ne[0] * node->ne[1] * n_parts));
        return false;
    }
    return true;
}

// False: give up on the graph.
bool RouterHook::after_node(ggml::Tensor* node) {
    if (stop_) {
        return false;
    }
    const int layer = top_k_layer(node->name);
    const int n_parts = layer < 0 ? 0 : store_.n_parts(layer);
    if (n_parts == 0) {
        return true;
    }
    read_ids(node);
    served_layer_ = layer;
    const uint32_t all_parts = (1U << n_parts) - 1;
    staged_ = !store_.fits(layer, all_parts, ids_);
    if (staged_) {
        ++staged_layers_;
    } else {
        store_.acquire(layer, all_parts, ids_);
    }
    return true;
}

// The ids are a strided view of the argsort: [n_expert_used, n_tokens], row stride nb[1].
void RouterHook::read_ids(const ggml::Tensor* ids) {
    ids_.clear();
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        const char* row = static_cast<const char*>(ids->data) + static_cast<size_t>(token) * ids->nb[1];
        for (int64_t k = 0; k < ids->ne[0]; ++k) {
            int32_t id = 0;
            std::memcpy(&id, row + static_cast<size_t>(k) * ids->nb[0], sizeof(id));
            ids_.push_back(id);
        }
    }
}

void RouterHook::begin() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        failure_.clear();
    }
    stop_ = false;
    staged_ = false;
    served_layer_ = -1;
}

void RouterHook::interrupt() { stop_ = true; }

void RouterHook::fail(const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (failure_.empty()) {
        failure_ = what;
    }
    stop_ = true;
}

std::string RouterHook::take_failure() {
    // A resident model is computed without a single acquire, and its mapped pages can still be lost.
    try {
        store_.check_mapping();
    } catch (const SystemError& error) {
        fail(error.what());
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(failure_, {});
}

}  // namespace edgemoe
