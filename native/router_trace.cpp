#include "router_trace.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "float_rows.h"
#include "graph_node.h"

namespace edgemoe {

void RouterTrace::watch(const std::vector<int>& layers, bool outputs) {
    forget();
    watched_.clear();
    for (const int layer : layers) {
        watched_.resize(std::max(watched_.size(), static_cast<size_t>(layer) + 1), false);
        watched_[layer] = true;
    }
    outputs_ = outputs;
}

void RouterTrace::forget() {
    layers_.clear();
    residual_layer_ = routed_layer_ = weighted_layer_ = -1;
}

LayerTrace& RouterTrace::of(int layer) {
    layers_.resize(std::max(layers_.size(), static_cast<size_t>(layer) + 1));
    return layers_[layer];
}

void RouterTrace::add_logits(int layer, const ggml::Tensor* logits) {
    LayerTrace& trace = of(layer);
    trace.n_expert = logits->ne[0];
    for (int64_t token = 0; token < logits->ne[1]; ++token) {
        const float* row = row_of(logits, token);
        trace.logits.insert(trace.logits.end(), row, row + logits->ne[0]);
    }
}

// The bias itself is added, not the sum copied: in the sum a mask has already put -inf.
void RouterTrace::add_router_bias(int layer, const ggml::Tensor* biased) {
    std::vector<float>& logits = of(layer).logits;
    const auto n_expert = static_cast<size_t>(biased->ne[0]);
    const float* bias = row_of(biased->src[1], 0);
    for (size_t i = logits.size() - n_expert * static_cast<size_t>(biased->ne[1]); i < logits.size(); ++i) {
        logits[i] += bias[i % n_expert];
    }
}

void RouterTrace::add_residual(int layer, const ggml::Tensor* residual) {
    residual_layer_ = layer;
    residual_.clear();
    for (int64_t token = 0; token < residual->ne[1]; ++token) {
        const float* row = row_of(residual, token);
        residual_.insert(residual_.end(), row, row + residual->ne[0]);
    }
}

void RouterTrace::add_ids(int layer, const std::vector<int32_t>& ids, int64_t n_used) {
    LayerTrace& trace = of(layer);
    trace.n_used = n_used;
    trace.ids.insert(trace.ids.end(), ids.begin(), ids.end());
    routed_layer_ = layer;
}

// The product's second operand, the weights, still lies in memory: the graph has computed nothing since.
bool RouterTrace::add_weighted(int layer, const ggml::Tensor* weighted) {
    if (std::exchange(routed_layer_, -1) != layer) {
        return true;  // of experts that nobody asked about
    }
    LayerTrace& trace = of(layer);
    const ggml::Tensor* weights = weighted->src[1];
    for (int64_t token = 0; token < weighted->ne[2]; ++token) {
        for (int64_t slot = 0; slot < weighted->ne[1]; ++slot) {
            trace.weights.push_back(*row_of(weights, slot, token));
        }
    }
    if (node_named(weighted->src[0]->name).kind != NodeKind::outputs) {
        weighted_layer_ = layer;
        return false;
    }
    add_contributions(layer, weighted);
    return true;
}

void RouterTrace::add_outputs(int layer, const ggml::Tensor* outputs) {
    weighted_layer_ = -1;
    add_contributions(layer, outputs);
}

// What each chosen expert adds to the residual stream, [n_embd, n_used, n_tokens]; the weights are known.
void RouterTrace::add_contributions(int layer, const ggml::Tensor* parts) {
    LayerTrace& trace = of(layer);
    const int64_t n_embd = parts->ne[0];
    const bool comparable =
        std::exchange(residual_layer_, -1) == layer && residual_.size() == static_cast<size_t>(n_embd * parts->ne[2]);
    sum_.resize(static_cast<size_t>(n_embd));
    for (int64_t token = 0; token < parts->ne[2]; ++token) {
        std::fill(sum_.begin(), sum_.end(), 0.0F);
        for (int64_t slot = 0; slot < parts->ne[1]; ++slot) {
            const float* part = row_of(parts, slot, token);
            const float weight = trace.weights[trace.norms.size()];
            const float length = std::sqrt(dot(part, part, n_embd));
            trace.norms.push_back(weight != 0 ? length / std::abs(weight) : 0);
            for (int64_t i = 0; i < n_embd; ++i) {
                sum_[i] += part[i];
            }
        }
        float change = std::numeric_limits<float>::quiet_NaN();
        if (comparable) {
            const float* before = residual_.data() + token * n_embd;
            const float across = dot(before, before, n_embd);
            const float inner = across + dot(before, sum_.data(), n_embd);
            const float after = across + 2 * dot(before, sum_.data(), n_embd) + dot(sum_.data(), sum_.data(), n_embd);
            const float lengths = std::sqrt(across) * std::sqrt(std::max(after, 0.0F));
            change = lengths > 0 ? std::max(0.0F, 1 - inner / lengths) : 0;
        }
        trace.change.push_back(change);
    }
}

LayerTrace RouterTrace::take(int layer) {
    const bool known = layer >= 0 && static_cast<size_t>(layer) < layers_.size();
    return known ? std::exchange(layers_[layer], {}) : LayerTrace{};
}

}  // namespace edgemoe
