// Sines and cosines at geometric frequencies: of noise levels and of places in a picture.
//                                                               Vaswani et al. 2017; Peebles & Xie 2023
//   time:       y[i] = [cos(t f_j).., sin(t f_j)..],   f_j = ratio^j,   ratio = 10000^(-2/C)
//   positions:  y[p] = [sin(px f_j).., cos(px f_j).., sin(py f_j).., cos(py f_j)..],   ratio = 10000^(-4/C)
// The ratio is a fraction of 2^64. n counts the sines, each of which is made with its cosine: for times a lot of L
// by a thread (8 of bf16, 4 of f32, 1 where C / 2 is no multiple of it), else one. S is patches a side.
//
// entry                    grid               block  shared  arguments                   bytes
// time_embedding_fwd_bf16  min(n/256L,8*sms)  256    0       y | t | n C ratio:u64 |     4n
// time_embedding_fwd_f32   min(n/256L,8*sms)  256    0       y | t | n C ratio:u64 |     8n
// sine_positions_fwd_bf16  min(n/256,8*sms)   256    0       y | | n S C ratio:u64 |     4n
// sine_positions_fwd_f32   min(n/256,8*sms)   256    0       y | | n S C ratio:u64 |     8n
//
// Rounds  once, on store; angles are exact to 1e-9.
#include "common/lots.cuh"
#include "common/waves.cuh"

constexpr int THREADS = 256;

template <int N, typename T>
INLINE void time_lots(T* y, const float* times, u32 n, u32 width, u64 ratio) {
    const u32 half = width / 2;
    for_lots<N>(n, [=](auto lot, u32 i) {
        const u32 j = i % half;
        const float time = times[i / half];
        float cos[lot.SIZE], sin[lot.SIZE];
#pragma unroll
        for (int e = 0; e < lot.SIZE; e++) {
            const Wave w = wave(turns(time, frequency(ratio, j + e)));
            cos[e] = w.cos;
            sin[e] = w.sin;
        }
        T* row = y + u64(i / half) * width;
        store(row + j, cos);
        store(row + half + j, sin);
    });
}

// A lot lies inside the half of a row.
template <typename T>
INLINE void time_embedding(T* y, const float* times, u32 n, u32 width, u64 ratio) {
    if (width / 2 % WIDTH<T> == 0) time_lots<WIDTH<T>>(y, times, n, width, ratio);
    else time_lots<1>(y, times, n, width, ratio);
}

template <typename T>
INLINE void sine_positions(T* y, u32 n, u32 side, u32 width, u64 ratio) {
    const u32 half = width / 2, quarter = width / 4;
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS) {
        const u32 p = i / half, down = i % half / quarter, j = i % quarter;
        const Wave w = wave(turns(int(down ? p / side : p % side), frequency(ratio, j)));
        T* part = y + u64(p) * width + down * half;
        store_one(part + j, w.sin);
        store_one(part + quarter + j, w.cos);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    time_embedding_fwd_bf16(bf16* y, const float* t, u32 n, u32 width, u64 ratio) {
    time_embedding(y, t, n, width, ratio);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    time_embedding_fwd_f32(float* y, const float* t, u32 n, u32 width, u64 ratio) {
    time_embedding(y, t, n, width, ratio);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sine_positions_fwd_bf16(bf16* y, u32 n, u32 side, u32 width, u64 ratio) {
    sine_positions(y, n, side, width, ratio);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sine_positions_fwd_f32(float* y, u32 n, u32 side, u32 width, u64 ratio) {
    sine_positions(y, n, side, width, ratio);
}
