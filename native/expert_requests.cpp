// What is asked of the store, and what is expected: which slabs are waited for, which come ahead, and what happens when
// they cannot be had. What is in memory, and who leaves, is in expert_store.cpp.
#include <algorithm>
#include <utility>

#include "expert_store.h"

namespace edgemoe {

bool ExpertStore::fits(int layer, uint32_t parts, const std::vector<int32_t>& experts) const {
    if (slots_.laid_out()) {
        return true;  // any layer as a whole
    }
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

int ExpertStore::layer_after(int layer) const {
    while (++layer <= last_layer()) {
        if (n_parts(layer) > 0) {
            return layer;
        }
    }
    return -1;
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
    ++n_requests_;
    sparing_ = !counted;
    seek_victims(layer);
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
                const Tensor& tensor = tensor_of(id);
                if (!make_room(tensor, entry - its.first_entry)) {
                    abandon_expectations();
                }
                if (!make_room(tensor, entry - its.first_entry)) {
                    throw SystemError("the selected experts of one layer need more than the arena of " +
                                      std::to_string(arena_bytes_) + " bytes; raise the budget or lower n_ubatch");
                }
                add(entry, part);
            }
        }
        shrink_spares();
        peak_bytes_ = std::max(peak_bytes_.load(), resident_bytes_.load());
        if (!jobs_.empty()) {
            slabs_.check_files();
        }
        lanes_.submit(jobs_, Urgency::demanded);
    } catch (const std::exception& error) {
        give_up(error.what());
    }
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

bool ExpertStore::await(int id, int32_t expert, bool counted) {
    const int32_t slab = slab_of(entry_of(id, expert), part_of(id));
    if (lanes_.arriving(slab)) {
        const uint64_t started = now_ns();
        lanes_.await(slab);
        read_ns_ += counted ? now_ns() - started : 0;
    }
    return !lanes_.failed(slab);
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
    shrink_spares();
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
    shrink_spares();
}

void ExpertStore::expect(int layer, const std::vector<int32_t>& experts) {
    if (lanes_.size() == 1) {
        return;
    }
    check_request(layer, (1U << n_parts(layer)) - 1, experts);
    drop_failed();
    const Layer& its = in(layer);
    settle_expectations(layer, experts);
    for (const int32_t expert : experts) {
        const int32_t entry = its.first_entry + expert;
        if (!std::exchange(entries_[entry].expected, true)) {
            expected_.push_back(entry);
        }
    }
    // The victims of the last request go on: who was none then is none now, unless others were sought.
    if (slots_.laid_out() && !slots_.same_kind(layer, sought_layer_)) {
        seek_victims(layer);
    }
    jobs_.clear();
    try {
        bool room = true;
        for (auto expert = experts.begin(); expert != experts.end() && room; ++expert) {
            const int32_t entry = its.first_entry + *expert;
            for (const int id : its.tensors) {
                const Tensor& tensor = tensor_of(id);
                if ((entries_[entry].resident >> tensor.part & 1) != 0 ||
                    !(room = room && make_room(tensor, *expert))) {
                    continue;
                }
                if (entries_[entry].resident == 0) {
                    order_->admit(entry);
                    entries_[entry].unused = true;
                }
                add(entry, tensor.part);
                expected_bytes_ += tensor.slab_bytes;
            }
        }
        shrink_spares();
        for (ReadJob& job : jobs_) {
            job.turn = n_requests_ + its.number - serving_;
        }
        lanes_.submit(jobs_, Urgency::speculative);
    } catch (const std::exception& error) {
        give_up(error.what());
    }
    peak_bytes_ = std::max(peak_bytes_.load(), resident_bytes_.load());
}

void ExpertStore::seek_victims(int layer) {
    order_->seek(serving_);
    sought_layer_ = layer;
}

// The layer's router has spoken, or was asked anew: what it did not choose need not come any more, but for the rest of
// a layer where all fit.
void ExpertStore::settle_expectations(int layer, const std::vector<int32_t>& still) {
    const auto its = std::stable_partition(expected_.begin(), expected_.end(), [&](int32_t entry) {
        return entries_[entry].layer != layer ||
               std::find(still.begin(), still.end(), entry - in(layer).first_entry) != still.end();
    });
    for (auto entry = its; entry != expected_.end(); ++entry) {
        entries_[*entry].expected = false;
        if (!all_fit_ && entries_[*entry].pinned == 0 && entries_[*entry].unused) {
            take_back(*entry);
        }
    }
    expected_.erase(its, expected_.end());
    shrink_spares();
}

// What is asked for needs the room of what is only expected, and of what is still arriving though nobody asks for it
// any more: wrong guesses, and requests that were given up. What has arrived since the last look may leave as well.
void ExpertStore::abandon_expectations() {
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
        }
    }
    try {
        lanes_.wait(arriving);
    } catch (const SystemError&) {
        drop_failed();
    }
    order_->seek(serving_);
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

}  // namespace edgemoe
