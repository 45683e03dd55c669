// What the kernel says about memory: an account from outside, to compare with the store's own.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"
#include "mapped_file.h"

// One entry per page of [base, base + n): does the process hold memory for it?
inline std::vector<bool> resident_pages(const std::byte* base, size_t n) {
    const size_t page = edgemoe::page_size();
    std::vector<uint64_t> entries(n / page);
    const int fd = ::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        throw check::Skipped("no /proc/self/pagemap here");
    }
    const size_t bytes = entries.size() * sizeof(uint64_t);
    const off_t at = static_cast<off_t>(reinterpret_cast<uintptr_t>(base) / page * sizeof(uint64_t));
    const ssize_t got = ::pread(fd, entries.data(), bytes, at);
    ::close(fd);
    CHECK_EQUAL(got, static_cast<ssize_t>(bytes));
    std::vector<bool> held;
    for (const uint64_t entry : entries) {
        held.push_back((entry >> 62) != 0);  // bit 63: present; bit 62: swapped out
    }
    return held;
}

inline size_t count_resident(const std::byte* base, size_t n) {
    size_t count = 0;
    for (const bool held : resident_pages(base, n)) {
        count += held ? 1 : 0;
    }
    return count;
}

// The areas of /proc/self/smaps that lie within [base, base + n), as their text.
inline std::vector<std::string> memory_areas(const std::byte* base, size_t n) {
    std::ifstream smaps("/proc/self/smaps");
    if (!smaps) {
        throw check::Skipped("no /proc/self/smaps here");
    }
    std::vector<std::string> areas;
    bool inside = false;
    for (std::string line; std::getline(smaps, line);) {
        uintptr_t first = 0;
        uintptr_t last = 0;
        char dash = 0;
        std::istringstream head(line);
        if (line.find_first_of(":") > line.find_first_of("-") && head >> std::hex >> first >> dash >> last) {
            const auto start = reinterpret_cast<uintptr_t>(base);
            inside = first < start + n && last > start;
            if (inside) {
                areas.emplace_back();
            }
        }
        if (inside) {
            areas.back() += line + "\n";
        }
    }
    return areas;
}
