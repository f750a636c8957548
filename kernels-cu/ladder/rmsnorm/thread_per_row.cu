// RMSNorm, rung 1: a thread for each row.
//   y[n,c] = x[n,c] r[n] w[c],   r[n] = 1 / sqrt(mean_c x[n,c]^2 + eps)
//
// The formula as it stands on paper: each thread walks along its own row, once for the sum and once for the result.
// What it costs: when the 32 threads of a warp read column c of their rows, they touch 32 different sectors of 32
// bytes and use 2 of each. And a batch of N rows fills N threads only: most of the machine stands idle. A single
// running sum would also be too inexact for the tolerance law from rows of about 500 on: the longer a sum gets, the
// more of each new term it rounds away. Eight sums side by side carry on to 2048; a tree, as in later rungs, has no
// such end.
//
// entry                            grid   block  shared  arguments                bytes       flops
// rmsnorm_fwd_thread_per_row_bf16  N/128  128    0       y r | x w | N C | eps    4NC+4N+2C   4NC
// rmsnorm_fwd_thread_per_row_f32   N/128  128    0       y r | x w | N C | eps    8NC+4N+4C   4NC
// Needs   C % 8 == 0, C <= 2048
// Rounds  once, on store; the sum in f32, every eighth term in order, then the eight.
#include "common/pack.cuh"

template <typename T>
INLINE void forward(T* y, float* r, const T* x, const T* w, u32 rows, u32 width, float eps) {
    const u32 n = blockIdx.x * 128 + threadIdx.x;
    if (n >= rows) return;
    x += u64(n) * width, y += u64(n) * width;
    float squares[8] = {};
    for (u32 c = 0; c < width; c += 8)
        for (u32 e = 0; e < 8; e++) squares[e] += to_float(x[c + e]) * to_float(x[c + e]);
    for (u32 e = 1; e < 8; e++) squares[0] += squares[e];
    const float rstd = 1.0f / sqrtf(squares[0] / float(width) + eps);
    r[n] = rstd;
    for (u32 c = 0; c < width; c++) store_one(y + c, to_float(x[c]) * rstd * to_float(w[c]));
}

extern "C" __global__ void __launch_bounds__(128)
    rmsnorm_fwd_thread_per_row_bf16(bf16* y, float* r, const bf16* x, const bf16* w, u32 rows, u32 width, float eps) {
    forward(y, r, x, w, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(128)
    rmsnorm_fwd_thread_per_row_f32(float* y, float* r, const float* x, const float* w, u32 rows, u32 width, float eps) {
    forward(y, r, x, w, rows, width, eps);
}
