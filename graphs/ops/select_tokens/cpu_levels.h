// What the coverage rule of BtpSelectTokens reads on the CPU: similarities as integers, 0 ... 32767, [V,V].
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../common/half.h"
#include "../common/cpu_loops.h"

namespace btp {

inline float as_float(float x) { return x; }
inline float as_float(uint16_t x) { return half_to_float(x); }

// n similarities as integers. Comparisons with NaN are false: it becomes 0.
template <typename T>
BTP_INLINE void levels_of_body(int16_t* __restrict levels, const T* __restrict given, int n)
{
    for (int i = 0; i < n; ++i) {
        const float value = as_float(given[i]);
        const float positive = value > 0.0f ? value : 0.0f;
        const float cut = positive < 1.0f ? positive : 1.0f;
        levels[i] = static_cast<int16_t>(static_cast<int32_t>(std::nearbyint(cut * 32767.0f)));
    }
}
BTP_FOR_PROCESSORS(void, levels_of, (int16_t* levels, const float* given, int n), (levels, given, n))
BTP_FOR_PROCESSORS(void, levels_of, (int16_t* levels, const uint16_t* given, int n), (levels, given, n))

}  // namespace btp
