// RMSNorm, rung 3: a warp for each row, sums by shuffles.
//   y[n,c] = x[n,c] r[n] w[c],   r[n] = 1 / sqrt(mean_c x[n,c]^2 + eps)
//
// The lanes of a warp can read each other's registers (shfl.sync): five steps add up 32 numbers, with no shared
// memory and no barrier. All lanes end with the same sum.
// What it costs: each lane still asks for one element at a time, 2 bytes of the 16 that one load could bring.
//
// entry                          grid  block  shared  arguments                bytes       flops
// rmsnorm_fwd_warp_shuffle_bf16  N/8   256    0       y r | x w | N C | eps    4NC+4N+2C   4NC
// rmsnorm_fwd_warp_shuffle_f32   N/8   256    0       y r | x w | N C | eps    8NC+4N+4C   4NC
// Rounds  once, on store; the sum in f32, as a butterfly over the lanes.
#include "common/pack.cuh"
#include "common/reduce.cuh"

template <typename T>
INLINE void forward(T* y, float* r, const T* x, const T* w, u32 rows, u32 width, float eps) {
    const u32 n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (n >= rows) return;
    x += u64(n) * width, y += u64(n) * width;
    float squares = 0.0f;
    for (u32 c = lane; c < width; c += 32) squares += to_float(x[c]) * to_float(x[c]);
    const float rstd = 1.0f / sqrtf(warp_reduce<Sum>(squares) / float(width) + eps);
    if (lane == 0) r[n] = rstd;
    for (u32 c = lane; c < width; c += 32) store_one(y + c, to_float(x[c]) * rstd * to_float(w[c]));
}

extern "C" __global__ void __launch_bounds__(256)
    rmsnorm_fwd_warp_shuffle_bf16(bf16* y, float* r, const bf16* x, const bf16* w, u32 rows, u32 width, float eps) {
    forward(y, r, x, w, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(256)
    rmsnorm_fwd_warp_shuffle_f32(float* y, float* r, const float* x, const float* w, u32 rows, u32 width, float eps) {
    forward(y, r, x, w, rows, width, eps);
}
