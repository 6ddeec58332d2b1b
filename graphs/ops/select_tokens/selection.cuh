// The selection of one batch row: rules 1, 2, 3 and 4 of the operator's definition (schema.py).
//
// One block goes from pick to pick. What rule 4 wants to know of picks A and the seeds, how near every token is to them,
// does not depend on those steps: other blocks find it meanwhile (find_part).
//
// Rule: ByDistance or ByGain.
#pragma once

#include "by_distance.cuh"
#include "by_gain.cuh"

namespace btp {

constexpr int kPartTokens = 32;  // tokens whose rows one part of `base` is made from, at most

// Rule 4 looks at picks A and the seeds only where the base is not full without them.
inline int base_parts(const BtpSelect& select)
{
    const bool any = select.similarity != BTP_NO_SIMILARITY && (select.attention_quota > 0 || select.seeds > 0);
    return any && select.attention_quota < select.keep ? (select.tokens + kPartTokens - 1) / kPartTokens : 0;
}

// The next part of a batch row's base that no block works at; `parts` or more: there is none.
template <typename Shared, typename Row>
BTP_DEVICE int draw_part(const Row& row, Shared& shared)
{
    if (threadIdx.x == 0) {
        shared.word = atomicAdd(row.drawn, 1u);
    }
    __syncthreads();
    const int part = static_cast<int>(shared.word);
    __syncthreads();
    return part;
}

// Brings `state` nearer to those of kPartTokens tokens, beginning at part * kPartTokens, that are among picks A or the
// seeds; false if none is. (Rule 3 may cut some of them from the base; then the base is full and nobody asks.)
template <typename B, typename Rule, typename Row>
BTP_DEVICE bool approach_part(const BtpSelect& select, const Row& row, int part, typename B::Shared& shared,
                              typename Rule::State& state)
{
    constexpr int kRows = Rule::kRows;
    const int first = part * kPartTokens;
    if (threadIdx.x == 0) {
        shared.word = 0;
    }
    __syncthreads();
    const int own = first + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kPartTokens && own < select.tokens && select.attention_quota > 0
        && is_attention_pick(select, own, row.ahead[own], *row.below)) {
        atomicOr(&shared.word, 1u << threadIdx.x);
    }
    for (int seed = static_cast<int>(threadIdx.x); seed < select.seeds; seed += static_cast<int>(blockDim.x)) {
        const int token = row.seeds[seed];
        if (token >= first && token < lower(first + kPartTokens, select.tokens)) {
            atomicOr(&shared.word, 1u << (token - first));
        }
    }
    __syncthreads();
    const uint32_t chosen = shared.word;
    for (uint32_t left = chosen; left != 0;) {
        typename Rule::Values values[kRows] = {};
        int next = 0;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            next = left != 0 ? __ffs(static_cast<int>(left)) - 1 : next;  // none left: the last one again changes nothing
            left &= left - 1;
            Rule::read(row, first + next, select.tokens, values[i]);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            Rule::approach(values[i], state);
        }
    }
    __syncthreads();  // `word` is free again
    return chosen != 0;
}

// Finds one part of a batch row's base.
template <typename B, typename Rule, typename Row>
BTP_DEVICE void find_part(const BtpSelect& select, const Row& row, int parts, typename B::Shared& shared)
{
    const int part = draw_part(row, shared);
    if (part >= parts) {
        return;
    }
    typename Rule::State state;
    for (uint32_t& one : state) {
        one = Rule::kUnselected;
    }
    if (approach_part<B, Rule>(select, row, part, shared, state)) {
        for (int item = 0; item < B::kItems; ++item) {
            if (B::element(item) < select.tokens) {
                Rule::merge(&row.base[B::element(item)], state, item);
            }
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // the block's part can be seen before its count
        atomicAdd(row.finished, 1u);
    }
}

// The block that goes from pick to pick.
template <typename B, typename Rule>
struct Selection {
    using Row = btp::Row<typename Rule::Element>;

    const BtpSelect& select;
    const Row& row;
    typename B::Shared& shared;
    Rule rule;
    int kept = 0;  // tokens in the base so far

    BTP_DEVICE Selection(const BtpSelect& select_, const Row& row_, typename B::Shared& shared_)
        : select(select_), row(row_), shared(shared_), rule(select_, row_, shared_)
    {
    }

    BTP_DEVICE void run(int parts, int32_t* indices)
    {
        for (int item = 0; item < B::kItems; ++item) {
            shared.member[B::element(item)] = 0;
        }
        if (select.attention_quota > 0) {
            pick_attention();
        }
        if (row.matrix != nullptr) {
            rule.start();
            __syncthreads();
        }
        const int diverse = select.diversity_quota > 0 ? select.diversity_quota
                            : only_seeds(select) && !seed_names_token() ? select.keep : 0;
        if (diverse > 0) {
            pick_diverse(diverse);
        }
        if (select.seeds > 0) {
            pick_seeds();
        }
        if (kept < select.keep) {
            if (row.matrix == nullptr) {
                fill_by_order();
            } else {
                complete_base(parts);
                fill_by_rule();
            }
        }
        write_members(indices);
    }

    // Rule 1. The members that a thread writes here are read by others behind a later barrier only.
    BTP_DEVICE void pick_attention()
    {
        uint32_t ahead[B::kItems] = {};
        B::read_entries(row.ahead, select.tokens, ahead);
        const uint32_t below = *row.below;
        for (int item = 0; item < B::kItems; ++item) {
            const int token = B::element(item);
            if (token < select.tokens && is_attention_pick(select, token, ahead[item], below)) {
                shared.member[token] = 1;
            }
        }
        kept = lower(select.attention_quota, select.keep);
    }

    BTP_DEVICE bool seed_names_token()
    {
        return __syncthreads_or(names_token(select, row.seeds, threadIdx.x, blockDim.x)) != 0;
    }

    // Rule 2: selection from nothing; the picks that are new join the base, cut at keep.
    BTP_DEVICE void pick_diverse(int count)
    {
        uint16_t* const picks = shared.steps.picks;
        uint32_t at = shared_address(picks);
        const uint32_t last = at + 2 * static_cast<uint32_t>(count - 1);
        for (int token = rule.first();; at += 2, token = rule.next()) {
            if (threadIdx.x == 0) {
                store_shared(at, static_cast<uint16_t>(token));
            }
            rule.add(token);
            if (at == last) {
                break;
            }
        }
        __syncthreads();
        bool flag[B::kItems];
        for (int item = 0; item < B::kItems; ++item) {
            const int pick = B::element(item);
            flag[item] = pick < count && shared.member[picks[pick < count ? pick : 0]] == 0;
        }
        take(flag, select.keep, [picks](int pick) { return picks[pick]; });
    }

    // Rule 3, end: the seeds that are new, in their order, cut at keep. A seed named twice counts where it stands first.
    BTP_DEVICE void pick_seeds()
    {
        uint32_t* const owner = shared.list;
        for (int item = 0; item < B::kItems; ++item) {
            owner[B::element(item)] = kNone;
        }
        __syncthreads();
        for (int seed = static_cast<int>(threadIdx.x); seed < select.seeds; seed += static_cast<int>(blockDim.x)) {
            const int token = row.seeds[seed];
            if (token >= 0 && token < select.tokens) {
                atomicMin(&owner[token], static_cast<uint32_t>(seed));
            }
        }
        __syncthreads();
        bool flag[B::kItems];
        for (int first = 0; first < select.seeds; first += static_cast<int>(blockDim.x) * B::kItems) {
            for (int item = 0; item < B::kItems; ++item) {
                const int seed = first + B::element(item);
                const int token = row.seeds[lower(seed, select.seeds - 1)];
                const bool inside = seed < select.seeds && token >= 0 && token < select.tokens;
                const int at = inside ? token : 0;
                flag[item] = (owner[at] == static_cast<uint32_t>(seed)) & (shared.member[at] == 0) & inside;
            }
            take(flag, select.keep, [this, first](int e) { return static_cast<uint32_t>(row.seeds[first + e]); });
        }
    }

    // Rule 4 without similarity: the best of the order that are not held yet.
    BTP_DEVICE void fill_by_order()
    {
        uint32_t ahead[B::kItems] = {};
        B::read_entries(row.ahead, select.tokens, ahead);
        for (int item = 0; item < B::kItems; ++item) {
            const int token = B::element(item);
            if (token < select.tokens) {
                shared.list[place_of(ahead[item])] = static_cast<uint32_t>(token);
            }
        }
        __syncthreads();
        bool flag[B::kItems];
        for (int item = 0; item < B::kItems; ++item) {
            const int place = B::element(item);
            flag[item] = place < select.tokens && shared.member[shared.list[place < select.tokens ? place : 0]] == 0;
        }
        take(flag, select.keep, [this](int place) { return shared.list[place]; });
    }

    // The base is complete with picks A and the seeds. This block works too, until every part is drawn; then it waits for
    // those that other blocks have drawn, which run or are done. So it never waits for a block that has not started.
    BTP_DEVICE void complete_base(int parts)
    {
        int own = 0;
        for (int part = parts; parts > 0 && (part = draw_part(row, shared)) < parts; ++own) {
            approach_part<B, Rule>(select, row, part, shared, rule.state);
        }
        if (threadIdx.x == 0) {
            wait_until(row.finished, static_cast<uint32_t>(parts - own));
        }
        __syncthreads();
        uint32_t base[B::kItems];
        for (int item = 0; item < B::kItems; ++item) {
            base[item] = Rule::kUnselected;
            if (B::element(item) < select.tokens) {
                base[item] = __ldcg(&row.base[B::element(item)]);  // from L2, where the other blocks put it
            }
        }
        rule.start_from(base);
    }

    // Rule 4 with similarity: the rule goes on from the base.
    BTP_DEVICE void fill_by_rule()
    {
        for (;;) {
            const int token = rule.next();
            if (threadIdx.x == 0) {
                shared.member[token] = 1;
            }
            if (++kept == select.keep) {
                break;
            }
            rule.add(token);
        }
        __syncthreads();
    }

    // Lets the flagged elements join the base in element order until it holds `limit` tokens. Flags may be made from
    // `member` just before: rank() has a barrier between those reads and the writes here.
    template <typename Token>
    BTP_DEVICE void take(const bool (&flag)[B::kItems], int limit, Token token_of)
    {
        int rank[B::kItems];
        const int flagged = B::rank(flag, rank, shared);
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {
            if (flag[item] && kept + rank[item] < limit) {
                shared.member[token_of(B::element(item))] = 1;
            }
        }
        kept = lower(kept + flagged, limit);
        __syncthreads();
    }

    BTP_DEVICE void write_members(int32_t* indices)
    {
        bool flag[B::kItems];
        int rank[B::kItems];
        for (int item = 0; item < B::kItems; ++item) {
            flag[item] = shared.member[B::element(item)] != 0;
        }
        B::rank(flag, rank, shared);
        for (int item = 0; item < B::kItems; ++item) {
            if (flag[item]) {
                indices[rank[item]] = B::element(item);
            }
        }
    }
};

}  // namespace btp
