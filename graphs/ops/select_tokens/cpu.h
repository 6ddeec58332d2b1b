// BtpSelectTokens on the CPU, one batch row. The rule numbers are those of the operator's definition.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace btp {

// scores [V], similarity [V,V] float32 or float16 as select.similarity says (or null), seeds [m] (or null),
// indices [k] ascending. The sizes must keep the rules (rules.h); seeds outside [0,V) are skipped.
void select_tokens_cpu(const BtpSelect& select, const float* scores, const void* similarity, const int32_t* seeds,
                       int32_t* indices);

}  // namespace btp
