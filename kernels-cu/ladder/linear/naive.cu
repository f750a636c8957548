// Matrix product, rung 1: a thread for each result.
//   y[n,m] = sum_k x[n,k] w[m,k]
//
// The formula as it stands on paper. Threads of a warp that share a row of x read the same element at once, which one
// sector serves; but each has a row of w of its own, K elements from the next, and gets a sector of 32 bytes for 2.
// What it costs: two loads for each multiply-add, and every element of x and w is asked for by every result that needs
// it, M and N times. The arithmetic units wait for the memory pipeline.
//
// entry                  grid       block  shared  arguments          bytes        flops
// linear_fwd_naive_bf16  M/16,N/16  16x16  0       y | x w | N M K |  2NK+2MK+2NM  2NMK
// Rounds  once, on store; the sum in f32, in order.
#include "common/pack.cuh"

extern "C" __global__ void __launch_bounds__(256)
    linear_fwd_naive_bf16(bf16* y, const bf16* x, const bf16* w, u32 rows, u32 columns, u32 depth) {
    const u32 m = blockIdx.x * 16 + threadIdx.x, n = blockIdx.y * 16 + threadIdx.y;
    if (n >= rows || m >= columns) return;
    float sum = 0.0f;
    for (u32 k = 0; k < depth; k++) sum += to_float(x[u64(n) * depth + k]) * to_float(w[u64(m) * depth + k]);
    store_one(y + u64(n) * columns + m, sum);
}
