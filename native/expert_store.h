// The expert store: which experts are in memory, and how the others get there.
//
// The caller describes the model once (files, then tensors), gives every expert tensor its place in reserved address
// space, and from then on asks for experts by layer and number. A *slab* is one expert's share of one tensor; it is
// read, mapped and dropped as a whole. An *entry* is one (layer, expert) with up to four slabs (its *parts*: gate, up,
// down or gate_up). The *arena* is the memory that all slabs together may occupy.
//
// Contract
// - A page that neighbouring slabs share goes back to the system with the last of them. Each read writes its own slab's
//   bytes and no other; in mmap mode such a page is mapped with the first.
// - `request` has the asked slabs read, `wait` returns once those of some parts are in place; they stay there until the
//   next `request` or `release`. `acquire` is both. They throw SystemError when the slabs cannot be had; nothing
//   half-read counts as resident afterwards.
// - `expect` has slabs read that are likely to be asked for next, after all that is asked for.
// - The pages of all resident slabs never exceed the arena; `fits` says beforehand whether a request can be met. Slots
//   may be lent more.
// - A slab is at its place or, after `use_slots`, where `slots_of` and `slot` say, until it leaves.
// - One thread calls all of these at a time, but for `await`. `stats` may be read from any thread at any time.
// - Direct, mmap and pread give identical bytes; they differ in speed and in what the page cache sees.
// - The destructor joins all threads. The memory itself belongs to the buffer that placed the tensors.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "eviction.h"
#include "mapped_file.h"
#include "page_queue.h"
#include "read_lanes.h"
#include "signals.h"
#include "slabs.h"
#include "slots.h"
#include "spare_pages.h"
#include "table_rows.h"

namespace edgemoe {

// Where the slots of one expert tensor are (Slots).
struct SlotView {
    std::byte* first;
    uint64_t stride;
    int32_t n_slots;
};

struct StoreStats {
    uint64_t hits = 0;            // slabs asked for that were in memory or on their way
    uint64_t misses = 0;          // slabs that had to be read
    uint64_t expected_hits = 0;   // those of the hits that are there because they were expected
    uint64_t evictions = 0;       // slabs dropped for others
    uint64_t bytes_read = 0;      // expert bytes that arrived from disk (whole pages in direct and mmap mode)
    uint64_t dense_bytes = 0;     // bytes of the other tensors read so far
    uint64_t arena_bytes = 0;     // what they may hold at most
    uint64_t resident_bytes = 0;  // pages held by resident slabs
    uint64_t peak_bytes = 0;      // their maximum so far
    uint64_t read_ns = 0;         // wall time spent waiting for the disk
    uint64_t busy_ns = 0;         // wall time in which at least one read was under way
    uint64_t expected_bytes = 0;  // read because they were expected
    uint64_t wasted_bytes = 0;    // those of them that left without ever having been used
    uint64_t retries = 0;         // reads that failed and were repeated
};

// What is done beyond reading on demand; with nothing of it, the store is the control of measurements.
struct Tuning {
    bool recycle = true;     // memory of slabs that leave is given to those that come (Slots, else SparePages)
    bool overlap = true;     // a layer computes while its later parts are still arriving
    bool look_ahead = true;  // experts are read before they are asked for: the next layer's, or the rest of this one's
    bool forecast = true;    // who leaves is whoever is least likely to be used soon, not least recently used
    uint64_t least_recycled = uint64_t{128} << 10;  // bytes of a slab: fewer are sooner cleared than moved
};

class ExpertStore {
   public:
    // Reads are of at most `read_bytes`, whole pages.
    ExpertStore(Io io, int n_lanes, uint64_t arena_bytes, Tuning tuning = {}, uint64_t read_bytes = uint64_t{1} << 20);
    ~ExpertStore();

    // -------- describe the model, before anything is placed
    int add_file(const std::string& path) { return slabs_.add_file(path); }
    int add_tensor(TensorSpec spec);
    int n_tensors() const { return static_cast<int>(slabs_.tensors().size()); }
    const TensorSpec& tensor(int id) const { return tensor_of(id).spec; }

    // Tests on the file's own bytes whether O_DIRECT transfers work; where they do not, `why` says what happened.
    static bool probe_direct(const std::string& path, uint64_t offset, std::string& why);

    // -------- place
    // `region` starts anywhere and has `place_size(id)` bytes; returns where the tensor's first byte is.
    uint64_t place_size(int id) const { return slabs_.place_size(id); }
    std::byte* place(int id, std::byte* region);
    void read_dense(int id, std::byte* to);                             // blocking; for tensors that are not experts
    void read_rows(int id, const std::vector<int32_t>& rows);           // blocking; of a table that is read by rows
    void watch(std::byte* base, uint64_t n) { guard_.watch(base, n); }  // the range that holds mapped places
    // Once all is placed, and before anything is asked for: where all experts fit, have huge pages for them; else have
    // them in slots instead of at their places, if they can be (Slots). Then the arena has `spared_bytes` more, those
    // of page tables that places would take, and `lent_bytes` between `borrow` and `repay`.
    void use_slots(uint64_t spared_bytes = 0, uint64_t lent_bytes = 0);
    bool in_slots() const { return slots_.laid_out(); }
    void borrow() { slots_.borrow(); }
    bool borrowing() const { return slots_.borrowing(); }
    void repay();  // waits for what is being read, and forgets the last request
    SlotView slots_of(int id) const;
    int32_t slot(int layer, int32_t expert) const;  // of one that was asked for; throws SystemError otherwise

    // -------- serve
    int n_parts(int layer) const {
        return layer >= 0 && layer <= last_layer() ? static_cast<int>(in(layer).tensors.size()) : 0;
    }
    int n_expert(int layer) const { return slabs_.n_expert(layer); }  // throws SystemError where there are none
    int number_of(int layer) const { return in(layer).number; }       // among those with experts, else -1
    void check_experts(int layer, const std::vector<int32_t>& experts) const;  // throws SystemError if it lacks one
    int last_layer() const { return static_cast<int>(slabs_.layers().size()) - 1; }  // of those with experts
    int layer_after(int layer) const;                                                // the next with experts, or -1
    int part_of(int id) const { return tensor_of(id).part; }
    bool all_fit() const { return all_fit_; }  // no expert will ever have to leave
    // Every expert of the layer has arrived and none will ever have to leave: the layer needs no `acquire` any more.
    bool settled(int layer) const;
    bool resident(int layer, int32_t expert) const {
        return entries_[in(layer).first_entry + expert].resident == (1U << n_parts(layer)) - 1;
    }
    // So many tokens pass the layer and chose these, each as often as it was chosen; before they are asked for.
    void routed(int layer, int64_t n_tokens, const std::vector<int32_t>& experts);
    bool fits(int layer, uint32_t parts, const std::vector<int32_t>& experts) const;
    void request(int layer, uint32_t parts, const std::vector<int32_t>& experts) { bring(layer, parts, experts, true); }
    void wait(uint32_t parts);  // of the last request
    void acquire(int layer, uint32_t parts, const std::vector<int32_t>& experts) {
        request(layer, parts, experts);
        wait(parts);
    }
    // Of one that was asked for, by the store's tensor and its expert: where the slab is, or will be.
    const std::byte* address(int id, int32_t expert) const;
    bool arriving(int id, int32_t expert) const { return lanes_.arriving(slab_of(entry_of(id, expert), part_of(id))); }
    // From any thread, between `request` and `wait`: until the slab has arrived. False: it could not be read, as `wait`
    // will say. With one lane alone, nobody would read meanwhile.
    bool await(int id, int32_t expert, bool counted);
    uint32_t arriving_parts() const;  // those of the last request that `wait` might have to wait for
    void release();
    void stop_reading() { lanes_.drain(); }  // nothing is written to any place when it returns
    // Likely to be asked for soon, likeliest first, instead of what was expected of this layer before. Only as many as
    // have room beside what is in use; those that are there stay until their layer is asked for. Layers that come
    // sooner are read first. A guess that was wrong is no use: it leaves as if it had never come, unless all fit.
    void expect(int layer, const std::vector<int32_t>& experts);
    // Ahead of any use: all parts of these experts. Not counted as hits or misses. Those that are preferred leave for
    // them only where nobody else is left, so that a set that fits is there as a whole once its layers are warm.
    void warm(int layer, const std::vector<int32_t>& experts);
    // These experts of the layer, and no others of it, are likely to be used: an active task's.
    void prefer(int layer, const std::vector<int32_t>& experts);
    // Experts that are wholly in memory, by layer: of each layer those first that are likeliest to be used.
    std::vector<std::vector<int32_t>> residents();
    void count_hits(uint64_t slabs) { hits_ += slabs; }

    StoreStats stats() const;
    uint64_t busy_ns() const { return lanes_.busy_ns(); }
    uint64_t arena_bytes() const { return slots_.laid_out() ? slots_.bytes() : arena_bytes_; }  // at most
    Io io() const { return io_; }
    const Tuning& tuning() const { return tuning_; }
    int n_lanes() const { return lanes_.size(); }
    // In mmap mode, where resident experts are the file's own pages: throws if the file has changed or a page vanished.
    void check_mapping() const;

   private:
    using Tensor = Slabs::Tensor;
    using Layer = Slabs::Layer;
    struct Entry {
        int32_t layer = 0;
        uint8_t resident = 0;  // bit per part, from when it is asked of the disk
        uint8_t pinned = 0;
        bool expected = false;  // its layer has not been asked for since
        bool unused = false;    // it came because it was expected, and has not been asked for yet
        bool preferred = false;
        int32_t slot = Slots::kNone;
    };
    const Layer& in(int layer) const { return slabs_.layers()[layer]; }
    const Tensor& tensor_of(int id) const { return slabs_.tensors()[id]; }
    Pages exclusive_pages(const Tensor& tensor, int expert) const;
    bool is_resident(const Tensor& tensor, int expert) const;
    bool make_room(const Tensor& tensor, int expert);  // after `order_->seek`
    bool lacks_room(const Tensor& tensor, int expert) const;
    uint32_t removable_parts(int32_t entry) const;
    bool secure(int32_t entry, int part);
    void settle_expectations(int layer, const std::vector<int32_t>& still = {});
    void seek_victims(int layer);
    void abandon_expectations();
    void take_back(int32_t entry);
    void drop_failed();
    [[noreturn]] void give_up(const std::string& failure);
    void drop(int32_t entry, uint32_t parts);
    void drop_pages(const Tensor& tensor, int expert);
    void shrink_spares();
    void bring(int layer, uint32_t parts, const std::vector<int32_t>& experts, bool counted);
    void check_request(int layer, uint32_t parts, const std::vector<int32_t>& experts) const;
    void add(int32_t entry, int part);
    void plan_read(const MappedFile& file, uint64_t offset, std::byte* to, uint64_t n, Io io, int32_t slab, int rank);
    static int32_t slab_of(int32_t entry, int part) { return entry * kMaxParts + part; }
    int32_t entry_of(int id, int32_t expert) const { return in(tensor_of(id).spec.layer).first_entry + expert; }
    void prepare_entries();

    const Io io_;
    const uint64_t arena_bytes_;
    const Tuning tuning_;
    const uint64_t read_bytes_;
    Slabs slabs_;
    Slots slots_;
    std::vector<Entry> entries_;
    std::vector<int32_t> resident_slabs_;  // by layer
    std::vector<int32_t> pinned_;
    std::vector<int32_t> expected_;
    std::vector<int32_t> unverified_;  // slabs added since the files were last seen to be unchanged
    std::vector<ReadJob> jobs_;
    std::unique_ptr<Eviction> order_;
    bool sparing_ = false;    // preferred ones are no victims
    int serving_ = 0;         // number of the layer that was asked for last
    int64_t n_requests_ = 0;  // that have been made
    int sought_layer_ = 0;    // victims are sought for layers of its kind
    SparePages spares_;
    PageQueue idle_;                   // between two slabs that left: giving one back interrupts all who compute
    std::map<int, TableRows> tables_;  // by tensor
    BusErrorGuard guard_;
    ReadLanes lanes_;

    std::atomic<uint64_t> hits_{0}, misses_{0}, expected_hits_{0}, evictions_{0}, dense_bytes_{0};
    std::atomic<uint64_t> resident_bytes_{0}, peak_bytes_{0}, read_ns_{0}, expected_bytes_{0}, wasted_bytes_{0};
    bool all_fit_ = true;  // all pages of all experts are within the arena
};

}  // namespace edgemoe
