#include "read_lanes.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>

#include "check.h"
#include "scratch_file.h"

using edgemoe::Io;
using edgemoe::MappedFile;
using edgemoe::page_size;
using edgemoe::ReadJob;
using edgemoe::ReadLanes;

namespace {

struct Target {
    explicit Target(size_t n) : size(edgemoe::page_ceil(n)), base(edgemoe::reserve_memory(size)) {}
    ~Target() { edgemoe::release_memory(base, size); }
    Target(const Target&) = delete;
    Target& operator=(const Target&) = delete;

    const size_t size;
    std::byte* const base;
};

// Jobs that cover the whole file in pieces of random sizes, odd ones unless it is mapped.
std::vector<ReadJob> cover(const MappedFile& file, std::byte* to, Io io, uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<ReadJob> jobs;
    for (uint64_t at = 0; at < file.size();) {
        const uint64_t left = file.size() - at;
        uint64_t n = std::min<uint64_t>(left, random() % 15000 + 1);
        if (io == Io::mmap) {
            n = std::min((random() % 3 + 1) * page_size(), edgemoe::page_ceil(left));
        }
        jobs.push_back({&file, at, to + at, n, io});
        at += n;
    }
    return jobs;
}

void prepare(MappedFile& file, Io io, const Target& target) {
    std::string why;
    if (io == Io::direct && !file.open_direct(why)) {
        throw check::Skipped(why);
    }
    if (io == Io::mmap) {
        file.map_over(target.base, 0, target.size);
    }
}

void all_bytes_arrive(Io io, int n_lanes) {
    const ScratchFile scratch(random_bytes(200 * page_size() + 321, 1));
    MappedFile file(scratch.path());
    const Target target(scratch.bytes().size());
    prepare(file, io, target);
    ReadLanes lanes(n_lanes);
    CHECK_EQUAL(lanes.size(), n_lanes);
    for (uint32_t round = 0; round < 5; ++round) {
        if (io != Io::mmap) {
            std::memset(target.base, 0, target.size);
        }
        lanes.run(cover(file, target.base, io, round));
        CHECK(std::memcmp(target.base, scratch.bytes().data(), scratch.bytes().size()) == 0);
    }
}

void failure_is_thrown_once_all_have_stopped(Io io) {
    ScratchFile scratch(random_bytes(300 * page_size(), 2));
    MappedFile file(scratch.path());
    const Target target(scratch.bytes().size());
    prepare(file, io, target);
    ReadLanes lanes(4);
    const std::vector<ReadJob> jobs = cover(file, target.base, io, 7);
    for (int round = 0; round < 20; ++round) {
        scratch.truncate(150 * page_size() + 10);
        CHECK_REFUSED(lanes.run(jobs), scratch.path());
        if (io != Io::mmap) {
            // Nobody may still be writing: what is put there now has to stay.
            std::memset(target.base, 0x11, target.size);
            const Bytes expected(target.size, std::byte{0x11});
            CHECK(std::memcmp(target.base, expected.data(), target.size) == 0);
        }
        scratch.restore();
        lanes.run(jobs);
        CHECK(std::memcmp(target.base, scratch.bytes().data(), scratch.bytes().size()) == 0);
    }
}

}  // namespace

TEST(pread_with_one_lane) { all_bytes_arrive(Io::pread, 1); }
TEST(pread_with_eight_lanes) { all_bytes_arrive(Io::pread, 8); }
TEST(direct_with_one_lane) { all_bytes_arrive(Io::direct, 1); }
TEST(direct_with_eight_lanes) { all_bytes_arrive(Io::direct, 8); }
TEST(mmap_with_one_lane) { all_bytes_arrive(Io::mmap, 1); }
TEST(mmap_with_eight_lanes) { all_bytes_arrive(Io::mmap, 8); }

TEST(pread_failure) { failure_is_thrown_once_all_have_stopped(Io::pread); }
TEST(direct_failure) { failure_is_thrown_once_all_have_stopped(Io::direct); }
TEST(mmap_failure) { failure_is_thrown_once_all_have_stopped(Io::mmap); }

TEST(no_jobs_and_one_job) {
    const ScratchFile scratch(random_bytes(10, 3));
    const MappedFile file(scratch.path());
    Bytes to(10);
    ReadLanes lanes(3);
    lanes.run({});
    for (int round = 0; round < 200; ++round) {
        std::fill(to.begin(), to.end(), std::byte{0});
        lanes.run({{&file, 0, to.data(), 10, Io::pread}});
        CHECK(to == scratch.bytes());
    }
}

TEST(failure_stops_the_remaining_jobs) {
    const ScratchFile scratch(random_bytes(10, 4));
    const MappedFile file(scratch.path());
    Bytes to(1000, std::byte{0});
    std::vector<ReadJob> jobs{{&file, 5, to.data(), 6, Io::pread}};
    for (size_t i = 1; i < 1000; ++i) {
        jobs.push_back({&file, i % 10, to.data() + i, 1, Io::pread});
    }
    ReadLanes lanes(1);
    CHECK_REFUSED(lanes.run(jobs), "gave 5 bytes of 6");
    CHECK(std::all_of(to.begin() + 6, to.end(), [](std::byte byte) { return byte == std::byte{0}; }));
}

TEST(many_lanes_come_and_go) {
    const ScratchFile scratch(random_bytes(5000, 5));
    const MappedFile file(scratch.path());
    Bytes to(5000);
    for (int cycle = 0; cycle < 200; ++cycle) {
        ReadLanes lanes(cycle % 9 + 1);
        if (cycle % 2 == 0) {  // the others are joined without ever having worked
            std::fill(to.begin(), to.end(), std::byte{0});
            lanes.run(cover(file, to.data(), Io::pread, static_cast<uint32_t>(cycle)));
            CHECK(to == scratch.bytes());
        }
    }
}

#ifdef SYS_sched_getattr
struct Scheduling {  // the beginning of sched_attr, see sched_setattr(2)
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns, deadline_ns, period_ns;
};

// Zeros of a thread that is ending.
Scheduling scheduling_of(int thread) {
    Scheduling found{};
    return ::syscall(SYS_sched_getattr, thread, &found, sizeof found, 0) == 0 ? found : Scheduling{};
}

TEST(lanes_ask_for_short_slices_and_keep_their_niceness) {
    constexpr uint64_t kShortest = 100000;
    const Scheduling own = scheduling_of(0);
    if (own.runtime_ns == 0) {
        throw check::Skipped("this kernel has slices of one length");
    }
    CHECK(own.runtime_ns > kShortest);
    const auto lanes_seen = [&] {
        int n = 0;
        for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
            const Scheduling found = scheduling_of(std::stoi(task.path().filename().string()));
            n += found.runtime_ns == kShortest && found.nice == own.nice && found.policy == own.policy ? 1 : 0;
        }
        return n;
    };
    const ReadLanes lanes(4);
    for (int tries = 0; lanes_seen() < 3 && tries < 5000; ++tries) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK_EQUAL(lanes_seen(), 3);  // the fourth is the caller, who computes
    CHECK_EQUAL(scheduling_of(0).runtime_ns, own.runtime_ns);
}
#endif

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST(system_without_threads_to_spare_reads_with_fewer) {
    const ScratchFile scratch(random_bytes(5000, 6));
    const MappedFile file(scratch.path());
    Bytes to(5000);
    struct rlimit before{};
    CHECK_EQUAL(::getrlimit(RLIMIT_AS, &before), 0);
    uint64_t n_pages = 0;
    std::ifstream("/proc/self/statm") >> n_pages;
    const struct rlimit tight{n_pages * page_size() + (1 << 26), before.rlim_max};  // room for a few stacks
    CHECK_EQUAL(::setrlimit(RLIMIT_AS, &tight), 0);
    std::unique_ptr<ReadLanes> lanes;
    try {
        lanes = std::make_unique<ReadLanes>(200);
    } catch (const std::exception&) {
    }
    CHECK_EQUAL(::setrlimit(RLIMIT_AS, &before), 0);
    CHECK(lanes != nullptr);
    CHECK(lanes->size() < 200);
    lanes->run(cover(file, to.data(), Io::pread, 1));
    CHECK(to == scratch.bytes());
}
#endif
