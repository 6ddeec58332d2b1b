// What a GPU allows: the shortest dependent steps that the selection loop is made of, measured on the device at hand.
// C interface as the kernels': device pointers, a stream, a CUDA error code.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

// Each read names the next: time per step is the latency of one dependent read that misses L1 (ld.global.cg) and hits L2.
__global__ void chase(const uint32_t* next, int steps, uint32_t* out)
{
    uint32_t at = 0;
    for (int step = 0; step < steps; ++step) {
        at = __ldcg(next + at);
    }
    *out = at;
}

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ uint32_t warp_max(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }
#else
__device__ __forceinline__ uint32_t warp_max(uint32_t value)
{
    for (int offset = 16; offset > 0; offset >>= 1) {
        value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
    }
    return value;
}
#endif

__device__ __forceinline__ uint32_t first_lane(bool flag)
{
    return static_cast<uint32_t>(__ffs(static_cast<int>(__ballot_sync(0xffffffffu, flag)))) - 1u;
}

// What a step does besides the read: a maximum and a vote in every warp, one shared write and read, one barrier, a maximum,
// a vote and a shuffle over the warps.
__global__ void reduce(int steps, uint32_t* out)
{
    __shared__ uint64_t partial[2][32];
    const uint32_t lane = threadIdx.x & 31u;
    const uint32_t warps = blockDim.x / 32;
    uint32_t value = threadIdx.x;
    for (int step = 0; step < steps; ++step) {
        uint32_t top = warp_max(value);
        if (lane == first_lane(value == top)) {
            partial[step & 1][threadIdx.x >> 5] = static_cast<uint64_t>(top) << 32 | threadIdx.x;
        }
        __syncthreads();
        const uint64_t mine = lane < warps ? partial[step & 1][lane] : 0u;
        const uint32_t key = static_cast<uint32_t>(mine >> 32);
        top = warp_max(key);
        const uint32_t first = __shfl_sync(0xffffffffu, static_cast<uint32_t>(mine), first_lane(key == top));
        value = (value ^ first) + 1u;
    }
    out[threadIdx.x] = value;
}

__global__ void nothing() {}

}  // namespace

#define BTP_EXPORT extern "C" __attribute__((visibility("default")))

BTP_EXPORT int probe_chase(const uint32_t* next, int steps, uint32_t* out, void* stream)
{
    chase<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(next, steps, out);
    return static_cast<int>(cudaGetLastError());
}

BTP_EXPORT int probe_reduce(int steps, int threads, uint32_t* out, void* stream)
{
    reduce<<<1, threads, 0, static_cast<cudaStream_t>(stream)>>>(steps, out);
    return static_cast<int>(cudaGetLastError());
}

BTP_EXPORT int probe_launches(int count, void* stream)
{
    for (int launch = 0; launch < count; ++launch) {
        nothing<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>();
    }
    return static_cast<int>(cudaGetLastError());
}
