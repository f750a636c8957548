// RMSNorm, rung 5: the row stays in registers.
//   y[n,c] = x[n,c] r[n] w[c],   r[n] = 1 / sqrt(mean_c x[n,c]^2 + eps)
//
// A warp reads its row once, all vectors at a time, and keeps it until the result is made: every element of x crosses
// the bus once, and the loads are all under way before the first is waited for. Warps walk over the rows, so that w is
// read once for many of them. No kernel can move less; this is the shipped kernel for narrow rows.
// What it costs: the loops must be unrolled, since registers cannot be indexed, so the longest row is fixed when the
// kernel is compiled. For wide rows the shipped kernel shares one out to a whole block.
//
// entry                          grid            block  shared  arguments                bytes       flops
// rmsnorm_fwd_in_registers_bf16  min(N/8,4*sms)  256    0       y r | x w | N C | eps    4NC+4N+2C   4NC
// rmsnorm_fwd_in_registers_f32   min(N/8,4*sms)  256    0       y r | x w | N C | eps    8NC+4N+4C   4NC
// Needs   C % 8 == 0, C <= 1024
// Rounds  once, on store; the sum in f32, as a butterfly over the lanes.
#include "common/pack.cuh"
#include "common/reduce.cuh"

constexpr u32 LONGEST = 1024;

template <typename T>
INLINE void forward(T* y, float* r, const T* x, const T* w, u32 rows, u32 width, float eps) {
    constexpr u32 N = WIDTH<T>, VECTORS = LONGEST / 32 / N;
    const u32 first = threadIdx.x % 32 * N;
    // Vectors beyond the row are zeros.
    const auto load = [&](Vec16(&to)[VECTORS], const T* from) {
#pragma unroll
        for (u32 i = 0; i < VECTORS; i++) {
            const u32 c = first + i * 32 * N;
            to[i] = c < width ? load16(from + c) : Vec16{};
        }
    };
    Vec16 scale[VECTORS], row[VECTORS];
    load(scale, w);
    for (u32 n = blockIdx.x * 8 + threadIdx.x / 32; n < rows; n += gridDim.x * 8) {
        load(row, x + u64(n) * width);
        float squares = 0.0f, v[N], s[N];
#pragma unroll
        for (u32 i = 0; i < VECTORS; i++) {
            unpack(v, row[i]);
            for (u32 e = 0; e < N; e++) squares += v[e] * v[e];
        }
        const float rstd = 1.0f / sqrtf(warp_reduce<Sum>(squares) / float(width) + eps);
        if (first == 0) r[n] = rstd;
#pragma unroll
        for (u32 i = 0; i < VECTORS; i++) {
            const u32 c = first + i * 32 * N;
            unpack(v, row[i]);
            unpack(s, scale[i]);
            for (u32 e = 0; e < N; e++) v[e] *= rstd * s[e];
            if (c < width) store16(y + u64(n) * width + c, packed(v));
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
    rmsnorm_fwd_in_registers_bf16(bf16* y, float* r, const bf16* x, const bf16* w, u32 rows, u32 width, float eps) {
    forward(y, r, x, w, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(256)
    rmsnorm_fwd_in_registers_f32(float* y, float* r, const float* x, const float* w, u32 rows, u32 width, float eps) {
    forward(y, r, x, w, rows, width, eps);
}
