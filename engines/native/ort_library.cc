// Entry point of the ONNX Runtime library: sessionOptions.register_custom_ops_library(path) calls RegisterCustomOps.
#include <vector>

#include "../../graphs/ops/common/cpu_loops.h"
#include "../../graphs/ops/common/ort_common.h"

#ifdef _WIN32
#define BTP_EXPORT extern "C" __declspec(dllexport)
#else
#define BTP_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#ifndef BTP_ARCHITECTURES
#define BTP_ARCHITECTURES ""
#endif

namespace {

#ifdef BTP_WITH_CUDA
constexpr bool kWithGpu = true;
#else
constexpr bool kWithGpu = false;
#endif

// Never destroyed, like ort_operators().
const std::vector<btp::OrtOp>& operators()
{
    static const auto* const ops = [] {
        auto* const all = new std::vector<btp::OrtOp>;
        for (const btp::OrtOps some : btp::ort_operators()) {
            for (const btp::OrtOp& op : some(kWithGpu)) {
                all->push_back(op);
            }
        }
        return all;
    }();
    return *ops;
}

// Lives as long as the process: sessions hold pointers into the domain and its operators.
OrtCustomOpDomain* domain()
{
    static OrtCustomOpDomain* const created = [] {
        OrtCustomOpDomain* fresh = nullptr;
        btp::check(btp::ort()->CreateCustomOpDomain("btp", &fresh));
        for (const btp::OrtOp& op : operators()) {
            btp::check(btp::ort()->CustomOpDomain_Add(fresh, &op));
        }
        return fresh;
    }();
    return created;
}

}  // namespace

// What this library is: interface version and the GPU architectures it was built for ("" for a CPU-only build).
BTP_EXPORT int32_t btp_ort_version() { return 8; }
BTP_EXPORT const char* btp_ort_architectures() { return BTP_ARCHITECTURES; }
// Whether this processor has BtpLinearInt8, BtpLinearHalf, BtpLinearFloat, BtpCausalAttention, BtpDecoderRows and
// BtpDecoderLayers: 1 or 0.
BTP_EXPORT int32_t btp_ort_linear() { return btp::has_byte_products() ? 1 : 0; }

BTP_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base)
{
    const OrtApi* const api = base->GetApi(btp::kOrtApi);
    if (api == nullptr) {
        const OrtApi* const oldest = base->GetApi(1);
        return oldest->CreateStatus(ORT_NOT_IMPLEMENTED, "btp_ort: wants ONNX Runtime 1.18 or later");
    }
    btp::ort() = api;
    return btp::guard([options] { btp::check(btp::ort()->AddCustomOpDomain(options, domain())); });
}
