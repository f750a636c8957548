// Each q head and each k head of a packed row through a norm of its own.             Dehghani et al. 2023
//   y = x r w,   r = 1 / sqrt(mean x^2 + eps) over the D columns of a head
//   dx = r (w dy - x r^2 mean(w dy x)),   dw = sum over rows and heads of dy x r
//
// A row has H query heads, then K - H key heads, then the rest of A heads, which is copied. A head belongs to
// a group of lanes, one vector a lane, so that every element crosses the bus once. Blocks walk over the heads
// of all rows; each lane keeps its part of both dw in registers, blocks write theirs once, and `sum` adds the
// parts of all P blocks. G counts the heads that a block holds at once.
//
// entry             grid                block  shared  arguments                                              bytes
// qk_norm_fwd_bf16  min(N*A/G,8*sms)    256    0       y | x wq wk | N A H K D | eps                          4NAD+4D
// qk_norm_fwd_f32   min(N*A/G,8*sms)    256    0       y | x wq wk | N A H K D | eps                          8NAD+8D
// qk_norm_bwd_bf16  min(N*A/G,4*sms)    256    0+64D   dx qparts kparts | x wq wk dy | N A H K D | eps        6NAD+4D+8PD
// qk_norm_bwd_f32   min(N*A/G,4*sms)    256    0+64D   dx qparts kparts | x wq wk dy | N A H K D | eps        12NAD+8D+8PD
// qk_norm_bwd_sum_bf16  D/32            256    1024    dw | parts | P D accumulate |                          4PD+2D
// qk_norm_bwd_sum_f32   D/32            256    1024    dw | parts | P D accumulate |                          4PD+4D
//
// Needs   D % 8 == 0, D <= 256 (bf16), 128 (f32), rows 16-byte aligned.
// Rounds  once, on store; sums in f32, fixed order (deterministic).
#include "common/groups.cuh"
#include "common/lots.cuh"
#include "common/parts.cuh"

constexpr int THREADS = 256;

// The shape of packed rows.
struct Shape {
    u32 rows, heads, queries, normed, width;
};

// mean x^2 + eps over a group.
template <int N>
INLINE float mean_square(const Groups& groups, const float (&x)[N], u32 width, float eps) {
    float squares = 0.0f;
#pragma unroll
    for (int e = 0; e < N; e++) squares = fmaf(x[e], x[e], squares);
    return groups.sum(squares) / float(width) + eps;
}

template <typename T>
INLINE void forward(T* y, const T* x, const T* wq, const T* wk, Shape s, float eps) {
    constexpr int N = WIDTH<T>;
    const Groups groups(s.width / N);
    const u32 c = groups.lane * N;
    float q[N] = {}, k[N] = {};
    if (c < s.width) {
        load(q, wq + c);
        load(k, wk + c);
    }
    groups.for_rows(s.rows * s.heads, [&](u32 i, bool there) {
        const u32 h = i % s.heads;
        const u64 at = u64(i) * s.width + c;
        const bool held = there && c < s.width;
        float v[N] = {};
        if (held) load(v, x + at);
        const float r = 1.0f / sqrtf(mean_square(groups, v, s.width, eps));
        if (h < s.normed) {
#pragma unroll
            for (int e = 0; e < N; e++) v[e] *= r * (h < s.queries ? q[e] : k[e]);
        }
        if (held) store(y + at, v);
    });
}

// The sums of all groups of a block, for each column in a fixed order. `sums` holds a row of width D for each
// warp.
template <int N>
INLINE void block_parts(float* parts, const Groups& groups, float (&sum)[N], u32 width, float* sums) {
    const u32 warp = threadIdx.x / 32, c = groups.lane * N;
    for (u32 offset = groups.lanes; offset < 32; offset *= 2) {
#pragma unroll
        for (int e = 0; e < N; e++) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], offset);
    }
    if (groups.group == 0 && c < width) store_sums(sums + warp * width + c, sum);
    __syncthreads();
    for (u32 d = threadIdx.x; d < width; d += THREADS) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) total += sums[w * width + d];
        parts[u64(blockIdx.x) * width + d] = total;
    }
}

template <typename T>
INLINE void backward(T* dx, float* qparts, float* kparts, const T* x, const T* wq, const T* wk, const T* dy,
                     Shape s, float eps) {
    constexpr int N = WIDTH<T>;
    extern __shared__ __align__(16) float sums[];
    const Groups groups(s.width / N);
    const u32 c = groups.lane * N;
    float q[N] = {}, k[N] = {}, dq[N] = {}, dk[N] = {};
    if (c < s.width) {
        load(q, wq + c);
        load(k, wk + c);
    }
    groups.for_rows(s.rows * s.heads, [&](u32 i, bool there) {
        const u32 h = i % s.heads;
        const u64 at = u64(i) * s.width + c;
        const bool held = there && c < s.width, normed = h < s.normed, query = h < s.queries;
        float v[N] = {}, d[N] = {};
        if (held && normed) load(v, x + at);
        if (held) load(d, dy + at);
        const float square = mean_square(groups, v, s.width, eps), r = 1.0f / sqrtf(square);
        float dot = 0.0f;
#pragma unroll
        for (int e = 0; e < N; e++) dot = fmaf((query ? q[e] : k[e]) * d[e], v[e], dot);
        const float shrink = groups.sum(dot) / (square * float(s.width));
        if (normed) {
#pragma unroll
            for (int e = 0; e < N; e++) {
                const float dw = d[e] * v[e] * r;
                dq[e] += query ? dw : 0.0f;
                dk[e] += query ? 0.0f : dw;
                d[e] = r * fmaf(query ? q[e] : k[e], d[e], -v[e] * shrink);
            }
        }
        if (held) store(dx + at, d);
    });
    block_parts(qparts, groups, dq, s.width, sums);
    block_parts(kparts, groups, dk, s.width, sums + THREADS / 32 * s.width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    qk_norm_fwd_bf16(bf16* y, const bf16* x, const bf16* wq, const bf16* wk, u32 rows, u32 heads, u32 queries, u32 normed, u32 width, float eps) {
    forward(y, x, wq, wk, {rows, heads, queries, normed, width}, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    qk_norm_fwd_f32(float* y, const float* x, const float* wq, const float* wk, u32 rows, u32 heads, u32 queries, u32 normed, u32 width, float eps) {
    forward(y, x, wq, wk, {rows, heads, queries, normed, width}, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
    qk_norm_bwd_bf16(bf16* dx, float* qparts, float* kparts, const bf16* x, const bf16* wq, const bf16* wk, const bf16* dy, u32 rows, u32 heads, u32 queries, u32 normed, u32 width, float eps) {
    backward(dx, qparts, kparts, x, wq, wk, dy, {rows, heads, queries, normed, width}, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    qk_norm_bwd_f32(float* dx, float* qparts, float* kparts, const float* x, const float* wq, const float* wk, const float* dy, u32 rows, u32 heads, u32 queries, u32 normed, u32 width, float eps) {
    backward(dx, qparts, kparts, x, wq, wk, dy, {rows, heads, queries, normed, width}, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    qk_norm_bwd_sum_bf16(bf16* dw, const float* parts, u32 count, u32 width, u32 accumulate) {
    sum_parts<THREADS>(dw, parts, count, width, accumulate);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    qk_norm_bwd_sum_f32(float* dw, const float* parts, u32 count, u32 width, u32 accumulate) {
    sum_parts<THREADS>(dw, parts, count, width, accumulate);
}
