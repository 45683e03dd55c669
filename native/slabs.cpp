#include "slabs.h"

#include <algorithm>
#include <utility>

namespace edgemoe {

namespace {

constexpr uint64_t kSmallDense = uint64_t{64} << 10;

}  // namespace

int Slabs::add_file(const std::string& path) {
    auto file = std::make_unique<MappedFile>(path);
    std::string why;
    if (io_ == Io::direct && !file->open_direct(why)) {
        throw SystemError(path + ": " + why + "; use io=auto");
    }
    files_.push_back(std::move(file));
    return static_cast<int>(files_.size()) - 1;
}

int Slabs::add_tensor(TensorSpec spec) {
    const MappedFile& file = *files_.at(spec.file);
    if (spec.n_bytes > file.size() || spec.offset > file.size() - spec.n_bytes) {
        throw SystemError(spec.name + " lies outside " + file.path());
    }
    if (spec.row_bytes > 0 && spec.n_bytes % spec.row_bytes != 0) {
        throw SystemError(spec.name + " cannot be divided into rows of " + std::to_string(spec.row_bytes) + " bytes");
    }
    Tensor tensor;
    tensor.spec = std::move(spec);
    const int id = static_cast<int>(tensors_.size());
    if (tensor.spec.n_expert > 0) {
        if (tensor.spec.layer < 0 || tensor.spec.n_bytes == 0 ||
            tensor.spec.n_bytes % static_cast<uint64_t>(tensor.spec.n_expert) != 0) {
            throw SystemError(tensor.spec.name + " cannot be divided into " + std::to_string(tensor.spec.n_expert) +
                              " experts");
        }
        tensor.slab_bytes = tensor.spec.n_bytes / static_cast<uint64_t>(tensor.spec.n_expert);
        layers_.resize(std::max(layers_.size(), static_cast<size_t>(tensor.spec.layer) + 1));
        Layer& layer = layers_[tensor.spec.layer];
        if (layer.tensors.size() == kMaxParts || (!layer.tensors.empty() && layer.n_expert != tensor.spec.n_expert)) {
            throw SystemError(tensor.spec.name + " does not match the other expert tensors of its layer");
        }
        layer.n_expert = tensor.spec.n_expert;
        tensor.part = static_cast<int>(layer.tensors.size());
        layer.tensors.push_back(id);
        number_entries();
    }
    tensors_.push_back(std::move(tensor));
    return id;
}

void Slabs::number_entries() {
    int32_t n_entries = 0;
    int n_layers = 0;
    for (Layer& layer : layers_) {
        layer.number = layer.n_expert > 0 ? n_layers++ : -1;
        layer.first_entry = n_entries;
        n_entries += layer.n_expert;
    }
}

void Slabs::check_files() const {
    for (const auto& file : files_) {
        file->check_unchanged();
    }
}

int Slabs::n_expert(int layer) const {
    if (layer < 0 || layer >= static_cast<int>(layers_.size()) || layers_[layer].tensors.empty()) {
        throw SystemError("layer " + std::to_string(layer) + " was asked for experts, but the model has none there");
    }
    return layers_[layer].n_expert;
}

bool Slabs::is_small_dense(const TensorSpec& spec) {
    return spec.n_expert == 0 && spec.row_bytes == 0 && spec.n_bytes < kSmallDense;
}

uint64_t Slabs::place_size(int id) const {
    const TensorSpec& spec = tensors_[id].spec;
    if (is_small_dense(spec)) {
        return spec.n_bytes;
    }
    // One page to reach the congruent address, and a whole page at either end that no other tensor touches.
    return spec.n_bytes + 3 * page_size();
}

std::byte* Slabs::place(int id, std::byte* region) {
    Tensor& tensor = tensors_[id];
    const TensorSpec& spec = tensor.spec;
    if (is_small_dense(spec)) {
        return region;
    }
    const auto start = static_cast<uintptr_t>(page_ceil(reinterpret_cast<uintptr_t>(region)));
    std::byte* data = reinterpret_cast<std::byte*>(start + spec.offset % page_size());
    if (spec.n_expert == 0 && spec.row_bytes == 0) {
        use_huge_pages(data, spec.n_bytes);  // all of it is read now, and used by each token
        return data;
    }
    tensor.data = data;
    const size_t whole = page_ceil(spec.offset % page_size() + spec.n_bytes);
    placed_bytes_ += spec.n_expert > 0 ? whole : 0;
    if (io_ != Io::mmap || spec.row_bytes > 0) {
        use_small_pages(reinterpret_cast<std::byte*>(start), whole);
    }
    return data;
}

Pages Slabs::all_pages(const Tensor& tensor, int expert) {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.data) + static_cast<uintptr_t>(expert) * tensor.slab_bytes;
    return {page_floor(begin), page_ceil(begin + tensor.slab_bytes)};
}

Pages Slabs::own_pages(const Tensor& tensor, int expert) {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.data) + static_cast<uintptr_t>(expert) * tensor.slab_bytes;
    return {page_ceil(begin), page_floor(begin + tensor.slab_bytes)};
}

uint64_t Slabs::file_offset(const Tensor& tensor, uintptr_t page) {
    return page_floor(tensor.spec.offset) + (page - page_floor(reinterpret_cast<uintptr_t>(tensor.data)));
}

}  // namespace edgemoe
