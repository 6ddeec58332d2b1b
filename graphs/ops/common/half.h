// float16 on the CPU: to float32, exact and without branches, so that loops over it are vectorised; and back.
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

// The nearest float16, halves to even.
inline uint16_t float_to_half(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return static_cast<uint16_t>(sign | 0x7e00u);
    }
    if (magnitude >= 0x477ff000u) {  // 65520, which rounds to infinity
        return static_cast<uint16_t>(sign | 0x7c00u);
    }
    if (magnitude < 0x38800000u) {  // subnormal: a number of 2^-24, which the addition rounds
        const float shifted = (sign != 0 ? -value : value) + 0.5f;
        uint32_t number;
        std::memcpy(&number, &shifted, sizeof number);
        return static_cast<uint16_t>(sign | (number - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13));
}

}  // namespace btp
