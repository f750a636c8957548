// Matrix product, rung 6: a pipeline of asynchronous copies.
//   y[n,m] = sum_k x[n,k] w[m,k]
//
// cp.async copies 16 bytes from global to shared memory without passing registers, and nobody waits for it: a thread
// closes a group of copies and later waits until all but its latest few groups have arrived. With a ring of four stages
// three tiles are under way while one is multiplied, so that a latency of several hundred cycles hides behind the
// products. One barrier a step is enough: a thread that passes it has seen its own copies arrive, so after it all have,
// and all have left the stage that the next copies overwrite.
// What it costs: shared memory for the stages. The shipped kernel goes on from here: larger tiles, fragments of the
// next slice loaded during this one, results through shared memory so that whole lines are written, and an order of
// blocks that shares what they read in L2.
//
// entry                     grid       block  shared   arguments          bytes        flops
// linear_fwd_cp_async_bf16  M/64,N/64  128    0+32768  y | x w | N M K |  2NK+2MK+2NM  2NMK
// Rounds  once, on store; products of bf16 are exact, sums in f32.
#include "common/pack.cuh"
#include "common/tile.cuh"

constexpr u32 TILE = 64, DEPTH = 32, BYTES = 2 * DEPTH, STAGES = 4, STAGE = 2 * TILE * BYTES;

extern __shared__ __align__(128) char stages[];

extern "C" __global__ void __launch_bounds__(128)
    linear_fwd_cp_async_bf16(bf16* y, const bf16* x, const bf16* w, u32 rows, u32 columns, u32 depth) {
    const u32 ring = shared_address(stages), steps = (depth + DEPTH - 1) / DEPTH;
    const u32 row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, i0 = warp / 2 * 32, j0 = warp % 2 * 32;
    const u32 a_lane = block_at<BYTES>(down_right<BYTES>(), i0 / 16, 0);
    const u32 b_lane = block_at<BYTES>(right_down<BYTES>(), j0 / 16, 0);
    // An empty group where there is no such step: waiting counts groups.
    const auto fetch = [&](u32 step) {
        const u32 k = step * DEPTH, a = ring + step % STAGES * STAGE, b = a + TILE * BYTES;
        if (step < steps) {
            copy_tile<TILE, BYTES, 128>(a, x + u64(row0) * depth + k, depth, rows - row0, depth - k);
            copy_tile<TILE, BYTES, 128>(b, w + u64(column0) * depth + k, depth, columns - column0, depth - k);
        }
        commit_copies();
    };
    float sum[2][4][4] = {};
    for (u32 s = 0; s < STAGES - 1; s++) fetch(s);
    for (u32 step = 0; step < steps; step++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        fetch(step + STAGES - 1);
        const u32 a = ring + step % STAGES * STAGE, b = a + TILE * BYTES;
#pragma unroll
        for (u32 d = 0; d < DEPTH / 16; d++) {
            u32 left[2][4], right[2][4];
#pragma unroll
            for (u32 i = 0; i < 2; i++) load_matrices(left[i], a + block_at<BYTES>(a_lane, i, d));
#pragma unroll
            for (u32 j = 0; j < 2; j++) load_matrices(right[j], b + block_at<BYTES>(b_lane, j, d));
#pragma unroll
            for (u32 i = 0; i < 2; i++)
#pragma unroll
                for (u32 j = 0; j < 4; j++)
                    multiply_add(sum[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
        }
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++)
#pragma unroll
        for (u32 half = 0; half < 2; half++)
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const u32 n = row0 + i0 + i * 16 + half * 8 + lane / 4, m = column0 + j0 + j * 8 + lane % 4 * 2;
                if (n < rows && m < columns)
                    *reinterpret_cast<u32*>(y + u64(n) * columns + m) =
                        pack(sum[i][j][half * 2], sum[i][j][half * 2 + 1]);
            }
}
