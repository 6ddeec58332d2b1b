// Test only: tensor cores, asynchronous copies and pairs of 16-bit floats of the SIMT emulation (simt.h).
//
// An asynchronous copy is done at once or, by chance, not before it is waited for: what is read too early is noise, what is
// overwritten too early is lost. Products of a tensor core are exact and added in float32, one after the other.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <vector>

inline float __uint_as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector)
{
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    }
    return result;
}

namespace simt {

// To the nearest value, halves to even.
inline uint16_t float16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const float magnitude = fabsf(x);
    if (x != x) {
        return static_cast<uint16_t>(sign | 0x7e00u);
    }
    if (magnitude >= 65520.0f) {
        return static_cast<uint16_t>(sign | 0x7c00u);
    }
    if (magnitude < 6.103515625e-05f) {  // subnormal: a number of 2^-24
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(nearbyintf(magnitude * 16777216.0f)));
    }
    uint32_t rest = bits & 0x7fffffffu;
    rest += 0xfffu + (rest >> 13 & 1u);
    return static_cast<uint16_t>(sign | ((rest >> 13) - (112u << 10)));
}

inline uint16_t bfloat16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) {
        return 0x7fffu;
    }
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float of_float16(uint16_t bits) { return __half2float(__half{bits}); }
inline float of_bfloat16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

template <typename Operation>
uint32_t each_float16(uint32_t a, uint32_t b, Operation operation)
{
    const auto one = [&](int shift) {
        const auto x = of_float16(static_cast<uint16_t>(a >> shift)), y = of_float16(static_cast<uint16_t>(b >> shift));
        return static_cast<uint32_t>(float16_of(operation(x, y))) << shift;
    };
    return one(0) | one(16);
}

template <typename Operation>
uint32_t each_bfloat16(uint32_t a, uint32_t b, Operation operation)
{
    const auto one = [&](int shift) {
        const auto x = of_bfloat16(static_cast<uint16_t>(a >> shift)), y = of_bfloat16(static_cast<uint16_t>(b >> shift));
        return static_cast<uint32_t>(bfloat16_of(operation(x, y))) << shift;
    };
    return one(0) | one(16);
}

// mma.m16n8k16.row.col.f32: A [16,16] and B [16,8] lie over the lanes as the PTX manual says.
template <typename Number>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Number number)
{
    Message own{};
    memcpy(own.words, a, sizeof a);
    own.words[4] = b0;
    own.words[5] = b1;
    const Message* const all = device().meet(own);
    const unsigned lane = device().current->lane, row = lane / 4, column = lane % 4 * 2;
    const auto value = [&](unsigned from, unsigned word, unsigned k) {
        return number(static_cast<uint16_t>(all[from].words[word] >> (16 * (k % 2))));
    };
    for (unsigned i = 0; i < 4; ++i) {
        for (unsigned k = 0; k < 16; ++k) {
            const unsigned place = k % 8 / 2, upper = k / 8;
            const float left = value((row)*4 + place, i / 2 + 2 * upper, k);
            const float right = value((column + i % 2) * 4 + place, 4 + upper, k);
            c[i] += left * right;
        }
    }
}

inline void cp_async(uint32_t address, const void* from, bool there)
{
    unsigned char* const to = shared_memory() + address;
    Copies::Copy copy{to, {}};
    if (there) {
        memcpy(copy.bytes, from, 16);
    }
    if (device().random() % 2 == 0) {
        memcpy(to, copy.bytes, 16);
    } else {
        device().current->copies.groups.back().push_back(copy);
    }
}

inline void cp_commit() { device().current->copies.groups.emplace_back(); }

// Until at most `left` committed groups are not done.
inline void cp_wait(size_t left)
{
    auto& groups = device().current->copies.groups;
    while (groups.size() > left + 1) {
        for (const auto& copy : groups.front()) {
            memcpy(copy.to, copy.bytes, 16);
        }
        groups.erase(groups.begin());
    }
}

}  // namespace simt
