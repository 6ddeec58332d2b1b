// Test only: blocks that start late or never, in the emulation of the kernels. The kernel's source is part of this one, which
// stands for it in the emulated libraries; check_waiting() prints one line for every check that fails.
#include "../../../graphs/ops/select_tokens/kernel.cu"

#include <cstdio>

namespace {

using namespace btp;

constexpr int kTokens = 200;
constexpr int kKeep = 60;

struct Example {
    BtpSelect select{1, kTokens, kKeep, 20, 15, 40, 50, 3, BTP_FLOAT32, BTP_FARTHEST, 0};
    std::vector<float> scores, similarity;
    std::vector<int32_t> seeds{7, 70, 170}, indices;
    std::vector<uint4> workspace;

    explicit Example(int32_t rule)
    {
        select.diversity_rule = rule;
        std::mt19937 random(3);
        for (int i = 0; i < kTokens + kTokens * kTokens; ++i) {
            (i < kTokens ? scores : similarity).push_back(static_cast<float>(random() % 1000) / 1000.0f);
        }
        workspace.resize(btp_select_tokens_workspace(&select) / sizeof(uint4) + 1);
    }

    int32_t whole() { return call(0, [](Survey&) {}); }

    // The second launch with so many blocks (0: all that btp_select_tokens starts), after `disturb` has changed what it counts in.
    template <typename Disturb>
    int32_t call(unsigned blocks, Disturb disturb)
    {
        indices.assign(kKeep, -1);
        Survey survey{select, workspace.data()};
        const Call<float> given{select, scores.data(), similarity.data(), seeds.data(), survey, indices.data(), nullptr};
        if (select.diversity_rule == BTP_COVERAGE) {
            launch_survey<true, true>(given);
            disturb(survey);
            return second<ByGain<Block<4, true>>>(given, survey.levels, survey.stride, blocks);
        }
        launch_survey<true, false>(given);
        disturb(survey);
        return second<ByDistance<Block<4, true>, float>>(given, given.similarity, kTokens, blocks);
    }

    template <typename Rule>
    int32_t second(const Call<float>& given, const typename Rule::Element* rows, size_t stride, unsigned blocks)
    {
        using B = Block<4, true>;
        const auto kernel = select_tokens<B, Rule>;
        const int parts = base_parts(select);
        const unsigned all = static_cast<unsigned>(parts) + 1;
        BTP_LAUNCH(kernel, blocks == 0 ? all : blocks, 64, sizeof(B::Shared), nullptr, given.select, parts, rows, stride,
                   given.scores, given.seeds, given.survey, given.indices);
        return cuda_status(cudaGetLastError());
    }
};

int failures = 0;

void check(bool holds, const char* what)
{
    if (!holds) {
        ++failures;
        std::printf("FAILED: %s", what);
    }
}

}  // namespace

// 0: every check holds.
extern "C" int check_waiting()
{
    for (const int32_t rule : {BTP_FARTHEST, BTP_COVERAGE}) {
        Example example(rule);
        check(example.whole() == BTP_OK && example.indices[0] >= 0, "the whole launch selects\n");
        const std::vector<int32_t> wanted = example.indices;
        check(btp_select_tokens(&example.select, example.scores.data(), example.similarity.data(), example.seeds.data(),
                                example.indices.data(), example.workspace.data(),
                                example.workspace.size() * sizeof(uint4), nullptr) == BTP_OK
                  && example.indices == wanted, "the example is launched as the operator launches\n");
        for (int turn = 0; turn < 5; ++turn) {  // with one to three blocks at once
            check(example.whole() == BTP_OK && example.indices == wanted, "blocks in any order select the same\n");
        }
        check(example.call(1, [](Survey&) {}) == BTP_OK && example.indices == wanted,
              "the row's block starts first, and needs no other one\n");
        const int32_t stuck = example.call(0, [](Survey& survey) { *survey.drawn = 2; });
        check(stuck == BTP_CUDA + cudaErrorLaunchFailure, "parts that nobody finishes are an error, not a hang\n");
        const int32_t shared = example.call(0, [](Survey& survey) { *survey.ticket = 3; });
        check(shared == BTP_CUDA + cudaErrorLaunchFailure, "tickets beyond the launch's blocks are an error\n");
        check(example.whole() == BTP_OK && example.indices == wanted, "the next call is as good as new\n");
    }
    return failures == 0 ? 0 : 1;
}
