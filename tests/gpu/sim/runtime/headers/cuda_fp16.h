// Replaces CUDA's header, which includes headers that torch's packages do not contain. cuBLAS and NCCL need the names.
#pragma once
struct __half;
struct __half2;
typedef __half half;
