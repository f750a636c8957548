// The gradient of SwiGLU, on its way out of the product that yields that of its result.
#pragma once
#include "pack.cuh"

// Gate and up are neighbours: four columns become eight.
struct GateGradient {
    static constexpr int WIDTH = 4;
    bf16* to;
    const bf16* pre;
    u32 columns;

    INLINE void operator()(u64 row, u32 column, float (&d)[4]) const {
        const u64 at = 2 * (row * columns + column);
        float v[8];
        unpack(v, load16(pre + at));
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float gate = v[2 * e], up = v[2 * e + 1];
            const float s = reciprocal_fast(1.0f + exp2_fast(-LOG2_E * gate));
            v[2 * e] = d[e] * up * s * fmaf(gate, 1.0f - s, 1.0f);
            v[2 * e + 1] = d[e] * gate * s;
        }
        store16(to + at, packed(v));
    }
};
