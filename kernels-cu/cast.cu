// The same numbers in another float type.
//
// entry              grid               block  shared  arguments  bytes  flops
// cast_fwd_bf16_f32  min(n/1024,8*sms)  256    0       y | x | n  6n     -
// cast_fwd_f32_bf16  min(n/1024,8*sms)  256    0       y | x | n  6n     -
//
// The dtype of x, then that of y. Copies need no kernel.
// Needs   Operands begin at multiples of 16 bytes.
// Rounds  to nearest even.
#include "common/lots.cuh"

constexpr int THREADS = 256;

template <typename X, typename Y>
INLINE void cast(Y* y, const X* x, u32 n) {
    for_lots<LOT<X, Y>>(n, [=](auto lot, u32 i) {
        float v[lot.SIZE];
        load(v, x + i);
        store(y + i, v);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) cast_fwd_bf16_f32(float* y, const bf16* x, u32 n) {
    cast(y, x, n);
}

extern "C" __global__ void __launch_bounds__(THREADS) cast_fwd_f32_bf16(bf16* y, const float* x, u32 n) {
    cast(y, x, n);
}
