// The signals that edgemoe answers: a mapped file that became shorter under a reader, and Ctrl-C.
#pragma once

#include <cstddef>

namespace edgemoe {

// Reading a mapped file that was truncated raises SIGBUS. While a guard lives, such a fault inside its range is given a
// page of zeros and noted, so that the answer can be refused instead of the process dying.
class BusErrorGuard {
   public:
    BusErrorGuard() = default;
    ~BusErrorGuard();
    BusErrorGuard(const BusErrorGuard&) = delete;
    BusErrorGuard& operator=(const BusErrorGuard&) = delete;

    void watch(std::byte* base, size_t n);
    bool faulted() const;

   private:
    static constexpr int kMaxRanges = 16;
    int slots_[kMaxRanges];
    int n_slots_ = 0;
};

// While it lives, SIGINT also calls `stop(argument)` at once, from the signal handler; the handler that was there runs
// too. Python runs its own handlers only between C calls, which is too late for a computation of minutes. Does nothing
// where SIGINT is ignored or kills, or another one lives already. The caller is the main thread.
class InterruptWatch {
   public:
    InterruptWatch(void (*stop)(void*), void* argument);
    ~InterruptWatch();
    InterruptWatch(const InterruptWatch&) = delete;
    InterruptWatch& operator=(const InterruptWatch&) = delete;

   private:
    bool watches_ = false;
};

}  // namespace edgemoe
