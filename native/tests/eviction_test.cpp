// LeastRecentlyUsed against the textbook: a std::list for each class with the newest at the back.
#include "eviction.h"

#include <algorithm>
#include <list>
#include <random>

#include "check.h"

using edgemoe::LeastRecentlyUsed;

namespace {

std::list<int32_t> order_of(const LeastRecentlyUsed& lru) {
    std::list<int32_t> order;
    for (int32_t entry = lru.first_victim(); entry != LeastRecentlyUsed::kNone; entry = lru.next_victim(entry)) {
        order.push_back(entry);
        CHECK(order.size() <= 10000);
    }
    return order;
}

// Who leaves: the ordinary entries from the oldest on, then the preferred ones.
struct Textbook {
    std::list<int32_t> ordinary, preferred;
    std::vector<bool> is_preferred;

    std::list<int32_t>& of(int32_t entry) { return is_preferred[static_cast<size_t>(entry)] ? preferred : ordinary; }
    void remove(int32_t entry) { of(entry).remove(entry); }
    void touch(int32_t entry) {
        remove(entry);
        of(entry).push_back(entry);
    }
    void prefer(int32_t entry, bool preferring) {
        const std::list<int32_t>& before = of(entry);
        const bool in_order = std::find(before.begin(), before.end(), entry) != before.end();
        if (is_preferred[static_cast<size_t>(entry)] == preferring) {
            return;
        }
        remove(entry);
        is_preferred[static_cast<size_t>(entry)] = preferring;
        if (in_order) {
            touch(entry);
        }
    }
    std::list<int32_t> order() const {
        std::list<int32_t> all = ordinary;
        all.insert(all.end(), preferred.begin(), preferred.end());
        return all;
    }
};

void compare(int32_t n_entries, int n_operations, uint32_t seed) {
    std::mt19937 random(seed);
    LeastRecentlyUsed lru;
    lru.resize(n_entries);
    Textbook model{{}, {}, std::vector<bool>(static_cast<size_t>(n_entries), false)};
    for (int i = 0; i < n_operations; ++i) {
        const auto entry = static_cast<int32_t>(random() % static_cast<uint32_t>(n_entries));
        const uint32_t action = random() % 5;
        if (action < 3) {
            lru.touch(entry);
            model.touch(entry);
        } else if (action == 3) {
            lru.remove(entry);
            model.remove(entry);
        } else {
            const bool preferred = random() % 2 == 0;
            lru.prefer(entry, preferred);
            model.prefer(entry, preferred);
        }
        CHECK(order_of(lru) == model.order());
    }
}

}  // namespace

TEST(empty_has_no_victim) {
    LeastRecentlyUsed lru;
    lru.resize(3);
    CHECK_EQUAL(lru.first_victim(), LeastRecentlyUsed::kNone);
}

TEST(one_entry) { compare(1, 100, 1); }
TEST(two_entries) { compare(2, 500, 2); }
TEST(few_entries) { compare(5, 5000, 3); }
TEST(many_entries) { compare(97, 5000, 4); }

TEST(preferred_leave_last_whenever_they_were_used) {
    LeastRecentlyUsed lru;
    lru.resize(5);
    lru.prefer(1, true);  // before it is in the order at all
    for (const int32_t entry : {1, 0, 3, 2, 4}) {
        lru.touch(entry);
    }
    CHECK(order_of(lru) == (std::list<int32_t>{0, 3, 2, 4, 1}));
    lru.prefer(3, true);
    CHECK(order_of(lru) == (std::list<int32_t>{0, 2, 4, 1, 3}));
    lru.prefer(1, true);  // already is: keeps its place
    CHECK(order_of(lru) == (std::list<int32_t>{0, 2, 4, 1, 3}));
    lru.prefer(1, false);
    CHECK(order_of(lru) == (std::list<int32_t>{0, 2, 4, 1, 3}));
    lru.touch(0);
    CHECK(order_of(lru) == (std::list<int32_t>{2, 4, 1, 0, 3}));
}

TEST(preferred_alone_leave_too) {
    LeastRecentlyUsed lru;
    lru.resize(3);
    for (const int32_t entry : {2, 0}) {
        lru.prefer(entry, true);
        lru.touch(entry);
    }
    CHECK(order_of(lru) == (std::list<int32_t>{2, 0}));
}

TEST(resize_forgets_everything) {
    LeastRecentlyUsed lru;
    lru.resize(4);
    lru.touch(3);
    lru.touch(1);
    lru.prefer(3, true);
    lru.resize(8);
    CHECK(order_of(lru).empty());
    lru.touch(3);
    lru.touch(7);
    CHECK(order_of(lru) == (std::list<int32_t>{3, 7}));  // 3 is no longer preferred
}

TEST(oldest_may_leave_while_walking) {
    LeastRecentlyUsed lru;
    lru.resize(3);
    for (const int32_t entry : {0, 1, 2}) {
        lru.touch(entry);
    }
    const int32_t first = lru.first_victim();
    const int32_t next = lru.next_victim(first);
    lru.remove(first);
    CHECK_EQUAL(next, 1);
    CHECK_EQUAL(lru.first_victim(), 1);
}
