// Matrix product, rung 2: tiles in shared memory.
//   y[n,m] = sum_k x[n,k] w[m,k]
//
// The 16x16 results of a block need only 16 rows of x and 16 of w. The block loads 32 columns of them at a time, each
// element once, neighbours by neighbouring threads; then all threads read them from shared memory, 16 times each.
// What it costs: still two loads for each multiply-add, now of shared memory. That has 32 banks, word i in bank i % 32,
// each of which answers one word a cycle. Rows of the tile are 32 words long, so the 16 threads that read a column of w
// all ask the same bank, and wait for one another (bank conflicts).
//
// entry                        grid       block  shared  arguments          bytes        flops
// linear_fwd_shared_tile_bf16  M/16,N/16  16x16  4096    y | x w | N M K |  2NK+2MK+2NM  2NMK
// Rounds  once, on store; the sum in f32, in order.
#include "common/pack.cuh"

constexpr u32 TILE = 16, DEPTH = 32;

// Columns from `k` on of the rows from `first` on; zeros where there is nothing.
INLINE void fetch(float (&tile)[TILE][DEPTH], const bf16* from, u32 first, u32 rows, u32 k, u32 depth) {
    for (u32 i = threadIdx.y * 16 + threadIdx.x; i < TILE * DEPTH; i += 256) {
        const u32 r = i / DEPTH, c = i % DEPTH;
        const bool there = first + r < rows && k + c < depth;
        tile[r][c] = there ? to_float(from[u64(first + r) * depth + k + c]) : 0.0f;
    }
}

extern "C" __global__ void __launch_bounds__(256)
    linear_fwd_shared_tile_bf16(bf16* y, const bf16* x, const bf16* w, u32 rows, u32 columns, u32 depth) {
    __shared__ float a[TILE][DEPTH], b[TILE][DEPTH];
    const u32 row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
    float sum = 0.0f;
    for (u32 k = 0; k < depth; k += DEPTH) {
        fetch(a, x, row0, rows, k, depth);
        fetch(b, w, column0, columns, k, depth);
        __syncthreads();
        for (u32 i = 0; i < DEPTH; i++) sum += a[threadIdx.y][i] * b[threadIdx.x][i];
        __syncthreads();
    }
    const u32 n = row0 + threadIdx.y, m = column0 + threadIdx.x;
    if (n < rows && m < columns) store_one(y + u64(n) * columns + m, sum);
}
