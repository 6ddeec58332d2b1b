// BtpSelectTokens on the CPU, one batch row. The rule numbers are those of the operator's definition.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "kernel.h"

namespace btp {

// Bytes that select_tokens_cpu works in.
size_t select_tokens_cpu_scratch(const BtpSelect& select);

// scores [V], similarity [V,V] float32 or float16 as select.similarity says (or null), seeds [m] (or null),
// indices [k] ascending. The sizes must keep the rules (rules.h); seeds outside [0,V) are skipped.
void select_tokens_cpu(const BtpSelect& select, const float* scores, const void* similarity, const int32_t* seeds,
                       void* scratch, int32_t* indices);

// The tokens' features [V,width], whose cosines are the similarity, after their mean is taken from them if centred.
struct TokenRows {
    const float* data;
    int width;
    bool centred;
};

// Runs a function for 0 to count - 1, on several threads where there are any.
using Parallel = std::function<void(int count, const std::function<void(int)>& task)>;

size_t select_rows_cpu_scratch(const BtpSelect& select, int width);

// Selects by coverage from features in place of a similarity, of which half is computed. norms [V]: of the features;
// they are the scores where `scores` is null. scratch is aligned to 64 bytes.
void select_rows_cpu(const BtpSelect& select, const TokenRows& rows, const float* scores, const int32_t* seeds,
                     const Parallel& parallel, void* scratch, int32_t* indices, float* norms);

}  // namespace btp
