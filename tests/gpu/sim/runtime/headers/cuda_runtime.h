// See cuda_fp16.h in this folder. NCCL's header only needs the types of the runtime's C interface.
#pragma once
#include <cuda_runtime_api.h>
