// The numbers in an I32 tensor of rows, which may be a strided view: selected ids, tokens.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "ggml_abi.h"

namespace edgemoe {

inline void read_numbers(const ggml::Tensor* from, std::vector<int32_t>& to) {
    to.clear();
    for (int64_t row = 0; row < from->ne[1]; ++row) {
        const char* start = static_cast<const char*>(from->data) + static_cast<size_t>(row) * from->nb[1];
        for (int64_t k = 0; k < from->ne[0]; ++k) {
            int32_t number = 0;
            std::memcpy(&number, start + static_cast<size_t>(k) * from->nb[0], sizeof(number));
            to.push_back(number);
        }
    }
}

}  // namespace edgemoe
