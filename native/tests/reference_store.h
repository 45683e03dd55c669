// The contract of expert_store.h in its plainest form, for requests that are waited for at once and the least recently
// used leaving first: sets, lists and a count for every page. No memory, no files.
#pragma once

#include <algorithm>
#include <list>
#include <map>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "tiny_model.h"

class ReferenceStore {
   public:
    using Slab = std::tuple<int, size_t, int>;  // layer, part, expert
    using Page = std::pair<size_t, uint64_t>;   // tensor, page number in its file

    ReferenceStore(const TinyModel& model, edgemoe::Io io, uint64_t arena_bytes, uint64_t most_idle)
        : model_(model),
          io_(io),
          arena_bytes_(arena_bytes),
          most_idle_(io == edgemoe::Io::mmap ? 0 : most_idle / edgemoe::page_size()) {}

    // False: the request cannot be met.
    bool acquire(int layer, uint32_t parts, const std::vector<int32_t>& experts) {
        return bring(layer, parts, experts, true);
    }
    bool warm(int layer, const std::vector<int32_t>& experts) {
        return bring(layer, model_.all_parts(layer), experts, false);
    }
    uint64_t resident_bytes() const { return pages.size() * edgemoe::page_size(); }

    std::set<Slab> resident;
    std::map<Page, int> pages;  // how many resident slabs need it
    edgemoe::StoreStats stats;

   private:
    using Expert = std::pair<int, int32_t>;  // layer, expert

    bool bring(int layer, uint32_t parts, const std::vector<int32_t>& experts, bool counted) {
        std::vector<int32_t> distinct;
        for (const int32_t expert : experts) {
            if (std::find(distinct.begin(), distinct.end(), expert) == distinct.end()) {
                distinct.push_back(expert);
                order_.remove({layer, expert});
                order_.emplace_back(layer, expert);
            }
        }
        const auto pinned = [&](const Slab& slab) {
            const auto [of_layer, part, expert] = slab;
            return of_layer == layer && (parts >> part & 1) != 0 &&
                   std::find(distinct.begin(), distinct.end(), expert) != distinct.end();
        };
        std::vector<Slab> added;
        uint64_t to_read = 0;
        for (const int32_t expert : distinct) {
            for (size_t part = 0; part < model_.layers[static_cast<size_t>(layer)].slab_bytes.size(); ++part) {
                const Slab slab{layer, part, expert};
                if ((parts >> part & 1) == 0) {
                    continue;
                }
                if (resident.count(slab) != 0) {
                    stats.hits += counted ? 1 : 0;
                    continue;
                }
                stats.misses += counted ? 1 : 0;
                while (resident_bytes() + idle_.size() * edgemoe::page_size() + growth(slab) > arena_bytes_) {
                    if (evict_oldest(pinned) || !std::exchange(idle_, {}).empty()) {
                        continue;
                    }
                    for (const Slab& undone : added) {
                        remove(undone);
                    }
                    return false;
                }
                to_read += bytes_given(slab);
                add(slab);
                added.push_back(slab);
            }
        }
        stats.bytes_read += to_read;
        stats.peak_bytes = std::max(stats.peak_bytes, resident_bytes());
        return true;
    }

    std::vector<Page> pages_of(const Slab& slab) const {
        const auto [layer, part, expert] = slab;
        const size_t id = model_.id_of(layer, part);
        const uint64_t n = model_.slab_bytes(layer, part);
        const uint64_t begin = model_.tensors[id].offset + static_cast<uint64_t>(expert) * n;
        std::vector<Page> needed;
        for (uint64_t page = begin / edgemoe::page_size(); page * edgemoe::page_size() < begin + n; ++page) {
            needed.emplace_back(id, page);
        }
        return needed;
    }
    uint64_t growth(const Slab& slab) const {
        uint64_t n_new = 0;
        for (const Page& page : pages_of(slab)) {
            n_new += pages.count(page) == 0 ? 1 : 0;
        }
        return n_new * edgemoe::page_size();
    }
    uint64_t bytes_given(const Slab& slab) const {
        switch (io_) {
            case edgemoe::Io::direct:
                return pages_of(slab).size() * edgemoe::page_size();
            case edgemoe::Io::mmap:
                return growth(slab);
            case edgemoe::Io::pread:
                break;
        }
        return model_.slab_bytes(std::get<0>(slab), std::get<1>(slab));
    }
    void add(const Slab& slab) {
        resident.insert(slab);
        for (const Page& page : pages_of(slab)) {
            ++pages[page];
            idle_.remove(page);
        }
    }
    void remove(const Slab& slab) {
        resident.erase(slab);
        for (const Page& page : pages_of(slab)) {
            if (--pages[page] == 0) {
                pages.erase(page);
                if (shares(slab, page)) {
                    idle_.push_back(page);
                }
            }
        }
        while (idle_.size() > most_idle_) {
            idle_.pop_front();
        }
    }
    // The slab has pages of its own, and this is another.
    bool shares(const Slab& slab, const Page& page) const {
        const auto [layer, part, expert] = slab;
        const uint64_t n = model_.slab_bytes(layer, part);
        const uint64_t begin = model_.tensors[page.first].offset + static_cast<uint64_t>(expert) * n;
        const uint64_t first = edgemoe::page_ceil(begin) / edgemoe::page_size();
        const uint64_t last = edgemoe::page_floor(begin + n) / edgemoe::page_size();
        return first < last && (page.second < first || page.second >= last);
    }
    // Of the entry that was not asked for longest, everything that this request does not need.
    template <typename Pinned>
    bool evict_oldest(const Pinned& pinned) {
        return std::any_of(order_.begin(), order_.end(), [&](const Expert& entry) { return evict(entry, pinned); });
    }
    template <typename Pinned>
    bool evict(const Expert& entry, const Pinned& pinned) {
        bool any = false;
        for (size_t part = 0; part < edgemoe::kMaxParts; ++part) {
            const Slab slab{entry.first, part, entry.second};
            if (resident.count(slab) != 0 && !pinned(slab)) {
                remove(slab);
                ++stats.evictions;
                any = true;
            }
        }
        return any;
    }

    const TinyModel& model_;
    const edgemoe::Io io_;
    const uint64_t arena_bytes_;
    const uint64_t most_idle_;
    std::list<Expert> order_;
    std::list<Page> idle_;  // needed by no resident slab, but kept; the oldest first
};
