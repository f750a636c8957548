// Matrix product, rung 3: tiles in registers.
//   y[n,m] = sum_k x[n,k] w[m,k]
//
// A thread makes 4x4 results: 4 elements of x and 4 of w, two loads of 16 bytes, serve 16 multiply-adds. That is the
// idea of every fast product, at every level: an area of results needs an edge of operands, so the larger the area that
// stays close, the fewer bytes come from far. Tiles lie with their depth outermost, so that what a thread reads is
// contiguous, and rows are 4 words longer than they need be, which spreads the transposing stores over the banks.
// What it costs: registers, which limit the warps of a multiprocessor. And the arithmetic is now near its bound: one
// instruction for each multiply-add and lane. Only other instructions can do better.
//
// entry                          grid       block  shared  arguments          bytes        flops
// linear_fwd_register_tile_bf16  M/64,N/64  256    17408   y | x w | N M K |  2NK+2MK+2NM  2NMK
// Rounds  once, on store; the sum in f32, in order.
#include "common/pack.cuh"

constexpr u32 TILE = 64, DEPTH = 32, STRIDE = TILE + 4;

// Columns from `k` on of the rows from `first` on, transposed; zeros where there is nothing. A thread takes eight
// neighbours of a row at once.
INLINE void fetch(float (&tile)[DEPTH][STRIDE], const bf16* from, u32 first, u32 rows, u32 k, u32 depth) {
    const u32 r = threadIdx.x / 4, c = threadIdx.x % 4 * 8;
    float v[8] = {};
    if (first + r < rows && k + c < depth) unpack(v, load16(from + u64(first + r) * depth + k + c));
#pragma unroll
    for (u32 e = 0; e < 8; e++) tile[c + e][r] = v[e];
}

extern "C" __global__ void __launch_bounds__(256)
    linear_fwd_register_tile_bf16(bf16* y, const bf16* x, const bf16* w, u32 rows, u32 columns, u32 depth) {
    __shared__ __align__(16) float a[DEPTH][STRIDE], b[DEPTH][STRIDE];
    const u32 row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
    const u32 i = threadIdx.x / 16 * 4, j = threadIdx.x % 16 * 4;
    float sum[4][4] = {};
    for (u32 k = 0; k < depth; k += DEPTH) {
        fetch(a, x, row0, rows, k, depth);
        fetch(b, w, column0, columns, k, depth);
        __syncthreads();
#pragma unroll 8
        for (u32 d = 0; d < DEPTH; d++) {
            const float4 u = *reinterpret_cast<const float4*>(&a[d][i]);
            const float4 v = *reinterpret_cast<const float4*>(&b[d][j]);
            const float left[4] = {u.x, u.y, u.z, u.w}, right[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (u32 p = 0; p < 4; p++)
#pragma unroll
                for (u32 q = 0; q < 4; q++) sum[p][q] += left[p] * right[q];
        }
        __syncthreads();
    }
    const u32 m = column0 + j;
#pragma unroll
    for (u32 p = 0; p < 4; p++) {
        const u32 n = row0 + i + p;
        // Columns are multiples of 8, so four neighbours are there or none.
        if (n < rows && m < columns)
            *reinterpret_cast<uint2*>(y + u64(n) * columns + m) =
                make_uint2(pack(sum[p][0], sum[p][1]), pack(sum[p][2], sum[p][3]));
    }
}
