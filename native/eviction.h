// Who has to leave when the arena is full: the one seam for a better policy.
//
// Entries are numbered 0 .. n-1, one per layer and expert, layer by layer. The store tells what was routed where and
// which entries are in memory, and asks for victims, one after the other, while it serves a layer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edgemoe {

class Eviction {
   public:
    static constexpr int32_t kNone = -1;
    virtual ~Eviction() = default;

    // n_expert of each MoE layer; forgets everything.
    virtual void resize(const std::vector<int>& n_expert) = 0;
    // The next `n_tokens` tokens (a prompt batch, or one) pass the layer, the how-manieth with experts, and chose
    // these.
    virtual void routed(int layer, int64_t n_tokens, const std::vector<int32_t>& experts) = 0;
    virtual void touch(int32_t entry) = 0;   // asked for: in memory from now on
    virtual void admit(int32_t entry) = 0;   // in memory from now on, without having been asked for
    virtual void remove(int32_t entry) = 0;  // no longer in memory
    // These experts of the layer, and no others of it, belong to the active task.
    virtual void prefer(int layer, const std::vector<int32_t>& experts) = 0;

    // Starts a series of victims for what this layer needs, during which nothing above is called but `remove` and
    // `admit`.
    virtual void seek(int layer) = 0;
    virtual int32_t next_victim() = 0;  // kNone at the end
};

// The control: least recently used, and nothing else. Doubly linked lists over arrays: no allocation after `resize`.
class LeastRecentlyUsed final : public Eviction {
   public:
    void resize(const std::vector<int>& n_expert) override {
        size_t n = 0;
        for (const int experts : n_expert) {
            n += static_cast<size_t>(experts);
        }
        older_.assign(n, kNone);
        newer_.assign(n, kNone);
        linked_.assign(n, false);
        oldest_ = newest_ = kNone;
    }

    void routed(int, int64_t, const std::vector<int32_t>&) override {}
    void prefer(int, const std::vector<int32_t>&) override {}

    void touch(int32_t entry) override {
        if (entry == newest_) {
            return;
        }
        remove(entry);
        older_[entry] = newest_;
        (newest_ != kNone ? newer_[newest_] : oldest_) = entry;
        newest_ = entry;
        linked_[entry] = true;
    }

    // The next to leave, unless it is in the order already.
    void admit(int32_t entry) override {
        if (linked_[entry]) {
            return;
        }
        newer_[entry] = oldest_;
        (oldest_ != kNone ? older_[oldest_] : newest_) = entry;
        oldest_ = entry;
        linked_[entry] = true;
    }

    void remove(int32_t entry) override {
        if (!linked_[entry]) {
            return;
        }
        const int32_t older = older_[entry];
        const int32_t newer = newer_[entry];
        (older != kNone ? newer_[older] : oldest_) = newer;
        (newer != kNone ? older_[newer] : newest_) = older;
        older_[entry] = newer_[entry] = kNone;
        linked_[entry] = false;
        next_ = entry == next_ ? newer : next_;
    }

    void seek(int) override { next_ = oldest_; }
    int32_t next_victim() override {
        const int32_t victim = next_;
        next_ = victim != kNone ? newer_[victim] : kNone;
        return victim;
    }

   private:
    std::vector<int32_t> older_, newer_;
    std::vector<bool> linked_;
    int32_t oldest_ = kNone, newest_ = kNone;
    int32_t next_ = kNone;
};

}  // namespace edgemoe
