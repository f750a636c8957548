// Attention of few queries over many keys, split over the keys, as in decoding.   Dao et al. 2023 (Flash-Decoding)
//   o[i] = sum_j p[i,j] v[j],   p[i,j] = exp(q[i] . k[j] scale - lse[i]),   row_start[i] <= j < row_end[i]
//
// A block has R rows (queries of the heads that share keys: row = head of the group * T + query) and `chunk` keys;
// D/8 lanes hold a key, and every such group of lanes has an online softmax of its own. Groups, then warps, are brought
// to one maximum; `merge` does the same with the splits. A key that a row does not see is skipped, so that it changes
// no bit, whatever it holds. S counts splits; stats are (largest q . k, sum of weights against it).
//
// entry                             grid               block  shared  arguments                                                                                                bytes                      flops
// attention_fwd_decode_1_d32_bf16   Tk/chunk,HT,B      128    544     parts stats | q k v slots row_start row_end | T Tk H G q_stride kv_stride caches chunk | scale           2B(TH+2TkH/G)D+4SBTH(D+2)  4BHTTkD
// attention_fwd_decode_1_d64_bf16   Tk/chunk,HT,B      128    1056    parts stats | q k v slots row_start row_end | T Tk H G q_stride kv_stride caches chunk | scale           2B(TH+2TkH/G)D+4SBTH(D+2)  4BHTTkD
// attention_fwd_decode_1_d128_bf16  Tk/chunk,HT,B      128    2080    parts stats | q k v slots row_start row_end | T Tk H G q_stride kv_stride caches chunk | scale           2B(TH+2TkH/G)D+4SBTH(D+2)  4BHTTkD
// attention_fwd_decode_4_d32_bf16   Tk/chunk,H/G*R,B   128    2176    parts stats | q k v slots row_start row_end | T Tk H G q_stride kv_stride caches chunk | scale           2B(TH+2TkH/G)D+4SBTH(D+2)  4BHTTkD
// attention_fwd_decode_4_d64_bf16   Tk/chunk,H/G*R,B   128    4224    parts stats | q k v slots row_start row_end | T Tk H G q_stride kv_stride caches chunk | scale           2B(TH+2TkH/G)D+4SBTH(D+2)  4BHTTkD
// attention_fwd_decode_4_d128_bf16  Tk/chunk,H/G*R,B   128    8320    parts stats | q k v slots row_start row_end | T Tk H G q_stride kv_stride caches chunk | scale           2B(TH+2TkH/G)D+4SBTH(D+2)  4BHTTkD
// attention_fwd_merge_bf16          BHT/4              128    0       o lse | parts stats | rows T H D S | scale                                                               4SBTH(D+2)+2BTHD           2SBTHD
//
// Needs   D of 32, 64 or 128; strides multiples of 8; operands as in attention.cu.
// Rounds  once, on store of o; everything else in f32, fixed order (deterministic).
#include "common/interval.cuh"
#include "common/parts.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32;

// A softmax under way: the largest score, the sum of weights against it, and with them a sum of values.
template <int N>
struct Running {
    float top, total, sum[N];

    // The weight of a score against the largest, which does not exist yet where nothing was seen.
    INLINE static float weight(float score, float top, float scale) {
        return exp2_fast(fmaf(score, scale, top == -INFINITY ? 0.0f : -top * scale));
    }

    INLINE void clear() {
        top = -INFINITY, total = 0.0f;
#pragma unroll
        for (int e = 0; e < N; e++) sum[e] = 0.0f;
    }
    INLINE void add(float score, const float (&value)[N], float scale) {
        const float most = fmaxf(top, score), shrink = weight(top, most, scale), p = weight(score, most, scale);
        total = fmaf(total, shrink, p);
#pragma unroll
        for (int e = 0; e < N; e++) sum[e] = fmaf(sum[e], shrink, p * value[e]);
        top = most;
    }
    // With that of the lanes `offset` away.
    INLINE void join(int offset, float scale) {
        const float other = __shfl_xor_sync(0xffffffffu, top, offset), most = fmaxf(top, other);
        const float own = weight(top, most, scale), its = weight(other, most, scale);
        total = total * own + __shfl_xor_sync(0xffffffffu, total, offset) * its;
#pragma unroll
        for (int e = 0; e < N; e++) sum[e] = sum[e] * own + __shfl_xor_sync(0xffffffffu, sum[e], offset) * its;
        top = most;
    }
};

template <int ROWS, int D>
INLINE void decode(float* parts, float2* stats, const bf16* q, const bf16* k, const bf16* v, const int* slots,
                   const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
                   u32 kv_stride, u32 caches, u32 chunk, float scale) {
    constexpr int LANES = D / 8, EACH = 32 / LANES;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = lane % LANES * 8;
    const u32 rows = group * queries, blocks = (rows + ROWS - 1) / ROWS;
    const u32 kv_head = blockIdx.y / blocks, row0 = blockIdx.y % blocks * ROWS, b = blockIdx.z;
    const int slot = cache_of(slots, caches, b);

    // Rows beyond the last see nothing.
    float x[ROWS][8];
    int2 seen[ROWS];
    int first = 0x7fffffff, last = 0;
    Running<8> running[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        running[r].clear();
        seen[r] = make_int2(0, 0);
        if (row0 + r < rows) {
            const u32 head = kv_head * group + (row0 + r) / queries, n = b * queries + (row0 + r) % queries;
            unpack(x[r], load16(q + u64(n) * q_stride + head * D + column));
            if (slot >= 0) seen[r] = interval(row_start, row_end, n, keys);
        }
        if (seen[r].x < seen[r].y) first = min(first, seen[r].x), last = max(last, seen[r].y);
    }
    first = max(first, int(blockIdx.x * chunk)), last = min(last, int(min((blockIdx.x + 1) * chunk, keys)));

    const u64 cache = u64(max(slot, 0)) * keys * kv_stride + kv_head * D + column;
#pragma unroll 2
    for (int begin = first; begin < last; begin += WARPS * EACH) {
        const int key = begin + warp * EACH + lane / LANES;
        const bool there = key < last;
        const u64 at = cache + u64(there ? key : first) * kv_stride;
        float a[8], value[8];
        unpack(a, load16(k + at));
        unpack(value, load16(v + at));
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float score = 0.0f;
#pragma unroll
            for (int e = 0; e < 8; e++) score = fmaf(x[r][e], a[e], score);
            score = warp_reduce<Sum, LANES>(score);
            if (there && sees(seen[r], key)) running[r].add(score, value, scale * LOG2_E);
        }
    }

    __shared__ __align__(16) float sums[WARPS][ROWS][D];
    __shared__ float tops[WARPS][ROWS], totals[WARPS][ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int offset = LANES; offset < 32; offset *= 2) running[r].join(offset, scale * LOG2_E);
        if (lane < LANES) store_sums(&sums[warp][r][column], running[r].sum);
        if (lane == 0) tops[warp][r] = running[r].top, totals[warp][r] = running[r].total;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < ROWS * D; i += THREADS) {
        const u32 r = i / D, row = row0 + r;
        if (row >= rows) break;
        float top = tops[0][r], total = 0.0f, sum = 0.0f;
#pragma unroll
        for (int w = 1; w < WARPS; w++) top = fmaxf(top, tops[w][r]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float weight = Running<8>::weight(tops[w][r], top, scale * LOG2_E);
            total = fmaf(totals[w][r], weight, total);
            sum = fmaf(sums[w][r][i % D], weight, sum);
        }
        const u64 at = (u64(b) * heads * queries + kv_head * rows + row) * gridDim.x + blockIdx.x;
        parts[at * D + i % D] = sum;
        if (i % D == 0) stats[at] = make_float2(top, total);
    }
}

// A warp merges the splits of a row: batch row, head, query.
INLINE void merge(bf16* o, float* lse, const float* parts, const float2* stats, u32 rows, u32 queries, u32 heads, u32 width,
                  u32 splits, float scale) {
    const u32 row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const float2* own = stats + u64(row) * splits;
    float top = -INFINITY;
    for (u32 s = 0; s < splits; s++) top = fmaxf(top, own[s].x);
    const auto weight = [&](u32 s) { return Running<8>::weight(own[s].x, top, scale * LOG2_E); };
    float total = 0.0f;
    for (u32 s = 0; s < splits; s++) total = fmaf(own[s].y, weight(s), total);
    // Nothing was seen where no weight was: NaN is no zero.
    const bool some = total != 0.0f;
    const u32 b = row / (heads * queries), head = row / queries % heads, n = row % queries;
    for (u32 c = lane; c < width; c += 32) {
        float sum = 0.0f;
        for (u32 s = 0; s < splits; s++)
            sum = fmaf(parts[(u64(row) * splits + s) * width + c], weight(s), sum);
        store_one(o + ((u64(b) * queries + n) * heads + head) * width + c, some ? sum / total : 0.0f);
    }
    if (lane == 0) lse[row] = some ? top * scale + log2_fast(total) * LN_2 : 0.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_fwd_decode_1_d32_bf16(float* parts, float2* stats, const bf16* q, const bf16* k, const bf16* v, const int* slots,
        const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride, u32 kv_stride,
        u32 caches, u32 chunk, float scale) {
    decode<1, 32>(parts, stats, q, k, v, slots, row_start, row_end, queries, keys, heads, group, q_stride, kv_stride, caches,
        chunk, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_fwd_decode_1_d64_bf16(float* parts, float2* stats, const bf16* q, const bf16* k, const bf16* v, const int* slots,
        const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride, u32 kv_stride,
        u32 caches, u32 chunk, float scale) {
    decode<1, 64>(parts, stats, q, k, v, slots, row_start, row_end, queries, keys, heads, group, q_stride, kv_stride, caches,
        chunk, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_fwd_decode_1_d128_bf16(float* parts, float2* stats, const bf16* q, const bf16* k, const bf16* v, const int* slots,
        const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride, u32 kv_stride,
        u32 caches, u32 chunk, float scale) {
    decode<1, 128>(parts, stats, q, k, v, slots, row_start, row_end, queries, keys, heads, group, q_stride, kv_stride, caches,
        chunk, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_fwd_decode_4_d32_bf16(float* parts, float2* stats, const bf16* q, const bf16* k, const bf16* v, const int* slots,
        const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride, u32 kv_stride,
        u32 caches, u32 chunk, float scale) {
    decode<4, 32>(parts, stats, q, k, v, slots, row_start, row_end, queries, keys, heads, group, q_stride, kv_stride, caches,
        chunk, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_fwd_decode_4_d64_bf16(float* parts, float2* stats, const bf16* q, const bf16* k, const bf16* v, const int* slots,
        const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride, u32 kv_stride,
        u32 caches, u32 chunk, float scale) {
    decode<4, 64>(parts, stats, q, k, v, slots, row_start, row_end, queries, keys, heads, group, q_stride, kv_stride, caches,
        chunk, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_fwd_decode_4_d128_bf16(float* parts, float2* stats, const bf16* q, const bf16* k, const bf16* v, const int* slots,
        const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride, u32 kv_stride,
        u32 caches, u32 chunk, float scale) {
    decode<4, 128>(parts, stats, q, k, v, slots, row_start, row_end, queries, keys, heads, group, q_stride, kv_stride, caches,
        chunk, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_fwd_merge_bf16(bf16* o, float* lse, const float* parts, const float2* stats, u32 rows, u32 queries, u32 heads,
        u32 width, u32 splits, float scale) {
    merge(o, lse, parts, stats, rows, queries, heads, width, splits, scale);
}
