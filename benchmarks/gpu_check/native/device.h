// The program's own kernels (device.cu), each behind a function that launches it and gives a CUDA error code. So the rest of
// the program is plain C++: nvcc takes three times as long for the same text in a .cu file.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace harness {

// Floors: the shortest dependent steps that the selection loop is made of.
cudaError_t probe_chase(const uint32_t* next, int steps, uint32_t* out, cudaStream_t stream);
cudaError_t probe_reduce(int steps, int threads, uint32_t* out, cudaStream_t stream);
cudaError_t probe_launches(int count, cudaStream_t stream);

// out [batch,tokens,tokens] = scale times the products of features [batch,tokens,channels].
cudaError_t make_gram(const int8_t* features, int batch, int tokens, int channels, float scale, float* out);
cudaError_t make_gram(const int8_t* features, int batch, int tokens, int channels, float scale, __half* out);

// out[places[i]] = values[i] for `count` i, 1024 at most.
cudaError_t replace(const int32_t* places, const float* values, int count, float* out);
cudaError_t replace(const int32_t* places, const float* values, int count, __half* out);

// Adds the number of bytes that differ to `wrong`; on the device, so that no copy comes between replays.
cudaError_t count_wrong(const uint8_t* got, const uint8_t* wanted, size_t bytes, unsigned long long* wrong,
                        cudaStream_t stream);

// seen[n] = 1 for each multiprocessor n that more blocks than fit on all of them run on.
cudaError_t note_multiprocessors(unsigned* seen, cudaStream_t stream);

}  // namespace harness
