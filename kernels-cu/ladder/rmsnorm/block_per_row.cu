// RMSNorm, rung 2: a block for each row, sums in shared memory.
//   y[n,c] = x[n,c] r[n] w[c],   r[n] = 1 / sqrt(mean_c x[n,c]^2 + eps)
//
// Neighbouring threads read neighbouring elements, so every sector that is touched is used whole (coalescing). The
// partial sums meet in shared memory, halving their number at each step.
// What it costs: eight steps of the tree with a barrier each, in which ever fewer threads work, for rows of which a
// thread has only a few elements.
//
// entry                           grid  block  shared  arguments                bytes       flops
// rmsnorm_fwd_block_per_row_bf16  N     256    1024    y r | x w | N C | eps    4NC+4N+2C   4NC
// rmsnorm_fwd_block_per_row_f32   N     256    1024    y r | x w | N C | eps    8NC+4N+4C   4NC
// Rounds  once, on store; the sum in f32, as a tree over the threads.
#include "common/pack.cuh"

constexpr u32 THREADS = 256;

template <typename T>
INLINE void forward(T* y, float* r, const T* x, const T* w, u32 width, float eps) {
    __shared__ float sums[THREADS];
    const u32 n = blockIdx.x, t = threadIdx.x;
    x += u64(n) * width, y += u64(n) * width;
    float squares = 0.0f;
    for (u32 c = t; c < width; c += THREADS) squares += to_float(x[c]) * to_float(x[c]);
    sums[t] = squares;
    __syncthreads();
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        if (t < half) sums[t] += sums[t + half];
        __syncthreads();
    }
    const float rstd = 1.0f / sqrtf(sums[0] / float(width) + eps);
    if (t == 0) r[n] = rstd;
    for (u32 c = t; c < width; c += THREADS) store_one(y + c, to_float(x[c]) * rstd * to_float(w[c]));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rmsnorm_fwd_block_per_row_bf16(bf16* y, float* r, const bf16* x, const bf16* w, u32 rows, u32 width, float eps) {
    forward(y, r, x, w, width, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rmsnorm_fwd_block_per_row_f32(float* y, float* r, const float* x, const float* w, u32 rows, u32 width, float eps) {
    forward(y, r, x, w, width, eps);
}
