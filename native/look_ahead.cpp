#include "look_ahead.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>

#include "float_rows.h"

namespace edgemoe {

namespace {

constexpr double kMemory = 256;      // guesses that trust is the mean of
constexpr double kEnough = 16;       // guesses before which there is no mistrust
constexpr double kWorthwhile = 0.5;  // a read that comes true saves waiting, a wrong one costs the disk's time
constexpr int64_t kSample = 32;      // tokens of a batch that are asked about, at most
constexpr int kF32 = 0;              // GGML_TYPE_F32
constexpr int kDeepest = 12;         // nodes between a router and its selected ids

std::string name_in(int layer, const char* rest) { return "blk." + std::to_string(layer) + "." + rest; }

// The node that multiplies this router's weights, or null.
const ggml::Tensor* find_router(const ggml::Tensor* node, const std::string& weights, int depth) {
    for (; node != nullptr && depth > 0; --depth) {
        if (node->src[0] != nullptr && weights == node->src[0]->name) {
            return node;
        }
        node = node->src[0] != nullptr ? node->src[0] : node->view_src;
    }
    return nullptr;
}

}  // namespace

LookAhead::Router& LookAhead::router_of(int layer) {
    const auto found = routers_.find(layer);
    if (found != routers_.end()) {
        return found->second;
    }
    return routers_
        .emplace(layer, Router{name_in(layer - 1, ""), name_in(layer - 1, "ffn_gate_inp.weight"),
                               buffer_.dense(name_in(layer, "ffn_gate_inp.weight")),
                               buffer_.dense(name_in(layer, "ffn_gate_inp.bias")),
                               buffer_.dense(name_in(layer, "exp_probs_b.bias")), std::nullopt})
        .first->second;
}

std::vector<int32_t> LookAhead::rows_of(int layer, const ggml::Tensor* top_k, int64_t n_tokens) {
    auto& [before, before_weights, weights, bias, selection_bias, copy] = router_of(layer);
    const ggml::Tensor* router = find_router(top_k, before_weights, kDeepest);
    if (weights == nullptr || router == nullptr || router->src[1] == nullptr || weights->type != kF32 ||
        router->src[1]->type != kF32 || router->src[1]->ne[0] != weights->ne[0]) {
        return {};
    }
    const ggml::Tensor* input = router->src[1];
    const int64_t n_embd = weights->ne[0], n_expert = weights->ne[1], n_used = top_k->ne[0];
    // The input is a normalized vector times this layer's norm weights; the next layer has its own.
    const float *norm = nullptr, *next_norm = nullptr;
    for (const ggml::Tensor* factor : {input->src[0], input->src[1]}) {
        if (factor != nullptr && factor->type == kF32 && factor->ne[0] == n_embd &&
            std::strncmp(factor->name, before.c_str(), before.size()) == 0) {
            if (const ggml::Tensor* next = buffer_.dense(name_in(layer, factor->name + before.size()))) {
                norm = row_of(factor, 0);
                next_norm = row_of(next, 0);
            }
        }
    }
    if (!copy) {
        copy.emplace(*weights);
    }
    std::vector<float> state(static_cast<size_t>(n_embd));
    std::vector<int32_t> order(static_cast<size_t>(n_expert)), rows;
    const int64_t step = (n_tokens + kSample - 1) / kSample;
    for (int64_t back = 1; back <= n_tokens; back += step) {
        const int64_t token = input->ne[1] - back;
        const float* given = row_of(input, token);
        for (int64_t i = 0; i < n_embd; ++i) {
            state[i] = norm != nullptr && norm[i] != 0 ? given[i] / norm[i] * next_norm[i] : given[i];
        }
        std::vector<float> scores = copy->scores(state);
        for (int64_t expert = 0; expert < n_expert; ++expert) {
            float& score = scores[static_cast<size_t>(expert)];
            score += bias != nullptr ? row_of(bias, 0)[expert] : 0;
            if (selection_bias != nullptr) {
                score = 1 / (1 + std::exp(-score)) + row_of(selection_bias, 0)[expert];
            }
        }
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + n_used, order.end(),
                          [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
        rows.insert(rows.end(), order.begin(), order.begin() + n_used);
    }
    return rows;
}

std::vector<int32_t> LookAhead::guess(int layer, const ggml::Tensor* top_k, int64_t n_tokens,
                                      const std::vector<int32_t>& told) {
    const std::vector<int32_t> said = rows_of(layer, top_k, n_tokens);
    return guess_from(layer, told.empty() ? said : told, static_cast<size_t>(top_k->ne[0]));
}

std::vector<int32_t> LookAhead::guess_from(int layer, const std::vector<int32_t>& rows, size_t n_used) {
    if (!rows.empty()) {
        store_.check_experts(layer, rows);
    }
    std::vector<Guess> guesses;
    if (rows.size() <= n_used) {
        for (size_t rank = 0; rank < rows.size(); ++rank) {
            guesses.push_back({rows[rank], std::min(rank, kRanks - 1)});
        }
        return worthwhile(layer, std::move(guesses));
    }
    std::vector<size_t> count(static_cast<size_t>(store_.n_expert(layer)), 0);
    for (const int32_t expert : rows) {
        if (count[expert]++ == 0) {
            guesses.push_back({expert, 0});
        }
    }
    for (Guess& guess : guesses) {
        guess.rank = kRanks + std::min(count[guess.expert], kCounts);
    }
    std::stable_sort(guesses.begin(), guesses.end(), [&](const Guess& a, const Guess& b) { return a.rank > b.rank; });
    return worthwhile(layer, std::move(guesses));
}

std::vector<int32_t> LookAhead::worthwhile(int layer, std::vector<Guess> guesses) {
    guessed_layer_ = layer;
    by_layer_.resize(std::max(by_layer_.size(), static_cast<size_t>(layer) + 1));
    absent_.clear();
    std::vector<int32_t> experts;
    for (const Guess& guess : guesses) {
        const bool absent = !store_.resident(layer, guess.expert);
        if (absent) {
            absent_.push_back(guess);
        }
        if (!absent || chance(layer, guess.rank) >= kWorthwhile) {
            experts.push_back(guess.expert);
        }
    }
    return experts;
}

void LookAhead::settle(int layer, const std::vector<int32_t>& experts) {
    if (layer != guessed_layer_) {
        return;
    }
    guessed_layer_ = -1;
    for (const Guess& guess : absent_) {
        const bool right = std::find(experts.begin(), experts.end(), guess.expert) != experts.end();
        by_rank_[guess.rank].add(right);
        if (guess.rank < kRanks) {
            all_.add(right);
            by_layer_[layer].add(right);
        }
    }
}

void LookAhead::Trust::add(bool right) {
    watched = std::min(watched + 1, kMemory);
    share += ((right ? 1 : 0) - share) / watched;
}

// As if rank and layer mattered independently: there are too many pairs of them to watch each.
double LookAhead::chance(int layer, size_t rank) const {
    const Trust& of_rank = by_rank_[rank];
    const Trust& of_layer = by_layer_[layer];
    if (rank >= kRanks) {
        return of_rank.watched < kEnough ? 1 : of_rank.share;
    }
    if (of_rank.watched < kEnough || of_layer.watched < kEnough || all_.share == 0) {
        return 1;
    }
    return of_rank.share * of_layer.share / all_.share;
}

}  // namespace edgemoe
