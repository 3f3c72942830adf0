// See cuda_fp16.h in this folder. No name of this header is needed.
#pragma once
