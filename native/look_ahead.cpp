#include "look_ahead.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>

#include "float_rows.h"
#include "graph_node.h"

namespace edgemoe {

namespace {

constexpr double kMemory = 256;      // guesses that trust is the mean of
constexpr double kEnough = 16;       // guesses before which there is no mistrust
constexpr double kWorthwhile = 0.5;  // a read that comes true saves waiting, a wrong one costs the disk's time
constexpr double kBusy = 0.5;        // share of the time
constexpr double kTokens = 8;        // tokens that it is the mean of
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
        .emplace(layer, Router{name_in(layer, ""), name_in(layer, "ffn_gate_inp.weight"),
                               buffer_.dense(name_in(layer, "ffn_gate_inp.weight")),
                               buffer_.dense(name_in(layer, "ffn_gate_inp.bias")),
                               buffer_.dense(name_in(layer, "exp_probs_b.bias")), std::nullopt})
        .first->second;
}

std::vector<int32_t> LookAhead::rows_of(int layer, const ggml::Tensor* top_k, int64_t n_tokens) {
    const Router& here = router_of(node_named(top_k->name).layer);
    auto& [prefix, name, weights, bias, selection_bias, copy] = router_of(layer);
    const ggml::Tensor* router = find_router(top_k, here.name, kDeepest);
    if (weights == nullptr || router == nullptr || router->src[1] == nullptr || weights->type != kF32 ||
        router->src[1]->type != kF32 || router->src[1]->ne[0] != weights->ne[0]) {
        return {};
    }
    const ggml::Tensor* input = router->src[1];
    const int64_t n_embd = weights->ne[0], n_expert = weights->ne[1], n_used = top_k->ne[0];
    // The input is a normalized vector times this layer's norm weights; the other layer has its own.
    const float *norm = nullptr, *its_norm = nullptr;
    for (const ggml::Tensor* factor : {input->src[0], input->src[1]}) {
        if (factor != nullptr && factor->type == kF32 && factor->ne[0] == n_embd &&
            std::strncmp(factor->name, here.prefix.c_str(), here.prefix.size()) == 0) {
            if (const ggml::Tensor* its = buffer_.dense(prefix + (factor->name + here.prefix.size()))) {
                norm = row_of(factor, 0);
                its_norm = row_of(its, 0);
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
            state[i] = norm != nullptr && norm[i] != 0 ? given[i] / norm[i] * its_norm[i] : given[i];
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

std::vector<int32_t> LookAhead::guess(int layer, int ahead, const ggml::Tensor* top_k, int64_t n_tokens,
                                      const std::vector<int32_t>& told) {
    const std::vector<int32_t> said = rows_of(layer, top_k, n_tokens);
    return guess_from(layer, ahead, told.empty() ? said : told, static_cast<size_t>(top_k->ne[0]));
}

std::vector<int32_t> LookAhead::guess_from(int layer, int ahead, const std::vector<int32_t>& rows, size_t n_used) {
    if (!rows.empty()) {
        store_.check_experts(layer, rows);
    }
    std::vector<Guess> guesses;
    if (rows.size() <= n_used) {
        for (size_t rank = 0; rank < rows.size(); ++rank) {
            guesses.push_back({rows[rank], std::min(rank, kRanks - 1)});
        }
        return worthwhile(layer, ahead, guesses);
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
    return worthwhile(layer, ahead, guesses);
}

std::vector<int32_t> LookAhead::worthwhile(int layer, int ahead, const std::vector<Guess>& guesses) {
    Record& record = records_[ahead - 1];
    const size_t n_layers = std::max(record.by_layer.size(), static_cast<size_t>(layer) + 1);
    record.by_layer.resize(n_layers);
    record.absent.resize(n_layers);
    record.absent[layer].clear();
    std::vector<int32_t> experts;
    for (const Guess& guess : guesses) {
        const bool absent = !store_.resident(layer, guess.expert);
        if (absent) {
            record.absent[layer].push_back(guess);
        }
        if (!absent || record.chance(layer, guess.rank) >= kWorthwhile) {
            experts.push_back(guess.expert);
        }
    }
    return experts;
}

void LookAhead::settle(int layer, const std::vector<int32_t>& experts) {
    for (Record& record : records_) {
        if (layer >= static_cast<int>(record.absent.size())) {
            continue;
        }
        for (const Guess& guess : record.absent[layer]) {
            record.watch(layer, guess, std::find(experts.begin(), experts.end(), guess.expert) != experts.end());
        }
        record.absent[layer].clear();
    }
}

void LookAhead::begin(int64_t n_tokens) {
    const uint64_t now = now_ns(), busy = store_.busy_ns();
    if (n_tokens == 1 && n_tokens_ == 1) {
        const double passed = static_cast<double>(std::max<uint64_t>(now - began_ns_, 1));
        busy_share_ += (static_cast<double>(busy - busy_ns_) / passed - busy_share_) / kTokens;
    }
    n_tokens_ = n_tokens;
    began_ns_ = now;
    busy_ns_ = busy;
    for (Record& record : records_) {
        for (std::vector<Guess>& absent : record.absent) {
            absent.clear();
        }
    }
}

int LookAhead::farthest() const { return n_tokens_ == 1 && busy_share_ > kBusy ? kFarthest : 1; }

void LookAhead::Trust::add(bool right) {
    watched = std::min(watched + 1, kMemory);
    share += ((right ? 1 : 0) - share) / watched;
}

void LookAhead::Record::watch(int layer, const Guess& guess, bool right) {
    by_rank[guess.rank].add(right);
    if (guess.rank < kRanks) {
        all.add(right);
        by_layer[layer].add(right);
    }
}

// As if rank and layer mattered independently: there are too many pairs of them to watch each.
double LookAhead::Record::chance(int layer, size_t rank) const {
    const Trust& of_rank = by_rank[rank];
    const Trust& of_layer = by_layer[layer];
    if (rank >= kRanks) {
        return of_rank.watched < kEnough ? 1 : of_rank.share;
    }
    if (of_rank.watched < kEnough || of_layer.watched < kEnough || all.share == 0) {
        return 1;
    }
    return of_rank.share * of_layer.share / all.share;
}

}  // namespace edgemoe
