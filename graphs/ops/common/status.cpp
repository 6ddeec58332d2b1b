// Texts of the error codes and the library's own description.
#include "status.h"

#include <string>

#ifdef BTP_SIMT_EMULATION
#include "simt.h"
#else
#include <cuda_runtime_api.h>
#endif

#ifndef BTP_ARCHITECTURES
#define BTP_ARCHITECTURES ""
#endif

extern "C" const char* btp_error_string(int32_t code)
{
    static thread_local std::string text;
    switch (code) {
    case BTP_OK: return "no error";
    case BTP_BAD_ARGUMENT: return "a size, an attribute or a pointer breaks the operator's rules";
    case BTP_WORKSPACE: return "the workspace is smaller than the operator asks for, or not 16-byte aligned";
    default: break;
    }
    if (code >= BTP_CUDA) {
        text = std::string("CUDA: ") + cudaGetErrorString(static_cast<cudaError_t>(code - BTP_CUDA));
    } else {
        text = "unknown error code " + std::to_string(code);
    }
    return text.c_str();
}

#define BTP_VERSION 8
#define BTP_TEXT_OF(value) #value
#define BTP_TEXT(value) BTP_TEXT_OF(value)

const char btp_kernels_description[] = "btp-kernels " BTP_TEXT(BTP_VERSION) " for " BTP_ARCHITECTURES ";";

extern "C" int32_t btp_kernels_version(void) { return BTP_VERSION; }

extern "C" const char* btp_kernels_architectures(void) { return BTP_ARCHITECTURES; }
