// As cuda_fp16.h here: NCCL's header needs the types of the runtime's C interface alone.
#pragma once
#include <cuda_runtime_api.h>
