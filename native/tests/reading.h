// A file that lanes read, slab by slab, from a disk that holds reads back or fails them.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "held_disk.h"
#include "mapped_file.h"
#include "read_lanes.h"
#include "scratch_file.h"

using edgemoe::ReadLanes;
using edgemoe::Urgency;
using Offsets = std::vector<uint64_t>;

inline constexpr int32_t kSlabs = 16, kJobs = 3;

// A file of slabs of three pages, each read by up to three jobs, one a page, to the same place in memory.
class Reading {
   public:
    explicit Reading(int n_lanes, edgemoe::Io io = edgemoe::Io::pread)
        : page(edgemoe::page_size()),
          scratch_(random_bytes(kSlabs * kJobs * page, 1)),
          file_(scratch_.path()),
          io_(io) {
        std::string why;
        if (io == edgemoe::Io::direct && !file_.open_direct(why)) {
            throw check::Skipped(why);
        }
        memory_ = edgemoe::reserve_memory(scratch_.bytes().size());
        lanes = std::make_unique<ReadLanes>(n_lanes);
        lanes->resize(kSlabs);
    }
    ~Reading() {
        disk.let_go();
        lanes.reset();
        edgemoe::release_memory(memory_, scratch_.bytes().size());
    }
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;

    uint64_t at(int32_t slab, int32_t job = 0) const { return static_cast<uint64_t>(slab * kJobs + job) * page; }
    void submit(int32_t slab, Urgency urgency, int32_t n_jobs = 1, int rank = 0) {
        std::vector<edgemoe::ReadJob> jobs;
        for (int32_t job = 0; job < n_jobs; ++job) {
            jobs.push_back({&file_, at(slab, job), memory_ + at(slab, job), page, io_, slab, rank});
        }
        lanes->submit(jobs, urgency);
    }
    // Somebody else reads it; the caller does not help.
    void watch(int32_t slab) const {
        while (lanes->arriving(slab)) {
            std::this_thread::yield();
        }
    }
    bool holds(int32_t slab, int32_t n_jobs = 1) const {
        return std::memcmp(memory_ + at(slab), scratch_.bytes().data() + at(slab),
                           static_cast<size_t>(n_jobs) * page) == 0;
    }
    bool untouched(int32_t slab) const {
        const std::byte* first = memory_ + at(slab);
        return std::all_of(first, first + kJobs * page, [](std::byte byte) { return byte == std::byte{0}; });
    }
    void clear() { std::memset(memory_, 0, scratch_.bytes().size()); }

    const uint64_t page;
    const std::string& path() const { return scratch_.path(); }
    std::unique_ptr<ReadLanes> lanes;

   private:
    WithHeldDisk with_;
    const ScratchFile scratch_;
    edgemoe::MappedFile file_;
    const edgemoe::Io io_;
    std::byte* memory_ = nullptr;

   public:
    HeldDisk& disk = with_.disk;
};

inline constexpr Urgency kDemanded = Urgency::demanded, kSpeculative = Urgency::speculative;

inline void fail_times(Reading& reading, int32_t slab, int times) {
    reading.disk.fail([at = reading.at(slab), times](const HeldDisk::Read& read) mutable {
        return read.offset == at && times-- > 0;
    });
}
