// Numbers of rows, scales and results, stored as float32 or as float16 (uint16_t), as the float32 that they are computed in
// (AVX-512). A result is rounded once, when it is written: to the nearest, halves to even.
#pragma once

#include "../common/cpu_loops.h"

#ifdef BTP_X86
#include <cstddef>
#include <cstdint>

BTP_QUIET_INTRINSICS

namespace btp {

// Whether a row of x of this many bytes stays in the first cache while weights pass through it (measured: 8 KiB of 32 do).
inline bool stays_near(size_t bytes) { return bytes <= 8192; }

BTP_AVX512 BTP_INLINE float float_at(const float* stored) { return *stored; }
BTP_AVX512 BTP_INLINE float float_at(const uint16_t* stored) { return _cvtsh_ss(*stored); }

// Sixteen, or those that `some` names; zeros in place of the others, which are not read.
BTP_AVX512 BTP_INLINE __m512 floats_at(const float* stored) { return _mm512_loadu_ps(stored); }
BTP_AVX512 BTP_INLINE __m512 floats_at(const float* stored, __mmask16 some) { return _mm512_maskz_loadu_ps(some, stored); }
BTP_AVX512 BTP_INLINE __m512 floats_at(const uint16_t* stored)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored)));
}
BTP_AVX512 BTP_INLINE __m512 floats_at(const uint16_t* stored, __mmask16 some)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, stored));
}

BTP_AVX512 BTP_INLINE void put_float(float* to, float value) { *to = value; }
BTP_AVX512 BTP_INLINE void put_float(uint16_t* to, float value) { *to = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

// Those of sixteen that `some` names.
BTP_AVX512 BTP_INLINE void put_floats(float* to, __mmask16 some, __m512 values) { _mm512_mask_storeu_ps(to, some, values); }
BTP_AVX512 BTP_INLINE void put_floats(uint16_t* to, __mmask16 some, __m512 values)
{
    _mm256_mask_storeu_epi16(to, some, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace btp

BTP_QUIET_END
#endif
