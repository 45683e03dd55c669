// The hook reads while others compute: a layer's later parts, and the next layer's experts. It may change nothing but
// time.
#include <deque>
#include <numeric>

#include "check.h"
#include "held_disk.h"
#include "routed_layer.h"

using edgemoe::Io;
using edgemoe::page_size;
using edgemoe::RouterHook;
using edgemoe::StoreStats;
using edgemoe::Tuning;
using edgemoe::ggml::Tensor;
using fake_ggml::Graph;
using fake_ggml::make_tensor;

namespace {

using Ids = std::vector<int32_t>;

constexpr auto kUsed = static_cast<size_t>(RoutedLayer::kUsed);
constexpr int kLayers = 3;

// Layers with experts, by default one after the other.
TinyModel deep_model(const std::vector<int>& with_experts = {0, 1, 2}) {
    const uint64_t slab = 2 * page_size();
    std::vector<TinyLayer> layers(static_cast<size_t>(with_experts.back()) + 1, {0, {}});
    for (const int layer : with_experts) {
        layers[static_cast<size_t>(layer)] = {kExperts, {slab, slab, slab}};
    }
    return {layers, {100}, 1, 1};
}
uint64_t room_for(uint64_t n_experts) { return n_experts * 3 * 3 * page_size(); }  // of three parts, odd pages included

// One expert of one layer, which all tokens chose. Its parts come when the disk lets them; all of them have begun.
class OneExpert {
   public:
    explicit OneExpert(Tuning tuning = {}, int64_t n_tokens = 2)
        : model_(deep_model()), running(model_, Io::pread, room_for(6), tuning, 8) {
        ids_.assign(static_cast<size_t>(n_tokens), 3);
        top_k = make_tensor(fake_ggml::kI32, "ffn_moe_topk-0", {1, n_tokens});
        top_k.data = ids_.data();
        for (size_t part = 0; part < 3; ++part) {
            const edgemoe::TensorSpec& spec = model_.tensors[model_.id_of(0, part)];
            at.push_back(spec.offset + 3 * model_.slab_bytes(0, part));
            Tensor product = make_tensor(fake_ggml::kF32, "ffn_moe_up-0", {1, 1, 1});
            product.op = fake_ggml::kOpMulMatId;
            product.src[0] = &running.loaded->tensors[model_.id_of(0, part)];
            product.src[1] = part == 2 ? &activations_ : &input_;
            product.src[2] = &top_k;
            product.data = &results_[part];
            products.push_back(product);
        }
        disk.forget();
        disk.hold(at);
        running.hook->begin();
        running.store->expect(0, {3});
        disk.await(3);
    }
    ~OneExpert() { disk.let_go(); }
    OneExpert(const OneExpert&) = delete;
    OneExpert& operator=(const OneExpert&) = delete;

    bool ask(Tensor& node) { return RouterHook::on_node(&node, true, running.hook.get()); }
    bool done(Tensor& node) { return RouterHook::on_node(&node, false, running.hook.get()); }
    bool holds(size_t part) const {
        const uint64_t n = model_.slab_bytes(0, part);
        return fake_ggml::used(products[part], 0, 0, model_.bytes_of(model_.id_of(0, part)) + 3 * n, n);
    }

   private:
    WithHeldDisk with_;
    const TinyModel model_;
    Ids ids_;
    float results_[3]{};
    Tensor input_ = make_tensor(fake_ggml::kF32, "ffn_norm", {1});
    Tensor activations_ = make_tensor(fake_ggml::kF32, "ffn_moe_swiglu", {1});

   public:
    HeldDisk& disk = with_.disk;
    Running running;
    Tensor top_k{};
    std::vector<Tensor> products;
    std::vector<uint64_t> at;  // where each part is in the file
};

enum class Told { nothing, truth, falsehood };

// Prompt batches and decoded tokens on given routes: each product compares what it reads with the file.
StoreStats follow_routes(Io io, uint64_t arena_bytes, Tuning tuning, Told told,
                         const std::vector<int>& with_experts = {0, 1, 2}, bool long_rows = false) {
    const TinyModel model = deep_model(with_experts);
    Running running(model, io, arena_bytes, tuning);
    std::mt19937 random(3);
    const std::vector<size_t> batches{5, 3, 1, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const auto n_tokens = std::accumulate(batches.begin(), batches.end(), size_t{0});
    Ids ids, predictions;
    for (size_t i = 0; i < n_tokens * kLayers; ++i) {
        const auto first = static_cast<int32_t>(random() % kExperts);
        for (const int32_t expert : {first, static_cast<int32_t>((first + 1) % kExperts)}) {
            ids.push_back(expert);
            predictions.push_back(told == Told::truth ? expert : (expert + 4) % kExperts);
        }
    }
    running.hook->routes().set(with_experts, ids, RoutedLayer::kUsed);
    predictions.insert(predictions.end(), predictions.begin(), predictions.end());  // two layers ahead as one
    running.hook->routes().set_predictions(told == Told::nothing ? Ids{} : predictions);
    size_t first = 0;
    for (uint32_t batch = 0; batch < batches.size(); ++batch) {
        const size_t n = batches[batch];
        running.hook->watch(with_experts, true);
        std::deque<RoutedLayer> layers;
        Graph graph;
        for (const int layer : with_experts) {
            // The last one for the last token alone.
            layers.emplace_back(layer, layer == with_experts.back() ? 1 : n, Routing::softmax, batch * 10);
            if (long_rows) {
                layers.back().lengthen_rows();
            }
            layers.back().add_to(running, graph);
        }
        running.hook->begin();
        CHECK(graph.run(*running.hook));
        CHECK_EQUAL(running.hook->take_failure(), "");
        CHECK_EQUAL(graph.n_computed, graph.size());
        for (int layer = 0; layer < kLayers; ++layer) {
            CHECK_EQUAL(layers[static_cast<size_t>(layer)].n_products, 3);
            Ids expected;
            for (size_t token = layer == kLayers - 1 ? n - 1 : 0; token < n; ++token) {
                const auto row = ids.begin() + static_cast<std::ptrdiff_t>(
                                                   ((first + token) * kLayers + static_cast<size_t>(layer)) * kUsed);
                expected.insert(expected.end(), row, row + kUsed);
            }
            CHECK(running.hook->take_trace(with_experts[static_cast<size_t>(layer)]).ids == expected);
        }
        CHECK(running.store->stats().resident_bytes <= arena_bytes);
        first += n;
    }
    const StoreStats stats = running.store->stats();
    CHECK(stats.expected_hits <= stats.hits);
    CHECK(stats.wasted_bytes <= stats.expected_bytes);
    CHECK(stats.peak_bytes <= arena_bytes);
    return stats;
}

void change_nothing_but_time(Io io) {
    const WithHeldDisk nothing_held;
    for (const uint64_t arena_bytes : {room_for(4), room_for(10), kPlenty}) {
        const Tuning plain{false, false, false, false};
        const StoreStats control = follow_routes(io, arena_bytes, plain, Told::truth);
        CHECK_EQUAL(control.expected_bytes, 0U);
        for (const Told told : {Told::nothing, Told::truth, Told::falsehood}) {
            const StoreStats stats = follow_routes(io, arena_bytes, {}, told);
            CHECK_EQUAL(stats.hits + stats.misses, control.hits + control.misses);
            if (told == Told::nothing) {  // these routers cannot be asked
                CHECK_EQUAL(stats.expected_bytes, 0U);
            } else if (told == Told::truth) {
                CHECK_EQUAL(stats.expected_hits > 0, arena_bytes != kPlenty);
            }
        }
    }
}

}  // namespace

TEST(each_part_is_waited_for_before_it_is_used) {
    OneExpert one;
    Running& running = one.running;
    CHECK(one.ask(one.top_k));
    CHECK(one.done(one.top_k));  // without a single part being there
    CHECK_EQUAL(running.store->arriving_parts(), 7U);
    for (const size_t part : {0U, 1U}) {
        one.disk.let_go({one.at[part]});
        CHECK(one.ask(one.products[part]));  // to be computed at once: others are still to come
        CHECK(one.holds(part));
        CHECK_EQUAL(running.store->arriving_parts(), part == 0 ? 6U : 4U);
        CHECK(one.done(one.products[part]));
        CHECK(one.ask(one.products[part]));  // used a second time: it is there, and computed while others come
    }
    one.disk.let_go();
    CHECK(!one.ask(one.products[2]));  // nothing more to come
    CHECK(one.holds(2));
    CHECK_EQUAL(running.hook->take_failure(), "");
    CHECK_EQUAL(running.store->stats().expected_hits, 3U);
}

TEST(parts_may_be_used_in_another_order) {
    OneExpert one;
    CHECK(one.ask(one.top_k) && one.done(one.top_k));
    one.disk.let_go();
    CHECK(one.ask(one.products[2]));
    CHECK(one.holds(2));
    CHECK(one.ask(one.products[0]));
    CHECK(one.holds(0));
    CHECK(!one.ask(one.products[1]));
    CHECK(one.holds(1));
}

TEST(part_that_fails_ends_the_graph_at_its_product) {
    OneExpert one;
    one.disk.fail([at = one.at[1]](const HeldDisk::Read& read) { return read.offset == at; });
    CHECK(one.ask(one.top_k) && one.done(one.top_k));
    one.disk.let_go({one.at[0]});
    CHECK(one.ask(one.products[0]));
    CHECK(one.holds(0));
    CHECK(one.done(one.products[0]));
    one.disk.let_go();
    CHECK(one.ask(one.products[1]));
    CHECK(RouterHook::on_abort(one.running.hook.get()));
    CHECK(!one.done(one.products[1]));
    CHECK(one.running.hook->take_failure().find("reading") != std::string::npos);
    one.disk.recover();
    one.running.hook->begin();
    CHECK(one.ask(one.top_k) && one.done(one.top_k));
    for (const size_t part : {0U, 1U, 2U}) {
        one.ask(one.products[part]);
        CHECK(one.holds(part));
    }
    CHECK_EQUAL(one.running.hook->take_failure(), "");
}

TEST(interrupted_between_two_parts) {
    OneExpert one;
    CHECK(one.ask(one.top_k) && one.done(one.top_k));
    one.disk.let_go({one.at[0]});
    CHECK(one.ask(one.products[0]));
    one.running.hook->interrupt();
    CHECK(!one.done(one.products[0]));
    one.disk.let_go();
    RoutedLayer layer(1, 1, Routing::softmax, 4);
    Graph graph;
    layer.add_to(one.running, graph);
    one.running.hook->begin();
    CHECK(graph.run(*one.running.hook));
    CHECK_EQUAL(one.running.hook->take_failure(), "");
    CHECK_EQUAL(layer.n_products, 3);
}

// One token's threads wait themselves, and what of the expert they find there first does not hold up the rest.
TEST(one_tokens_products_wait_within) {
    OneExpert one({}, 1);
    Running& running = one.running;
    CHECK(one.ask(one.top_k) && one.done(one.top_k));
    for (const size_t part : {0U, 1U, 2U}) {
        CHECK(!one.ask(one.products[part]));  // nothing stops the graph here
    }
    CHECK_EQUAL(running.store->arriving_parts(), 7U);
    const int before = fake_ggml::n_checksums();
    std::thread gate_and_up([&one] { fake_ggml::compute_custom(&one.products[0], 3); });
    one.disk.let_go({one.at[1]});
    while (fake_ggml::n_checksums() == before) {
        std::this_thread::yield();
    }
    CHECK(running.store->arriving(static_cast<int>(running.model_.id_of(0, 0)), 3));
    one.disk.let_go({one.at[0]});
    gate_and_up.join();
    CHECK(one.holds(0) && one.holds(1));
    one.disk.let_go();
    fake_ggml::compute_custom(&one.products[1]);  // was computed with the first
    fake_ggml::compute_custom(&one.products[2]);
    CHECK(one.holds(2));
    CHECK_EQUAL(running.hook->take_failure(), "");
    CHECK(running.store->stats().read_ns > 0);
}

TEST(part_that_fails_is_known_when_the_token_is_asked_for) {
    OneExpert one({}, 1);
    one.disk.fail([at = one.at[1]](const HeldDisk::Read& read) { return read.offset == at; });
    CHECK(one.ask(one.top_k) && one.done(one.top_k));
    for (const size_t part : {0U, 1U, 2U}) {
        CHECK(!one.ask(one.products[part]));
    }
    one.disk.let_go();
    for (const size_t part : {0U, 1U, 2U}) {
        fake_ggml::compute_custom(&one.products[part]);
    }
    CHECK(one.holds(0) && !one.holds(1) && one.holds(2));
    CHECK(one.running.hook->take_failure().find("reading") != std::string::npos);
    one.disk.recover();
    one.running.hook->begin();
    CHECK(one.ask(one.top_k) && one.done(one.top_k));
    for (const size_t part : {0U, 1U, 2U}) {
        CHECK(!one.ask(one.products[part]));
        CHECK_EQUAL(one.products[part].op, fake_ggml::kOpCustom);
    }
    for (const size_t part : {0U, 1U, 2U}) {
        fake_ggml::compute_custom(&one.products[part]);
        CHECK(one.holds(part));
    }
    CHECK_EQUAL(one.running.hook->take_failure(), "");
}

TEST(with_one_lane_nobody_else_would_read) {
    const TinyModel model = deep_model();
    Running running(model, Io::pread, room_for(6), {}, 1);
    RoutedLayer layer(1, 1, Routing::softmax, 4);
    Graph graph;
    layer.add_to(running, graph);
    running.hook->begin();
    CHECK(graph.run(*running.hook));
    CHECK_EQUAL(running.hook->take_failure(), "");
    CHECK_EQUAL(layer.n_products, 3);
}

TEST(without_overlap_all_parts_are_there_at_once) {
    Tuning tuning;
    tuning.overlap = false;
    OneExpert one(tuning);
    one.disk.let_go();
    CHECK(one.ask(one.top_k) && one.done(one.top_k));
    CHECK_EQUAL(one.running.store->arriving_parts(), 0U);
    for (const size_t part : {0U, 1U, 2U}) {
        CHECK(one.holds(part));
        CHECK(!one.ask(one.products[part]));
    }
}

TEST(routes_and_predictions_direct) { change_nothing_but_time(Io::direct); }
TEST(routes_and_predictions_mmap) { change_nothing_but_time(Io::mmap); }
TEST(routes_and_predictions_pread) { change_nothing_but_time(Io::pread); }

TEST(right_predictions_hide_the_next_layers_reads) {
    const WithHeldDisk nothing_held;
    Tuning tuning;
    const StoreStats untold = follow_routes(Io::pread, room_for(10), tuning, Told::nothing);
    const StoreStats told = follow_routes(Io::pread, room_for(10), tuning, Told::truth);
    CHECK(told.hits > untold.hits);
    CHECK_EQUAL(told.wasted_bytes, 0U);
    tuning.look_ahead = false;
    CHECK_EQUAL(follow_routes(Io::pread, room_for(10), tuning, Told::truth).expected_bytes, 0U);
}

TEST(what_keeps_its_mul_mat_ids_is_read_ahead_as_well) {
    const WithHeldDisk nothing_held;
    const StoreStats untold = follow_routes(Io::pread, room_for(10), {}, Told::nothing, {0, 1, 2}, true);
    const StoreStats told = follow_routes(Io::pread, room_for(10), {}, Told::truth, {0, 1, 2}, true);
    CHECK(told.hits > untold.hits);
    CHECK_EQUAL(told.wasted_bytes, 0U);
}

TEST(layers_without_experts_are_no_layers_ahead) {
    const WithHeldDisk nothing_held;
    for (const std::vector<int>& with_experts : {std::vector{0, 3, 6}, std::vector{1, 2, 4}}) {
        const StoreStats untold = follow_routes(Io::pread, room_for(10), {}, Told::nothing, with_experts);
        const StoreStats told = follow_routes(Io::pread, room_for(10), {}, Told::truth, with_experts);
        CHECK(told.hits > untold.hits);
        CHECK_EQUAL(told.wasted_bytes, 0U);
    }
}

TEST(routes_that_end_too_early_end_the_graph) {
    const TinyModel model = deep_model();
    Running running(model, Io::pread, kPlenty);
    running.hook->routes().set({0}, {1, 2}, RoutedLayer::kUsed);
    for (const bool enough : {true, false}) {
        RoutedLayer layer(0, 1, Routing::softmax, 5);
        Graph graph;
        layer.add_to(running, graph);
        running.hook->begin();
        graph.run(*running.hook);
        CHECK_EQUAL(layer.n_products, enough ? 3 : 0);
        CHECK_EQUAL(running.hook->take_failure().find("were given for 1 tokens") != std::string::npos, !enough);
    }
}

TEST(forced_experts_that_do_not_exist_end_the_graph) {
    const TinyModel model = deep_model();
    Running running(model, Io::pread, room_for(6));
    running.hook->routes().set({0}, {1, 1 << 20}, RoutedLayer::kUsed);
    RoutedLayer layer(0, 1, Routing::softmax, 6);
    Graph graph;
    layer.add_to(running, graph);
    running.hook->begin();
    graph.run(*running.hook);
    CHECK_EQUAL(layer.n_products, 0);
    CHECK(running.hook->take_failure().find("asked for expert 1048576 of 8") != std::string::npos);
}

TEST(predicted_experts_that_do_not_exist_end_the_graph) {
    const TinyModel model = deep_model();
    for (const size_t n_tokens : {1U, 4U}) {
        Running running(model, Io::pread, room_for(10));
        running.hook->routes().set({0, 1}, Ids(n_tokens * 2 * kUsed, 3), RoutedLayer::kUsed);
        running.hook->routes().set_predictions(Ids(n_tokens * 2 * kUsed, 1 << 20));
        RoutedLayer layer(0, n_tokens, Routing::softmax, 7);
        Graph graph;
        layer.add_to(running, graph);
        running.hook->begin();
        graph.run(*running.hook);
        CHECK(running.hook->take_failure().find("1048576") != std::string::npos);
    }
}
