// The expert store: which experts are in memory, and how the others get there.
//
// The caller describes the model once (files, then tensors), gives every expert tensor its place in reserved address
// space, and from then on asks for experts by layer and number. A *slab* is one expert's share of one tensor; it is
// read, mapped and dropped as a whole. An *entry* is one (layer, expert) with up to four slabs (its *parts*: gate, up,
// down or gate_up). The *arena* is the memory that all slabs together may occupy.
//
// Contract
// - A place is congruent to the tensor's file offset modulo the page size, so file pages land on memory pages and no
//   byte is copied. Neighbouring slabs may share a boundary page: it is read with the first of them, never written
//   while one of them is resident (pread writes only its own slab's bytes), and goes back to the system with the last.
// - After `acquire` returns, the bytes of the asked slabs are in place and stay there until the next `acquire` or
//   `release`. It throws SystemError when they cannot be had; nothing half-read counts as resident afterwards.
// - The pages of all resident slabs never exceed the arena; `fits` says beforehand whether a request can be met.
// - One thread calls acquire/release at a time. `stats` may be read from any thread at any time.
// - Direct, mmap and pread give identical bytes; they differ in speed and in what the page cache sees.
// - The destructor joins all threads. The memory itself belongs to the buffer that placed the tensors.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "eviction.h"
#include "mapped_file.h"
#include "read_lanes.h"

namespace edgemoe {

constexpr int kMaxParts = 4;

struct TensorSpec {
    std::string name;
    int file = 0;         // index given by add_file
    uint64_t offset = 0;  // of the first byte in that file
    uint64_t n_bytes = 0;
    int layer = -1;    // -1: not an expert tensor
    int n_expert = 0;  // slabs in the tensor, equal in size; 0: not an expert tensor
};

struct StoreStats {
    uint64_t hits = 0;            // slabs asked for and already resident
    uint64_t misses = 0;          // slabs that had to be read
    uint64_t evictions = 0;       // slabs dropped for others
    uint64_t bytes_read = 0;      // expert bytes that arrived from disk (whole pages in direct and mmap mode)
    uint64_t dense_bytes = 0;     // bytes of the other tensors read so far
    uint64_t resident_bytes = 0;  // pages held by resident slabs
    uint64_t peak_bytes = 0;      // their maximum so far
    uint64_t read_ns = 0;         // wall time that acquire spent waiting for the disk
};

class ExpertStore {
   public:
    ExpertStore(Io io, int n_lanes, uint64_t arena_bytes);
    ~ExpertStore();

    // -------- describe the model, before anything is placed
    int add_file(const std::string& path);
    int add_tensor(TensorSpec spec);
    int n_tensors() const { return static_cast<int>(tensors_.size()); }
    const TensorSpec& tensor(int id) const { return tensors_[id].spec; }

    // Tests on the file's own bytes whether O_DIRECT transfers work; where they do not, `why` says what happened.
    static bool probe_direct(const std::string& path, uint64_t offset, std::string& why);

    // -------- place
    // `region` starts anywhere and has `place_size(id)` bytes; returns where the tensor's first byte is.
    uint64_t place_size(int id) const;
    std::byte* place(int id, std::byte* region);
    void read_dense(int id, std::byte* to);                             // blocking; for tensors that are not experts
    void watch(std::byte* base, uint64_t n) { guard_.watch(base, n); }  // the range that holds mapped places

    // -------- serve
    int n_parts(int layer) const;
    int n_expert(int layer) const;  // throws SystemError where there are none
    int part_of(int id) const { return tensors_[id].part; }
    // Every expert of the layer is resident and none will ever have to leave: the layer needs no `acquire` any more.
    bool settled(int layer) const {
        return all_fit_ && layers_[layer].resident_slabs == layers_[layer].n_expert * n_parts(layer);
    }
    bool fits(int layer, uint32_t parts, const std::vector<int32_t>& experts) const;
    void acquire(int layer, uint32_t parts, const std::vector<int32_t>& experts) { bring(layer, parts, experts, true); }
    void release();
    // Ahead of any use: all parts of these experts, as if they were used now. Not counted as hits or misses.
    void warm(int layer, const std::vector<int32_t>& experts);
    // These experts of the layer, and no others of it, leave after all that are not preferred.
    void prefer(int layer, const std::vector<int32_t>& experts);
    void count_hits(uint64_t slabs) { hits_ += slabs; }

    StoreStats stats() const;
    uint64_t arena_bytes() const { return arena_bytes_; }
    Io io() const { return io_; }
    int n_lanes() const { return lanes_.size(); }
    // In mmap mode, where resident experts are the file's own pages: throws if the file has changed or a page vanished.
    void check_mapping() const;

   private:
    struct Tensor {
        TensorSpec spec;
        int part = 0;
        uint64_t slab_bytes = 0;
        std::byte* data = nullptr;
    };
    struct Layer {
        int n_expert = 0;
        int32_t first_entry = 0;
        int32_t resident_slabs = 0;
        std::vector<int> tensors;  // by part
    };
    struct Entry {
        int32_t layer = 0;
        uint8_t resident = 0;  // bit per part
        uint8_t pinned = 0;
    };
    struct Pages {
        uintptr_t first, last;  // addresses, last exclusive
        uint64_t bytes() const { return last > first ? last - first : 0; }
    };

    Pages pages_of(const Tensor& tensor, int expert) const;
    Pages exclusive_pages(const Tensor& tensor, int expert) const;
    bool is_resident(const Tensor& tensor, int expert) const;
    void make_room(const Tensor& tensor, int expert);
    void drop(int32_t entry, uint32_t parts);
    void drop_pages(const Tensor& tensor, int expert);
    uint64_t file_offset(const Tensor& tensor, uintptr_t page) const;
    void bring(int layer, uint32_t parts, const std::vector<int32_t>& experts, bool counted);
    void check_request(int layer, uint32_t parts, const std::vector<int32_t>& experts) const;
    void check_files(const Layer& layer) const;
    void add(int32_t entry, int part);
    void plan_read(const Tensor& tensor, int expert, Pages missing);
    void number_entries();

    const Io io_;
    const uint64_t arena_bytes_;
    std::vector<std::unique_ptr<MappedFile>> files_;
    std::vector<Tensor> tensors_;
    std::vector<Layer> layers_;
    std::vector<Entry> entries_;
    std::vector<int32_t> pinned_;
    std::vector<ReadJob> jobs_;
    LeastRecentlyUsed order_;
    BusErrorGuard guard_;
    ReadLanes lanes_;

    std::atomic<uint64_t> hits_{0}, misses_{0}, evictions_{0}, bytes_read_{0}, dense_bytes_{0};
    std::atomic<uint64_t> resident_bytes_{0}, peak_bytes_{0}, read_ns_{0};
    uint64_t placed_bytes_ = 0;  // pages of all placed expert tensors
    bool all_fit_ = true;        // placed_bytes_ is within the arena
};

}  // namespace edgemoe
