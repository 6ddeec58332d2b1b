// BtpGatherTokens on the CPU.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

#include "rules.h"

namespace btp {

// Throws std::invalid_argument for an index outside of the tokens.
inline void gather_cpu(const char* op, const BtpGather& gather, const void* tokens, const int32_t* indices, void* result)
{
    const size_t row = static_cast<size_t>(gather.row_bytes);
    const size_t start = static_cast<size_t>(gather.start);
    const size_t after = start + static_cast<size_t>(gather.count);
    const size_t rows = static_cast<size_t>(gather.rows);
    const auto* from = static_cast<const char*>(tokens);
    auto* to = static_cast<char*>(result);
    const auto copy = [&to, row](const char* some, size_t count) {
        std::memcpy(to, some, count * row);
        to += count * row;
    };
    for (int32_t batch = 0; batch < gather.batch; ++batch) {
        copy(from, start);
        for (int32_t kept = 0; kept < gather.kept; ++kept) {
            const int32_t index = *indices++;
            if (index < 0 || index >= gather.count) {
                throw std::invalid_argument(std::string(op) + ": index " + std::to_string(index) + " is outside 0 to "
                                            + std::to_string(gather.count - 1));
            }
            copy(from + (start + static_cast<size_t>(index)) * row, 1);
        }
        copy(from + after * row, rows - after);
        from += rows * row;
    }
}

}  // namespace btp
