// The activation behind a product, on its way out.
#pragma once
#include "ptx.cuh"

INLINE float silu(float x) { return x * reciprocal_fast(1.0f + exp2_fast(-LOG2_E * x)); }
