// A few threads that read in parallel. They sleep on a condition variable when idle and are joined by the destructor.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "mapped_file.h"

namespace edgemoe {

enum class Io { direct, mmap, pread };

// One contiguous read. For `direct`, `offset`, `to` and `n` are whole pages; `needed` is what must exist in the file.
struct ReadJob {
    const MappedFile* file;
    uint64_t offset;
    std::byte* to;
    size_t n;
    size_t needed;
    Io io;
};

class ReadLanes {
   public:
    explicit ReadLanes(int n_lanes);
    ~ReadLanes();
    ReadLanes(const ReadLanes&) = delete;
    ReadLanes& operator=(const ReadLanes&) = delete;

    // Does all jobs and returns; the caller's thread is one of the lanes. Throws the first failure once every lane has
    // stopped touching memory. One caller at a time.
    void run(const std::vector<ReadJob>& jobs);

    int size() const { return static_cast<int>(threads_.size()) + 1; }

   private:
    void lane();
    void work(std::unique_lock<std::mutex>& lock);

    std::mutex mutex_;
    std::condition_variable work_ready_, work_done_;
    std::vector<std::thread> threads_;
    const std::vector<ReadJob>* jobs_ = nullptr;
    size_t next_ = 0;
    int busy_ = 0;
    bool stopping_ = false;
    std::string failure_;
};

}  // namespace edgemoe
