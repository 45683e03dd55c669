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
    return first < end && discard(reinterpret_cast<std::byte*>(first), end - first);
}

}  // namespace edgemoe
