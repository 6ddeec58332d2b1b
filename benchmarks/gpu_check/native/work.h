// What a command works on: its options, and the calls that they name.
#pragma once

#include <algorithm>
#include <chrono>

#include "json.h"
#include "run.h"

namespace harness {

struct Options {
    std::string command, kernels, cases, before, tag, only;
    int count = 0;
    double seconds = 10.0;
    bool plain = false;  // launches only, no graphs
    bool clean = false;  // and no poison, which would count as written
};

struct NoGpu : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline Options parse(int count, char** words)
{
    Options given;
    given.command = count > 1 ? words[1] : "";
    for (int place = 2; place < count; ++place) {
        const std::string word = words[place];
        if (word == "--plain" || word == "--clean") {
            given.plain = true;
            given.clean = word == "--clean";
            continue;
        }
        const std::map<std::string, std::string*> texts = {
            {"--kernels", &given.kernels}, {"--cases", &given.cases}, {"--before", &given.before},
            {"--tag", &given.tag},         {"--only", &given.only},
        };
        if (place + 1 == count) {
            throw std::invalid_argument(word + " needs a value");
        }
        const std::string value = words[++place];
        if (texts.count(word) > 0) {
            *texts.at(word) = value;
        } else if (word == "--count") {
            given.count = std::stoi(value);
        } else if (word == "--seconds") {
            given.seconds = std::stod(value);
        } else {
            throw std::invalid_argument("unknown option " + word);
        }
    }
    return given;
}

inline double now()
{
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline void require_gpu()
{
    int count = 0, driver = 0;
    if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) {
        throw NoGpu("an NVIDIA GPU: there is no driver");
    }
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        cudaGetLastError();
        throw NoGpu(std::string("an NVIDIA GPU: cudaGetDeviceCount says: ") + cudaGetErrorString(error));
    }
}

// The calls that the options name, and the library that they go to.
struct Work {
    explicit Work(const Options& given) : file(read_cases(given.cases)), library(given.kernels)
    {
        for (const Call& call : file.calls) {
            const bool named = given.only.empty() || call.name == given.only;
            const bool tagged = given.tag.empty() || call.tags.count(given.tag) > 0;
            if (named && tagged) {
                calls.push_back(&call);
            }
        }
        if (calls.empty()) {
            throw std::invalid_argument("no call is named or tagged " + given.only + given.tag);
        }
        for (const Call* call : calls) {
            library.need(call->function);
            bytes = std::max(bytes, library.workspace(*call));
            const std::string problem = library.problem(*call);
            if (!problem.empty()) {
                refused.push_back(quoted(call->name + ": " + problem));
            }
        }
    }

    CaseFile file;
    Library library;
    std::vector<const Call*> calls;
    std::vector<std::string> refused;
    size_t bytes = 0;  // the largest workspace
};

}  // namespace harness
