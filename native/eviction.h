// Who has to leave when the arena is full: the one seam for a better policy.
//
// Entries are numbered 0 .. n-1 (one per layer and expert). The store reports every use with `touch` and asks for
// victims in order. Least recently used, in two classes: entries that are preferred leave after all others. Doubly
// linked lists over arrays: no allocation after `resize`.
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
        preferred_.assign(n, false);
        ends_[0] = ends_[1] = {};
    }

    void touch(int32_t entry) {
        if (entry == of(entry).newest) {
            return;
        }
        remove(entry);
        Ends& ends = of(entry);
        older_[entry] = ends.newest;
        if (ends.newest != kNone) {
            newer_[ends.newest] = entry;
        } else {
            ends.oldest = entry;
        }
        ends.newest = entry;
        linked_[entry] = true;
    }

    void remove(int32_t entry) {
        if (!linked_[entry]) {
            return;
        }
        Ends& ends = of(entry);
        const int32_t older = older_[entry];
        const int32_t newer = newer_[entry];
        (older != kNone ? newer_[older] : ends.oldest) = newer;
        (newer != kNone ? older_[newer] : ends.newest) = older;
        older_[entry] = newer_[entry] = kNone;
        linked_[entry] = false;
    }

    // An entry in the order that changes class becomes the newest of its new class.
    void prefer(int32_t entry, bool preferred) {
        if (preferred_[entry] == preferred) {
            return;
        }
        const bool linked = linked_[entry];
        remove(entry);
        preferred_[entry] = preferred;
        if (linked) {
            touch(entry);
        }
    }

    // The first candidate, and the one to try after it; kNone at the end.
    int32_t first_victim() const { return ends_[0].oldest != kNone ? ends_[0].oldest : ends_[1].oldest; }
    int32_t next_victim(int32_t entry) const {
        return newer_[entry] != kNone || preferred_[entry] ? newer_[entry] : ends_[1].oldest;
    }

   private:
    struct Ends {
        int32_t oldest = kNone, newest = kNone;
    };
    Ends& of(int32_t entry) { return ends_[preferred_[entry] ? 1 : 0]; }

    std::vector<int32_t> older_, newer_;
    std::vector<bool> linked_, preferred_;
    Ends ends_[2];  // ordinary, preferred
};

}  // namespace edgemoe
