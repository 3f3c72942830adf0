// Products without a GPU, replaces libcublas. Each product is counted as a kernel, also in generated functions (build.py).
#include <cublas_v2.h>

#include "simulated.h"

#undef cublasGetMathMode
extern "C" {
cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) { *handle = (cublasHandle_t)64; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
  *mode = CUBLAS_DEFAULT_MATH;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
  *mode = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}
}
