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

// What a step does besides the read: two levels of redux pairs, one shared write and read, one barrier.
__global__ void reduce(int steps, uint32_t* out)
{
    __shared__ uint64_t partial[2][32];
    const uint32_t lane = threadIdx.x & 31u;
    const uint32_t warps = blockDim.x / 32;
    uint32_t value = threadIdx.x;
    for (int step = 0; step < steps; ++step) {
#if __CUDA_ARCH__ >= 800
        uint32_t top = __reduce_max_sync(0xffffffffu, value);
        uint32_t first = __reduce_min_sync(0xffffffffu, value == top ? threadIdx.x : 0xffffffffu);
        if (lane == 0) {
            partial[step & 1][threadIdx.x >> 5] = static_cast<uint64_t>(top) << 32 | first;
        }
        __syncthreads();
        const uint64_t mine = lane < warps ? partial[step & 1][lane] : 0xffffffffu;
        const uint32_t key = static_cast<uint32_t>(mine >> 32);
        top = __reduce_max_sync(0xffffffffu, key);
        first = __reduce_min_sync(0xffffffffu, key == top ? static_cast<uint32_t>(mine) : 0xffffffffu);
        value = (value ^ first) + 1u;
#else
        __syncthreads();
        value += lane + warps + static_cast<uint32_t>(partial[step & 1][0]);
#endif
    }
    out[threadIdx.x] = value;
}

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
