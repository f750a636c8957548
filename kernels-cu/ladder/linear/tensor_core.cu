// Matrix product, rung 4: tensor cores.
//   y[n,m] = sum_k x[n,k] w[m,k]
//
// mma.sync multiplies 16x16 by 16x8 in one instruction of a warp: 64 multiply-adds for each lane. Its operands are
// spread over the lanes in a fixed pattern (see `multiply_add` in common/ptx.cuh); a register holds two bf16 that are
// neighbours along the depth, so x and w stay as they lie in memory. Four warps make 64x64 results, 32x32 each.
// What it costs: the pattern is fetched word by word, sixteen loads of shared memory for eight products, and the rows of
// the tile, 64 bytes apart, bring every other row back to the same banks.
//
// entry                        grid       block  shared  arguments          bytes        flops
// linear_fwd_tensor_core_bf16  M/64,N/64  128    8192    y | x w | N M K |  2NK+2MK+2NM  2NMK
// Rounds  once, on store; products of bf16 are exact, sums in f32.
#include "common/pack.cuh"

constexpr u32 TILE = 64, DEPTH = 32;

// Columns from `k` on of the rows from `first` on; zeros where there is nothing.
INLINE void fetch(bf16 (&tile)[TILE][DEPTH], const bf16* from, u32 first, u32 rows, u32 k, u32 depth) {
#pragma unroll
    for (u32 i = threadIdx.x; i < TILE * DEPTH / 8; i += 128) {
        const u32 r = i / 4, c = i % 4 * 8;
        const bool there = first + r < rows && k + c < depth;
        const Vec16 v = there ? load16(from + u64(first + r) * depth + k + c) : Vec16{};
        store_shared(shared_address(&tile[r][c]), v.word);
    }
}

// Two neighbours along the depth.
INLINE u32 pair(const bf16* at) { return *reinterpret_cast<const u32*>(at); }

extern "C" __global__ void __launch_bounds__(128)
    linear_fwd_tensor_core_bf16(bf16* y, const bf16* x, const bf16* w, u32 rows, u32 columns, u32 depth) {
    __shared__ __align__(16) bf16 a[TILE][DEPTH], b[TILE][DEPTH];
    const u32 row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
    const u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4 * 2;
    const u32 i0 = warp / 2 * 32 + g, j0 = warp % 2 * 32 + g;
    float sum[2][4][4] = {};
    for (u32 k = 0; k < depth; k += DEPTH) {
        fetch(a, x, row0, rows, k, depth);
        fetch(b, w, column0, columns, k, depth);
        __syncthreads();
#pragma unroll
        for (u32 d = t; d < DEPTH; d += 16) {
            u32 left[2][4], right[4][2];
#pragma unroll
            for (u32 i = 0; i < 2; i++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) left[i][e] = pair(&a[i0 + i * 16 + e % 2 * 8][d + e / 2 * 8]);
#pragma unroll
            for (u32 j = 0; j < 4; j++)
#pragma unroll
                for (u32 e = 0; e < 2; e++) right[j][e] = pair(&b[j0 + j * 8][d + e * 8]);
#pragma unroll
            for (u32 i = 0; i < 2; i++)
#pragma unroll
                for (u32 j = 0; j < 4; j++) multiply_add(sum[i][j], left[i], right[j][0], right[j][1]);
        }
        __syncthreads();
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++)
#pragma unroll
        for (u32 half = 0; half < 2; half++)
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const u32 n = row0 + i0 + i * 16 + half * 8, m = column0 + warp % 2 * 32 + j * 8 + t;
                if (n < rows && m < columns)
                    *reinterpret_cast<u32*>(y + u64(n) * columns + m) =
                        pack(sum[i][j][half * 2], sum[i][j][half * 2 + 1]);
            }
}
