// One call on the device: its memory, launching it through the C interface, poisoning and comparing what it leaves.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <array>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include "device.h"

namespace harness {

constexpr int kPoison = 0xA5;

inline void check(cudaError_t error, const char* what)
{
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
    }
}
#define CHECK(call) ::harness::check((call), #call)

struct Memory {
    explicit Memory(size_t bytes) : bytes(bytes) { CHECK(cudaMalloc(&address, bytes + 16)); }
    ~Memory() { cudaFree(address); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    void* address = nullptr;
    size_t bytes;
};

// -- the library ----------------------------------------------------------------------------------------------------------

template <size_t... I>
int32_t call_with(void* function, const std::vector<uintptr_t>& a, std::index_sequence<I...>)
{
    return reinterpret_cast<int32_t (*)(decltype((void)I, uintptr_t{})...)>(function)(a[I]...);
}

// Every argument of the C interface is as wide as a pointer, so a call needs only their number.
inline int32_t call_function(void* function, const std::vector<uintptr_t>& a)
{
    switch (a.size()) {
        case 4: return call_with(function, a, std::make_index_sequence<4>{});
        case 5: return call_with(function, a, std::make_index_sequence<5>{});
        case 6: return call_with(function, a, std::make_index_sequence<6>{});
        case 7: return call_with(function, a, std::make_index_sequence<7>{});
        case 8: return call_with(function, a, std::make_index_sequence<8>{});
        case 9: return call_with(function, a, std::make_index_sequence<9>{});
        case 10: return call_with(function, a, std::make_index_sequence<10>{});
        case 11: return call_with(function, a, std::make_index_sequence<11>{});
        case 12: return call_with(function, a, std::make_index_sequence<12>{});
        default: throw std::runtime_error("a call of " + std::to_string(a.size()) + " arguments");
    }
}

class Library {
public:
    explicit Library(const std::string& path) : path(path)
    {
        handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (handle_ == nullptr) {
            throw std::runtime_error(dlerror());
        }
    }

    void* find(const std::string& name) const { return dlsym(handle_, name.c_str()); }

    void* need(const std::string& name) const
    {
        void* const found = find(name);
        return found != nullptr ? found : throw std::runtime_error(path + " has no " + name);
    }

    // "" or why the library refuses the call.
    std::string problem(const Call& call) const
    {
        void* const function = find(call.function + "_problem");
        const char* text = nullptr;
        if (function != nullptr) {
            text = reinterpret_cast<const char* (*)(const void*)>(function)(call.parameters.data());
        }
        return text != nullptr ? text : "";
    }

    size_t workspace(const Call& call) const
    {
        void* const function = find(call.function + "_workspace");
        return function == nullptr ? 0 : reinterpret_cast<size_t (*)(const void*)>(function)(call.parameters.data());
    }

    std::string path;

private:
    void* handle_;
};

// -- data on the device -----------------------------------------------------------------------------------------------------

template <typename T>
void upload_gram(const CaseFile& file, const Data& data, T* out)
{
    const size_t count = static_cast<size_t>(data.batch) * data.tokens * data.channels;
    const Memory features(count), places(4 * data.patches), values(4 * data.patches);
    CHECK(cudaMemcpy(features.address, file.at(data.offset), count, cudaMemcpyHostToDevice));
    CHECK(make_gram(static_cast<const int8_t*>(features.address), static_cast<int>(data.batch), static_cast<int>(data.tokens),
                    static_cast<int>(data.channels), std::ldexp(1.0f, -data.shift), out));
    if (data.patches > 0) {
        const char* const patch = file.at(data.patch_offset);
        CHECK(cudaMemcpy(places.address, patch, 4 * data.patches, cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(values.address, patch + 4 * data.patches, 4 * data.patches, cudaMemcpyHostToDevice));
        CHECK(replace(static_cast<const int32_t*>(places.address), static_cast<const float*>(values.address),
                      static_cast<int>(data.patches), out));
    }
    CHECK(cudaDeviceSynchronize());
}

inline std::shared_ptr<Memory> upload(const CaseFile& file, const Data& data)
{
    auto memory = std::make_shared<Memory>(data.bytes);
    if (!data.gram) {
        const size_t part = data.bytes / data.times;
        for (size_t i = 0; i < data.times; ++i) {
            char* const to = static_cast<char*>(memory->address) + i * part;
            CHECK(cudaMemcpy(to, file.at(data.offset), part, cudaMemcpyHostToDevice));
        }
    } else if (data.half) {
        upload_gram(file, data, static_cast<__half*>(memory->address));
    } else {
        upload_gram(file, data, static_cast<float*>(memory->address));
    }
    return memory;
}

// -- one call ---------------------------------------------------------------------------------------------------------------

inline float wide(const char* bytes, const std::string& type, size_t place)
{
    if (type == "float32") {
        float value;
        std::memcpy(&value, bytes + 4 * place, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, bytes + 2 * place, 2);
    if (type == "float16") {
        return __half2float(__ushort_as_half(half));
    }
    const uint32_t bits = static_cast<uint32_t>(half) << 16;  // bfloat16
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

class Run {
public:
    Run(const Library& library, const CaseFile& file, const Call& call, std::shared_ptr<Run> same_inputs = nullptr)
        : call(call), output(call.output_bytes), golden(call.output_bytes), workspace(library.workspace(call)),
          function_(library.need(call.function))
    {
        const std::string problem = library.problem(call);
        if (!problem.empty()) {
            throw std::runtime_error(call.name + " is refused: " + problem);
        }
        for (const Argument& argument : call.arguments) {
            if (argument.kind == Argument::Kind::Input) {
                auto& slot = inputs_[argument.data];
                slot = same_inputs ? same_inputs->inputs_.at(argument.data) : upload(file, file.data.at(argument.data));
            }
        }
    }

    void launch(cudaStream_t stream) const
    {
        std::vector<uintptr_t> values;
        for (const Argument& argument : call.arguments) {
            values.push_back(value(argument, stream));
        }
        const int32_t status = call_function(function_, values);
        if (status != 0) {
            throw std::runtime_error(call.name + ": the call gave status " + std::to_string(status));
        }
    }

    void poison(cudaStream_t stream, int workspace_byte) const
    {
        CHECK(cudaMemsetAsync(output.address, kPoison, output.bytes, stream));
        if (workspace.bytes > 0) {  // a graph takes no empty node
            CHECK(cudaMemsetAsync(workspace.address, workspace_byte, workspace.bytes, stream));
        }
    }

    // "" if the output is what the reference gave, else the first difference. The output becomes the golden one.
    std::string compare() const
    {
        std::vector<char> got(output.bytes);
        CHECK(cudaMemcpy(got.data(), output.address, output.bytes, cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(golden.address, output.address, output.bytes, cudaMemcpyDeviceToDevice));
        return call.type.empty() ? compare_bits(got) : compare_rows(got);
    }

    void count_differences(cudaStream_t stream, unsigned long long* wrong) const
    {
        CHECK(count_wrong(static_cast<const uint8_t*>(output.address), static_cast<const uint8_t*>(golden.address),
                          output.bytes, wrong, stream));
    }

    const Call& call;
    Memory output, golden, workspace;

private:
    uintptr_t value(const Argument& argument, cudaStream_t stream) const
    {
        using Kind = Argument::Kind;
        switch (argument.kind) {
            case Kind::Parameters: return reinterpret_cast<uintptr_t>(call.parameters.data());
            case Kind::Input: return reinterpret_cast<uintptr_t>(inputs_.at(argument.data)->address);
            case Kind::Output: return reinterpret_cast<uintptr_t>(output.address);
            case Kind::Workspace: return reinterpret_cast<uintptr_t>(workspace.address);
            case Kind::Size: return workspace.bytes;
            case Kind::Stream: return reinterpret_cast<uintptr_t>(stream);
            default: return 0;
        }
    }

    std::string compare_bits(const std::vector<char>& got) const
    {
        for (size_t place = 0; place < got.size(); ++place) {
            if (got[place] != call.expected[place]) {
                int32_t here = 0, wanted = 0;
                const size_t word = place / 4 * 4;
                if (word + 4 <= got.size()) {
                    std::memcpy(&here, got.data() + word, 4);
                    std::memcpy(&wanted, call.expected.data() + word, 4);
                }
                return call.name + ": word " + std::to_string(word / 4) + " is " + std::to_string(here) + ", wanted "
                       + std::to_string(wanted);
            }
        }
        return "";
    }

    std::string compare_rows(const std::vector<char>& got) const
    {
        const size_t count = got.size() / (call.type == "float32" ? 4 : 2);
        for (size_t first = 0; first < count; first += call.row) {
            double norm = 0.0, worst = 0.0;
            for (size_t place = first; place < first + call.row; ++place) {
                const double wanted = wide(call.expected.data(), call.type, place);
                const double error = std::fabs(wide(got.data(), call.type, place) - wanted);
                norm += wanted * wanted;
                worst = error > worst || error != error ? error : worst;
            }
            if (!(worst <= call.tolerance * std::sqrt(norm))) {
                return call.name + ": row " + std::to_string(first / call.row) + " is off by " + std::to_string(worst)
                       + ", its norm is " + std::to_string(std::sqrt(norm));
            }
        }
        return "";
    }

    std::map<int, std::shared_ptr<Memory>> inputs_;
    void* function_;
};

// -- graphs -----------------------------------------------------------------------------------------------------------------

class Graph {
public:
    // What `enqueue(stream)` puts on a stream; throws where it does what a capture forbids.
    template <typename Enqueue>
    explicit Graph(Enqueue enqueue)
    {
        cudaStream_t stream = nullptr;
        cudaGraph_t graph = nullptr;
        CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        enqueue(stream);
        CHECK(cudaStreamEndCapture(stream, &graph));
        CHECK(cudaGraphInstantiateWithFlags(&executable_, graph, 0));
        CHECK(cudaGraphDestroy(graph));
        CHECK(cudaStreamDestroy(stream));
    }
    ~Graph() { cudaGraphExecDestroy(executable_); }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    void launch(cudaStream_t stream) const { CHECK(cudaGraphLaunch(executable_, stream)); }

private:
    cudaGraphExec_t executable_ = nullptr;
};

struct Stream {
    Stream() { CHECK(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking)); }
    ~Stream() { cudaStreamDestroy(handle); }
    cudaStream_t handle = nullptr;
};

}  // namespace harness
