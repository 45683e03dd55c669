// Where there are no slots: memory of slabs that have just left, kept for those that take their room. Pages move from
// one place to the other with their page-table entries. Giving them back and touching new ones instead costs the kernel
// a third of a millisecond for each mebibyte, to fill with zeros what a read overwrites.
//
// Only the pages that lie wholly within a slab move: they are always the same ones, whatever its neighbours hold, so
// that each slab's stay one memory area. A process may have so many areas (Linux: vm.max_map_count); only as many
// slabs as take half of them ever trade.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_set>
#include <vector>

#include "mapped_file.h"

namespace edgemoe {

class SparePages {
   public:
    SparePages();

    // These pages belong to nobody any more. Given back at once where they cannot be moved.
    void give(std::byte* base, size_t n);
    // Pages for this place, if any are spare: its own where they still are, else a piece of the very size.
    void take(std::byte* base, size_t n);
    // Gives back what is more than this; the oldest first.
    void shrink(uint64_t most);

   private:
    struct Piece {
        std::byte* base;
        size_t n;
    };
    bool may_trade(std::byte* base);

    std::vector<Piece> pieces_;
    uint64_t bytes_ = 0;
    std::unordered_set<std::byte*> traders_;
    size_t most_traders_;
};

}  // namespace edgemoe
