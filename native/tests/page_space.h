// Address space whose pages are touched, moved and given back, while the kernel counts them.
#pragma once

#include <cstddef>
#include <cstring>

#include "mapped_file.h"
#include "resident_pages.h"

class PageSpace {
   public:
    explicit PageSpace(size_t n_pages) : size_(n_pages * edgemoe::page_size()), base_(edgemoe::reserve_memory(size_)) {
        edgemoe::use_small_pages(base_, size_);
    }
    ~PageSpace() { edgemoe::release_memory(base_, size_); }
    PageSpace(const PageSpace&) = delete;
    PageSpace& operator=(const PageSpace&) = delete;

    std::byte* at(size_t page) const { return base_ + page * edgemoe::page_size(); }
    void fill(size_t page, size_t n) const { std::memset(at(page), 0x5a, n * edgemoe::page_size()); }
    size_t held() const { return count_resident(base_, size_); }
    size_t held(size_t page, size_t n) const { return count_resident(at(page), n * edgemoe::page_size()); }

   private:
    const size_t size_;
    std::byte* const base_;
};
