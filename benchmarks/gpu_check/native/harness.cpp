// Runs the kernels of libbtp_kernels on the GPU at hand without torch or Python: what `python -m benchmarks.gpu_check`
// starts, step by step. Prints one line of JSON; exit code 0 done, 1 a check did not hold, 2 usage, 3 no GPU.
//
//   harness COMMAND [--kernels LIB] [--cases FILE] [--before LIB] [--tag TAG | --only NAME] [--count N] [--seconds S]
//
//   ready    only what needs no GPU: reads the cases, finds and asks every function
//   facts    the device
//   verify   every call against the reference's output: launched, and (without --plain) replayed from a graph;
//            --clean leaves out the poison too, for tools that look for what nobody wrote
//   once     one launch of each call, for profilers
//   replay   --count replays of each call's graph, workspace and output poisoned before each, compared on the device;
//            --seconds for all calls together
//   streams  pairs of calls on two streams at once
//   green    verifies and times the calls on --count multiprocessors of the GPU
//   probe    latencies and bandwidth that the floors are made of
//   time     20 calls in one graph, median of --count graphs; with --before in turns with that library
#include <cstdio>

#include "timing.h"

namespace harness {
namespace {

std::string ready(const Work& work)
{
    Object result;
    result.value("calls", work.calls.size()).value("largest_workspace", work.bytes);
    return result.raw("refused", list(work.refused)).str();
}

std::string facts()
{
    cudaDeviceProp device{};
    int driver = 0, runtime = 0, clock = 0, memory_clock = 0;
    CHECK(cudaGetDeviceProperties(&device, 0));
    CHECK(cudaDriverGetVersion(&driver));
    CHECK(cudaRuntimeGetVersion(&runtime));
    CHECK(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0));
    CHECK(cudaDeviceGetAttribute(&memory_clock, cudaDevAttrMemoryClockRate, 0));
    Object result;
    result.text("gpu", device.name).raw("compute_capability", "[" + std::to_string(device.major) + ", " +
                                        std::to_string(device.minor) + "]");
    result.value("multiprocessors", device.multiProcessorCount).value("l2_bytes", device.l2CacheSize);
    result.value("memory_bytes", static_cast<double>(device.totalGlobalMem));
    result.value("clock_khz", clock).value("memory_clock_khz", memory_clock);
    return result.value("driver", driver).value("runtime", runtime).str();
}

std::string answer(const Options& given, bool& held)
{
    using Command = std::function<std::string(const Work&)>;
    const std::map<std::string, Command> on_calls = {
        {"ready", ready},
        {"once", once},
        {"verify", [&](const Work& work) { return verify(work, given, held); }},
        {"replay", [&](const Work& work) { return replay(work, given, held); }},
        {"streams", [&](const Work& work) { return streams(work, given, held); }},
        {"green", [&](const Work& work) { return green(work, given, held); }},
        {"time", [&](const Work& work) { return times(work, given, held); }},
    };
    if (given.command == "facts" || given.command == "probe") {
        require_gpu();
        return given.command == "facts" ? facts() : probe(given);
    }
    const auto found = on_calls.find(given.command);
    if (found == on_calls.end()) {
        throw std::invalid_argument("unknown command '" + given.command + "'");
    }
    const Work work(given);
    if (given.command != "ready") {
        require_gpu();
    }
    return found->second(work);
}

}  // namespace
}  // namespace harness

int main(int count, char** words)
{
    using harness::Object;
    try {
        bool held = true;
        const std::string json = harness::answer(harness::parse(count, words), held);
        std::printf("%s\n", json.c_str());
        return held ? 0 : 1;
    } catch (const harness::NoGpu& error) {
        std::printf("%s\n", Object().text("missing", error.what()).str().c_str());
        return 3;
    } catch (const std::invalid_argument& error) {
        std::printf("%s\n", Object().text("error", error.what()).str().c_str());
        return 2;
    } catch (const std::exception& error) {
        std::printf("%s\n", Object().text("error", error.what()).str().c_str());
        return 1;
    }
}
