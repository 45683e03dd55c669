#include "expert_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "forecast.h"

namespace edgemoe {

namespace {

constexpr uint64_t kIdleShare = 64;  // of the arena at most: what they save is little beside what slabs there save
constexpr double kFirstLayer = 4;    // look-ahead hides three quarters of what other layers' misses take

}  // namespace

ExpertStore::ExpertStore(Io io, int n_lanes, uint64_t arena_bytes, Tuning tuning, uint64_t read_bytes)
    : io_(io),
      arena_bytes_(arena_bytes),
      tuning_(tuning),
      read_bytes_(page_ceil(read_bytes)),
      slabs_(io),
      lanes_(n_lanes) {
    if (tuning.forecast) {
        order_ = std::make_unique<Forecast>(tuning.look_ahead && n_lanes > 1 ? kFirstLayer : 1.0);
    } else {
        order_ = std::make_unique<LeastRecentlyUsed>();
    }
}

ExpertStore::~ExpertStore() = default;

int ExpertStore::add_tensor(TensorSpec spec) {
    const bool is_expert = spec.n_expert > 0;
    const int id = slabs_.add_tensor(std::move(spec));
    if (is_expert) {
        prepare_entries();
    }
    return id;
}

void ExpertStore::prepare_entries() {
    entries_.clear();
    std::vector<int> n_expert;
    for (size_t layer = 0; layer < slabs_.layers().size(); ++layer) {
        const int n = slabs_.layers()[layer].n_expert;
        Entry entry;
        entry.layer = static_cast<int32_t>(layer);
        entries_.insert(entries_.end(), n, entry);
        if (n > 0) {
            n_expert.push_back(n);
        }
    }
    resident_slabs_.assign(slabs_.layers().size(), 0);
    order_->resize(n_expert);
    lanes_.resize(static_cast<int32_t>(entries_.size()) * kMaxParts);
}

bool ExpertStore::probe_direct(const std::string& path, uint64_t offset, std::string& why) {
    MappedFile file(path);
    if (!file.open_direct(why)) {
        return false;
    }
    const size_t n = page_size();
    const uint64_t start = page_floor(offset);
    const size_t needed = static_cast<size_t>(std::min<uint64_t>(n, file.size() - start));
    std::byte* direct = reserve_memory(4 * n);
    bool same = false;
    try {
        file.read_direct(start, direct, needed, direct + 2 * n);
        file.read(start, direct + n, needed);
        file.forget(start, n);
        same = std::memcmp(direct, direct + n, needed) == 0;
        why = same ? "" : "O_DIRECT gives other bytes than a buffered read";
    } catch (const SystemError& error) {
        why = std::string("O_DIRECT opens but does not transfer: ") + error.what();
    }
    release_memory(direct, 4 * n);
    return same;
}

// ---------------------------------------------------------------- place

std::byte* ExpertStore::place(int id, std::byte* region) {
    std::byte* data = slabs_.place(id, region);
    const TensorSpec& spec = tensor(id);
    if (spec.row_bytes > 0 && !tables_.try_emplace(id, data, spec.n_bytes, spec.row_bytes, spec.most_bytes).second) {
        throw SystemError(spec.name + " is read by rows, but llama.cpp has two tensors of that name");
    }
    all_fit_ = slabs_.placed_bytes() <= arena_bytes_;
    return data;
}

void ExpertStore::use_slots(uint64_t spared_bytes, uint64_t lent_bytes) {
    if (io_ == Io::mmap || resident_bytes_ > 0 || slots_.laid_out()) {
        return;
    }
    if (all_fit_) {
        for (const Tensor& tensor : slabs_.tensors()) {
            if (tensor.data != nullptr && tensor.spec.n_expert > 0) {
                use_huge_pages(tensor.data, tensor.spec.n_bytes);
            }
        }
    } else if (tuning_.recycle) {
        slots_.lay_out(slabs_, arena_bytes_ + spared_bytes, lent_bytes);
    }
}

void ExpertStore::repay() {
    if (!slots_.borrowing()) {
        return;
    }
    release();
    abandon_expectations();
    drop_failed();
    for (size_t entry = 0; entry < entries_.size(); ++entry) {
        const Entry& of = entries_[entry];
        if (of.slot != Slots::kNone && slots_.is_borrowed(of.layer, of.slot)) {
            evictions_ += static_cast<uint64_t>(__builtin_popcount(of.resident));
            drop(static_cast<int32_t>(entry), of.resident);
        }
    }
    slots_.repay();
}

SlotView ExpertStore::slots_of(int id) const {
    const Tensor& tensor = tensor_of(id);
    return {slots_.address(tensor, 0), slots_.stride(tensor), slots_.n_slots(tensor.spec.layer)};
}

int32_t ExpertStore::slot(int layer, int32_t expert) const {
    const bool known = expert >= 0 && expert < n_expert(layer);
    const int32_t slot = known ? entries_[in(layer).first_entry + expert].slot : Slots::kNone;
    if (slot == Slots::kNone) {
        throw SystemError("layer " + std::to_string(layer) + " uses expert " + std::to_string(expert) +
                          " that was not asked for; this architecture needs a newer edgemoe");
    }
    return slot;
}

const std::byte* ExpertStore::address(int id, int32_t expert) const {
    const Tensor& tensor = tensor_of(id);
    return slots_.laid_out() ? slots_.address(tensor, slot(tensor.spec.layer, expert))
                             : tensor.data + static_cast<uint64_t>(expert) * tensor.slab_bytes;
}

void ExpertStore::read_dense(int id, std::byte* to) {
    const TensorSpec& spec = tensor(id);
    const MappedFile& file = slabs_.file_of(tensor_of(id));
    file.check_unchanged();
    jobs_.clear();
    plan_read(file, spec.offset, to, spec.n_bytes,
              io_ == Io::direct && !Slabs::is_small_dense(spec) ? Io::direct : Io::pread, 0, 0);
    lanes_.run(jobs_);
    file.check_unchanged();
    dense_bytes_ += spec.n_bytes;
}

void ExpertStore::read_rows(int id, const std::vector<int32_t>& rows) {
    TableRows& table = tables_.at(id);
    const std::vector<Pages> missing = table.take(rows);
    if (missing.empty()) {
        return;
    }
    const TensorSpec& spec = tensor(id);
    const MappedFile& file = slabs_.file_of(tensor_of(id));
    jobs_.clear();
    uint64_t n_bytes = 0;
    for (const Pages& stretch : missing) {
        plan_read(file, spec.offset + table.offset_of(stretch), stretch.begin(), stretch.bytes(),
                  io_ == Io::direct ? Io::direct : Io::pread, 0, 0);
        n_bytes += stretch.bytes();
    }
    try {
        const uint64_t started = now_ns();
        lanes_.run(jobs_);
        read_ns_ += now_ns() - started;
        file.check_unchanged();
    } catch (const SystemError&) {
        table.drop(missing);
        throw;
    }
    dense_bytes_ += n_bytes;
}

// ---------------------------------------------------------------- pages

bool ExpertStore::is_resident(const Tensor& tensor, int expert) const {
    const int32_t entry = in(tensor.spec.layer).first_entry + expert;
    return (entries_[entry].resident >> tensor.part & 1) != 0;
}

// What memory a slab takes or gives back: the pages that no other resident slab needs.
Pages ExpertStore::exclusive_pages(const Tensor& tensor, int expert) const {
    return Slabs::pages_without(tensor, expert, [&](int other) { return is_resident(tensor, other); });
}

// ---------------------------------------------------------------- come and go

// Counts a slab as resident and plans its reading. It relies on no neighbour for the pages that they share: those may
// be taken back, or fail.
void ExpertStore::add(int32_t entry, int part) {
    const Layer& its = in(entries_[entry].layer);
    const Tensor& tensor = tensor_of(its.tensors[part]);
    const int expert = entry - its.first_entry;
    const int32_t slab = slab_of(entry, part);
    const uint64_t at = static_cast<uint64_t>(expert) * tensor.slab_bytes;
    entries_[entry].resident |= static_cast<uint8_t>(1U << part);
    ++resident_slabs_[entries_[entry].layer];
    unverified_.push_back(slab);
    lanes_.forget(slab);
    const MappedFile& file = slabs_.file_of(tensor);
    if (slots_.laid_out()) {
        int32_t& slot = entries_[entry].slot;
        slot = slot != Slots::kNone ? slot : slots_.take(entries_[entry].layer);
        resident_bytes_ += slots_.stride(tensor);
        plan_read(file, tensor.spec.offset + at, slots_.address(tensor, slot), tensor.slab_bytes, io_, slab, part);
        return;
    }
    const Pages missing = exclusive_pages(tensor, expert);
    resident_bytes_ += missing.bytes();
    const Pages own = Slabs::own_pages(tensor, expert);
    Slabs::each_shared(missing, own, [this](std::byte* page) { idle_.take(page); });
    if (own.bytes() > 0) {
        spares_.take(own.begin(), own.bytes());
    }
    if (io_ != Io::mmap) {
        plan_read(file, tensor.spec.offset + at, tensor.data + at, tensor.slab_bytes, io_, slab, part);
    } else if (missing.bytes() > 0) {
        // Resident slabs only: around a fault the kernel maps whatever else of the mapping is in its page cache.
        const uint64_t offset = Slabs::file_offset(tensor, missing.first);
        file.map_over(missing.begin(), offset, missing.bytes());
        plan_read(file, offset, missing.begin(), missing.bytes(), io_, slab, part);
    }
}

void ExpertStore::plan_read(const MappedFile& file, uint64_t offset, std::byte* to, uint64_t n, Io io, int32_t slab,
                            int rank) {
    for (uint64_t done = 0; done < n;) {
        // Whole pages but for both ends, lest one be read twice.
        const uint64_t piece = std::min(n - done, page_floor(offset + done) + read_bytes_ - (offset + done));
        jobs_.push_back({&file, offset + done, to + done, piece, io, slab, rank});
        done += piece;
    }
}

bool ExpertStore::lacks_room(const Tensor& tensor, int expert) const {
    if (slots_.laid_out()) {
        const int32_t slot = entries_[in(tensor.spec.layer).first_entry + expert].slot;
        return slot == Slots::kNone && !slots_.has_room(tensor.spec.layer);
    }
    return resident_bytes_ + idle_.bytes() + exclusive_pages(tensor, expert).bytes() > arena_bytes_;
}

// False: nothing that may leave is left.
bool ExpertStore::make_room(const Tensor& tensor, int expert) {
    // Asked again after each eviction: dropping a neighbour can leave a shared page to this slab.
    while (lacks_room(tensor, expert)) {
        const int32_t victim = order_->next_victim();
        if (victim == Eviction::kNone) {
            if (idle_.bytes() > 0) {
                idle_.shrink(0);
                continue;
            }
            if (!std::exchange(sparing_, false)) {
                return false;
            }
            order_->seek(serving_);
            continue;
        }
        const uint32_t parts = removable_parts(victim);
        const bool of_use = !slots_.laid_out() || (slots_.same_kind(entries_[victim].layer, tensor.spec.layer) &&
                                                   parts == entries_[victim].resident);
        if (parts != 0 && of_use) {
            evictions_ += static_cast<uint64_t>(__builtin_popcount(parts));
            drop(victim, parts);
        }
    }
    return true;
}

// What is being read cannot leave.
uint32_t ExpertStore::removable_parts(int32_t entry) const {
    const Entry& of = entries_[entry];
    uint32_t parts = of.expected || (sparing_ && of.preferred) ? 0 : of.resident & static_cast<uint32_t>(~of.pinned);
    for (int part = 0; part < kMaxParts; ++part) {
        if ((parts >> part & 1) != 0 && lanes_.arriving(slab_of(entry, part))) {
            parts &= ~(1U << part);
        }
    }
    return parts;
}

void ExpertStore::drop(int32_t entry, uint32_t parts) {
    parts &= entries_[entry].resident;
    const Layer& its = in(entries_[entry].layer);
    const int expert = entry - its.first_entry;
    for (size_t part = 0; part < its.tensors.size(); ++part) {
        if ((parts >> part & 1) != 0) {
            const Tensor& tensor = tensor_of(its.tensors[part]);
            entries_[entry].resident &= static_cast<uint8_t>(~(1U << part));
            --resident_slabs_[entries_[entry].layer];
            wasted_bytes_ += entries_[entry].unused ? tensor.slab_bytes : 0;
            drop_pages(tensor, expert);
        }
    }
    if (entries_[entry].resident == 0 && entries_[entry].slot != Slots::kNone) {
        slots_.give(entries_[entry].layer, std::exchange(entries_[entry].slot, Slots::kNone));
    }
    // A pinned entry is about to get other parts: it has to stay a victim for later.
    if (entries_[entry].resident == 0 && entries_[entry].pinned == 0) {
        order_->remove(entry);
        entries_[entry].unused = false;
    }
}

void ExpertStore::drop_pages(const Tensor& tensor, int expert) {
    if (slots_.laid_out()) {
        resident_bytes_ -= slots_.stride(tensor);
        return;
    }
    const Pages pages = exclusive_pages(tensor, expert);
    if (pages.bytes() == 0) {
        return;
    }
    resident_bytes_ -= pages.bytes();
    std::byte* base = pages.begin();
    if (io_ == Io::mmap) {
        const MappedFile& file = slabs_.file_of(tensor);
        reserve_over(base, pages.bytes());
        file.forget(Slabs::file_offset(tensor, pages.first), pages.bytes());
        return;
    }
    const Pages own = Slabs::own_pages(tensor, expert);
    // Where all fit they lie in huge pages, which moving would cut up, and hardly ever leave.
    if (!tuning_.recycle || all_fit_ || own.bytes() < std::max<uint64_t>(tuning_.least_recycled, 1)) {
        discard(base, pages.bytes());
        return;
    }
    Slabs::each_shared(pages, own, [this](std::byte* page) { idle_.give(page); });
    idle_.shrink(arena_bytes_ / kIdleShare);
    spares_.give(own.begin(), own.bytes());
}

// What left the arena may be spare only as far as it is within it. Where experts are in slots there is none.
void ExpertStore::shrink_spares() {
    const uint64_t held = resident_bytes_ + idle_.bytes();
    spares_.shrink(arena_bytes_ - std::min(arena_bytes_, held));
}

bool ExpertStore::settled(int layer) const {
    return all_fit_ && resident_slabs_[layer] == in(layer).n_expert * n_parts(layer) &&
           std::none_of(unverified_.begin(), unverified_.end(),
                        [&](int32_t slab) { return entries_[slab / kMaxParts].layer == layer; });
}

void ExpertStore::check_mapping() const {
    if (io_ != Io::mmap) {
        return;
    }
    slabs_.check_files();
    if (guard_.faulted()) {
        throw SystemError("the model file became shorter while it was mapped; its experts can no longer be trusted");
    }
}

std::vector<std::vector<int32_t>> ExpertStore::residents() {
    std::vector<std::vector<int32_t>> found(slabs_.layers().size());
    order_->seek(serving_);
    for (int32_t entry = order_->next_victim(); entry != Eviction::kNone; entry = order_->next_victim()) {
        const int32_t layer = entries_[entry].layer;
        const int32_t expert = entry - in(layer).first_entry;
        if (resident(layer, expert)) {
            found[layer].push_back(expert);
        }
    }
    for (std::vector<int32_t>& experts : found) {
        std::reverse(experts.begin(), experts.end());  // victims come first
    }
    return found;
}

StoreStats ExpertStore::stats() const {
    StoreStats stats;
    stats.hits = hits_;
    stats.misses = misses_;
    stats.expected_hits = expected_hits_;
    stats.evictions = evictions_;
    stats.bytes_read = lanes_.bytes_read();
    stats.dense_bytes = dense_bytes_;
    stats.arena_bytes = arena_bytes();
    stats.resident_bytes = resident_bytes_;
    stats.peak_bytes = peak_bytes_;
    stats.read_ns = read_ns_;
    stats.busy_ns = lanes_.busy_ns();
    stats.expected_bytes = expected_bytes_;
    stats.wasted_bytes = wasted_bytes_;
    stats.retries = lanes_.n_retries();
    return stats;
}

}  // namespace edgemoe
