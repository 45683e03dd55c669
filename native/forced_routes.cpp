#include "forced_routes.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "graph_node.h"
#include "mapped_file.h"

namespace edgemoe {

void ForcedRoutes::set(std::vector<int> layers, std::vector<int32_t> ids, int64_t n_used) {
    const auto n_columns = static_cast<int64_t>(layers.size());
    if (n_columns * n_used == 0 ? !ids.empty() : static_cast<int64_t>(ids.size()) % (n_columns * n_used) != 0) {
        throw SystemError("routes to force are [tokens, layers, experts of a token], but these have " +
                          std::to_string(ids.size()) + " numbers for " + std::to_string(n_columns) + " layers");
    }
    if (std::any_of(layers.begin(), layers.end(), [](int layer) { return layer < 0; })) {
        throw SystemError("routes were to be forced in a layer with a negative number");
    }
    column_.clear();
    for (size_t i = 0; i < layers.size(); ++i) {
        column_.resize(std::max(column_.size(), static_cast<size_t>(layers[i]) + 1), -1);
        column_[layers[i]] = static_cast<int>(i);
    }
    first_layer_ = layers.empty() ? -1 : layers.front();
    n_used_ = n_used;
    n_columns_ = n_columns;
    n_rows_ = ids.empty() ? 0 : static_cast<int64_t>(ids.size()) / (n_columns * n_used);
    ids_ = std::move(ids);
    predictions_.clear();
    batch_end_ = 0;
}

void ForcedRoutes::set_predictions(std::vector<int32_t> ids) {
    if (!ids.empty() && (ids_.empty() || ids.size() % ids_.size() != 0)) {
        throw SystemError(std::to_string(ids.size()) + " experts are predicted for " + std::to_string(ids_.size()) +
                          " that are forced; give as many for each layer ahead");
    }
    predictions_ = std::move(ids);
}

void ForcedRoutes::apply(int layer, ggml::Tensor* top_k) {
    const int64_t n_tokens = top_k->ne[1];
    if (top_k->ne[0] != n_used_) {
        throw SystemError("routes to force have " + std::to_string(n_used_) + " experts for each token, but layer " +
                          std::to_string(layer) + " selects " + std::to_string(top_k->ne[0]));
    }
    if (layer == first_layer_) {
        batch_end_ += n_tokens;
    }
    if (batch_end_ > n_rows_ || n_tokens > batch_end_) {
        throw SystemError("routes to force were given for " + std::to_string(n_rows_) +
                          " tokens, and more are computed");
    }
    for (int64_t token = 0; token < n_tokens; ++token) {
        std::memcpy(static_cast<char*>(top_k->data) + static_cast<size_t>(token) * top_k->nb[1],
                    ids_.data() + at(layer, batch_end_ - n_tokens + token),
                    static_cast<size_t>(n_used_) * sizeof(int32_t));
    }
}

std::vector<int32_t> ForcedRoutes::predicted(int layer, int ahead, int64_t n_tokens) const {
    std::vector<int32_t> ids;
    const auto first = static_cast<int64_t>(ids_.size()) * (ahead - 1);
    if (first >= static_cast<int64_t>(predictions_.size()) || !forces(layer) || n_tokens > batch_end_) {
        return ids;
    }
    for (int64_t token = batch_end_ - n_tokens; token < batch_end_; ++token) {
        const auto row = predictions_.begin() + first + at(layer, token);
        ids.insert(ids.end(), row, row + n_used_);
    }
    return ids;
}

bool RouteForcer::on_node(ggml::Tensor* node, bool ask, void* self) {
    auto* forcer = static_cast<RouteForcer*>(self);
    const Node is = node_named(node->name);
    const bool forced = is.kind == NodeKind::top_k && forcer->routes_.forces(is.layer);
    if (ask) {
        return forced;
    }
    try {
        if (forced) {
            forcer->routes_.apply(is.layer, node);
        }
    } catch (const std::exception& error) {
        const std::lock_guard<std::mutex> lock(forcer->mutex_);
        forcer->failure_ = error.what();
        return false;
    }
    return true;
}

void RouteForcer::force(std::vector<int> layers, std::vector<int32_t> ids, int64_t n_used) {
    routes_.set(std::move(layers), std::move(ids), n_used);
    const std::lock_guard<std::mutex> lock(mutex_);
    failure_.clear();
}

std::string RouteForcer::failure() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return failure_;
}

}  // namespace edgemoe
