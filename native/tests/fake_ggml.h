// As much of ggml as the native core can see: its functions, its loader's way with buffers, its scheduler's with nodes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
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
constexpr int kCoded = 25;  // bytes that are multiplied with codes of the input, each a byte
constexpr int kOpView = 7;
constexpr int kOpMulMatId = 31;
constexpr int kOpGetRows = 40;
constexpr int kOpCustom = 90;

inline void set_name(Tensor* tensor, const std::string& name) {
    std::snprintf(tensor->name, sizeof(tensor->name), "%s", name.c_str());
}

inline Tensor make_tensor(int type, const std::string& name, std::vector<int64_t> ne) {
    Tensor tensor{};
    tensor.type = type;
    ne.resize(4, 1);
    tensor.nb[0] = type == kI8 || type == kCoded ? 1 : 4;
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

// What the kernel of kI8 makes of a slab, whatever it is multiplied with: a number that a float holds.
inline float checksum(const void* slab, size_t n) {
    uint32_t sum = 2166136261;
    for (size_t i = 0; i < n; ++i) {
        sum = (sum ^ static_cast<const uint8_t*>(slab)[i]) * 16777619;
    }
    return static_cast<float>(sum >> 8);
}

// Whether a product that has been computed used this slab for the expert that was selected for a token as the slot-th.
inline bool used(const Tensor& product, size_t token, size_t slot, const void* slab, size_t n) {
    if (product.op == kOpMulMatId) {
        return std::memcmp(selected(product, token, slot), slab, n) == 0;
    }
    CHECK_EQUAL(product.op, kOpCustom);
    CHECK_EQUAL(token, 0U);
    float result = -1;
    std::memcpy(&result, static_cast<const char*>(product.data) + slot * product.nb[1], sizeof(result));
    return result == checksum(slab, n);
}

// As many threads as ggml would have: each calls the operation.
inline void compute_custom(Tensor* node, int n_threads = 2) {
    edgemoe::ggml::CustomOp op{};
    std::memcpy(&op, node->op_params, sizeof(op));
    CHECK_EQUAL(op.n_tasks, edgemoe::ggml::kAllThreads);
    std::vector<std::thread> threads;
    for (int i = 1; i < n_threads; ++i) {
        threads.emplace_back([&op, node, i, n_threads] { op.fun(node, i, n_threads, op.userdata); });
    }
    op.fun(node, 0, n_threads, op.userdata);
    for (std::thread& thread : threads) {
        thread.join();
    }
}

inline std::atomic<int>& n_checksums() {
    static std::atomic<int> n{0};
    return n;
}

inline const edgemoe::ggml::TypeTraits* type_traits(int type) {
    using edgemoe::ggml::TypeTraits;
    static const TypeTraits of_floats{
        nullptr,
        [](int n, float* result, size_t, const void* x, size_t, const void* y, size_t, int) {
            const auto *a = static_cast<const float*>(x), *b = static_cast<const float*>(y);
            *result = std::inner_product(a, a + n, b, 0.0F);
        },
        kF32, 1};
    static const TypeTraits of_slabs{nullptr,
                                     [](int n, float* result, size_t, const void* x, size_t, const void*, size_t, int) {
                                         *result = checksum(x, static_cast<size_t>(n));
                                         ++n_checksums();
                                     },
                                     kF32, 1};
    static const TypeTraits of_codes{
        [](const float* from, void* to, int64_t n) {
            std::transform(from, from + n, static_cast<uint8_t*>(to),
                           [](float number) { return static_cast<uint8_t>(number); });
        },
        [](int n, float* result, size_t, const void* x, size_t, const void* y, size_t, int) {
            const auto *a = static_cast<const uint8_t*>(x), *b = static_cast<const uint8_t*>(y);
            *result = static_cast<float>(std::inner_product(a, a + n, b, 0));
        },
        kCoded, 1};
    return type == kI8 ? &of_slabs : type == kCoded ? &of_codes : &of_floats;
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
    api.row_size = [](int type, int64_t n) { return make_tensor(type, "", {n}).nb[1]; };
    api.type_traits = type_traits;
    api.custom_4d = [](Context*, int type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3, Tensor** args,
                       int n_args, decltype(edgemoe::ggml::CustomOp::fun) fun, int n_tasks, void* userdata) {
        Tensor result = make_tensor(type, "", {ne0, ne1, ne2, ne3});
        result.op = kOpCustom;
        std::copy(args, args + n_args, result.src);
        const edgemoe::ggml::CustomOp op{fun, n_tasks, userdata};
        std::memcpy(result.op_params, &op, sizeof(op));
        return &open_context()->emplace_back(result);
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
                if (nodes_[i].op == kOpCustom) {
                    compute_custom(&nodes_[i]);
                }
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
