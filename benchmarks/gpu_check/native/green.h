// A share of the GPU: a green context with so many multiprocessors, and a stream on it. The driver's functions are looked
// up when they are needed, so that the program starts where there is no driver.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include <set>
#include <string>

#include "run.h"

namespace harness {

class Driver {
public:
    Driver() : handle_(dlopen("libcuda.so.1", RTLD_NOW)) {}

    template <typename Function, typename... Arguments>
    void call(const char* name, Arguments... arguments) const
    {
        auto* const function = handle_ != nullptr ? reinterpret_cast<Function*>(dlsym(handle_, name)) : nullptr;
        if (function == nullptr) {
            throw std::runtime_error(std::string("this driver has no ") + name);
        }
        const CUresult result = function(arguments...);
        if (result != CUDA_SUCCESS) {
            throw std::runtime_error(std::string(name) + " gave error " + std::to_string(result));
        }
    }

private:
    void* handle_;
};
#define DRIVER(driver, name, ...) (driver).call<decltype(name)>(#name, __VA_ARGS__)

class GreenContext {
public:
    explicit GreenContext(unsigned multiprocessors)
    {
        CHECK(cudaFree(nullptr));  // the primary context, to which memory and kernels belong
        CUdevice device = 0;
        CUdevResource all{}, share{}, rest{};
        CUdevResourceDesc described{};
        unsigned groups = 1;
        DRIVER(driver_, cuDeviceGet, &device, 0);
        DRIVER(driver_, cuDeviceGetDevResource, device, &all, CU_DEV_RESOURCE_TYPE_SM);
        DRIVER(driver_, cuDevSmResourceSplitByCount, &share, &groups, &all, &rest, 0u, multiprocessors);
        DRIVER(driver_, cuDevResourceGenerateDesc, &described, &share, 1u);
        DRIVER(driver_, cuGreenCtxCreate, &context_, described, device, static_cast<unsigned>(CU_GREEN_CTX_DEFAULT_STREAM));
        DRIVER(driver_, cuGreenCtxStreamCreate, &stream_, context_, static_cast<unsigned>(CU_STREAM_NON_BLOCKING), 0);
        given = share.sm.smCount;
    }

    // For runtimes that refuse a stream of a context that is not the current one.
    void make_current() const
    {
        CUcontext context = nullptr;
        DRIVER(driver_, cuCtxFromGreenCtx, &context, context_);
        DRIVER(driver_, cuCtxSetCurrent, context);
    }

    cudaStream_t stream() const { return stream_; }  // driver and runtime share the type
    unsigned given = 0;

private:
    Driver driver_;
    CUgreenCtx context_ = nullptr;
    CUstream stream_ = nullptr;
};

// How many multiprocessors work put on this stream really runs on.
inline int multiprocessors_used(cudaStream_t stream)
{
    constexpr int kMost = 1024;
    const Memory seen(4 * kMost);
    CHECK(cudaMemset(seen.address, 0, seen.bytes));
    CHECK(note_multiprocessors(static_cast<unsigned*>(seen.address), stream));
    CHECK(cudaStreamSynchronize(stream));
    std::vector<unsigned> host(kMost);
    CHECK(cudaMemcpy(host.data(), seen.address, seen.bytes, cudaMemcpyDeviceToHost));
    int used = 0;
    for (const unsigned one : host) {
        used += static_cast<int>(one);
    }
    return used;
}

}  // namespace harness
