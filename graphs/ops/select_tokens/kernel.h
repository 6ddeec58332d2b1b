// BtpSelectTokens on a CUDA device: plain C interface, no framework header.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../common/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { BTP_NO_SIMILARITY = 0, BTP_FLOAT32 = 1, BTP_FLOAT16 = 2 };
enum { BTP_FARTHEST = 0, BTP_COVERAGE = 1 };

// Sizes and attributes of one selection. Letters of the project: B batch, V image tokens, k tokens kept.
typedef struct BtpSelect {
    int32_t batch;            // B
    int32_t tokens;           // V, at most BTP_SELECT_MAX_TOKENS
    int32_t keep;             // k
    int32_t attention_quota;
    int32_t diversity_quota;
    int32_t pool;
    int32_t boundary;
    int32_t seeds;            // number of seeds, 0 without
    int32_t similarity;       // BTP_NO_SIMILARITY, BTP_FLOAT32 or BTP_FLOAT16
    int32_t diversity_rule;   // BTP_FARTHEST or BTP_COVERAGE
    int32_t weighted;         // 1: gains are multiplied by the scores (BTP_COVERAGE only)
} BtpSelect;

enum { BTP_SELECT_MAX_TOKENS = 8192 };

// Bytes of device memory that btp_select_tokens needs as workspace (16-byte aligned). 0 for sizes that break the rules.
BTP_API size_t btp_select_tokens_workspace(const BtpSelect* select);

// Why these sizes cannot be run, or NULL. The text belongs to the library, one per thread.
BTP_API const char* btp_select_tokens_problem(const BtpSelect* select);

// Puts two launches on `stream` (a cudaStream_t); neither allocates, synchronises nor reads device memory on the host, so
// they can be captured in a graph. Calls that may run at the same time need a workspace each.
//   scores [B,V] float32, similarity [B,V,V] of select->similarity (or NULL), seeds [m] int32 (or NULL; values outside
//   [0,V) are skipped), indices [B,k] int32 ascending. All are device pointers to dense row-major tensors.
BTP_API int32_t btp_select_tokens(const BtpSelect* select, const float* scores, const void* similarity, const int32_t* seeds,
                                  int32_t* indices, void* workspace, size_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
