// e^x of sixteen float32 numbers (AVX-512).
#pragma once

#include "cpu_loops.h"

#ifdef BTP_X86
#include <initializer_list>

BTP_QUIET_INTRINSICS

namespace btp {

// Within two units of the last place from -87 to 87; beyond them as there, so that nothing is denormal. NaN stays.
BTP_AVX512 BTP_INLINE __m512 exponential(__m512 x)
{
    // Of two numbers min and max give the second where one is NaN.
    const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(87.0f), x));
    const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)), 8);
    __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), bounded);  // ln 2 in two parts
    rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.9875691500e-4f);  // a polynomial for -ln 2 / 2 to ln 2 / 2 (Cephes, expf)
    for (const float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
    }
    sum = _mm512_fmadd_ps(sum, _mm512_mul_ps(rest, rest), _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(sum, power);
}

}  // namespace btp

BTP_QUIET_END
#endif
