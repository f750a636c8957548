// Products of few rows with a weight, as in decoding: what moves is the weight, once.
//   y[n,m] = act(sum_k x[n,k] w[m,k] + bias[m]) + residual[n,m],   n < N <= 8
//
// A warp makes four columns of all rows: each lane reads 16 bytes of four rows of w and of every row of x, which is
// small and stays in the first-level cache, and multiplies them on the CUDA cores; a butterfly adds up the lanes.
// Rows beyond N repeat the last one and are not stored. act: 0 none, 1 silu, 2 SwiGLU over pairs of columns; 3 RoPE: in
// the first columns, as many as turn, heads of D turn by the positions of their rows, as in rope.cu.
//
// entry                  grid  block  shared  arguments                                                                                 bytes        flops
// linear_fwd_few_1_bf16   M/8   64     0       y pre | x w bias residual positions | N M K act has_bias has_residual D turning ratio:u64 |  2NK+2MK+4NM   2NMK
// linear_fwd_few_2_bf16   M/8   64     0       y pre | x w bias residual positions | N M K act has_bias has_residual D turning ratio:u64 |  2NK+2MK+4NM   2NMK
// linear_fwd_few_4_bf16   M/8   64     0       y pre | x w bias residual positions | N M K act has_bias has_residual D turning ratio:u64 |  2NK+2MK+4NM   2NMK
// linear_fwd_few_8_bf16   M/8   64     0       y pre | x w bias residual positions | N M K act has_bias has_residual D turning ratio:u64 |  2NK+2MK+4NM   2NMK
//
// Needs   0 < N <= the number in the name; K % 8 == 0 and M % 8 == 0, so that rows are 16-byte aligned. pre is not
//         written where act is 0 or 3; bias and residual are not read unless has_bias, has_residual say so, positions
//         where act is 3 alone: with D % 8 == 0.
// Rounds  once, on store; pre too, before the activation; sums in f32, fixed order (deterministic).
#include "common/pack.cuh"
#include "common/reduce.cuh"
#include "common/silu.cuh"
#include "common/waves.cuh"

constexpr int THREADS = 64, COLUMNS = 4;
enum Activation : u32 { NONE, SILU, SWIGLU, ROPE };

INLINE void add4(float (&v)[COLUMNS], const bf16* from) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    v[0] += low(x.x), v[1] += high(x.x), v[2] += low(x.y), v[3] += high(x.y);
}

INLINE uint2 store4(bf16* to, const float (&v)[COLUMNS]) {
    const uint2 stored = make_uint2(pack(v[0], v[1]), pack(v[2], v[3]));
    *reinterpret_cast<uint2*>(to) = stored;
    return stored;
}

// The first `turning` columns are heads of `width`, whose pairs turn by their row's position.
struct Rope {
    const int* positions;
    u32 width, turning;
    u64 ratio;

    INLINE void turn(u64 row, u32 column, float (&v)[COLUMNS]) const {
        const int position = column < turning ? positions[row] : -1;
        if (position < 0) return;
#pragma unroll
        for (int c = 0; c < COLUMNS; c += 2) {
            const Wave w = wave(turns(position, frequency(ratio, (column % width + c) / 2)));
            const float a = v[c], b = v[c + 1];
            v[c] = a * w.cos - b * w.sin, v[c + 1] = a * w.sin + b * w.cos;
        }
    }
};

struct Epilogue {
    bf16 *y, *pre;
    const bf16 *bias, *residual;
    u32 columns, activation;
    bool has_bias, has_residual;
    Rope rope;

    INLINE void finish(u64 row, u32 column, float (&v)[COLUMNS]) const {
        const u64 at = row * columns + column;
        if (has_bias) add4(v, bias + column);
        if (activation == ROPE) rope.turn(row, column, v);
        else if (activation != NONE) {
            // An activation takes what is stored.
            const uint2 stored = store4(pre + at, v);
            v[0] = low(stored.x), v[1] = high(stored.x), v[2] = low(stored.y), v[3] = high(stored.y);
        }
        if (activation == SWIGLU) {
            float gated[2] = {silu(v[0]) * v[1], silu(v[2]) * v[3]};
            if (has_residual) {
                const u32 r = *reinterpret_cast<const u32*>(residual + at / 2);
                gated[0] += low(r), gated[1] += high(r);
            }
            *reinterpret_cast<u32*>(y + at / 2) = pack(gated[0], gated[1]);
            return;
        }
        if (activation == SILU) {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) v[c] = silu(v[c]);
        }
        if (has_residual) add4(v, residual + at);
        store4(y + at, v);
    }
};

template <int ROWS>
INLINE void few(const Epilogue& out, const bf16* x, const bf16* w, u32 rows, u32 depth) {
    const u32 lane = threadIdx.x % 32, column = (blockIdx.x * (THREADS / 32) + threadIdx.x / 32) * COLUMNS;
    float sum[ROWS][COLUMNS] = {};
    const bf16* weights = w + u64(column) * depth;
#pragma unroll 2
    for (u32 k = lane * 8; k < depth; k += 32 * 8) {
        Vec16 packed_weights[COLUMNS], packed_rows[ROWS];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) packed_weights[c] = load16(weights + u64(c) * depth + k);
#pragma unroll
        for (int r = 0; r < ROWS; r++) packed_rows[r] = load16(x + u64(min(u32(r), rows - 1)) * depth + k);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float a[8];
            unpack(a, packed_rows[r]);
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                float b[8];
                unpack(b, packed_weights[c]);
#pragma unroll
                for (int e = 0; e < 8; e++) sum[r][c] = fmaf(a[e], b[e], sum[r][c]);
            }
        }
    }
    float mine[COLUMNS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const float total = warp_reduce<Sum>(sum[r][c]);
            if (lane == r) mine[c] = total;
        }
    if (lane < min(rows, u32(ROWS))) out.finish(lane, column, mine);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    linear_fwd_few_1_bf16(bf16* y, bf16* pre, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual,
        const int* positions, u32 rows, u32 columns, u32 depth, u32 activation, u32 has_bias, u32 has_residual, u32 width,
        u32 turning, u64 ratio) {
    few<1>({y, pre, bias, residual, columns, activation, has_bias != 0, has_residual != 0, {positions, width, turning, ratio}},
        x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    linear_fwd_few_2_bf16(bf16* y, bf16* pre, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual,
        const int* positions, u32 rows, u32 columns, u32 depth, u32 activation, u32 has_bias, u32 has_residual, u32 width,
        u32 turning, u64 ratio) {
    few<2>({y, pre, bias, residual, columns, activation, has_bias != 0, has_residual != 0, {positions, width, turning, ratio}},
        x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    linear_fwd_few_4_bf16(bf16* y, bf16* pre, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual,
        const int* positions, u32 rows, u32 columns, u32 depth, u32 activation, u32 has_bias, u32 has_residual, u32 width,
        u32 turning, u64 ratio) {
    few<4>({y, pre, bias, residual, columns, activation, has_bias != 0, has_residual != 0, {positions, width, turning, ratio}},
        x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    linear_fwd_few_8_bf16(bf16* y, bf16* pre, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual,
        const int* positions, u32 rows, u32 columns, u32 depth, u32 activation, u32 has_bias, u32 has_residual, u32 width,
        u32 turning, u64 ratio) {
    few<8>({y, pre, bias, residual, columns, activation, has_bias != 0, has_residual != 0, {positions, width, turning, ratio}},
        x, w, rows, depth);
}
