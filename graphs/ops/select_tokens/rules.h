// The rules that sizes and attributes of BtpSelectTokens keep, with the message for each breach. Shared by the CUDA
// kernel, the TensorRT plugin and the ONNX Runtime operator, so that all refuse the same things in the same words.
#pragma once

#include <stdint.h>

#include <string>

#include "kernel.h"

namespace btp {

// What the STRING attribute diversity_rule may be, in the order of BTP_FARTHEST and BTP_COVERAGE; null behind the last.
inline constexpr const char* kDiversityRules[] = {"farthest", "coverage", nullptr};

constexpr int32_t kUnknown = -1;  // a size that is not known yet; what depends on it is checked when it is

// Empty if the selection can be run, otherwise one line "BtpSelectTokens: <name> is <got>, wanted <wanted>".
inline std::string select_problem(const BtpSelect& s)
{
    const auto wrong = [](const char* name, int64_t got, const std::string& wanted) {
        return "BtpSelectTokens: " + std::string(name) + " is " + std::to_string(got) + ", wanted " + wanted;
    };
    const bool known = s.tokens != kUnknown;
    const auto between = [&s, known](int64_t low) {
        return known ? std::to_string(low) + " to " + std::to_string(s.tokens) + " (the number of tokens)"
                     : "at least " + std::to_string(low);
    };
    const auto outside = [&s, known](int32_t value, int32_t low) {
        return value < low || (known && value > s.tokens);
    };
    if (s.batch < 1 && s.batch != kUnknown) {
        return wrong("batch", s.batch, "at least 1");
    }
    if (s.tokens < 1 && known) {
        return wrong("the number of tokens", s.tokens, "at least 1");
    }
    if (outside(s.keep, 1)) {
        return wrong("keep", s.keep, between(1));
    }
    if (outside(s.attention_quota, 0)) {
        return wrong("attention_quota", s.attention_quota, between(0));
    }
    if (outside(s.diversity_quota, 0)) {
        return wrong("diversity_quota", s.diversity_quota, between(0));
    }
    if (s.pool < s.attention_quota) {
        return wrong("pool", s.pool, "at least attention_quota = " + std::to_string(s.attention_quota));
    }
    if (s.boundary < 0) {
        return wrong("boundary", s.boundary, "at least 0");
    }
    if (s.similarity < BTP_NO_SIMILARITY || s.similarity > BTP_FLOAT16) {
        return wrong("the type of similarity", s.similarity, "none, float32 or float16");
    }
    if (s.diversity_rule != BTP_FARTHEST && s.diversity_rule != BTP_COVERAGE) {
        return wrong("diversity_rule", s.diversity_rule, "0 (\"farthest\") or 1 (\"coverage\")");
    }
    if (s.weighted != 0 && s.weighted != 1) {
        return wrong("weighted", s.weighted, "0 or 1");
    }
    if (s.similarity == BTP_NO_SIMILARITY && s.diversity_quota > 0) {
        return wrong("diversity_quota", s.diversity_quota, "0, because there is no similarity");
    }
    if (s.similarity == BTP_NO_SIMILARITY && s.seeds > 0) {
        return wrong("the number of seeds", s.seeds, "0, because there is no similarity");
    }
    if (s.seeds < 0) {
        return wrong("the number of seeds", s.seeds, "at least 0");
    }
    return {};
}

}  // namespace btp
