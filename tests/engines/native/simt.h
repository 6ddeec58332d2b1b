// Test only: runs the CUDA kernels' own source on a CPU, each thread a fiber.
//
// Served: threadIdx, blockIdx, blockDim, __syncthreads, warp shuffles, ballot, redux and mma with all lanes, dynamic shared
// memory, asynchronous copies into it, atomics. What it shows is the kernels' logic; it says nothing about their speed and cannot see everything that
// a GPU's memory model allows. To bring missing barriers to light, threads run in another order every time a barrier opens
// (seeded), shared memory starts full of noise, and a block whose threads wait at different places ends the program with
// a message. Blocks start in another order every launch, one to three of them at a time (the device has room for no more), and
// go on by turns at their own paces; so a block that waits for one that starts later waits for ever, unless it gives up:
// __trap() ends the launch, and cudaGetLastError() tells once.
#pragma once

#include <math.h>
#include <setjmp.h>
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
#include <utility>
#include <vector>

#define __global__ static
#define BTP_DEVICE inline
#define BTP_HOST_DEVICE inline
#define __launch_bounds__(...)

struct uint2 {
    uint32_t x, y;
};

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
constexpr cudaError_t cudaErrorLaunchFailure = 719;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
cudaError_t cudaGetLastError();
inline const char* cudaGetErrorString(cudaError_t) { return "error of the emulated device"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 6, cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) { return cudaSuccess; }

namespace simt {

constexpr size_t kStack = 64 * 1024;

struct Message {  // what a lane tells the others of its warp
    uint32_t words[6];
};

struct Meeting {  // of a warp's 32 lanes or of a block: values are kept for two turns, see meet()
    unsigned size = 0;
    unsigned arrived = 0;
    uint64_t turns = 0;
    uint64_t values[2][32] = {};
    Message messages[2][32] = {};
};

struct Copies {  // asynchronous ones of a thread that are not done yet, by the groups that were committed
    struct Copy {
        unsigned char* to;
        unsigned char bytes[16];
    };
    std::vector<std::vector<Copy>> groups{1};
};

struct Block;

struct Fiber {
    jmp_buf place;  // where it goes on; a stack of its own begins with a context
    ucontext_t first{};
    std::unique_ptr<char[]> stack;
    bool begun = false;
    bool at_end = false;  // of a launch's body: it waits for the next launch's
    Block* block = nullptr;
    dim3 thread;
    unsigned lane = 0;
    Meeting* warp = nullptr;
    Meeting* waits_for = nullptr;
    uint64_t waits_until = 0;
    uint64_t turn = 0;
    bool done = false;
    Copies copies;
};

// A block that has started: it has room on the device until its last thread is done.
struct Block {
    dim3 index;
    std::vector<unsigned char> shared;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> running;
    std::vector<std::unique_ptr<Meeting>> warps;
    Meeting all;
    bool any = false;  // of __syncthreads_or
};

struct Device {
    dim3 grid, block;
    std::vector<std::unique_ptr<Block>> rooms;  // kept between launches, for their stacks
    Fiber* current = nullptr;
    jmp_buf scheduler;
    std::function<void()> body;
    std::mt19937 random{20};
    bool trapped = false;
    cudaError_t error = cudaSuccess;

    // Jumps and not swapcontext, which asks the kernel for the signal mask each time: half of all time.
    __attribute__((noinline)) void leave()
    {
        if (_setjmp(current->place) == 0) {
            _longjmp(scheduler, 1);
        }
    }

    __attribute__((noinline)) void go_on(Fiber* fiber)
    {
        current = fiber;
        if (_setjmp(scheduler) != 0) {
            return;
        }
        if (fiber->begun) {
            _longjmp(fiber->place, 1);
        }
        fiber->begun = true;
        setcontext(&fiber->first);
    }

    void arrive(Meeting& meeting)
    {
        Fiber& self = *current;
        self.waits_for = &meeting;
        self.waits_until = meeting.turns + 1;
        if (++meeting.arrived == meeting.size) {
            meeting.arrived = 0;
            ++meeting.turns;
        }
        leave();
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

    const Message* meet(const Message& message)
    {
        Fiber& self = *current;
        Message* const messages = self.warp->messages[self.turn++ & 1];
        messages[self.lane] = message;
        arrive(*self.warp);
        return messages;
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
    for (;;) {
        d.current->at_end = false;
        d.body();
        d.current->done = d.current->at_end = true;
        d.leave();
    }
}

inline void start(Block& block, Fiber& fiber, unsigned index)
{
    const dim3 size = device().block;
    fiber.block = &block;
    fiber.thread = dim3(index % size.x, index / size.x % size.y, index / (size.x * size.y));
    fiber.lane = index % 32;
    fiber.warp = block.warps[index / 32].get();
    fiber.turn = 0;
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.copies = Copies{};
    if (fiber.at_end) {
        return;
    }
    if (!fiber.stack) {
        fiber.stack.reset(new char[kStack]);
    }
    fiber.begun = false;
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.get();
    fiber.first.uc_stack.ss_size = kStack;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, enter, 0);
}

inline void start(Block& block, unsigned number, size_t shared)
{
    Device& d = device();
    const unsigned threads = d.block.x * d.block.y * d.block.z;
    block.index = dim3(number % d.grid.x, number / d.grid.x % d.grid.y, number / (d.grid.x * d.grid.y));
    block.shared.resize(shared);
    for (unsigned char& byte : block.shared) {
        byte = static_cast<unsigned char>(d.random());
    }
    block.all = Meeting{};
    block.any = false;
    block.all.size = threads;
    block.warps.clear();
    for (unsigned warp = 0; warp < threads / 32; ++warp) {
        block.warps.push_back(std::make_unique<Meeting>());
        block.warps.back()->size = 32;
    }
    block.running.clear();
    for (unsigned thread = 0; thread < threads; ++thread) {
        if (block.fibers.size() == thread) {
            block.fibers.push_back(std::make_unique<Fiber>());
        }
        start(block, *block.fibers[thread], thread);
        block.running.push_back(block.fibers[thread].get());
    }
}

// Lets every thread of the block that waits for nobody go on to its next barrier, in a new order.
inline void pass(Block& block)
{
    Device& d = device();
    std::shuffle(block.running.begin(), block.running.end(), d.random);
    bool moved = false;
    for (Fiber* fiber : block.running) {
        if (fiber->waits_for != nullptr && fiber->waits_for->turns < fiber->waits_until) {
            continue;
        }
        moved = true;
        d.go_on(fiber);
        if (d.trapped) {
            return;
        }
    }
    auto& running = block.running;
    running.erase(std::remove_if(running.begin(), running.end(), [](Fiber* f) { return f->done; }), running.end());
    if (!moved) {
        fail("the threads of a block wait at different places");
    }
}

inline void launch(dim3 grid, dim3 block, size_t shared, std::function<void()> body)
{
    Device& d = device();
    if (block.x * block.y * block.z % 32 != 0) {
        fail("a block must be whole warps");
    }
    d.grid = grid;
    d.block = block;
    d.body = std::move(body);
    std::vector<unsigned> order(grid.x * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), d.random);
    const size_t room = 1 + d.random() % 3;
    while (d.rooms.size() < room) {
        d.rooms.push_back(std::make_unique<Block>());
    }
    size_t started = 0;
    for (bool running = true; running && !d.trapped;) {
        running = false;
        for (size_t place = 0; place < room && !d.trapped; ++place) {
            Block& own = *d.rooms[place];
            if (own.running.empty() && started < order.size()) {
                start(own, order[started++], shared);
            }
            running = running || !own.running.empty();
            if (!own.running.empty() && d.random() % 4 != 0) {
                pass(own);
            }
        }
    }
    for (auto& own : d.rooms) {
        own->running.clear();
    }
    d.error = d.trapped ? cudaErrorLaunchFailure : d.error;
    d.trapped = false;
}

inline void whole_warp(uint32_t mask)
{
    if (mask != 0xffffffffu) {
        fail("only collectives of whole warps are served");
    }
}

}  // namespace simt

#define threadIdx (simt::device().current->thread)
#define blockIdx (simt::device().current->block->index)
#define gridDim (simt::device().grid)
#define blockDim (simt::device().block)
#define BTP_LAUNCH(kernel, grid, block, shared, stream, ...) \
    ((void)(stream), simt::launch((grid), (block), (shared), [=] { kernel(__VA_ARGS__); }))
#define BTP_DYNAMIC_SHARED(name) unsigned char* const name = simt::shared_memory()

namespace simt {
inline unsigned char* shared_memory() { return device().current->block->shared.data(); }
}  // namespace simt

inline cudaError_t cudaGetLastError() { return std::exchange(simt::device().error, cudaSuccess); }

inline void __syncthreads() { simt::device().arrive(simt::device().current->block->all); }

inline int __syncthreads_or(int flag)
{
    simt::Block& block = *simt::device().current->block;
    block.any = block.any || flag != 0;
    __syncthreads();
    const bool any = block.any;
    __syncthreads();
    block.any = false;
    return any;
}

// Lets the other threads go on.
inline void __nanosleep(unsigned) { simt::device().leave(); }

inline void __trap()
{
    simt::device().trapped = true;
    simt::device().leave();
}

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

#include "simt_math.h"
#include "simt_tensor.h"
