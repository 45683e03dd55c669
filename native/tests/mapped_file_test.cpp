#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "check.h"
#include "child_process.h"
#include "reserved.h"
#include "resident_pages.h"
#include "scratch_file.h"
#include "signals.h"

using edgemoe::BusErrorGuard;
using edgemoe::MappedFile;
using edgemoe::page_size;

namespace {

void open_direct_or_skip(MappedFile& file) {
    std::string why;
    if (!file.open_direct(why)) {
        throw check::Skipped(why);
    }
}

}  // namespace

// -------- reading

TEST(reads_are_exact) {
    const ScratchFile file(random_bytes(3 * page_size() + 123, 5));
    const MappedFile mapped(file.path());
    CHECK_EQUAL(mapped.size(), file.bytes().size());
    CHECK_EQUAL(mapped.path(), file.path());
    std::mt19937 random(6);
    for (int i = 0; i < 300; ++i) {
        const size_t offset = random() % file.bytes().size();
        const size_t n = random() % (file.bytes().size() - offset + 1);
        Bytes to(n + 2, std::byte{0xa5});
        mapped.read(offset, to.data() + 1, n);
        CHECK(same(to.data() + 1, file, offset, n));
        CHECK(to.front() == std::byte{0xa5} && to.back() == std::byte{0xa5});
    }
}

TEST(short_read_names_file_and_place) {
    ScratchFile file(random_bytes(1000, 7));
    const MappedFile mapped(file.path());
    Bytes to(1000);
    CHECK_REFUSED(mapped.read(500, to.data(), 501), file.path());
    file.truncate(600);
    CHECK_REFUSED(mapped.read(500, to.data(), 101), file.path() + " at byte 500 gave 100 bytes of 101");
    mapped.read(500, to.data(), 100);
    CHECK(same(to.data(), file, 500, 100));
}

TEST(missing_file_is_named) {
    CHECK_REFUSED(MappedFile("no-such-file.gguf"), "no-such-file.gguf");
    CHECK_REFUSED(MappedFile("no-such-file.gguf"), std::strerror(ENOENT));
}

TEST(directory_and_pipe_are_refused) {
    CHECK_REFUSED(MappedFile("."), "not a regular file");
    const std::string pipe = "scratch-pipe-" + std::to_string(::getpid());
    CHECK_EQUAL(::mkfifo(pipe.c_str(), 0600), 0);
    const int status = status_of_child([&] {
        try {
            const MappedFile never(pipe);
        } catch (const edgemoe::SystemError&) {
            ::_exit(42);
        }
    });
    ::unlink(pipe.c_str());
    CHECK(WIFEXITED(status));
    CHECK_EQUAL(WEXITSTATUS(status), 42);
}

struct DirectFile {
    explicit DirectFile(size_t n) : file(random_bytes(n, 8)), mapped(file.path()) { open_direct_or_skip(mapped); }

    ScratchFile file;
    MappedFile mapped;
    const Reserved to{6}, edges{2};
};

TEST(direct_reads_write_what_was_asked_for_and_nothing_else) {
    const uint64_t page = page_size();
    DirectFile direct(5 * page + 123);
    auto& [file, mapped, to, edges] = direct;
    const uint64_t size = file.bytes().size();
    for (const uint64_t begin : {uint64_t{0}, uint64_t{1}, page - 1, page, page + 100, 5 * page, 5 * page + 122}) {
        for (const uint64_t end : {uint64_t{1}, page - 1, page, page + 1, page + 101, 3 * page, 4 * page + 7, size}) {
            if (end <= begin) {
                continue;
            }
            std::memset(to.base, 0, to.size);
            const uint64_t n = end - begin;
            const size_t given = mapped.read_direct(begin, to.base + begin, n, edges.base);
            CHECK_EQUAL(given, edgemoe::page_ceil(end) - edgemoe::page_floor(begin));
            CHECK(same(to.base + begin, file, begin, n));
            CHECK(all_zero(to.base, begin));
            CHECK(all_zero(to.base + end, to.size - end));
        }
    }
}

TEST(direct_reads_that_cannot_be_had) {
    const uint64_t page = page_size();
    DirectFile direct(3 * page + 123);
    auto& [file, mapped, to, edges] = direct;
    CHECK_REFUSED(mapped.read_direct(3 * page, to.base, 124, edges.base), file.path());
    file.truncate(2 * page + 5);
    CHECK_REFUSED(mapped.read_direct(page, to.base, page + 6, edges.base), "the file has become shorter");
    std::memset(to.base, 0, to.size);
    CHECK_REFUSED(mapped.read_direct(2 * page + 3, to.base + 3, 7, edges.base), "the file has become shorter");
    CHECK(all_zero(to.base, to.size));  // half of a page is no help
}

TEST(direct_descriptor_of_another_file_is_refused) {
    const ScratchFile file(random_bytes(page_size(), 9));
    MappedFile mapped(file.path());
    {
        MappedFile probe(file.path());
        open_direct_or_skip(probe);
    }
    // Somebody puts another file there between the two openings.
    const ScratchFile other(random_bytes(page_size(), 10));
    CHECK_EQUAL(std::rename(other.path().c_str(), file.path().c_str()), 0);
    std::string why;
    CHECK(!mapped.open_direct(why));
    CHECK(why.find("replaced") != std::string::npos);
}

// -------- changes of the file

TEST(unchanged_file_is_unchanged) {
    const ScratchFile file(random_bytes(100, 11));
    const MappedFile mapped(file.path());
    mapped.check_unchanged();
}

TEST(truncation_growth_rewriting_and_touching_are_noticed) {
    ScratchFile file(random_bytes(3000, 12));
    const MappedFile mapped(file.path());
    file.truncate(2999);
    file.set_modified(1000000000);  // its size alone gives it away
    CHECK_REFUSED(mapped.check_unchanged(), file.path());
    CHECK_REFUSED(mapped.check_unchanged(), "3000 bytes when opened, now 2999");
    file.restore();
    mapped.check_unchanged();
    file.overwrite(3000, random_bytes(1, 13));
    file.set_modified(1000000000);
    CHECK_REFUSED(mapped.check_unchanged(), file.path());
    file.restore();
    file.overwrite(1000, random_bytes(10, 14));
    CHECK_REFUSED(mapped.check_unchanged(), file.path());
    file.restore();
    file.set_modified(1000000001);
    CHECK_REFUSED(mapped.check_unchanged(), file.path());
    file.restore();
    mapped.check_unchanged();
}

TEST(renaming_over_the_file_is_harmless) {
    const ScratchFile file(random_bytes(5000, 15));
    const ScratchFile other(random_bytes(400, 16));
    const MappedFile mapped(file.path());
    CHECK_EQUAL(std::rename(other.path().c_str(), file.path().c_str()), 0);
    mapped.check_unchanged();
    Bytes to(5000);
    mapped.read(0, to.data(), to.size());
    CHECK(same(to.data(), file, 0, to.size()));
}

// -------- memory

TEST(mapping_over_a_place_shows_the_file) {
    const ScratchFile file(random_bytes(8 * page_size() + 77, 17));
    const MappedFile mapped(file.path());
    const Reserved place(10);
    std::memset(place.base, 0x5a, place.size);
    mapped.map_over(place.page(1), 0, 2 * page_size());
    mapped.map_over(place.page(4), 3 * page_size(), page_size());
    mapped.map_over(place.page(8), 8 * page_size(), page_size());
    CHECK(same(place.page(1), file, 0, 2 * page_size()));
    CHECK(same(place.page(4), file, 3 * page_size(), page_size()));
    CHECK(same(place.page(8), file, 8 * page_size(), 77));
    CHECK(all_zero(place.page(8) + 77, page_size() - 77));
    for (const size_t untouched : {0, 3, 5, 6, 7, 9}) {
        CHECK(place.page(untouched)[0] == std::byte{0x5a} && place.page(untouched)[page_size() - 1] == std::byte{0x5a});
    }
}

TEST(mapping_piece_by_piece_leaves_one_area) {
    const ScratchFile file(random_bytes(64 * page_size(), 18));
    const MappedFile mapped(file.path());
    const Reserved place(64);
    for (const size_t first : {1, 0}) {
        for (size_t i = first; i < 64; i += 2) {
            mapped.map_over(place.page(i), i * page_size(), page_size());
        }
    }
    const std::vector<std::string> areas = memory_areas(place.base, place.size);
    CHECK_EQUAL(areas.size(), 1U);
    CHECK(areas.front().find(" rr") != std::string::npos);  // no read-ahead
    CHECK_EQUAL(count_resident(place.base, place.size), 0U);
    edgemoe::populate(place.base, place.size, file.path());
    CHECK_EQUAL(count_resident(place.base, place.size), 64U);
    CHECK(same(place.base, file, 0, place.size));
}

TEST(reserving_over_a_mapping_gives_memory_back) {
    const ScratchFile file(random_bytes(64 * page_size(), 18));
    const MappedFile mapped(file.path());
    const Reserved place(64);
    mapped.map_over(place.page(8), 8 * page_size(), 32 * page_size());
    edgemoe::populate(place.page(8), 32 * page_size(), file.path());
    edgemoe::reserve_over(place.page(16), 16 * page_size());
    CHECK_EQUAL(count_resident(place.base, place.size), 16U);
    CHECK(same(place.page(8), file, 8 * page_size(), 8 * page_size()));
    CHECK(same(place.page(32), file, 32 * page_size(), 8 * page_size()));
    CHECK(all_zero(place.page(16), 16 * page_size()));
    edgemoe::reserve_over(place.page(8), 32 * page_size());
    CHECK_EQUAL(count_resident(place.page(8), 8 * page_size()), 0U);
    CHECK_EQUAL(memory_areas(place.base, place.size).size(), 1U);
}

TEST(populating_a_file_that_became_shorter_is_refused) {
    ScratchFile file(random_bytes(8 * page_size(), 19));
    const MappedFile mapped(file.path());
    const Reserved place(8);
    mapped.map_over(place.base, 0, place.size);
    BusErrorGuard guard;  // for kernels where the pages have to be touched
    guard.watch(place.base, place.size);
    file.truncate(3 * page_size());
    try {
        edgemoe::populate(place.base, place.size, file.path());
    } catch (const edgemoe::SystemError& error) {
        CHECK(std::string(error.what()).find(file.path()) != std::string::npos);
        return;
    }
    CHECK(guard.faulted());
}

TEST(reserving_costs_nothing_and_reads_as_zero) {
    const Reserved place(1 << 14);
    edgemoe::use_small_pages(place.base, place.size);  // where the system gives huge ones unasked
    CHECK_EQUAL(count_resident(place.base, place.size), 0U);
    place.page(7)[3] = std::byte{1};
    CHECK_EQUAL(count_resident(place.base, 64 * page_size()), 1U);
    CHECK(all_zero(place.page(8), 16 * page_size()));
}

TEST(discarding_gives_whole_pages_back) {
    const Reserved place(8);
    std::memset(place.base, 0x77, place.size);
    edgemoe::discard(place.page(2), 3 * page_size());
    CHECK_EQUAL(count_resident(place.base, place.size), 5U);
    for (size_t i = 0; i < 8; ++i) {
        const bool discarded = i >= 2 && i < 5;
        CHECK(place.page(i)[0] == (discarded ? std::byte{0} : std::byte{0x77}));
        CHECK(place.page(i)[page_size() - 1] == (discarded ? std::byte{0} : std::byte{0x77}));
    }
}

TEST(locked_pages_stay) {
    const Reserved place(2);
    place.page(1)[0] = std::byte{1};
    // Sanitizers make the C library's function do nothing.
    if (::syscall(SYS_mlock, place.page(1), page_size()) != 0) {
        throw check::Skipped("no memory can be locked");
    }
    CHECK(!edgemoe::discard(place.base, place.size));
    CHECK(place.page(1)[0] == std::byte{1});
    CHECK_EQUAL(::syscall(SYS_munlock, place.page(1), page_size()), 0);
    CHECK(edgemoe::discard(place.base, place.size) && edgemoe::discard(place.base, 0));
}

TEST(place_of_a_move_that_failed_is_reserved_memory) {
    const Reserved place(4);
    std::byte* nowhere = edgemoe::reserve_memory(2 * page_size());
    edgemoe::release_memory(nowhere, 2 * page_size());
    place.page(1)[0] = std::byte{1};
    CHECK(!edgemoe::move_pages(nowhere, place.page(1), 2 * page_size()));
    CHECK(all_zero(place.base, place.size));
    place.page(2)[0] = std::byte{2};
}

TEST(reserved_memory_is_not_forked) {
    const Reserved place(1);
    place.base[0] = std::byte{1};
    const int status = status_of_child([&] { *reinterpret_cast<volatile std::byte*>(place.base) = std::byte{2}; });
    CHECK(!survived(status) && !hung(status));
}

TEST(small_pages_are_asked_of_the_kernel) {
    if (::access("/sys/kernel/mm/transparent_hugepage/enabled", R_OK) != 0) {
        throw check::Skipped("a kernel without transparent huge pages");
    }
    const Reserved place(1024);
    edgemoe::use_small_pages(place.page(256), 512 * page_size());
    const std::vector<std::string> areas = memory_areas(place.page(256), 512 * page_size());
    CHECK_EQUAL(areas.size(), 1U);
    CHECK(areas.front().find(" nh") != std::string::npos);
}

TEST(huge_pages_lie_wholly_within) {
    if (::access("/sys/kernel/mm/transparent_hugepage/enabled", R_OK) != 0) {
        throw check::Skipped("a kernel without transparent huge pages");
    }
    constexpr size_t kHuge = size_t{2} << 20;
    const Reserved place(5 * kHuge / page_size());
    std::byte* const first = place.base + (kHuge - reinterpret_cast<uintptr_t>(place.base) % kHuge) % kHuge;
    edgemoe::use_huge_pages(first + page_size(), kHuge - page_size());  // none
    CHECK_EQUAL(memory_areas(place.base, place.size).size(), 1U);
    edgemoe::use_huge_pages(first + kHuge - page_size(), 2 * kHuge);
    const std::vector<std::string> areas = memory_areas(first + kHuge, kHuge);
    CHECK_EQUAL(areas.size(), 1U);
    CHECK(areas.front().find(" hg") != std::string::npos);
    for (std::byte* const other : {first + kHuge - page_size(), first + 2 * kHuge}) {
        CHECK(memory_areas(other, page_size()).front().find(" hg") == std::string::npos);
    }
}

TEST(reserving_the_impossible_is_refused) {
    CHECK_REFUSED(edgemoe::reserve_memory(size_t{1} << 62), std::to_string(size_t{1} << 62));
}

TEST(forgetting_leaves_the_bytes) {
    const ScratchFile file(random_bytes(4 * page_size(), 20));
    const MappedFile mapped(file.path());
    mapped.forget(0, 0);
    mapped.forget(page_size(), page_size());
    Bytes to(file.bytes().size());
    mapped.read(0, to.data(), to.size());
    CHECK(same(to.data(), file, 0, to.size()));
}
