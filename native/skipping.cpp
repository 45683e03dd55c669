#include "skipping.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "mapped_file.h"

namespace edgemoe {

namespace {

constexpr int kF32 = 0;        // GGML_TYPE_F32
constexpr double kMost = 0.5;  // of the weights: the heaviest expert is always kept

float& weight_of(ggml::Tensor* weights, size_t slot) {
    return *reinterpret_cast<float*>(static_cast<char*>(weights->data) + slot * weights->nb[1]);
}

int32_t& id_of(ggml::Tensor* top_k, size_t slot) {
    return *reinterpret_cast<int32_t*>(static_cast<char*>(top_k->data) + slot * top_k->nb[0]);
}

}  // namespace

void Skipping::bound(double mass, uint64_t cache_bytes) {
    if (!(mass >= 0 && mass <= kMost)) {
        throw SystemError("the router mass that may be skipped is a share from 0 to 0.5, not " + std::to_string(mass));
    }
    bound_ = mass;
    next_position_ = -1;
    top_k_ = nullptr;
    const auto n_layer = static_cast<size_t>(store_.last_layer() + 1);
    std::vector<uint64_t> layer_bytes(n_layer, 0);
    for (int id = 0; id < store_.n_tensors(); ++id) {
        const TensorSpec& spec = store_.tensor(id);
        if (spec.n_expert > 0) {
            layer_bytes[spec.layer] += spec.n_bytes / static_cast<uint64_t>(spec.n_expert);
        }
    }
    std::vector<int> n_expert;
    std::vector<uint64_t> expert_bytes;
    for (size_t layer = 0; layer < n_layer; ++layer) {
        if (store_.n_parts(static_cast<int>(layer)) > 0) {
            n_expert.push_back(store_.n_expert(static_cast<int>(layer)));
            expert_bytes.push_back(layer_bytes[layer]);
        }
    }
    weights_name_.resize(n_layer);
    cache_.resize(std::move(n_expert), std::move(expert_bytes), cache_bytes);
}

void Skipping::begin(int64_t position, int64_t n_tokens) {
    if (position == 0) {
        cache_.clear();
    }
    decoding_ = position > 0 && position == next_position_ && n_tokens == 1;
    next_position_ = position + n_tokens;
    top_k_ = nullptr;
    layer_ = -1;
}

// A conversation's first batch is a prompt, so each layer is known before anything is skipped.
void Skipping::learn(int layer, const ggml::Tensor* weighted) {
    if (weights_name_[layer].empty()) {
        weights_name_[layer] = weighted->src[1]->name;
    }
}

bool Skipping::postpones(int layer, ggml::Tensor* top_k, const std::vector<int32_t>& ids) {
    store_.check_experts(layer, ids);
    if (!decoding_) {
        cache_.routed(store_.number_of(layer), top_k->ne[1], ids);
        cache_.use(store_.number_of(layer), ids);
        return false;
    }
    if (std::exchange(layer_, layer) == layer) {
        return false;  // a second set of experts behind the same router (grovemoe)
    }
    top_k_ = top_k;
    return true;
}

bool Skipping::awaits(const ggml::Tensor* node) const {
    return top_k_ != nullptr && !weights_name_[layer_].empty() && weights_name_[layer_] == node->name;
}

const ggml::Tensor* Skipping::skip(ggml::Tensor* weights, const std::vector<int32_t>& ids) {
    ggml::Tensor* top_k = std::exchange(top_k_, nullptr);
    const size_t n_used = ids.size();
    if (weights->type != kF32 || weights->ne[0] != 1 || weights->ne[1] != static_cast<int64_t>(n_used)) {
        throw SystemError(refusal(layer_));
    }
    std::vector<double> shares(n_used);
    for (size_t slot = 0; slot < n_used; ++slot) {
        shares[slot] = weight_of(weights, slot);
    }
    const double total = std::accumulate(shares.begin(), shares.end(), 0.0);
    for (double& share : shares) {
        share /= total;
    }
    const int number = store_.number_of(layer_);
    const size_t heaviest = static_cast<size_t>(std::max_element(shares.begin(), shares.end()) - shares.begin());
    std::vector<bool> kept(n_used, true);
    double mass = 0;
    for (const size_t slot : skippable(shares, ids)) {
        kept[slot] = false;
        mass += shares[slot];
    }
    std::vector<int32_t> used;
    for (size_t slot = 0; slot < n_used; ++slot) {
        if (kept[slot]) {
            used.push_back(ids[slot]);
        } else {
            weight_of(weights, slot) = 0;
            id_of(top_k, slot) = ids[heaviest];
        }
    }
    if (used.size() < n_used) {
        for (size_t slot = 0; slot < n_used; ++slot) {
            weight_of(weights, slot) = static_cast<float>(weight_of(weights, slot) / (1 - mass));
        }
    }
    cache_.routed(number, 1, ids);
    cache_.use(number, used);
    routed_slots_ += n_used;
    skipped_slots_ += n_used - used.size();
    ++routed_layers_;
    skipped_mass_ = skipped_mass_ + mass;
    return top_k;
}

// Slots of misses, lightest first, as many as the bound allows.
std::vector<size_t> Skipping::skippable(const std::vector<double>& shares, const std::vector<int32_t>& ids) const {
    std::vector<size_t> slots;
    for (size_t slot = 0; slot < ids.size(); ++slot) {
        if (shares[slot] >= 0 && !cache_.holds(store_.number_of(layer_), ids[slot])) {
            slots.push_back(slot);
        }
    }
    std::stable_sort(slots.begin(), slots.end(), [&](size_t a, size_t b) { return shares[a] < shares[b]; });
    double mass = 0;
    const auto too_much = [&](size_t slot) { return !((mass += shares[slot]) <= bound_); };
    slots.erase(std::find_if(slots.begin(), slots.end(), too_much), slots.end());
    return slots;
}

std::string Skipping::refusal(int layer) {
    return "layer " + std::to_string(layer) +
           " does not weigh its experts before they compute, so none can be skipped; leave skip_mass out";
}

}  // namespace edgemoe
