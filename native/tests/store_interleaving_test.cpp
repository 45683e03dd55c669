// Requests and guesses in any order, with and without files that become shorter and memory that is lent: whatever is
// asked for is there.
#include <array>
#include <random>

#include "check.h"
#include "expert_store.h"
#include "held_disk.h"
#include "resident_pages.h"
#include "tiny_model.h"

using edgemoe::Io;
using edgemoe::page_size;
using edgemoe::Tuning;

namespace {

using Experts = std::vector<int32_t>;

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
          own_bytes_(arena_pages * page_size()),
          random_(seed) {}

    void use_slots(uint64_t lent_pages) {
        placed_->use_slots(0, lent_pages * page_size());
        CHECK(placed_->in_slots());
    }

    void run(int n_steps, bool with_faults) {
        for (int step = 0; step < n_steps; ++step) {
            const int layer = std::array<int, 3>{0, 2, 3}[random_() % 3];
            const int n_expert = model_.layers[static_cast<size_t>(layer)].n_expert;
            if (with_faults && random_() % 10 == 0) {
                truncated_ ? restore() : truncate();
            }
            if (random_() % 10 == 0) {
                placed_->borrow();
            } else if (random_() % 10 == 0) {
                repay();
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
            placed_.check_consistent();
            CHECK(count_resident(placed_.base(), placed_.size()) * page_size() <= placed_->arena_bytes());
        }
        restore();
        repay();
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
    // Whoever is in memory afterwards is so within what is not borrowed.
    void repay() {
        placed_->repay();
        CHECK(!placed_->borrowing());
        if (placed_->in_slots()) {
            CHECK(placed_->stats().resident_bytes <= own_bytes_);
        }
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
    const uint64_t own_bytes_;
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
                interleaving.use_slots(seed % 4 * 10);
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
