// Test only: the arithmetic, the atomics and float16 of the SIMT emulation (simt.h).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

inline uint32_t __float_as_uint(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

// The larger of the two signed halves, each for itself.
inline uint32_t __vmaxs2(uint32_t a, uint32_t b)
{
    const auto larger = [](uint32_t x, uint32_t y) {
        return static_cast<uint16_t>(std::max(static_cast<int16_t>(x), static_cast<int16_t>(y)));
    };
    return larger(a >> 16, b >> 16) << 16 | larger(a & 0xffffu, b & 0xffffu);
}

// c + the signed halves of a, each times one of the two lowest signed bytes of b.
inline int __dp2a_lo(int a, int b, int c)
{
    return c + static_cast<int16_t>(a) * static_cast<int8_t>(b)
           + static_cast<int16_t>(static_cast<uint32_t>(a) >> 16) * static_cast<int8_t>(static_cast<uint32_t>(b) >> 8);
}

inline uint32_t atomicMin(uint32_t* address, uint32_t value)
{
    const uint32_t old = *address;
    *address = std::min(old, value);
    return old;
}

inline uint32_t atomicMax(uint32_t* address, uint32_t value)
{
    const uint32_t old = *address;
    *address = std::max(old, value);
    return old;
}

inline uint32_t atomicAdd(uint32_t* address, uint32_t value)
{
    const uint32_t old = *address;
    *address = old + value;
    return old;
}

inline uint32_t atomicOr(uint32_t* address, uint32_t value)
{
    const uint32_t old = *address;
    *address = old | value;
    return old;
}

inline uint32_t __ldcg(const uint32_t* address) { return *address; }
inline void __threadfence() {}

struct __half {
    uint16_t bits;
};

// Exact: every float16 is a float32.
inline float __half2float(__half x)
{
    const uint32_t sign = (x.bits & 0x8000u) << 16;
    const uint32_t exponent = (x.bits >> 10) & 31u;
    const uint32_t fraction = x.bits & 0x3ffu;
    if (exponent == 0) {
        const float value = static_cast<float>(fraction) / 16777216.0f;
        return sign != 0 ? -value : value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
