// Who has to leave when the arena is full: the one seam for a better policy.
//
// Entries are numbered 0 .. n-1 (one per layer and expert). The store reports every use with `touch` and asks for
// victims in order, oldest first. Least recently used, as a doubly linked list over arrays: no allocation after
// `resize`.
#pragma once

#include <cstdint>
#include <vector>

namespace edgemoe {

class LeastRecentlyUsed {
   public:
    static constexpr int32_t kNone = -1;

    void resize(int32_t n) {
        older_.assign(n, kNone);
        newer_.assign(n, kNone);
        linked_.assign(n, false);
        oldest_ = newest_ = kNone;
    }

    void touch(int32_t entry) {
        if (entry == newest_) {
            return;
        }
        remove(entry);
        older_[entry] = newest_;
        if (newest_ != kNone) {
            newer_[newest_] = entry;
        } else {
            oldest_ = entry;
        }
        newest_ = entry;
        linked_[entry] = true;
    }

    void remove(int32_t entry) {
        if (!linked_[entry]) {
            return;
        }
        const int32_t older = older_[entry];
        const int32_t newer = newer_[entry];
        (older != kNone ? newer_[older] : oldest_) = newer;
        (newer != kNone ? older_[newer] : newest_) = older;
        older_[entry] = newer_[entry] = kNone;
        linked_[entry] = false;
    }

    // The first candidate, and the one to try after it; kNone at the end.
    int32_t first_victim() const { return oldest_; }
    int32_t next_victim(int32_t entry) const { return newer_[entry]; }

   private:
    std::vector<int32_t> older_, newer_;
    std::vector<bool> linked_;
    int32_t oldest_ = kNone, newest_ = kNone;
};

}  // namespace edgemoe
