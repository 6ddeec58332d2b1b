// Test only: runs the CUDA kernels' own source on a CPU, one block after the other, each thread a fiber (ucontext).
//
// Served: threadIdx, blockIdx, blockDim, __syncthreads, warp shuffles, ballot and redux with all lanes, dynamic shared
// memory, atomics. What it shows is the kernels' logic; it says nothing about their speed and cannot see everything that
// a GPU's memory model allows. To bring missing barriers to light, threads run in another order every time a barrier opens
// (seeded), shared memory starts full of noise, and a block whose threads wait at different places ends the program with
// a message. Blocks run in another order every launch: one that waits for a block that comes later hangs for ever.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __global__ static
#define BTP_DEVICE inline
#define BTP_HOST_DEVICE inline
#define __launch_bounds__(...)

struct uint4 {
    uint32_t x, y, z, w;
};

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaError_t = int;
using cudaStream_t = struct simt_stream*;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "error of the emulated device"; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) { return cudaSuccess; }

namespace simt {

constexpr size_t kStack = 64 * 1024;

struct Meeting {  // of a warp's 32 lanes or of a block: values are kept for two turns, see meet()
    unsigned size = 0;
    unsigned arrived = 0;
    uint64_t turns = 0;
    uint64_t values[2][32] = {};
};

struct Fiber {
    ucontext_t context{};
    std::unique_ptr<char[]> stack;
    dim3 thread;
    unsigned lane = 0;
    Meeting* warp = nullptr;
    Meeting* waits_for = nullptr;
    uint64_t waits_until = 0;
    uint64_t turn = 0;
    bool done = false;
};

struct Device {
    dim3 grid, block, block_index;
    std::vector<unsigned char> shared;
    std::vector<Fiber> fibers;
    std::vector<std::unique_ptr<Meeting>> warps;
    Meeting all;
    Fiber* current = nullptr;
    ucontext_t scheduler{};
    std::function<void()> body;
    std::mt19937 random{20};

    void arrive(Meeting& meeting)
    {
        Fiber& self = *current;
        self.waits_for = &meeting;
        self.waits_until = meeting.turns + 1;
        if (++meeting.arrived == meeting.size) {
            meeting.arrived = 0;
            ++meeting.turns;
        }
        swapcontext(&self.context, &scheduler);
        self.waits_for = nullptr;
    }

    // Every lane leaves a value and gets all 32. A lane can be one turn ahead of another, never two: two sets are enough.
    const uint64_t* meet(uint64_t value)
    {
        Fiber& self = *current;
        uint64_t* const values = self.warp->values[self.turn++ & 1];
        values[self.lane] = value;
        arrive(*self.warp);
        return values;
    }
};

inline Device& device()
{
    static Device instance;
    return instance;
}

[[noreturn]] inline void fail(const char* message)
{
    fprintf(stderr, "simt: %s\n", message);
    abort();
}

inline void enter()
{
    Device& d = device();
    d.body();
    d.current->done = true;
    swapcontext(&d.current->context, &d.scheduler);
}

// Runs the block's fibers until all are done, in a new order after every pass.
inline void schedule(Device& d)
{
    std::vector<Fiber*> order;
    for (Fiber& fiber : d.fibers) {
        order.push_back(&fiber);
    }
    while (!order.empty()) {
        std::shuffle(order.begin(), order.end(), d.random);
        bool moved = false;
        for (Fiber* fiber : order) {
            if (fiber->waits_for != nullptr && fiber->waits_for->turns < fiber->waits_until) {
                continue;
            }
            moved = true;
            d.current = fiber;
            swapcontext(&d.scheduler, &fiber->context);
        }
        order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->done; }), order.end());
        if (!moved) {
            fail("the threads of a block wait at different places");
        }
    }
}

inline void start(Device& d, Fiber& fiber, unsigned index)
{
    fiber.thread = dim3(index % d.block.x, index / d.block.x % d.block.y, index / (d.block.x * d.block.y));
    fiber.lane = index % 32;
    fiber.warp = d.warps[index / 32].get();
    fiber.turn = 0;
    fiber.done = false;
    fiber.waits_for = nullptr;
    if (!fiber.stack) {
        fiber.stack.reset(new char[kStack]);
    }
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
}

inline void launch(dim3 grid, dim3 block, size_t shared, std::function<void()> body)
{
    Device& d = device();
    const unsigned threads = block.x * block.y * block.z;
    if (threads % 32 != 0) {
        fail("a block must be whole warps");
    }
    d.grid = grid;
    d.block = block;
    d.body = std::move(body);
    d.fibers.resize(threads);
    std::vector<unsigned> order(grid.x * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), d.random);
    for (const unsigned index : order) {
        d.block_index = dim3(index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y));
        d.shared.resize(shared);
        for (unsigned char& byte : d.shared) {
            byte = static_cast<unsigned char>(d.random());
        }
        d.all = Meeting{};
        d.all.size = threads;
        d.warps.clear();
        for (unsigned warp = 0; warp < threads / 32; ++warp) {
            d.warps.push_back(std::make_unique<Meeting>());
            d.warps.back()->size = 32;
        }
        for (unsigned thread = 0; thread < threads; ++thread) {
            start(d, d.fibers[thread], thread);
        }
        schedule(d);
    }
}

inline void whole_warp(uint32_t mask)
{
    if (mask != 0xffffffffu) {
        fail("only collectives of whole warps are served");
    }
}

}  // namespace simt

#define threadIdx (simt::device().current->thread)
#define blockIdx (simt::device().block_index)
#define blockDim (simt::device().block)
#define BTP_LAUNCH(kernel, grid, block, shared, stream, ...) \
    ((void)(stream), simt::launch((grid), (block), (shared), [=] { kernel(__VA_ARGS__); }))
#define BTP_DYNAMIC_SHARED(name) unsigned char* const name = simt::device().shared.data()

inline void __syncthreads() { simt::device().arrive(simt::device().all); }

template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane)
{
    simt::whole_warp(mask);
    return static_cast<T>(simt::device().meet(value)[lane & 31]);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int offset)
{
    simt::whole_warp(mask);
    const unsigned lane = simt::device().current->lane;
    return static_cast<T>(simt::device().meet(value)[lane ^ static_cast<unsigned>(offset)]);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int offset)
{
    simt::whole_warp(mask);
    const int lane = static_cast<int>(simt::device().current->lane);
    return static_cast<T>(simt::device().meet(value)[lane >= offset ? lane - offset : lane]);
}

inline uint32_t __ballot_sync(uint32_t mask, bool set)
{
    simt::whole_warp(mask);
    const uint64_t* const values = simt::device().meet(set);
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
        bits |= static_cast<uint32_t>(values[lane] != 0) << lane;
    }
    return bits;
}

inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value)
{
    simt::whole_warp(mask);
    const uint64_t* const values = simt::device().meet(value);
    return static_cast<uint32_t>(*std::max_element(values, values + 32));
}

inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value)
{
    simt::whole_warp(mask);
    const uint64_t* const values = simt::device().meet(value);
    return static_cast<uint32_t>(std::accumulate(values, values + 32, uint64_t{0}));
}

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

inline uint32_t atomicMin(uint32_t* address, uint32_t value)
{
    const uint32_t old = *address;
    *address = std::min(old, value);
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
