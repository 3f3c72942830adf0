// In the place of CUDA's own, which includes headers that torch's packages do not bring. cuBLAS and NCCL need the names.
#pragma once
struct __half;
struct __half2;
typedef __half half;
