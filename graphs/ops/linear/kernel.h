// BtpLinear on a CUDA device: plain C interface, no framework header.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../common/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { BTP_LINEAR_FLOAT32 = 1, BTP_LINEAR_FLOAT16 = 2, BTP_LINEAR_BFLOAT16 = 3 };

// Sizes and attributes of one product y [M,N] = x [M,K] w [N,K]^T + bias.
typedef struct BtpLinear {
    int32_t rows;      // M
    int32_t outputs;   // N
    int32_t inputs;    // K
    int32_t bits;      // 4
    int32_t group;     // codes of a row that share a scale: 16, 32, 64, 128 or 256; divides K
    int32_t type;      // of x, scales, bias and y: BTP_LINEAR_*
    int32_t zeros;     // 1: there are zeros; 0: each is 8
    int32_t bias;      // 1: there is a bias
} BtpLinear;

// Bytes of device memory that btp_linear needs as workspace (16-byte aligned), on whatever device; 0 for sizes that break
// the rules and for products that need none.
BTP_API size_t btp_linear_workspace(const BtpLinear* linear);

// Why these sizes cannot be run, or NULL. The text belongs to the library, one per thread.
BTP_API const char* btp_linear_problem(const BtpLinear* linear);

// Puts one launch on `stream` (a cudaStream_t), or two; neither allocates, synchronises nor reads device memory on the host,
// so they can be captured in a graph. The same inputs give the same bits on the same device. Calls that may run at the same time need a workspace each.
//   x [M,K], scales [N,K/group], bias [N] (or NULL), y [M,N] of linear->type; qweight [N,K/2] and zeros [N,ceil(K/group/2)]
//   (or NULL) bytes. All are device pointers to dense row-major tensors; x and qweight are 16-byte aligned.
BTP_API int32_t btp_linear(const BtpLinear* linear, const void* x, const void* qweight, const void* scales, const void* zeros,
                           const void* bias, void* y, void* workspace, size_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
