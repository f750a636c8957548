// Sines and cosines at geometric frequencies: of noise levels and of places in a picture.
//                                                               Vaswani et al. 2017; Peebles & Xie 2023
//   time:       y[i] = [cos(t f_j).., sin(t f_j)..],   f_j = ratio^j,   ratio = 10000^(-2/C)
//   positions:  y[p] = [sin(px f_j).., cos(px f_j).., sin(py f_j).., cos(py f_j)..],   ratio = 10000^(-4/C)
// The ratio is a fraction of 2^64. A thread makes a sine and its cosine: n of them in all. S is patches a side.
//
// entry                    grid              block  shared  arguments                   bytes
// time_embedding_fwd_bf16  min(n/256,8*sms)  256    0       y | t | n C ratio:u64 |     4n
// time_embedding_fwd_f32   min(n/256,8*sms)  256    0       y | t | n C ratio:u64 |     8n
// sine_positions_fwd_bf16  min(n/256,8*sms)  256    0       y | | n S C ratio:u64 |     4n
// sine_positions_fwd_f32   min(n/256,8*sms)  256    0       y | | n S C ratio:u64 |     8n
//
// Rounds  once, on store; angles are exact to 1e-9.
#include "common/pack.cuh"
#include "common/waves.cuh"

constexpr int THREADS = 256;

template <typename T>
INLINE void time_embedding(T* y, const float* times, u32 n, u32 width, u64 ratio) {
    const u32 half = width / 2;
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS) {
        const u32 j = i % half;
        const Wave w = wave(turns(times[i / half], frequency(ratio, j)));
        T* row = y + u64(i / half) * width;
        store_one(row + j, w.cos);
        store_one(row + half + j, w.sin);
    }
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
