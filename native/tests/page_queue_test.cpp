// Single pages that nobody holds, counted by the kernel's page tables.
#include "page_queue.h"

#include "check.h"
#include "page_space.h"

using edgemoe::page_size;
using edgemoe::PageQueue;

namespace {

constexpr size_t kPages = 8;

bool held(const PageSpace& space, size_t page) { return space.held(page, 1) == 1; }

}  // namespace

TEST(pages_stay_until_there_are_too_many) {
    const PageSpace space(kPages);
    space.fill(0, kPages);
    PageQueue idle;
    for (const size_t page : {2U, 0U, 5U}) {
        idle.give(space.at(page));
    }
    CHECK_EQUAL(idle.bytes(), 3 * page_size());
    idle.shrink(3 * page_size());
    CHECK(held(space, 2) && held(space, 0) && held(space, 5));
    idle.shrink(2 * page_size() - 1);  // the oldest leave
    CHECK(!held(space, 2) && !held(space, 0) && held(space, 5));
    CHECK_EQUAL(idle.bytes(), page_size());
    idle.shrink(0);
    CHECK(!held(space, 5));
    CHECK_EQUAL(idle.bytes(), 0U);
    CHECK(held(space, 1));
}

TEST(page_that_is_taken_is_not_given_back) {
    const PageSpace space(kPages);
    space.fill(0, kPages);
    PageQueue idle;
    idle.give(space.at(1));
    idle.give(space.at(2));
    CHECK(idle.take(space.at(1)));
    CHECK(!idle.take(space.at(7)));  // was not here
    CHECK_EQUAL(idle.bytes(), page_size());
    idle.shrink(0);
    CHECK(held(space, 1) && !held(space, 2) && held(space, 7));
}

TEST(page_that_comes_again_is_the_youngest) {
    const PageSpace space(kPages);
    space.fill(0, kPages);
    PageQueue idle;
    idle.give(space.at(1));
    idle.give(space.at(2));
    idle.give(space.at(1));
    CHECK_EQUAL(idle.bytes(), 2 * page_size());
    idle.shrink(page_size());
    CHECK(held(space, 1) && !held(space, 2));
}
