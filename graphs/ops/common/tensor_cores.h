// Tensor cores, asynchronous copies to shared memory, and pairs of 16-bit floats: sm_80 and later, or the tests' emulation.
#pragma once

#include "device.h"

namespace btp {

#ifdef BTP_SIMT_EMULATION
#define BTP_MMA(format, c, a, b0, b1) simt::mma(c, a, b0, b1, simt::of_##format)
inline void copy_async(uint32_t address, const void* from, bool there) { simt::cp_async(address, from, there); }
inline void commit_copies() { simt::cp_commit(); }
template <int kLeft>
void wait_for_copies() { simt::cp_wait(kLeft); }
inline uint4 load_shared_16(uint32_t address)
{
    uint4 value;
    memcpy(&value, simt::shared_memory() + address, sizeof value);
    return value;
}
template <typename T>
T load_once(const T* from) { return *from; }
inline uint32_t low_nibbles(uint32_t bits, uint32_t upper) { return (bits & 0x000f000fu) | upper; }
#else
// The low nibbles of both halves, with `upper` above them: one instruction if `upper` is in a register (opaque()), because it
// has room for one constant.
BTP_DEVICE uint32_t low_nibbles(uint32_t bits, uint32_t upper)
{
    uint32_t result;
    asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;" : "=r"(result) : "r"(bits), "r"(upper));
    return result;
}
// 16 bytes of global memory to shared memory, zeros where they are not `there`. Both addresses are multiples of 16.
BTP_DEVICE void copy_async(uint32_t address, const void* from, bool there)
{
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(address), "l"(from), "r"(bytes) : "memory");
}
BTP_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
// Until at most kLeft of this thread's groups are not done.
template <int kLeft>
BTP_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" : : "n"(kLeft) : "memory"); }
BTP_DEVICE uint4 load_shared_16(uint32_t address)
{
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(address) : "memory");
    return value;
}
// What nobody reads again: it takes no room in L1.
BTP_DEVICE uint4 load_once(const uint4* from)
{
    uint4 value;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(from));
    return value;
}
BTP_DEVICE uint2 load_once(const uint2* from)
{
    uint2 value;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from));
    return value;
}
#define BTP_MMA_TYPE_float16 "f16.f16"
#define BTP_MMA_TYPE_bfloat16 "bf16.bf16"
#define BTP_MMA(format, c, a, b0, b1)                                                                                     \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." BTP_MMA_TYPE_##format                                                    \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                            \
        : "+f"((c)[0]), "+f"((c)[1]), "+f"((c)[2]), "+f"((c)[3])                                                          \
        : "r"((a)[0]), "r"((a)[1]), "r"((a)[2]), "r"((a)[3]), "r"(b0), "r"(b1))
#endif

// A format of 16 bits: arithmetic on pairs in one register, products of tiles, and its values as float32.
struct Float16 {
    static constexpr uint32_t kCodes = 0x64006400u;          // | a code of 4 bits: 1024 + the code
    static constexpr uint32_t kMinusCodes = 0xe400e400u;     // | a code of 4 bits: minus that
#ifdef BTP_SIMT_EMULATION
    static uint32_t add(uint32_t a, uint32_t b) { return simt::each_float16(a, b, [](float x, float y) { return x + y; }); }
    static uint32_t multiply(uint32_t a, uint32_t b)
    {
        return simt::each_float16(a, b, [](float x, float y) { return x * y; });
    }
    static float wide(uint16_t bits) { return simt::of_float16(bits); }
    static uint16_t narrow(float x) { return simt::float16_of(x); }
#else
    BTP_DEVICE static uint32_t add(uint32_t a, uint32_t b)
    {
        uint32_t sum;
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
        return sum;
    }
    BTP_DEVICE static uint32_t multiply(uint32_t a, uint32_t b)
    {
        uint32_t product;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
        return product;
    }
    BTP_DEVICE static float wide(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
    BTP_DEVICE static uint16_t narrow(float x) { return __half_as_ushort(__float2half_rn(x)); }
#endif
    // c [16,8] += a [16,16] times b [16,8], spread over the lanes as mma.m16n8k16 has them.
    BTP_DEVICE static void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
    {
        BTP_MMA(float16, c, a, b0, b1);
    }
};

struct Bfloat16 {
    static constexpr uint32_t kCodes = 0x43004300u;          // 128 + the code
    static constexpr uint32_t kMinusCodes = 0xc300c300u;
#ifdef BTP_SIMT_EMULATION
    static uint32_t add(uint32_t a, uint32_t b)
    {
        return simt::each_bfloat16(a, b, [](float x, float y) { return x + y; });
    }
    static uint32_t multiply(uint32_t a, uint32_t b)
    {
        return simt::each_bfloat16(a, b, [](float x, float y) { return x * y; });
    }
    static float wide(uint16_t bits) { return simt::of_bfloat16(bits); }
    static uint16_t narrow(float x) { return simt::bfloat16_of(x); }
#else
    // sm_80 knows bfloat16 in fma only: a * 1 + b and a * b - 0.
    BTP_DEVICE static uint32_t add(uint32_t a, uint32_t b) { return fma(a, 0x3f803f80u, b); }
    BTP_DEVICE static uint32_t multiply(uint32_t a, uint32_t b) { return fma(a, b, 0x80008000u); }
    BTP_DEVICE static uint32_t fma(uint32_t a, uint32_t b, uint32_t c)
    {
        uint32_t result;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
        return result;
    }
    BTP_DEVICE static float wide(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
    BTP_DEVICE static uint16_t narrow(float x)
    {
        uint16_t bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
        return bits;
    }
#endif
    BTP_DEVICE static void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
    {
        BTP_MMA(bfloat16, c, a, b0, b1);
    }
};

}  // namespace btp
