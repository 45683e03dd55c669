#include "spare_pages.h"

#include <algorithm>

namespace edgemoe {

SparePages::SparePages() : most_traders_(most_memory_areas() / 4) {}  // each cuts its tensor once more on either side

bool SparePages::may_trade(std::byte* base) {
    if (traders_.count(base) != 0) {
        return true;
    }
    if (traders_.size() >= most_traders_) {
        return false;
    }
    traders_.insert(base);
    return true;
}

void SparePages::give(std::byte* base, size_t n) {
    if (n > 0 && may_trade(base)) {
        pieces_.push_back({base, n});
        bytes_ += n;
    } else {
        discard(base, n);
    }
}

void SparePages::take(std::byte* base, size_t n) {
    auto piece = std::find_if(pieces_.begin(), pieces_.end(), [&](const Piece& spare) { return spare.base == base; });
    const bool in_place = piece != pieces_.end();  // it comes back before anybody took its memory
    if (!in_place) {
        piece = std::find_if(pieces_.begin(), pieces_.end(), [&](const Piece& spare) { return spare.n == n; });
    }
    if (piece == pieces_.end() || (!in_place && !may_trade(base))) {
        return;
    }
    if (!in_place && !move_pages(piece->base, base, n)) {
        most_traders_ = 0;  // this kernel cannot: never again
        traders_.clear();
        discard(piece->base, n);
    }
    bytes_ -= n;
    pieces_.erase(piece);
}

void SparePages::shrink(uint64_t most) {
    while (bytes_ > most) {
        discard(pieces_.front().base, pieces_.front().n);
        bytes_ -= pieces_.front().n;
        pieces_.erase(pieces_.begin());
    }
}

}  // namespace edgemoe
