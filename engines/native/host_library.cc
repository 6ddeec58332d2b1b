// btp_host: what is done for each token beside the engines, on any processor. It needs nothing but the C library.
//
// Choosing a token: the logits' weights are whole numbers (token_weights.h), whose sums are exact in any order, so a token
// is drawn by a definition and not by roundings. Most tokens need not be weighed: the largest logit of a chunk bounds what
// all of it weighs. Where that could change the choice, the rest is weighed too.
#include <cmath>
#include <new>
#include <vector>

#include "token_weights.h"

#define BTP_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int32_t kNotFinite = -1, kNoMemory = -2, kUncertain = -3;
constexpr uint32_t kNear = 1u << 10;  // chunks with tokens of this weight are weighed at first: e^-13.9 of the largest's

// The last logits are followed by minus infinities up to a whole chunk.
struct Logits {
    const float* values;
    size_t count, whole;
    float rest[btp::kChunk];
    float largest, scale;

    Logits(const float* given, size_t given_count, float given_scale)
        : values(given), count(given_count), whole(given_count / btp::kChunk), largest(-INFINITY), scale(given_scale)
    {
        for (size_t i = 0; i < btp::kChunk; ++i) {
            const size_t place = whole * btp::kChunk + i;
            rest[i] = place < count ? values[place] : -INFINITY;
        }
    }
    size_t chunks() const { return whole + 1; }
    const float* chunk(size_t number) const { return number < whole ? values + number * btp::kChunk : rest; }
};

// What is kept of one call for the next, so that nothing is allocated for each token.
struct Room {
    std::vector<float> maxima;       // of each chunk
    std::vector<uint32_t> heaviest;  // of each chunk, what none of its tokens weighs more than
    std::vector<uint64_t> sums;      // of each chunk, what its tokens weigh together; 0 where they are not weighed
    std::vector<int32_t> ids;        // tokens that may be among the likeliest, in rising order
    std::vector<uint32_t> weights;   // of these
    size_t found;                    // how many these are; the vectors keep their size
};

// What all tokens weigh together: from `known` to `known + missing`.
struct Total {
    uint64_t known, missing;

    uint64_t most() const { return known + missing; }
};

// Fills room.maxima and logits.largest. Returns whether that is a finite number, and no logit NaN.
bool find_largest(Logits& logits, Room& room)
{
    room.maxima.assign((logits.chunks() + btp::kChunk - 1) / btp::kChunk * btp::kChunk, -INFINITY);
    bool nan = btp::find_maxima(logits.values, logits.whole, room.maxima.data());
    nan |= btp::find_maxima(logits.rest, 1, room.maxima.data() + logits.whole);
    for (const float most : room.maxima) {
        logits.largest = most > logits.largest ? most : logits.largest;
    }
    return !nan && std::isfinite(logits.largest);
}

// Fills room.heaviest. A token can weigh a little more than one whose logit is larger: by 9e-8 of it in one of 10,000
// places, found by trying every float32 from 0 to -32.
void bound_chunks(const Logits& logits, Room& room)
{
    room.heaviest.resize(room.maxima.size());
    for (size_t first = 0; first < room.maxima.size(); first += btp::kChunk) {
        btp::weigh_chunk(room.maxima.data() + first, logits.largest, logits.scale, room.heaviest.data() + first);
    }
    for (uint32_t& weight : room.heaviest) {
        weight += (weight >> 20) + 1;
    }
    room.sums.assign(logits.chunks(), 0);
}

// Weighs the chunks whose heaviest token may weigh `least`.
Total weigh(const Logits& logits, uint32_t least, Room& room)
{
    btp::sum_chunks(logits.values, logits.whole, logits.largest, logits.scale, room.heaviest.data(), least, room.sums.data());
    btp::sum_chunks(logits.rest, 1, logits.largest, logits.scale, room.heaviest.data() + logits.whole, least,
                    room.sums.data() + logits.whole);
    Total total = {0, 0};
    for (size_t chunk = 0; chunk < logits.chunks(); ++chunk) {
        total.known += room.sums[chunk];
        total.missing += room.heaviest[chunk] < least ? room.heaviest[chunk] * uint64_t{btp::kChunk} : 0;
    }
    return total;
}

// The first token up to which all weigh more than `share` of the total; kUncertain if missing tokens may change it.
int32_t draw(const Logits& logits, Total total, double share, const Room& room)
{
    const auto least = static_cast<uint64_t>(share * static_cast<double>(total.known));
    const auto most = static_cast<uint64_t>(share * static_cast<double>(total.most()));
    uint64_t before = 0;
    size_t chunk = 0;
    while (chunk < logits.chunks() && before + room.sums[chunk] <= most) {
        before += room.sums[chunk++];
    }
    if (chunk == logits.chunks()) {
        return kUncertain;
    }
    uint32_t weights[btp::kChunk];
    btp::weigh_chunk(logits.chunk(chunk), logits.largest, logits.scale, weights);
    size_t place = 0;
    while (before + weights[place] <= most) {
        before += weights[place++];
    }
    return before + total.missing <= least ? static_cast<int32_t>(chunk * btp::kChunk + place) : kUncertain;
}

// Fills room.ids and room.weights with the tokens that weigh at least `least`; returns what they weigh together.
uint64_t collect(const Logits& logits, uint32_t least, Room& room)
{
    room.ids.resize(logits.chunks() * btp::kChunk);
    room.weights.resize(room.ids.size());
    room.found = 0;
    for (size_t chunk = 0; chunk < logits.chunks(); ++chunk) {
        if (room.heaviest[chunk] < least) {
            continue;
        }
        uint32_t weights[btp::kChunk];
        btp::weigh_chunk(logits.chunk(chunk), logits.largest, logits.scale, weights);
        for (uint64_t left = btp::at_least(weights, least); left != 0; left &= left - 1) {
            const int place = __builtin_ctzll(left);
            room.ids[room.found] = static_cast<int32_t>(chunk * btp::kChunk) + place;
            room.weights[room.found++] = weights[place];
        }
    }
    return btp::sum_from(room.weights.data(), room.found, least);
}

// The same among the fewest and likeliest tokens, of equal ones those of lower ids, that weigh `top_p` of the total.
int32_t draw_likely(const Logits& logits, Total total, double top_p, double share, Room& room)
{
    const auto wanted = static_cast<uint64_t>(std::ceil(top_p * static_cast<double>(total.known)));
    const auto at_most = static_cast<uint64_t>(std::ceil(top_p * static_cast<double>(total.most())));
    for (const uint32_t least : {1u << 20, 1u << 10, 1u}) {  // nearly always few tokens do
        if (total.missing != 0 && least < kNear) {
            return kUncertain;
        }
        if (collect(logits, least, room) >= at_most) {
            break;
        }
    }
    uint32_t lightest = 0;  // the largest weight from which on all together weigh as much as is wanted
    for (uint32_t bit = 1u << 30; bit != 0; bit >>= 1) {
        lightest |= btp::sum_from(room.weights.data(), room.found, lightest | bit) >= wanted ? bit : 0;
    }
    const uint64_t above = btp::sum_from(room.weights.data(), room.found, lightest + 1);
    uint64_t equals = (wanted - above + lightest - 1) / lightest;
    const uint64_t kept = above + equals * lightest;
    if (kept < at_most) {
        return kUncertain;
    }
    const auto drawn = static_cast<uint64_t>(share * static_cast<double>(kept));
    uint64_t sum = 0;
    size_t place = 0;
    for (;; ++place) {
        const uint32_t weight = room.weights[place];
        if (weight < lightest || (weight == lightest && equals == 0)) {
            continue;
        }
        equals -= weight == lightest ? 1 : 0;
        sum += weight;
        if (sum > drawn) {
            return room.ids[place];
        }
    }
}

int32_t choose(Logits& logits, double top_p, double share, Room& room)
{
    if (!find_largest(logits, room)) {
        return kNotFinite;
    }
    bound_chunks(logits, room);
    int32_t token = kUncertain;
    for (const uint32_t least : {kNear, 0u}) {
        const Total total = weigh(logits, least, room);
        token = top_p < 1 ? draw_likely(logits, total, top_p, share, room) : draw(logits, total, share, room);
        if (token != kUncertain) {
            break;
        }
    }
    return token;
}

}  // namespace

BTP_EXPORT int32_t btp_host_version() { return 8; }

// The token that `share`, from 0 up to but not 1, draws from `count` logits, 2^22 at most, among the likeliest that have
// `top_p` of the total weight. `scale`: log2(e) / temperature, finite and positive. kNotFinite if the largest logit is not
// finite or one is NaN, kNoMemory.
BTP_EXPORT int32_t btp_host_choose(const float* logits, int32_t count, float scale, double top_p, double share)
{
    static thread_local Room room;
    try {
        Logits given(logits, static_cast<size_t>(count), scale);
        return choose(given, top_p, share, room);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}
