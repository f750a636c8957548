// Sums that many blocks have begun: each block leaves a row of parts, which are added in order.
#pragma once
#include "pack.cuh"

// The sums of a lane's neighbouring columns, beside those of its neighbours in shared memory: of every eight lanes
// the last four begin with their second half, so that lanes meet different banks.
INLINE void store_sums(float* to, const float (&x)[4]) { store_shared(shared_address(to), packed(x).word); }

INLINE void store_sums(float* to, const float (&x)[8]) {
    const bool turned = threadIdx.x / 4 % 2;
    float first[4], second[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        first[e] = turned ? x[e + 4] : x[e];
        second[e] = turned ? x[e] : x[e + 4];
    }
    store_sums(to + (turned ? 4 : 0), first);
    store_sums(to + (turned ? 0 : 4), second);
}

// dw[c] = scale sum of the parts, plus what was there where it accumulates: warp k of a block of `THREADS` adds
// parts k, k + 8, ..., then the warps are added in order. A block finishes 32 columns.
template <int THREADS, typename T>
INLINE void sum_parts(T* dw, const float* parts, u32 count, u32 width, u32 accumulate, float scale = 1.0f) {
    __shared__ float sums[THREADS / 32][32];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (c < width)
        for (u32 p = warp; p < count; p += THREADS / 32) sum += parts[u64(p) * width + c];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || c >= width) return;
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < THREADS / 32; k++) total += sums[k][lane];
    total *= scale;
    if (accumulate) total += to_float(dw[c]);
    store_one(dw + c, total);
}
