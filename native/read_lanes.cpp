#include "read_lanes.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <system_error>
#include <utility>

namespace edgemoe {

namespace {

constexpr int kTries = 3;  // the last by a buffered read, which asks the disk in another way

#ifdef SYS_sched_setattr
// `struct sched_attr` of sched_setattr(2), which older C libraries do not declare.
struct Scheduling {
    uint32_t size = sizeof(Scheduling);
    uint32_t policy = 0;
    uint64_t flags = 0;
    int32_t nice = 0;
    uint32_t priority = 0;
    uint64_t runtime_ns = 0, deadline_ns = 0, period_ns = 0;
};

// A lane works for microseconds between two sleeps. Since Linux 6.12 a thread that asks for short slices of time is let
// in at once where all processors compute, rather than at the end of somebody's slice. Else nothing changes.
void ask_for_short_slices() {
    constexpr uint32_t kOther = 0;            // SCHED_OTHER: the others are somebody's deliberate choice
    constexpr uint64_t kShortestNs = 100000;  // what the kernel allows
    Scheduling mine;
    if (syscall(SYS_sched_getattr, 0, &mine, sizeof mine, 0) == 0 && mine.policy == kOther) {
        mine.runtime_ns = kShortestNs;
        static_cast<void>(syscall(SYS_sched_setattr, 0, &mine, 0));
    }
}
#else
void ask_for_short_slices() {}
#endif

// Returns how many bytes the disk gave.
size_t read_one(const ReadJob& job, std::byte* edges) {
    if (job.io == Io::mmap) {
        populate(job.to, job.n, job.file->path());
        return job.n;
    }
    if (job.io == Io::direct && job.n_tries + 1 < kTries) {
        return job.file->read_direct(job.offset, job.to, job.n, edges);
    }
    job.file->read(job.offset, job.to, job.n);
    // The budget is total: what was copied must not stay in the page cache a second time. The kernel forgets whole
    // pages only.
    const uint64_t first = page_floor(job.offset);
    job.file->forget(first, page_ceil(job.offset + job.n) - first);
    return job.n;
}

}  // namespace

uint64_t now_ns() {
    return static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count());
}

ReadLanes::ReadLanes(int n_lanes)
    : process_(::getpid()),
      n_edges_(static_cast<size_t>(std::max(n_lanes, 1)) * 2 * page_size()),
      edges_(reserve_memory(n_edges_)) {
    for (int i = 1; i < n_lanes; ++i) {
        try {
            threads_.emplace_back([this, i] { work(i); });
        } catch (const std::system_error&) {
            return;  // no more threads to be had; fewer lanes read the same bytes
        }
    }
}

ReadLanes::~ReadLanes() {
    if (process_ != ::getpid()) {  // a fork, which has no threads, and nobody who could stop to wait
        for (std::thread& thread : threads_) {
            thread.detach();
        }
        static_cast<void>(wakings_.release());
        return;
    }
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    wakings_->work_ready.notify_all();
    for (std::thread& thread : threads_) {
        thread.join();
    }
    release_memory(edges_, n_edges_);
}

void ReadLanes::resize(int32_t n_slabs) { slabs_ = std::vector<Slab>(static_cast<size_t>(n_slabs) + 1); }

void ReadLanes::work(int lane) {
    ask_for_short_slices();
    std::unique_lock<std::mutex> lock(mutex_);
    ReadJob job{};
    while (true) {
        wakings_->work_ready.wait(lock, [&] { return stopping_ || take(job, lane); });
        if (stopping_) {
            return;
        }
        work_on(job, lane, lock);
    }
}

bool ReadLanes::may_begin(const ReadJob& demanded) const {
    const bool guesses = n_speculating_ > 0 || !speculative_.empty();
    return guesses || ranks_.empty() || demanded.rank <= *ranks_.begin();
}

bool ReadLanes::any_to_take() const {
    return may_speculate() ||
           std::any_of(demanded_.begin(), demanded_.end(), [this](const ReadJob& job) { return may_begin(job); });
}

bool ReadLanes::may_speculate() const { return !speculative_.empty() && n_speculating_ < std::max(1, size() / 2); }

// Half of the lanes at most read what nobody waits for: a demand finds the disk's queue short. The caller, who is a
// lane while it waits, reads nothing else than what is waited for. Of two lanes one is the caller, who may be
// computing: the other one tries again itself.
bool ReadLanes::take(ReadJob& job, int lane) {
    const auto mine = [&](const ReadJob& queued) {
        return (queued.failed_by != lane || size() <= 2) && may_begin(queued);
    };
    std::deque<ReadJob>* queue = &demanded_;
    auto found = std::find_if(queue->begin(), queue->end(), mine);
    const bool urgent = found != queue->end();
    if (!urgent) {
        if (lane == kCaller || !may_speculate()) {
            return false;
        }
        queue = &speculative_;
        found = queue->begin();
    }
    job = *found;
    queue->erase(found);
    if (urgent) {
        ranks_.insert(job.rank);
    } else {
        ++n_speculating_;
    }
    if (n_busy_++ == 0) {
        busy_since_ns_ = now_ns();
    }
    job.speculative = !urgent;
    return true;
}

// Each lane that finds work wakes the next one, if there is more: woken all at once, most would find nothing, and push
// those that compute off their processors for it.
void ReadLanes::work_on(ReadJob job, int lane, std::unique_lock<std::mutex>& lock) {
    const bool more = any_to_take();
    lock.unlock();
    if (more) {
        wakings_->work_ready.notify_one();
    }
    std::string failure;
    size_t n_given = 0;
    try {
        n_given = read_one(job, edges_ + static_cast<size_t>(lane) * 2 * page_size());
    } catch (const std::exception& error) {
        failure = error.what();
    }
    lock.lock();
    if (--n_busy_ == 0) {
        busy_ns_ += now_ns() - busy_since_ns_;
    }
    if (job.speculative) {
        --n_speculating_;
    } else {
        ranks_.erase(ranks_.find(job.rank));
    }
    if (failure.empty()) {
        bytes_read_ += job.slab == run_slab() ? 0 : n_given;
        finish(job.slab);
    } else if (++job.n_tries < kTries && slabs_[job.slab].demanded && !draining_ && !failed(job.slab)) {
        ++n_retries_;
        job.failed_by = lane;
        demanded_.push_front(job);
        wakings_->work_ready.notify_all();
        wakings_->work_done.notify_all();  // who waits reads along
    } else {
        failure_ = failure;
        give_up(job.slab);
        finish(job.slab);
    }
    if (draining_ && n_busy_ == 0) {
        wakings_->work_done.notify_all();
    }
}

void ReadLanes::finish(int32_t slab) {
    if (slabs_[slab].n_left.fetch_sub(1, std::memory_order_acq_rel) > 1) {
        return;
    }
    if (std::exchange(slabs_[slab].awaited, false) && --n_awaited_ == 0) {
        wakings_->work_done.notify_all();
    }
    if (std::exchange(slabs_[slab].watched, false)) {
        wakings_->slab_arrived.notify_all();
    }
}

// What is left of a slab that cannot be had is not read.
void ReadLanes::give_up(int32_t slab) {
    slabs_[slab].failed.store(true, std::memory_order_release);
    for (std::deque<ReadJob>* queue : {&demanded_, &speculative_}) {
        const auto its =
            std::stable_partition(queue->begin(), queue->end(), [&](const ReadJob& job) { return job.slab != slab; });
        for (auto job = its; job != queue->end(); ++job) {
            finish(slab);
        }
        queue->erase(its, queue->end());
    }
}

void ReadLanes::submit(const std::vector<ReadJob>& jobs, Urgency urgency) {
    if (jobs.empty()) {
        return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    for (const ReadJob& job : jobs) {
        Slab& slab = slabs_[job.slab];
        if (slab.n_left.load(std::memory_order_relaxed) == 0) {
            slab.failed.store(false, std::memory_order_relaxed);
            slab.n_jobs = 0;
            slab.demanded = urgency == Urgency::demanded;
        }
        ++slab.n_jobs;
        slab.n_left.fetch_add(1, std::memory_order_relaxed);
        enqueue(job, urgency);
    }
    const bool any = any_to_take();
    lock.unlock();
    if (any) {
        wakings_->work_ready.notify_one();
    }
}

void ReadLanes::enqueue(const ReadJob& job, Urgency urgency) {
    const bool demanded = urgency == Urgency::demanded;
    std::deque<ReadJob>& queue = demanded ? demanded_ : speculative_;
    const auto later = std::upper_bound(queue.begin(), queue.end(), job, [&](const ReadJob& a, const ReadJob& b) {
        return demanded ? a.rank < b.rank : a.turn < b.turn;
    });
    queue.insert(later, job);
}

void ReadLanes::hasten(int32_t slab) {
    std::unique_lock<std::mutex> lock(mutex_);
    slabs_[slab].demanded = true;
    const auto others = std::stable_partition(speculative_.begin(), speculative_.end(),
                                              [&](const ReadJob& job) { return job.slab != slab; });
    if (others != speculative_.end()) {
        std::for_each(others, speculative_.end(), [this](const ReadJob& job) { enqueue(job, Urgency::demanded); });
        speculative_.erase(others, speculative_.end());
        lock.unlock();
        wakings_->work_ready.notify_one();
    }
}

bool ReadLanes::cancel(int32_t slab) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto is_its = [&](const ReadJob& job) { return job.slab == slab; };
    if (std::count_if(speculative_.begin(), speculative_.end(), is_its) != slabs_[slab].n_jobs) {
        return false;
    }
    speculative_.erase(std::remove_if(speculative_.begin(), speculative_.end(), is_its), speculative_.end());
    slabs_[slab].n_left.store(0, std::memory_order_release);
    return true;
}

void ReadLanes::wait(const std::vector<int32_t>& slabs) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (const int32_t slab : slabs) {
        n_awaited_ += arriving(slab) && !std::exchange(slabs_[slab].awaited, true) ? 1 : 0;
    }
    ReadJob job{};
    while (n_awaited_ > 0) {
        if (take(job, kCaller)) {
            work_on(job, kCaller, lock);
        } else {
            wakings_->work_done.wait(lock);
        }
    }
    if (any_to_take()) {  // what had to wait for the caller's own reads
        wakings_->work_ready.notify_one();
    }
    if (std::any_of(slabs.begin(), slabs.end(), [this](int32_t slab) { return failed(slab); })) {
        throw SystemError(failure_);
    }
}

void ReadLanes::await(int32_t slab) {
    std::unique_lock<std::mutex> lock(mutex_);
    wakings_->slab_arrived.wait(lock, [&] {
        slabs_[slab].watched = true;
        return !arriving(slab);
    });
}

void ReadLanes::drain() {
    std::unique_lock<std::mutex> lock(mutex_);
    draining_ = true;
    for (std::deque<ReadJob>* queue : {&demanded_, &speculative_}) {
        while (!queue->empty()) {
            failure_ = "what was still to be read was given up";
            give_up(queue->front().slab);
        }
    }
    wakings_->work_done.wait(lock, [this] { return n_busy_ == 0; });
    draining_ = false;
}

void ReadLanes::run(std::vector<ReadJob> jobs) {
    for (ReadJob& job : jobs) {
        job.slab = run_slab();
    }
    submit(jobs, Urgency::demanded);
    try {
        wait({run_slab()});
    } catch (const SystemError&) {
        drain();  // nobody writes any more when the caller learns of it
        throw;
    }
}

uint64_t ReadLanes::busy_ns() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return busy_ns_ + (n_busy_ > 0 ? now_ns() - busy_since_ns_ : 0);
}

}  // namespace edgemoe
