// Limited routing against the textbook: what a router would say and choose that had only the kept experts.
#include "expert_mask.h"

#include <cmath>

#include "check.h"
#include "routed_layer.h"

using edgemoe::ExpertMask;
using edgemoe::Io;
using edgemoe::page_size;
using edgemoe::ggml::Tensor;
using fake_ggml::Graph;
using fake_ggml::make_tensor;

namespace {

using Experts = std::vector<int32_t>;

constexpr auto kUsed = static_cast<size_t>(RoutedLayer::kUsed);

std::string run(Running& running, RoutedLayer& layer) {
    Graph graph;
    layer.add_to(running, graph);
    running.hook->begin(0, static_cast<int64_t>(layer.n_tokens));
    graph.run(*running.hook);
    return running.hook->take_failure();
}

void limit(Routing routing, uint64_t arena_bytes) {
    const TinyModel model = moe_model(2 * page_size());
    Running running(model, Io::pread, arena_bytes);
    std::mt19937 random(1);
    for (uint32_t round = 0; round < 30; ++round) {
        Experts kept{0, 1, 2, 3, 4, 5, 6, 7};
        std::shuffle(kept.begin(), kept.end(), random);
        kept.resize(2 + round % 7);
        std::sort(kept.begin(), kept.end());
        running.hook->keep(2, kept);
        running.hook->watch({2}, true);
        RoutedLayer layer(2, 4, routing, round), free(0, 4, routing, round);
        CHECK_EQUAL(run(running, layer), "");
        CHECK_EQUAL(run(running, free), "");
        CHECK_EQUAL(layer.n_products + free.n_products, 6);
        const edgemoe::LayerTrace trace = running.hook->take_trace(2);
        for (size_t token = 0; token < layer.n_tokens; ++token) {
            const Experts chosen = layer.chosen(token, kept);
            // Groups of experts are chosen by these scores: none may be as good as a kept one.
            for (int32_t expert = 0; expert < kExperts; ++expert) {
                const bool is_kept = std::find(kept.begin(), kept.end(), expert) != kept.end();
                CHECK(is_kept || layer.ranked_score(token, expert) <= (routing == Routing::softmax ? 0 : -INFINITY));
            }
            for (size_t slot = 0; slot < kUsed; ++slot) {
                CHECK_EQUAL(trace.ids[token * kUsed + slot], chosen[slot]);
                const float weight = layer.weight(token, chosen[slot], kept);
                CHECK(std::abs(trace.weights[token * kUsed + slot] - weight) < 1e-5F);
            }
        }
    }
}

void limit_everywhere(Routing routing) {
    limit(routing, kPlenty);
    limit(routing, uint64_t{7} * 3 * page_size());
}

// A ranking of 6 experts for each token in rows of 8, and a view of its first `n_used`.
struct Ranking {
    explicit Ranking(std::vector<int32_t> rows, int64_t n_used)
        : ids(std::move(rows)),
          all(make_tensor(fake_ggml::kI32, "ffn_moe_argsort-0", {6, static_cast<int64_t>(ids.size()) / 8})),
          top_k(make_tensor(fake_ggml::kI32, "ffn_moe_topk-0", {n_used, all.ne[1]})) {
        all.nb[1] = top_k.nb[1] = 8 * sizeof(int32_t);
        all.data = top_k.data = ids.data();
        top_k.view_src = &all;
    }
    std::vector<int32_t> ids;
    Tensor all, top_k;
};

}  // namespace

TEST(softmax) { limit_everywhere(Routing::softmax); }
TEST(sigmoid_with_selection_bias) { limit_everywhere(Routing::sigmoid); }
TEST(router_bias_named_probs) { limit_everywhere(Routing::chosen_softmax); }
TEST(router_bias_named_as_such) { limit_everywhere(Routing::named_bias); }
TEST(weights_before_the_experts) { limit_everywhere(Routing::inputs_weighted); }

TEST(long_batch_reads_no_expert_that_is_not_kept) {
    const TinyModel model = moe_model(2 * page_size());
    Running running(model, Io::pread, kPlenty);
    running.hook->keep(2, {1, 4, 6});
    RoutedLayer layer(2, 300, Routing::softmax, 1), free(0, 300, Routing::softmax, 2);
    CHECK_EQUAL(run(running, layer), "");
    CHECK_EQUAL(run(running, free), "");
    for (const int32_t expert : {0, 2, 3, 5, 7}) {
        CHECK(!running.store->resident(2, expert) && running.store->resident(0, expert));
    }
}

TEST(scores_of_others_are_minus_infinity) {
    ExpertMask mask;
    mask.keep(3, 4, {0, 2});
    std::vector<float> scores{1, 2, 3, 4, 99, 5, 6, 7, 8, 99};  // rows of 4 in strides of 5
    Tensor tensor = make_tensor(fake_ggml::kF32, "ffn_moe_logits-3", {4, 2});
    tensor.nb[1] = 5 * sizeof(float);
    tensor.data = scores.data();
    mask.exclude(3, &tensor);
    const float none = -INFINITY;
    CHECK(scores == (std::vector<float>{1, none, 3, none, 99, 5, none, 7, none, 99}));
    tensor.ne[0] = 5;
    CHECK_REFUSED(mask.exclude(3, &tensor), "ffn_moe_logits-3 scores 5 experts, but the layer has 4");
}

TEST(ids_are_the_first_kept_ones_of_the_ranking) {
    ExpertMask mask;
    mask.keep(0, 6, {1, 3, 5});
    Ranking ranking({0, 1, 2, 3, 4, 5, -7, -8, 5, 4, 3, 2, 1, 0, -7, -8}, 2);
    mask.select_again(0, &ranking.top_k);
    CHECK(ranking.ids == (Experts{1, 3, 2, 3, 4, 5, -7, -8, 5, 3, 3, 2, 1, 0, -7, -8}));
}

TEST(impossible_ids_of_a_ranking_are_passed_over) {
    ExpertMask mask;
    mask.keep(0, 6, {1, 3});
    Ranking ranking({-1, 6, 3, 1 << 30, 1, 0, 0, 0}, 2);
    mask.select_again(0, &ranking.top_k);
    CHECK(ranking.ids[0] == 3 && ranking.ids[1] == 1);
}

TEST(too_few_kept_is_told) {
    ExpertMask mask;
    mask.keep(0, 6, {4});
    Ranking ranking({0, 1, 2, 3, 4, 5, 0, 0}, 2);
    CHECK_REFUSED(mask.select_again(0, &ranking.top_k), "layer 0 uses 2 experts for each token, but fewer are kept");
}

TEST(something_else_than_a_ranking_is_told) {
    ExpertMask mask;
    mask.keep(0, 6, {1, 3, 5});
    const std::string message = "layer 0 does not select its experts in one step";
    Ranking ranking({0, 1, 2, 3, 4, 5, 0, 0}, 2);
    ranking.top_k.view_src = nullptr;
    CHECK_REFUSED(mask.select_again(0, &ranking.top_k), message);
    ranking.top_k.view_src = &ranking.all;
    ranking.all.ne[0] = 5;  // of some only
    CHECK_REFUSED(mask.select_again(0, &ranking.top_k), message);
    ranking.all.ne[0] = 6;
    ranking.top_k.data = ranking.ids.data() + 1;  // not its beginning
    CHECK_REFUSED(mask.select_again(0, &ranking.top_k), message);
}

TEST(wrong_experts_are_refused_and_change_nothing) {
    ExpertMask mask;
    CHECK_REFUSED(mask.keep(2, 6, {1, 6}), "layer 2 has no expert 6: it has 6");
    CHECK_REFUSED(mask.keep(2, 6, {-1}), "layer 2 has no expert -1: it has 6");
    CHECK(!mask.limits(2));
}

TEST(all_or_none_is_no_limit) {
    ExpertMask mask;
    CHECK(!mask.limits(0));
    mask.keep(2, 3, {2, 0});
    CHECK(!mask.limits(0) && mask.limits(2) && !mask.limits(3));
    mask.keep(2, 3, {1, 0, 2, 1});
    CHECK(!mask.limits(2));
    mask.keep(2, 3, {1});
    mask.keep(2, 3, {});
    CHECK(!mask.limits(2));
}

TEST(failures_abort_the_graph) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    RoutedLayer layer(0, 2, Routing::softmax, 1), table(0, 2, Routing::table, 2);
    running.hook->keep(0, {3});
    CHECK(run(running, layer).find("fewer are kept; keep at least as many") != std::string::npos);
    running.hook->keep(0, {1, 2, 3});
    CHECK(run(running, table).find("keep every expert of this layer") != std::string::npos);
    CHECK_EQUAL(layer.n_products + table.n_products, 0);
    running.hook->keep(0, {});
    CHECK_EQUAL(run(running, table), "");
}

TEST(router_of_two_sets_of_experts_cannot_be_limited) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    running.hook->keep(0, {1, 2, 3});
    RoutedLayer layer(0, 2, Routing::softmax, 1), again(0, 2, Routing::softmax, 2);
    Graph graph, whole;
    layer.add_to(running, graph);
    again.add_to(running, whole);
    whole.copy_without("ffn_moe_logits-0", graph);
    running.hook->begin();
    graph.run(*running.hook);
    CHECK(running.hook->take_failure().find("does not select its experts in one step") != std::string::npos);
    CHECK_EQUAL(again.n_products, 0);
}

TEST(layers_without_experts_are_refused) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    for (const int layer : {-1, 1, 3}) {
        CHECK_REFUSED(running.hook->keep(layer, {0}), "but the model has none there");
    }
}
