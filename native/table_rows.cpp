#include "table_rows.h"

#include <algorithm>
#include <string>

namespace edgemoe {

std::vector<Pages> TableRows::take(const std::vector<int32_t>& rows) {
    std::vector<uintptr_t> pages;
    const auto start = reinterpret_cast<uintptr_t>(table_);
    for (const int32_t row : rows) {
        if (row < 0 || static_cast<uint64_t>(row) >= n_bytes_ / row_bytes_) {
            throw SystemError("row " + std::to_string(row) + " was asked of a table of " +
                              std::to_string(n_bytes_ / row_bytes_));
        }
        const uintptr_t first = start + static_cast<uint64_t>(row) * row_bytes_;
        for (uintptr_t page = page_floor(first); page < first + row_bytes_; page += page_size()) {
            pages.push_back(page);
        }
    }
    std::sort(pages.begin(), pages.end());
    pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
    if (pages.size() * page_size() > most_bytes_) {
        throw SystemError("the rows that one batch needs of a table take more than the " + std::to_string(most_bytes_) +
                          " bytes set aside for them; lower n_ubatch");
    }
    std::vector<Pages> missing;
    for (const uintptr_t page : pages) {
        const Pages whole{page, page + page_size()};
        const bool held = held_.take(whole.begin());
        held_.give(whole.begin());
        if (held) {
            continue;
        }
        if (!missing.empty() && missing.back().last == page) {
            missing.back().last = whole.last;
        } else {
            missing.push_back(whole);
        }
    }
    held_.shrink(most_bytes_);
    // The first and the last page may hold bytes of other tensors.
    for (Pages& stretch : missing) {
        stretch = {std::max(stretch.first, start), std::min<uintptr_t>(stretch.last, start + n_bytes_)};
    }
    return missing;
}

void TableRows::drop(const std::vector<Pages>& stretches) {
    for (const Pages& stretch : stretches) {
        for (uintptr_t page = page_floor(stretch.first); page < stretch.last; page += page_size()) {
            const Pages whole{page, page + page_size()};
            held_.take(whole.begin());
            discard(whole.begin(), page_size());
        }
    }
}

}  // namespace edgemoe
