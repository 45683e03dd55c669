#include "router_hook.h"

#include <atomic>
#include <set>
#include <thread>

#include "check.h"
#include "fake_ggml.h"
#include "reserved.h"
#include "resident_pages.h"
#include "running_hook.h"
#include "tiny_model.h"

using edgemoe::Io;
using edgemoe::page_size;
using edgemoe::RouterHook;
using edgemoe::ggml::Tensor;
using fake_ggml::Graph;
using fake_ggml::make_tensor;

namespace {

std::vector<std::vector<int32_t>> random_ids(std::mt19937& random, size_t n_tokens, size_t n_used) {
    std::vector<std::vector<int32_t>> ids(n_tokens);
    for (std::vector<int32_t>& row : ids) {
        std::vector<int32_t> all{0, 1, 2, 3, 4, 5, 6, 7};
        std::shuffle(all.begin(), all.end(), random);
        row.assign(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(n_used));
    }
    return ids;
}

void serve_tokens(Io io, uint64_t slab_bytes, uint64_t arena_bytes, size_t n_tokens, bool staged,
                  bool in_slots = false) {
    const TinyModel model = moe_model(slab_bytes);
    Running running(model, io, arena_bytes);
    CHECK_EQUAL(running.store->in_slots(), in_slots);
    std::mt19937 random(9);
    for (int batch = 0; batch < 20; ++batch) {
        Graph graph;
        running.add_layer(graph, 0, random_ids(random, n_tokens, 3));
        running.add_layer(graph, 2, random_ids(random, n_tokens, 3));
        running.hook->begin();
        const bool finished = graph.run(*running.hook);
        CHECK_EQUAL(running.hook->take_failure(), "");
        CHECK(finished);
        CHECK_EQUAL(graph.n_computed, graph.size());
        CHECK_EQUAL(running.n_products, (batch + 1) * 6);
        CHECK(running.store->stats().resident_bytes <= arena_bytes);
    }
    CHECK_EQUAL(running.hook->staged_layers() > 0, staged);
}

// What the scheduler computes graphs in.
struct ComputeBuffer {
    ComputeBuffer() {
        type.iface.is_host = [](edgemoe::ggml::BufferType*) { return true; };
        buffer.iface.get_base = [](edgemoe::ggml::Buffer* its) { return its->context; };
    }
    const Reserved memory{40};
    edgemoe::ggml::BufferType type{};
    edgemoe::ggml::Buffer buffer{{}, &type, memory.base, memory.size, edgemoe::ggml::kUsageCompute};
};

uint64_t slab_pages(uint64_t n) { return n * 3 * page_size(); }

// One token, one layer.
bool run_once(Running& running, int layer, const std::vector<int32_t>& ids, const std::string& top_k_name = "") {
    Graph graph;
    running.add_layer(graph, layer, {ids}, {0, 1, 2}, top_k_name);
    running.hook->begin();
    return graph.run(*running.hook);
}

}  // namespace

TEST(whole_layers_direct) { serve_tokens(Io::direct, 2 * page_size(), slab_pages(12), 1, false); }
TEST(whole_layers_mmap) { serve_tokens(Io::mmap, 2 * page_size(), slab_pages(12), 1, false); }
TEST(whole_layers_pread) { serve_tokens(Io::pread, 2 * page_size(), slab_pages(12), 1, false); }
TEST(staged_layers_direct) { serve_tokens(Io::direct, 2 * page_size(), slab_pages(8), 5, true); }
TEST(staged_layers_mmap) { serve_tokens(Io::mmap, 2 * page_size(), slab_pages(8), 5, true); }
TEST(staged_layers_pread) { serve_tokens(Io::pread, 2 * page_size(), slab_pages(8), 5, true); }
TEST(whole_layers_in_slots_direct) { serve_tokens(Io::direct, 2 * page_size(), slab_pages(27), 1, false, true); }
TEST(whole_layers_in_slots_pread) { serve_tokens(Io::pread, 2 * page_size(), slab_pages(27), 5, false, true); }
TEST(staged_odd_slabs) { serve_tokens(Io::pread, 777, 6 * page_size(), 4, true); }
TEST(everything_fits) { serve_tokens(Io::pread, 777, kPlenty, 6, false); }

TEST(staged_part_may_be_used_twice) {
    const TinyModel model = moe_model(2 * page_size());
    Running running(model, Io::pread, slab_pages(8));
    Graph graph;
    running.add_layer(graph, 0, {{0, 1, 2, 3}, {4, 5, 6, 7}}, {0, 0, 1, 2, 1, 0});
    running.add_layer(graph, 2, {{0}, {1}});
    running.hook->begin();
    CHECK(graph.run(*running.hook));
    CHECK_EQUAL(running.hook->take_failure(), "");
    CHECK_EQUAL(running.n_products, 9);
    CHECK_EQUAL(running.hook->staged_layers(), 1U);
}

// llama.cpp keeps the graph of a token for the next one, whose experts are in other slots.
TEST(graph_that_is_computed_again_finds_its_experts) {
    const TinyModel model = moe_model(2 * page_size());
    Running running(model, Io::pread, slab_pages(27));
    CHECK(running.store->in_slots());
    Graph again;
    running.add_layer(again, 0, {{2, 5}});
    std::set<int32_t> slots;
    for (int32_t other = 0; other < 6; ++other) {
        running.hook->begin();
        CHECK(again.run(*running.hook));
        CHECK_EQUAL(running.hook->take_failure(), "");
        slots.insert(running.store->slot(0, 2));
        CHECK(run_once(running, 2, {0, 1, 2, 3, 4, 5, 6, 7}));
    }
    CHECK(slots.size() > 1);
    CHECK_EQUAL(running.n_products, 6 * 6);
}

// Between two single tokens experts have the memory that batches are computed in; a batch gets it back.
TEST(batch_memory_is_lent_while_tokens_come_one_by_one) {
    const TinyModel model = moe_model(2 * page_size());
    Running running(model, Io::pread, slab_pages(27), {}, 2, slab_pages(9));
    CHECK(running.store->in_slots());
    ComputeBuffer batch;
    const Reserved& memory = batch.memory;
    const auto compute = [&](size_t n_tokens) {
        Graph graph;
        std::mt19937 random(static_cast<uint32_t>(n_tokens));
        running.add_layer(graph, 0, random_ids(random, n_tokens, 3), {0, 1, 2}, "", &batch.buffer);
        running.hook->begin(0, static_cast<int64_t>(n_tokens));
        std::memset(memory.base, 1, n_tokens > 1 ? memory.size : 1);
        CHECK(graph.run(*running.hook));
        CHECK_EQUAL(running.hook->take_failure(), "");
    };
    compute(1);
    CHECK(!running.store->borrowing());  // nobody has seen a graph before
    compute(5);
    CHECK_EQUAL(count_resident(memory.base, memory.size), 40U);
    compute(1);
    CHECK(running.store->borrowing());
    CHECK_EQUAL(count_resident(memory.base, memory.size), 1U);
    compute(1);
    CHECK(running.store->borrowing());
    compute(2);
    CHECK(!running.store->borrowing());
}

// Who cannot borrow leaves it alone: each token would have to be given its pages anew.
TEST(batch_memory_stays_where_there_are_no_slots) {
    const TinyModel model = moe_model(777);
    Running running(model, Io::pread, slab_pages(9), {}, 2, slab_pages(9));
    CHECK(!running.store->in_slots());
    ComputeBuffer batch;
    const Reserved& memory = batch.memory;
    std::memset(memory.base, 1, memory.size);
    for (int token = 0; token < 3; ++token) {
        Graph graph;
        running.add_layer(graph, 0, {{2, 5}}, {0, 1, 2}, "", &batch.buffer);
        running.hook->begin(token, 1);
        CHECK(graph.run(*running.hook));
        CHECK_EQUAL(count_resident(memory.base, memory.size), 40U);
    }
    CHECK(!running.store->borrowing());
}

TEST(expert_that_was_not_asked_for_has_no_slot) {
    const TinyModel model = moe_model(2 * page_size());
    Running running(model, Io::pread, slab_pages(27));
    CHECK(run_once(running, 0, {2, 5}));
    CHECK_REFUSED(running.store->slot(0, 3), "layer 0 uses expert 3 that was not asked for");
    CHECK_REFUSED(running.store->slot(0, 8), "layer 0 uses expert 8");
}

TEST(other_names_are_ignored) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    Tensor unreadable = make_tensor(fake_ggml::kI32, "", {2, 2});  // looking at its data would be a crash
    for (const char* name :
         {"ffn_moe_topk-0 (copy)", "ffn_moe_topk-", "ffn_moe_topk", "ffn_moe_topk-0x", "ffn_moe_topk--0",
          "ffn_moe_topk-1", "ffn_moe_topk-3", "ffn_moe_topk-4294967296", "ffn_moe_topk-18446744073709551616",
          "xffn_moe_topk-0", "ffn_moe_logits-0", "", "ffn_moe_topk- 0", "ffn_moe_topk-2 "}) {
        fake_ggml::set_name(&unreadable, name);
        CHECK(!RouterHook::on_node(&unreadable, true, running.hook.get()));
        CHECK(RouterHook::on_node(&unreadable, false, running.hook.get()));
    }
    fake_ggml::set_name(&unreadable, "ffn_moe_topk-2");
    CHECK(RouterHook::on_node(&unreadable, true, running.hook.get()));
    CHECK_EQUAL(running.hook->take_failure(), "");
}

TEST(only_the_top_k_stops_the_graph) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    for (const bool resident : {false, true}) {
        Graph graph;
        running.add_layer(graph, 0, {{1, 2}});
        running.add_layer(graph, 2, {{3, 4}});
        running.hook->begin();
        CHECK(graph.run(*running.hook));
        // And the parts that others are still to follow, where there is something to wait for.
        CHECK(resident ? graph.n_pieces == 3 : graph.n_pieces <= 7);
    }
}

TEST(resident_model_is_not_stopped_but_counted) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    for (const int layer : {0, 2}) {
        CHECK(run_once(running, layer, {0, 1, 2, 3, 4, 5, 6, 7}));
    }
    CHECK_EQUAL(running.hook->take_failure(), "");
    CHECK(running.store->settled(0) && running.store->settled(2));
    const uint64_t before = running.store->stats().hits;
    Graph graph;
    running.add_layer(graph, 0, {{1, 2}});
    running.add_layer(graph, 2, {{3, 4}});
    running.hook->begin();
    CHECK(graph.run(*running.hook));
    CHECK_EQUAL(graph.n_pieces, 1U);
    CHECK_EQUAL(running.store->stats().hits, before + 12);
    CHECK_EQUAL(running.hook->take_failure(), "");
}

TEST(long_batch_has_whole_layers_read_where_everything_fits) {
    const TinyModel model = moe_model(page_size());
    const auto resident_after = [&](int64_t n_tokens, size_t n_routed, uint64_t arena, edgemoe::Tuning tuning) {
        Running running(model, Io::pread, arena, tuning);
        Graph graph;
        running.add_layer(graph, 2, std::vector<std::vector<int32_t>>(n_routed, {1, 2}));
        running.hook->begin(0, n_tokens);
        CHECK(graph.run(*running.hook));
        CHECK_EQUAL(running.hook->take_failure(), "");
        int n_resident = 0;
        for (int32_t expert = 0; expert < kExperts; ++expert) {
            n_resident += running.store->resident(2, expert) ? 1 : 0;
        }
        if (n_resident == kExperts) {  // all of it is what the file says, and nothing has to be read for it
            const uint64_t before = running.store->stats().misses;
            CHECK(run_once(running, 2, {0, 1, 2, 3, 4, 5, 6, 7}));
            CHECK_EQUAL(running.hook->take_failure(), "");
            CHECK_EQUAL(running.store->stats().misses, before);
            CHECK(running.store->settled(2));
        }
        return n_resident;
    };
    CHECK_EQUAL(resident_after(256, 256, kPlenty, {}), kExperts);
    CHECK_EQUAL(resident_after(256, 1, kPlenty, {}), kExperts);  // the last layer
    CHECK_EQUAL(resident_after(255, 255, kPlenty, {}), 2);
    CHECK_EQUAL(resident_after(256, 256, slab_pages(12), {}), 2);
    edgemoe::Tuning blind;
    blind.look_ahead = false;
    CHECK_EQUAL(resident_after(256, 256, kPlenty, blind), 2);
}

TEST(wrong_expert_aborts_with_a_sentence) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    Graph graph;
    running.add_layer(graph, 0, {{1, 2}});
    running.add_layer(graph, 2, {{3, kExperts}});
    running.hook->begin();
    graph.run(*running.hook);
    CHECK_EQUAL(running.n_products, 3);  // nothing after the failure was computed
    CHECK(RouterHook::on_abort(running.hook.get()));
    CHECK(running.hook->interrupted());
    const std::string failure = running.hook->take_failure();
    CHECK(failure.find("layer 2 asked for expert 8 of 8") != std::string::npos);
    CHECK_EQUAL(running.hook->take_failure(), "");
    CHECK(run_once(running, 2, {3, 4}));
    CHECK_EQUAL(running.hook->take_failure(), "");
}

TEST(read_failure_aborts_with_a_sentence) {
    for (const bool staged : {false, true}) {
        const TinyModel model = moe_model(2 * page_size());
        Running running(model, Io::pread, staged ? slab_pages(8) : kPlenty);
        model.files.front()->truncate(200);
        Graph graph;
        running.add_layer(graph, 0, {{0, 1, 2, 3}}, {});
        for (int i = 0; i < 3; ++i) {
            Tensor product = make_tensor(fake_ggml::kF32, "product", {1});
            product.op = fake_ggml::kOpMulMatId;
            product.src[0] = &running.loaded->tensors[model.id_of(0, static_cast<size_t>(i))];
            graph.add(product);
        }
        graph.add(make_tensor(fake_ggml::kF32, "later", {1}));
        running.hook->begin();
        const bool finished = graph.run(*running.hook);
        CHECK_EQUAL(finished, !staged);
        CHECK_EQUAL(graph.n_computed, staged ? 3U : 2U);  // stops before the first product, or at the top-k
        CHECK(RouterHook::on_abort(running.hook.get()));
        CHECK(running.hook->take_failure().find("was changed while in use") != std::string::npos);
        model.files.front()->restore();
        CHECK(run_once(running, 0, {0, 1}));
    }
}

TEST(one_part_too_large_for_the_arena_aborts) {
    const TinyModel model = moe_model(2 * page_size());
    Running running(model, Io::pread, slab_pages(3));
    CHECK(!run_once(running, 0, {0, 1, 2, 3, 4}));
    CHECK(running.hook->take_failure().find("need more than the arena") != std::string::npos);
    CHECK_EQUAL(running.n_products, 0);
}

TEST(first_failure_is_kept_and_begin_forgets_it) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::mmap, kPlenty);
    run_once(running, 0, {9});
    model.files.front()->truncate(50);  // take_failure finds this out by itself
    CHECK(running.hook->take_failure().find("layer 0 asked for expert 9") != std::string::npos);
    model.files.front()->restore();
    run_once(running, 0, {9});
    running.hook->begin();
    CHECK(!RouterHook::on_abort(running.hook.get()));
    CHECK(!running.hook->interrupted());
    CHECK_EQUAL(running.hook->take_failure(), "");
}

TEST(experts_that_no_router_announced_abort) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    Graph graph;
    running.add_layer(graph, 0, {{1, 2}});
    running.add_layer(graph, 2, {{3, 4}}, {0, 1, 2}, "ffn_moe_topk-2 (renamed)");
    running.hook->begin();
    CHECK(!graph.run(*running.hook));
    CHECK(running.hook->take_failure().find("layer 2 uses experts that its router never announced") !=
          std::string::npos);
}

TEST(what_a_router_announced_ends_with_its_decode) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    CHECK(run_once(running, 0, {1, 2}));
    CHECK(!run_once(running, 0, {3, 4}, "ffn_moe_topk-0 (renamed)"));
    CHECK(running.hook->take_failure().find("never announced") != std::string::npos);
}

TEST(interrupt_at_the_top_k_reads_nothing) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    Tensor top_k = make_tensor(fake_ggml::kI32, "ffn_moe_topk-0", {2, 1});
    std::vector<int32_t> ids{1, 2};
    top_k.data = ids.data();
    running.hook->begin();
    CHECK(RouterHook::on_node(&top_k, true, running.hook.get()));
    running.hook->interrupt();
    CHECK(!RouterHook::on_node(&top_k, false, running.hook.get()));
    CHECK_EQUAL(running.store->stats().misses, 0U);
}

TEST(interrupt_stops_the_graph) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, kPlenty);
    Graph graph;
    graph.add(make_tensor(fake_ggml::kF32, "first", {1}));
    graph.add(make_tensor(fake_ggml::kF32, "second", {1}), [&](Tensor*) { running.hook->interrupt(); });
    running.add_layer(graph, 0, {{1, 2}});
    running.hook->begin();
    CHECK(!graph.run(*running.hook));
    CHECK_EQUAL(graph.n_computed, 2U);
    CHECK(running.hook->interrupted());
    CHECK_EQUAL(running.hook->take_failure(), "");
    CHECK_EQUAL(running.n_products, 0);
    CHECK(run_once(running, 0, {1, 2}));
}

TEST(interrupt_comes_from_another_thread) {
    const TinyModel model = moe_model(100);
    Running running(model, Io::pread, 3 * page_size());
    Graph graph;
    std::mt19937 random(4);
    std::atomic<bool> running_now{false};
    graph.add(make_tensor(fake_ggml::kF32, "first", {1}), [&](Tensor*) { running_now = true; });
    for (int i = 0; i < 5; ++i) {
        running.add_layer(graph, 0, random_ids(random, 1, 2));
    }
    running.hook->begin();
    std::thread other([&] {
        while (!running_now) {
            std::this_thread::yield();
        }
        running.hook->interrupt();
    });
    bool finished = true;
    while (finished && !running.hook->interrupted()) {
        finished = graph.run(*running.hook);
    }
    other.join();
    CHECK(running.hook->interrupted());
    CHECK_EQUAL(running.hook->take_failure(), "");
}

TEST(mapping_lost_after_the_last_read_is_told) {
    const TinyModel model = moe_model(2 * page_size());
    Running running(model, Io::mmap, kPlenty);
    for (const int layer : {0, 2}) {
        CHECK(run_once(running, layer, {0, 1, 2, 3, 4, 5, 6, 7}));
    }
    CHECK_EQUAL(running.hook->take_failure(), "");
    CHECK(running.store->settled(0) && running.store->settled(2));
    model.files.front()->overwrite(0, random_bytes(10, 3));
    Graph graph;
    graph.add(make_tensor(fake_ggml::kF32, "no experts at all", {1}));
    running.hook->begin();
    CHECK(graph.run(*running.hook));
    CHECK(running.hook->take_failure().find("was changed while in use") != std::string::npos);
    model.files.front()->restore();
}

TEST(batch_has_no_more_hits_than_experts) {
    const TinyModel model = moe_model(777);
    Running running(model, Io::pread, kPlenty);
    running.store->acquire(0, 7, {0, 1, 2, 3, 4, 5, 6, 7});
    CHECK(running.store->settled(0));
    const uint64_t before = running.store->stats().hits;
    Graph graph;
    running.add_layer(graph, 0, std::vector<std::vector<int32_t>>(100, {3, 4, 5}));
    running.hook->begin();
    CHECK(graph.run(*running.hook));
    CHECK_EQUAL(running.store->stats().hits, before + kExperts * 3U);
}
