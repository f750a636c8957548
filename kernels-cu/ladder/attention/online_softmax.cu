// Attention, rung 2: online softmax, no scores in memory.                             Milakov & Gimelshein 2018
//   o[i] = sum_j p[i,j] v[j],   p[i,j] = exp(q[i] . k[j] scale - lse[i]),   row_start[i] <= j < row_end[i]
//
// A warp takes a query past its keys once and keeps the largest score so far, the sum of the weights relative to it,
// and the weighted sum of the values. A larger score shrinks both sums by exp(old - new): at the end they are what two
// passes would have made. Nothing of the size T Tk exists, and hidden keys are never looked at.
// What it costs: every query reads all its keys and values itself, so nothing is shared; and the five shuffles
// of a sum over the lanes stand between one key and the next.
//
// entry                              grid     block  shared  arguments                                                              bytes                       flops
// attention_fwd_online_softmax_bf16  T/4,H,B  128    0       o lse | q k v row_start row_end | T Tk H G q_stride kv_stride | scale  2B(2TH+2TkH/G)D+4BTH+8BT  4BHTTkD
//
// Hides   k, v
// Needs   D == 64
// Rounds  once, on store; everything between in f32.
#include "common/interval.cuh"
#include "common/lots.cuh"
#include "common/reduce.cuh"

constexpr u32 D = 64;

extern "C" __global__ void __launch_bounds__(128)
    attention_fwd_online_softmax_bf16(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v,
        const int* row_start, const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 q_stride,
        u32 kv_stride, float scale) {
    const u32 i = blockIdx.x * 4 + threadIdx.x / 32, head = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % 32;
    if (i >= queries) return;
    const u64 row = u64(b) * queries + i;
    const int2 seen = interval(row_start, row_end, row, keys);
    // A lane holds two elements of each row.
    const u64 own = u64(b) * keys * kv_stride + head / group * D + lane * 2;
    float x[2], y[2], sum[2] = {}, top = -INFINITY, total = 0.0f;
    load(x, q + row * q_stride + head * D + lane * 2);
    for (int j = seen.x; j < seen.y; j++) {
        load(y, k + own + u64(j) * kv_stride);
        const float s = warp_reduce<Sum>(x[0] * y[0] + x[1] * y[1]) * (scale * LOG2_E);
        const float most = fmaxf(top, s), shrink = exp2_fast(top - most), p = exp2_fast(s - most);
        load(y, v + own + u64(j) * kv_stride);
        total = total * shrink + p, top = most;
        sum[0] = sum[0] * shrink + p * y[0], sum[1] = sum[1] * shrink + p * y[1];
    }
    const bool some = seen.x < seen.y;
    const float share = some ? 1.0f / total : 0.0f;
    sum[0] *= share, sum[1] *= share;
    store(o + (row * heads + head) * D + lane * 2, sum);
    if (lane == 0) lse[(u64(b) * heads + head) * queries + i] = some ? (top + log2_fast(total)) * LN_2 : 0.0f;
}
