#include "read_lanes.h"

#include <system_error>

namespace edgemoe {

namespace {

void read_one(const ReadJob& job) {
    switch (job.io) {
        case Io::direct:
            job.file->read_direct(job.offset, job.to, job.n, job.needed);
            return;
        case Io::mmap:
            populate(job.to, job.n, job.file->path());
            return;
        case Io::pread:
            job.file->read(job.offset, job.to, job.n);
            // The budget is total: what was copied must not stay in the page cache a second time.
            job.file->forget(job.offset, job.n);
            return;
    }
}

}  // namespace

ReadLanes::ReadLanes(int n_lanes) {
    for (int i = 1; i < n_lanes; ++i) {
        try {
            threads_.emplace_back([this] { lane(); });
        } catch (const std::system_error&) {
            return;  // no more threads to be had; fewer lanes read the same bytes
        }
    }
}

ReadLanes::~ReadLanes() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    work_ready_.notify_all();
    for (std::thread& thread : threads_) {
        thread.join();
    }
}

void ReadLanes::lane() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        work_ready_.wait(lock, [this] { return stopping_ || (jobs_ != nullptr && next_ < jobs_->size()); });
        if (stopping_) {
            return;
        }
        work(lock);
    }
}

void ReadLanes::work(std::unique_lock<std::mutex>& lock) {
    ++busy_;
    while (jobs_ != nullptr && next_ < jobs_->size()) {
        const ReadJob& job = (*jobs_)[next_++];
        lock.unlock();
        std::string failure;
        try {
            read_one(job);
        } catch (const std::exception& error) {
            failure = error.what();
        }
        lock.lock();
        if (!failure.empty()) {
            next_ = jobs_->size();  // nobody starts another one
            if (failure_.empty()) {
                failure_ = failure;
            }
        }
    }
    if (--busy_ == 0) {
        work_done_.notify_all();
    }
}

void ReadLanes::run(const std::vector<ReadJob>& jobs) {
    if (jobs.empty()) {
        return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_ = &jobs;
    next_ = 0;
    failure_.clear();
    if (jobs.size() > 1) {
        work_ready_.notify_all();
    }
    work(lock);
    work_done_.wait(lock, [this] { return busy_ == 0; });
    jobs_ = nullptr;
    if (!failure_.empty()) {
        throw SystemError(failure_);
    }
}

}  // namespace edgemoe
