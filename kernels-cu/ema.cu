// The running mean of a tensor, in place.                                         Polyak & Juditsky 1992
//   mean += (1 - decay) (x - mean)     unless scale is zero
//
// entry            grid               block  shared  arguments                   bytes  flops
// ema_update_bf16  min(N/1024,4*sms)  256    0       mean | x decay scale | N |  10N    3N
// ema_update_f32   min(N/1024,4*sms)  256    0       mean | x decay scale | N |  12N    3N
//
// Needs   tensors 16-byte aligned; any N.
// Rounds  once, on store; f32.
#include "common/lots.cuh"

constexpr int THREADS = 256;

template <typename T>
INLINE void update(float* mean, const T* x, const float* decay, const float* scale, u32 count) {
    if (*scale == 0.0f) return;
    const float part = 1.0f - *decay;
    for_lots<4>(count, [&](auto lot, u32 at) {
        float a[lot.SIZE], b[lot.SIZE];
        load(a, mean + at);
        load(b, x + at);
#pragma unroll
        for (int e = 0; e < lot.SIZE; e++) a[e] = fmaf(part, b[e] - a[e], a[e]);
        store(mean + at, a);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    ema_update_bf16(float* mean, const bf16* x, const float* decay, const float* scale, u32 count) {
    update(mean, x, decay, scale, count);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    ema_update_f32(float* mean, const float* x, const float* decay, const float* scale, u32 count) {
    update(mean, x, decay, scale, count);
}
