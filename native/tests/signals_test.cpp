#include "signals.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <fstream>
#include <thread>
#include <vector>

#include "check.h"
#include "child_process.h"
#include "mapped_file.h"
#include "reserved.h"
#include "scratch_file.h"

using edgemoe::BusErrorGuard;
using edgemoe::MappedFile;
using edgemoe::page_size;

namespace {

uint8_t touch(const std::byte* at) { return *reinterpret_cast<const volatile uint8_t*>(at); }

}  // namespace

TEST(one_watch_at_a_time_calls_the_handler_once) {
    static std::atomic<int> n_stops, n_calls;
    struct sigaction action{}, before{};
    action.sa_handler = [](int) { ++n_calls; };
    CHECK_EQUAL(::sigaction(SIGINT, &action, &before), 0);
    {
        const edgemoe::InterruptWatch outer([](void*) { ++n_stops; }, nullptr);
        {
            const edgemoe::InterruptWatch inner([](void*) { n_stops += 100; }, nullptr);
            ::raise(SIGINT);
        }
        ::raise(SIGINT);
    }
    ::raise(SIGINT);
    CHECK_EQUAL(n_stops.load(), 2);
    CHECK_EQUAL(n_calls.load(), 3);
    ::sigaction(SIGINT, &before, nullptr);
}

// First, because the chained handler is the one found when the first guard appears.

TEST(fault_elsewhere_goes_to_the_earlier_handler) {
    const ScratchFile file(random_bytes(2 * page_size(), 1));
    const Reserved watched(1);
    const Reserved other(2);
    const int status = status_of_child([&] {
        struct sigaction action{};
        action.sa_handler = [](int) { ::_exit(42); };
        ::sigaction(SIGBUS, &action, nullptr);
        BusErrorGuard guard;
        guard.watch(watched.base, watched.size);
        MappedFile(file.path()).map_over(other.base, 0, other.size);
        static_cast<void>(::truncate(file.path().c_str(), 0) == 0 && touch(other.base) != 0);
    });
    CHECK(WIFEXITED(status));
    CHECK_EQUAL(WEXITSTATUS(status), 42);
}

TEST(fault_elsewhere_kills) {
    const ScratchFile file(random_bytes(2 * page_size(), 1));
    const Reserved watched(1);
    const Reserved other(2);
    const int status = status_of_child([&] {
        BusErrorGuard guard;
        guard.watch(watched.base, watched.size);
        MappedFile(file.path()).map_over(other.base, 0, other.size);
        static_cast<void>(::truncate(file.path().c_str(), 0) == 0 && touch(other.base) != 0);
    });
    CHECK(!survived(status));
    CHECK(!hung(status));
}

TEST(sent_signal_kills) {
    const Reserved watched(1);
    const int status = status_of_child([&] {
        BusErrorGuard guard;
        guard.watch(watched.base, watched.size);
        ::kill(::getpid(), SIGBUS);
    });
    CHECK(!survived(status));
    CHECK(!hung(status));
}

TEST(truncated_mapping_is_noted_and_survived) {
    ScratchFile file(random_bytes(6 * page_size(), 2));
    const Reserved place(6);
    const MappedFile mapped(file.path());
    mapped.map_over(place.base, 0, place.size);
    BusErrorGuard guard;
    BusErrorGuard bystander;
    const Reserved elsewhere(1);
    guard.watch(place.base, place.size);
    bystander.watch(elsewhere.base, elsewhere.size);
    CHECK(same(place.base, file, 0, place.size));
    CHECK(!guard.faulted());

    file.truncate(2 * page_size());
    // Several threads run into it at once, as ggml's do. TSan takes mending a page for writing to it, and would call
    // the threads' meeting on one page a race; under it each has a page of its own.
#if defined(__SANITIZE_THREAD__)
    constexpr size_t kPagesEach = 1;
#else
    constexpr size_t kPagesEach = 4;
#endif
    std::vector<std::thread> readers;
    std::atomic<int> n_zero{0};
    for (size_t i = 0; i < 4; ++i) {
        const std::byte* first = place.page(kPagesEach == 1 ? 2 + i : 2);
        readers.emplace_back([&, first] { n_zero += all_zero(first, kPagesEach * page_size()) ? 1 : 0; });
    }
    for (std::thread& reader : readers) {
        reader.join();
    }
    CHECK_EQUAL(n_zero.load(), 4);
    CHECK(guard.faulted());
    CHECK(!bystander.faulted());
    CHECK(same(place.base, file, 0, 2 * page_size()));
}

TEST(guard_forgets_its_ranges) {
    ScratchFile file(random_bytes(2 * page_size(), 3));
    const Reserved place(2);
    MappedFile(file.path()).map_over(place.base, 0, place.size);
    for (int i = 0; i < 1000; ++i) {  // more than there are slots
        BusErrorGuard guard;
        guard.watch(place.base, place.size);
        CHECK(!guard.faulted());
    }
    file.truncate(0);
    const int status = status_of_child([&] { static_cast<void>(touch(place.base)); });
    CHECK(!survived(status));
}

TEST(too_many_ranges_are_refused) {
    const Reserved places(40);
    BusErrorGuard guard;
    CHECK_REFUSED(for (size_t i = 0; i < 40; ++i) { guard.watch(places.page(i), page_size()); }, "too many models");
}

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST(fault_that_cannot_be_mended_kills_instead_of_hanging) {
    size_t limit = 0;
    std::ifstream("/proc/sys/vm/max_map_count") >> limit;
    if (limit == 0 || limit > 300000) {
        throw check::Skipped("the limit of memory areas is unknown or large");
    }
    const ScratchFile file(random_bytes(3 * page_size(), 4));
    const int status = status_of_child([&] {
        const Reserved place(3);
        const Reserved crowd(2 * limit);
        MappedFile(file.path()).map_over(place.base, 0, place.size);
        BusErrorGuard guard;
        guard.watch(place.base, place.size);
        size_t i = 0;
        while (::mprotect(crowd.page(2 * i), page_size(), PROT_NONE) == 0) {
            ++i;
        }
        static_cast<void>(::truncate(file.path().c_str(), 0) == 0 && touch(place.page(1)) != 0);
    });
    CHECK(!survived(status));
    CHECK(!hung(status));
}
#endif
