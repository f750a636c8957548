// Attention, rung 6: a pipeline of asynchronous copies.
//   o[i] = sum_j p[i,j] v[j],   p[i,j] = exp(q[i] . k[j] scale - lse[i]),   row_start[i] <= j < row_end[i]
//
// cp.async brings the next tile of keys and values into a second stage of shared memory while this one is multiplied:
// no registers on the way, and no thread that waits. One barrier a tile is enough: a thread that passes it has seen its
// own copies arrive, so after it all have, and all have left the stage that the next copies overwrite.
// What it costs: shared memory for the second stage. The shipped kernel goes on from here: 32 queries a warp, so that
// each fragment of a key is used twice, whole rows written through shared memory, the blocks that see most first, and
// hidden numbers that are not finite taken out where they would come through.
//
// entry                        grid      block  shared     arguments                                                              bytes                       flops
// attention_fwd_cp_async_bf16  T/64,H,B  128    128+40960  o lse | q k v row_start row_end | T Tk H G q_stride kv_stride | scale  2B(2TH+2TkH/G)D+4BTH+8BT  4BHTTkD
//
// Hides   k
// Needs   D == 64
// Rounds  p to bf16 as a factor; o once, on store; sums in f32.
#include "common/interval.cuh"
#include "common/pack.cuh"
#include "common/reduce.cuh"
#include "common/tile.cuh"

constexpr u32 D = 64, TILE = 64, BYTES = 2 * D, THREADS = 128;

extern __shared__ __align__(128) char tiles[];

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_fwd_cp_async_bf16(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v,
        const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
        u32 kv_stride, float scale) {
    const u32 tile_q = shared_address(tiles), ring = tile_q + TILE * BYTES;
    const u32 first = blockIdx.x * TILE, head = blockIdx.y, b = blockIdx.z;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = warp * 16 + lane / 4;
    const u64 cache = u64(b) * keys * kv_stride + head / group * D;
    // Of the two rows of a lane, `own` and 8 further: what they see, and the state of their softmax.
    int2 seen[2] = {};
    // Of all rows: one sees begin..end, all see inner_begin..inner_end.
    int begin = 0x7fffffff, end = 0, inner_begin = 0, inner_end = 0x7fffffff;
    __shared__ int slots[THREADS / 32];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 i = first + own + half * 8;
        if (i >= queries) continue;
        const int2 range = seen[half] = interval(row_start, row_end, u64(b) * queries + i, keys);
        if (range.x < range.y) begin = min(begin, range.x), end = max(end, range.y);
        inner_begin = max(inner_begin, range.x), inner_end = min(inner_end, range.y);
    }
    begin = -block_reduce<Max, THREADS>(-begin, slots), end = block_reduce<Max, THREADS>(end, slots);
    inner_begin = block_reduce<Max, THREADS>(inner_begin, slots);
    inner_end = -block_reduce<Max, THREADS>(-inner_end, slots);
    float sum[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
    const u32 down = down_right<BYTES>(), right = right_down<BYTES>();
    const auto fetch = [&](u32 tile, const bf16* from, u32 stride, u32 first, u32 rows) {
        copy_tile<TILE, BYTES, THREADS>(tile, from + u64(first) * stride, stride, rows - first, D);
    };
    const auto fetch_keys = [&](int key, u32 stage) {
        if (key < end) fetch(stage, k + cache, kv_stride, key, keys);
        if (key < end) fetch(stage + TILE * BYTES, v + cache, kv_stride, key, keys);
        commit_copies();
    };
    fetch(tile_q, q + u64(b) * queries * q_stride + head * D, q_stride, first, queries);
    fetch_keys(begin, ring);
    u32 tile_k = ring, next = ring + 2 * TILE * BYTES;
    for (int key = begin; key < end; key += TILE) {
        const bool whole = inner_begin <= key && inner_end >= key + int(TILE);
        const u32 tile_v = tile_k + TILE * BYTES;
        wait_copies<0>();
        __syncthreads();
        fetch_keys(key + TILE, next);
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
                x *= scale * LOG2_E;
                if (!whole && !sees(seen[half], key + e / 2 * 8 + lane % 4 * 2 + e % 2)) x = -INFINITY;
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
        const u32 done = tile_k;
        tile_k = next, next = done;
    }
    // Where nobody sees anything, the queries are still on their way.
    wait_copies<0>();
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
