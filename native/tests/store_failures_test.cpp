// What the store does when files, disks or callers misbehave: a SystemError, and a store that is as good as before.
#include <sys/mman.h>

#include <thread>

#include "check.h"
#include "expert_store.h"
#include "held_disk.h"
#include "resident_pages.h"
#include "tiny_model.h"

using edgemoe::ExpertStore;
using edgemoe::Io;
using edgemoe::page_size;

namespace {

constexpr uint64_t kPlenty = uint64_t{1} << 30;

TinyModel two_layers(uint64_t seed) {
    return {{{8, {3 * page_size() + 100, 50}}, {8, {2 * page_size(), page_size() / 2}}}, {100000}, 1, seed};
}

template <typename Body>
void in_each_mode(const Body& body) {
    for (const Io io : {Io::pread, Io::mmap, Io::direct}) {
        const TinyModel model = two_layers(1);
        body(model, *model.files.front(), io);
    }
}

// Nothing but what `acquire` gave counts as resident: the next request reads all of it.
void expect_all_read(const TinyModel& model, PlacedStore& placed, int layer, const std::vector<int32_t>& experts) {
    const uint64_t before = placed->stats().misses;
    placed->acquire(layer, model.all_parts(layer), experts);
    CHECK(placed.holds(layer, experts));
    CHECK_EQUAL(placed->stats().misses, before + 2 * experts.size());
}

}  // namespace

TEST(request_larger_than_the_arena) {
    in_each_mode([](const TinyModel& model, ScratchFile&, Io io) {
        PlacedStore placed(model, io, 2, 14 * page_size());
        placed->acquire(0, 3, {0, 1});
        const std::vector<int32_t> all{0, 1, 2, 3, 4, 5, 6, 7};
        for (int round = 0; round < 3; ++round) {
            CHECK(!placed->fits(0, 3, all));
            CHECK_REFUSED(placed->acquire(0, 3, all), "need more than the arena");
            CHECK(placed->stats().resident_bytes <= 14 * page_size());
        }
        const uint64_t before = placed->stats().hits;
        placed->acquire(0, 3, {0, 1});  // these were in, and what was in stays in
        CHECK_EQUAL(placed->stats().hits, before + 4);
        CHECK(placed.holds(0, {0, 1}));
        CHECK(!placed->fits(1, 3, all));
        expect_all_read(model, placed, 1, {6, 7});
        expect_all_read(model, placed, 0, {4, 5});
    });
}

TEST(expert_out_of_range) {
    in_each_mode([](const TinyModel& model, ScratchFile&, Io io) {
        PlacedStore placed(model, io, 2, kPlenty);
        CHECK_REFUSED(placed->acquire(0, 3, {2, 8, 3}), "layer 0 asked for expert 8 of 8");
        CHECK_REFUSED(placed->acquire(0, 3, {2, -1}), "expert -1");
        CHECK_REFUSED(placed->acquire(1, 3, {INT32_MAX}), "layer 1");
        CHECK_EQUAL(placed->stats().resident_bytes, 0U);
        expect_all_read(model, placed, 0, {2, 3});
    });
}

TEST(layer_out_of_range) {
    in_each_mode([](const TinyModel& model, ScratchFile&, Io io) {
        PlacedStore placed(model, io, 1, kPlenty);
        CHECK_REFUSED(placed->acquire(2, 3, {0}), "layer 2");
        CHECK_REFUSED(placed->acquire(-1, 3, {0}), "layer -1");
        expect_all_read(model, placed, 1, {0});
    });
}

TEST(file_truncated_between_requests) {
    in_each_mode([](const TinyModel& model, ScratchFile& file, Io io) {
        PlacedStore placed(model, io, 3, kPlenty);
        placed->acquire(0, 3, {1, 5});
        const uint64_t resident = placed->stats().resident_bytes;
        file.truncate(model.tensors.back().offset + 10);
        CHECK_REFUSED(placed->acquire(1, 3, {2, 7}), file.path());
        CHECK_REFUSED(placed->acquire(1, 3, {2, 7}), "was changed while in use");
        CHECK_EQUAL(placed->stats().resident_bytes, resident);
        file.restore();
        expect_all_read(model, placed, 1, {2, 7});
        CHECK(placed.holds(0, {1, 5}));
        CHECK(!placed->settled(1));
        placed->acquire(1, 3, {0, 1, 2, 3, 4, 5, 6, 7});
        CHECK(placed->settled(1));
    });
}

TEST(file_rewritten_between_requests) {
    in_each_mode([](const TinyModel& model, ScratchFile& file, Io io) {
        PlacedStore placed(model, io, 3, kPlenty);
        placed->acquire(1, 3, {3});
        file.overwrite(0, random_bytes(1000, 77));
        CHECK_REFUSED(placed->acquire(1, 3, {3, 4}), "was changed while in use");
        CHECK_REFUSED(placed->read_dense(0, placed.place(0)), "was changed while in use");
        file.restore();
        expect_all_read(model, placed, 1, {4, 5});
        placed->read_dense(0, placed.place(0));
        CHECK(std::memcmp(placed.place(0), model.bytes_of(0), model.tensors[0].n_bytes) == 0);
    });
}

TEST(mapped_file_changed_when_nothing_is_left_to_read) {
    const TinyModel model = two_layers(2);
    ScratchFile& file = *model.files.front();
    PlacedStore placed(model, Io::mmap, 2, kPlenty);
    placed->acquire(0, 3, {0, 1});
    placed->check_mapping();
    // Resident pages are the file's own, so they change with it: to be noticed although every request is a hit.
    file.overwrite(0, random_bytes(100, 3));
    CHECK_REFUSED(placed->check_mapping(), "was changed while in use");
    file.restore();
    placed->check_mapping();
    file.truncate(0);
    static_cast<void>(placed.holds(0, {0}));  // what a kernel would do: no SIGBUS
    file.restore();
    CHECK_REFUSED(placed->check_mapping(), "became shorter");
    CHECK_REFUSED(placed->acquire(0, 3, {0}), "became shorter");
}

TEST(copied_experts_outlive_a_change_of_the_file) {
    const TinyModel model = two_layers(3);
    for (const Io io : {Io::pread, Io::direct}) {
        PlacedStore placed(model, io, 2, kPlenty);
        placed->acquire(0, 3, {0, 1});
        model.files.front()->truncate(0);
        placed->check_mapping();
        placed->acquire(0, 3, {1, 0});
        CHECK(placed.holds(0, {0, 1}));
        model.files.front()->restore();
    }
}

// A transfer that fails in the middle of a request, with others under way: the place of one slab cannot be written.
TEST(read_error_in_the_middle) {
    const TinyModel model({{8, {(1U << 20) + 100, 3 * page_size()}}}, {}, 1, 4);
    const std::string path = model.files.front()->path();
    for (const Io io : {Io::pread, Io::direct}) {
        edgemoe::Tuning tuning;
        tuning.recycle = false;  // nothing is kept, so that pages can be counted
        PlacedStore placed(model, io, 3, kPlenty, tuning);
        placed->acquire(0, 3, {0});
        const uint64_t resident = placed->stats().resident_bytes;
        const auto middle = edgemoe::page_floor(reinterpret_cast<uintptr_t>(placed.slab(0, 0, 4)) + (1U << 19));
        auto* page = reinterpret_cast<void*>(middle);
        CHECK_EQUAL(::mprotect(page, page_size(), PROT_NONE), 0);
        for (int round = 0; round < 5; ++round) {
            CHECK_REFUSED(placed->acquire(0, 3, {0, 2, 4, 6}), path);
            CHECK_EQUAL(placed->stats().resident_bytes, resident);
            CHECK_EQUAL(count_resident(placed.base(), placed.size()), resident / page_size());
        }
        CHECK_EQUAL(::mprotect(page, page_size(), PROT_READ | PROT_WRITE), 0);
        CHECK(placed.holds(0, {0}));
        expect_all_read(model, placed, 0, {2, 4, 6});
        CHECK(placed.holds(0, {0}));
    }
}

// Huge pages that were asked for where everything fits would be cut up by moving.
TEST(memory_is_given_back_where_everything_fits) {
    const TinyModel model({{8, {4 * page_size()}}}, {}, 1, 4);
    for (const bool fits : {true, false}) {
        edgemoe::Tuning tuning;
        tuning.least_recycled = 0;
        WithHeldDisk with;
        PlacedStore placed(model, Io::pread, 1, fits ? kPlenty : 20 * page_size(), tuning);
        placed->acquire(0, 1, {0});
        const uint64_t n_resident = count_resident(placed.base(), placed.size());
        with.disk.fail([](const HeldDisk::Read&) { return true; });
        std::memset(placed.slab(0, 0, 1), 1, 4 * page_size());  // as if some of it had come
        CHECK_REFUSED(placed->acquire(0, 1, {1}), "failed");
        CHECK_EQUAL(count_resident(placed.base(), placed.size()) == n_resident, fits);
    }
}

TEST(failure_leaves_neighbours_on_shared_pages) {
    const TinyModel model({{64, {page_size() / 3 + 100, page_size() + 60}}}, {}, 1, 5);
    for (const Io io : {Io::pread, Io::mmap, Io::direct}) {
        PlacedStore placed(model, io, 2, kPlenty);
        placed->acquire(0, 3, {10, 30});
        model.files.front()->truncate(1);
        CHECK_REFUSED(placed->acquire(0, 3, {9, 10, 11, 29, 31}), "was changed");
        model.files.front()->restore();
        CHECK(placed.holds(0, {10, 30}));
        expect_all_read(model, placed, 0, {9, 11, 29, 31});
    }
}

// Slabs 3 and 4 share a page, and only one of them can be read.
struct Neighbours {
    explicit Neighbours(Io io) : placed(model, io, 3, 20 * page_size()) {}

    static constexpr uint64_t kSlab = 5000;
    const TinyModel model{{{8, {kSlab}}, {8, {kSlab}}}, {}, 1, 9};
    const uint64_t begin = model.tensors[model.id_of(1, 0)].offset + 3 * kSlab, end = begin + kSlab;
    WithHeldDisk with;
    PlacedStore placed;
};

TEST(slab_is_whole_though_its_neighbour_was_given_up) {
    for (const Io io : {Io::pread, Io::direct}) {
        Neighbours two(io);
        two.with.disk.fail(
            [at = two.begin / page_size()](const HeldDisk::Read& read) { return read.offset / page_size() == at; });
        two.placed->request(1, 1, {3, 4});
        while (two.placed->arriving_parts() != 0) {  // and nobody waits for them: a graph was ended early
            std::this_thread::yield();
        }
        two.with.disk.recover();
        two.placed->acquire(0, 1, {0});
        two.placed->acquire(1, 1, {4});
        CHECK(two.placed.holds(1, {4}));
        two.placed->acquire(1, 1, {3});
        CHECK(two.placed.holds(1, {3, 4}));
    }
}

TEST(guess_that_fails_does_not_touch_its_neighbour) {
    for (const Io io : {Io::pread, Io::direct}) {
        Neighbours two(io);
        two.placed->acquire(0, 1, {0});
        two.with.disk.hold({io == Io::direct ? edgemoe::page_floor(two.begin) : two.begin});
        const size_t before = two.with.disk.offsets().size();
        two.placed->expect(1, {3});
        two.with.disk.await(before + 1);
        two.placed->acquire(1, 1, {4});
        two.model.files.front()->truncate((edgemoe::page_floor(two.end) + two.end) / 2);  // in the page that they share
        two.with.disk.let_go();
        while (two.placed->resident(1, 3)) {
            try {
                two.placed->acquire(1, 1, {4});
            } catch (const edgemoe::SystemError&) {  // the file was seen to be changed before the read had failed
            }
        }
        CHECK(two.placed->resident(1, 4));
        CHECK(two.placed.holds(1, {4}));
        two.model.files.front()->restore();
        two.placed->acquire(1, 1, {3});
        CHECK(two.placed.holds(1, {3, 4}));
    }
}

TEST(expert_tensor_without_a_place) {
    const TinyModel model = two_layers(6);
    for (const Io io : {Io::pread, Io::mmap}) {
        ExpertStore store(io, 2, kPlenty);
        store.add_file(model.files.front()->path());
        for (const edgemoe::TensorSpec& spec : model.tensors) {
            store.add_tensor(spec);
        }
        CHECK_REFUSED(store.acquire(0, 3, {0}), "blk.0.part0");
        CHECK_EQUAL(store.stats().resident_bytes, 0U);
    }
}

TEST(impossible_tensors_are_refused) {
    const ScratchFile file(random_bytes(1000, 7));
    ExpertStore store(Io::pread, 1, kPlenty);
    store.add_file(file.path());
    CHECK_REFUSED(store.add_tensor({"past.the.end", 0, 900, 101, -1, 0}), "past.the.end lies outside " + file.path());
    CHECK_REFUSED(store.add_tensor({"wraps", 0, UINT64_MAX - 10, 20, -1, 0}), "wraps lies outside");
    CHECK_REFUSED(store.add_tensor({"too.long", 0, 0, UINT64_MAX, -1, 0}), "too.long lies outside");
    CHECK_REFUSED(store.add_tensor({"uneven", 0, 0, 1000, 0, 3}), "uneven cannot be divided into 3 experts");
    CHECK_REFUSED(store.add_tensor({"empty", 0, 0, 0, 0, 3}), "empty cannot be divided into 3 experts");
    CHECK_REFUSED(store.add_tensor({"nowhere", 0, 0, 900, -1, 3}), "nowhere cannot be divided");
    store.add_tensor({"edge", 0, 900, 100, -1, 0});
    store.add_tensor({"a", 0, 0, 100, 0, 10});
    CHECK_REFUSED(store.add_tensor({"other.count", 0, 0, 100, 0, 20}), "other.count does not match");
    for (const char* name : {"b", "c", "d"}) {
        store.add_tensor({name, 0, 0, 100, 0, 10});
    }
    CHECK_REFUSED(store.add_tensor({"fifth", 0, 0, 100, 0, 10}), "fifth does not match");
    CHECK_EQUAL(store.n_tensors(), 5);
}

TEST(missing_file) {
    ExpertStore store(Io::pread, 1, kPlenty);
    CHECK_REFUSED(store.add_file("no-such-file.gguf"), "no-such-file.gguf");
    CHECK_EQUAL(store.add_file(two_layers(8).files.front()->path()), 0);
}
