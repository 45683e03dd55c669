#include "batch_memory.h"

#include "mapped_file.h"

namespace edgemoe {

bool BatchMemory::give_back(uint64_t least) const {
    ggml::Buffer* const buffer = buffer_;
    if (buffer == nullptr || buffer->usage != ggml::kUsageCompute || buffer->size < least ||
        buffer->buft->iface.is_host == nullptr || !buffer->buft->iface.is_host(buffer->buft)) {
        return false;
    }
    const auto base = reinterpret_cast<uintptr_t>(buffer->iface.get_base(buffer));
    const uintptr_t first = page_ceil(base), end = page_floor(base + buffer->size);
    if (first >= end) {
        return false;
    }
    auto* const memory = reinterpret_cast<std::byte*>(first);
    use_small_pages(memory, end - first);  // of which a token touches few, where huge ones would be all of it
    return discard(memory, end - first);
}

}  // namespace edgemoe
