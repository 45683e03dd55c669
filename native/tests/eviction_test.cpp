// LeastRecentlyUsed against the textbook: a std::list with the newest at the back.
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

void compare(int32_t n_entries, int n_operations, uint32_t seed) {
    std::mt19937 random(seed);
    LeastRecentlyUsed lru;
    lru.resize(n_entries);
    std::list<int32_t> model;
    for (int i = 0; i < n_operations; ++i) {
        const auto entry = static_cast<int32_t>(random() % static_cast<uint32_t>(n_entries));
        model.remove(entry);
        if (random() % 3 != 0) {
            lru.touch(entry);
            model.push_back(entry);
        } else {
            lru.remove(entry);
        }
        CHECK(order_of(lru) == model);
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

TEST(resize_forgets_everything) {
    LeastRecentlyUsed lru;
    lru.resize(4);
    lru.touch(3);
    lru.touch(1);
    lru.resize(8);
    CHECK(order_of(lru).empty());
    lru.touch(7);
    lru.touch(3);
    CHECK(order_of(lru) == (std::list<int32_t>{7, 3}));
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
