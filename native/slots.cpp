#include "slots.h"

#include <algorithm>
#include <numeric>

namespace edgemoe {

namespace {

constexpr uint64_t kMostBeyond = 8;  // their shares: one part in so many of the arena

}  // namespace

Slots::~Slots() { clear(); }

void Slots::clear() {
    for (const Kind& kind : kinds_) {
        for (const Part& part : kind.parts) {
            if (part.memory != nullptr) {
                release_memory(part.memory, part.stride * kind.n_slots + huge_page_size());
            }
        }
    }
    kinds_.clear();
    kind_of_.clear();
}

void Slots::lay_out(const Slabs& slabs, uint64_t arena_bytes, uint64_t lent_bytes) {
    const bool whole_pages = find_kinds(slabs);
    const std::vector<uint64_t> n_own = whole_pages ? divide(arena_bytes) : std::vector<uint64_t>{};
    if (n_own.empty()) {
        clear();
        return;
    }
    std::vector<uint64_t> n_slots = divide(arena_bytes + lent_bytes);
    n_slots.resize(n_own.size());
    for (size_t i = 0; i < kinds_.size(); ++i) {
        Kind& kind = kinds_[i];
        kind.n_own = n_own[i];
        kind.n_slots = std::max(n_own[i], n_slots[i]);
        for (Part& part : kind.parts) {
            const uint64_t n = part.stride * kind.n_slots, own = part.stride * kind.n_own;
            part.memory = reserve_memory(n + huge_page_size());
            part.first = next_huge_page(part.memory);
            // None reaches beyond the last slot, or from the own ones to those that are borrowed, whatever the system
            // does where it is not asked.
            use_small_pages(part.memory, n + huge_page_size());
            use_huge_pages(part.first, own);
            use_huge_pages(part.first + own, n - own);
        }
        kind.free.resize(kind.n_own);
        std::iota(kind.free.rbegin(), kind.free.rend(), 0);  // the first is taken first
    }
}

void Slots::borrow() {
    if (borrowing_ || !laid_out()) {
        return;
    }
    for (Kind& kind : kinds_) {
        for (uint64_t slot = kind.n_slots; slot > kind.n_own; --slot) {
            kind.free.push_back(static_cast<int32_t>(slot - 1));
        }
    }
    borrowing_ = true;
}

void Slots::repay() {
    for (Kind& kind : kinds_) {
        const auto own = [&](int32_t slot) { return slot < static_cast<int32_t>(kind.n_own); };
        kind.free.erase(std::stable_partition(kind.free.begin(), kind.free.end(), own), kind.free.end());
        for (const Part& part : kind.parts) {
            discard(part.first + part.stride * kind.n_own, part.stride * (kind.n_slots - kind.n_own));
        }
    }
    borrowing_ = false;
}

uint64_t Slots::bytes() const {
    return std::accumulate(kinds_.begin(), kinds_.end(), uint64_t{0},
                           [](uint64_t sum, const Kind& kind) { return sum + kind.slot_bytes() * kind.n_slots; });
}

// False: a slab is not whole pages.
bool Slots::find_kinds(const Slabs& slabs) {
    for (const Slabs::Layer& layer : slabs.layers()) {
        kind_of_.push_back(kNone);
        std::vector<Part> parts;
        for (const int id : layer.tensors) {
            const Slabs::Tensor& tensor = slabs.tensors()[id];
            if (tensor.data == nullptr) {
                parts.clear();
                break;
            }
            if (tensor.slab_bytes % page_size() != 0) {
                return false;
            }
            const bool on_page = tensor.spec.offset % page_size() == 0;
            parts.push_back({tensor.slab_bytes, tensor.slab_bytes + (on_page ? 0 : page_size())});
        }
        if (parts.empty()) {
            continue;
        }
        const auto same = [](const Part& a, const Part& b) { return a.slab_bytes == b.slab_bytes; };
        auto kind = std::find_if(kinds_.begin(), kinds_.end(), [&](const Kind& of) {
            return std::equal(of.parts.begin(), of.parts.end(), parts.begin(), parts.end(), same);
        });
        if (kind == kinds_.end()) {
            kind = kinds_.insert(kinds_.end(), Kind{});
            kind->parts = parts;
        }
        for (size_t part = 0; part < parts.size(); ++part) {
            kind->parts[part].stride = std::max(kind->parts[part].stride, parts[part].stride);
        }
        kind->n_expert = std::max(kind->n_expert, static_cast<uint64_t>(layer.n_expert));
        kind->n_slabs += static_cast<uint64_t>(layer.n_expert);
        kind_of_.back() = static_cast<int>(kind - kinds_.begin());
    }
    return !kinds_.empty();
}

// How many slots of each kind. Every kind has room for a whole layer, since a batch may choose all of it; those that
// get more than that share the rest. Empty: what such small kinds need beyond their share is missed elsewhere.
std::vector<uint64_t> Slots::divide(uint64_t arena_bytes) const {
    uint64_t all = 0, left = arena_bytes, others = 0, beyond = 0;
    for (const Kind& kind : kinds_) {
        all += kind.slot_bytes() * kind.n_slabs;
    }
    std::vector<uint64_t> n_slots;
    for (const Kind& kind : kinds_) {
        const uint64_t share = arena_bytes * kind.n_slabs / all;
        if (share >= kind.n_expert) {
            others += kind.slot_bytes() * kind.n_slabs;
            n_slots.push_back(0);
            continue;
        }
        n_slots.push_back(kind.n_expert);
        beyond += (kind.n_expert - share) * kind.slot_bytes();
        left -= std::min(left, kind.n_expert * kind.slot_bytes());
    }
    for (size_t i = 0; i < kinds_.size(); ++i) {
        const Kind& kind = kinds_[i];
        if (n_slots[i] == 0) {
            n_slots[i] = std::min(kind.n_slabs, left * kind.n_slabs / others);
        }
        if (n_slots[i] < kind.n_expert) {
            return {};
        }
    }
    return beyond <= arena_bytes / kMostBeyond ? n_slots : std::vector<uint64_t>{};
}

uint64_t Slots::Kind::slot_bytes() const {
    return std::accumulate(parts.begin(), parts.end(), uint64_t{0},
                           [](uint64_t sum, const Part& part) { return sum + part.stride; });
}

int32_t Slots::take(int layer) {
    std::vector<int32_t>& free = kinds_[kind_of_[layer]].free;
    const int32_t slot = free.back();
    free.pop_back();
    return slot;
}

std::byte* Slots::address(const Slabs::Tensor& tensor, int32_t slot) const {
    const Part& part = part_of(tensor);
    return part.first + static_cast<uint64_t>(slot) * part.stride + tensor.spec.offset % page_size();
}

}  // namespace edgemoe
