#include "idle_pages.h"

namespace edgemoe {

void IdlePages::give(std::byte* page) { places_[page] = pages_.insert(pages_.end(), page); }

void IdlePages::take(std::byte* page) {
    const auto place = places_.find(page);
    if (place != places_.end()) {
        pages_.erase(place->second);
        places_.erase(place);
    }
}

void IdlePages::shrink(uint64_t most) {
    while (bytes() > most) {
        discard(pages_.front(), page_size());
        places_.erase(pages_.front());
        pages_.pop_front();
    }
}

}  // namespace edgemoe
