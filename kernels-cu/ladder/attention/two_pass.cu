// Attention, rung 1: all scores in global memory.
//   o[i] = sum_j p[i,j] v[j],   p[i,j] = exp(q[i] . k[j] scale - lse[i]),   row_start[i] <= j < row_end[i]
//
// The formula as it stands on paper, one kernel for each step: a thread makes a score; a warp makes the weights of a
// query, in place; a thread makes an element of the result. Scores are kept in units of ln 2, for exp2.
// What it costs: T Tk scores of each head are written, read, written and read again, although nobody asked for them;
// the memory grows with the square of the sequence. And products are made one element at a time, hidden ones too.
//
// entry                                grid           block  shared  arguments                                                    bytes                     flops
// attention_fwd_two_pass_scores_bf16   Tk/32,T/4,BH   32x4   0       scores | q k row_start row_end | T Tk H G D q_stride kv_stride | scale  2B(TH+TkH/G)D+4BHTTk+8BT  2BHTTkD
// attention_fwd_two_pass_weights_bf16  T/4,H,B        128    0       scores lse | - | T Tk H |                                    8BHTTk+4BHT               4BHTTk
// attention_fwd_two_pass_values_bf16   D/32,T/4,BH    32x4   0       o | scores v | T Tk H G D kv_stride |                        4BHTTk+2B(TH+TkH/G)D      2BHTTkD
//
// Scratch scores 4BHTTk
// Hides   k
// Needs   D % 32 == 0
// Rounds  once, on store; everything between in f32.
#include "common/interval.cuh"
#include "common/pack.cuh"
#include "common/reduce.cuh"

extern "C" __global__ void __launch_bounds__(128)
    attention_fwd_two_pass_scores_bf16(float* scores, const bf16* q, const bf16* k, const int* row_start,
        const int* row_end, u32 queries, u32 keys, u32 heads, u32 group, u32 width, u32 q_stride, u32 kv_stride,
        float scale) {
    const u32 j = blockIdx.x * 32 + threadIdx.x, i = blockIdx.y * 4 + threadIdx.y;
    const u32 b = blockIdx.z / heads, head = blockIdx.z % heads;
    if (i >= queries || j >= keys) return;
    q += (u64(b) * queries + i) * q_stride + head * width;
    k += (u64(b) * keys + j) * kv_stride + head / group * width;
    float sum = 0.0f;
    for (u32 d = 0; d < width; d++) sum += to_float(q[d]) * to_float(k[d]);
    const bool seen = sees(interval(row_start, row_end, u64(b) * queries + i, keys), j);
    scores[(u64(blockIdx.z) * queries + i) * keys + j] = seen ? sum * (scale * LOG2_E) : -INFINITY;
}

extern "C" __global__ void __launch_bounds__(128)
    attention_fwd_two_pass_weights_bf16(float* scores, float* lse, u32 queries, u32 keys, u32 heads) {
    const u32 i = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (i >= queries) return;
    const u64 row = (u64(blockIdx.z) * heads + blockIdx.y) * queries + i;
    scores += row * keys;
    float top = -INFINITY, total = 0.0f;
    for (u32 j = lane; j < keys; j += 32) top = fmaxf(top, scores[j]);
    top = warp_reduce<Max>(top);
    // A query that sees nothing has no largest score, and a sum of zero.
    const float base = top == -INFINITY ? 0.0f : top;
    for (u32 j = lane; j < keys; j += 32) total += exp2_fast(scores[j] - base);
    total = warp_reduce<Sum>(total);
    for (u32 j = lane; j < keys; j += 32) scores[j] = total == 0.0f ? 0.0f : exp2_fast(scores[j] - base) / total;
    if (lane == 0) lse[row] = total == 0.0f ? 0.0f : (base + log2_fast(total)) * LN_2;
}

extern "C" __global__ void __launch_bounds__(128)
    attention_fwd_two_pass_values_bf16(bf16* o, const float* scores, const bf16* v, u32 queries, u32 keys, u32 heads,
        u32 group, u32 width, u32 kv_stride) {
    const u32 d = blockIdx.x * 32 + threadIdx.x, i = blockIdx.y * 4 + threadIdx.y;
    const u32 b = blockIdx.z / heads, head = blockIdx.z % heads;
    if (i >= queries) return;
    scores += (u64(blockIdx.z) * queries + i) * keys;
    v += u64(b) * keys * kv_stride + head / group * width;
    float sum = 0.0f;
    for (u32 j = 0; j < keys; j++) sum += scores[j] * to_float(v[u64(j) * kv_stride + d]);
    store_one(o + ((u64(b) * queries + i) * heads + head) * width + d, sum);
}
