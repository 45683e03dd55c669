// Single pages of memory in the order in which they came; whoever has been here longest is given back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <unordered_map>

#include "mapped_file.h"

namespace edgemoe {

class PageQueue {
   public:
    void give(std::byte* page);  // comes last, wherever it was
    bool take(std::byte* page);  // it is left to the caller; false: it was not here
    void shrink(uint64_t most);  // gives back what is more than so many bytes; the oldest first
    uint64_t bytes() const { return pages_.size() * page_size(); }

   private:
    std::list<std::byte*> pages_;
    std::unordered_map<std::byte*, std::list<std::byte*>::iterator> places_;
};

}  // namespace edgemoe
