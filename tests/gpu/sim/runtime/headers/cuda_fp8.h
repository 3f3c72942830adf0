// As cuda_fp16.h here; nothing of it is needed.
#pragma once
