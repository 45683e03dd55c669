// A few threads that read in parallel, in two queues: what somebody waits for comes before what may be needed soon.
// They sleep on a condition variable when idle and are joined by the destructor.
//
// Jobs belong to a *slab*, a number below that given to `resize`. A slab is arriving while one of its jobs is queued or
// under way. A job that fails is tried again, by another lane where there is one, at last by a buffered read; only then
// has its slab failed. What nobody waits for is not tried again.
//
// Of what is demanded, the next rank does not begin before the one before it has arrived: reads that are under way
// together arrive together, so that the first would be waited for as long as the last. Beside guesses, which are under
// way in any case, nothing is held back.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "mapped_file.h"

namespace edgemoe {

enum class Io { direct, mmap, pread };

// One contiguous read, which writes nothing else than its n bytes. For `direct`, `to` is congruent to `offset` modulo
// the page size; for `mmap`, both are whole pages of a mapping.
struct ReadJob {
    const MappedFile* file;
    uint64_t offset;
    std::byte* to;
    size_t n;
    Io io;
    int32_t slab = 0;
    int rank = 0;      // among what is demanded: the lower ones first
    int64_t turn = 0;  // among what nobody waits for: the lower ones first
    int n_tries = 0;
    int failed_by = -1;        // the lane that tried last
    bool speculative = false;  // taken from the queue of those
};

enum class Urgency { demanded, speculative };

class ReadLanes {
   public:
    explicit ReadLanes(int n_lanes);
    ~ReadLanes();
    ReadLanes(const ReadLanes&) = delete;
    ReadLanes& operator=(const ReadLanes&) = delete;

    void resize(int32_t n_slabs);  // while nothing is arriving

    // The rest is for one caller's thread at a time, but for `await` and the counters at the end.
    void submit(const std::vector<ReadJob>& jobs, Urgency urgency);
    bool arriving(int32_t slab) const { return slabs_[slab].n_left.load(std::memory_order_acquire) > 0; }
    bool failed(int32_t slab) const { return slabs_[slab].failed.load(std::memory_order_acquire); }
    void forget(int32_t slab) { slabs_[slab].failed = false; }  // of an earlier time that it failed
    // Its jobs that wait are demanded from now on.
    void hasten(int32_t slab);
    // Takes all its jobs back, if none has begun.
    bool cancel(int32_t slab);
    // Until none of the slabs is arriving; the caller reads along. Throws the first failure among them.
    void wait(const std::vector<int32_t>& slabs);
    // From any thread, while others are waiting or not: until the slab is not arriving.
    void await(int32_t slab);
    // Nothing is read any more when it returns. Slabs whose jobs were taken back have failed.
    void drain();

    // All jobs, demanded, whatever slab they name: as one of their own. Then waits for them.
    void run(std::vector<ReadJob> jobs);

    int size() const { return static_cast<int>(threads_.size()) + 1; }
    uint64_t bytes_read() const { return bytes_read_; }  // without those of `run`
    uint64_t busy_ns() const;                            // time in which at least one read was under way
    uint64_t n_retries() const { return n_retries_; }

   private:
    struct Slab {
        std::atomic<int32_t> n_left{0};
        std::atomic<bool> failed{false};
        int32_t n_jobs = 0;     // submitted for what is arriving
        bool demanded = false;  // what is arriving is waited for
        bool awaited = false;   // right now, by the caller
        bool watched = false;   // right now, by whoever
    };

    static constexpr int kCaller = 0;  // as a lane

    int32_t run_slab() const { return static_cast<int32_t>(slabs_.size()) - 1; }
    void work(int lane);
    void enqueue(const ReadJob& job, Urgency urgency);
    bool take(ReadJob& job, int lane);
    void work_on(ReadJob job, int lane, std::unique_lock<std::mutex>& lock);
    void finish(int32_t slab);
    void give_up(int32_t slab);
    bool may_begin(const ReadJob& demanded) const;
    bool may_speculate() const;
    bool any_to_take() const;

    struct Wakings {
        std::condition_variable work_ready, work_done, slab_arrived;
    };
    mutable std::mutex mutex_;
    std::unique_ptr<Wakings> wakings_ = std::make_unique<Wakings>();
    const pid_t process_;
    const size_t n_edges_;
    std::byte* const edges_;  // two pages for each lane
    std::vector<std::thread> threads_;
    std::vector<Slab> slabs_{1};  // the last one is what `run` reads
    std::deque<ReadJob> demanded_, speculative_;
    std::multiset<int> ranks_;  // of what is demanded and under way
    int n_busy_ = 0, n_speculating_ = 0, n_awaited_ = 0;
    bool stopping_ = false, draining_ = false;
    std::string failure_;  // the latest
    uint64_t busy_since_ns_ = 0, busy_ns_ = 0;
    std::atomic<uint64_t> bytes_read_{0}, n_retries_{0};
};

uint64_t now_ns();  // a steady clock

}  // namespace edgemoe
