// What the store does with guesses: right, wrong, too many, under way, failed. None may cost more than time.
#include <algorithm>
#include <array>
#include <atomic>
#include <thread>

#include "check.h"
#include "expert_store.h"
#include "held_disk.h"
#include "resident_pages.h"
#include "tiny_model.h"

using edgemoe::Io;
using edgemoe::page_size;
using edgemoe::StoreStats;
using edgemoe::Tuning;

namespace {

using Experts = std::vector<int32_t>;

// Two layers of one part, whose slabs are whole pages, and a place in the file for each of them.
class Layers {
   public:
    explicit Layers(uint64_t arena_pages, int n_lanes = 2, Tuning tuning = {})
        : model({{8, {kSlab}}, {8, {kSlab}}}, {}, 1, 1),
          placed(model, Io::pread, n_lanes, arena_pages * page_size(), tuning) {}
    ~Layers() { disk.let_go(); }
    Layers(const Layers&) = delete;
    Layers& operator=(const Layers&) = delete;

    uint64_t at(int layer, int expert) const {
        return model.tensors[model.id_of(layer, 0)].offset + static_cast<uint64_t>(expert) * kSlab;
    }
    size_t n_read(int layer, int expert) const {
        const std::vector<uint64_t> offsets = disk.offsets();
        return static_cast<size_t>(std::count(offsets.begin(), offsets.end(), at(layer, expert)));
    }
    // The first of these is under way and does not come until the disk lets go; the others queue up.
    void expect_held(int layer, const Experts& experts) {
        disk.hold({at(layer, experts.front())});
        const size_t before = disk.offsets().size();
        placed->expect(layer, experts);
        disk.await(before + 1);
    }
    void let_all_come(int layer, const Experts& experts) {
        disk.let_go();
        for (const int32_t expert : experts) {
            while (n_read(layer, expert) == 0) {
                std::this_thread::yield();
            }
        }
    }

    static constexpr uint64_t kSlab = 8192;
    static constexpr uint64_t kPages = 3;  // of a slab, its odd pages included, at most

   private:
    WithHeldDisk with_;

   public:
    HeldDisk& disk = with_.disk;
    const TinyModel model;
    PlacedStore placed;
};

void check_consistent(const StoreStats& stats, uint64_t arena_bytes) {
    CHECK(stats.expected_hits <= stats.hits);
    CHECK(stats.wasted_bytes <= stats.expected_bytes);
    CHECK(stats.resident_bytes <= stats.peak_bytes);
    CHECK(stats.peak_bytes <= arena_bytes);
}

Experts draw(std::mt19937& random, int n_expert, size_t most) {
    Experts experts;
    for (size_t n = random() % most + 1; n > 0; --n) {
        experts.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(n_expert)));  // some of them twice
    }
    return experts;
}

// Slabs that share pages with their neighbours, and some of several reads.
TinyModel awkward_model(uint64_t seed) {
    const uint64_t page = page_size();
    return {
        {{16, {700, page + 1}}, {0, {}}, {12, {page - 1, 3 * page + 17, 100}}, {8, {2 * page, page / 2, 5 * page, 33}}},
        {},
        2,
        seed};
}

// Slabs of whole pages, in layers of two kinds.
TinyModel even_model(uint64_t seed) {
    const uint64_t page = page_size();
    return {{{16, {page, 2 * page}},
             {0, {}},
             {12, {page, 2 * page}},
             {8, {2 * page, page, 3 * page, page}},
             {8, {2 * page, page, 3 * page, page}}},
            {},
            2,
            seed};
}

// Guesses and requests in any order, with files that become shorter in between.
class Interleaving {
   public:
    Interleaving(TinyModel model, Io io, int n_lanes, uint64_t arena_pages, Tuning tuning, uint32_t seed)
        : model_(std::move(model)),
          placed_(model_, io, n_lanes, arena_pages * page_size(), tuning, page_size()),
          random_(seed) {}

    void use_slots() {
        placed_->use_slots();
        CHECK(placed_->in_slots());
    }

    void run(int n_steps, bool with_faults) {
        for (int step = 0; step < n_steps; ++step) {
            const int layer = std::array<int, 3>{0, 2, 3}[random_() % 3];
            const int n_expert = model_.layers[static_cast<size_t>(layer)].n_expert;
            if (with_faults && random_() % 10 == 0) {
                truncated_ ? restore() : truncate();
            }
            switch (random_() % 8) {
                case 0:
                    placed_->prefer(layer, draw(random_, n_expert, 4));
                    break;
                case 1:
                    attempt([&] { placed_->warm(layer, draw(random_, n_expert, 2)); });
                    break;
                case 2:
                case 3:
                    attempt([&] { placed_->expect(layer, draw(random_, n_expert, random_() % 4 == 0 ? 40 : 4)); });
                    break;
                default:
                    attempt([&] { serve(layer, n_expert); });
            }
            const StoreStats stats = placed_->stats();
            check_consistent(stats, placed_->arena_bytes());
            CHECK(count_resident(placed_.base(), placed_.size()) * page_size() <= placed_->arena_bytes());
        }
        restore();
        serve_everything();
        // How much is served while files are too short depends on what had arrived before.
        CHECK(n_served_ > (with_faults ? 0 : n_steps / 8));
    }

   private:
    void truncate() {
        ScratchFile& file = *model_.files[random_() % 2];
        file.truncate(random_() % file.bytes().size());
        truncated_ = true;
    }
    void restore() {
        for (const auto& file : model_.files) {
            file->restore();
        }
        truncated_ = false;
    }

    template <typename Action>
    void attempt(const Action& action) {
        try {
            action();
        } catch (const edgemoe::SystemError& error) {
            const bool told = std::string(error.what()).find("scratch-") != std::string::npos;
            check::equal(truncated_ && told, true, __FILE__, __LINE__, error.what());
        }
    }

    void serve(int layer, int n_expert) {
        const uint32_t all = model_.all_parts(layer);
        const uint32_t parts = random_() % 4 == 0 ? random_() % all + 1 : all;
        Experts experts = draw(random_, n_expert, 5);
        while (!placed_->fits(layer, parts, experts)) {
            experts.pop_back();
        }
        if (random_() % 3 == 0) {  // guessed well, in part
            placed_->expect(layer,
                            {experts.begin(), experts.begin() + static_cast<std::ptrdiff_t>(experts.size() / 2)});
        }
        placed_->routed(layer, 1, experts);
        placed_->request(layer, parts, experts);
        if (random_() % 2 == 0) {  // while the next layer's are being guessed
            placed_->expect(layer == 3 ? 0 : 3, draw(random_, 8, 5));
        }
        for (uint32_t part = 0; (parts >> part) != 0; ++part) {  // one after the other, as they are computed
            if ((parts >> part & 1) == 0) {
                continue;
            }
            placed_->wait(1U << part);
            CHECK_EQUAL(placed_->arriving_parts() >> part & 1, 0U);
            for (uint32_t before = 0; before <= part; ++before) {
                for (const int32_t expert : experts) {
                    CHECK((parts >> before & 1) == 0 || placed_.holds(layer, before, expert));
                }
            }
        }
        ++n_served_;
    }

    // Whatever the store believes to be in memory is.
    void serve_everything() {
        for (const int layer : {0, 2, 3}) {
            for (int32_t expert = 0; expert < model_.layers[static_cast<size_t>(layer)].n_expert; ++expert) {
                placed_->acquire(layer, model_.all_parts(layer), {expert});
                CHECK(placed_.holds(layer, {expert}));
            }
        }
    }

    const TinyModel model_;
    PlacedStore placed_;
    std::mt19937 random_;
    bool truncated_ = false;
    int n_served_ = 0;
};

void interleave(Io io) {
    const WithHeldDisk nothing_held;
    uint32_t seed = 1;
    for (const uint64_t arena_pages : {30U, 60U, 100U}) {
        for (const int n_lanes : {2, 4}) {
            for (const bool with_faults : {false, true}) {
                // A mapping that has lost a page is not to be trusted again: store_failures_test.
                if (with_faults && io == Io::mmap) {
                    continue;
                }
                Tuning tuning;
                tuning.recycle = seed % 3 != 0;
                tuning.least_recycled = 0;
                tuning.forecast = seed % 2 == 0;
                Interleaving(awkward_model(seed), io, n_lanes, arena_pages, tuning, seed).run(150, with_faults);
                ++seed;
            }
        }
    }
}

void interleave_in_slots(Io io) {
    const WithHeldDisk nothing_held;
    uint32_t seed = 1;
    for (const uint64_t arena_pages : {175U, 200U}) {
        for (const int n_lanes : {1, 2, 4}) {
            for (const bool with_faults : {false, true}) {
                Tuning tuning;
                tuning.forecast = seed % 2 == 0;
                Interleaving interleaving(even_model(seed), io, n_lanes, arena_pages, tuning, seed);
                interleaving.use_slots();
                interleaving.run(150, with_faults);
                ++seed;
            }
        }
    }
}

}  // namespace

TEST(any_order_direct) { interleave(Io::direct); }
TEST(any_order_mmap) { interleave(Io::mmap); }
TEST(any_order_pread) { interleave(Io::pread); }
TEST(any_order_in_slots_direct) { interleave_in_slots(Io::direct); }
TEST(any_order_in_slots_pread) { interleave_in_slots(Io::pread); }

TEST(right_guess_is_a_hit) {
    Layers layers(12);
    layers.placed->acquire(0, 1, {0});
    layers.placed->expect(1, {3, 4});
    layers.let_all_come(1, {3, 4});
    layers.placed->acquire(1, 1, {3, 4});
    CHECK(layers.placed.holds(1, {3, 4}));
    const StoreStats stats = layers.placed->stats();
    CHECK_EQUAL(stats.hits, 2U);
    CHECK_EQUAL(stats.expected_hits, 2U);
    CHECK_EQUAL(stats.misses, 1U);
    CHECK_EQUAL(stats.expected_bytes, 2 * Layers::kSlab);
    CHECK_EQUAL(stats.wasted_bytes, 0U);
    layers.placed->acquire(1, 1, {3});  // it is an expert like any other now
    CHECK_EQUAL(layers.placed->stats().expected_hits, 2U);
    CHECK_EQUAL(layers.placed->stats().hits, 3U);
}

TEST(asked_for_while_still_on_its_way) {
    Layers layers(15);
    layers.placed->acquire(0, 1, {0});
    layers.expect_held(1, {3, 4, 5});
    layers.placed->request(1, 1, {5, 3});
    CHECK_EQUAL(layers.placed->arriving_parts(), 1U);
    layers.disk.let_go();
    layers.placed->wait(1);
    CHECK_EQUAL(layers.placed->arriving_parts(), 0U);
    CHECK(layers.placed.holds(1, {3, 5}));
    CHECK_EQUAL(layers.n_read(1, 4), 0U);  // nobody wants it any more
    CHECK(!layers.placed->resident(1, 4));
    const StoreStats stats = layers.placed->stats();
    CHECK_EQUAL(stats.expected_hits, 2U);
    CHECK_EQUAL(stats.misses, 1U);
    CHECK_EQUAL(stats.expected_bytes, 2 * Layers::kSlab);  // what was taken back was not read
    CHECK_EQUAL(stats.wasted_bytes, 0U);
}

TEST(what_is_asked_for_comes_before_what_is_expected) {
    Layers layers(15);
    layers.placed->acquire(0, 1, {0});
    layers.expect_held(1, {3, 4});
    layers.placed->request(0, 1, {1});  // another batch of the same layer, say
    layers.placed->wait(1);             // the caller reads it although the lane is held up
    CHECK(layers.placed.holds(0, {1}));
    CHECK_EQUAL(layers.n_read(1, 4), 0U);
    layers.let_all_come(1, {4});
    layers.placed->acquire(1, 1, {4, 3});
    CHECK(layers.placed.holds(1, {3, 4}));
    CHECK_EQUAL(layers.placed->stats().expected_hits, 2U);
}

TEST(wrong_guess_that_was_read_is_wasted_when_it_leaves) {
    Layers layers(4 * Layers::kPages);
    layers.placed->acquire(0, 1, {0});
    layers.placed->expect(1, {3});
    while (layers.placed->stats().bytes_read < 2 * Layers::kSlab) {  // what is still arriving could not leave
        std::this_thread::yield();
    }
    layers.placed->acquire(1, 1, {1});
    CHECK_EQUAL(layers.placed->stats().wasted_bytes, 0U);  // it may be asked for yet
    for (const int32_t expert : {2, 4, 5, 6, 7}) {
        layers.placed->routed(1, 1, {expert});
        layers.placed->acquire(1, 1, {expert});
    }
    CHECK(!layers.placed->resident(1, 3));
    CHECK_EQUAL(layers.placed->stats().wasted_bytes, Layers::kSlab);
    CHECK_EQUAL(layers.placed->stats().expected_hits, 0U);
}

TEST(guesses_take_no_room_from_what_is_in_use) {
    Layers layers(3 * Layers::kPages);
    layers.placed->acquire(0, 1, {0, 1});
    layers.placed->expect(1, {7, 6, 5, 4});  // there is room for the likeliest one
    layers.let_all_come(1, {7});
    CHECK(layers.placed.holds(0, {0, 1}));
    CHECK(layers.placed->resident(1, 7));
    CHECK(!layers.placed->resident(1, 4));
    layers.placed->acquire(1, 1, {7, 4});
    CHECK(layers.placed.holds(1, {7, 4}));
    check_consistent(layers.placed->stats(), layers.placed->arena_bytes());
}

TEST(request_that_needs_the_room_of_guesses_gets_it) {
    Layers layers(4 * Layers::kPages);
    layers.placed->acquire(0, 1, {0});
    layers.expect_held(1, {3, 4, 5});
    std::thread other([&] {
        while (layers.n_read(0, 1) == 0 && layers.n_read(1, 4) == 0) {
            std::this_thread::yield();
            layers.disk.let_go();  // what has begun has to end before it can leave
        }
    });
    layers.placed->acquire(0, 1, {1, 2, 6, 7});
    other.join();
    CHECK(layers.placed.holds(0, {1, 2, 6, 7}));
    CHECK(!layers.placed->resident(1, 4) && !layers.placed->resident(1, 5));
    check_consistent(layers.placed->stats(), layers.placed->arena_bytes());
}

// It can neither be taken back nor dropped before it has come, but it does come.
TEST(wrong_guess_under_way_gives_its_room_back) {
    Layers layers(8);
    layers.placed->acquire(0, 1, {0});
    layers.expect_held(1, {7});
    std::atomic<bool> refused{false};
    std::thread other([&] {
        while (layers.placed->stats().misses < 4 && !refused) {
            std::this_thread::yield();
        }
        layers.disk.let_go();
    });
    try {
        layers.placed->acquire(1, 1, {0, 1, 2});
    } catch (const edgemoe::SystemError&) {
        refused = true;
    }
    other.join();
    CHECK(!refused);
    CHECK(layers.placed.holds(1, {0, 1, 2}));
    CHECK(layers.placed->stats().peak_bytes <= 8 * page_size());
}

TEST(expected_stay_until_their_layer_is_asked_for) {
    Layers layers(4 * Layers::kPages);
    layers.placed->acquire(0, 1, {0});
    layers.placed->expect(1, {3});
    layers.let_all_come(1, {3});
    for (int32_t expert = 1; expert < 8; ++expert) {
        layers.placed->acquire(0, 1, {expert});
    }
    CHECK(layers.placed->resident(1, 3));
    layers.placed->acquire(1, 1, {3});
    CHECK_EQUAL(layers.placed->stats().expected_hits, 1U);
    CHECK_EQUAL(layers.n_read(1, 3), 1U);
}

TEST(guess_that_cannot_be_read_is_nobodys_business_until_asked_for) {
    Layers layers(12);
    layers.placed->acquire(0, 1, {0});
    layers.disk.fail([at = layers.at(1, 3)](const HeldDisk::Read& read) { return read.offset == at; });
    layers.placed->expect(1, {3, 4});
    layers.let_all_come(1, {4});
    layers.placed->acquire(0, 1, {1});
    layers.placed->acquire(1, 1, {4});
    CHECK(layers.placed.holds(0, {1}) && layers.placed.holds(1, {4}));
    CHECK_REFUSED(layers.placed->acquire(1, 1, {4, 3}), layers.model.files.front()->path());
    CHECK(!layers.placed->resident(1, 3));
    layers.disk.recover();
    layers.placed->acquire(1, 1, {3, 4});
    CHECK(layers.placed.holds(1, {3, 4}));
    CHECK(layers.placed->stats().retries >= 2);
    check_consistent(layers.placed->stats(), layers.placed->arena_bytes());
}

TEST(failure_while_guesses_are_under_way_leaves_a_good_store) {
    Layers layers(12);
    layers.placed->acquire(0, 1, {0});
    layers.placed->request(0, 1, {1});
    layers.placed->wait(1);
    layers.expect_held(1, {3, 4});
    layers.disk.fail([at = layers.at(0, 2)](const HeldDisk::Read& read) { return read.offset == at; });
    std::thread other([&] {
        while (layers.n_read(0, 2) == 0) {
            std::this_thread::yield();
        }
        layers.disk.let_go();  // or the store would wait for what is under way for ever
    });
    CHECK_REFUSED(layers.placed->acquire(0, 1, {2}), "reading");
    other.join();
    layers.disk.recover();
    CHECK(layers.placed.holds(0, {0, 1}));
    layers.placed->acquire(1, 1, {3, 4});
    layers.placed->acquire(0, 1, {2});
    CHECK(layers.placed.holds(1, {3, 4}) && layers.placed.holds(0, {2}));
}

// `fits` has said that it can be met, and nobody waits for the earlier one any more: a graph was ended early.
TEST(request_after_one_that_was_never_waited_for) {
    for (const int n_lanes : {1, 2}) {
        Layers layers(3 * Layers::kPages, n_lanes);
        layers.placed->request(0, 1, {0, 1, 2});
        CHECK(layers.placed->fits(1, 1, {0, 1, 2}));
        layers.placed->acquire(1, 1, {0, 1, 2});
        CHECK(layers.placed.holds(1, {0, 1, 2}));
    }
}

TEST(a_layer_is_settled_once_all_of_it_has_arrived) {
    Layers layers(1000);
    layers.placed->acquire(1, 1, {0, 1, 2, 3, 4, 5, 6});
    layers.disk.hold({layers.at(1, 7)});
    layers.placed->request(1, 1, {7});  // and nobody waits for it: a graph was ended early
    CHECK(layers.placed->resident(1, 7) && !layers.placed->settled(1));
    layers.disk.fail([at = layers.at(1, 7)](const HeldDisk::Read& read) { return read.offset == at; });
    layers.disk.let_go();
    CHECK_REFUSED(layers.placed->acquire(1, 1, {7}), layers.model.files.front()->path());
    CHECK(!layers.placed->settled(1));
    layers.disk.recover();
    layers.placed->acquire(1, 1, {7});
    CHECK(layers.placed->settled(1));
}

TEST(nothing_is_expected_where_nobody_could_read) {
    Layers layers(12, 1);
    layers.placed->acquire(0, 1, {0});
    layers.placed->expect(1, {3});
    CHECK(!layers.placed->resident(1, 3));
    CHECK_EQUAL(layers.placed->stats().expected_bytes, 0U);
}

TEST(a_layer_can_come_ahead_as_a_whole_where_everything_fits) {
    Layers layers(1000);
    layers.placed->acquire(1, 1, {2});
    layers.disk.hold({layers.at(1, 7)});
    layers.placed->expect(1, {0, 1, 3, 4, 5, 6, 7});
    CHECK(layers.placed->resident(1, 7) && !layers.placed->settled(1));
    layers.disk.let_go();
    layers.placed->acquire(1, 1, {0, 1, 2, 3, 4, 5, 6, 7});
    CHECK(layers.placed.holds(1, {0, 1, 2, 3, 4, 5, 6, 7}));
    CHECK(layers.placed->settled(1));
}

TEST(impossible_guesses_are_refused) {
    Layers layers(12);
    CHECK_REFUSED(layers.placed->expect(1, {2, 8}), "layer 1 asked for expert 8 of 8");
    CHECK_REFUSED(layers.placed->expect(1, {-1}), "expert -1");
    CHECK_REFUSED(layers.placed->expect(2, {0}), "layer 2");
    CHECK_EQUAL(layers.placed->stats().expected_bytes, 0U);
}
