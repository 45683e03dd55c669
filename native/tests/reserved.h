// Address space for the length of a test, and what is in it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "mapped_file.h"
#include "scratch_file.h"

struct Reserved {
    explicit Reserved(size_t n_pages) : size(n_pages * edgemoe::page_size()), base(edgemoe::reserve_memory(size)) {}
    ~Reserved() { edgemoe::release_memory(base, size); }
    Reserved(const Reserved&) = delete;
    Reserved& operator=(const Reserved&) = delete;
    std::byte* page(size_t i) const { return base + i * edgemoe::page_size(); }

    const size_t size;
    std::byte* const base;
};

inline bool same(const std::byte* found, const ScratchFile& file, uint64_t offset, size_t n) {
    return std::memcmp(found, file.bytes().data() + offset, n) == 0;
}

inline bool all_zero(const std::byte* found, size_t n) {
    return std::all_of(found, found + n, [](std::byte byte) { return byte == std::byte{0}; });
}
