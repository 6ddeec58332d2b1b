// A process with a TensorRT that btp_trt finds when it is loaded: a registry that remembers what it was given.
//
//   static_host LIBRARY VERSION   (as getInferLibVersion gives it, e.g. 100300)
//
// Prints one line for each creator that was registered, and "registered 0|1" as the library says. Link with -rdynamic.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

namespace {

using namespace nvinfer1;

class Registry : public IPluginRegistry {
public:
    bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const* space) noexcept override
    {
        auto& own = static_cast<IPluginCreatorV3One&>(creator);
        std::printf("%s '%s' into '%s'\n", own.getPluginName(), own.getPluginVersion(), space);
        return true;
    }

#if NV_TENSORRT_MAJOR < 11
    bool registerCreator(IPluginCreator&, AsciiChar const*) noexcept override { return false; }
    IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
    IPluginCreator* getPluginCreator(AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept override { return nullptr; }
    bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
#endif
#if NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 1016
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override { return nullptr; }
#endif
    void setErrorRecorder(IErrorRecorder*) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool) override {}
    PluginLibraryHandle loadLibrary(AsciiChar const*) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override { return nullptr; }
    IPluginCreatorInterface* getCreator(AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept override { return nullptr; }
    bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return false; }
    IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override { return nullptr; }
    int32_t releasePluginResource(AsciiChar const*) noexcept override { return 0; }
};

int32_t version = 0;

}  // namespace

#define BTP_HOST extern "C" __attribute__((visibility("default")))
BTP_HOST nvinfer1::IPluginRegistry* getPluginRegistry() noexcept
{
    static Registry registry;
    return &registry;
}
BTP_HOST nvinfer1::ILogger* getLogger() noexcept { return nullptr; }
BTP_HOST int32_t getInferLibVersion() noexcept { return version; }

int main(int, char** arguments)
{
    version = std::atoi(arguments[2]);
    void* const library = dlopen(arguments[1], RTLD_NOW);
    if (library == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    const auto registered = reinterpret_cast<bool (*)()>(dlsym(library, "btp_trt_registered"));
    std::printf("registered %d\n", registered() ? 1 : 0);
    return 0;
}
