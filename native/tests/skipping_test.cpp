// Skipping of low-weight misses against the textbook: what is left out contributes nothing, the rest the same sum.
#include "skipping.h"

#include <set>

#include "check.h"
#include "routed_layer.h"

using edgemoe::Io;
using edgemoe::page_size;
using edgemoe::Skipping;
using edgemoe::VirtualCache;
using edgemoe::ggml::Tensor;
using fake_ggml::Graph;
using fake_ggml::make_tensor;

namespace {

using Experts = std::vector<int32_t>;

constexpr auto kUsed = static_cast<size_t>(RoutedLayer::kUsed);
const Experts kAll{0, 1, 2, 3, 4, 5, 6, 7};

std::string run(Running& running, RoutedLayer& layer, int64_t position) {
    Graph graph;
    layer.add_to(running, graph);
    running.hook->begin(position, static_cast<int64_t>(layer.n_tokens));
    graph.run(*running.hook);
    return running.hook->take_failure();
}

// What a token's slots weigh when some are left out.
std::vector<float> textbook(const std::vector<float>& weights, const std::vector<bool>& misses, double bound,
                            double& skipped) {
    std::vector<size_t> order(weights.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return weights[a] < weights[b]; });
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    std::vector<float> left = weights;
    double mass = 0;
    for (const size_t slot : order) {
        if (misses[slot]) {
            if (mass + weights[slot] / total > bound) {
                break;
            }
            mass += weights[slot] / total;
            left[slot] = 0;
        }
    }
    const double kept = std::accumulate(left.begin(), left.end(), 0.0);
    for (float& weight : left) {
        weight = static_cast<float>(weight * total / kept);
    }
    skipped += mass;
    return left;
}

void skip(Routing routing, double bound) {
    const TinyModel model = moe_model(2 * page_size());
    Running running(model, Io::pread, kPlenty);
    running.hook->skipping().bound(bound, kPlenty);
    uint64_t n_skipped = 0, n_routed = 0;
    double mass = 0;
    for (uint32_t conversation = 0; conversation < 12; ++conversation) {
        std::set<int32_t> used;  // nothing has to leave the virtual cache
        for (int64_t position = 0; position < 5; ++position) {
            const bool prompt = position == 0;
            RoutedLayer layer(2, 1, routing, conversation * 100 + static_cast<uint32_t>(position));
            running.hook->watch({2}, true);
            CHECK_EQUAL(run(running, layer, position), "");
            CHECK_EQUAL(layer.n_products, 3);
            const edgemoe::LayerTrace trace = running.hook->take_trace(2);
            const Experts chosen = layer.chosen(0, kAll);
            std::vector<float> weights(kUsed);
            std::vector<bool> misses(kUsed);
            for (size_t slot = 0; slot < kUsed; ++slot) {
                weights[slot] = layer.weight(0, chosen[slot], kAll);
                misses[slot] = !prompt && used.count(chosen[slot]) == 0;
            }
            std::vector<float> left = textbook(weights, misses, bound, mass);
            if (routing == Routing::table) {  // its weights are shares of all experts' softmax, of any sum
                const float sum = trace.weights[0] + trace.weights[1], of = left[0] + left[1];
                std::transform(left.begin(), left.end(), left.begin(), [&](float weight) { return weight * sum / of; });
            }
            for (size_t slot = 0; slot < kUsed; ++slot) {
                CHECK_EQUAL(trace.ids[slot], chosen[slot]);
                CHECK(std::abs(trace.weights[slot] - left[slot]) < 1e-5F);
                if (left[slot] != 0) {
                    used.insert(chosen[slot]);
                }
                n_skipped += left[slot] == 0 ? 1 : 0;
                n_routed += prompt ? 0 : 1;
            }
        }
    }
    const edgemoe::SkipCounts counts = running.hook->skipping().counts();
    CHECK_EQUAL(counts.skipped_slots, n_skipped);
    CHECK_EQUAL(counts.routed_slots, n_routed);
    CHECK_EQUAL(counts.routed_layers, n_routed / kUsed);
    CHECK(std::abs(counts.skipped_mass - mass) < 1e-4);
    CHECK(counts.skipped_mass <= bound * static_cast<double>(counts.routed_layers));
    CHECK(n_skipped > 0 && n_skipped < n_routed / kUsed);
}

// A token's selected ids and weights as they lie in a graph's memory, the ids in the first of a row of all experts.
struct Slots {
    Slots(Experts some, std::vector<float> of) : ids(std::move(some)), weights(std::move(of)) {
        const auto n = static_cast<int64_t>(ids.size());
        top_k = make_tensor(fake_ggml::kI32, "ffn_moe_topk-0", {n, 1});
        top_k.data = ids.data();
        weighing = make_tensor(fake_ggml::kF32, "ffn_moe_weights_norm-0 (reshaped)", {1, n, 1});
        weighing.data = weights.data();
        weighted = make_tensor(fake_ggml::kF32, "ffn_moe_weighted-0", {3, n, 1});
        weighted.src[1] = &weighing;
    }
    bool pass(Skipping& skipping, int64_t position) {
        skipping.begin(position, 1);
        const Experts selected = ids;
        const bool postponed = skipping.postpones(0, &top_k, selected);
        CHECK_EQUAL(skipping.awaits(&weighing), postponed);
        if (postponed) {
            CHECK(skipping.skip(&weighing, selected) == &top_k);
        }
        skipping.learn(0, &weighted);
        return postponed;
    }
    Experts ids;
    std::vector<float> weights;
    Tensor top_k, weighing, weighted;
};

bool close(const std::vector<float>& a, const std::vector<float>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) { return std::abs(x - y) < 1e-6F; });
}

}  // namespace

TEST(softmax) { skip(Routing::softmax, 0.3); }
TEST(sigmoid_with_selection_bias) { skip(Routing::sigmoid, 0.45); }
TEST(router_bias_named_probs) { skip(Routing::chosen_softmax, 0.3); }
TEST(router_bias_named_as_such) { skip(Routing::named_bias, 0.3); }
TEST(weights_before_the_experts) { skip(Routing::inputs_weighted, 0.4); }
TEST(ids_of_a_table) { skip(Routing::table, 0.3); }

TEST(lightest_misses_first_within_the_bound) {
    const TinyModel model = moe_model(page_size());
    PlacedStore store(model, Io::pread, 1, kPlenty);
    Skipping skipping(*store);
    skipping.bound(0.2, kPlenty);
    CHECK(!Slots({0, 1, 2, 3}, {0.4F, 0.3F, 0.2F, 0.1F}).pass(skipping, 0));
    Slots next({4, 1, 5, 6}, {0.8F, 0.02F, 0.7F, 0.48F});  // sum 2: shares 0.4, 0.01, 0.35, 0.24
    CHECK(next.pass(skipping, 1));
    CHECK(next.ids == (Experts{4, 1, 5, 6}));  // the only light one is there
    Slots light({7, 0, 2, 3}, {0.1F, 0.5F, 0.3F, 0.1F});
    CHECK(light.pass(skipping, 2));
    CHECK(light.ids == (Experts{0, 0, 2, 3}));
    CHECK(close(light.weights, {0, 0.5F / 0.9F, 0.3F / 0.9F, 0.1F / 0.9F}));
    Slots again({1, 7, 0, 2}, {0.5F, 0.19F, 0.2F, 0.11F});  // what was skipped is still a miss
    CHECK(again.pass(skipping, 3));
    CHECK(again.ids == (Experts{1, 1, 0, 2}));
    CHECK_EQUAL(skipping.counts().skipped_slots, 2U);
    CHECK(std::abs(skipping.counts().skipped_mass - 0.29) < 1e-6);
}

TEST(several_are_skipped_together) {
    const TinyModel model = moe_model(page_size());
    PlacedStore store(model, Io::pread, 1, kPlenty);
    Skipping skipping(*store);
    skipping.bound(0.2, kPlenty);
    Slots({0, 1}, {0.5F, 0.5F}).pass(skipping, 0);
    Slots slots({7, 6, 5, 0}, {0.11F, 0.1F, 0.08F, 0.71F});
    slots.pass(skipping, 1);
    CHECK(slots.ids == (Experts{7, 0, 0, 0}));
    CHECK(close(slots.weights, {0.11F / 0.82F, 0, 0, 0.71F / 0.82F}));
}

TEST(only_tokens_that_go_on_are_skipped) {
    const TinyModel model = moe_model(page_size());
    PlacedStore store(model, Io::pread, 1, kPlenty);
    Skipping skipping(*store);
    skipping.bound(0.5, kPlenty);
    const auto slots = [] { return Slots({0, 1}, {0.9F, 0.1F}); };
    CHECK(!slots().pass(skipping, 7));
    CHECK(!slots().pass(skipping, 0));
    CHECK(slots().pass(skipping, 1));
    CHECK(!slots().pass(skipping, 1));  // evaluated again
    CHECK(!slots().pass(skipping, 4));
    skipping.bound(0.5, kPlenty);
    CHECK(!slots().pass(skipping, 5));
}

TEST(a_new_conversation_knows_nothing_of_the_last) {
    const TinyModel model = moe_model(page_size());
    PlacedStore store(model, Io::pread, 1, kPlenty);
    Skipping skipping(*store);
    skipping.bound(0.2, kPlenty);
    for (int round = 0; round < 2; ++round) {
        Slots({0, 1}, {0.9F, 0.1F}).pass(skipping, 0);
        Slots slots({0, 5}, {0.9F, 0.1F}), heavy({5, 0}, {0.9F, 0.1F}), there({0, 5}, {0.9F, 0.1F});
        slots.pass(skipping, 1);
        CHECK(slots.ids == (Experts{0, 0}));
        heavy.pass(skipping, 2);
        there.pass(skipping, 3);
        CHECK(there.ids == (Experts{0, 5}));
    }
}

TEST(weights_that_say_nothing_skip_nothing) {
    const TinyModel model = moe_model(page_size());
    PlacedStore store(model, Io::pread, 1, kPlenty);
    Skipping skipping(*store);
    skipping.bound(0.5, kPlenty);
    Slots({0, 1}, {0.9F, 0.1F}).pass(skipping, 0);
    int64_t position = 0;
    for (const float weight : {0.0F, NAN, INFINITY}) {
        Slots slots({3, 4}, {weight, weight});
        slots.pass(skipping, ++position);
        CHECK(slots.ids == (Experts{3, 4}));
    }
    CHECK_EQUAL(skipping.counts().skipped_slots, 0U);
}

TEST(nothing_is_touched_without_a_bound) {
    const TinyModel model = moe_model(2 * page_size());
    Running running(model, Io::pread, kPlenty);
    running.store->warm(0, kAll);
    running.store->warm(2, kAll);
    for (int64_t position = 0; position < 3; ++position) {
        RoutedLayer layer(2, 1, Routing::softmax, 5);
        Graph graph;
        layer.add_to(running, graph);
        running.hook->begin(position, 1);
        CHECK(graph.run(*running.hook));
        CHECK_EQUAL(running.hook->take_failure(), "");
        CHECK_EQUAL(graph.n_pieces, 1U);  // and no node is stopped at
    }
    CHECK_EQUAL(running.hook->skipping().counts().routed_slots, 0U);
}

TEST(skipped_experts_are_not_read) {
    const TinyModel model = moe_model(2 * page_size());
    Running running(model, Io::pread, kPlenty);
    running.hook->skipping().bound(0.5, kPlenty);
    std::set<int32_t> used;
    for (int64_t position = 0; position < 4; ++position) {
        RoutedLayer layer(2, 1, Routing::softmax, static_cast<uint32_t>(position));
        CHECK_EQUAL(run(running, layer, position), "");
        const Experts chosen = layer.chosen(0, kAll);
        used.insert(chosen[0]);
        if (position == 0) {
            used.insert(chosen[1]);
        }
    }
    for (int32_t expert = 0; expert < kExperts; ++expert) {
        CHECK_EQUAL(running.store->resident(2, expert), used.count(expert) == 1);
    }
    CHECK_EQUAL(running.store->stats().misses, 3 * used.size());
    CHECK(running.hook->skipping().counts().skipped_slots > 0);
}

TEST(unknown_graphs_are_refused) {
    const TinyModel model = moe_model(2 * page_size());
    Running running(model, Io::pread, kPlenty);
    running.hook->skipping().bound(0.1, kPlenty);
    for (int64_t position = 0; position < 2; ++position) {
        RoutedLayer layer(2, 1, Routing::softmax, 5);
        Graph whole, graph;
        layer.add_to(running, whole);
        whole.copy_without("ffn_moe_weighted-2", graph);
        running.hook->begin(position, 1);
        graph.run(*running.hook);
        CHECK_EQUAL(running.hook->take_failure(),
                    position == 0 ? ""
                                  : "layer 2 does not weigh its experts before they compute, so none can be "
                                    "skipped; leave skip_mass out");
    }
}

TEST(impossible_bounds_and_ids_are_refused) {
    const TinyModel model = moe_model(page_size());
    PlacedStore store(model, Io::pread, 1, kPlenty);
    Skipping skipping(*store);
    for (const double mass : {-0.1, 0.51, std::nan("")}) {
        CHECK_REFUSED(skipping.bound(mass, kPlenty), "a share from 0 to 0.5");
    }
    skipping.bound(0.1, kPlenty);
    CHECK_REFUSED(Slots({0, 8}, {0.5F, 0.5F}).pass(skipping, 0), "layer 0 asked for expert 8 of 8");
    CHECK_REFUSED(Slots({-1, 0}, {0.5F, 0.5F}).pass(skipping, 0), "layer 0 asked for expert -1 of 8");
}

TEST(virtual_cache_holds_what_a_store_without_surprises_does) {
    TinyModel model({{8, {page_size(), page_size()}}, {0, {}}, {16, {3 * page_size()}}, {8, {2 * page_size()}}}, {}, 1,
                    3);
    for (edgemoe::TensorSpec& spec : model.tensors) {
        spec.offset -= spec.offset % page_size();  // no page is shared
    }
    const std::vector<int> layers{0, 2, 3};
    std::mt19937 random(4);
    for (const uint64_t n_pages : {12, 20, 33, 80}) {
        PlacedStore store(model, Io::pread, 1, n_pages * page_size());
        VirtualCache cache;
        cache.resize({8, 16, 8}, {2 * page_size(), 3 * page_size(), 2 * page_size()}, n_pages * page_size());
        for (int token = 0; token < 200; ++token) {
            for (size_t number = 0; number < layers.size(); ++number) {
                const int layer = layers[number], n_expert = store->n_expert(layer);
                const auto first = static_cast<int32_t>(random() % static_cast<uint32_t>(n_expert));
                const Experts experts{first, (first + 1 + static_cast<int32_t>(random() % 3)) % n_expert};
                store->routed(layer, 1, experts);
                store->acquire(layer, model.all_parts(layer), experts);
                cache.routed(static_cast<int>(number), 1, experts);
                cache.use(static_cast<int>(number), experts);
                for (size_t other = 0; other < layers.size(); ++other) {
                    for (int32_t expert = 0; expert < store->n_expert(layers[other]); ++expert) {
                        CHECK_EQUAL(cache.holds(static_cast<int>(other), expert),
                                    store->resident(layers[other], expert));
                    }
                }
            }
        }
    }
}

TEST(a_virtual_cache_without_room_holds_nothing) {
    VirtualCache cache;
    cache.resize({4}, {10}, 9);
    cache.routed(0, 1, {0, 1});
    cache.use(0, {0, 1});
    CHECK(!cache.holds(0, 0) && !cache.holds(0, 1));
    cache.resize({4}, {10}, 25);
    cache.use(0, {0, 1, 2});
    CHECK(cache.holds(0, 0) && cache.holds(0, 1) && !cache.holds(0, 2));
}
