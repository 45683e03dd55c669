#include "expert_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "forecast.h"

namespace edgemoe {

ExpertStore::ExpertStore(Io io, int n_lanes, uint64_t arena_bytes, Tuning tuning, uint64_t read_bytes)
    : io_(io),
      arena_bytes_(arena_bytes),
      tuning_(tuning),
      read_bytes_(page_ceil(read_bytes)),
      slabs_(io),
      lanes_(n_lanes) {
    if (tuning.forecast) {
        order_ = std::make_unique<Forecast>();
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
    std::byte* direct = reserve_memory(2 * n);
    bool same = false;
    try {
        file.read_direct(start, direct, n, needed);
        file.read(start, direct + n, needed);
        file.forget(start, n);
        same = std::memcmp(direct, direct + n, needed) == 0;
        why = same ? "" : "O_DIRECT gives other bytes than a buffered read";
    } catch (const SystemError& error) {
        why = std::string("O_DIRECT opens but does not transfer: ") + error.what();
    }
    release_memory(direct, 2 * n);
    return same;
}

// ---------------------------------------------------------------- place

std::byte* ExpertStore::place(int id, std::byte* region) {
    std::byte* data = slabs_.place(id, region);
    all_fit_ = slabs_.placed_bytes() <= arena_bytes_;
    return data;
}

void ExpertStore::read_dense(int id, std::byte* to) {
    const TensorSpec& spec = tensor(id);
    const MappedFile& file = slabs_.file_of(slabs_.tensors()[id]);
    file.check_unchanged();
    jobs_.clear();
    const bool direct = io_ == Io::direct && !Slabs::is_small_dense(spec);
    const uint64_t slack = direct ? spec.offset % page_size() : 0;
    const uint64_t start = spec.offset - slack;
    const uint64_t needed = spec.n_bytes + slack;
    const uint64_t whole = direct ? page_ceil(needed) : needed;
    for (uint64_t at = 0; at < whole; at += read_bytes_) {
        const uint64_t n = std::min<uint64_t>(read_bytes_, whole - at);
        jobs_.push_back(
            {&file, start + at, to - slack + at, n, std::min(n, needed - at), direct ? Io::direct : Io::pread});
    }
    const uint64_t before = lanes_.bytes_read();
    lanes_.run(jobs_);
    file.check_unchanged();
    dense_bytes_ += spec.n_bytes;
    dense_read_ += lanes_.bytes_read() - before;
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

// What has to be read for a slab: all but the pages of those whose bytes are there, or are waited for together with it.
// One that is merely expected may be taken back, and nobody waits for it.
Pages ExpertStore::unread_pages(const Tensor& tensor, int expert) const {
    return Slabs::pages_without(tensor, expert, [&](int other) {
        const int32_t entry = in(tensor.spec.layer).first_entry + other;
        const int32_t slab = slab_of(entry, tensor.part);
        return is_resident(tensor, other) &&
               ((entries_[entry].pinned >> tensor.part & 1) != 0 || (!lanes_.arriving(slab) && !lanes_.failed(slab)));
    });
}

// ---------------------------------------------------------------- serve

bool ExpertStore::fits(int layer, uint32_t parts, const std::vector<int32_t>& experts) const {
    const Layer& its = in(layer);
    std::vector<bool> seen(its.n_expert, false);
    uint64_t bytes = 0;
    for (const int32_t expert : experts) {
        if (expert < 0 || expert >= its.n_expert || seen[expert]) {
            continue;
        }
        seen[expert] = true;
        for (size_t part = 0; part < its.tensors.size(); ++part) {
            if ((parts >> part & 1) != 0) {
                bytes += Slabs::all_pages(tensor_of(its.tensors[part]), expert).bytes();
            }
        }
    }
    return bytes <= arena_bytes_;
}

void ExpertStore::release() {
    for (const int32_t entry : pinned_) {
        entries_[entry].pinned = 0;
    }
    pinned_.clear();
}

void ExpertStore::check_experts(int layer, const std::vector<int32_t>& experts) const {
    const int n = n_expert(layer);
    for (const int32_t expert : experts) {
        if (expert < 0 || expert >= n) {
            throw SystemError("layer " + std::to_string(layer) + " asked for expert " + std::to_string(expert) +
                              " of " + std::to_string(n) + ": the router's output is not what it should be");
        }
    }
}

void ExpertStore::check_request(int layer, uint32_t parts, const std::vector<int32_t>& experts) const {
    check_experts(layer, experts);
    for (const int id : in(layer).tensors) {
        if ((parts >> tensor_of(id).part & 1) != 0 && tensor_of(id).data == nullptr) {
            throw SystemError(tensor_of(id).spec.name + " is in the model file, but llama.cpp gave it no memory");
        }
    }
}

void ExpertStore::warm(int layer, const std::vector<int32_t>& experts) {
    const uint32_t parts = (1U << n_parts(layer)) - 1;
    bring(layer, parts, experts, false);
    wait(parts);
    release();
}

void ExpertStore::prefer(int layer, const std::vector<int32_t>& experts) {
    check_experts(layer, experts);
    const Layer& its = in(layer);
    for (int32_t expert = 0; expert < its.n_expert; ++expert) {
        entries_[its.first_entry + expert].preferred = false;
    }
    for (const int32_t expert : experts) {
        entries_[its.first_entry + expert].preferred = true;
    }
    order_->prefer(its.number, experts);
}

void ExpertStore::routed(int layer, int64_t n_tokens, const std::vector<int32_t>& experts) {
    check_experts(layer, experts);
    if (!all_fit_) {  // else nobody ever has to leave
        order_->routed(in(layer).number, n_tokens, experts);
    }
}

void ExpertStore::bring(int layer, uint32_t parts, const std::vector<int32_t>& experts, bool counted) {
    release();
    check_request(layer, parts, experts);
    drop_failed();
    const Layer& its = in(layer);
    // Pin all of the request before anything is evicted for a part of it.
    for (const int32_t expert : experts) {
        const int32_t entry = its.first_entry + expert;
        if (entries_[entry].pinned == 0) {
            entries_[entry].pinned = static_cast<uint8_t>(parts);
            pinned_.push_back(entry);
            order_->touch(entry);
        }
    }
    settle_expectations(layer);
    jobs_.clear();
    serving_ = its.number;
    sparing_ = !counted;
    order_->seek(serving_);
    try {
        for (const int32_t entry : pinned_) {
            const bool expected = std::exchange(entries_[entry].unused, false);
            for (const int id : its.tensors) {
                const int part = tensor_of(id).part;
                if ((parts >> part & 1) == 0) {
                    continue;
                }
                if ((entries_[entry].resident >> part & 1) != 0 && secure(entry, part)) {
                    hits_ += counted ? 1 : 0;
                    expected_hits_ += counted && expected ? 1 : 0;
                    continue;
                }
                misses_ += counted ? 1 : 0;
                if (!make_room(tensor_of(id), entry - its.first_entry) &&
                    !(abandon_expectations() && make_room(tensor_of(id), entry - its.first_entry))) {
                    throw SystemError("the selected experts of one layer need more than the arena of " +
                                      std::to_string(arena_bytes_) + " bytes; raise --ram or lower --ubatch");
                }
                add(entry, part);
            }
        }
        spares_.shrink(arena_bytes_ - resident_bytes_);
        peak_bytes_ = std::max(peak_bytes_.load(), resident_bytes_.load());
        if (!jobs_.empty()) {
            slabs_.check_files();
        }
    } catch (const SystemError& error) {
        give_up(error.what());
    }
    // In the order in which they will be needed: all of a part before any of the next one.
    std::stable_sort(jobs_.begin(), jobs_.end(),
                     [](const ReadJob& a, const ReadJob& b) { return a.slab % kMaxParts < b.slab % kMaxParts; });
    lanes_.submit(jobs_, Urgency::demanded);
}

// A resident slab is asked for: if it is still arriving, it is waited for from now on. False: it could not be read
// while nobody waited for it, and is gone.
bool ExpertStore::secure(int32_t entry, int part) {
    const int32_t slab = slab_of(entry, part);
    if (lanes_.arriving(slab)) {
        lanes_.hasten(slab);
    }
    if (!lanes_.failed(slab)) {
        return true;
    }
    try {
        lanes_.wait({slab});
    } catch (const SystemError&) {
        drop(entry, 1U << part);
        unverified_.erase(std::remove(unverified_.begin(), unverified_.end(), slab), unverified_.end());
        return false;
    }
    return true;
}

uint32_t ExpertStore::arriving_parts() const {
    uint32_t parts = 0;
    for (const int32_t entry : pinned_) {
        for (int part = 0; part < kMaxParts; ++part) {
            if ((entries_[entry].pinned >> part & 1) != 0 && lanes_.arriving(slab_of(entry, part))) {
                parts |= 1U << part;
            }
        }
    }
    return parts;
}

void ExpertStore::wait(uint32_t parts) {
    std::vector<int32_t> slabs;
    for (const int32_t entry : pinned_) {
        for (int part = 0; part < kMaxParts; ++part) {
            if ((entries_[entry].pinned & parts) >> part & 1) {
                slabs.push_back(slab_of(entry, part));
            }
        }
    }
    try {
        const uint64_t started = now_ns();
        lanes_.wait(slabs);
        read_ns_ += now_ns() - started;
        if (!unverified_.empty()) {
            // Who has arrived first: what was read while somebody wrote is worth nothing.
            const auto arrived = std::stable_partition(unverified_.begin(), unverified_.end(), [this](int32_t slab) {
                return lanes_.arriving(slab) || lanes_.failed(slab);
            });
            slabs_.check_files();
            unverified_.erase(arrived, unverified_.end());
        }
        check_mapping();
    } catch (const SystemError& error) {
        give_up(error.what());
    }
}

// Whatever may not be what the file says leaves, and the caller gets to know.
void ExpertStore::give_up(const std::string& failure) {
    lanes_.drain();
    release();
    for (const int32_t slab : std::exchange(unverified_, {})) {
        try {
            drop(slab / kMaxParts, 1U << slab % kMaxParts);
        } catch (const SystemError&) {
            // Its pages could not be given back, but it no longer counts as resident: the first failure is the news.
        }
    }
    spares_.shrink(arena_bytes_ - resident_bytes_);
    throw SystemError(failure);
}

// Nobody has asked for these yet: they may be asked for again.
void ExpertStore::drop_failed() {
    const auto failed = std::stable_partition(unverified_.begin(), unverified_.end(), [this](int32_t slab) {
        return lanes_.arriving(slab) || !lanes_.failed(slab);
    });
    for (auto slab = failed; slab != unverified_.end(); ++slab) {
        drop(*slab / kMaxParts, 1U << *slab % kMaxParts);
    }
    unverified_.erase(failed, unverified_.end());
    spares_.shrink(arena_bytes_ - resident_bytes_);
}

void ExpertStore::expect(int layer, const std::vector<int32_t>& experts) {
    if (all_fit_ || lanes_.size() == 1) {
        return;
    }
    check_request(layer, (1U << n_parts(layer)) - 1, experts);
    drop_failed();
    const Layer& its = in(layer);
    for (const int32_t expert : experts) {
        const int32_t entry = its.first_entry + expert;
        if (!std::exchange(entries_[entry].expected, true)) {
            expected_.push_back(entry);
        }
    }
    order_->seek(serving_);
    bool room = true;
    for (auto expert = experts.begin(); expert != experts.end() && room; ++expert) {
        const int32_t entry = its.first_entry + *expert;
        jobs_.clear();
        for (const int id : its.tensors) {
            const Tensor& tensor = tensor_of(id);
            if ((entries_[entry].resident >> tensor.part & 1) != 0 || !(room = room && make_room(tensor, *expert))) {
                continue;
            }
            if (entries_[entry].resident == 0) {
                order_->admit(entry);
                entries_[entry].unused = true;
            }
            add(entry, tensor.part);
            expected_bytes_ += tensor.slab_bytes;
        }
        spares_.shrink(arena_bytes_ - resident_bytes_);
        // One by one: what is not submitted does not count as arriving, and the next one would rely on its pages.
        lanes_.submit(jobs_, Urgency::speculative);
    }
    peak_bytes_ = std::max(peak_bytes_.load(), resident_bytes_.load());
}

// The layer's router has spoken: what it did not choose need not come any more.
void ExpertStore::settle_expectations(int layer) {
    const auto its = std::stable_partition(expected_.begin(), expected_.end(),
                                           [&](int32_t entry) { return entries_[entry].layer != layer; });
    for (auto entry = its; entry != expected_.end(); ++entry) {
        entries_[*entry].expected = false;
        if (entries_[*entry].pinned == 0 && entries_[*entry].unused) {
            take_back(*entry);
        }
    }
    expected_.erase(its, expected_.end());
    spares_.shrink(arena_bytes_ - resident_bytes_);
}

// What is asked for needs the room of what is only expected, and of what is still arriving though nobody asks for it
// any more: wrong guesses, and requests that were given up. True if there was any.
bool ExpertStore::abandon_expectations() {
    bool any = !expected_.empty();
    for (const int32_t entry : std::exchange(expected_, {})) {
        entries_[entry].expected = false;
        if (entries_[entry].pinned == 0 && entries_[entry].unused) {
            take_back(entry);
        }
    }
    std::vector<int32_t> arriving;
    for (const int32_t slab : unverified_) {
        if (lanes_.arriving(slab) && (entries_[slab / kMaxParts].pinned >> slab % kMaxParts & 1) == 0) {
            arriving.push_back(slab);
            any = true;
        }
    }
    try {
        lanes_.wait(arriving);
    } catch (const SystemError&) {
        drop_failed();
    }
    order_->seek(serving_);
    return any;
}

// Drops those of an entry's slabs whose reading has not begun.
void ExpertStore::take_back(int32_t entry) {
    uint32_t parts = 0;
    for (int part = 0; part < kMaxParts; ++part) {
        const int32_t slab = slab_of(entry, part);
        if ((entries_[entry].resident >> part & 1) != 0 && lanes_.arriving(slab) && lanes_.cancel(slab)) {
            parts |= 1U << part;
            expected_bytes_ -= tensor_of(in(entries_[entry].layer).tensors[part]).slab_bytes;
            unverified_.erase(std::remove(unverified_.begin(), unverified_.end(), slab), unverified_.end());
        }
    }
    const bool unused = std::exchange(entries_[entry].unused, false);  // what was not read is not wasted
    drop(entry, parts);
    entries_[entry].unused = unused && entries_[entry].resident != 0;
}

// Counts a slab as resident and plans the reading of what it lacks.
void ExpertStore::add(int32_t entry, int part) {
    const Layer& its = in(entries_[entry].layer);
    const Tensor& tensor = tensor_of(its.tensors[part]);
    const int expert = entry - its.first_entry;
    const Pages missing = exclusive_pages(tensor, expert);
    resident_bytes_ += missing.bytes();
    entries_[entry].resident |= static_cast<uint8_t>(1U << part);
    ++resident_slabs_[entries_[entry].layer];
    unverified_.push_back(slab_of(entry, part));
    if (const Pages own = Slabs::own_pages(tensor, expert); own.bytes() > 0) {
        spares_.take(own.begin(), own.bytes());
    }
    const int32_t slab = slab_of(entry, part);
    lanes_.forget(slab);
    plan_read(slab, tensor, expert, missing, unread_pages(tensor, expert));
}

void ExpertStore::plan_read(int32_t slab, const Tensor& tensor, int expert, Pages missing, Pages unread) {
    const MappedFile& file = slabs_.file_of(tensor);
    uint64_t begin = tensor.spec.offset + static_cast<uint64_t>(expert) * tensor.slab_bytes;
    uint64_t n_bytes = tensor.slab_bytes;
    std::byte* to = tensor.data + static_cast<uint64_t>(expert) * tensor.slab_bytes;
    if (io_ == Io::mmap && missing.bytes() > 0) {
        // Resident slabs only: around a fault the kernel maps whatever else of the mapping is in its page cache.
        file.map_over(missing.begin(), Slabs::file_offset(tensor, missing.first), missing.bytes());
    }
    if (io_ != Io::pread) {
        begin = Slabs::file_offset(tensor, unread.first);
        n_bytes = unread.bytes();
        to = unread.begin();
    }
    for (uint64_t at = 0; at < n_bytes; at += read_bytes_) {
        const uint64_t n = std::min<uint64_t>(read_bytes_, n_bytes - at);
        // All of a page that the file has, since a neighbour may rely on the rest of it.
        jobs_.push_back({&file, begin + at, to + at, n, std::min(n, file.size() - begin - at), io_, slab});
    }
}

// False: nothing that may leave is left.
bool ExpertStore::make_room(const Tensor& tensor, int expert) {
    // Asked again after each eviction: dropping a neighbour can leave a shared page to this slab.
    while (resident_bytes_ + exclusive_pages(tensor, expert).bytes() > arena_bytes_) {
        const int32_t victim = order_->next_victim();
        if (victim == Eviction::kNone) {
            if (!std::exchange(sparing_, false)) {
                return false;
            }
            order_->seek(serving_);
            continue;
        }
        const uint32_t parts = removable_parts(victim);
        if (parts != 0) {
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
    // A pinned entry is about to get other parts: it has to stay a victim for later.
    if (entries_[entry].resident == 0 && entries_[entry].pinned == 0) {
        order_->remove(entry);
        entries_[entry].unused = false;
    }
}

void ExpertStore::drop_pages(const Tensor& tensor, int expert) {
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
    if (!tuning_.recycle || own.bytes() == 0) {
        discard(base, pages.bytes());
        return;
    }
    discard(base, own.first - pages.first);
    spares_.give(own.begin(), own.bytes());
    discard(own.begin() + own.bytes(), pages.last - own.last);
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
    stats.bytes_read = lanes_.bytes_read() - dense_read_;
    stats.dense_bytes = dense_bytes_;
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
