// What the kernels need beyond C++: the CUDA headers, or the emulation header of the tests in their place.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef BTP_SIMT_EMULATION
#include "simt.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define BTP_LAUNCH(kernel, grid, block, shared, stream, ...) \
    kernel<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)
// Everything is inlined, so that arrays that are struct members stay in registers.
#define BTP_DEVICE __device__ __forceinline__
#define BTP_HOST_DEVICE __host__ __device__ __forceinline__
#define BTP_DYNAMIC_SHARED(name) extern __shared__ __align__(512) unsigned char name[]
#endif

namespace btp {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kNone = 0xffffffffu;

// Shared memory by its 32-bit addresses. The compiler does not see where an address comes from, so it keeps it in a register
// in place of working it out again in every step.
#ifdef BTP_SIMT_EMULATION
inline uint32_t shared_address(const void* pointer)
{
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - simt::shared_memory());
}
inline void store_shared(uint32_t address, uint32_t a, uint32_t b)
{
    memcpy(simt::shared_memory() + address, &a, 4);
    memcpy(simt::shared_memory() + address + 4, &b, 4);
}
inline void store_shared(uint32_t address, uint16_t value) { memcpy(simt::shared_memory() + address, &value, 2); }
inline void load_shared(uint32_t address, uint32_t& a, uint32_t& b)
{
    memcpy(&a, simt::shared_memory() + address, 4);
    memcpy(&b, simt::shared_memory() + address + 4, 4);
}
template <typename T>
T opaque(T value) { return value; }
inline const char* multiply_add(uint32_t a, uint32_t b, const char* c) { return c + uint64_t{a} * b; }
#else
// a * b + c in one instruction.
BTP_DEVICE const char* multiply_add(uint32_t a, uint32_t b, const char* c)
{
    uint64_t product;  // of 32-bit factors, which the compiler forgets outside of loops
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return c + product;
}
BTP_DEVICE uint32_t opaque(uint32_t value)
{
    asm volatile("" : "+r"(value));
    return value;
}
template <typename T>
BTP_DEVICE const T* opaque(const T* pointer)
{
    asm volatile("" : "+l"(pointer));
    return pointer;
}
BTP_DEVICE uint32_t shared_address(const void* pointer)
{
    return opaque(static_cast<uint32_t>(__cvta_generic_to_shared(pointer)));
}
BTP_DEVICE void store_shared(uint32_t address, uint32_t a, uint32_t b)
{
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" : : "r"(address), "r"(a), "r"(b) : "memory");
}
BTP_DEVICE void store_shared(uint32_t address, uint16_t value)
{
    asm volatile("st.shared.u16 [%0], %1;" : : "r"(address), "h"(value) : "memory");
}
BTP_DEVICE void load_shared(uint32_t address, uint32_t& a, uint32_t& b)
{
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(address) : "memory");
}
#endif

// How often a thread looks for what another block owes it before it gives up, many seconds on any GPU.
#ifdef BTP_SIMT_EMULATION
constexpr uint32_t kPatience = 1u << 14;
#else
constexpr uint32_t kPatience = 1u << 25;
#endif

// Waits until a counter in global memory reaches `wanted`; what its writers wrote before can be read then. A counter that
// never does (its memory is somebody else's too) is an error of the launch, not a hang.
BTP_DEVICE void wait_until(const uint32_t* counter, uint32_t wanted)
{
    for (uint32_t looks = 0; *static_cast<const volatile uint32_t*>(counter) < wanted; ++looks) {
        if (looks == kPatience) {
            __trap();
        }
        __nanosleep(32);
    }
    __threadfence();
}

// Unsigned key with the order of the floats: NaN lowest (all NaNs alike), then -inf ... +inf; x is not -0.
// 0 lies below every key and is left free for "not to be chosen". No branches: it stands between every two steps.
BTP_DEVICE uint32_t key_without_minus_zero(float x)
{
    const uint32_t bits = __float_as_uint(x);
    const uint32_t sign = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
    const uint32_t key = bits ^ (sign | 0x80000000u);
    return x != x ? 1u : key;
}

// The same for any x; -0 is equal to +0.
BTP_DEVICE uint32_t order_key(float x)
{
    return key_without_minus_zero(__fadd_rn(x, 0.0f));
}

// One redux instruction where the hardware has it (sm_80 on), a butterfly of shuffles before.
BTP_DEVICE uint32_t warp_max(uint32_t value)
{
#if defined(BTP_SIMT_EMULATION) || __CUDA_ARCH__ >= 800
    return __reduce_max_sync(kAllLanes, value);
#else
    for (int offset = 16; offset > 0; offset >>= 1) {
        const uint32_t other = __shfl_xor_sync(kAllLanes, value, offset);
        value = other > value ? other : value;
    }
    return value;
#endif
}

BTP_DEVICE uint32_t warp_min(uint32_t value)
{
    return ~warp_max(~value);
}

BTP_DEVICE uint32_t warp_sum(uint32_t value)
{
#if defined(BTP_SIMT_EMULATION) || __CUDA_ARCH__ >= 800
    return __reduce_add_sync(kAllLanes, value);
#else
    for (int offset = 16; offset > 0; offset >>= 1) {
        value += __shfl_xor_sync(kAllLanes, value, offset);
    }
    return value;
#endif
}

}  // namespace btp
