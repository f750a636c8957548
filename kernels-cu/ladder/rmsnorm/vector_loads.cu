// RMSNorm, rung 4: 16 bytes with each load and store.
//   y[n,c] = x[n,c] r[n] w[c],   r[n] = 1 / sqrt(mean_c x[n,c]^2 + eps)
//
// A lane takes eight bf16 at once, the widest access there is (ld.global.v4). The same bytes move, with an eighth of
// the loads, stores, address sums and loop steps: what a memory-bound kernel wants is bytes in flight, and each
// instruction now brings more of them.
// What it costs: rows must be whole vectors, aligned to 16 bytes. And x still crosses the bus twice, for the sum and
// for the result.
//
// entry                          grid  block  shared  arguments                bytes       flops
// rmsnorm_fwd_vector_loads_bf16  N/8   256    0       y r | x w | N C | eps    4NC+4N+2C   4NC
// rmsnorm_fwd_vector_loads_f32   N/8   256    0       y r | x w | N C | eps    8NC+4N+4C   4NC
// Needs   C % 8 == 0
// Rounds  once, on store; the sum in f32, as a butterfly over the lanes.
#include "common/pack.cuh"
#include "common/reduce.cuh"

template <typename T>
INLINE void forward(T* y, float* r, const T* x, const T* w, u32 rows, u32 width, float eps) {
    constexpr u32 N = WIDTH<T>;
    const u32 n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (n >= rows) return;
    x += u64(n) * width, y += u64(n) * width;
    float squares = 0.0f, v[N], s[N];
    for (u32 c = lane * N; c < width; c += 32 * N) {
        unpack(v, load16(x + c));
        for (u32 e = 0; e < N; e++) squares += v[e] * v[e];
    }
    const float rstd = 1.0f / sqrtf(warp_reduce<Sum>(squares) / float(width) + eps);
    if (lane == 0) r[n] = rstd;
    for (u32 c = lane * N; c < width; c += 32 * N) {
        unpack(v, load16(x + c));
        unpack(s, load16(w + c));
        for (u32 e = 0; e < N; e++) v[e] *= rstd * s[e];
        store16(y + c, packed(v));
    }
}

extern "C" __global__ void __launch_bounds__(256)
    rmsnorm_fwd_vector_loads_bf16(bf16* y, float* r, const bf16* x, const bf16* w, u32 rows, u32 width, float eps) {
    forward(y, r, x, w, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(256)
    rmsnorm_fwd_vector_loads_f32(float* y, float* r, const float* x, const float* w, u32 rows, u32 width, float eps) {
    forward(y, r, x, w, rows, width, eps);
}
