#include "expert_store.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace edgemoe {

namespace {

// Bandwidth is flat above a quarter of a mebibyte; smaller pieces let the lanes share one large slab.
constexpr size_t kReadPiece = size_t{1} << 20;
// Below this a dense tensor is not worth pages of its own: it is read through the page cache.
constexpr uint64_t kSmallDense = uint64_t{64} << 10;

uint64_t now_ns() {
    return static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count());
}

template <typename Number>
Number* as_pointer(uintptr_t address) {
    return reinterpret_cast<Number*>(address);
}

}  // namespace

ExpertStore::ExpertStore(Io io, int n_lanes, uint64_t arena_bytes)
    : io_(io), arena_bytes_(arena_bytes), lanes_(n_lanes) {}

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
    for (size_t l = 0; l < layers_.size(); ++l) {
        layers_[l].first_entry = static_cast<int32_t>(entries_.size());
        Entry entry;
        entry.layer = static_cast<int32_t>(l);
        entries_.insert(entries_.end(), layers_[l].n_expert, entry);
    }
    order_.resize(static_cast<int32_t>(entries_.size()));
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
    for (uint64_t at = 0; at < whole; at += kReadPiece) {
        const uint64_t n = std::min<uint64_t>(kReadPiece, whole - at);
        jobs_.push_back(
            {&file, start + at, to - slack + at, n, std::min(n, needed - at), direct ? Io::direct : Io::pread});
    }
    lanes_.run(jobs_);
    file.check_unchanged();
    dense_bytes_ += spec.n_bytes;
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

// The pages of a slab that no other resident slab needs. Slabs may be smaller than a page, so several neighbours on
// either side can reach into the first and the last one.
ExpertStore::Pages ExpertStore::exclusive_pages(const Tensor& tensor, int expert) const {
    Pages own = pages_of(tensor, expert);
    for (int before = expert - 1; before >= 0; --before) {
        const Pages other = pages_of(tensor, before);
        if (other.last <= own.first) {
            break;
        }
        if (is_resident(tensor, before)) {
            own.first = other.last;
            break;
        }
    }
    for (int after = expert + 1; after < tensor.spec.n_expert; ++after) {
        const Pages other = pages_of(tensor, after);
        if (other.first >= own.last) {
            break;
        }
        if (is_resident(tensor, after)) {
            own.last = other.first;
            break;
        }
    }
    return own;
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

void ExpertStore::check_files(const Layer& layer) const {
    for (const int id : layer.tensors) {
        files_[tensors_[id].spec.file]->check_unchanged();
    }
}

void ExpertStore::warm(int layer, const std::vector<int32_t>& experts) {
    bring(layer, (1U << n_parts(layer)) - 1, experts, false);
    release();
}

void ExpertStore::prefer(int layer, const std::vector<int32_t>& experts) {
    check_request(layer, 0, experts);
    const Layer& in = layers_[layer];
    std::vector<bool> preferred(in.n_expert, false);
    for (const int32_t expert : experts) {
        preferred[expert] = true;
    }
    for (int32_t expert = 0; expert < in.n_expert; ++expert) {
        order_.prefer(in.first_entry + expert, preferred[expert]);
    }
}

void ExpertStore::bring(int layer, uint32_t parts, const std::vector<int32_t>& experts, bool counted) {
    release();
    check_request(layer, parts, experts);
    const Layer& in = layers_[layer];
    // Pin all of the request before anything is evicted for a part of it.
    for (const int32_t expert : experts) {
        const int32_t entry = in.first_entry + expert;
        if (entries_[entry].pinned == 0) {
            entries_[entry].pinned = static_cast<uint8_t>(parts);
            pinned_.push_back(entry);
            order_.touch(entry);
        }
    }
    jobs_.clear();
    std::vector<std::pair<int32_t, int>> added;
    std::string failure;
    try {
        for (const int32_t entry : pinned_) {
            for (const int id : in.tensors) {
                const int part = tensors_[id].part;
                if ((parts >> part & 1) == 0) {
                    continue;
                }
                if ((entries_[entry].resident >> part & 1) != 0) {
                    hits_ += counted ? 1 : 0;
                    continue;
                }
                misses_ += counted ? 1 : 0;
                make_room(tensors_[id], entry - in.first_entry);
                added.emplace_back(entry, part);
                add(entry, part);
            }
        }
        peak_bytes_ = std::max(peak_bytes_.load(), resident_bytes_.load());
        if (!jobs_.empty()) {
            const uint64_t started = now_ns();
            check_files(in);
            lanes_.run(jobs_);
            check_files(in);  // what was read while somebody wrote is worth nothing
            read_ns_ += now_ns() - started;
            for (const ReadJob& job : jobs_) {
                bytes_read_ += job.n;
            }
        }
        check_mapping();
    } catch (const std::exception& error) {
        failure = error.what();
    }
    if (!failure.empty()) {
        release();
        for (const auto& [entry, part] : added) {
            try {
                drop(entry, 1U << part);
            } catch (const SystemError&) {
                // Its pages could not be given back, but it no longer counts as resident: the first failure is the
                // news.
            }
        }
        throw SystemError(failure);
    }
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
    plan_read(tensor, expert, missing);
}

// Pages that a resident neighbour holds are not read again: no two jobs write to the same page.
void ExpertStore::plan_read(const Tensor& tensor, int expert, Pages missing) {
    const MappedFile& file = *files_[tensor.spec.file];
    uint64_t begin = tensor.spec.offset + static_cast<uint64_t>(expert) * tensor.slab_bytes;
    uint64_t n_bytes = tensor.slab_bytes;
    std::byte* to = tensor.data + static_cast<uint64_t>(expert) * tensor.slab_bytes;
    if (io_ != Io::pread) {
        begin = file_offset(tensor, missing.first);
        n_bytes = missing.bytes();
        to = as_pointer<std::byte>(missing.first);
    }
    if (io_ == Io::mmap && n_bytes > 0) {
        // Resident slabs only: around a fault the kernel maps whatever else of the mapping is in its page cache.
        file.map_over(to, begin, n_bytes);
    }
    for (uint64_t at = 0; at < n_bytes; at += kReadPiece) {
        const uint64_t n = std::min<uint64_t>(kReadPiece, n_bytes - at);
        // All of a page that the file has, since a neighbour may rely on the rest of it.
        jobs_.push_back({&file, begin + at, to + at, n, std::min(n, file.size() - begin - at), io_});
    }
}

void ExpertStore::make_room(const Tensor& tensor, int expert) {
    int32_t victim = order_.first_victim();
    // Asked again after each eviction: dropping a neighbour can leave a shared page to this slab.
    while (resident_bytes_ + exclusive_pages(tensor, expert).bytes() > arena_bytes_) {
        if (victim == LeastRecentlyUsed::kNone) {
            throw SystemError("the selected experts of one layer need more than the arena of " +
                              std::to_string(arena_bytes_) + " bytes; raise --ram or lower --ubatch");
        }
        const int32_t next = order_.next_victim(victim);
        const uint32_t parts = entries_[victim].resident & static_cast<uint32_t>(~entries_[victim].pinned);
        if (parts != 0) {
            evictions_ += static_cast<uint64_t>(__builtin_popcount(parts));
            drop(victim, parts);
        }
        victim = next;
    }
}

void ExpertStore::drop(int32_t entry, uint32_t parts) {
    Layer& layer = layers_[entries_[entry].layer];
    const int expert = entry - layer.first_entry;
    for (size_t part = 0; part < layer.tensors.size(); ++part) {
        if ((parts >> part & 1) != 0) {
            const Tensor& tensor = tensors_[layer.tensors[part]];
            entries_[entry].resident &= static_cast<uint8_t>(~(1U << part));
            --layer.resident_slabs;
            drop_pages(tensor, expert);
        }
    }
    // A pinned entry is about to get other parts: it has to stay a victim for later.
    if (entries_[entry].resident == 0 && entries_[entry].pinned == 0) {
        order_.remove(entry);
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
    } else {
        discard(base, pages.bytes());
    }
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

StoreStats ExpertStore::stats() const {
    return {hits_, misses_, evictions_, bytes_read_, dense_bytes_, resident_bytes_, peak_bytes_, read_ns_};
}

}  // namespace edgemoe
