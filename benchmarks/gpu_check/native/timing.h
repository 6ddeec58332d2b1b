// Commands that measure: latencies and bandwidth of the GPU, the calls on all of it and on a share.
#pragma once

#include <functional>

#include "device.h"
#include "green.h"
#include "verification.h"

namespace harness {

constexpr int kInGraph = 20;  // timed calls in one graph, so that what is measured is the GPU's time
constexpr int kSteps = 512;   // of a latency probe

// Median microseconds of what `enqueue` puts on the stream.
inline double median_us(cudaStream_t stream, int repeats, const std::function<void()>& enqueue)
{
    cudaEvent_t begin = nullptr, end = nullptr;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int repeat = -3; repeat < repeats; ++repeat) {
        float milliseconds = 0;
        CHECK(cudaEventRecord(begin, stream));
        enqueue();
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
        if (repeat >= 0) {
            times.push_back(milliseconds * 1e3f);
        }
    }
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
}

inline std::string green(const Work& work, const Options& given, bool& held)
{
    const GreenContext context(static_cast<unsigned>(given.count));
    std::vector<std::string> rows;
    int used = 0;
    try {
        used = multiprocessors_used(context.stream());
    } catch (const std::runtime_error&) {
        cudaGetLastError();
        context.make_current();
        used = multiprocessors_used(context.stream());
    }
    for (const Call* call : work.calls) {
        const Run run(work.library, work.file, *call);
        const std::string problem = differs(run, context.stream(), true);
        held = held && problem.empty();
        const double us = median_us(context.stream(), 20, [&] {
            for (int launch = 0; launch < kInGraph; ++launch) {
                run.launch(context.stream());
            }
        });
        rows.push_back(Object().text("name", call->name).value("us", us / kInGraph).text("problem", problem).str());
    }
    held = held && used <= static_cast<int>(context.given) + 2;  // on compute capability 9 two more may be shared
    Object result;
    result.value("multiprocessors_given", context.given).value("multiprocessors_used", used);
    return result.raw("rows", list(rows)).str();
}

inline std::string probe(const Options& given)
{
    const Stream stream;
    const int cells = 576 * 576;  // as many as a similarity of LLaVA-1.5 holds
    std::vector<uint32_t> next(cells);
    for (int cell = 0; cell < cells; ++cell) {
        next[cell] = static_cast<uint32_t>((cell + 104729) % cells);  // a prime: one cycle through all, far from each other
    }
    const Memory cycle(4 * cells), out(4096);
    CHECK(cudaMemcpy(cycle.address, next.data(), cycle.bytes, cudaMemcpyHostToDevice));
    auto* const target = static_cast<uint32_t*>(out.address);
    const auto timed = [&](const std::function<cudaError_t(cudaStream_t)>& launch) {
        const Graph graph([&](cudaStream_t captured) {
            for (int copy = 0; copy < kInGraph; ++copy) {
                CHECK(launch(captured));
            }
        });
        return median_us(stream.handle, given.count, [&] { graph.launch(stream.handle); }) / kInGraph;
    };
    Object result;
    result.value("two_launches_us", timed([](cudaStream_t s) { return probe_launches(2, s); }));
    const auto* const start = static_cast<const uint32_t*>(cycle.address);
    result.value("l2_read_ns", timed([&](cudaStream_t s) { return probe_chase(start, kSteps, target, s); }) * 1e3 / kSteps);
    for (const int threads : {32, 96, 160, 256, 512, 736, 1024}) {
        const double us = timed([&](cudaStream_t s) { return probe_reduce(kSteps, threads, target, s); });
        result.value("reduce_" + std::to_string(threads) + "_ns", us * 1e3 / kSteps);
    }
    const size_t large = size_t{1} << 30;
    const Memory from(large), to(large);
    CHECK(cudaMemset(from.address, 1, large));
    const double us = median_us(stream.handle, 10, [&] {
        CHECK(cudaMemcpyAsync(to.address, from.address, large, cudaMemcpyDeviceToDevice, stream.handle));
    });
    return result.value("copy_gb_per_s", 2.0 * large / us / 1e3).str();
}

// Null where none is named, or none that loads here: then `problem` says why.
inline std::unique_ptr<Library> earlier_kernels(const std::string& path, std::string& problem)
{
    try {
        return path.empty() ? nullptr : std::make_unique<Library>(path);
    } catch (const std::runtime_error& error) {
        problem = error.what();
        return nullptr;
    }
}

// Another version of an operator may not know the case, or not this GPU.
inline bool gives_the_same(const Run& old, cudaStream_t stream)
{
    try {
        return differs(old, stream, true).empty();
    } catch (const std::runtime_error&) {
        cudaGetLastError();
        return false;
    }
}

inline std::string times(const Work& work, const Options& given, bool& held)
{
    const Stream stream;
    std::string why_not_before;
    const std::unique_ptr<Library> before = earlier_kernels(given.before, why_not_before);
    std::vector<std::string> rows;
    for (const Call* call : work.calls) {
        const auto run = std::make_shared<Run>(work.library, work.file, *call);
        Object row;
        row.text("name", call->name);
        const auto measure = [&](const Run& one) {
            const Graph graph([&one](cudaStream_t captured) {
                for (int copy = 0; copy < kInGraph; ++copy) {
                    one.launch(captured);
                }
            });
            return median_us(stream.handle, given.count, [&] { graph.launch(stream.handle); }) / kInGraph;
        };
        const std::string problem = differs(*run, stream.handle, true);
        held = held && problem.empty();
        std::vector<std::string> us, earlier;
        if (before != nullptr && before->find(call->function) != nullptr && before->problem(*call).empty()) {
            const Run old(*before, work.file, *call, run);
            if (gives_the_same(old, stream.handle)) {
                us.push_back(number(measure(*run)));
                earlier = {number(measure(old)), number(measure(old))};
            }
        }
        us.push_back(number(measure(*run)));
        rows.push_back(row.raw("us", list(us)).raw("before_us", list(earlier)).text("problem", problem).str());
    }
    return Object().raw("rows", list(rows)).text("before_problem", why_not_before).str();
}

}  // namespace harness
