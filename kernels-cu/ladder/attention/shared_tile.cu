// Attention, rung 3: tiles of keys and values in shared memory.                                    Dao et al. 2022
//   o[i] = sum_j p[i,j] v[j],   p[i,j] = exp(q[i] . k[j] scale - lse[i]),   row_start[i] <= j < row_end[i]
//
// A block has 64 queries, one a thread, with q and the sum in registers. Tiles of 64 keys and values pass through
// shared memory, so each is read from global memory once for 64 queries. All threads look at the same key at the same
// time: one read of shared memory serves a warp (broadcast), and no sum crosses lanes.
// What it costs: 128 registers for q and the sum alone, so few warps fit. All tiles are read, hidden ones too. And each
// multiply-add is still an instruction of its own.
//
// entry                           grid      block  shared  arguments                                                              bytes                       flops
// attention_fwd_shared_tile_bf16  T/64,H,B  64     16384   o lse | q k v row_start row_end | T Tk H G q_stride kv_stride | scale  2B(2TH+2TkH/G)D+4BTH+8BT  4BHTTkD
//
// Hides   k, v
// Needs   D == 64
// Rounds  once, on store; everything between in f32.
#include "common/interval.cuh"
#include "common/pack.cuh"

constexpr u32 D = 64, TILE = 64;

// Rows from `first` on; zeros where there is nothing.
INLINE void fetch(u32 (&tile)[TILE][D / 2], const bf16* from, u32 stride, u32 first, u32 rows) {
    for (u32 c = threadIdx.x; c < TILE * D / 8; c += 64) {
        const u32 r = c / 8, e = c % 8;
        const Vec16 x = first + r < rows ? load16(from + u64(first + r) * stride + e * 8) : Vec16{};
        store_shared(shared_address(&tile[r][e * 4]), x.word);
    }
}

// Eight elements of a row of a tile.
INLINE void read(float (&x)[8], const u32* from) { unpack(x, load16(from)); }

// Eight sums side by side and then a tree: eight additions under way at once, and less to round away.
INLINE float sum_of(const float (&x)[8]) {
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

extern "C" __global__ void __launch_bounds__(64)
    attention_fwd_shared_tile_bf16(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v,
        const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
        u32 kv_stride, float scale) {
    __shared__ __align__(16) u32 tile_k[TILE][D / 2], tile_v[TILE][D / 2];
    const u32 i = blockIdx.x * 64 + threadIdx.x, head = blockIdx.y, b = blockIdx.z;
    const u64 row = u64(b) * queries + i, cache = u64(b) * keys * kv_stride + head / group * D;
    float x[D] = {}, sum[D] = {}, y[8], top = -INFINITY, total = 0.0f;
    int2 seen = make_int2(0, 0);
    if (i < queries) {
        seen = interval(row_start, row_end, row, keys);
#pragma unroll
        for (u32 d = 0; d < D; d += 8) {
            unpack(y, load16(q + row * q_stride + head * D + d));
#pragma unroll
            for (u32 e = 0; e < 8; e++) x[d + e] = y[e];
        }
    }
    for (u32 first = 0; first < keys; first += TILE) {
        __syncthreads();
        fetch(tile_k, k + cache, kv_stride, first, keys);
        fetch(tile_v, v + cache, kv_stride, first, keys);
        __syncthreads();
        for (u32 j = 0; j < TILE; j++) {
            if (!sees(seen, first + j)) continue;
            float part[8] = {};
#pragma unroll
            for (u32 d = 0; d < D; d += 8) {
                read(y, &tile_k[j][d / 2]);
#pragma unroll
                for (u32 e = 0; e < 8; e++) part[e] += x[d + e] * y[e];
            }
            const float s = sum_of(part) * (scale * LOG2_E);
            const float most = fmaxf(top, s), shrink = exp2_fast(top - most), p = exp2_fast(s - most);
            total = total * shrink + p, top = most;
#pragma unroll
            for (u32 d = 0; d < D; d += 8) {
                read(y, &tile_v[j][d / 2]);
#pragma unroll
                for (u32 e = 0; e < 8; e++) sum[d + e] = sum[d + e] * shrink + p * y[e];
            }
        }
    }
    if (i >= queries) return;
    const bool some = seen.x < seen.y;
    const float share = some ? 1.0f / total : 0.0f;
#pragma unroll
    for (u32 d = 0; d < D; d += 8) {
#pragma unroll
        for (u32 e = 0; e < 8; e++) y[e] = sum[d + e] * share;
        store16(o + (row * heads + head) * D + d, packed(y));
    }
    lse[(u64(b) * heads + head) * queries + i] = some ? (top + log2_fast(total)) * LN_2 : 0.0f;
}
