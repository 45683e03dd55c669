#include "expert_mask.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "mapped_file.h"

namespace edgemoe {

void ExpertMask::keep(int layer, int n_expert, const std::vector<int32_t>& experts) {
    std::vector<uint8_t> kept(experts.empty() ? 0 : n_expert, 0);
    for (const int32_t expert : experts) {
        if (expert < 0 || expert >= n_expert) {
            throw SystemError("layer " + std::to_string(layer) + " has no expert " + std::to_string(expert) +
                              ": it has " + std::to_string(n_expert));
        }
        kept[expert] = 1;
    }
    if (std::find(kept.begin(), kept.end(), 0) == kept.end()) {
        kept.clear();
    }
    kept_.resize(std::max(kept_.size(), static_cast<size_t>(layer) + 1));
    kept_[layer] = std::move(kept);
}

void ExpertMask::exclude(int layer, ggml::Tensor* scores) const {
    const std::vector<uint8_t>& kept = kept_[layer];
    if (scores->ne[0] != static_cast<int64_t>(kept.size())) {
        throw SystemError(std::string(scores->name) + " scores " + std::to_string(scores->ne[0]) +
                          " experts, but the layer has " + std::to_string(kept.size()));
    }
    for (int64_t token = 0; token < scores->ne[1]; ++token) {
        auto* row =
            reinterpret_cast<float*>(static_cast<char*>(scores->data) + static_cast<size_t>(token) * scores->nb[1]);
        for (size_t expert = 0; expert < kept.size(); ++expert) {
            if (kept[expert] == 0) {
                row[expert] = -std::numeric_limits<float>::infinity();
            }
        }
    }
}

void ExpertMask::refuse(int layer) {
    throw SystemError("layer " + std::to_string(layer) +
                      " does not select its experts in one step from its router's scores, so it cannot be limited to " +
                      "some of them; keep every expert of this layer");
}

void ExpertMask::select_again(int layer, ggml::Tensor* top_k) const {
    const std::vector<uint8_t>& kept = kept_[layer];
    const ggml::Tensor* ranking = top_k->view_src;
    const auto n_used = static_cast<size_t>(top_k->ne[0]);
    if (ranking == nullptr || ranking->ne[0] != static_cast<int64_t>(kept.size()) || ranking->data != top_k->data) {
        refuse(layer);
    }
    std::vector<int32_t> selected;
    for (int64_t token = 0; token < top_k->ne[1]; ++token) {
        const auto* order = reinterpret_cast<const int32_t*>(static_cast<const char*>(ranking->data) +
                                                             static_cast<size_t>(token) * ranking->nb[1]);
        selected.clear();
        for (size_t rank = 0; rank < kept.size() && selected.size() < n_used; ++rank) {
            if (order[rank] >= 0 && static_cast<size_t>(order[rank]) < kept.size() && kept[order[rank]] != 0) {
                selected.push_back(order[rank]);
            }
        }
        if (selected.size() < n_used) {
            throw SystemError("layer " + std::to_string(layer) + " uses " + std::to_string(n_used) +
                              " experts for each token, but fewer are kept; keep at least as many");
        }
        std::memcpy(static_cast<char*>(top_k->data) + static_cast<size_t>(token) * top_k->nb[1], selected.data(),
                    n_used * sizeof(int32_t));
    }
}

}  // namespace edgemoe
