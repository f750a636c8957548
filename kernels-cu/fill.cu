// y = value everywhere. Where all bytes are the same a memset does it.
//
// entry          grid               block  shared  arguments      bytes  flops
// fill_fwd_bf16  min(n/2048,8*sms)  256    0       y | | n | value  2n   -
// fill_fwd_f32   min(n/1024,8*sms)  256    0       y | | n | value  4n   -
// fill_fwd_i32   min(n/1024,8*sms)  256    0       y | | n | value  4n   -
//
// Needs   y begins at a multiple of 16 bytes.
// Rounds  to nearest even; integers towards zero.
#include "common/lots.cuh"

constexpr int THREADS = 256;

template <typename T>
INLINE void fill(T* y, float value, u32 n) {
    for_lots<WIDTH<T>>(n, [=](auto lot, u32 i) {
        float v[lot.SIZE];
#pragma unroll
        for (int e = 0; e < lot.SIZE; e++) v[e] = value;
        store(y + i, v);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) fill_fwd_bf16(bf16* y, u32 n, float value) {
    fill(y, value, n);
}

extern "C" __global__ void __launch_bounds__(THREADS) fill_fwd_f32(float* y, u32 n, float value) {
    fill(y, value, n);
}

extern "C" __global__ void __launch_bounds__(THREADS) fill_fwd_i32(int* y, u32 n, float value) {
    fill(reinterpret_cast<float*>(y), __int_as_float(int(value)), n);
}
