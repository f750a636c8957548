// The running means of up to 32 tensors, in place.                                Polyak & Juditsky 1992
//   mean += (1 - decay) (x - mean)     unless scale is zero
// The grid shares all tensors out as if they lay behind one another; the T of them are the first rows of pairs:
// mean x N.
//
// entry            grid               block  shared  arguments                       bytes  flops
// ema_update_bf16  min(N/1024,4*sms)  256    0       pairs:32x3 | decay scale | T |  10N    3N
// ema_update_f32   min(N/1024,4*sms)  256    0       pairs:32x3 | decay scale | T |  12N    3N
//
// N counts all elements.
// Needs   tensors 16-byte aligned; any N of each below 2^31.
// Rounds  once, on store; f32.
#include "common/tensors.cuh"

constexpr int THREADS = 256;

template <typename T>
struct Pair {
    float* mean;
    const T* x;
    u64 count;
};

template <typename T>
struct Pairs {
    Pair<T> rows[32];
};

template <typename T>
INLINE void update(const Pairs<T>& pairs, const float* decay, const float* scale, u32 tensors) {
    if (*scale == 0.0f) return;
    const float part = 1.0f - *decay;
    u32 next = blockIdx.x * THREADS + threadIdx.x;
#pragma unroll 1
    for (u32 t = 0; t < tensors; t++) {
        const Pair<T>& pair = pairs.rows[t];
        for_lots_of_next<4>(next, u32(pair.count), [&](auto lot, u32 at) {
            float a[lot.SIZE], b[lot.SIZE];
            load(a, pair.mean + at);
            load(b, pair.x + at);
#pragma unroll
            for (int e = 0; e < lot.SIZE; e++) a[e] = fmaf(part, b[e] - a[e], a[e]);
            store(pair.mean + at, a);
        });
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    ema_update_bf16(const __grid_constant__ Pairs<bf16> pairs, const float* decay, const float* scale, u32 tensors) {
    update(pairs, decay, scale, tensors);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    ema_update_f32(const __grid_constant__ Pairs<float> pairs, const float* decay, const float* scale, u32 tensors) {
    update(pairs, decay, scale, tensors);
}
