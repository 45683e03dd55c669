// A model in miniature: files of random bytes with tensors at odd offsets, and a store over it.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "expert_store.h"
#include "scratch_file.h"

struct TinyLayer {
    int n_expert;
    std::vector<uint64_t> slab_bytes;  // by part; empty: a layer without experts
};

class TinyModel {
   public:
    TinyModel(std::vector<TinyLayer> layers, std::vector<uint64_t> dense_bytes, int n_files, uint64_t seed)
        : layers(std::move(layers)) {
        std::mt19937_64 random(seed);
        std::vector<uint64_t> sizes(static_cast<size_t>(n_files), 0);
        const auto lay_out = [&](const std::string& name, uint64_t n_bytes, int layer, int n_expert) {
            const auto file = static_cast<int>(random() % sizes.size());
            uint64_t& end = sizes[static_cast<size_t>(file)];
            end += random() % 5000;
            tensors.push_back({name, file, end, n_bytes, layer, n_expert});
            end += n_bytes;
        };
        for (size_t i = 0; i < dense_bytes.size(); ++i) {
            lay_out("dense." + std::to_string(i), dense_bytes[i], -1, 0);
        }
        for (size_t l = 0; l < this->layers.size(); ++l) {
            const TinyLayer& layer = this->layers[l];
            for (size_t part = 0; part < layer.slab_bytes.size(); ++part) {
                lay_out("blk." + std::to_string(l) + ".part" + std::to_string(part),
                        layer.slab_bytes[part] * static_cast<uint64_t>(layer.n_expert), static_cast<int>(l),
                        layer.n_expert);
            }
        }
        for (size_t i = 0; i < sizes.size(); ++i) {
            files.push_back(std::make_unique<ScratchFile>(random_bytes(sizes[i], seed + i)));
        }
    }

    size_t id_of(int layer, size_t part) const {
        for (size_t id = 0; id < tensors.size(); ++id) {
            if (tensors[id].layer == layer && part-- == 0) {
                return id;
            }
        }
        throw std::out_of_range("no such part");
    }
    uint64_t slab_bytes(int layer, size_t part) const { return layers[static_cast<size_t>(layer)].slab_bytes[part]; }
    const std::byte* bytes_of(size_t id) const {
        return files[static_cast<size_t>(tensors[id].file)]->bytes().data() + tensors[id].offset;
    }
    uint32_t all_parts(int layer) const { return (1U << layers[static_cast<size_t>(layer)].slab_bytes.size()) - 1; }

    const std::vector<TinyLayer> layers;
    std::vector<edgemoe::TensorSpec> tensors;
    std::vector<std::unique_ptr<ScratchFile>> files;
};

inline void skip_without(edgemoe::Io io, const TinyModel& model) {
    std::string why;
    if (io == edgemoe::Io::direct && !edgemoe::ExpertStore::probe_direct(model.files.front()->path(), 0, why)) {
        throw check::Skipped(why);
    }
}

// The tensors of a model placed one after another, as a ggml buffer would.
class PlacedStore {
   public:
    PlacedStore(const TinyModel& model, edgemoe::Io io, int n_lanes, uint64_t arena_bytes, edgemoe::Tuning tuning = {},
                uint64_t read_bytes = uint64_t{1} << 20)
        : model_(model) {
        skip_without(io, model);
        store_ = std::make_unique<edgemoe::ExpertStore>(io, n_lanes, arena_bytes, tuning, read_bytes);
        for (const auto& file : model.files) {
            store_->add_file(file->path());
        }
        std::vector<uint64_t> starts;
        uint64_t end = 0;
        for (const edgemoe::TensorSpec& spec : model.tensors) {
            const int id = store_->add_tensor(spec);
            starts.push_back(end);
            end += store_->place_size(id);
            end += 64 - end % 64;
        }
        size_ = edgemoe::page_ceil(end);
        base_ = edgemoe::reserve_memory(size_);
        if (io == edgemoe::Io::mmap) {
            store_->watch(base_, size_);
        }
        for (size_t id = 0; id < starts.size(); ++id) {
            places_.push_back(store_->place(static_cast<int>(id), base_ + starts[id]));
            CHECK(places_[id] >= base_ + starts[id]);
            CHECK(places_[id] + model.tensors[id].n_bytes <=
                  base_ + starts[id] + store_->place_size(static_cast<int>(id)));
        }
    }
    ~PlacedStore() {
        store_.reset();
        edgemoe::release_memory(base_, size_);
    }
    PlacedStore(const PlacedStore&) = delete;
    PlacedStore& operator=(const PlacedStore&) = delete;

    edgemoe::ExpertStore* operator->() { return store_.get(); }
    edgemoe::ExpertStore& operator*() { return *store_; }
    std::byte* place(size_t id) const { return places_[id]; }
    std::byte* base() const { return base_; }
    uint64_t size() const { return size_; }

    std::byte* slab(int layer, size_t part, int expert) const {
        if (store_->in_slots()) {
            const edgemoe::SlotView view = store_->slots_of(static_cast<int>(model_.id_of(layer, part)));
            return view.first + static_cast<uint64_t>(store_->slot(layer, expert)) * view.stride;
        }
        return places_[model_.id_of(layer, part)] + static_cast<uint64_t>(expert) * model_.slab_bytes(layer, part);
    }
    bool holds(int layer, size_t part, int expert) const {
        const uint64_t n = model_.slab_bytes(layer, part);
        const std::byte* expected = model_.bytes_of(model_.id_of(layer, part)) + static_cast<uint64_t>(expert) * n;
        return std::memcmp(slab(layer, part, expert), expected, n) == 0;
    }
    bool holds(int layer, const std::vector<int32_t>& experts) const {
        for (size_t part = 0; part < model_.layers[static_cast<size_t>(layer)].slab_bytes.size(); ++part) {
            for (const int32_t expert : experts) {
                if (!holds(layer, part, expert)) {
                    return false;
                }
            }
        }
        return true;
    }

    void check_consistent() const {
        const edgemoe::StoreStats stats = store_->stats();
        CHECK(stats.expected_hits <= stats.hits);
        CHECK(stats.wasted_bytes <= stats.expected_bytes);
        CHECK(stats.resident_bytes <= stats.peak_bytes);
        CHECK(stats.peak_bytes <= store_->arena_bytes());
    }

   private:
    const TinyModel& model_;
    std::unique_ptr<edgemoe::ExpertStore> store_;
    std::byte* base_ = nullptr;
    uint64_t size_ = 0;
    std::vector<std::byte*> places_;
};
