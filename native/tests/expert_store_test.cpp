// The store against a naive model of its contract, with the kernel's page tables as a third opinion.
#include "expert_store.h"

#include <unistd.h>

#include <atomic>
#include <thread>

#include "check.h"
#include "reference_store.h"
#include "resident_pages.h"
#include "tiny_model.h"

using edgemoe::ExpertStore;
using edgemoe::Io;
using edgemoe::page_size;
using edgemoe::StoreStats;
using edgemoe::Tuning;

namespace {

using Experts = std::vector<int32_t>;

// The least recently used leaves first. With recycling, memory of slabs that have left is kept within the arena.
constexpr Tuning kPlain{false, false, false, false}, kRecycling{true, false, false, false, 0};

// Slabs of every awkward size: a byte, less than a page, around a page, several pages; layers 0 and 3 have no experts.
TinyModel awkward_model(uint64_t seed) {
    const uint64_t page = page_size();
    return {{{0, {}},
             {32, {1, 100, 700}},
             {16, {page - 1, page, page + 1}},
             {0, {}},
             {16, {3 * page + 17, 100}},
             {8, {page / 2, 2 * page, 5 * page + 1, 33}},
             {1, {page + 5}}},
            {},
            2,
            seed};
}

TinyModel large_model(uint64_t seed) {
    return {{{6, {(1U << 20) + 12345, 1U << 20}}, {5, {(2U << 20) + 1}}}, {}, 1, seed};
}

void compare_stats(const StoreStats& found, const StoreStats& expected) {
    CHECK_EQUAL(found.hits, expected.hits);
    CHECK_EQUAL(found.misses, expected.misses);
    CHECK_EQUAL(found.evictions, expected.evictions);
    CHECK_EQUAL(found.bytes_read, expected.bytes_read);
    CHECK_EQUAL(found.peak_bytes, expected.peak_bytes);
}

// The kernel holds memory for exactly the pages that the model counts; in mmap mode it may take some back at any time,
// and recycling keeps some more, within the arena.
void compare_pages(PlacedStore& placed, const TinyModel& model, const ReferenceStore& reference) {
    const Io io = placed->io();
    const bool recycle = placed->tuning().recycle;
    const std::vector<bool> held = resident_pages(placed.base(), placed.size());
    std::vector<bool> expected(held.size(), false);
    for (const auto& [page, count] : reference.pages) {
        const auto [id, number] = page;
        const uint64_t slack = model.tensors[id].offset % page_size();
        const std::byte* first = placed.place(id) - slack;
        expected[static_cast<size_t>(first - placed.base()) / page_size() + number -
                 model.tensors[id].offset / page_size()] = true;
    }
    for (size_t i = 0; i < held.size(); ++i) {
        CHECK(held[i] == expected[i] || (held[i] ? recycle : io == Io::mmap));
    }
    CHECK(static_cast<uint64_t>(std::count(held.begin(), held.end(), true)) * page_size() <= placed->arena_bytes());
}

Experts random_experts(std::mt19937& random, int n_expert, int most) {
    Experts experts;
    for (int k = static_cast<int>(random() % static_cast<uint32_t>(most)) + 1; k > 0; --k) {
        experts.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(n_expert)));
    }
    return experts;
}

void compare(const TinyModel& model, Io io, int n_lanes, uint64_t arena_bytes, int n_requests, uint32_t seed,
             Tuning tuning) {
    PlacedStore placed(model, io, n_lanes, arena_bytes, tuning);
    ReferenceStore reference(model, io, arena_bytes, tuning.recycle ? arena_bytes / 64 : 0);
    std::mt19937 random(seed);
    int n_refused = 0;
    for (int i = 0; i < n_requests; ++i) {
        const auto layer = static_cast<int>(random() % model.layers.size());
        const int n_expert = model.layers[static_cast<size_t>(layer)].n_expert;
        if (n_expert == 0) {
            CHECK_EQUAL(placed->n_parts(layer), 0);
            continue;
        }
        const uint32_t all = model.all_parts(layer);
        const bool ahead = random() % 5 == 0;
        const uint32_t parts = !ahead && random() % 3 == 0 ? random() % all + 1 : all;
        const Experts experts = random_experts(random, n_expert, 10);
        const auto serve = [&] { ahead ? placed->warm(layer, experts) : placed->acquire(layer, parts, experts); };
        const bool fits = placed->fits(layer, parts, experts);
        if (ahead ? reference.warm(layer, experts) : reference.acquire(layer, parts, experts)) {
            serve();
            for (size_t part = 0; (parts >> part) != 0; ++part) {
                for (const int32_t expert : experts) {
                    CHECK((parts >> part & 1) == 0 || placed.holds(layer, part, expert));
                }
            }
        } else {
            CHECK(!fits);
            CHECK_REFUSED(serve(), "need more than the arena");
            ++n_refused;
        }
        const StoreStats stats = placed->stats();
        compare_stats(stats, reference.stats);
        CHECK_EQUAL(stats.resident_bytes, reference.resident_bytes());
        CHECK(stats.resident_bytes <= arena_bytes);
        compare_pages(placed, model, reference);
    }
    // Whatever counts as resident has its bytes, not only what was asked for last.
    for (const auto& [layer, part, expert] : reference.resident) {
        CHECK(placed.holds(layer, part, expert));
    }
    CHECK(n_refused < n_requests / 2);
}

void compare_awkward(Io io) {
    const TinyModel model = awkward_model(11);
    for (const uint64_t n_pages : {12U, 30U, 100U, 130U, 100000U}) {
        const auto seed = static_cast<uint32_t>(n_pages);
        compare(model, io, 3, n_pages * page_size(), 150, seed, kPlain);
        compare(model, io, 3, n_pages * page_size(), 100, seed + 1, kRecycling);
    }
    compare(model, io, 1, 40 * page_size() + 1234, 150, 5, kPlain);
}

void compare_large(Io io) {
    const TinyModel model = large_model(12);
    compare(model, io, 4, uint64_t{11} << 20, 20, 6, kPlain);
    compare(model, io, 4, uint64_t{11} << 20, 20, 7, kRecycling);
}

// Every expert of every layer, in each of the modes.
void serve_everything(Io io) {
    const TinyModel model = awkward_model(13);
    PlacedStore placed(model, io, 2, 1U << 30);
    uint64_t n_slabs = 0;
    for (int round = 0; round < 2; ++round) {
        for (size_t layer = 0; layer < model.layers.size(); ++layer) {
            Experts experts;
            for (int expert = 0; expert < model.layers[layer].n_expert; ++expert) {
                experts.push_back(expert);
            }
            if (!experts.empty()) {
                CHECK_EQUAL(placed->settled(static_cast<int>(layer)), round == 1);
                placed->acquire(static_cast<int>(layer), model.all_parts(static_cast<int>(layer)), experts);
                CHECK(placed.holds(static_cast<int>(layer), experts));
                CHECK(placed->settled(static_cast<int>(layer)));
            }
            n_slabs += round == 0 ? experts.size() * model.layers[layer].slab_bytes.size() : 0;
        }
    }
    const StoreStats stats = placed->stats();
    CHECK_EQUAL(stats.misses, n_slabs);
    CHECK_EQUAL(stats.hits, n_slabs);
    CHECK_EQUAL(stats.evictions, 0U);
}

void read_all_dense(Io io) {
    const uint64_t page = page_size();
    const TinyModel model({{4, {3 * page}}},
                          {0, 1, 63, 4096, (64U << 10) - 1, 64U << 10, (64U << 10) + 1, 3U << 20, 100, 300001}, 2, 14);
    PlacedStore placed(model, io, 3, 1U << 20);
    uint64_t total = 0;
    for (size_t id = 0; id < model.tensors.size(); ++id) {
        const edgemoe::TensorSpec& spec = model.tensors[id];
        if (spec.n_expert == 0) {
            placed->read_dense(static_cast<int>(id), placed.place(id));
            total += spec.n_bytes;
            CHECK_EQUAL(placed->stats().dense_bytes, total);
        }
    }
    // Afterwards, because each reading might have spilled over a neighbour.
    for (size_t id = 0; id < model.tensors.size(); ++id) {
        const edgemoe::TensorSpec& spec = model.tensors[id];
        CHECK(spec.n_expert != 0 || std::memcmp(placed.place(id), model.bytes_of(id), spec.n_bytes) == 0);
    }
    CHECK_EQUAL(placed->stats().resident_bytes, 0U);
    placed->acquire(0, 1, {0, 3});
    CHECK(placed.holds(0, {0, 3}));
}

}  // namespace

TEST(direct_as_the_reference) { compare_awkward(Io::direct); }
TEST(mmap_as_the_reference) { compare_awkward(Io::mmap); }
TEST(pread_as_the_reference) { compare_awkward(Io::pread); }
TEST(large_slabs_direct) { compare_large(Io::direct); }
TEST(large_slabs_mmap) { compare_large(Io::mmap); }
TEST(large_slabs_pread) { compare_large(Io::pread); }
TEST(everything_direct) { serve_everything(Io::direct); }
TEST(everything_mmap) { serve_everything(Io::mmap); }
TEST(everything_pread) { serve_everything(Io::pread); }
TEST(dense_direct) { read_all_dense(Io::direct); }
TEST(dense_mmap) { read_all_dense(Io::mmap); }
TEST(dense_pread) { read_all_dense(Io::pread); }

TEST(pages_of_tensors_are_their_own) {
    const TinyModel model = awkward_model(15);
    PlacedStore placed(model, Io::pread, 1, 1U << 20);
    uint64_t last_page = 0;
    for (size_t id = 0; id < model.tensors.size(); ++id) {
        const auto address = reinterpret_cast<uintptr_t>(placed.place(id));
        CHECK_EQUAL(address % page_size(), model.tensors[id].offset % page_size());
        CHECK(address / page_size() > last_page);
        last_page = (address + model.tensors[id].n_bytes - 1) / page_size();
    }
}

TEST(huge_pages_are_kept_away) {
    const TinyModel model({{4, {4 * page_size() + 5}}}, {}, 1, 23);
    for (const Io io : {Io::pread, Io::direct}) {
        PlacedStore placed(model, io, 1, 1U << 20);
        const std::vector<std::string> areas = memory_areas(placed.place(0), model.tensors[0].n_bytes);
        CHECK_EQUAL(areas.size(), 1U);
        if (::access("/sys/kernel/mm/transparent_hugepage/enabled", R_OK) == 0) {
            CHECK(areas.front().find(" nh") != std::string::npos);
        }
    }
}

TEST(layer_is_settled_only_where_all_layers_fit) {
    const TinyModel model({{2, {page_size()}}, {2, {page_size()}}}, {}, 1, 24);
    for (const uint64_t n_pages : {5U, 8U}) {
        PlacedStore placed(model, Io::pread, 1, n_pages * page_size());
        placed->acquire(0, 1, {0, 1});
        CHECK_EQUAL(placed->settled(0), n_pages == 8);
        CHECK(!placed->settled(1));
    }
}

TEST(fitting_counts_an_expert_once) {
    const TinyModel model({{4, {page_size()}}}, {}, 1, 25);
    PlacedStore placed(model, Io::pread, 1, 3 * page_size());
    CHECK(placed->fits(0, 1, {2, 2, 2, 2}));
    CHECK(!placed->fits(0, 1, {0, 1, 2, 3}));
    CHECK(placed->fits(0, 0, {0, 1, 2, 3}));
}

TEST(older_expert_leaves_first) {
    const TinyModel model({{4, {4 * page_size()}}}, {}, 1, 16);
    PlacedStore placed(model, Io::pread, 1, 10 * page_size(), kPlain);  // two slabs, their odd pages included
    placed->acquire(0, 1, {0});
    placed->acquire(0, 1, {1});
    placed->acquire(0, 1, {0});
    placed->acquire(0, 1, {2});  // 1 leaves
    CHECK_EQUAL(placed->stats().evictions, 1U);
    placed->acquire(0, 1, {0});
    CHECK_EQUAL(placed->stats().hits, 2U);
    placed->acquire(0, 1, {1});
    CHECK_EQUAL(placed->stats().misses, 4U);
}

// What the policy makes of it is forecast_test's; here, that the store tells it and asks it.
TEST(preferred_expert_leaves_last) {
    const TinyModel model({{4, {4 * page_size()}}, {2, {4 * page_size()}}}, {}, 1, 16);
    for (const int32_t preferred : {0, 1}) {
        PlacedStore placed(model, Io::pread, 1, 10 * page_size());  // two slabs, their odd pages included
        placed->prefer(0, {preferred});
        placed->warm(0, {0, 1});
        placed->routed(0, 1, {2});
        placed->acquire(0, 1, {2});
        CHECK_EQUAL(placed->stats().evictions, 1U);
        CHECK(placed->resident(0, preferred));
        CHECK(!placed->resident(0, 1 - preferred));
    }
}

TEST(warming_counts_neither_hits_nor_misses) {
    const TinyModel model({{4, {100, 4 * page_size()}}}, {}, 1, 26);
    PlacedStore placed(model, Io::pread, 1, 12 * page_size(), kPlain);
    placed->warm(0, {0, 2, 0});
    StoreStats stats = placed->stats();
    CHECK_EQUAL(stats.hits + stats.misses, 0U);
    CHECK_EQUAL(stats.bytes_read, 2 * (100 + 4 * page_size()));
    CHECK(placed.holds(0, {0, 2}));
    placed->acquire(0, 3, {0});
    CHECK_EQUAL(placed->stats().hits, 2U);
    CHECK_EQUAL(placed->stats().misses, 0U);
    placed->warm(0, {1});  // for it 2 leaves: a warmed expert is no more than one that was used then
    CHECK_EQUAL(placed->stats().evictions, 2U);
    CHECK(placed.holds(0, {0, 1}));
    CHECK_REFUSED(placed->warm(0, {0, 1, 2, 3}), "need more than the arena");
    CHECK_REFUSED(placed->warm(0, {4}), "layer 0 asked for expert 4 of 4");
    CHECK_REFUSED(placed->warm(1, {}), "layer 1 was asked for experts, but the model has none there");
    CHECK_REFUSED(placed->prefer(0, {-1}), "layer 0 asked for expert -1 of 4");
    CHECK_REFUSED(placed->prefer(-1, {}), "layer -1 was asked for experts");
    CHECK_REFUSED(static_cast<void>(placed->n_expert(7)), "layer 7 was asked for experts");
}

TEST(repeated_experts_count_once) {
    const TinyModel model({{4, {100, 100}}}, {}, 1, 17);
    PlacedStore placed(model, Io::pread, 1, 1U << 20);
    placed->acquire(0, 3, {2, 2, 1, 2, 1});
    CHECK_EQUAL(placed->stats().misses, 4U);
    CHECK_EQUAL(placed->stats().hits, 0U);
    placed->acquire(0, 2, {1, 1});
    CHECK_EQUAL(placed->stats().hits, 1U);
    placed->count_hits(5);
    CHECK_EQUAL(placed->stats().hits, 6U);
}

TEST(no_experts_is_no_work) {
    const TinyModel model({{4, {100}}}, {}, 1, 18);
    PlacedStore placed(model, Io::pread, 1, 1);
    CHECK(placed->fits(0, 1, {}));
    placed->acquire(0, 1, {});
    placed->release();
    CHECK_EQUAL(placed->stats().misses + placed->stats().hits, 0U);
    CHECK_EQUAL(placed->n_parts(-1), 0);
    CHECK_EQUAL(placed->n_parts(1), 0);
}

TEST(two_stores_on_one_file) {
    const TinyModel model = awkward_model(19);
    for (const Io io : {Io::direct, Io::mmap, Io::pread}) {
        PlacedStore one(model, io, 2, 60 * page_size());
        auto two = std::make_unique<PlacedStore>(model, io, 2, 60 * page_size());
        one->acquire(2, 7, {1, 2});
        (*two)->acquire(2, 7, {2, 3});
        CHECK(one.holds(2, {1, 2}));
        CHECK(two->holds(2, {2, 3}));
        two.reset();
        one->acquire(2, 7, {2, 4});
        CHECK(one.holds(2, {1, 2, 4}));
    }
}

TEST(stats_may_be_read_while_acquiring) {
    const TinyModel model = awkward_model(20);
    PlacedStore placed(model, Io::pread, 3, 60 * page_size());
    std::atomic<bool> done{false};
    std::atomic<bool> wrong{false};
    std::thread watcher([&] {
        uint64_t last_asked = 0;
        while (!done) {
            const StoreStats stats = placed->stats();
            if (stats.resident_bytes > 60 * page_size() || stats.hits + stats.misses < last_asked) {
                wrong = true;
            }
            last_asked = stats.hits + stats.misses;
            static_cast<void>(placed->arena_bytes() + static_cast<uint64_t>(placed->n_lanes()));
        }
    });
    std::mt19937 random(21);
    for (int i = 0; i < 500; ++i) {
        placed->acquire(2, 7, random_experts(random, 16, 5));
    }
    done = true;
    watcher.join();
    CHECK(!wrong);
}

TEST(probe_tells_whether_direct_reads_work) {
    const ScratchFile file(random_bytes(3 * page_size() + 5, 22));
    std::string why = "unset";
    if (!ExpertStore::probe_direct(file.path(), 0, why)) {
        CHECK(!why.empty());
        throw check::Skipped(why);
    }
    CHECK_EQUAL(why, "");
    CHECK(ExpertStore::probe_direct(file.path(), 3 * page_size() + 4, why));
    CHECK(!ExpertStore::probe_direct(file.path(), 100 * page_size(), why));
    CHECK(why.find(file.path()) != std::string::npos);
    CHECK_REFUSED(ExpertStore::probe_direct("no-such-file", 0, why), "no-such-file");
}
