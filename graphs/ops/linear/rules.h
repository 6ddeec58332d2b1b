// The rules that sizes and attributes of BtpLinear keep, with the message for each breach. Shared by the CUDA kernels, the
// TensorRT plugin and the ONNX Runtime operator.
#pragma once

#include <stdint.h>

#include <string>

#include "kernel.h"

namespace btp {

inline bool is_group(int32_t group)
{
    return group == 16 || group == 32 || group == 64 || group == 128 || group == 256;
}

// Empty if the product can be run, otherwise one line "BtpLinear: <name> is <got>, wanted <wanted>".
inline std::string linear_problem(const BtpLinear& l)
{
    const auto wrong = [](const std::string& name, int64_t got, const std::string& wanted) {
        return "BtpLinear: " + name + " is " + std::to_string(got) + ", wanted " + wanted;
    };
    if (l.bits != 4) {
        return wrong("bits", l.bits, "4");
    }
    if (!is_group(l.group)) {
        return wrong("group", l.group, "16, 32, 64, 128 or 256");
    }
    if (l.inputs < 1 || l.inputs % l.group != 0) {
        return wrong("the number of columns of x (K)", l.inputs, "a multiple of group " + std::to_string(l.group));
    }
    if (l.rows < 0) {
        return wrong("the number of rows of x", l.rows, "at least 0");
    }
    if (l.outputs < 1) {
        return wrong("the number of rows of qweight (N)", l.outputs, "at least 1");
    }
    if (l.type < BTP_LINEAR_FLOAT32 || l.type > BTP_LINEAR_BFLOAT16) {
        return wrong("the type", l.type, "float32, float16 or bfloat16 (1 to 3)");
    }
    return {};
}

}  // namespace btp
