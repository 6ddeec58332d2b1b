// Rules 2 and 4 where diversity_rule is "farthest": the next token is the farthest from its nearest selected one.
#pragma once

#include "block.cuh"
#include "survey.cuh"

namespace btp {

// Reads this thread's part of the rows of one matrix. A row's address is one multiply and add away from the token's index.
template <typename B, typename T>
struct Reader {
    const char* own;  // in row 0; wide: behind the row's end its beginning, as what is read there is not used
    uint32_t pitch;   // bytes a row
    int tokens;

    BTP_DEVICE void start(const Row<T>& row, int tokens_)
    {
        tokens = tokens_;
        pitch = opaque(static_cast<uint32_t>(row.stride * sizeof(T)));
        const int element = B::kWide && B::element(0) < tokens ? B::element(0) : 0;
        own = opaque(reinterpret_cast<const char*>(row.matrix + element));
    }

    BTP_DEVICE void read(int token, T (&values)[B::kItems]) const
    {
        constexpr int kUnit = B::kWide ? 4 : 1;
        const char* const row = multiply_add(static_cast<uint32_t>(token), pitch, own);
#pragma unroll
        for (int first = 0; first < B::kItems; first += kUnit) {
            Unit<T, kUnit> unit{};
            if (B::kWide && first == 0) {
                unit = read_unit<T, kUnit>(row);
            } else if (B::element(first) < tokens) {
                unit = read_unit<T, kUnit>(row + (B::kWide ? first : B::element(first)) * sizeof(T));
            }
#pragma unroll
            for (int i = 0; i < kUnit; ++i) {
                values[first + i] = unit.value[i];
            }
        }
    }
};

template <typename B, typename T>
struct ByDistance {
    using Element = T;                              // of the rows that are read
    using Values = T[B::kItems];                    // this thread's part of a row
    using State = uint32_t[B::kItems];
    static constexpr uint32_t kUnselected = kNone;  // all of a State where nothing is selected
    static constexpr int kRows = B::kItems > 4 ? 1 : 4;  // read at once beside the steps, as many as registers hold

    const BtpSelect& select;
    const Row<T>& row;
    typename B::Shared& shared;
    State state = {};  // keys of the distances to the nearest selected token; 0: selected or no token
    Reader<B, T> reader;
    Exchange<B> exchange;

    static BTP_DEVICE void read(const Row<T>& row, int token, int tokens, Values& values)
    {
        B::read_row(row.of(token), tokens, values);
    }

    // state = the smaller of it and the distances in a row.
    static BTP_DEVICE void approach(const Values& values, State& state)
    {
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {
            state[item] = lower(state[item], distance_key(values[item]));
        }
    }

    // base = the smaller of it and the element of `state`.
    static BTP_DEVICE void merge(uint32_t* base, const State& state, int item) { atomicMin(base, state[item]); }

    BTP_DEVICE ByDistance(const BtpSelect& select_, const Row<T>& row_, typename B::Shared& shared_)
        : select(select_), row(row_), shared(shared_)
    {
    }

    BTP_DEVICE void start()
    {
        reader.start(row, select.tokens);
        exchange.start(shared);
        for (int item = 0; item < B::kItems; ++item) {
            state[item] = B::element(item) < select.tokens ? kUnselected : 0u;
        }
    }

    // From nothing: the token with the largest distance to its nearest other one.
    BTP_DEVICE int first()
    {
        uint32_t alone[B::kItems] = {};
        B::read_entries(row.alone, select.tokens, alone);
        return farthest(alone);
    }

    BTP_DEVICE int next() { return farthest(state); }

    // Selects `token`: its own distance becomes 0 and every other token may have come nearer.
    BTP_DEVICE void add(int token)
    {
        Values values;
        reader.read(token, values);
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {  // 0 is the lowest key and stays; done while the row is read
            state[item] = B::element(item) == token ? 0u : state[item];
        }
        approach(values, state);
    }

    // The members are selected; base: see Survey.
    BTP_DEVICE void start_from(const uint32_t (&base)[B::kItems])
    {
        for (int item = 0; item < B::kItems; ++item) {
            state[item] = shared.member[B::element(item)] != 0 ? 0u : lower(state[item], base[item]);
        }
    }

private:
    // The token with the largest key, the lowest one of equals.
    BTP_DEVICE int farthest(const uint32_t (&key)[B::kItems])
    {
        uint32_t best = key[0];
#pragma unroll
        for (int item = 1; item < B::kItems; ++item) {
            best = higher(key[item], best);
        }
        uint32_t top = warp_max(best);
        uint32_t token = 0;
#pragma unroll
        for (int item = B::kItems - 1; item >= 0; --item) {  // while the warp's maximum is under way
            token = key[item] == best ? static_cast<uint32_t>(B::element(item)) : token;
        }
        uint32_t its = 0;
        uint32_t candidate = 0;
        exchange.meet(B::lane() == B::first_lane(best == top), top, token, its, candidate);
        top = warp_max(its);
        return static_cast<int>(__shfl_sync(kAllLanes, candidate, B::first_lane(its == top)));
    }
};

}  // namespace btp
