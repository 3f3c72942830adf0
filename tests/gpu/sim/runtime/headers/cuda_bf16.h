// As cuda_fp16.h here.
#pragma once
struct __nv_bfloat16;
