// Matrix product, rung 5: ldmatrix from swizzled tiles.
//   y[n,m] = sum_k x[n,k] w[m,k]
//
// ldmatrix reads four 8x8 matrices in one instruction and hands every lane what mma wants of them: the 16 loads of a
// step of rung 4 become four. Each lane gives the address of one row of 16 bytes. The chunk c of row r lies where chunk
// c ^ s(r) would (common/tile.cuh): so the eight rows of a matrix, which without that would share banks, lie in all 32,
// and so do the stores that fill the tile. Nothing is padded.
// What it costs: each tile still waits for its loads from global memory, and multiplies only then.
//
// entry                             grid       block  shared  arguments          bytes        flops
// linear_fwd_ldmatrix_swizzle_bf16  M/64,N/64  128    8192    y | x w | N M K |  2NK+2MK+2NM  2NMK
// Rounds  once, on store; products of bf16 are exact, sums in f32.
#include "common/pack.cuh"
#include "common/tile.cuh"

constexpr u32 TILE = 64, DEPTH = 32, BYTES = 2 * DEPTH;

// Columns from `k` on of the rows from `first` on; zeros where there is nothing.
INLINE void fetch(u32 tile, const bf16* from, u32 first, u32 rows, u32 k, u32 depth) {
#pragma unroll
    for (u32 i = threadIdx.x; i < TILE * DEPTH / 8; i += 128) {
        const u32 r = i / 4, chunk = i % 4;
        const bool there = first + r < rows && k + chunk * 8 < depth;
        const Vec16 v = there ? load16(from + u64(first + r) * depth + k + chunk * 8) : Vec16{};
        store_shared(tile + chunk_at<BYTES>(r, chunk), v.word);
    }
}

extern "C" __global__ void __launch_bounds__(128)
    linear_fwd_ldmatrix_swizzle_bf16(bf16* y, const bf16* x, const bf16* w, u32 rows, u32 columns, u32 depth) {
    __shared__ __align__(128) char tiles[2 * TILE * BYTES];
    const u32 a = shared_address(tiles), b = a + TILE * BYTES;
    const u32 row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, i0 = warp / 2 * 32, j0 = warp % 2 * 32;
    const u32 a_lane = block_at<BYTES>(down_right<BYTES>(), i0 / 16, 0);
    const u32 b_lane = block_at<BYTES>(right_down<BYTES>(), j0 / 16, 0);
    float sum[2][4][4] = {};
    for (u32 k = 0; k < depth; k += DEPTH) {
        fetch(a, x, row0, rows, k, depth);
        fetch(b, w, column0, columns, k, depth);
        __syncthreads();
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
        __syncthreads();
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
