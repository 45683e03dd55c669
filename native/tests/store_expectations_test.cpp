// What the store does with guesses: right, wrong, too many, under way, failed. None may cost more than time.
#include <algorithm>
#include <atomic>
#include <thread>

#include "check.h"
#include "expert_store.h"
#include "held_disk.h"
#include "tiny_model.h"

using edgemoe::Io;
using edgemoe::page_size;
using edgemoe::StoreStats;
using edgemoe::Tuning;

namespace {

using Experts = std::vector<int32_t>;

// Three layers of one part, whose slabs are whole pages, and a place in the file for each of them.
class Layers {
   public:
    explicit Layers(uint64_t arena_pages, int n_lanes = 2, Tuning tuning = {})
        : model({{8, {kSlab}}, {8, {kSlab}}, {8, {kSlab}}}, {}, 1, 1),
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

}  // namespace

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

TEST(expecting_others_takes_back_what_is_expected_no_more) {
    Layers layers(18);
    layers.placed->acquire(0, 1, {0});
    layers.expect_held(1, {3, 4, 5});
    layers.placed->expect(1, {3, 6, 4});
    CHECK(layers.placed->resident(1, 6) && !layers.placed->resident(1, 5));
    layers.let_all_come(1, {3, 6, 4});
    layers.placed->acquire(1, 1, {3, 4, 6});
    CHECK_EQUAL(layers.placed->stats().expected_hits, 3U);
    CHECK_EQUAL(layers.placed->stats().expected_bytes, 3 * Layers::kSlab);
    CHECK_EQUAL(layers.n_read(1, 5), 0U);
    layers.placed.check_consistent();
}

TEST(layers_that_come_sooner_are_read_first) {
    Layers layers(24);
    layers.placed->acquire(0, 1, {0});
    layers.expect_held(2, {3, 4});
    layers.placed->expect(1, {5, 6});
    layers.let_all_come(2, {4});
    const std::vector<uint64_t> read = layers.disk.offsets();
    const std::vector<uint64_t> order{layers.at(2, 3), layers.at(1, 5), layers.at(1, 6), layers.at(2, 4)};
    CHECK(std::vector<uint64_t>(read.end() - 4, read.end()) == order);
    layers.placed->acquire(1, 1, {5, 6});
    layers.placed->acquire(2, 1, {3, 4});
    CHECK(layers.placed.holds(2, {3, 4}));
    CHECK_EQUAL(layers.placed->stats().expected_hits, 4U);
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
    layers.placed.check_consistent();
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
    layers.placed.check_consistent();
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

TEST(guesses_for_layers_of_different_kinds_all_find_room) {
    const WithHeldDisk nothing_held;
    const uint64_t page = page_size();
    const TinyModel model({{8, {page}}, {8, {2 * page}}, {8, {page}}, {8, {2 * page}}}, {}, 1, 1);
    Tuning tuning;
    tuning.forecast = false;
    PlacedStore placed(model, Io::pread, 2, 40 * page, tuning);
    placed->use_slots();
    CHECK(placed->in_slots());
    for (const int layer : {0, 2, 1, 3}) {  // those of one kind are older than all of the other
        for (int32_t expert = 0; expert < 8; ++expert) {
            placed->acquire(layer, 1, {expert});
        }
    }
    placed->acquire(0, 1, {7});
    const auto absent = [&](int layer) {
        int32_t expert = 0;
        while (placed->resident(layer, expert)) {
            ++expert;
        }
        return expert;
    };
    const int32_t second = absent(1), third = absent(2);
    CHECK(second < 8 && third < 8);
    placed->expect(1, {second});
    placed->expect(2, {third});
    CHECK(placed->resident(1, second) && placed->resident(2, third));
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
    layers.placed.check_consistent();
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

// What a token asks for meanwhile takes nothing of it back.
TEST(the_rest_of_a_layer_comes_whatever_is_asked_for_where_everything_fits) {
    for (const bool fits : {true, false}) {
        Layers layers(fits ? 1000 : 12 * Layers::kPages);
        layers.placed->acquire(1, 1, {2});
        layers.disk.hold({layers.at(1, 0)});
        layers.placed->expect(1, {0, 1, 3, 4, 5, 6, 7});
        layers.disk.await(1);
        layers.placed->acquire(1, 1, {2});
        CHECK_EQUAL(layers.placed->resident(1, 7), fits);
        layers.disk.let_go();
        layers.placed->acquire(1, 1, {0, 1, 2, 3, 4, 5, 6, 7});
        CHECK(layers.placed.holds(1, {0, 1, 2, 3, 4, 5, 6, 7}));
    }
}

TEST(impossible_guesses_are_refused) {
    Layers layers(12);
    CHECK_REFUSED(layers.placed->expect(1, {2, 8}), "layer 1 asked for expert 8 of 8");
    CHECK_REFUSED(layers.placed->expect(1, {-1}), "expert -1");
    CHECK_REFUSED(layers.placed->expect(3, {0}), "layer 3");
    CHECK_EQUAL(layers.placed->stats().expected_bytes, 0U);
}
