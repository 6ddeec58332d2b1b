// The rules that sizes and attributes of BtpGatherTokens keep, with the message for each breach. Shared by the CUDA
// kernel, the TensorRT plugin and the ONNX Runtime operator.
#pragma once

#include <stdint.h>

#include <string>

#include "kernel.h"

namespace btp {

// Empty if the gather can be run, otherwise one line "BtpGatherTokens: <name> is <got>, wanted <wanted>".
inline std::string gather_problem(const BtpGather& g)
{
    const auto wrong = [](const char* name, int64_t got, const std::string& wanted) {
        return "BtpGatherTokens: " + std::string(name) + " is " + std::to_string(got) + ", wanted " + wanted;
    };
    if (g.batch < 1) {
        return wrong("batch", g.batch, "at least 1");
    }
    if (g.rows < 1) {
        return wrong("the number of rows", g.rows, "at least 1");
    }
    if (g.start < 0 || g.start > g.rows) {
        return wrong("start", g.start, "0 to " + std::to_string(g.rows) + " (the number of rows)");
    }
    if (g.count < 0 || g.count > g.rows - g.start) {
        return wrong("count", g.count, "0 to " + std::to_string(g.rows - g.start) + " (the rows from start on)");
    }
    if (g.kept < 0) {
        return wrong("the number of indices", g.kept, "at least 0");
    }
    if (g.kept > 0 && g.count == 0) {
        return wrong("the number of indices", g.kept, "0, because count is 0");
    }
    if (g.row_bytes < 1) {
        return wrong("the size of a row in bytes", g.row_bytes, "at least 1");
    }
    return {};
}

}  // namespace btp
