// float16 to float32 on the CPU, exact and without branches, so that loops over it are vectorised.
#pragma once

#include <cstdint>
#include <cstring>

namespace btp {

inline float half_to_float(uint16_t half)
{
    const uint32_t magnitude = half & 0x7fffu;
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const float tiny = static_cast<float>(static_cast<int32_t>(magnitude)) * (1.0f / 16777216.0f);  // subnormal: n * 2^-24
    uint32_t tiny_bits;
    std::memcpy(&tiny_bits, &tiny, sizeof tiny_bits);
    const uint32_t is_tiny = 0u - static_cast<uint32_t>(magnitude < 0x400u);
    const uint32_t is_top = 0u - static_cast<uint32_t>(magnitude >= 0x7c00u);  // infinity and NaN keep the top exponent
    const uint32_t usual = (magnitude << 13) + 0x38000000u + (is_top & 0x38000000u);
    const uint32_t bits = sign | (is_tiny & tiny_bits) | (~is_tiny & usual);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace btp
