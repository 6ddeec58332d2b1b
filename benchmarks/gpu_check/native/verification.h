// Commands that compare: each call once, thousands of replays, two streams at once.
#pragma once

#include <cuda_profiler_api.h>

#include "work.h"

namespace harness {

constexpr int kReplays = 3;  // of each verified call: an answer that changes from run to run is a race

// "" or how the call differs: launched once, and replayed from a graph with another poison each time.
inline std::string differs(const Run& run, cudaStream_t stream, bool plain, bool clean = false)
{
    if (!clean) {
        run.poison(stream, 0xFF);
    }
    run.launch(stream);
    CHECK(cudaStreamSynchronize(stream));
    std::string problem = run.compare();
    if (plain || !problem.empty()) {
        return problem;
    }
    const Graph graph([&run](cudaStream_t captured) { run.launch(captured); });
    for (int replay = 0; replay < kReplays && problem.empty(); ++replay) {
        run.poison(stream, replay);
        graph.launch(stream);
        CHECK(cudaStreamSynchronize(stream));
        problem = run.compare();
    }
    return problem.empty() ? "" : problem + " (replayed)";
}

inline std::string verify(const Work& work, const Options& given, bool& held)
{
    const Stream stream;
    std::vector<std::string> failed = work.refused;
    for (const Call* call : work.calls) {
        if (!work.library.problem(*call).empty()) {
            continue;
        }
        const Run run(work.library, work.file, *call);
        const std::string problem = differs(run, stream.handle, given.plain, given.clean);
        if (!problem.empty()) {
            failed.push_back(quoted(problem));
        }
    }
    held = failed.empty();
    Object result;
    result.value("calls", work.calls.size());
    result.value("launches", static_cast<double>(work.calls.size()) * (given.plain ? 1 : 1 + kReplays));
    return result.raw("failed", list(failed)).str();
}

inline std::string once(const Work& work)
{
    const Stream stream;
    for (const Call* call : work.calls) {
        const Run run(work.library, work.file, *call);
        CHECK(cudaProfilerStart());  // so that a profiler sees nothing of what makes the data
        run.launch(stream.handle);
        CHECK(cudaStreamSynchronize(stream.handle));
        CHECK(cudaProfilerStop());
    }
    return Object().value("calls", work.calls.size()).str();
}

// Four replays in a graph, each with another poison, that count on the device what differs from the verified output.
class Replays {
public:
    explicit Replays(const Run& run)
        : wrong_(8), graph_([&run, this](cudaStream_t stream) {
              for (const int byte : {0x00, 0xFF, 0xA5, 0x5A}) {
                  run.poison(stream, byte);
                  run.launch(stream);
                  run.count_differences(stream, static_cast<unsigned long long*>(wrong_.address));
              }
          })
    {
        CHECK(cudaMemset(wrong_.address, 0, wrong_.bytes));
    }
    static constexpr int kEach = 4;

    void launch(cudaStream_t stream) const { graph_.launch(stream); }
    unsigned long long wrong() const
    {
        unsigned long long count = 0;
        CHECK(cudaMemcpy(&count, wrong_.address, 8, cudaMemcpyDeviceToHost));
        return count;
    }

private:
    Memory wrong_;
    Graph graph_;
};

// Launches until `count` replays or `seconds` are over; gives how many replays were made of each.
inline int drive(const std::vector<std::pair<const Replays*, cudaStream_t>>& all, int count, double seconds)
{
    const double end = now() + seconds;
    int done = 0;
    while (done < count && now() < end) {
        for (int graph = 0; graph < 10 && done < count; ++graph, done += Replays::kEach) {
            for (const auto& [replays, stream] : all) {
                replays->launch(stream);
            }
        }
        for (const auto& [replays, stream] : all) {
            CHECK(cudaStreamSynchronize(stream));
        }
    }
    return done;
}

// A call that is replayed, and what came of it.
struct Replayed {
    Replayed(const Work& work, const Call& call, cudaStream_t stream)
        : run(work.library, work.file, call), problem(differs(run, stream, true)), replays(run)
    {
    }

    Run run;
    std::string problem;
    Replays replays;
    int done = 0;
    double seconds = 0;
};

// In rounds, each of which shares out the time that is left among the calls that are not done: short ones leave theirs to
// long ones.
inline std::string replay(const Work& work, const Options& given, bool& held)
{
    const Stream stream;
    std::vector<std::unique_ptr<Replayed>> all;
    for (const Call* call : work.calls) {
        all.push_back(std::make_unique<Replayed>(work, *call, stream.handle));
    }
    const auto open = [&given](const std::unique_ptr<Replayed>& one) { return one->done < given.count; };
    const double end = now() + given.seconds;
    while (now() < end && std::any_of(all.begin(), all.end(), open)) {
        auto left = std::count_if(all.begin(), all.end(), open);
        for (const auto& one : all) {
            if (open(one)) {
                const double start = now();
                const double share = std::max(0.0, end - start) / static_cast<double>(left--);
                one->done += drive({{&one->replays, stream.handle}}, given.count - one->done, share);
                one->seconds += now() - start;
            }
        }
    }
    std::vector<std::string> rows;
    for (const auto& one : all) {
        const auto wrong = static_cast<double>(one->replays.wrong());
        held = held && one->problem.empty() && wrong == 0;
        Object row;
        row.text("name", one->run.call.name).value("replays", one->done).value("wrong_bytes", wrong);
        rows.push_back(row.value("seconds", one->seconds).text("problem", one->problem).str());
    }
    return Object().raw("rows", list(rows)).str();
}

inline std::string streams(const Work& work, const Options& given, bool& held)
{
    std::vector<std::string> rows;
    for (size_t first = 0; first < work.calls.size(); ++first) {
        const Call &a = *work.calls[first], &b = *work.calls[(first + 1) % work.calls.size()];
        const Stream left, right;
        const auto of_a = std::make_shared<Run>(work.library, work.file, a);
        const Run of_b(work.library, work.file, b), twin(work.library, work.file, a, of_a);
        std::string problem = differs(*of_a, left.handle, true);
        problem += differs(of_b, right.handle, true) + differs(twin, right.handle, true);
        const Replays one(*of_a), other(of_b), same(twin);
        const int mixed = drive({{&one, left.handle}, {&other, right.handle}}, given.count, given.seconds);
        const int equal = drive({{&one, left.handle}, {&same, right.handle}}, given.count, given.seconds);
        const auto wrong = static_cast<double>(one.wrong() + other.wrong() + same.wrong());
        held = held && problem.empty() && wrong == 0;
        Object row;
        row.text("name", a.name + " beside " + b.name + " and beside itself").value("replays", mixed + equal);
        rows.push_back(row.value("wrong_bytes", wrong).text("problem", problem).str());
    }
    return Object().raw("rows", list(rows)).str();
}

}  // namespace harness
