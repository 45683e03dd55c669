// A MoE layer that really routes: the nodes of llama.cpp's build_moe_ffn with numbers in them, computed by plain loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "running_hook.h"

using Rows = std::vector<std::vector<float>>;

enum class Routing {
    softmax,          // over all experts
    sigmoid,          // with a bias that counts for selection only
    chosen_softmax,   // gpt-oss: over the chosen ones, and the router has a bias of its own
    named_bias,       // the same, with the sum named as such
    inputs_weighted,  // llama4: weights are multiplied before the experts, which are chosen by logit
    table,            // deepseek4: ids that no router chose
};

class RoutedLayer {
   public:
    static constexpr int64_t kEmbd = 19, kUsed = 2;
    using Tensor = edgemoe::ggml::Tensor;

    RoutedLayer(int layer, size_t n_tokens, Routing routing, uint32_t seed)
        : layer(layer), n_tokens(n_tokens), routing(routing) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        const auto fill = [&](std::vector<float>& numbers, size_t n) {
            numbers.resize(n);
            std::generate(numbers.begin(), numbers.end(), [&] { return normal(random); });
        };
        fill(router_bias, kExperts);
        fill(selection_bias, kExperts);
        fill(raw, n_tokens * kExperts);
        fill(residual, n_tokens * kEmbd);
        fill(outputs, n_tokens * kUsed * kEmbd);
    }

    // Too long for TokenProducts: the layer keeps its MUL_MAT_IDs.
    void lengthen_rows() {
        for (Tensor* input : {&input_, &activations_}) {
            *input = fake_ggml::make_tensor(fake_ggml::kI32, input->name, {1 << 20});
        }
    }

    void add_to(Running& running, fake_ggml::Graph& graph) {
        const auto tokens = static_cast<int64_t>(n_tokens);
        const auto node = [&](const std::string& name, std::vector<int64_t> ne, std::vector<float>& memory) {
            Tensor tensor = fake_ggml::make_tensor(fake_ggml::kF32, name.empty() ? "" : name + "-" + number(), ne);
            memory.resize(static_cast<size_t>(tensor.nb[3]) / sizeof(float));
            tensor.data = memory.data();
            return tensor;
        };
        graph.add(node("ffn_inp", {kEmbd, tokens}, stream_), [this](Tensor*) { stream_ = residual; });
        Tensor* logits =
            graph.add(node("ffn_moe_logits", {kExperts, tokens}, logits_), [this](Tensor*) { logits_ = raw; });
        // Its memory is used again before the experts have answered.
        graph.add(node("ffn_norm", {kEmbd, tokens}, stream_),
                  [this](Tensor*) { std::fill(stream_.begin(), stream_.end(), 1e9F); });
        const bool has_bias = routing == Routing::chosen_softmax || routing == Routing::named_bias;
        bias_ = node("", {kExperts}, router_bias);
        Tensor probs = node(routing == Routing::named_bias ? "ffn_moe_logits_biased" : "ffn_moe_probs",
                            {kExperts, tokens}, probs_);
        probs.src[0] = logits;
        probs.src[1] = has_bias ? &bias_ : nullptr;
        graph.add(probs, [this](Tensor*) { compute_probs(); });
        if (routing == Routing::sigmoid) {
            graph.add(node("ffn_moe_probs_biased", {kExperts, tokens}, selection_), [this](Tensor*) {
                for (size_t i = 0; i < probs_.size(); ++i) {
                    selection_[i] = probs_[i] + selection_bias[i % kExperts];
                }
            });
        }
        Tensor ranking = fake_ggml::make_tensor(fake_ggml::kI32, "ffn_moe_argsort-" + number(), {kExperts, tokens});
        ranking_.resize(n_tokens * kExperts);
        ranking.data = ranking_.data();
        Tensor* ranked = graph.add(ranking, [this](Tensor*) { rank(); });
        Tensor view = fake_ggml::make_tensor(fake_ggml::kI32, "ffn_moe_topk-" + number(), {kUsed, tokens});
        view.op = fake_ggml::kOpView;
        view.nb[1] = ranked->nb[1];
        view.view_src = routing == Routing::table ? nullptr : ranked;
        view.data = ranking_.data();
        Tensor* top_k = graph.add(view);
        weights_tensor_ = node("ffn_moe_weights", {1, kUsed, tokens}, weights_);
        graph.add(weights_tensor_, [this](Tensor*) { weigh(); });
        if (routing == Routing::inputs_weighted) {
            repeated_ = node("", {kEmbd, kUsed, tokens}, inputs_);
            add_weighted(graph, &repeated_);
            graph.add(node("ffn_norm", {1, kUsed, tokens}, weights_),  // the weights' memory, too
                      [this](Tensor*) { std::fill(weights_.begin(), weights_.end(), 1e9F); });
        }
        Tensor* down = nullptr;
        for (size_t part = 0; part < 3; ++part) {
            Tensor product = node(part == 2 ? "ffn_moe_down" : "ffn_moe_up", {kEmbd, kUsed, tokens}, answers_[part]);
            product.op = fake_ggml::kOpMulMatId;
            product.src[0] = &running.loaded->tensors[running.model_.id_of(layer, part)];
            product.src[1] = part == 2 ? &activations_ : &input_;
            product.src[2] = top_k;
            down = graph.add(product, [this, part, &running](Tensor* tensor) { multiply(running, *tensor, part); });
        }
        if (routing != Routing::inputs_weighted) {
            add_weighted(graph, down);
        }
    }

    // ---------------------------------------------------------------- what a reference says, by the textbook

    // Raw logits and, where the router has one, its bias.
    float said(size_t token, size_t expert) const {
        const bool has_bias = routing == Routing::chosen_softmax || routing == Routing::named_bias;
        return raw[token * kExperts + expert] + (has_bias ? router_bias[expert] : 0);
    }
    // The best of the kept experts, and their weights among these alone.
    std::vector<int32_t> chosen(size_t token, const std::vector<int32_t>& kept) const {
        std::vector<int32_t> order = kept;
        const auto score = [&](int32_t expert) {
            const float logit = said(token, static_cast<size_t>(expert));
            return routing == Routing::sigmoid ? sigmoid(logit) + selection_bias[static_cast<size_t>(expert)] : logit;
        };
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return score(a) > score(b); });
        order.resize(kUsed);
        return order;
    }
    float weight(size_t token, int32_t expert, const std::vector<int32_t>& kept) const {
        const float logit = said(token, static_cast<size_t>(expert));
        if (routing == Routing::sigmoid || routing == Routing::inputs_weighted) {
            return sigmoid(logit);
        }
        float sum = 0;
        for (const int32_t other : routing == Routing::softmax ? kept : chosen(token, kept)) {
            sum += std::exp(said(token, static_cast<size_t>(other)));
        }
        return std::exp(logit) / sum;
    }
    // What the experts were ranked by, as the graph's memory has it.
    float ranked_score(size_t token, int32_t expert) const {
        return scores()[token * kExperts + static_cast<size_t>(expert)];
    }
    const float* output(size_t token, size_t slot) const { return outputs.data() + (token * kUsed + slot) * kEmbd; }

    const int layer;
    const size_t n_tokens;
    const Routing routing;
    std::vector<float> router_bias, selection_bias, raw, residual, outputs;
    int n_products = 0;

   private:
    static float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
    std::string number() const { return std::to_string(layer); }

    // Of what lies in the graph's memory, which a mask may have changed.
    void compute_probs() {
        for (size_t token = 0; token < n_tokens; ++token) {
            const float* logits = logits_.data() + token * kExperts;
            float sum = 0;
            for (size_t i = 0; i < kExperts; ++i) {
                sum += std::exp(logits[i]);
            }
            for (size_t i = 0; i < kExperts; ++i) {
                float& prob = probs_[token * kExperts + i];
                switch (routing) {
                    case Routing::chosen_softmax:
                    case Routing::named_bias:
                        prob = logits[i] + router_bias[i];
                        break;
                    case Routing::sigmoid:
                    case Routing::inputs_weighted:
                        prob = sigmoid(logits[i]);
                        break;
                    default:
                        prob = std::exp(logits[i]) / sum;
                }
            }
        }
    }
    const std::vector<float>& scores() const {
        return routing == Routing::sigmoid ? selection_ : routing == Routing::inputs_weighted ? logits_ : probs_;
    }
    void rank() {
        const std::vector<float>& scores = this->scores();
        for (size_t token = 0; token < n_tokens; ++token) {
            int32_t* row = ranking_.data() + token * kExperts;
            std::iota(row, row + kExperts, 0);
            std::stable_sort(row, row + kExperts, [&](int32_t a, int32_t b) {
                return scores[token * kExperts + static_cast<size_t>(a)] >
                       scores[token * kExperts + static_cast<size_t>(b)];
            });
        }
    }
    void weigh() {
        for (size_t token = 0; token < n_tokens; ++token) {
            float sum = 0;
            for (size_t slot = 0; slot < kUsed; ++slot) {
                const auto expert = static_cast<size_t>(ranking_[token * kExperts + slot]);
                float& weight = weights_[token * kUsed + slot];
                weight = probs_[token * kExperts + expert];
                if (routing == Routing::chosen_softmax || routing == Routing::named_bias) {
                    weight = std::exp(weight);
                }
                sum += weight;
            }
            for (size_t slot = 0;
                 slot < kUsed && (routing == Routing::chosen_softmax || routing == Routing::named_bias); ++slot) {
                weights_[token * kUsed + slot] /= sum;
            }
        }
    }
    void add_weighted(fake_ggml::Graph& graph, Tensor* of) {
        Tensor weighted = fake_ggml::make_tensor(fake_ggml::kF32, "ffn_moe_weighted-" + number(),
                                                 {kEmbd, kUsed, static_cast<int64_t>(n_tokens)});
        weighted.src[0] = of;
        weighted.src[1] = &weights_tensor_;
        weighted.data = of->data;  // in place, as ggml likes to do it
        graph.add(weighted, [this](Tensor* tensor) {
            auto* numbers = static_cast<float*>(tensor->data);
            for (size_t i = 0; i < outputs.size(); ++i) {
                numbers[i] *= weights_[i / kEmbd];
            }
        });
    }
    void multiply(Running& running, const Tensor& product, size_t part) {
        if (edgemoe::RouterHook::on_abort(running.hook.get())) {
            return;
        }
        const uint64_t n = running.model_.slab_bytes(layer, part);
        for (size_t token = 0; token < n_tokens; ++token) {
            for (size_t slot = 0; slot < kUsed; ++slot) {
                const auto at = static_cast<uint64_t>(ranking_[token * kExperts + slot]) * n;
                CHECK(fake_ggml::used(product, token, slot,
                                      running.model_.bytes_of(running.model_.id_of(layer, part)) + at, n));
            }
        }
        answers_[part] = outputs;
        ++n_products;
    }

    std::vector<float> stream_, logits_, probs_, selection_, weights_, inputs_, answers_[3];
    std::vector<int32_t> ranking_;
    Tensor bias_{}, weights_tensor_{}, repeated_{};
    Tensor input_ = fake_ggml::make_tensor(fake_ggml::kF32, "ffn_norm", {1});
    Tensor activations_ = fake_ggml::make_tensor(fake_ggml::kF32, "ffn_moe_swiglu", {1});
};
