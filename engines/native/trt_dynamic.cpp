// Entry points of btp_trt_dynamic: for IPluginRegistry::loadLibrary, trtexec --dynamicPlugins and --setPluginsToSerialize.
// TensorRT calls getCreators and registers what it gets; nothing here needs a symbol of libnvinfer.
#include <cstdio>

#include "../../graphs/ops/common/trt_common.h"

#define BTP_EXPORT extern "C" __attribute__((visibility("default")))

// On standard error: the way to TensorRT's logger (ILoggerFinder) has another table of functions in 11 than in 10, so a
// library that used it would crash in one of them (docs/decisions/plugin-messages.md).
void btp::report(const std::string& message) noexcept
{
    std::fprintf(stderr, "%s\n", message.c_str());
}

BTP_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static const std::vector<nvinfer1::IPluginCreatorInterface*> creators(btp::creators().begin(), btp::creators().end());
    count = static_cast<int32_t>(creators.size());
    return creators.data();
}

// TensorRT for RTX takes a library only if it exports this too.
BTP_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}
