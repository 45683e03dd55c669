// Guesses of the next layer's experts against the textbook: the next router's own words about this layer's state.
#include "look_ahead.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <thread>

#include "check.h"
#include "fake_ggml.h"
#include "held_disk.h"
#include "running_hook.h"
#include "scratch_file.h"

using edgemoe::Io;
using edgemoe::LookAhead;
using edgemoe::page_size;
using edgemoe::ggml::Tensor;
using fake_ggml::kF32;
using fake_ggml::make_tensor;

namespace {

using Ids = std::vector<int32_t>;
using Numbers = std::vector<float>;

constexpr int64_t kEmbd = 21, kUsed = 3;
const uint64_t kSlab = 2 * page_size();

struct Parts {
    bool norm = true;             // a norm of its own in each layer
    bool bias = false;            // of the router
    bool selection_bias = false;  // for the choice only, of sigmoids
};

// Three MoE layers in a file: experts, and the routers' weights as numbers.
class Routers {
   public:
    Routers(Parts parts, uint64_t arena_bytes, uint32_t seed) : random_(seed), api_(fake_ggml::make_api()) {
        CHECK_EQUAL(api_.check_layout(), "");
        for (const int layer : {0, 1, 2}) {
            describe(layer, "ffn_gate_inp.weight", {kEmbd, kExperts});
            if (parts.norm) {
                describe(layer, "ffn_norm.weight", {kEmbd});
            }
            if (parts.bias) {
                describe(layer, "ffn_gate_inp.bias", {kExperts});
            }
            if (parts.selection_bias) {
                describe(layer, "exp_probs_b.bias", {kExperts});
            }
        }
        experts_at_ = numbers_.size() * sizeof(float);
        const uint64_t n_bytes = kExperts * kSlab;
        Bytes bytes(experts_at_ + 3 * n_bytes);
        std::memcpy(bytes.data(), numbers_.data(), experts_at_);
        file_ = std::make_unique<ScratchFile>(bytes);
        store = std::make_unique<edgemoe::ExpertStore>(Io::pread, 2, arena_bytes);
        store->add_file(file_->path());
        for (const auto& [name, at] : at_) {
            store->add_tensor({name, 0, at.first * sizeof(float), at.second * sizeof(float), -1, 0});
        }
        for (const int layer : {0, 1, 2}) {
            const std::string name = "blk." + std::to_string(layer) + ".ffn_up_exps.weight";
            store->add_tensor(
                {name, 0, experts_at_ + static_cast<uint64_t>(layer) * n_bytes, n_bytes, layer, kExperts});
            tensors_.push_back(make_tensor(fake_ggml::kI8, name, {2 * static_cast<int64_t>(page_size()), 1, kExperts}));
        }
        buffer = std::make_unique<edgemoe::ExpertBuffer>(*store, api_);
        loaded_ = std::make_unique<fake_ggml::LoadedModel>(tensors_, *buffer);
        CHECK_EQUAL(loaded_->status, edgemoe::ggml::kStatusSuccess);
        buffer->restore_names();
    }

    // A weight of the model, as the graph knows it.
    Tensor* named(const std::string& name) {
        for (Tensor& tensor : loaded_->tensors) {
            if (name == tensor.name) {
                return &tensor;
            }
        }
        return nullptr;
    }
    Numbers numbers(int layer, const std::string& name) const {
        const auto [first, n] = at_.at("blk." + std::to_string(layer) + "." + name);
        const auto begin = numbers_.begin() + static_cast<std::ptrdiff_t>(first);
        return {begin, begin + static_cast<std::ptrdiff_t>(n)};
    }

    uint64_t at(int layer, int expert) const {  // in the file
        return experts_at_ + static_cast<uint64_t>(layer * kExperts + expert) * kSlab;
    }

    std::unique_ptr<edgemoe::ExpertStore> store;
    std::unique_ptr<edgemoe::ExpertBuffer> buffer;

   private:
    void describe(int layer, const std::string& name, const std::vector<int64_t>& ne) {
        const std::string full = "blk." + std::to_string(layer) + "." + name;
        size_t n = 1;
        for (const int64_t some : ne) {
            n *= static_cast<size_t>(some);
        }
        at_[full] = {numbers_.size(), n};
        std::normal_distribution<float> normal;
        std::uniform_int_distribution<int> whole(-127, 127);
        for (size_t i = 0; i < n; ++i) {
            // Routers that 8 bits hold exactly: rounding would settle near ties otherwise (router_copy_test).
            const int weight = i % kEmbd == 0 ? 127 : whole(random_);
            numbers_.push_back(ne.size() == 2 ? static_cast<float>(weight) / 127 : normal(random_));
        }
        tensors_.push_back(make_tensor(kF32, full, ne));
    }

    std::mt19937 random_;
    edgemoe::ggml::Api api_;
    Numbers numbers_;
    uint64_t experts_at_ = 0;
    std::map<std::string, std::pair<size_t, size_t>> at_;  // by name: first number, how many
    std::vector<Tensor> tensors_;
    std::unique_ptr<ScratchFile> file_;
    std::unique_ptr<fake_ggml::LoadedModel> loaded_;
};

// What llama.cpp has computed when layer 0 has selected its experts: a normalized state times the norm's weights, the
// logits, the probabilities, their ranking, and a view of its first columns.
class Selection {
   public:
    Selection(Routers& routers, Parts parts, int64_t n_tokens, uint32_t seed)
        : n_tokens_(n_tokens), parts_(parts), routers_(routers) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        normalized_.resize(static_cast<size_t>(kEmbd * n_tokens));
        std::generate(normalized_.begin(), normalized_.end(), [&] { return normal(random); });
        input_ = normalized_;
        const Numbers weights = parts.norm ? routers.numbers(0, "ffn_norm.weight") : Numbers(kEmbd, 1);
        for (size_t i = 0; i < input_.size(); ++i) {
            input_[i] *= weights[i % kEmbd];
        }
        norm = make_tensor(kF32, "norm-0", {kEmbd, n_tokens});
        input = make_tensor(kF32, "ffn_norm-0", {kEmbd, n_tokens});
        input.data = input_.data();
        input.src[0] = &norm;
        input.src[1] = parts.norm ? routers.named("blk.0.ffn_norm.weight") : nullptr;
        logits = make_tensor(kF32, "ffn_moe_logits-0", {kExperts, n_tokens});
        logits.src[0] = routers.named("blk.0.ffn_gate_inp.weight");
        logits.src[1] = &input;
        probs = make_tensor(kF32, "ffn_moe_probs-0", {kExperts, n_tokens});
        probs.src[0] = &logits;
        ranking = make_tensor(fake_ggml::kI32, "ffn_moe_argsort-0", {kExperts, n_tokens});
        ranking.src[0] = &probs;
        top_k = make_tensor(fake_ggml::kI32, "ffn_moe_topk-0", {kUsed, n_tokens});
        top_k.view_src = &ranking;
    }
    Selection(const Selection&) = delete;
    Selection& operator=(const Selection&) = delete;

    // The experts that a later layer would choose for a token, the best first.
    Ids textbook(int64_t token, int layer = 1) const {
        const Numbers router = routers_.numbers(layer, "ffn_gate_inp.weight");
        const Numbers norm_weights = parts_.norm ? routers_.numbers(layer, "ffn_norm.weight") : Numbers(kEmbd, 1);
        const Numbers bias = parts_.bias ? routers_.numbers(layer, "ffn_gate_inp.bias") : Numbers(kExperts, 0);
        std::vector<double> scores(kExperts);
        for (size_t expert = 0; expert < kExperts; ++expert) {
            double logit = bias[expert];
            for (size_t i = 0; i < kEmbd; ++i) {
                logit += static_cast<double>(router[expert * kEmbd + i]) * norm_weights[i] *
                         normalized_[static_cast<size_t>(token * kEmbd) + i];
            }
            scores[expert] = logit;
            if (parts_.selection_bias) {
                scores[expert] = 1 / (1 + std::exp(-logit)) + routers_.numbers(layer, "exp_probs_b.bias")[expert];
            }
        }
        Ids order(kExperts);
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
            return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
        });
        order.resize(kUsed);
        return order;
    }

    Tensor norm{}, input{}, logits{}, probs{}, ranking{}, top_k{};

   private:
    const int64_t n_tokens_;
    const Parts parts_;
    Routers& routers_;
    Numbers normalized_, input_;
};

constexpr uint64_t kSmall = 1U << 14;

// So often layer 1 is guessed, and then its router speaks.
void watch(LookAhead& look_ahead, int n, const Ids& guess, const Ids& truth) {
    for (int i = 0; i < n; ++i) {
        look_ahead.guess_from(1, 1, guess, 3);
        look_ahead.settle(1, truth);
    }
}

void guess_as_the_textbook(Parts parts) {
    Routers routers(parts, kSmall, 1);
    for (uint32_t seed = 0; seed < 20; ++seed) {
        LookAhead look_ahead(*routers.store, *routers.buffer);
        Selection one(routers, parts, 1, seed), batch(routers, parts, 7, seed);
        CHECK(look_ahead.guess(1, 1, &one.top_k, 1) == one.textbook(0));
        CHECK(look_ahead.guess(1, 1, &batch.top_k, 1) == batch.textbook(6));  // the last of a batch
        CHECK(look_ahead.guess(2, 2, &one.top_k, 1) == one.textbook(0, 2));   // by the same state
        const Ids found = look_ahead.guess(1, 1, &batch.top_k, 5);
        std::vector<int> count(kExperts, 0);
        for (int64_t token = 2; token < 7; ++token) {
            for (const int32_t expert : batch.textbook(token)) {
                ++count[static_cast<size_t>(expert)];
            }
        }
        CHECK_EQUAL(static_cast<std::ptrdiff_t>(found.size()),
                    std::count_if(count.begin(), count.end(), [](int n) { return n > 0; }));
        for (size_t i = 0; i < found.size(); ++i) {  // those that most tokens choose come first
            CHECK(count[static_cast<size_t>(found[i])] > 0);
            CHECK(i == 0 || count[static_cast<size_t>(found[i - 1])] >= count[static_cast<size_t>(found[i])]);
        }
    }
}

}  // namespace

TEST(router_behind_a_norm) { guess_as_the_textbook({true, false, false}); }
TEST(router_without_a_norm) { guess_as_the_textbook({false, false, false}); }
TEST(router_with_a_bias) { guess_as_the_textbook({true, true, false}); }
TEST(router_with_a_bias_for_selection) { guess_as_the_textbook({true, false, true}); }
TEST(router_with_both_biases) { guess_as_the_textbook({true, true, true}); }

TEST(router_that_cannot_be_found_guesses_nothing) {
    const Parts parts;
    Routers routers(parts, kSmall, 2);
    LookAhead look_ahead(*routers.store, *routers.buffer);
    Selection selection(routers, parts, 1, 3);
    CHECK_EQUAL(look_ahead.guess(1, 1, &selection.top_k, 1).size(), static_cast<size_t>(kUsed));
    selection.logits.src[1] = nullptr;
    CHECK(look_ahead.guess(1, 1, &selection.top_k, 1).empty());
    selection.logits.src[1] = &selection.input;
    selection.input.type = fake_ggml::kI8;  // computed in another type
    CHECK(look_ahead.guess(1, 1, &selection.top_k, 1).empty());
    selection.input.type = kF32;
    selection.input.ne[0] = kEmbd + 1;
    CHECK(look_ahead.guess(1, 1, &selection.top_k, 1).empty());
    selection.input.ne[0] = kEmbd;
    selection.logits.src[0] = routers.named("blk.1.ffn_gate_inp.weight");  // another layer's
    CHECK(look_ahead.guess(1, 1, &selection.top_k, 1).empty());
    selection.logits.src[0] = routers.named("blk.0.ffn_gate_inp.weight");
    selection.top_k.view_src = nullptr;  // ids that no router chose
    CHECK(look_ahead.guess(1, 1, &selection.top_k, 1).empty());
    selection.top_k.view_src = &selection.ranking;
    selection.probs.src[0] = &selection.ranking;  // goes round in circles
    CHECK(look_ahead.guess(1, 1, &selection.top_k, 1).empty());
    selection.probs.src[0] = &selection.logits;
    CHECK(look_ahead.guess(3, 1, &selection.top_k, 1).empty());  // no such layer
    CHECK_EQUAL(look_ahead.guess(1, 1, &selection.top_k, 1).size(), static_cast<size_t>(kUsed));
}

TEST(what_is_told_stands_in_for_the_router) {
    const Parts parts;
    Routers routers(parts, kSmall, 2);
    LookAhead look_ahead(*routers.store, *routers.buffer);
    const Selection selection(routers, parts, 1, 3);
    for (const Ids& told : {Ids{0, 1, 2}, Ids{7, 5, 3}}) {
        CHECK(look_ahead.guess(1, 1, &selection.top_k, 1, told) == told);
    }
    CHECK(look_ahead.guess(1, 1, &selection.top_k, 1) == selection.textbook(0));
}

TEST(long_batches_are_sampled) {
    const Parts parts;
    Routers routers(parts, kSmall, 4);
    LookAhead look_ahead(*routers.store, *routers.buffer);
    Selection batch(routers, parts, 500, 5);
    const Ids found = look_ahead.guess(1, 1, &batch.top_k, 500);
    CHECK(!found.empty());
    Ids sorted = found;
    std::sort(sorted.begin(), sorted.end());
    CHECK(std::unique(sorted.begin(), sorted.end()) == sorted.end());
    CHECK(sorted.front() >= 0 && sorted.back() < kExperts);
}

// A rank that is wrong again and again is no longer passed on; what is watched meanwhile brings it back.
TEST(trust_falls_where_guesses_are_wrong_and_recovers) {
    Routers routers({}, kSmall, 6);
    LookAhead look_ahead(*routers.store, *routers.buffer);
    const Ids guess{5, 2, 7};
    watch(look_ahead, 200, guess, {5, 0, 1});  // the first is right, the others never are
    CHECK(look_ahead.guess_from(1, 1, guess, 3) == Ids{5});
    watch(look_ahead, 1000, guess, guess);
    CHECK(look_ahead.guess_from(1, 1, guess, 3) == guess);
}

TEST(trust_is_by_how_far_ahead_a_guess_is_made) {
    Routers routers({}, kSmall, 6);
    LookAhead look_ahead(*routers.store, *routers.buffer);
    for (int i = 0; i < 200; ++i) {
        look_ahead.guess_from(2, 2, {5, 2, 7}, 3);
        look_ahead.guess_from(2, 1, {5, 2, 1}, 3);
        look_ahead.settle(2, {5, 2, 1});
    }
    CHECK(look_ahead.guess_from(2, 2, {6, 4, 3}, 3) == (Ids{6, 4}));
    CHECK(look_ahead.guess_from(2, 1, {6, 4, 3}, 3) == (Ids{6, 4, 3}));
}

TEST(guesses_of_a_graph_that_ended_early_are_not_held_against_it) {
    Routers routers({}, kSmall, 6);
    LookAhead look_ahead(*routers.store, *routers.buffer);
    const Ids guess{5, 2, 7};
    for (int i = 0; i < 200; ++i) {
        look_ahead.guess_from(1, 1, guess, 3);
        look_ahead.begin(1);
        look_ahead.settle(1, {0});
    }
    CHECK(look_ahead.guess_from(1, 1, guess, 3) == guess);
}

TEST(two_layers_ahead_are_guessed_for_single_tokens_while_the_disk_is_busy) {
    WithHeldDisk with;
    Routers routers({}, kSmall, 6);
    LookAhead look_ahead(*routers.store, *routers.buffer);
    look_ahead.begin(1);
    CHECK_EQUAL(look_ahead.farthest(), 2);
    look_ahead.begin(7);
    CHECK_EQUAL(look_ahead.farthest(), 1);
    look_ahead.begin(1);  // what a batch does says nothing of tokens
    CHECK_EQUAL(look_ahead.farthest(), 2);
    const auto tokens = [&] {
        for (int i = 0; i < 30; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
            look_ahead.begin(1);
        }
    };
    tokens();
    CHECK_EQUAL(look_ahead.farthest(), 1);
    with.disk.hold({routers.at(1, 5)});
    routers.store->expect(1, {5});
    with.disk.await(1);
    tokens();
    CHECK_EQUAL(look_ahead.farthest(), 2);
    with.disk.let_go();
}

TEST(nothing_is_mistrusted_before_it_was_watched) {
    Routers routers({}, kSmall, 7);
    LookAhead look_ahead(*routers.store, *routers.buffer);
    const Ids guess{5, 2, 7};
    for (int i = 0; i < 10; ++i) {
        CHECK(look_ahead.guess_from(1, 1, guess, 3) == guess);
        look_ahead.settle(0, {0});  // another layer's router
        look_ahead.settle(1, {0});
    }
    for (int i = 0; i < 200; ++i) {  // and what is not told is not held against it
        look_ahead.guess_from(1, 1, guess, 3);
    }
    CHECK(look_ahead.guess_from(1, 1, guess, 3) == guess);
}

TEST(what_is_in_memory_is_passed_on_and_not_watched) {
    Routers routers({}, kSmall * 2, 8);
    routers.store->acquire(1, 1, {2});
    CHECK(routers.store->resident(1, 2));
    LookAhead look_ahead(*routers.store, *routers.buffer);
    watch(look_ahead, 200, {2, 5, 7}, {5, 0, 1});
    // It costs nothing to keep, however often it is not asked for.
    CHECK(look_ahead.guess_from(1, 1, {2, 5, 7}, 3) == (Ids{2, 5}));
}

TEST(guesses_of_batches_are_trusted_by_how_many_tokens_make_them) {
    Routers routers({}, kSmall, 9);
    LookAhead look_ahead(*routers.store, *routers.buffer);
    const Ids rows{1, 2, 3, 1, 2, 4, 1, 5, 6};
    CHECK(look_ahead.guess_from(1, 1, rows, 3) == (Ids{1, 2, 3, 4, 5, 6}));
    watch(look_ahead, 200, rows, {1, 2});
    CHECK(look_ahead.guess_from(1, 1, rows, 3) == (Ids{1, 2}));
    CHECK(look_ahead.guess_from(1, 1, {1, 2, 3}, 3) == (Ids{1, 2, 3}));  // single tokens are another matter
}
