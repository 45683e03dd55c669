// A model of three layers behind a store, a buffer and a hook, as the backend connects them.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "fake_ggml.h"
#include "tiny_model.h"

constexpr uint64_t kPlenty = uint64_t{1} << 30;
constexpr int kExperts = 8;

// Three layers of three parts; the second has no experts.
inline TinyModel moe_model(uint64_t slab_bytes) {
    return {
        {{kExperts, {slab_bytes, slab_bytes, slab_bytes}}, {0, {}}, {kExperts, {slab_bytes, slab_bytes, slab_bytes}}},
        {100},
        1,
        1};
}

class Running {
   public:
    Running(const TinyModel& model, edgemoe::Io io, uint64_t arena_bytes, edgemoe::Tuning tuning = {}, int n_lanes = 2,
            uint64_t lent_bytes = 0)
        : model_(model), api(fake_ggml::make_api()) {
        skip_without(io, model);
        CHECK_EQUAL(api.check_layout(), "");
        store = std::make_unique<edgemoe::ExpertStore>(io, n_lanes, arena_bytes, tuning);
        for (const auto& file : model.files) {
            store->add_file(file->path());
        }
        for (const edgemoe::TensorSpec& spec : model.tensors) {
            store->add_tensor(spec);
        }
        buffer = std::make_unique<edgemoe::ExpertBuffer>(*store, api);
        loaded = std::make_unique<fake_ggml::LoadedModel>(model, *buffer);
        CHECK_EQUAL(loaded->status, edgemoe::ggml::kStatusSuccess);
        buffer->restore_names();
        store->use_slots(0, lent_bytes);
        hook = std::make_unique<edgemoe::RouterHook>(*store, *buffer, api);
        hook->lend(lent_bytes);
    }

    // A layer as llama.cpp builds it: argsort, a strided view of it, then a MUL_MAT_ID for each part. The ids exist
    // only once the argsort has been computed, and each MUL_MAT_ID compares the experts it reads with the file.
    void add_layer(fake_ggml::Graph& graph, int layer, const std::vector<std::vector<int32_t>>& ids,
                   std::vector<size_t> parts = {0, 1, 2}, const std::string& top_k_name = "",
                   edgemoe::ggml::Buffer* batch_memory = nullptr) {
        const auto n_tokens = static_cast<int64_t>(ids.size());
        const auto n_used = static_cast<int64_t>(ids.front().size());
        auto& sorted = sorted_.emplace_back(static_cast<size_t>(kExperts * n_tokens), -12345);
        graph.add(
            fake_ggml::make_tensor(fake_ggml::kI32, "ffn_moe_argsort-" + std::to_string(layer), {kExperts, n_tokens}),
            [&sorted, ids](edgemoe::ggml::Tensor*) {
                for (size_t token = 0; token < ids.size(); ++token) {
                    for (size_t k = 0; k < kExperts; ++k) {
                        // Behind the selected ids come those that were not, here with impossible numbers.
                        sorted[token * kExperts + k] = k < ids[token].size() ? ids[token][k] : 1000;
                    }
                }
            });
        edgemoe::ggml::Tensor view = fake_ggml::make_tensor(fake_ggml::kI32, "", {n_used, n_tokens});
        fake_ggml::set_name(&view, top_k_name.empty() ? "ffn_moe_topk-" + std::to_string(layer) : top_k_name);
        view.op = fake_ggml::kOpView;
        view.nb[1] = kExperts * sizeof(int32_t);
        view.data = sorted.data();
        view.buffer = batch_memory;
        edgemoe::ggml::Tensor* top_k = graph.add(view);
        graph.add(fake_ggml::make_tensor(fake_ggml::kF32, "ffn_moe_topk-" + std::to_string(layer) + " (copy)",
                                         {n_used, n_tokens}));
        for (const size_t part : parts) {
            const size_t id = model_.id_of(layer, part);
            edgemoe::ggml::Tensor product =
                fake_ggml::make_tensor(fake_ggml::kF32, "ffn_moe_part-" + std::to_string(layer), {1, n_used, n_tokens});
            product.op = fake_ggml::kOpMulMatId;
            product.src[0] = &loaded->tensors[id];
            product.src[1] = &input_;
            product.src[2] = top_k;
            product.data = results_.emplace_back(static_cast<size_t>(n_used * n_tokens)).data();
            graph.add(product, [this, ids, id, layer, part](edgemoe::ggml::Tensor* node) {
                if (edgemoe::RouterHook::on_abort(hook.get())) {
                    return;  // ggml still computes the node that failed, without its experts; nobody sees the result
                }
                const uint64_t n = model_.slab_bytes(layer, part);
                for (size_t token = 0; token < ids.size(); ++token) {
                    for (size_t slot = 0; slot < ids[token].size(); ++slot) {
                        const uint64_t at = static_cast<uint64_t>(ids[token][slot]) * n;
                        CHECK(fake_ggml::used(*node, token, slot, model_.bytes_of(id) + at, n));
                    }
                }
                ++n_products;
            });
            graph.add(
                fake_ggml::make_tensor(fake_ggml::kF32, "ffn_moe_act-" + std::to_string(layer), {1, n_used, n_tokens}));
        }
    }

    const TinyModel& model_;
    edgemoe::ggml::Api api;
    std::unique_ptr<edgemoe::ExpertStore> store;
    std::unique_ptr<edgemoe::ExpertBuffer> buffer;
    std::unique_ptr<fake_ggml::LoadedModel> loaded;
    std::unique_ptr<edgemoe::RouterHook> hook;
    int n_products = 0;

   private:
    std::deque<std::vector<int32_t>> sorted_;
    std::deque<std::vector<float>> results_;
    edgemoe::ggml::Tensor input_ = fake_ggml::make_tensor(fake_ggml::kF32, "ffn_norm", {1});
};
