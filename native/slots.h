// Fixed places that experts take in turns where not all of them fit: whoever comes is read to where somebody has left.
//
// No page is moved, given back or cleared while experts come and go, so that they can lie in huge pages: the disk
// writes to contiguous memory, and nobody who computes is interrupted. Experts are then not where their tensor is;
// MUL_MAT_ID is told by other numbers (StandIns).
//
// Layers whose experts have parts of the same sizes are of one *kind*. A kind has so many *slots*, each with room for
// all parts of one expert, and a stretch of memory for each part, which holds that part of every slot. The last ones
// may be *borrowed*: they are used, and have memory, only between `borrow` and `repay`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "slabs.h"

namespace edgemoe {

class Slots {
   public:
    static constexpr int32_t kNone = -1;

    Slots() = default;
    ~Slots();
    Slots(const Slots&) = delete;
    Slots& operator=(const Slots&) = delete;

    // Divides the arena among the kinds as the bytes of their experts are. Nothing is laid out where slabs are not
    // whole pages (each would need another address modulo the page size), or where kinds of few layers, which need room
    // for one of them as a whole, would take much from the others.
    void lay_out(const Slabs& slabs, uint64_t arena_bytes, uint64_t lent_bytes = 0);
    bool laid_out() const { return !kinds_.empty(); }
    uint64_t bytes() const;  // of all slots

    bool same_kind(int layer, int other) const { return kind_of_[layer] == kind_of_[other]; }
    bool has_room(int layer) const { return !in(layer).free.empty(); }
    int32_t take(int layer);
    void give(int layer, int32_t slot) { kinds_[kind_of_[layer]].free.push_back(slot); }

    void borrow();
    void repay();  // nobody is in the borrowed slots any more
    bool borrowing() const { return borrowing_; }
    bool is_borrowed(int layer, int32_t slot) const { return slot >= static_cast<int32_t>(in(layer).n_own); }

    int32_t n_slots(int layer) const {  // that may be used now
        return static_cast<int32_t>(borrowing_ ? in(layer).n_slots : in(layer).n_own);
    }
    uint64_t stride(const Slabs::Tensor& tensor) const { return part_of(tensor).stride; }  // from slot to slot
    // A slab's first byte, congruent with its file offset modulo the page size.
    std::byte* address(const Slabs::Tensor& tensor, int32_t slot) const;

   private:
    struct Part {
        uint64_t slab_bytes;
        uint64_t stride;
        std::byte* memory = nullptr;
        std::byte* first = nullptr;  // slot's
    };
    struct Kind {
        std::vector<Part> parts;
        uint64_t n_expert = 0;  // of the layer that has the most
        uint64_t n_slabs = 0;   // of one part, in all layers
        uint64_t n_own = 0, n_slots = 0;
        std::vector<int32_t> free;

        uint64_t slot_bytes() const;
    };
    const Kind& in(int layer) const { return kinds_[kind_of_[layer]]; }
    const Part& part_of(const Slabs::Tensor& tensor) const { return in(tensor.spec.layer).parts[tensor.part]; }
    bool find_kinds(const Slabs& slabs);
    std::vector<uint64_t> divide(uint64_t arena_bytes) const;
    void clear();

    std::vector<Kind> kinds_;
    bool borrowing_ = false;
    std::vector<int> kind_of_;  // by layer; kNone: without experts, or llama.cpp left them out
};

}  // namespace edgemoe
