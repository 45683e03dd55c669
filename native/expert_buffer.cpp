#include "expert_buffer.h"

#include <cstring>
#include <memory>

namespace edgemoe {

namespace {

// What ggml's CPU kernels ask of a tensor's address.
constexpr size_t kTensorAlignment = 64;

ExpertBuffer* owner_of(ggml::BufferType* type) { return static_cast<ExpertBuffer*>(type->context); }

}  // namespace

ExpertBuffer::ExpertBuffer(ExpertStore& store, const ggml::Api& api) : store_(store), api_(api) {
    type_.iface.get_name = [](ggml::BufferType*) { return "edgemoe"; };
    type_.iface.alloc_buffer = alloc_buffer;
    type_.iface.get_alignment = [](ggml::BufferType*) { return kTensorAlignment; };
    type_.iface.get_max_size = nullptr;
    type_.iface.get_alloc_size = get_alloc_size;
    type_.iface.is_host = [](ggml::BufferType*) { return true; };
    type_.device = nullptr;
    type_.context = this;
    for (int id = 0; id < store_.n_tensors(); ++id) {
        by_name_.emplace(store_.tensor(id).name, id);
    }
}

ggml::Buffer* ExpertBuffer::alloc_buffer(ggml::BufferType* type, size_t size) {
    ExpertBuffer* self = owner_of(type);
    std::unique_ptr<Region> region;
    try {
        region = std::make_unique<Region>(self, page_ceil(size + page_size()));
        if (self->store_.io() == Io::mmap) {
            self->store_.watch(region->base, region->size);
        }
    } catch (const std::exception& error) {
        self->failure_ = error.what();
        return nullptr;
    }
    ggml::BufferInterface iface{};
    iface.free_buffer = [](ggml::Buffer* buffer) { delete static_cast<Region*>(buffer->context); };
    iface.get_base = [](ggml::Buffer* buffer) -> void* { return static_cast<Region*>(buffer->context)->base; };
    iface.init_tensor = init_tensor;
    iface.memset_tensor = [](ggml::Buffer*, ggml::Tensor* tensor, uint8_t value, size_t offset, size_t n) {
        std::memset(static_cast<std::byte*>(tensor->data) + offset, value, n);
    };
    iface.set_tensor = [](ggml::Buffer*, ggml::Tensor* tensor, const void* data, size_t offset, size_t n) {
        std::memcpy(static_cast<std::byte*>(tensor->data) + offset, data, n);
    };
    iface.get_tensor = [](ggml::Buffer*, const ggml::Tensor* tensor, void* data, size_t offset, size_t n) {
        std::memcpy(data, static_cast<const std::byte*>(tensor->data) + offset, n);
    };
    // Fresh anonymous memory is zero already, and clearing would commit all of it.
    iface.clear = [](ggml::Buffer*, uint8_t) {};
    return self->api_.buffer_init(type, iface, region.release(), size);
}

size_t ExpertBuffer::get_alloc_size(ggml::BufferType* type, const ggml::Tensor* tensor) {
    const ExpertBuffer* self = owner_of(type);
    const auto found = self->by_name_.find(tensor->name);
    return found == self->by_name_.end() ? self->api_.nbytes(tensor) : self->store_.place_size(found->second);
}

int ExpertBuffer::init_tensor(ggml::Buffer* buffer, ggml::Tensor* tensor) {
    ExpertBuffer* self = static_cast<Region*>(buffer->context)->owner;
    try {
        self->adopt(tensor);
        return ggml::kStatusSuccess;
    } catch (const std::exception& error) {  // nothing may pass through ggml's C frames
        self->failure_ = error.what();
        return ggml::kStatusFailed;
    }
}

void ExpertBuffer::adopt(ggml::Tensor* tensor) {
    if (stop_ && !loaded_) {
        throw SystemError("loading was interrupted");
    }
    const auto found = by_name_.find(tensor->name);
    if (found == by_name_.end() || tensor->view_src != nullptr) {
        return;
    }
    const int id = found->second;
    const TensorSpec& spec = store_.tensor(id);
    if (api_.nbytes(tensor) != spec.n_bytes ||
        (spec.n_expert > 0 && (tensor->ne[2] != spec.n_expert || tensor->nb[2] * tensor->ne[2] != spec.n_bytes))) {
        throw SystemError(spec.name + " has another size for llama.cpp than in the file's header");
    }
    std::byte* data = store_.place(id, static_cast<std::byte*>(tensor->data));
    tensor->data = data;
    if (spec.n_expert > 0) {
        experts_.emplace(tensor, id);
    } else if (spec.row_bytes > 0) {
        tables_.emplace(tensor, id);
    } else {
        store_.read_dense(id, data);
        dense_.emplace(spec.name, tensor);
    }
    renamed_.emplace_back(tensor, id);
    tensor->name[0] = '\1';
}

void ExpertBuffer::restore_names() {
    for (const auto& [tensor, id] : renamed_) {
        tensor->name[0] = store_.tensor(id).name[0];
    }
    renamed_.clear();
    loaded_ = true;
}

}  // namespace edgemoe
