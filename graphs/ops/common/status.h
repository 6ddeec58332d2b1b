// Error codes of the plain C interface of the operators.
#pragma once

#include <stdint.h>

#define BTP_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum {
    BTP_OK = 0,
    BTP_BAD_ARGUMENT = 1,   // a size, count or pointer breaks the operator's rules; *_problem() says which
    BTP_WORKSPACE = 2,      // the workspace is smaller than *_workspace() asks for, or not 16-byte aligned
    BTP_CUDA = 1000         // BTP_CUDA + n: the launch gave CUDA error n
};

// One line for a code that a launch returned. The text belongs to the library; it is overwritten by the next call in
// the same thread.
BTP_API const char* btp_error_string(int32_t code);

// Version of this interface (rises when a signature changes) and the GPU architectures the library was built for,
// e.g. "80,87,90".
BTP_API int32_t btp_kernels_version(void);
BTP_API const char* btp_kernels_architectures(void);

// Both once more as text in the file, "btp-kernels 2 for 80,87,90;", for those who cannot load it (btp_trt needs TensorRT).
BTP_API extern const char btp_kernels_description[];

#ifdef __cplusplus
}
#endif
