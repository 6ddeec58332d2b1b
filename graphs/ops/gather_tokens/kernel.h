// BtpGatherTokens on a CUDA device: plain C interface, no framework header.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../common/status.h"

#ifdef __cplusplus
extern "C" {
#endif

// Sizes of one gather. Rows are plain bytes, so every element type is served.
typedef struct BtpGather {
    int32_t batch;      // B
    int32_t rows;       // S, rows of the input
    int32_t start;      // first image row
    int32_t count;      // image rows of the input
    int32_t kept;       // k, image rows of the output
    int64_t row_bytes;  // bytes of one row
} BtpGather;

// Why these sizes cannot be run, or NULL. The text belongs to the library, one per thread.
BTP_API const char* btp_gather_tokens_problem(const BtpGather* gather);

// Puts one launch on `stream` (a cudaStream_t): no allocation, no synchronisation, no host read.
//   tokens [B,S,...], indices [B,k] int32 in [0,count) (others are clamped, so that no access leaves the tensor),
//   output [B,S-count+k,...]. All are device pointers to dense row-major tensors; output must not overlap tokens.
BTP_API int32_t btp_gather_tokens(const BtpGather* gather, const void* tokens, const int32_t* indices, void* output,
                          void* stream);

#ifdef __cplusplus
}
#endif
