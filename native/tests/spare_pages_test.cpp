// Memory of slabs that come and go, counted by the kernel's page tables.
#include "spare_pages.h"

#include <cstring>
#include <map>
#include <random>

#include "check.h"
#include "page_space.h"

using edgemoe::page_size;
using edgemoe::SparePages;

namespace {

size_t bytes(size_t pages) { return pages * page_size(); }

void skip_where_pages_cannot_move() {
    const PageSpace space(2);
    space.fill(0, 1);
    if (!edgemoe::move_pages(space.at(0), space.at(1), bytes(1))) {
        throw check::Skipped("pages cannot be moved here");
    }
}

}  // namespace

TEST(pages_move_with_what_is_in_them) {
    skip_where_pages_cannot_move();
    const PageSpace space(8);
    space.fill(1, 2);
    CHECK(edgemoe::move_pages(space.at(1), space.at(5), bytes(2)));
    CHECK_EQUAL(space.held(5, 2), 2U);
    CHECK_EQUAL(space.held(), 2U);
    CHECK(*space.at(6) == std::byte{0x5a});
    CHECK(*space.at(1) == std::byte{0});  // still a place, and empty
}

TEST(given_pages_go_to_another_place) {
    skip_where_pages_cannot_move();
    const PageSpace space(20);
    SparePages spares;
    space.fill(2, 3);
    spares.give(space.at(2), bytes(3));
    CHECK_EQUAL(space.held(), 3U);
    spares.take(space.at(10), bytes(3));
    CHECK_EQUAL(space.held(10, 3), 3U);
    space.fill(10, 3);
    CHECK_EQUAL(space.held(), 3U);
    space.fill(2, 3);  // the place they left can be used again
    CHECK_EQUAL(space.held(), 6U);
}

TEST(place_that_is_taken_again_keeps_its_pages) {
    const PageSpace space(20);
    SparePages spares;
    for (const size_t page : {2U, 8U}) {
        space.fill(page, 3);
        spares.give(space.at(page), bytes(3));
    }
    spares.take(space.at(8), bytes(3));  // its own, though the others are older
    CHECK_EQUAL(space.held(8, 3), 3U);
    CHECK_EQUAL(space.held(2, 3), 3U);
    spares.shrink(0);
    CHECK_EQUAL(space.held(8, 3), 3U);  // no longer spare
    CHECK_EQUAL(space.held(), 3U);
}

TEST(pages_of_another_size_stay) {
    const PageSpace space(20);
    SparePages spares;
    space.fill(2, 3);
    spares.give(space.at(2), bytes(3));
    for (const size_t n : {1U, 2U, 4U}) {
        spares.take(space.at(10), bytes(n));
        CHECK_EQUAL(space.held(10, 4), 0U);
    }
    CHECK_EQUAL(space.held(2, 3), 3U);
    spares.shrink(bytes(3));
    CHECK_EQUAL(space.held(), 3U);
    spares.shrink(bytes(3) - 1);
    CHECK_EQUAL(space.held(), 0U);
}

TEST(oldest_are_given_back_first) {
    const PageSpace space(20);
    SparePages spares;
    for (const size_t page : {0U, 5U, 10U}) {
        space.fill(page, 2);
        spares.give(space.at(page), bytes(2));
    }
    spares.shrink(bytes(5));
    CHECK_EQUAL(space.held(0, 2), 0U);
    CHECK_EQUAL(space.held(), 4U);
    spares.shrink(bytes(2));
    CHECK_EQUAL(space.held(5, 2), 0U);
    CHECK_EQUAL(space.held(10, 2), 2U);
    spares.shrink(0);
    spares.shrink(0);
    CHECK_EQUAL(space.held(), 0U);
}

TEST(nothing_to_give_or_take) {
    const PageSpace space(4);
    SparePages spares;
    spares.give(space.at(0), 0);
    spares.take(space.at(2), bytes(2));
    spares.shrink(0);
    CHECK_EQUAL(space.held(), 0U);
}

// Slabs of two sizes come and go: memory is what is in use and what is spare, never more.
TEST(memory_is_constant_while_slabs_come_and_go) {
    skip_where_pages_cannot_move();
    constexpr size_t kPlaces = 40, kPages = 4;
    const PageSpace space(kPlaces * kPages);
    SparePages spares;
    std::mt19937 random(1);
    std::map<size_t, size_t> in_use;  // pages, by place
    size_t n_used = 0, most = 0;
    const auto size_of = [](size_t place) { return place % 2 == 0 ? 4U : 2U; };
    for (int i = 0; i < 2000; ++i) {
        const size_t place = random() % kPlaces, n = size_of(place), page = place * kPages;
        if (in_use.erase(place) != 0) {
            spares.give(space.at(page), bytes(n));
            n_used -= n;
        } else if (n_used + n <= 60) {
            spares.take(space.at(page), bytes(n));
            in_use[place] = n;
            n_used += n;
            spares.shrink(bytes(60 - n_used));  // before anything is written, as the store does
            space.fill(page, n);
        }
        spares.shrink(bytes(60 - n_used));
        const size_t held = space.held();
        CHECK(held <= 60);
        CHECK(held >= most);  // what was held once is neither given back nor asked for anew, while it has room
        most = held < 57 ? held : most;
        for (const auto& [used, pages] : in_use) {
            CHECK_EQUAL(space.held(used * kPages, pages), pages);
        }
    }
    spares.shrink(0);
    CHECK_EQUAL(space.held(), n_used);
}

TEST(only_so_many_places_trade) {
    const size_t most = edgemoe::most_memory_areas() / 4;
    if (most > 100000) {
        throw check::Skipped("more memory areas than are worth filling");
    }
    const PageSpace space(most + 7);
    SparePages spares;
    space.fill(0, most + 7);
    for (size_t page = 0; page < most + 7; ++page) {
        spares.give(space.at(page), bytes(1));
    }
    CHECK_EQUAL(space.held(0, most), most);
    CHECK_EQUAL(space.held(), most);  // the rest was given back at once
    spares.take(space.at(most + 1), bytes(1));
    CHECK_EQUAL(space.held(most, 7), 0U);
    spares.take(space.at(5), bytes(1));
    spares.shrink(0);
    CHECK_EQUAL(space.held(), 1U);
}
