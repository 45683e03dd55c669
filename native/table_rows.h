// Rows of a table of which a token uses one, out of hundreds of megabytes: the token embedding. Only rows that were
// asked for are in memory, in so many pages at most; those that were not asked for longest leave.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "page_queue.h"
#include "slabs.h"

namespace edgemoe {

class TableRows {
   public:
    // `n_bytes` of rows of equal size from `table` on, in small pages; at most `most_bytes` of these are held.
    TableRows(std::byte* table, uint64_t n_bytes, uint64_t row_bytes, uint64_t most_bytes)
        : table_(table), n_bytes_(n_bytes), row_bytes_(row_bytes), most_bytes_(most_bytes) {}

    // The stretches of the table to read for these rows: those of their pages that are not held, but are from now on.
    // Throws SystemError where a row is none of the table's, or the rows' pages are more than may be held.
    std::vector<Pages> take(const std::vector<int32_t>& rows);
    // They could not be read.
    void drop(const std::vector<Pages>& stretches);

    uint64_t offset_of(const Pages& stretch) const { return static_cast<uint64_t>(stretch.begin() - table_); }
    uint64_t bytes() const { return held_.bytes(); }

   private:
    std::byte* const table_;
    const uint64_t n_bytes_, row_bytes_, most_bytes_;
    PageQueue held_;
};

}  // namespace edgemoe
