// Registration of btp_trt: the creators join TensorRT's registry when the library is loaded (dlopen, --staticPlugins).
// Not together with btp_trt_dynamic in one process. getPluginRegistry, getLogger and getInferLibVersion belong to libnvinfer,
// which must be in the process before this library. The registry's table of functions is another in 11 than in 10 and in
// TensorRT for RTX: with a TensorRT of another major version nothing is called and nothing registered.
#include "../../graphs/ops/common/trt_common.h"

#include <cstdio>

void btp::report(const std::string& message) noexcept
{
    nvinfer1::ILogger* const logger = getLogger();
    if (logger != nullptr) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
    } else {
        std::fprintf(stderr, "%s\n", message.c_str());
    }
}

namespace {

const bool registered = [] {
    const int32_t found = getInferLibVersion();
    if (found / 10000 != NV_TENSORRT_MAJOR) {
        std::fprintf(stderr, "libbtp_trt.so: it was built for TensorRT %d, and this process has %d.%d; build it with "
                             "TENSORRT_INCLUDE_DIR naming the headers of that version, or use libbtp_trt_dynamic.so\n",
                     NV_TENSORRT_MAJOR, found / 10000, found / 100 % 100);
        return false;
    }
    bool all = true;
    for (nvinfer1::IPluginCreatorV3One* const creator : btp::creators()) {
        all = getPluginRegistry()->registerCreator(*creator, "") && all;
    }
    if (!all) {
        btp::report("btp_trt: an operator of this name is registered already; load one of btp_trt and btp_trt_dynamic");
    }
    return all;
}();

}  // namespace

// True if every operator was registered when this library was loaded.
extern "C" __attribute__((visibility("default"))) bool btp_trt_registered() { return registered; }
