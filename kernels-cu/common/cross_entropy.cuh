// What the kernels of cross entropy share.
#pragma once
#include "pack.cuh"

// A target as an index below the vocabulary: as unsigned, what is negative is none.
INLINE bool is_used(int target, u32 vocabulary) { return u32(target) < vocabulary; }

INLINE float exp_fast(float x) { return exp2_fast(x * LOG2_E); }

// 1 / count, or zero.
INLINE float inverse(float count) { return count > 0.0f ? 1.0f / count : 0.0f; }

// From logits of a row in use, from `column` on, to their gradient; what is beyond the vocabulary has none.
template <int N>
INLINE void logits_gradient(float (&z)[N], u32 column, u32 target, u32 vocabulary, float log_sum, float scale) {
#pragma unroll
    for (int e = 0; e < N; e++) {
        const float p = exp_fast(z[e] - log_sum) - (column + e == target ? 1.0f : 0.0f);
        z[e] = column + e < vocabulary ? p * scale : 0.0f;
    }
}
