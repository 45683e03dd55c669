#include "expert_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "forecast.h"

namespace edgemoe {

namespace {

// Below this a dense tensor is not worth pages of its own: it is read through the page cache.
constexpr uint64_t kSmallDense = uint64_t{64} << 10;

template <typename Number>
Number* as_pointer(uintptr_t address) {
    return reinterpret_cast<Number*>(address);
}

}  // namespace

ExpertStore::ExpertStore(Io io, int n_lanes, uint64_t arena_bytes, Tuning tuning, uint64_t read_bytes)
    : io_(io), arena_bytes_(arena_bytes), tuning_(tuning), read_bytes_(page_ceil(read_bytes)), lanes_(n_lanes) {
    if (tuning.forecast) {
        order_ = std::make_unique<Forecast>();
    } else {
        order_ = std::make_unique<LeastRecentlyUsed>();
    }
}

ExpertStore::~ExpertStore() = default;

int ExpertStore::add_file(const std::string& path) {
    auto file = std::make_unique<MappedFile>(path);
    std::string why;
    if (io_ == Io::direct && !file->open_direct(why)) {
        throw SystemError(path + ": " + why + "; use --io auto");
    }
    files_.push_back(std::move(file));
    return static_cast<int>(files_.size()) - 1;
}

int ExpertStore::add_tensor(TensorSpec spec) {
    const MappedFile& file = *files_.at(spec.file);
    if (spec.n_bytes > file.size() || spec.offset > file.size() - spec.n_bytes) {
        throw SystemError(spec.name + " lies outside " + file.path());
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

void ExpertStore::number_entries() {
    entries_.clear();
    std::vector<int> n_expert;
    for (size_t l = 0; l < layers_.size(); ++l) {
        if (layers_[l].n_expert > 0) {
            layers_[l].number = static_cast<int>(n_expert.size());
            n_expert.push_back(layers_[l].n_expert);
        }
        layers_[l].first_entry = static_cast<int32_t>(entries_.size());
        Entry entry;
        entry.layer = static_cast<int32_t>(l);
        entries_.insert(entries_.end(), layers_[l].n_expert, entry);
    }
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

uint64_t ExpertStore::place_size(int id) const {
    const TensorSpec& spec = tensors_[id].spec;
    if (spec.n_expert == 0 && spec.n_bytes < kSmallDense) {
        return spec.n_bytes;
    }
    // One page to reach the congruent address, and a whole page at either end that no other tensor touches.
    return spec.n_bytes + 3 * page_size();
}

std::byte* ExpertStore::place(int id, std::byte* region) {
    Tensor& tensor = tensors_[id];
    const TensorSpec& spec = tensor.spec;
    if (spec.n_expert == 0 && spec.n_bytes < kSmallDense) {
        return region;
    }
    const auto start = static_cast<uintptr_t>(page_ceil(reinterpret_cast<uintptr_t>(region)));
    std::byte* data = as_pointer<std::byte>(start + spec.offset % page_size());
    if (spec.n_expert == 0) {
        return data;
    }
    tensor.data = data;
    const size_t whole = page_ceil(spec.offset % page_size() + spec.n_bytes);
    placed_bytes_ += whole;
    all_fit_ = placed_bytes_ <= arena_bytes_;
    if (io_ != Io::mmap) {
        use_small_pages(as_pointer<std::byte>(start), whole);
    }
    return data;
}

void ExpertStore::read_dense(int id, std::byte* to) {
    const TensorSpec& spec = tensors_[id].spec;
    const MappedFile& file = *files_[spec.file];
    file.check_unchanged();
    jobs_.clear();
    const bool direct = io_ == Io::direct && spec.n_bytes >= kSmallDense;
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
    const Layer& layer = layers_[tensor.spec.layer];
    return (entries_[layer.first_entry + expert].resident >> tensor.part & 1) != 0;
}

ExpertStore::Pages ExpertStore::pages_of(const Tensor& tensor, int expert) const {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.data) + static_cast<uintptr_t>(expert) * tensor.slab_bytes;
    return {page_floor(begin), page_ceil(begin + tensor.slab_bytes)};
}

// The pages of a slab that none of the others that `hold` needs. Slabs may be smaller than a page, so several
// neighbours on either side can reach into the first and the last one.
template <typename Holds>
ExpertStore::Pages ExpertStore::pages_without(const Tensor& tensor, int expert, const Holds& hold) const {
    Pages own = pages_of(tensor, expert);
    for (int before = expert - 1; before >= 0; --before) {
        const Pages other = pages_of(tensor, before);
        if (other.last <= own.first) {
            break;
        }
        if (hold(before)) {
            own.first = other.last;
            break;
        }
    }
    for (int after = expert + 1; after < tensor.spec.n_expert; ++after) {
        const Pages other = pages_of(tensor, after);
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

// What memory a slab takes or gives back: the pages that no other resident slab needs.
ExpertStore::Pages ExpertStore::exclusive_pages(const Tensor& tensor, int expert) const {
    return pages_without(tensor, expert, [&](int other) { return is_resident(tensor, other); });
}

// What has to be read for a slab: all but the pages of those whose bytes are there, or are waited for together with it.
// One that is merely expected may be taken back, and nobody waits for it.
ExpertStore::Pages ExpertStore::unread_pages(const Tensor& tensor, int expert) const {
    return pages_without(tensor, expert, [&](int other) {
        const int32_t entry = layers_[tensor.spec.layer].first_entry + other;
        const int32_t slab = slab_of(entry, tensor.part);
        return is_resident(tensor, other) &&
               ((entries_[entry].pinned >> tensor.part & 1) != 0 || (!lanes_.arriving(slab) && !lanes_.failed(slab)));
    });
}

// ---------------------------------------------------------------- serve

int ExpertStore::n_parts(int layer) const {
    return layer >= 0 && layer < static_cast<int>(layers_.size()) ? static_cast<int>(layers_[layer].tensors.size()) : 0;
}

bool ExpertStore::fits(int layer, uint32_t parts, const std::vector<int32_t>& experts) const {
    const Layer& in = layers_[layer];
    std::vector<bool> seen(in.n_expert, false);
    uint64_t bytes = 0;
    for (const int32_t expert : experts) {
        if (expert < 0 || expert >= in.n_expert || seen[expert]) {
            continue;
        }
        seen[expert] = true;
        for (size_t part = 0; part < in.tensors.size(); ++part) {
            if ((parts >> part & 1) != 0) {
                bytes += pages_of(tensors_[in.tensors[part]], expert).bytes();
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

int ExpertStore::n_expert(int layer) const {
    if (n_parts(layer) == 0) {
        throw SystemError("layer " + std::to_string(layer) + " was asked for experts, but the model has none there");
    }
    return layers_[layer].n_expert;
}

void ExpertStore::check_request(int layer, uint32_t parts, const std::vector<int32_t>& experts) const {
    const int n = n_expert(layer);
    const Layer& in = layers_[layer];
    for (const int32_t expert : experts) {
        if (expert < 0 || expert >= n) {
            throw SystemError("layer " + std::to_string(layer) + " asked for expert " + std::to_string(expert) +
                              " of " + std::to_string(n) + ": the router's output is not what it should be");
        }
    }
    for (const int id : in.tensors) {
        if ((parts >> tensors_[id].part & 1) != 0 && tensors_[id].data == nullptr) {
            throw SystemError(tensors_[id].spec.name + " is in the model file, but llama.cpp gave it no memory");
        }
    }
}

void ExpertStore::check_files() const {
    for (const auto& file : files_) {
        file->check_unchanged();
    }
}

void ExpertStore::warm(int layer, const std::vector<int32_t>& experts) {
    const uint32_t parts = (1U << n_parts(layer)) - 1;
    bring(layer, parts, experts, false);
    wait(parts);
    release();
}

void ExpertStore::prefer(int layer, const std::vector<int32_t>& experts) {
    check_request(layer, 0, experts);
    const Layer& in = layers_[layer];
    for (int32_t expert = 0; expert < in.n_expert; ++expert) {
        entries_[in.first_entry + expert].preferred = false;
    }
    for (const int32_t expert : experts) {
        entries_[in.first_entry + expert].preferred = true;
    }
    order_->prefer(in.number, experts);
}

void ExpertStore::routed(int layer, int64_t n_tokens, const std::vector<int32_t>& experts) {
    check_request(layer, 0, experts);
    if (!all_fit_) {  // else nobody ever has to leave
        order_->routed(layers_[layer].number, n_tokens, experts);
    }
}

void ExpertStore::bring(int layer, uint32_t parts, const std::vector<int32_t>& experts, bool counted) {
    release();
    check_request(layer, parts, experts);
    drop_failed();
    const Layer& in = layers_[layer];
    // Pin all of the request before anything is evicted for a part of it.
    for (const int32_t expert : experts) {
        const int32_t entry = in.first_entry + expert;
        if (entries_[entry].pinned == 0) {
            entries_[entry].pinned = static_cast<uint8_t>(parts);
            pinned_.push_back(entry);
            order_->touch(entry);
        }
    }
    settle_expectations(layer);
    jobs_.clear();
    serving_ = in.number;
    sparing_ = !counted;
    order_->seek(serving_);
    try {
        for (const int32_t entry : pinned_) {
            const bool expected = std::exchange(entries_[entry].unused, false);
            for (const int id : in.tensors) {
                const int part = tensors_[id].part;
                if ((parts >> part & 1) == 0) {
                    continue;
                }
                if ((entries_[entry].resident >> part & 1) != 0) {
                    hits_ += counted ? 1 : 0;
                    expected_hits_ += counted && expected ? 1 : 0;
                    if (lanes_.arriving(slab_of(entry, part))) {
                        lanes_.hasten(slab_of(entry, part));
                    }
                    continue;
                }
                misses_ += counted ? 1 : 0;
                if (!make_room(tensors_[id], entry - in.first_entry) &&
                    !(abandon_expectations() && make_room(tensors_[id], entry - in.first_entry))) {
                    throw SystemError("the selected experts of one layer need more than the arena of " +
                                      std::to_string(arena_bytes_) + " bytes; raise --ram or lower --ubatch");
                }
                add(entry, part);
            }
        }
        spares_.shrink(arena_bytes_ - resident_bytes_);
        peak_bytes_ = std::max(peak_bytes_.load(), resident_bytes_.load());
        if (!jobs_.empty()) {
            check_files();
        }
    } catch (const SystemError& error) {
        give_up(error.what());
    }
    // In the order in which they will be needed: all of a part before any of the next one.
    std::stable_sort(jobs_.begin(), jobs_.end(), [](const ReadJob& a, const ReadJob& b) {
        return a.slab % kMaxParts < b.slab % kMaxParts;
    });
    lanes_.submit(jobs_, Urgency::demanded);
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
            check_files();  // what was read while somebody wrote is worth nothing
            unverified_.erase(std::remove_if(unverified_.begin(), unverified_.end(),
                                             [this](int32_t slab) {
                                                 return !lanes_.arriving(slab) && !lanes_.failed(slab);
                                             }),
                              unverified_.end());
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
    const Layer& in = layers_[layer];
    for (const int32_t expert : experts) {
        const int32_t entry = in.first_entry + expert;
        if (!std::exchange(entries_[entry].expected, true)) {
            expected_.push_back(entry);
        }
    }
    order_->seek(serving_);
    bool room = true;
    for (auto expert = experts.begin(); expert != experts.end() && room; ++expert) {
        const int32_t entry = in.first_entry + *expert;
        jobs_.clear();
        for (const int id : in.tensors) {
            const Tensor& tensor = tensors_[id];
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

// What is asked for needs their room. True if there were any.
bool ExpertStore::abandon_expectations() {
    std::vector<int32_t> arriving;
    for (const int32_t entry : expected_) {
        entries_[entry].expected = false;
        if (entries_[entry].pinned == 0 && entries_[entry].unused) {
            take_back(entry);
        }
        for (int part = 0; part < kMaxParts; ++part) {
            if (lanes_.arriving(slab_of(entry, part))) {
                arriving.push_back(slab_of(entry, part));
            }
        }
    }
    const bool any = !std::exchange(expected_, {}).empty();
    order_->seek(serving_);
    try {
        lanes_.wait(arriving);
    } catch (const SystemError&) {
        drop_failed();  // nobody asked for them
    }
    return any;
}

// Drops those of an entry's slabs whose reading has not begun.
void ExpertStore::take_back(int32_t entry) {
    uint32_t parts = 0;
    for (int part = 0; part < kMaxParts; ++part) {
        const int32_t slab = slab_of(entry, part);
        if ((entries_[entry].resident >> part & 1) != 0 && lanes_.arriving(slab) && lanes_.cancel(slab)) {
            parts |= 1U << part;
            expected_bytes_ -= tensors_[layers_[entries_[entry].layer].tensors[part]].slab_bytes;
            unverified_.erase(std::remove(unverified_.begin(), unverified_.end(), slab), unverified_.end());
        }
    }
    const bool unused = std::exchange(entries_[entry].unused, false);  // what was not read is not wasted
    drop(entry, parts);
    entries_[entry].unused = unused && entries_[entry].resident != 0;
}

// Counts a slab as resident and plans the reading of what it lacks.
void ExpertStore::add(int32_t entry, int part) {
    Layer& layer = layers_[entries_[entry].layer];
    const Tensor& tensor = tensors_[layer.tensors[part]];
    const int expert = entry - layer.first_entry;
    const Pages missing = exclusive_pages(tensor, expert);
    resident_bytes_ += missing.bytes();
    entries_[entry].resident |= static_cast<uint8_t>(1U << part);
    ++layer.resident_slabs;
    unverified_.push_back(slab_of(entry, part));
    if (const Pages own = own_pages(tensor, expert); own.bytes() > 0) {
        spares_.take(as_pointer<std::byte>(own.first), own.bytes());
    }
    const int32_t slab = slab_of(entry, part);
    lanes_.forget(slab);
    plan_read(slab, tensor, expert, missing, unread_pages(tensor, expert));
}

void ExpertStore::plan_read(int32_t slab, const Tensor& tensor, int expert, Pages missing, Pages unread) {
    const MappedFile& file = *files_[tensor.spec.file];
    uint64_t begin = tensor.spec.offset + static_cast<uint64_t>(expert) * tensor.slab_bytes;
    uint64_t n_bytes = tensor.slab_bytes;
    std::byte* to = tensor.data + static_cast<uint64_t>(expert) * tensor.slab_bytes;
    if (io_ == Io::mmap && missing.bytes() > 0) {
        // Resident slabs only: around a fault the kernel maps whatever else of the mapping is in its page cache.
        file.map_over(as_pointer<std::byte>(missing.first), file_offset(tensor, missing.first), missing.bytes());
    }
    if (io_ != Io::pread) {
        begin = file_offset(tensor, unread.first);
        n_bytes = unread.bytes();
        to = as_pointer<std::byte>(unread.first);
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
    Layer& layer = layers_[entries_[entry].layer];
    const int expert = entry - layer.first_entry;
    for (size_t part = 0; part < layer.tensors.size(); ++part) {
        if ((parts >> part & 1) != 0) {
            const Tensor& tensor = tensors_[layer.tensors[part]];
            entries_[entry].resident &= static_cast<uint8_t>(~(1U << part));
            --layer.resident_slabs;
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
    std::byte* base = as_pointer<std::byte>(pages.first);
    if (io_ == Io::mmap) {
        const MappedFile& file = *files_[tensor.spec.file];
        reserve_over(base, pages.bytes());
        file.forget(file_offset(tensor, pages.first), pages.bytes());
        return;
    }
    const Pages own = own_pages(tensor, expert);
    if (!tuning_.recycle || own.bytes() == 0) {
        discard(base, pages.bytes());
        return;
    }
    discard(base, own.first - pages.first);
    spares_.give(as_pointer<std::byte>(own.first), own.bytes());
    discard(as_pointer<std::byte>(own.last), pages.last - own.last);
}

// Those that lie wholly within a slab.
ExpertStore::Pages ExpertStore::own_pages(const Tensor& tensor, int expert) const {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.data) + static_cast<uintptr_t>(expert) * tensor.slab_bytes;
    return {page_ceil(begin), page_floor(begin + tensor.slab_bytes)};
}

uint64_t ExpertStore::file_offset(const Tensor& tensor, uintptr_t page) const {
    return page_floor(tensor.spec.offset) + (page - page_floor(reinterpret_cast<uintptr_t>(tensor.data)));
}

void ExpertStore::check_mapping() const {
    if (io_ != Io::mmap) {
        return;
    }
    for (const auto& file : files_) {
        file->check_unchanged();
    }
    if (guard_.faulted()) {
        throw SystemError("the model file became shorter while it was mapped; its experts can no longer be trusted");
    }
}

std::vector<std::vector<int32_t>> ExpertStore::residents() {
    std::vector<std::vector<int32_t>> found(layers_.size());
    order_->seek(serving_);
    for (int32_t entry = order_->next_victim(); entry != Eviction::kNone; entry = order_->next_victim()) {
        const int32_t layer = entries_[entry].layer;
        const int32_t expert = entry - layers_[layer].first_entry;
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
