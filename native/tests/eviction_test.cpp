// LeastRecentlyUsed against the textbook: a std::list with the newest at the back.
#include "eviction.h"

#include <algorithm>
#include <list>
#include <random>

#include "check.h"

using edgemoe::Eviction;
using edgemoe::LeastRecentlyUsed;

namespace {

std::list<int32_t> victims_of(Eviction& eviction) {
    std::list<int32_t> victims;
    eviction.seek(0);
    for (int32_t entry = eviction.next_victim(); entry != Eviction::kNone; entry = eviction.next_victim()) {
        victims.push_back(entry);
        CHECK(victims.size() <= 10000);
    }
    return victims;
}

void admit(std::list<int32_t>& order, int32_t entry) {
    if (std::find(order.begin(), order.end(), entry) == order.end()) {
        order.push_front(entry);
    }
}

void compare(const std::vector<int>& n_expert, int n_operations, uint32_t seed) {
    std::mt19937 random(seed);
    LeastRecentlyUsed lru;
    lru.resize(n_expert);
    uint32_t n_entries = 0;
    for (const int n : n_expert) {
        n_entries += static_cast<uint32_t>(n);
    }
    std::list<int32_t> order;
    for (int i = 0; i < n_operations; ++i) {
        const auto entry = static_cast<int32_t>(random() % n_entries);
        switch (random() % 5) {
            case 0:
                lru.admit(entry);
                admit(order, entry);
                break;
            case 1:
                lru.remove(entry);
                order.remove(entry);
                break;
            case 2:  // it says nothing to this policy
                lru.routed(0, 1, {0});
                lru.prefer(0, {0});
                break;
            default:
                lru.touch(entry);
                order.remove(entry);
                order.push_back(entry);
        }
        CHECK(victims_of(lru) == order);
    }
}

}  // namespace

TEST(empty_has_no_victim) {
    LeastRecentlyUsed lru;
    lru.resize({3});
    CHECK(victims_of(lru).empty());
}

TEST(one_entry) { compare({1}, 100, 1); }
TEST(two_entries) { compare({2}, 500, 2); }
TEST(few_entries) { compare({2, 3}, 5000, 3); }
TEST(many_entries) { compare({32, 1, 64}, 5000, 4); }

TEST(unasked_for_leave_first) {
    LeastRecentlyUsed lru;
    lru.resize({5});
    lru.touch(3);
    lru.touch(1);
    lru.admit(0);
    lru.admit(2);
    lru.admit(3);  // is there already: keeps its place
    CHECK(victims_of(lru) == (std::list<int32_t>{2, 0, 3, 1}));
    lru.touch(2);
    CHECK(victims_of(lru) == (std::list<int32_t>{0, 3, 1, 2}));
}

TEST(resize_forgets_everything) {
    LeastRecentlyUsed lru;
    lru.resize({4});
    lru.touch(3);
    lru.touch(1);
    lru.resize({4, 4});
    CHECK(victims_of(lru).empty());
    lru.touch(7);
    lru.touch(3);
    CHECK(victims_of(lru) == (std::list<int32_t>{7, 3}));
}

TEST(who_leaves_before_its_turn_ends_no_series) {
    LeastRecentlyUsed lru;
    lru.resize({6});
    for (int32_t entry = 0; entry < 6; ++entry) {
        lru.touch(entry);
    }
    lru.seek(0);
    CHECK_EQUAL(lru.next_victim(), 0);
    lru.remove(1);
    lru.remove(2);
    lru.remove(5);
    CHECK_EQUAL(lru.next_victim(), 3);
    CHECK_EQUAL(lru.next_victim(), 4);
    CHECK_EQUAL(lru.next_victim(), Eviction::kNone);
}

TEST(victims_may_leave_or_stay_while_they_are_sought) {
    std::mt19937 random(5);
    LeastRecentlyUsed lru;
    lru.resize({20});
    for (int round = 0; round < 100; ++round) {
        std::list<int32_t> order;
        for (int32_t entry = 0; entry < 20; ++entry) {
            lru.touch(entry);
            order.push_back(entry);
        }
        lru.seek(0);
        for (auto next = order.begin(); next != order.end();) {
            CHECK_EQUAL(lru.next_victim(), *next);
            if (random() % 2 == 0) {
                lru.remove(*next);
                next = order.erase(next);
            } else {
                ++next;
            }
        }
        CHECK_EQUAL(lru.next_victim(), Eviction::kNone);
        CHECK(victims_of(lru) == order);
    }
}
