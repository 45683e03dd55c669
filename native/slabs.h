// Where experts are: the model's files, its tensors, their places in memory, and the pages of every slab.
//
// A *slab* is one expert's share of one tensor. A place is congruent to the tensor's file offset modulo the page size,
// so that file pages land on memory pages and no byte is copied; neighbouring slabs may share a boundary page. What is
// in memory is the store's business.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "mapped_file.h"
#include "read_lanes.h"

namespace edgemoe {

constexpr int kMaxParts = 4;

struct TensorSpec {
    std::string name;
    int file = 0;         // index given by add_file
    uint64_t offset = 0;  // of the first byte in that file
    uint64_t n_bytes = 0;
    int layer = -1;           // -1: not an expert tensor
    int n_expert = 0;         // slabs in the tensor, equal in size; 0: not an expert tensor
    uint64_t row_bytes = 0;   // of a table that is read by rows; 0: it is read as a whole, or by experts
    uint64_t most_bytes = 0;  // pages of such a table that may be in memory at a time
};

struct Pages {
    uintptr_t first, last;  // addresses, last exclusive
    uint64_t bytes() const { return last > first ? last - first : 0; }
    std::byte* begin() const { return reinterpret_cast<std::byte*>(first); }
};

class Slabs {
   public:
    struct Tensor {
        TensorSpec spec;
        int part = 0;  // of its layer's expert tensors
        uint64_t slab_bytes = 0;
        std::byte* data = nullptr;  // its place, once it has one
    };
    struct Layer {
        int n_expert = 0;
        int number = -1;           // among those with experts
        int32_t first_entry = 0;   // entries, one per layer and expert, are numbered layer by layer
        std::vector<int> tensors;  // by part
    };

    explicit Slabs(Io io) : io_(io) {}

    int add_file(const std::string& path);
    int add_tensor(TensorSpec spec);
    const std::vector<Tensor>& tensors() const { return tensors_; }
    const std::vector<Layer>& layers() const { return layers_; }
    const MappedFile& file_of(const Tensor& tensor) const { return *files_[tensor.spec.file]; }
    void check_files() const;  // throws SystemError if one of them has changed
    // The layer's experts; throws SystemError where there are none.
    int n_expert(int layer) const;

    // A tensor too small for pages of its own is read through the page cache.
    static bool is_small_dense(const TensorSpec& spec);
    uint64_t place_size(int id) const;
    // `region` starts anywhere and has `place_size(id)` bytes; returns where the tensor's first byte is.
    std::byte* place(int id, std::byte* region);
    uint64_t placed_bytes() const { return placed_bytes_; }  // pages of all placed expert tensors

    static Pages all_pages(const Tensor& tensor, int expert);  // that hold a byte of the slab
    static Pages own_pages(const Tensor& tensor, int expert);  // that lie wholly within it
    // The pages of a slab that none of the others that `hold` needs. Slabs may be smaller than a page, so several
    // neighbours on either side can reach into the first and the last one.
    template <typename Holds>
    static Pages pages_without(const Tensor& tensor, int expert, const Holds& hold);
    // Those of a slab's pages that are not wholly its own, one by one.
    template <typename Do>
    static void each_shared(Pages pages, Pages own, const Do& act);
    static uint64_t file_offset(const Tensor& tensor, uintptr_t page);

   private:
    void number_entries();

    const Io io_;
    std::vector<std::unique_ptr<MappedFile>> files_;
    std::vector<Tensor> tensors_;
    std::vector<Layer> layers_;
    uint64_t placed_bytes_ = 0;
};

template <typename Holds>
Pages Slabs::pages_without(const Tensor& tensor, int expert, const Holds& hold) {
    Pages own = all_pages(tensor, expert);
    for (int before = expert - 1; before >= 0; --before) {
        const Pages other = all_pages(tensor, before);
        if (other.last <= own.first) {
            break;
        }
        if (hold(before)) {
            own.first = other.last;
            break;
        }
    }
    for (int after = expert + 1; after < tensor.spec.n_expert; ++after) {
        const Pages other = all_pages(tensor, after);
        if (other.first >= own.last) {
            break;
        }
        if (hold(after)) {
            own.last = other.first;
            break;
        }
    }
    return own;
}

template <typename Do>
void Slabs::each_shared(Pages pages, Pages own, const Do& act) {
    for (uintptr_t page = pages.first; page < pages.last; page += page_size()) {
        if (page == own.first && own.bytes() > 0) {
            page = own.last;
        }
        if (page < pages.last) {
            act(reinterpret_cast<std::byte*>(page));
        }
    }
}

}  // namespace edgemoe
