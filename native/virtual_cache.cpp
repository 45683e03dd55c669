#include "virtual_cache.h"

#include <utility>

namespace edgemoe {

void VirtualCache::resize(std::vector<int> n_expert, std::vector<uint64_t> expert_bytes, uint64_t capacity) {
    n_expert_ = std::move(n_expert);
    expert_bytes_ = std::move(expert_bytes);
    capacity_ = capacity;
    first_.clear();
    layer_of_.clear();
    for (size_t layer = 0; layer < n_expert_.size(); ++layer) {
        first_.push_back(static_cast<int32_t>(layer_of_.size()));
        layer_of_.insert(layer_of_.end(), static_cast<size_t>(n_expert_[layer]), static_cast<int32_t>(layer));
    }
    clear();
}

void VirtualCache::clear() {
    order_.resize(n_expert_);
    held_.assign(layer_of_.size(), 0);
    wanted_.assign(layer_of_.size(), 0);
    used_ = 0;
}

void VirtualCache::use(int layer, const std::vector<int32_t>& experts) {
    for (const int32_t expert : experts) {
        const int32_t entry = first_[layer] + expert;
        wanted_[entry] = 1;
        order_.touch(entry);
    }
    order_.seek(layer);
    for (const int32_t expert : experts) {
        const int32_t entry = first_[layer] + expert;
        if (held_[entry] != 0) {
            continue;
        }
        if (make_room(expert_bytes_[layer])) {
            held_[entry] = 1;
            used_ += expert_bytes_[layer];
        } else {
            order_.remove(entry);
        }
    }
    for (const int32_t expert : experts) {
        wanted_[first_[layer] + expert] = 0;
    }
}

bool VirtualCache::make_room(uint64_t n_bytes) {
    while (used_ + n_bytes > capacity_) {
        const int32_t victim = order_.next_victim();
        if (victim == Eviction::kNone) {
            return false;
        }
        if (wanted_[victim] == 0) {
            order_.remove(victim);
            held_[victim] = 0;
            used_ -= expert_bytes_[layer_of_[victim]];
        }
    }
    return true;
}

}  // namespace edgemoe
