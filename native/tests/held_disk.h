// A disk in a test's hands: reads wait, or fail, where it says so. It stands in for preadv in the whole program, so
// that what depends on the order in which reads are made can be tested without depending on time.
#pragma once

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <set>
#include <vector>

#include "check.h"

class HeldDisk {
   public:
    struct Read {
        uint64_t offset;
        bool direct;
    };

    // Reads at these offsets wait from now on.
    void hold(const std::vector<uint64_t>& offsets) {
        const std::lock_guard<std::mutex> lock(mutex_);
        held_.insert(offsets.begin(), offsets.end());
    }
    void let_go(const std::vector<uint64_t>& offsets) {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (const uint64_t offset : offsets) {
            held_.erase(offset);
        }
        changed_.notify_all();
    }
    void let_go() {
        const std::lock_guard<std::mutex> lock(mutex_);
        held_.clear();
        changed_.notify_all();
    }
    // Those of which this is true fail.
    void fail(std::function<bool(const Read&)> fails) {
        const std::lock_guard<std::mutex> lock(mutex_);
        fails_ = std::move(fails);
    }
    void recover() { fail(nullptr); }
    // Until so many reads have begun since the last `forget`.
    void await(size_t n) {
        std::unique_lock<std::mutex> lock(mutex_);
        CHECK(changed_.wait_for(lock, std::chrono::seconds(20), [&] { return begun_.size() >= n; }));
    }
    void forget() {
        const std::lock_guard<std::mutex> lock(mutex_);
        begun_.clear();
    }
    std::vector<uint64_t> offsets() {  // in the order in which they have begun
        const std::lock_guard<std::mutex> lock(mutex_);
        std::vector<uint64_t> offsets;
        for (const Read& read : begun_) {
            offsets.push_back(read.offset);
        }
        return offsets;
    }
    std::vector<bool> direct() {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::vector<bool> direct;
        for (const Read& read : begun_) {
            direct.push_back(read.direct);
        }
        return direct;
    }

    // False: the read fails.
    bool pass(int fd, uint64_t offset) {
        std::unique_lock<std::mutex> lock(mutex_);
#if defined(O_DIRECT)
        const Read read{offset, (::fcntl(fd, F_GETFL) & O_DIRECT) != 0};
#else
        static_cast<void>(fd);
        const Read read{offset, false};
#endif
        begun_.push_back(read);
        changed_.notify_all();
        changed_.wait(lock, [&] { return held_.count(offset) == 0; });
        return !fails_ || !fails_(read);
    }

   private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::set<uint64_t> held_;
    std::vector<Read> begun_;
    std::function<bool(const Read&)> fails_;
};

inline HeldDisk& held_disk() {
    static HeldDisk disk;
    return disk;
}

// As a test begins and ends, nothing is held.
class WithHeldDisk {
   public:
    WithHeldDisk() : disk(held_disk()) { disk.forget(); }
    ~WithHeldDisk() {
        disk.let_go();
        disk.recover();
    }
    WithHeldDisk(const WithHeldDisk&) = delete;
    WithHeldDisk& operator=(const WithHeldDisk&) = delete;

    HeldDisk& disk;
};

extern "C" ssize_t preadv(int fd, const struct iovec* to, int n, off_t offset) {
    using Preadv = ssize_t (*)(int, const struct iovec*, int, off_t);
    static const auto of_the_system = reinterpret_cast<Preadv>(::dlsym(RTLD_NEXT, "preadv"));
    if (!held_disk().pass(fd, static_cast<uint64_t>(offset))) {
        errno = EIO;
        return -1;
    }
    return of_the_system(fd, to, n, offset);
}
