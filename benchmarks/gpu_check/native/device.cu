// The program's own kernels: see device.h.
#include "device.h"

namespace harness {
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

template <typename T>
__global__ void gram_kernel(const int8_t* features, int tokens, int channels, float scale, T* out)
{
    const int column = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const size_t row = blockIdx.y;
    if (column < tokens) {
        const int8_t* const own = features + (static_cast<size_t>(blockIdx.z) * tokens) * channels;
        int sum = 0;
        for (int channel = 0; channel < channels; ++channel) {
            sum += own[row * channels + channel] * own[static_cast<size_t>(column) * channels + channel];
        }
        out[(static_cast<size_t>(blockIdx.z) * tokens + row) * tokens + column] = static_cast<T>(sum * scale);
    }
}

template <typename T>
cudaError_t launch_gram(const int8_t* features, int batch, int tokens, int channels, float scale, T* out)
{
    const dim3 grid((tokens + 255) / 256, tokens, batch);
    gram_kernel<<<grid, 256>>>(features, tokens, channels, scale, out);
    return cudaGetLastError();
}

template <typename T>
__global__ void patch_kernel(const int32_t* places, const float* values, int count, T* out)
{
    const int number = static_cast<int>(threadIdx.x);
    if (number < count) {
        out[places[number]] = static_cast<T>(values[number]);
    }
}

template <typename T>
cudaError_t launch_patch(const int32_t* places, const float* values, int count, T* out)
{
    patch_kernel<<<1, 1024>>>(places, values, count, out);
    return cudaGetLastError();
}

__global__ void count_wrong_kernel(const uint8_t* got, const uint8_t* wanted, size_t bytes, unsigned long long* wrong)
{
    const size_t place = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (place < bytes && got[place] != wanted[place]) {
        atomicAdd(wrong, 1ull);
    }
}

__global__ void note_multiprocessor(unsigned* seen)
{
    unsigned number;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(number));
    seen[number] = 1;
    const long long until = clock64() + 100000;  // long enough that one multiprocessor cannot do the work of all
    while (clock64() < until) {
    }
}

}  // namespace

cudaError_t probe_chase(const uint32_t* next, int steps, uint32_t* out, cudaStream_t stream)
{
    chase<<<1, 1, 0, stream>>>(next, steps, out);
    return cudaGetLastError();
}

cudaError_t probe_reduce(int steps, int threads, uint32_t* out, cudaStream_t stream)
{
    reduce<<<1, threads, 0, stream>>>(steps, out);
    return cudaGetLastError();
}

cudaError_t probe_launches(int count, cudaStream_t stream)
{
    for (int launch = 0; launch < count; ++launch) {
        nothing<<<1, 32, 0, stream>>>();
    }
    return cudaGetLastError();
}

cudaError_t make_gram(const int8_t* features, int batch, int tokens, int channels, float scale, float* out)
{
    return launch_gram(features, batch, tokens, channels, scale, out);
}

cudaError_t make_gram(const int8_t* features, int batch, int tokens, int channels, float scale, __half* out)
{
    return launch_gram(features, batch, tokens, channels, scale, out);
}

cudaError_t replace(const int32_t* places, const float* values, int count, float* out)
{
    return launch_patch(places, values, count, out);
}

cudaError_t replace(const int32_t* places, const float* values, int count, __half* out)
{
    return launch_patch(places, values, count, out);
}

cudaError_t count_wrong(const uint8_t* got, const uint8_t* wanted, size_t bytes, unsigned long long* wrong,
                        cudaStream_t stream)
{
    count_wrong_kernel<<<static_cast<unsigned>((bytes + 255) / 256), 256, 0, stream>>>(got, wanted, bytes, wrong);
    return cudaGetLastError();
}

cudaError_t note_multiprocessors(unsigned* seen, cudaStream_t stream)
{
    note_multiprocessor<<<2048, 1024, 0, stream>>>(seen);
    return cudaGetLastError();
}

}  // namespace harness
