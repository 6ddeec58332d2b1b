// Rules 2 and 4 where diversity_rule is "coverage": the next token is the one with the largest gain, lazily. The gain of a
// token only falls while others are selected, so what it was once is a bound; only the tokens that lead by their bound are
// summed again, and the first one that leads by its gain of this step is the pick. Which tokens are summed does not change it.
#pragma once

#include "block.cuh"
#include "survey.cuh"

namespace btp {

// Order of gain x weight; of a token, so never 0. Neither factor is negative or NaN, so the bits have the order of the floats.
BTP_DEVICE uint32_t gain_key(uint32_t gain, float weight)
{
    const float value = __fmul_rn(__int2float_rn(static_cast<int>(gain)), weight);
    return gain > 0 ? __float_as_uint(value) + 1u : 1u;
}

template <typename B>
struct ByGain {
    static constexpr int kPairs = B::kItems / 2;  // two neighbouring tokens a register
    using Element = uint16_t;                     // Survey::levels
    using Values = uint32_t[kPairs];
    using State = uint32_t[kPairs];
    static constexpr uint32_t kUnselected = 0;    // all of a State where nothing is selected
    static constexpr int kRows = 16 / B::kItems;  // read at once beside the steps, as many as registers hold
    static constexpr uint32_t kTogether = 16;     // warps that sum at once: more of them would wait for each other's rows

    const BtpSelect& select;
    const Row<uint16_t>& row;
    typename B::Shared& shared;
    State state = {};              // c of the tokens element(item); all of them lie in shared memory too
    uint32_t key[B::kItems] = {};  // of the tokens own(item): what the gain is at most; 0: selected or no token
    uint32_t fresh = 0;            // bit i: key[i] is the gain of this step
    uint32_t place = 0;            // of this warp among all by their best keys, 0 is the highest
    Exchange<B> exchange;

    BTP_DEVICE ByGain(const BtpSelect& select_, const Row<uint16_t>& row_, typename B::Shared& shared_)
        : select(select_), row(row_), shared(shared_)
    {
    }

    // Neighbouring tokens have similar gains; they belong to different warps, which can sum them at the same time.
    static BTP_DEVICE int own(int item) { return own(item, B::lane()); }
    static BTP_DEVICE int own(int item, int lane) { return (item * 32 + lane) * B::warps() + B::warp(); }

    static BTP_DEVICE void read(const Row<uint16_t>& row, int token, int, Values& values)
    {
#pragma unroll
        for (int first = 0; first < B::kItems; first += 4) {
            if (B::element(first) < static_cast<int>(row.stride)) {
                const auto four = *reinterpret_cast<const Unit<uint32_t, 2>*>(row.of(token) + B::element(first));
                values[first / 2] = four.value[0];
                values[first / 2 + 1] = four.value[1];
            }
        }
    }

    // state = the larger of it and the levels in a row.
    static BTP_DEVICE void approach(const Values& values, State& state)
    {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            state[pair] = __vmaxs2(state[pair], values[pair]);
        }
    }

    // base = the larger of it and the element of `state`.
    static BTP_DEVICE void merge(uint32_t* base, const State& state, int item)
    {
        atomicMax(base, state[item / 2] >> (item % 2 * 16) & 0xffffu);
    }

    BTP_DEVICE float weight(int token) const
    {
        const float score = select.weighted != 0 ? row.scores[token] : 1.0f;
        return score > 0.0f ? score : 0.0f;
    }

    BTP_DEVICE void start()
    {
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {
            const int token = own(item);
            key[item] = token < select.tokens ? gain_key(row.alone[token], weight(token)) : 0u;
        }
        fresh = ~0u;
        exchange.start(shared);
        show_state();
    }

    BTP_DEVICE int first() { return next(); }

    BTP_DEVICE int next()
    {
        for (;;) {
            Best best = best_of_warp();
            if (best.key != 0 && !best.fresh && place < kTogether) {
                const uint32_t now = gain_key(gain_of(best.token), weight(best.token));
#pragma unroll
                for (int item = 0; item < B::kItems; ++item) {
                    const bool it = own(item) == best.token;
                    key[item] = it ? now : key[item];
                    fresh |= it ? 1u << item : 0u;
                }
                best = best_of_warp();
            }
            uint32_t its = 0;
            uint32_t low = 0;
            exchange.meet(B::lane() == 0, best.key, best.low(), its, low);
            const bool better = its > best.key || (its == best.key && low > best.low());
            place = static_cast<uint32_t>(__popc(__ballot_sync(kAllLanes, better)));
            const uint32_t top = warp_max(its);
            low = warp_max(its == top ? low : 0u);
            if ((low & 1u) != 0) {
                return Best::token_of(low);
            }
        }
    }

    // Selects `token`: what it covers better is covered so from now on, and no gain is of this step.
    BTP_DEVICE void add(int token)
    {
        Values values = {};
        read(row, token, select.tokens, values);
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {
            key[item] = own(item) == token ? 0u : key[item];
        }
        approach(values, state);
        fresh = 0;
        show_state();
    }

    // The members are selected; base: see Survey.
    BTP_DEVICE void start_from(const uint32_t (&base)[B::kItems])
    {
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {
            state[item / 2] = __vmaxs2(state[item / 2], base[item] << (item % 2 * 16));
            const int token = own(item);
            key[item] = token < select.tokens && shared.member[token] == 0 ? key[item] : 0u;
        }
        fresh = 0;
        show_state();
    }

private:
    // A warp's token with the highest key, the lowest one of equals.
    struct Best {
        uint32_t key;
        int token;
        bool fresh;

        // Of equal keys the lower token has the larger one. Odd: the key is the gain of this step.
        BTP_DEVICE uint32_t low() const { return static_cast<uint32_t>(0xffff - token) << 1 | (fresh ? 1u : 0u); }
        static BTP_DEVICE int token_of(uint32_t low) { return 0xffff - static_cast<int>(low >> 1); }
    };

    BTP_DEVICE Best best_of_warp() const
    {
        uint32_t best = key[0];
        uint32_t at = 0;
#pragma unroll
        for (int item = 1; item < B::kItems; ++item) {
            at = key[item] > best ? static_cast<uint32_t>(item) : at;
            best = higher(best, key[item]);
        }
        const uint32_t top = warp_max(best);
        const uint32_t slot = warp_min(best == top ? at * 32 + static_cast<uint32_t>(B::lane()) : kNone);
        const bool is_fresh = B::lane() == static_cast<int>(slot & 31u) && (fresh >> (slot >> 5) & 1u) != 0;
        const int token = own(static_cast<int>(slot >> 5), static_cast<int>(slot & 31u));
        return {top, token, __ballot_sync(kAllLanes, is_fresh) != 0};
    }

    // The sum of max(s, c) - c over a token's row, by one warp.
    BTP_DEVICE uint32_t gain_of(int token) const
    {
        constexpr int kReads = 4;  // under way at once
        const auto* const levels = reinterpret_cast<const uint4*>(row.of(token));
        const auto* const covered = reinterpret_cast<const uint4*>(shared.steps.covered);
        const int units = static_cast<int>(row.stride) / 8;
        int gain = 0;
#pragma unroll 1
        for (int first = B::lane(); first < units; first += 32 * kReads) {
            uint4 level[kReads];
#pragma unroll
            for (int read = 0; read < kReads; ++read) {
                const int unit = first + 32 * read;
                level[read] = unit < units ? levels[unit] : uint4{0, 0, 0, 0};
            }
#pragma unroll
            for (int read = 0; read < kReads; ++read) {
                const int unit = first + 32 * read;
                const uint4 c = unit < units ? covered[unit] : uint4{0, 0, 0, 0};
                gain = add_gain(level[read].x, c.x, gain);
                gain = add_gain(level[read].y, c.y, gain);
                gain = add_gain(level[read].z, c.z, gain);
                gain = add_gain(level[read].w, c.w, gain);
            }
        }
        return warp_sum(static_cast<uint32_t>(gain));
    }

    // gain + max(s, c) - c for two tokens; both halves lie in 0 ... 32767.
    static BTP_DEVICE int add_gain(uint32_t s, uint32_t c, int gain)
    {
        constexpr int kPlus = 0x0101;   // two bytes 1
        constexpr int kMinus = 0xffff;  // two bytes -1
        return __dp2a_lo(static_cast<int>(c), kMinus, __dp2a_lo(static_cast<int>(__vmaxs2(s, c)), kPlus, gain));
    }

    // c for all threads. Every warp has passed the barrier of the last next(), so nobody reads the old one.
    BTP_DEVICE void show_state()
    {
#pragma unroll
        for (int first = 0; first < B::kItems; first += 4) {
            const Unit<uint32_t, 2> four{{state[first / 2], state[first / 2 + 1]}};
            *reinterpret_cast<Unit<uint32_t, 2>*>(&shared.steps.covered[B::element(first) / 2]) = four;
        }
        __syncthreads();
    }
};

}  // namespace btp
