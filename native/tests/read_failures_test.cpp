// What ReadLanes does about reads that fail.
#include "child_process.h"
#include "reading.h"

using edgemoe::Io;

TEST(failed_reads_are_repeated) {
    for (const int times : {1, 2}) {
        for (const int n_lanes : {1, 3}) {
            Reading reading(n_lanes);
            fail_times(reading, 1, times);
            reading.submit(1, kDemanded, 3);
            reading.submit(2, kDemanded, 3);
            reading.lanes->wait({1, 2});
            CHECK(reading.holds(1, 3) && reading.holds(2, 3));
            CHECK_EQUAL(reading.lanes->n_retries(), static_cast<uint64_t>(times));
            CHECK_EQUAL(reading.lanes->bytes_read(), 6 * reading.page);
        }
    }
}

// The caller computes, as another lane, while the only one that reads fails.
TEST(last_lane_repeats_what_it_failed_itself) {
    for (const int times : {1, 2, 3}) {
        Reading reading(2);
        fail_times(reading, 1, times);
        reading.submit(1, kDemanded, 3);
        reading.lanes->await(1);
        CHECK_EQUAL(reading.lanes->failed(1), times == 3);
        CHECK_EQUAL(reading.holds(1, 3), times < 3);
    }
}

TEST(only_what_is_demanded_is_repeated) {
    for (const bool hastened : {false, true}) {
        Reading reading(3);
        fail_times(reading, 1, 2);
        reading.disk.hold({reading.at(1)});
        reading.submit(1, kSpeculative);
        reading.disk.await(1);
        if (hastened) {  // while its only job is under way
            reading.lanes->hasten(1);
        }
        reading.disk.let_go();
        reading.watch(1);
        CHECK_EQUAL(reading.lanes->failed(1), !hastened);
        CHECK_EQUAL(reading.holds(1), hastened);
        CHECK_EQUAL(reading.lanes->n_retries(), hastened ? 2U : 0U);
    }
}

// What one lane cannot read another one can.
TEST(lane_that_fails_all_its_reads_is_survived) {
    Reading reading(3);
    const std::thread::id caller = std::this_thread::get_id();
    reading.disk.fail([caller, culprit = std::thread::id()](const HeldDisk::Read&) mutable {
        const std::thread::id reader = std::this_thread::get_id();
        if (culprit == std::thread::id() && reader != caller) {
            culprit = reader;
        }
        return reader == culprit;
    });
    reading.disk.hold({reading.at(0)});
    reading.submit(0, kDemanded);
    reading.disk.await(1);  // there is a culprit
    std::vector<int32_t> slabs{0};
    for (int32_t slab = 1; slab < kSlabs; ++slab) {
        reading.submit(slab, kDemanded, 3);
        slabs.push_back(slab);
    }
    reading.disk.let_go();
    reading.lanes->wait(slabs);
    for (const int32_t slab : slabs) {
        CHECK(reading.holds(slab, slab == 0 ? 1 : 3));
    }
    CHECK(reading.lanes->n_retries() >= 1);
}

TEST(read_that_always_fails_fails_its_slab_alone) {
    for (const int n_lanes : {1, 2, 5}) {
        Reading reading(n_lanes);
        fail_times(reading, 1, 1000);
        for (const int32_t slab : {1, 2, 3}) {
            reading.submit(slab, slab == 3 && n_lanes > 1 ? kSpeculative : kDemanded, 3);
        }
        reading.lanes->wait({2});
        CHECK(reading.holds(2, 3));
        CHECK_REFUSED(reading.lanes->wait({2, 1}), "reading " + reading.path() + " failed");
        CHECK(reading.lanes->failed(1) && !reading.lanes->arriving(1));
        CHECK_EQUAL(reading.lanes->n_retries(), 2U);
        if (n_lanes > 1) {
            reading.watch(3);
        } else {
            reading.lanes->wait({3});
        }
        CHECK(reading.holds(3, 3) && !reading.lanes->failed(3));
        CHECK_REFUSED(reading.lanes->wait({1}), reading.path());  // until it is read again, or forgotten
        reading.lanes->forget(1);
        reading.lanes->wait({1});
        reading.disk.recover();
        reading.submit(1, kDemanded, 3);
        reading.lanes->wait({1});
        CHECK(reading.holds(1, 3));
    }
}

TEST(last_try_is_buffered) {
    Reading reading(1, Io::direct);
    reading.disk.fail([](const HeldDisk::Read& read) { return read.direct; });
    reading.submit(1, kDemanded);
    reading.lanes->wait({1});
    CHECK(reading.holds(1));
    CHECK(reading.disk.direct() == (std::vector<bool>{true, true, false}));
    CHECK_EQUAL(reading.lanes->n_retries(), 2U);
    CHECK_EQUAL(reading.lanes->bytes_read(), reading.page);
}

TEST(disk_without_direct_reads_is_survived) {
    Reading reading(4, Io::direct);
    reading.disk.fail([](const HeldDisk::Read& read) { return read.direct; });
    std::vector<int32_t> slabs;
    for (int32_t slab = 0; slab < kSlabs; ++slab) {
        reading.submit(slab, kDemanded, 3);
        slabs.push_back(slab);
    }
    reading.lanes->wait(slabs);
    for (const int32_t slab : slabs) {
        CHECK(reading.holds(slab, 3));
    }
    CHECK_EQUAL(reading.lanes->n_retries(), 2U * 3 * kSlabs);
}

TEST(lanes_survive_a_disk_that_fails_every_read) {
    Reading reading(3);
    reading.disk.fail([](const HeldDisk::Read&) { return true; });
    for (int32_t slab = 0; slab < kSlabs; ++slab) {
        reading.submit(slab, slab % 2 == 0 ? kDemanded : kSpeculative, 3);
    }
    for (int32_t slab = 0; slab < kSlabs; ++slab) {
        reading.watch(slab);
        CHECK(reading.lanes->failed(slab));
    }
    CHECK_EQUAL(reading.lanes->bytes_read(), 0U);
    reading.disk.recover();
    for (int32_t slab = 0; slab < kSlabs; ++slab) {
        reading.submit(slab, kSpeculative, 3);
    }
    for (int32_t slab = 0; slab < kSlabs; ++slab) {
        reading.watch(slab);
        CHECK(reading.holds(slab, 3) && !reading.lanes->failed(slab));
    }
}

TEST(what_was_given_up_is_told_as_such) {
    Reading reading(2);
    reading.disk.hold({reading.at(1)});
    reading.submit(1, kDemanded);
    reading.disk.await(1);
    reading.submit(2, kDemanded);
    std::thread drains([&] { reading.lanes->drain(); });
    while (!reading.lanes->failed(2)) {
        std::this_thread::yield();
    }
    reading.disk.let_go();
    drains.join();
    CHECK_REFUSED(reading.lanes->wait({2}), "what was still to be read was given up");
}

TEST(lanes_of_a_forked_process_end_without_threads) {
    Reading reading(3);
    reading.submit(1, kDemanded, 3);
    reading.lanes->wait({1});
    CHECK(survived(status_of_child([&] { reading.lanes.reset(); })));
    reading.submit(2, kDemanded, 3);
    reading.lanes->wait({2});
    CHECK(reading.holds(1, 3) && reading.holds(2, 3));
}
