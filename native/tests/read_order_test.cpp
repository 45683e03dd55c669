// What ReadLanes reads when, with a disk that holds reads back.
#include "reading.h"

TEST(demanded_before_speculative) {
    Reading reading(2);
    reading.disk.hold({reading.at(1)});
    reading.submit(1, kSpeculative);
    reading.disk.await(1);  // the one lane is busy; the rest queues up
    reading.submit(2, kSpeculative);
    reading.submit(3, kDemanded);
    reading.submit(4, kSpeculative);
    reading.submit(5, kDemanded);
    reading.disk.let_go();
    reading.watch(2);
    reading.watch(4);
    CHECK(reading.disk.offsets() ==
          (Offsets{reading.at(1), reading.at(3), reading.at(5), reading.at(2), reading.at(4)}));
    for (const int32_t slab : {1, 2, 3, 4, 5}) {
        CHECK(reading.holds(slab) && !reading.lanes->failed(slab));
    }
}

TEST(what_is_needed_first_is_read_first) {
    Reading reading(2);
    reading.disk.hold({reading.at(0)});
    reading.submit(0, kSpeculative);
    reading.disk.await(1);  // the one lane is busy; the rest queues up
    reading.submit(1, kSpeculative, 1, 1);
    reading.submit(2, kSpeculative, 1, 0);
    reading.submit(3, kSpeculative, 1, 2);
    reading.submit(4, kSpeculative, 1, 0);
    for (const int32_t slab : {1, 2, 3}) {
        reading.lanes->hasten(slab);
    }
    reading.submit(5, kDemanded, 1, 1);
    reading.submit(6, kDemanded, 1, 0);
    reading.disk.let_go();
    for (const int32_t slab : {1, 2, 3, 4, 5, 6}) {
        reading.watch(slab);
    }
    CHECK(reading.disk.offsets() == (Offsets{reading.at(0), reading.at(2), reading.at(6), reading.at(1), reading.at(5),
                                             reading.at(3), reading.at(4)}));
}

TEST(later_ranks_begin_when_earlier_ones_have_arrived) {
    Reading reading(4);
    reading.disk.hold({reading.at(1), reading.at(3)});
    reading.submit(1, kDemanded);
    reading.disk.await(1);
    reading.submit(2, kDemanded, 1, 1);
    reading.submit(3, kDemanded);
    reading.disk.await(2);
    CHECK(reading.disk.offsets() == (Offsets{reading.at(1), reading.at(3)}));
    reading.disk.let_go();
    reading.watch(2);
    CHECK(reading.holds(1) && reading.holds(2) && reading.holds(3));
}

TEST(beside_guesses_no_rank_is_held_back) {
    Reading reading(4);
    reading.disk.hold({reading.at(1), reading.at(2)});
    reading.submit(1, kDemanded);
    reading.disk.await(1);
    reading.submit(3, kDemanded, 1, 1);
    reading.submit(2, kSpeculative);
    reading.watch(3);
    CHECK(reading.holds(3));
    CHECK(reading.lanes->arriving(1) && reading.lanes->arriving(2));
}

TEST(what_the_caller_held_back_is_read_by_others) {
    Reading reading(2);
    reading.disk.hold({reading.at(1), reading.at(2)});
    reading.submit(1, kDemanded);
    reading.disk.await(1);  // by the one thread
    reading.submit(2, kDemanded);
    reading.submit(3, kDemanded, 1, 1);
    std::thread other([&] {
        reading.disk.await(2);  // by the caller
        reading.disk.let_go({reading.at(1)});
        reading.watch(1);
        reading.disk.let_go();
    });
    reading.lanes->wait({2});
    other.join();
    reading.watch(3);
    CHECK(reading.holds(1) && reading.holds(2) && reading.holds(3));
}

TEST(one_request_sets_all_lanes_to_work) {
    Reading reading(4);
    const Offsets first{reading.at(0, 0), reading.at(0, 1), reading.at(0, 2)};
    reading.disk.hold(first);
    for (const Urgency urgency : {kDemanded, kSpeculative}) {
        const size_t n_at_once = urgency == kDemanded ? 3 : 2;
        reading.disk.forget();
        reading.submit(0, urgency, kJobs);
        reading.disk.await(n_at_once);  // none of them ends, so that all of these lanes are awake
        reading.disk.let_go();
        reading.watch(0);
        CHECK(reading.holds(0, kJobs));
        reading.clear();
        reading.disk.hold(first);
    }
}

TEST(half_of_the_lanes_are_left_to_demands) {
    Reading reading(4);  // the caller's own and three threads
    reading.disk.hold({reading.at(1), reading.at(2), reading.at(3), reading.at(4)});
    for (const int32_t slab : {1, 2, 3}) {
        reading.submit(slab, kSpeculative);
    }
    reading.disk.await(2);
    reading.submit(4, kDemanded);
    reading.disk.await(3);
    const Offsets begun = reading.disk.offsets();
    CHECK_EQUAL(std::count(begun.begin(), begun.end(), reading.at(3)), 0);
    CHECK_EQUAL(begun.back(), reading.at(4));
    reading.disk.let_go();
    reading.watch(3);
    CHECK(reading.holds(3));
}

TEST(caller_reads_along_but_nothing_speculative) {
    Reading reading(1);
    reading.submit(1, kSpeculative);
    reading.submit(2, kDemanded, 2);
    reading.lanes->wait({2});
    CHECK(reading.holds(2, 2));
    CHECK(reading.lanes->arriving(1));
    CHECK(reading.untouched(1));
    reading.lanes->hasten(1);
    reading.lanes->wait({1});
    CHECK(reading.holds(1));
}

TEST(hastened_comes_before_the_others) {
    Reading reading(2);
    reading.disk.hold({reading.at(1)});
    reading.submit(1, kSpeculative);
    reading.disk.await(1);
    for (const int32_t slab : {2, 3, 4}) {
        reading.submit(slab, kSpeculative, slab == 3 ? 2 : 1);
    }
    reading.lanes->hasten(3);
    reading.lanes->hasten(9);  // nothing of that
    reading.disk.let_go();
    reading.watch(4);
    CHECK(reading.disk.offsets() ==
          (Offsets{reading.at(1), reading.at(3), reading.at(3, 1), reading.at(2), reading.at(4)}));
}

TEST(cancelled_is_never_read) {
    Reading reading(2);
    reading.disk.hold({reading.at(1)});
    reading.submit(1, kSpeculative);
    reading.disk.await(1);
    reading.submit(2, kSpeculative, 3);
    reading.submit(3, kSpeculative);
    reading.submit(4, kDemanded);
    CHECK(reading.lanes->cancel(2));
    CHECK(!reading.lanes->arriving(2) && !reading.lanes->failed(2));
    CHECK(!reading.lanes->cancel(1));  // has begun
    CHECK(!reading.lanes->cancel(4));  // somebody waits for it
    CHECK(reading.lanes->arriving(1) && reading.lanes->arriving(4));
    reading.disk.let_go();
    reading.watch(3);
    CHECK(reading.disk.offsets() == (Offsets{reading.at(1), reading.at(4), reading.at(3)}));
    CHECK(reading.untouched(2));
    reading.lanes->wait({1, 2, 3, 4});
    CHECK(!reading.lanes->cancel(3));  // is there
    reading.submit(2, kDemanded, 3);
    reading.lanes->wait({2});
    CHECK(reading.holds(2, 3));
}

TEST(begun_in_part_is_not_cancelled) {
    Reading reading(2);
    reading.disk.hold({reading.at(2)});
    reading.submit(2, kSpeculative, 3);
    reading.disk.await(1);
    CHECK(!reading.lanes->cancel(2));
    reading.disk.let_go();
    reading.watch(2);
    CHECK(reading.holds(2, 3));
}

TEST(hastened_is_not_cancelled) {
    Reading reading(1);
    reading.submit(2, kSpeculative, 2);
    reading.lanes->hasten(2);
    CHECK(!reading.lanes->cancel(2));
    reading.lanes->wait({2});
    CHECK(reading.holds(2, 2));
}

TEST(waits_for_the_asked_slabs_alone) {
    Reading reading(2);
    reading.disk.hold({reading.at(1)});
    reading.submit(1, kDemanded);
    reading.disk.await(1);
    reading.submit(2, kDemanded);
    reading.submit(3, kDemanded);
    reading.lanes->wait({});
    reading.lanes->wait({2, 2, 7});
    CHECK(reading.holds(2));
    CHECK(reading.lanes->arriving(1));
    reading.disk.let_go();
    reading.lanes->wait({3, 1});
    CHECK(reading.holds(1) && reading.holds(3));
}

TEST(drained_reads_nothing_any_more) {
    for (const bool fails : {false, true}) {
        Reading reading(2);
        if (fails) {
            fail_times(reading, 1, 1000);
        }
        reading.disk.hold({reading.at(1)});
        reading.submit(1, kDemanded);
        reading.disk.await(1);
        reading.submit(2, kDemanded, 2);
        reading.submit(3, kSpeculative, 2);
        std::thread other([&] {
            while (!reading.lanes->failed(3)) {  // taken back before it waits for what is under way
                std::this_thread::yield();
            }
            reading.disk.let_go();
        });
        reading.lanes->drain();
        other.join();
        CHECK(!reading.lanes->arriving(1) && !reading.lanes->arriving(2) && !reading.lanes->arriving(3));
        CHECK_EQUAL(reading.lanes->failed(1), fails);
        CHECK(reading.lanes->failed(2));
        CHECK(fails || reading.holds(1));
        CHECK(reading.untouched(2) && reading.untouched(3));
        CHECK_EQUAL(reading.lanes->n_retries(), 0U);
        CHECK_EQUAL(reading.disk.offsets().size(), 1U);
        reading.disk.recover();
        reading.submit(2, kDemanded, 2);
        reading.lanes->wait({2});
        CHECK(reading.holds(2, 2));
        reading.lanes->drain();  // nothing to do
        CHECK(!reading.lanes->failed(2));
    }
}

TEST(busy_is_the_time_with_reads_under_way) {
    Reading reading(2);
    CHECK_EQUAL(reading.lanes->busy_ns(), 0U);
    reading.disk.hold({reading.at(1)});
    reading.submit(1, kSpeculative);
    reading.disk.await(1);
    const uint64_t before = reading.lanes->busy_ns(), started = edgemoe::now_ns();
    while (edgemoe::now_ns() - started < 5000000) {
        std::this_thread::yield();
    }
    CHECK(reading.lanes->busy_ns() >= before + 5000000);  // and it says so while they are
    reading.disk.let_go();
    reading.watch(1);
    const uint64_t after = reading.lanes->busy_ns();
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    CHECK_EQUAL(reading.lanes->busy_ns(), after);
    CHECK(after >= before + 5000000);
    CHECK_EQUAL(reading.lanes->bytes_read(), reading.page);
}

// Whatever is asked in whatever order, a slab that has arrived has its bytes.
TEST(any_order_of_everything) {
    for (uint32_t seed = 0; seed < 6; ++seed) {
        std::mt19937 random(seed);
        Reading reading(static_cast<int>(seed % 3) + 2);
        if (seed % 2 == 1) {
            reading.disk.fail(
                [faults = std::mt19937(seed)](const HeldDisk::Read&) mutable { return faults() % 4 == 0; });
        }
        for (int round = 0; round < 40; ++round) {
            reading.clear();
            std::vector<bool> expected(kSlabs, false);
            std::vector<int32_t> all;
            for (int i = 0; i < 30; ++i) {
                const auto slab = static_cast<int32_t>(random() % kSlabs);
                const auto at = static_cast<size_t>(slab);
                switch (random() % 4) {
                    case 0:
                        reading.lanes->hasten(slab);
                        break;
                    case 1:
                        if (reading.lanes->arriving(slab) && reading.lanes->cancel(slab)) {
                            CHECK(reading.untouched(slab));
                            expected[at] = false;
                        }
                        break;
                    default:
                        if (!expected[at]) {
                            expected[at] = true;
                            all.push_back(slab);
                            reading.submit(slab, random() % 2 == 0 ? kDemanded : kSpeculative, kJobs);
                        }
                }
            }
            if (random() % 4 == 0) {
                reading.lanes->drain();
            }
            try {
                reading.lanes->wait(all);
            } catch (const edgemoe::SystemError&) {
                reading.lanes->drain();
            }
            for (const int32_t slab : all) {
                CHECK(!reading.lanes->arriving(slab));
                CHECK(!expected[static_cast<size_t>(slab)] || reading.lanes->failed(slab) ||
                      reading.holds(slab, kJobs));
            }
        }
    }
}
