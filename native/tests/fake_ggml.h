// As much of ggml as the native core can see: its functions, its loader's way with buffers, its scheduler's with nodes.
#pragma once

#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "expert_buffer.h"
#include "ggml_abi.h"
#include "router_hook.h"
#include "tiny_model.h"

namespace fake_ggml {

using edgemoe::ggml::Api;
using edgemoe::ggml::Buffer;
using edgemoe::ggml::BufferInterface;
using edgemoe::ggml::BufferType;
using edgemoe::ggml::Context;
using edgemoe::ggml::InitParams;
using edgemoe::ggml::Tensor;

constexpr int kF32 = 0;
constexpr int kI32 = 26;
constexpr int kI8 = 24;
constexpr int kOpView = 7;
constexpr int kOpMulMatId = 31;
constexpr int kOpGetRows = 40;

inline void set_name(Tensor* tensor, const std::string& name) {
    std::snprintf(tensor->name, sizeof(tensor->name), "%s", name.c_str());
}

inline Tensor make_tensor(int type, const std::string& name, std::vector<int64_t> ne) {
    Tensor tensor{};
    tensor.type = type;
    ne.resize(4, 1);
    tensor.nb[0] = type == kI8 ? 1 : 4;
    for (size_t i = 0; i < 4; ++i) {
        tensor.ne[i] = ne[i];
        if (i > 0) {
            tensor.nb[i] = tensor.nb[i - 1] * static_cast<size_t>(ne[i - 1]);
        }
    }
    set_name(&tensor, name);
    return tensor;
}

// Where a MUL_MAT_ID finds the expert that was selected for a token as the slot-th.
inline const std::byte* selected(const Tensor& product, size_t token, size_t slot) {
    const Tensor &experts = *product.src[0], &ids = *product.src[2];
    CHECK_EQUAL(ids.nb[0], sizeof(int32_t));
    int32_t id = -1;
    std::memcpy(&id, static_cast<const char*>(ids.data) + token * ids.nb[1] + slot * ids.nb[0], sizeof(id));
    CHECK(0 <= id && id < experts.ne[2]);
    return static_cast<const std::byte*>(experts.data) + static_cast<size_t>(id) * experts.nb[2];
}

// A context owns its tensors, as ggml's does.
inline std::deque<Tensor>*& open_context() {
    static std::deque<Tensor>* tensors = nullptr;
    return tensors;
}

inline Api make_api() {
    Api api{};
    api.buffer_init = [](BufferType* type, BufferInterface iface, void* context, size_t size) {
        return new Buffer{iface, type, context, size, 0};
    };
    api.nbytes = [](const Tensor* tensor) { return tensor->nb[3] * static_cast<size_t>(tensor->ne[3]); };
    api.init = [](InitParams params) {
        CHECK(params.no_alloc);
        open_context() = new std::deque<Tensor>;
        return reinterpret_cast<Context*>(open_context());
    };
    api.free = [](Context* context) {
        CHECK(reinterpret_cast<std::deque<Tensor>*>(context) == open_context());
        delete std::exchange(open_context(), nullptr);
    };
    api.new_tensor_3d = [](Context*, int type, int64_t ne0, int64_t ne1, int64_t ne2) {
        return &open_context()->emplace_back(make_tensor(type, "", {ne0, ne1, ne2}));
    };
    api.mul_mat_id = [](Context*, Tensor* as, Tensor* b, Tensor* ids) {
        Tensor product = make_tensor(kF32, "", {as->ne[1], ids->ne[0], b->ne[2]});
        product.op = kOpMulMatId;
        product.src[0] = as;
        product.src[1] = b;
        product.src[2] = ids;
        return &open_context()->emplace_back(product);
    };
    api.get_rows = [](Context*, Tensor* table, Tensor* rows) {
        Tensor found = make_tensor(kF32, "", {table->ne[0], rows->ne[0], rows->ne[1]});
        found.op = kOpGetRows;
        found.src[0] = table;
        found.src[1] = rows;
        return &open_context()->emplace_back(found);
    };
    api.set_name = [](Tensor* tensor, const char* name) {
        set_name(tensor, name);
        return tensor;
    };
    return api;
}

// llama.cpp's loader: one buffer for all tensors, each at an aligned offset, init_tensor called for each.
class LoadedModel {
   public:
    LoadedModel(const TinyModel& model, edgemoe::ExpertBuffer& buffer) {
        for (const edgemoe::TensorSpec& spec : model.tensors) {
            const auto n_expert = static_cast<int64_t>(spec.n_expert > 0 ? spec.n_expert : 1);
            tensors.push_back(
                make_tensor(kI8, spec.name, {static_cast<int64_t>(spec.n_bytes) / n_expert, 1, n_expert}));
        }
        place(buffer);
    }
    LoadedModel(std::vector<Tensor> some, edgemoe::ExpertBuffer& buffer) : tensors(some.begin(), some.end()) {
        place(buffer);
    }
    ~LoadedModel() {
        if (memory != nullptr) {
            memory->iface.free_buffer(memory);
            delete memory;
        }
    }
    LoadedModel(const LoadedModel&) = delete;
    LoadedModel& operator=(const LoadedModel&) = delete;

    std::deque<Tensor> tensors;
    Buffer* memory = nullptr;
    int status = edgemoe::ggml::kStatusSuccess;

   private:
    void place(edgemoe::ExpertBuffer& buffer) {
        BufferType* type = buffer.type();
        CHECK(type->iface.is_host(type));
        const size_t alignment = type->iface.get_alignment(type);
        std::vector<size_t> offsets;
        size_t end = 0;
        for (const Tensor& tensor : tensors) {
            offsets.push_back(end);
            end += type->iface.get_alloc_size(type, &tensor);
            end = (end + alignment - 1) / alignment * alignment;
        }
        memory = type->iface.alloc_buffer(type, end);
        if (memory == nullptr) {
            status = edgemoe::ggml::kStatusFailed;
            return;
        }
        auto* base = static_cast<std::byte*>(memory->iface.get_base(memory));
        for (size_t i = 0; i < tensors.size() && status == edgemoe::ggml::kStatusSuccess; ++i) {
            tensors[i].buffer = memory;
            tensors[i].data = base + offsets[i];
            status = memory->iface.init_tensor(memory, &tensors[i]);
        }
    }
};

// ggml_backend_sched with an eval callback: asks ahead, computes up to the first wanted node, calls again.
class Graph {
   public:
    using Compute = std::function<void(Tensor*)>;

    Tensor* add(Tensor tensor, Compute compute = nullptr) {
        computes_.push_back(std::move(compute));
        return &nodes_.emplace_back(tensor);
    }

    // False: aborted. `n_computed` nodes were done, in `n_pieces` stretches.
    bool run(edgemoe::RouterHook& hook) {
        n_computed = n_pieces = 0;
        for (size_t first = 0; first < nodes_.size(); ++first) {
            size_t last = first;
            bool needed = edgemoe::RouterHook::on_node(&nodes_[last], true, &hook);
            while (!needed && last + 1 < nodes_.size()) {
                needed = edgemoe::RouterHook::on_node(&nodes_[++last], true, &hook);
            }
            ++n_pieces;
            for (size_t i = first; i <= last; ++i) {
                if (computes_[i]) {
                    computes_[i](&nodes_[i]);
                }
                ++n_computed;
                if (edgemoe::RouterHook::on_abort(&hook)) {
                    return false;
                }
            }
            if (needed && !edgemoe::RouterHook::on_node(&nodes_[last], false, &hook)) {
                break;  // and ggml says that all is well
            }
            first = last;
        }
        return true;
    }

    // Adds all nodes but those of that name to another graph, which must not outlive this one.
    void copy_without(const std::string& name, Graph& other) {
        for (size_t i = 0; i < nodes_.size(); ++i) {
            if (nodes_[i].name != name) {
                other.add(nodes_[i], computes_[i]);
            }
        }
    }

    size_t size() const { return nodes_.size(); }
    size_t n_computed = 0;
    size_t n_pieces = 0;

   private:
    std::deque<Tensor> nodes_;
    std::vector<Compute> computes_;
};

}  // namespace fake_ggml
