// The codes of w as a lane of the tensor-core kernels reads and unpacks them. Step: 128 neighbouring k.
//
// mma.m16n8k16 takes w as its left factor: lane 4g+t holds values of rows g and g+8. Which k stand in which of the 16 places is
// free, as long as x follows; so in every step lane t takes k 32t to 32t+31 of both rows, 16 neighbouring bytes each, and
// word i of them (8 codes) is what it gives to two products:
//
//     product  places 2t, 2t+1     places 2t+8, 2t+9
//     2i       k 32t+8i+0, +1      k 32t+8i+2, +3
//     2i+1     k 32t+8i+4, +5      k 32t+8i+6, +7
//
// The x that belongs to it is 16 neighbouring bytes too. Nothing is repacked, and nothing is moved between lanes.
#pragma once

#include "../common/tensor_cores.h"
#include "kernel.h"

namespace btp {

constexpr int kStep = 128;

BTP_HOST_DEVICE int steps_of(int inputs) { return (inputs + kStep - 1) / kStep; }

// Device pointers of one call; the type of floats is known to the kernels.
struct LinearCall {
    BtpLinear sizes;
    int shift;  // log2 of the group
    const uint16_t* x;
    const unsigned char* qweight;
    const uint16_t* scales;
    const unsigned char* zeros;
    const uint16_t* bias;
    uint16_t* y;
};

// One lane's codes of one step, 2 kTiles rows: row j is 8j + g of the warp's rows. kSixteen: groups of 16, so that a lane's 32
// codes have two scales and rows are only 8-byte aligned; otherwise groups are 32 or more and all is one.
template <typename F, int kTiles, bool kSixteen>
struct Codes {
    static constexpr int kRows = 2 * kTiles;
    static constexpr int kGroups = kSixteen ? 2 : 1;

    uint4 words[kRows];
    uint16_t scales[kRows][kGroups];
    uint16_t zeros[kRows];  // a byte of two zeros, from the one that is wanted on

    // first: the warp's first row. Rows behind the last one read the last one, columns behind the last one are zeros.
    BTP_DEVICE void load(const LinearCall& call, int first, int step)
    {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const int k = step * kStep + lane % 4 * 32;
        const int groups = call.sizes.inputs >> call.shift;
        const int group = k >> call.shift;
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
            words[j] = uint4{0, 0, 0, 0};
            zeros[j] = 0x88;
            for (int i = 0; i < kGroups; ++i) {
                scales[j][i] = 0;
            }
        }
        if (k >= call.sizes.inputs) {
            return;
        }
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
            const int wanted = first + 8 * j + lane / 4;
            const auto row = static_cast<size_t>(wanted < call.sizes.outputs ? wanted : call.sizes.outputs - 1);
            const unsigned char* const codes = call.qweight + (row * static_cast<size_t>(call.sizes.inputs) + static_cast<size_t>(k)) / 2;
            const uint16_t* const scale = call.scales + row * static_cast<size_t>(groups) + group;
            if (kSixteen) {
                const bool both = k + 16 < call.sizes.inputs;
                const uint2 low = load_once(reinterpret_cast<const uint2*>(codes));
                const uint2 high = both ? load_once(reinterpret_cast<const uint2*>(codes) + 1) : uint2{0, 0};
                words[j] = uint4{low.x, low.y, high.x, high.y};
                scales[j][kGroups - 1] = both ? scale[1] : uint16_t{0};
            } else {
                words[j] = load_once(reinterpret_cast<const uint4*>(codes));
            }
            scales[j][0] = scale[0];
            if (call.zeros != nullptr) {
                const auto bytes = static_cast<size_t>((groups + 1) / 2);
                zeros[j] = static_cast<uint16_t>(call.zeros[row * bytes + static_cast<size_t>(group / 2)] >> (4 * (group & 1)));
            }
        }
    }

    // The scales and the negative zeros of all rows, twice in a register each: once a step, not once a word.
    struct Pairs {
        uint32_t scales[kRows][kGroups];
        uint32_t zeros[kRows][kGroups];
        uint32_t codes;  // what stands above a code
    };
    BTP_DEVICE Pairs pairs() const
    {
        Pairs made;
        made.codes = opaque(F::kCodes);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
#pragma unroll
            for (int i = 0; i < kGroups; ++i) {
                made.scales[j][i] = __byte_perm(scales[j][i], 0, 0x1010);
                made.zeros[j][i] = __byte_perm(static_cast<uint32_t>(zeros[j]) >> (4 * i) & 15u, 0, 0x1010) | F::kMinusCodes;
            }
        }
        return made;
    }

    // Word i of row j as four pairs of floats: (q - z) s, the difference exact, the product rounded once.
    BTP_DEVICE void unpack(const Pairs& of_rows, int j, int i, uint32_t (&w)[4]) const
    {
        const uint32_t scale = of_rows.scales[j][kSixteen ? i / 2 : 0], zero = of_rows.zeros[j][kSixteen ? i / 2 : 0];
        const uint32_t word = i == 0 ? words[j].x : i == 1 ? words[j].y : i == 2 ? words[j].z : words[j].w;
        const uint32_t odd = word >> 4;
#pragma unroll
        for (uint32_t byte = 0; byte < 4; ++byte) {
            // The low half gets the byte's low nibble, the high half its high one.
            const uint32_t both = __byte_perm(word, odd, byte * 0x0011u + (4 + byte) * 0x1100u);
            w[byte] = F::multiply(F::add(low_nibbles(both, of_rows.codes), zero), scale);
        }
    }
};

}  // namespace btp
