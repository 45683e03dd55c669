#include "page_queue.h"

namespace edgemoe {

void PageQueue::give(std::byte* page) {
    take(page);
    places_[page] = pages_.insert(pages_.end(), page);
}

bool PageQueue::take(std::byte* page) {
    const auto place = places_.find(page);
    if (place == places_.end()) {
        return false;
    }
    pages_.erase(place->second);
    places_.erase(place);
    return true;
}

void PageQueue::shrink(uint64_t most) {
    while (bytes() > most) {
        discard(pages_.front(), page_size());
        places_.erase(pages_.front());
        pages_.pop_front();
    }
}

}  // namespace edgemoe
