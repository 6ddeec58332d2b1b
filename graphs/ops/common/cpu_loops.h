// Hot loops, compiled for several instruction sets of x86-64; which one a processor has is asked once, when the library is
// loaded. (Compilers have an attribute for it, target_clones. Built by zig, which makes the wheels, it finds no instruction
// set at all.)
//
//     BTP_INLINE int32_t sum_body(const int16_t* row, int n) { ... }
//     BTP_FOR_PROCESSORS(int32_t, sum, (const int16_t* row, int n), (row, n))     defines sum(row, n)
#pragma once

#define BTP_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>

#define BTP_X86 1
#define BTP_AVX2 __attribute__((target("avx2,fma,bmi,bmi2,f16c")))
#define BTP_AVX512 __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2,f16c")))
#define BTP_VNNI \
    __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi,bmi2,f16c")))
#endif

// Around code with intrinsics: GCC warns of what its own headers do (_mm512_undefined_ps and the like), and of how vectors
// would be passed between libraries, which ours never are.
#if defined(__GNUC__) && !defined(__clang__)
#define BTP_QUIET_INTRINSICS                               \
    _Pragma("GCC diagnostic push")                         \
    _Pragma("GCC diagnostic ignored \"-Wuninitialized\"")  \
    _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"") \
    _Pragma("GCC diagnostic ignored \"-Wpsabi\"")
#define BTP_QUIET_END _Pragma("GCC diagnostic pop")
#else
#define BTP_QUIET_INTRINSICS
#define BTP_QUIET_END
#endif

namespace btp {

enum class Instructions { plain, avx2, avx512 };

// The largest set that the processor has and whose registers the system saves.
inline Instructions instructions()
{
#ifdef BTP_X86
    unsigned a = 0, b = 0, c = 0, d = 0;
    const auto has = [](unsigned word, unsigned bits) { return (word & bits) == bits; };
    const unsigned fma = 1u << 12, saved = 1u << 27, avx = 1u << 28, half = 1u << 29;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !has(c, fma | saved | avx | half)) {
        return Instructions::plain;
    }
    unsigned low = 0, high = 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const unsigned bmi = 1u << 3, avx2 = 1u << 5, bmi2 = 1u << 8;
    if (!has(low, 0x6) || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || !has(b, bmi | avx2 | bmi2)) {
        return Instructions::plain;
    }
    const unsigned f = 1u << 16, dq = 1u << 17, cd = 1u << 28, bw = 1u << 30, vl = 1u << 31;
    return has(low, 0xe6) && has(b, f | dq | cd | bw | vl) ? Instructions::avx512 : Instructions::avx2;
#else
    return Instructions::plain;
#endif
}

#ifndef BTP_AT_MOST  // tests build libraries that use less than a processor has
#define BTP_AT_MOST avx512
#endif
inline const Instructions kInstructions =
    instructions() < Instructions::BTP_AT_MOST ? instructions() : Instructions::BTP_AT_MOST;

// Whether the processor sums products of bytes in registers of 512 bits (AVX512-VNNI).
inline bool has_byte_products()
{
#ifdef BTP_X86
    unsigned a = 0, b = 0, c = 0, d = 0;
    return kInstructions == Instructions::avx512 && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (c >> 11 & 1u) != 0;
#else
    return false;
#endif
}

#ifdef BTP_X86
#define BTP_FOR_PROCESSORS(result, name, parameters, arguments)                            \
    BTP_AVX512 inline result name##_avx512 parameters { return name##_body arguments; }    \
    BTP_AVX2 inline result name##_avx2 parameters { return name##_body arguments; }        \
    inline result name parameters                                                          \
    {                                                                                      \
        return kInstructions == Instructions::avx512 ? name##_avx512 arguments             \
               : kInstructions == Instructions::avx2 ? name##_avx2 arguments               \
                                                     : name##_body arguments;              \
    }
#else
#define BTP_FOR_PROCESSORS(result, name, parameters, arguments) \
    inline result name parameters { return name##_body arguments; }
#endif

}  // namespace btp
