// Pages that two neighbouring slabs share and neither holds now. They stay where they are, for whichever of the two
// comes first: giving a page back interrupts every processor that computes, and costs as much as moving a slab.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <unordered_map>

#include "mapped_file.h"

namespace edgemoe {

class IdlePages {
   public:
    void give(std::byte* page);  // nobody holds it any more
    void take(std::byte* page);  // somebody holds it from now on, whether it was here or not
    void shrink(uint64_t most);  // gives back what is more than so many bytes; the oldest first
    uint64_t bytes() const { return pages_.size() * page_size(); }

   private:
    std::list<std::byte*> pages_;
    std::unordered_map<std::byte*, std::list<std::byte*>::iterator> places_;
};

}  // namespace edgemoe
