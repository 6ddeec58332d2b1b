// Registration of btp_trt: the creators join TensorRT's registry when the library is loaded (dlopen, --staticPlugins).
// Not together with btp_trt_dynamic in one process. getPluginRegistry and getLogger belong to libnvinfer, which must be in the
// process before this library.
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
    bool all = true;
    for (nvinfer1::IPluginCreatorV3One* creator : {&btp::select_tokens_creator(), &btp::gather_tokens_creator()}) {
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
