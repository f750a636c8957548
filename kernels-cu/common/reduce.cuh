// Sums and extremes over warps and blocks, in an order that does not change.
#pragma once
#include "ptx.cuh"

struct Sum {
    INLINE static float of(float a, float b) { return a + b; }
};

struct Max {
    INLINE static float of(float a, float b) { return fmaxf(a, b); }
    INLINE static int of(int a, int b) { return max(a, b); }
};

// Over each group of `LANES` neighbouring lanes; every lane receives the result.
template <typename Op, int LANES = 32, typename T>
INLINE T warp_reduce(T x) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// Over a block of `THREADS`; every thread receives the result. `slots` holds one value for each warp; the
// first barrier keeps it from readers of an earlier call, the second gives it to those of this one.
template <typename Op, int THREADS, typename T>
INLINE T block_reduce(T x, T* slots) {
    x = warp_reduce<Op>(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
    __syncthreads();
    x = slots[0];
#pragma unroll
    for (int w = 1; w < THREADS / 32; w++) x = Op::of(x, slots[w]);
    return x;
}
