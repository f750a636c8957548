// Gated activation, and what linear's activations need backwards.                     Shazeer 2020 (SwiGLU)
//   y[f] = silu(x[2f]) x[2f+1],   silu(x) = x s(x),   s(x) = 1 / (1 + e^-x),   silu'(x) = s (1 + x (1 - s))
// F counts pairs, n elements.
//
// entry            grid               block  shared  arguments    bytes  flops
// swiglu_fwd_bf16  min(F/1024,8*sms)  256    0       y | x | F    6F     6F
// swiglu_fwd_f32   min(F/512,8*sms)   256    0       y | x | F    12F    6F
// swiglu_bwd_bf16  min(F/1024,8*sms)  256    0       dx | x dy | F  10F  10F
// swiglu_bwd_f32   min(F/512,8*sms)   256    0       dx | x dy | F  20F  10F
// silu_bwd_bf16    min(n/2048,8*sms)  256    0       dx | x dy | n  6n   6n
// silu_bwd_f32     min(n/1024,8*sms)  256    0       dx | x dy | n  12n  6n
//
// Needs   Operands begin at multiples of 16 bytes.
// Rounds  once, on store.
#include "common/lots.cuh"

constexpr int THREADS = 256;

// 1 / (1 + e^-x), to about 3 units in the last place: what the exponent loses to rounding goes into the power as a
// factor. Beyond 100 the power is infinite, or nothing beside 1.
INLINE float sigmoid(float x) {
    x = fminf(fmaxf(x, -100.0f), 100.0f);
    const float exponent = -LOG2_E * x, power = exp2_fast(exponent);
    const float lost = fmaf(-LOG2_E, x, -exponent) - 1.925963033e-8f * x;
    return reciprocal_fast(fmaf(power, fmaf(lost, LN_2, 1.0f), 1.0f));
}

// silu'(x) from s(x).
INLINE float slope(float x, float s) { return s * fmaf(x, 1.0f - s, 1.0f); }

template <typename T>
INLINE void forward(T* y, const T* x, u32 pairs) {
    for_lots<WIDTH<T> / 2>(pairs, [=](auto lot, u32 i) {
        float v[2 * lot.SIZE], h[lot.SIZE];
        load(v, x + 2 * u64(i));
#pragma unroll
        for (int e = 0; e < lot.SIZE; e++) h[e] = v[2 * e] * sigmoid(v[2 * e]) * v[2 * e + 1];
        store(y + i, h);
    });
}

template <typename T>
INLINE void backward(T* dx, const T* x, const T* dy, u32 pairs) {
    for_lots<WIDTH<T> / 2>(pairs, [=](auto lot, u32 i) {
        float v[2 * lot.SIZE], d[lot.SIZE];
        load(v, x + 2 * u64(i));
        load(d, dy + i);
#pragma unroll
        for (int e = 0; e < lot.SIZE; e++) {
            float gate = v[2 * e], up = v[2 * e + 1], s = sigmoid(gate);
            v[2 * e] = d[e] * up * slope(gate, s);
            v[2 * e + 1] = d[e] * gate * s;
        }
        store(dx + 2 * u64(i), v);
    });
}

template <typename T>
INLINE void silu_backward(T* dx, const T* x, const T* dy, u32 n) {
    for_lots<WIDTH<T>>(n, [=](auto lot, u32 i) {
        float v[lot.SIZE], d[lot.SIZE];
        load(v, x + i);
        load(d, dy + i);
#pragma unroll
        for (int e = 0; e < lot.SIZE; e++) v[e] = d[e] * slope(v[e], sigmoid(v[e]));
        store(dx + i, v);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) swiglu_fwd_bf16(bf16* y, const bf16* x, u32 pairs) {
    forward(y, x, pairs);
}

extern "C" __global__ void __launch_bounds__(THREADS) swiglu_fwd_f32(float* y, const float* x, u32 pairs) {
    forward(y, x, pairs);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_bwd_bf16(bf16* dx, const bf16* x, const bf16* dy, u32 pairs) {
    backward(dx, x, dy, pairs);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_bwd_f32(float* dx, const float* x, const float* dy, u32 pairs) {
    backward(dx, x, dy, pairs);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    silu_bwd_bf16(bf16* dx, const bf16* x, const bf16* dy, u32 n) {
    silu_backward(dx, x, dy, n);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    silu_bwd_f32(float* dx, const float* x, const float* dy, u32 n) {
    silu_backward(dx, x, dy, n);
}
