// What the hook records of a graph, against plain loops over the numbers that the graph was made of.
#include "router_trace.h"

#include <cmath>

#include "check.h"
#include "routed_layer.h"

using edgemoe::Io;
using edgemoe::LayerTrace;
using edgemoe::page_size;
using fake_ggml::Graph;

namespace {

const std::vector<int32_t> kAll{0, 1, 2, 3, 4, 5, 6, 7};
constexpr auto kUsed = static_cast<size_t>(RoutedLayer::kUsed);
constexpr auto kEmbd = static_cast<size_t>(RoutedLayer::kEmbd);

bool near(double found, double expected) { return std::abs(found - expected) <= 1e-5 * (1 + std::abs(expected)); }

// Rows of the layer's tokens, which follow `first` others.
void check_logits(const LayerTrace& trace, const RoutedLayer& layer, size_t first = 0) {
    CHECK_EQUAL(trace.n_expert, kExperts);
    CHECK(trace.logits.size() >= (first + layer.n_tokens) * kExperts);
    for (size_t token = 0; token < layer.n_tokens; ++token) {
        for (size_t expert = 0; expert < kExperts; ++expert) {
            CHECK_EQUAL(trace.logits[(first + token) * kExperts + expert], layer.said(token, expert));
        }
    }
}

void check_outputs(const LayerTrace& trace, const RoutedLayer& layer, const std::vector<int32_t>& kept = kAll,
                   size_t first = 0) {
    CHECK_EQUAL(trace.n_used, RoutedLayer::kUsed);
    CHECK(trace.ids.size() >= (first + layer.n_tokens) * kUsed);
    CHECK(trace.ids.size() == trace.weights.size() && trace.ids.size() == trace.norms.size());
    CHECK_EQUAL(trace.change.size(), trace.ids.size() / kUsed);
    const bool before = layer.routing == Routing::inputs_weighted;
    for (size_t token = 0; token < layer.n_tokens; ++token) {
        const std::vector<int32_t> chosen = layer.chosen(token, kept);
        std::vector<double> sum(kEmbd, 0);
        for (size_t slot = 0; slot < kUsed; ++slot) {
            const size_t at = (first + token) * kUsed + slot;
            const double weight = layer.weight(token, chosen[slot], kept);
            double squares = 0;
            for (size_t i = 0; i < kEmbd; ++i) {
                const double number = layer.output(token, slot)[i];
                squares += number * number;
                sum[i] += before ? number : weight * number;
            }
            CHECK_EQUAL(trace.ids[at], chosen[slot]);
            CHECK(near(trace.weights[at], weight));
            CHECK(near(trace.norms[at], std::sqrt(squares) / (before ? weight : 1)));
        }
        double across = 0, inner = 0, after = 0;
        for (size_t i = 0; i < kEmbd; ++i) {
            const double residual = layer.residual[token * kEmbd + i];
            across += residual * residual;
            inner += residual * (residual + sum[i]);
            after += (residual + sum[i]) * (residual + sum[i]);
        }
        CHECK(near(trace.change[first + token], 1 - inner / std::sqrt(across * after)));
    }
}

void run(Running& running, RoutedLayer& layer, bool finishes = true) {
    Graph graph;
    layer.add_to(running, graph);
    running.hook->begin();
    CHECK(graph.run(*running.hook));
    CHECK_EQUAL(running.hook->take_failure(), "");
    CHECK_EQUAL(graph.n_computed == graph.size(), finishes);
}

void record(Routing routing, uint64_t arena_bytes) {
    const TinyModel model = moe_model(2 * page_size());
    Running running(model, Io::pread, arena_bytes);
    running.hook->watch({0, 2}, true);
    RoutedLayer first(0, 5, routing, 1), other(2, 5, routing, 2);
    RoutedLayer second(0, 3, routing, 3);
    Graph graph;
    first.add_to(running, graph);
    other.add_to(running, graph);
    running.hook->begin();
    CHECK(graph.run(*running.hook));
    run(running, second);  // a further ubatch
    CHECK_EQUAL(first.n_products + other.n_products + second.n_products, 9);
    const LayerTrace trace = running.hook->take_trace(0);
    CHECK_EQUAL(trace.logits.size(), 8U * kExperts);
    check_logits(trace, first);
    check_logits(trace, second, 5);
    check_outputs(trace, first);
    check_outputs(trace, second, kAll, 5);
    const LayerTrace last = running.hook->take_trace(2);
    check_logits(last, other);
    check_outputs(last, other);
    CHECK(running.hook->take_trace(0).logits.empty());
}

void record_everywhere(Routing routing) {
    record(routing, kPlenty);
    record(routing, uint64_t{8} * 3 * page_size());  // tensor by tensor
}

}  // namespace

TEST(softmax) { record_everywhere(Routing::softmax); }
TEST(sigmoid_with_selection_bias) { record_everywhere(Routing::sigmoid); }
TEST(router_bias_named_probs) { record_everywhere(Routing::chosen_softmax); }
TEST(router_bias_named_as_such) { record_everywhere(Routing::named_bias); }
TEST(weights_before_the_experts) { record_everywhere(Routing::inputs_weighted); }

TEST(logits_of_a_masked_router_are_the_whole_routers) {
    for (const Routing routing :
         {Routing::softmax, Routing::sigmoid, Routing::chosen_softmax, Routing::named_bias, Routing::inputs_weighted}) {
        const TinyModel model = moe_model(100);
        Running running(model, Io::pread, kPlenty);
        const std::vector<int32_t> kept{1, 4, 5};
        running.hook->keep(0, kept);
        running.hook->watch({0}, true);
        RoutedLayer layer(0, 6, routing, 4);
        run(running, layer);
        const LayerTrace trace = running.hook->take_trace(0);
        check_logits(trace, layer);
        check_outputs(trace, layer, kept);
    }
}

TEST(unwatched_layers_are_not_recorded) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    running.hook->watch({2}, false);
    RoutedLayer first(0, 2, Routing::softmax, 5), other(2, 2, Routing::softmax, 6);
    run(running, first);
    run(running, other);
    CHECK(running.hook->take_trace(0).logits.empty());
    CHECK(running.hook->take_trace(-1).logits.empty());
    CHECK(running.hook->take_trace(1 << 30).logits.empty());
    const LayerTrace trace = running.hook->take_trace(2);
    check_logits(trace, other);
    CHECK(trace.ids.empty() && trace.weights.empty() && trace.norms.empty() && trace.change.empty());
}

TEST(watching_again_forgets) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    running.hook->watch({0}, true);
    RoutedLayer layer(0, 2, Routing::softmax, 7);
    run(running, layer);
    running.hook->watch({0}, true);
    CHECK(running.hook->take_trace(0).logits.empty());
}

TEST(layers_without_experts_are_refused) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    for (const int layer : {-1, 1, 3}) {
        CHECK_REFUSED(running.hook->watch({0, layer}, false), "but the model has none there");
    }
}

TEST(resident_layers_are_recorded_too) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    running.store->warm(0, kAll);
    running.store->warm(2, kAll);
    CHECK(running.store->settled(0));
    running.hook->watch({0}, true);
    RoutedLayer layer(0, 4, Routing::softmax, 8);
    run(running, layer);
    check_outputs(running.hook->take_trace(0), layer);
    CHECK_EQUAL(running.store->stats().hits, 4 * kUsed * 3);
    CHECK_EQUAL(running.store->stats().misses, 0U);
}

TEST(cut_ends_the_graph_before_experts_are_read) {
    for (const Routing routing : {Routing::softmax, Routing::chosen_softmax, Routing::inputs_weighted}) {
        const TinyModel model = moe_model(100);
        Running running(model, Io::pread, kPlenty);
        running.hook->watch({0}, false);
        running.hook->cut_after(0);
        RoutedLayer layer(0, 3, routing, 9);
        run(running, layer, false);
        check_logits(running.hook->take_trace(0), layer);
        CHECK_EQUAL(layer.n_products, 0);
        CHECK_EQUAL(running.store->stats().misses, 0U);
        CHECK(!running.hook->interrupted());
        RoutedLayer other(2, 3, routing, 10);
        run(running, other);  // not the layer of the cut
        running.hook->cut_after(-1);
        run(running, layer);
        CHECK_EQUAL(layer.n_products, 3);
    }
}

TEST(cut_ends_the_graph_of_a_resident_model_too) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    running.store->warm(0, kAll);
    running.store->warm(2, kAll);
    running.hook->watch({0}, false);
    running.hook->cut_after(0);
    RoutedLayer layer(0, 3, Routing::softmax, 17);
    run(running, layer, false);
    check_logits(running.hook->take_trace(0), layer);
    CHECK_EQUAL(layer.n_products, 0);
    CHECK_EQUAL(running.store->stats().hits, 0U);
}

TEST(cut_waits_for_outputs_that_are_watched) {
    for (const Routing routing : {Routing::softmax, Routing::inputs_weighted}) {
        const TinyModel model = moe_model(100);
        Running running(model, Io::pread, kPlenty);
        running.hook->watch({0}, true);
        running.hook->cut_after(0);
        RoutedLayer layer(0, 3, routing, 11), unreached(2, 3, routing, 12);
        Graph graph;
        layer.add_to(running, graph);
        unreached.add_to(running, graph);
        running.hook->begin();
        CHECK(graph.run(*running.hook));
        CHECK_EQUAL(running.hook->take_failure(), "");
        check_outputs(running.hook->take_trace(0), layer);
        CHECK_EQUAL(unreached.n_products, 0);
    }
}

TEST(experts_without_a_named_residual_have_no_known_change) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    running.hook->watch({0}, true);
    RoutedLayer layer(0, 3, Routing::softmax, 13);
    Graph whole, graph;
    layer.add_to(running, whole);
    whole.copy_without("ffn_inp-0", graph);
    running.hook->begin();
    CHECK(graph.run(*running.hook));
    const LayerTrace trace = running.hook->take_trace(0);
    CHECK_EQUAL(trace.change.size(), 3U);
    for (const float change : trace.change) {
        CHECK(std::isnan(change));
    }
    CHECK_EQUAL(trace.norms.size(), 3 * kUsed);
}

TEST(second_experts_of_the_same_router_are_not_recorded) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    running.hook->watch({0}, true);
    RoutedLayer layer(0, 3, Routing::softmax, 14), again(0, 3, Routing::softmax, 15);
    Graph graph, whole;
    layer.add_to(running, graph);
    again.add_to(running, whole);
    whole.copy_without("ffn_moe_logits-0", graph);
    running.hook->begin();
    CHECK(graph.run(*running.hook));
    const LayerTrace trace = running.hook->take_trace(0);
    CHECK_EQUAL(trace.ids.size(), 3 * kUsed);
    check_logits(trace, layer);
    check_outputs(trace, layer);
}

TEST(no_tokens_no_rows) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    running.hook->watch({0}, true);
    RoutedLayer layer(0, 0, Routing::chosen_softmax, 16);
    run(running, layer);
    const LayerTrace trace = running.hook->take_trace(0);
    CHECK(trace.logits.empty() && trace.ids.empty() && trace.change.empty());
}
