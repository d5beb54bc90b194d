// Number formats, as megatron/kernels/compiled.py numbers them.
#pragma once

enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2 };
