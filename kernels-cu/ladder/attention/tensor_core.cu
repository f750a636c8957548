// Attention, rung 4: tensor cores.                                                                        Dao 2023
//   o[i] = sum_j p[i,j] v[j],   p[i,j] = exp(q[i] . k[j] scale - lse[i]),   row_start[i] <= j < row_end[i]
//
// Scores of 16 queries of a warp with a tile of 64 keys are one product, their weights times the tile of values
// another. The pattern in which mma leaves its result in the lanes is the one in which it wants a left factor: the
// weights are rounded to bf16 and multiplied where they were made, without touching memory. Four lanes share a row, so
// its largest score takes two shuffles. v is turned on its way to the registers (ldmatrix.trans).
// What it costs: a tile is all or nothing. Hidden scores are made and thrown away, and a hidden NaN in v is no longer
// harmless, since zero times NaN is NaN (the shipped kernel looks at its results and takes care of that).
//
// entry                           grid      block  shared  arguments                                                              bytes                       flops
// attention_fwd_tensor_core_bf16  T/64,H,B  128    24576   o lse | q k v row_start row_end | T Tk H G q_stride kv_stride | scale  2B(2TH+2TkH/G)D+4BTH+8BT  4BHTTkD
//
// Hides   k
// Needs   D == 64
// Rounds  p to bf16 as a factor; o once, on store; sums in f32.
#include "common/interval.cuh"
#include "common/pack.cuh"
#include "common/reduce.cuh"
#include "common/tile.cuh"

constexpr u32 D = 64, TILE = 64, BYTES = 2 * D, THREADS = 128;

// Rows from `first` on; zeros where there is nothing.
INLINE void fetch(u32 tile, const bf16* from, u32 stride, u32 first, u32 rows) {
    for (u32 i = threadIdx.x; i < TILE * D / 8; i += THREADS) {
        const u32 r = i / 8, chunk = i % 8;
        const Vec16 x = first + r < rows ? load16(from + u64(first + r) * stride + chunk * 8) : Vec16{};
        store_shared(tile + chunk_at<BYTES>(r, chunk), x.word);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_fwd_tensor_core_bf16(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v,
        const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
        u32 kv_stride, float scale) {
    __shared__ __align__(128) char tiles[3 * TILE * BYTES];
    const u32 tile_q = shared_address(tiles), tile_k = tile_q + TILE * BYTES, tile_v = tile_k + TILE * BYTES;
    const u32 first = blockIdx.x * TILE, head = blockIdx.y, b = blockIdx.z;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = warp * 16 + lane / 4;
    const u64 cache = u64(b) * keys * kv_stride + head / group * D;
    // Of the two rows of a lane, `own` and 8 further: what they see, and the state of their softmax.
    int2 seen[2] = {};
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 i = first + own + half * 8;
        if (i < queries) seen[half] = interval(row_start, row_end, u64(b) * queries + i, keys);
    }
    float sum[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
    const u32 down = down_right<BYTES>(), right = right_down<BYTES>();
    fetch(tile_q, q + u64(b) * queries * q_stride + head * D, q_stride, first, queries);
    for (u32 key = 0; key < keys; key += TILE) {
        __syncthreads();
        fetch(tile_k, k + cache, kv_stride, key, keys);
        fetch(tile_v, v + cache, kv_stride, key, keys);
        __syncthreads();
        float s[TILE / 8][4] = {};
#pragma unroll
        for (u32 d = 0; d < D / 16; d++) {
            u32 x[4], y[4];
            load_matrices(x, tile_q + block_at<BYTES>(down, warp, d));
#pragma unroll
            for (u32 j = 0; j < TILE / 16; j++) {
                load_matrices(y, tile_k + block_at<BYTES>(right, j, d));
                multiply_add(s[2 * j], x, y[0], y[1]);
                multiply_add(s[2 * j + 1], x, y[2], y[3]);
            }
        }
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float most = top[half];
#pragma unroll
            for (u32 e = 0; e < TILE / 4; e++) {
                float& x = s[e / 2][half * 2 + e % 2];
                x = sees(seen[half], key + e / 2 * 8 + lane % 4 * 2 + e % 2) ? x * (scale * LOG2_E) : -INFINITY;
                most = fmaxf(most, x);
            }
            most = warp_reduce<Max, 4>(most);
            // A row that has seen nothing yet has no largest score.
            const float base = most == -INFINITY ? 0.0f : most, shrink = exp2_fast(top[half] - base);
            top[half] = most, total[half] *= shrink;
#pragma unroll
            for (u32 e = 0; e < TILE / 4; e++) {
                float& x = s[e / 2][half * 2 + e % 2];
                x = exp2_fast(x - base), total[half] += x;
            }
#pragma unroll
            for (u32 e = 0; e < D / 4; e++) sum[e / 2][half * 2 + e % 2] *= shrink;
        }
#pragma unroll
        for (u32 j = 0; j < TILE / 16; j++) {
            u32 p[4], y[4];
#pragma unroll
            for (u32 e = 0; e < 4; e++) p[e] = pack(s[2 * j + e / 2][e % 2 * 2], s[2 * j + e / 2][e % 2 * 2 + 1]);
#pragma unroll
            for (u32 d = 0; d < D / 16; d++) {
                load_matrices_transposed(y, tile_v + block_at<BYTES>(down, j, d));
                multiply_add(sum[2 * d], p, y[0], y[1]);
                multiply_add(sum[2 * d + 1], p, y[2], y[3]);
            }
        }
    }
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 i = first + own + half * 8;
        const float all = warp_reduce<Sum, 4>(total[half]);
        if (i >= queries) continue;
        const bool some = seen[half].x < seen[half].y;
        const float share = some ? 1.0f / all : 0.0f;
        bf16* to = o + ((u64(b) * queries + i) * heads + head) * D + lane % 4 * 2;
#pragma unroll
        for (u32 d = 0; d < D / 8; d++)
            *reinterpret_cast<u32*>(to + d * 8) = pack(sum[d][half * 2] * share, sum[d][half * 2 + 1] * share);
        if (lane % 4 == 0)
            lse[(u64(b) * heads + head) * queries + i] = some ? (top[half] + log2_fast(all)) * LN_2 : 0.0f;
    }
}
