// See cuda_fp16.h in this folder.
#pragma once
struct __nv_bfloat16;
