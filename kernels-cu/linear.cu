// Matrix products on tensor cores, with what follows them.
//   y[n,m] = act(sum_k x[n,k] w[m,k] + bias[m]) + residual[n,m]     (fwd; act: none, silu, SwiGLU over pairs)
//   dx[n,k] = sum_m dy[n,m] w[m,k],   dw[m,k] (+)= sum_n dy[n,m] x[n,k]
//   dpre[n,2k], dpre[n,2k+1] = dx[n,k] dSwiGLU(pre[n,2k], pre[n,2k+1])       (dx_swiglu: x[n,k] is SwiGLU of pre)
//
// One main loop: block tiles of rows x columns, `BK` deep, arrive through a ring of cp.async stages; warps of
// 64x64 (32x32 in the small tile) multiply them by mma.m16n8k16, the fragments of the next 16 of depth on
// their way meanwhile. Either operand may lie along the depth or across it; ldmatrix.trans turns the latter,
// so nothing is ever transposed in memory. Finished rows pass through shared memory once, so that global
// memory sees whole lines. Blocks are numbered in groups of 8 tile rows, which share what they read in L2.
// Where dw has fewer tiles than the machine has room, S blocks split its depth N and `sum` adds their parts.
// T counts tiles: ceil(rows / tile rows) ceil(columns / tile columns).
//
// entry                           grid     block  shared   arguments                                                  bytes         flops
// linear_fwd_128x256_bf16         T        256    0+98304  y | x w bias residual | N M K has_bias has_residual |      2NK+2MK+4NM   2NMK
// linear_fwd_128x128_bf16         T        128    0+65536  y | x w bias residual | N M K has_bias has_residual |      2NK+2MK+4NM   2NMK
// linear_fwd_64x64_bf16           T        128    0+32768  y | x w bias residual | N M K has_bias has_residual |      2NK+2MK+4NM   2NMK
// linear_fwd_silu_128x128_bf16    T        128    0+65536  y pre | x w bias residual | N M K has_bias has_residual |  2NK+2MK+6NM   2NMK
// linear_fwd_silu_64x64_bf16      T        128    0+32768  y pre | x w bias residual | N M K has_bias has_residual |  2NK+2MK+6NM   2NMK
// linear_fwd_swiglu_128x256_bf16  T        256    0+98304  y pre | x w bias residual | N M K has_bias has_residual |  2NK+2MK+4NM   2NMK
// linear_fwd_swiglu_128x128_bf16  T        128    0+65536  y pre | x w bias residual | N M K has_bias has_residual |  2NK+2MK+4NM   2NMK
// linear_fwd_swiglu_64x64_bf16    T        128    0+32768  y pre | x w bias residual | N M K has_bias has_residual |  2NK+2MK+4NM   2NMK
// linear_dx_128x256_bf16          T        256    0+98304  dx | dy w | N M K |                                        2NM+2MK+2NK   2NMK
// linear_dx_128x128_bf16          T        128    0+65536  dx | dy w | N M K |                                        2NM+2MK+2NK   2NMK
// linear_dx_64x64_bf16            T        128    0+32768  dx | dy w | N M K |                                        2NM+2MK+2NK   2NMK
// linear_dx_swiglu_128x256_bf16   T        256    0+98304  dpre | dy w pre | N M K |                                  2NM+2MK+8NK   2NMK
// linear_dx_swiglu_128x128_bf16   T        128    0+65536  dpre | dy w pre | N M K |                                  2NM+2MK+8NK   2NMK
// linear_dx_swiglu_64x64_bf16     T        128    0+32768  dpre | dy w pre | N M K |                                  2NM+2MK+8NK   2NMK
// linear_dw_128x256_bf16          T        256    0+98304  dw | dy x | N M K accumulate |                             2NM+2NK+2MK   2NMK
// linear_dw_128x128_bf16          T        128    0+65536  dw | dy x | N M K accumulate |                             2NM+2NK+2MK   2NMK
// linear_dw_64x64_bf16            T        128    0+32768  dw | dy x | N M K accumulate |                             2NM+2NK+2MK   2NMK
// linear_dw_128x256_f32           T        256    0+98304  dw | dy x | N M K accumulate |                             2NM+2NK+4MK   2NMK
// linear_dw_128x128_f32           T        128    0+65536  dw | dy x | N M K accumulate |                             2NM+2NK+4MK   2NMK
// linear_dw_64x64_f32             T        128    0+32768  dw | dy x | N M K accumulate |                             2NM+2NK+4MK   2NMK
// linear_dw_split_128x128_f32     T,S      128    0+65536  parts | dy x | N M K depth |                               2NM+2NK+4SMK  2NMK
// linear_dw_split_64x64_f32       T,S      128    0+32768  parts | dy x | N M K depth |                               2NM+2NK+4SMK  2NMK
// linear_dw_sum_bf16              MK/2048  256    0        dw | parts | MK S accumulate |                             4SMK+2MK      SMK
// linear_dw_sum_f32               MK/1024  256    0        dw | parts | MK S accumulate |                             4SMK+4MK      SMK
//
// Needs   K % 8 == 0 and M % 8 == 0, so that rows are 16-byte aligned; any N. Shared
//         memory is dynamic. bias and residual are not read unless has_bias, has_residual say so.
// Rounds  once, on store; pre too, before the activation; sums in f32, fixed order (deterministic).
#include "common/gate.cuh"
#include "common/product.cuh"
#include "common/tile.cuh"

// A block's tile, cut into warp tiles, and the ring of stages that feeds it.
template <int ROWS_, int COLUMNS_, int WARP_>
struct Tile {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, WARP = WARP_;
    static constexpr int DEPTH = 32, STAGES = 4;
    static constexpr int WARP_ROWS = ROWS / WARP, THREADS = 32 * WARP_ROWS * (COLUMNS / WARP);
    // Multiplications of a warp: 16 rows by 8 columns each.
    static constexpr int MI = WARP / 16, NI = WARP / 8;
    static constexpr int A_BYTES = ROWS * DEPTH * 2, B_BYTES = COLUMNS * DEPTH * 2;
    static constexpr int STAGE_BYTES = A_BYTES + B_BYTES;

    INLINE static u32 warp_row() { return threadIdx.x / 32 % WARP_ROWS * WARP; }
    INLINE static u32 warp_column() { return threadIdx.x / 32 / WARP_ROWS * WARP; }
};

using Large = Tile<128, 256, 64>;
using Medium = Tile<128, 128, 64>;
using Small = Tile<64, 64, 32>;

// One factor of a product, `extent` vectors of which each block needs `SIZE` from `first` on. ALONG: a vector
// is a row of memory and the depth runs along it; else a column.
template <int SIZE, bool ALONG>
struct Factor {
    static constexpr int BYTES = 2 * (ALONG ? 32 : SIZE);
    const bf16* data;
    u64 stride;
    int extent, first;

    // The tile at depth `k`, zero beyond `end`.
    template <int THREADS>
    INLINE void fetch(u32 tile, int k, int end) const {
        if constexpr (ALONG) {
            copy_tile<SIZE, BYTES, THREADS>(tile, data + first * stride + k, stride, extent - first, end - k);
        } else {
            copy_tile<32, BYTES, THREADS>(tile, data + k * stride + first, stride, end - k, extent - first);
        }
    }

    // This lane's part of the address of the blocks from vector `at` on. `LEFT` factors give a fragment of
    // 16x16, right ones two of 16x8 side by side.
    template <bool LEFT>
    INLINE static u32 lane(u32 at) {
        const u32 own = LEFT == ALONG ? down_right<BYTES>() : right_down<BYTES>();
        return ALONG ? block_at<BYTES>(own, at / 16, 0) : block_at<BYTES>(own, 0, at / 16);
    }

    // The fragment of vectors 16 i and on at depth 16 k of the tile.
    INLINE static void load(u32 (&fragment)[4], u32 tile, u32 lane, int i, int k) {
        if constexpr (ALONG) {
            load_matrices(fragment, tile + block_at<BYTES>(lane, i, k));
        } else {
            load_matrices_transposed(fragment, tile + block_at<BYTES>(lane, k, i));
        }
    }
};

// acc += a b over the depths begin..end, of the block's tile. At the end no copy is under way, and all threads have
// read the ring.
template <typename T, typename A, typename B>
INLINE void multiply(float (&acc)[T::MI][T::NI][4], const A& a, const B& b, int begin, int end, u32 ring) {
    constexpr int SLICES = T::DEPTH / 16;
    const u32 a_lane = A::template lane<true>(T::warp_row()), b_lane = B::template lane<false>(T::warp_column());
    const int steps = (end - begin + T::DEPTH - 1) / T::DEPTH;
    const auto fetch = [&](int step) {
        if (step < steps) {
            const u32 stage = ring + step % T::STAGES * T::STAGE_BYTES;
            a.template fetch<T::THREADS>(stage, begin + step * T::DEPTH, end);
            b.template fetch<T::THREADS>(stage + T::A_BYTES, begin + step * T::DEPTH, end);
        }
        // Groups are counted, so that empty ones stand in for steps that are not there.
        commit_copies();
    };
    // Fragments of the slice being multiplied and of the next.
    u32 left[2][T::MI][4], right[2][T::NI / 2][4];
    const auto load = [&](int step, int slice) {
        const u32 stage = ring + step % T::STAGES * T::STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < T::MI; i++) A::load(left[slice % 2][i], stage, a_lane, i, slice);
#pragma unroll
        for (int j = 0; j < T::NI / 2; j++) B::load(right[slice % 2][j], stage + T::A_BYTES, b_lane, j, slice);
    };

#pragma unroll
    for (int s = 0; s < T::STAGES - 1; s++) fetch(s);
    wait_copies<T::STAGES - 2>();
    __syncthreads();
    if (steps > 0) load(0, 0);
    for (int step = 0; step < steps; step++) {
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            if (slice + 1 < SLICES) {
                load(step, slice + 1);
            } else {
                // The next stage is there, for all threads; and all have read this one, which the next fetch
                // overwrites.
                wait_copies<T::STAGES - 2>();
                __syncthreads();
                if (step + 1 < steps) load(step + 1, 0);
            }
            if (slice == 0) fetch(step + T::STAGES - 1);
#pragma unroll
            for (int i = 0; i < T::MI; i++)
#pragma unroll
                for (int j = 0; j < T::NI; j++) {
                    const u32* columns = right[slice % 2][j / 2] + j % 2 * 2;
                    multiply_add(acc[i][j], left[slice % 2][i], columns[0], columns[1]);
                }
        }
    }
}

// Hands the block's tile to `out`.
template <typename T, typename Out>
INLINE void finish(const float (&acc)[T::MI][T::NI][4], u32 shared, u32 row0, u32 column0, u32 rows, u32 columns,
                   const Out& out) {
    const u32 stage = shared + threadIdx.x / 32 * FINISH_BYTES<T::WARP>;
#pragma unroll
    for (int i = 0; i < T::MI; i++) {
        finish_rows<T::WARP>(acc[i], stage, row0 + T::warp_row() + i * 16, column0 + T::warp_column(), rows, columns, out);
    }
}

extern __shared__ __align__(128) char shared_memory[];

// The block's tile of a product of `rows` x `columns`, handed to `out`.
template <typename T, bool A_ALONG, bool B_ALONG, typename Out>
INLINE void product(const bf16* a, const bf16* b, u32 rows, u32 columns, u64 a_stride, u64 b_stride, u32 begin, u32 end,
                    const Out& out) {
    const auto [row0, column0] = Raster<T::ROWS, T::COLUMNS>(rows, columns).place(blockIdx.x);
    const Factor<T::ROWS, A_ALONG> left{a, a_stride, int(rows), int(row0)};
    const Factor<T::COLUMNS, B_ALONG> right{b, b_stride, int(columns), int(column0)};
    float acc[T::MI][T::NI][4] = {};
    const u32 shared = shared_address(shared_memory);
    multiply<T>(acc, left, right, begin, end, shared);
    finish<T>(acc, shared, row0, column0, rows, columns, out);
}

template <typename T, typename Activation>
INLINE void forward(const Activation& out, const bf16* x, const bf16* w, u32 rows, u32 depth) {
    product<T, true, true>(x, w, rows, out.columns, depth, depth, 0, depth, out);
}

template <typename T, typename Out>
INLINE void backward_input(const Out& out, const bf16* dy, const bf16* w, u32 rows, u32 depth) {
    product<T, true, false>(dy, w, rows, out.columns, depth, out.columns, 0, depth, out);
}

template <typename T, typename Out>
INLINE void backward_weight(const Out& out, const bf16* dy, const bf16* x, u32 rows, u32 columns, u32 begin, u32 end) {
    product<T, false, false>(dy, x, rows, columns, rows, columns, begin, end, out);
}

// dw (+)= the parts of all splits, in order.
template <typename Element>
INLINE void sum_parts(Element* dw, const float* parts, u32 count, u32 splits, bool accumulate) {
    constexpr int N = WIDTH<Element>;
    const u32 at = (blockIdx.x * 256 + threadIdx.x) * N;
    if (at >= count) return;
    float v[N] = {};
    for (u32 s = 0; s < splits; s++) {
#pragma unroll
        for (int e = 0; e < N; e += 4) {
            float x[4];
            unpack(x, load16(parts + u64(s) * count + at + e));
            v[e] += x[0], v[e + 1] += x[1], v[e + 2] += x[2], v[e + 3] += x[3];
        }
    }
    Gradient<Element>{dw, count, accumulate}(0, at, v);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    linear_fwd_128x256_bf16(bf16* y, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual,
        u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const None out{{y, nullptr, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Large>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_fwd_128x128_bf16(bf16* y, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual,
        u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const None out{{y, nullptr, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Medium>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_fwd_64x64_bf16(bf16* y, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual,
        u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const None out{{y, nullptr, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Small>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_fwd_silu_128x128_bf16(bf16* y, bf16* pre, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual,
        u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const Silu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Medium>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_fwd_silu_64x64_bf16(bf16* y, bf16* pre, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual,
        u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const Silu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Small>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    linear_fwd_swiglu_128x256_bf16(bf16* y, bf16* pre, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual,
        u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const SwiGlu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Large>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_fwd_swiglu_128x128_bf16(bf16* y, bf16* pre, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual,
        u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const SwiGlu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Medium>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_fwd_swiglu_64x64_bf16(bf16* y, bf16* pre, const bf16* x, const bf16* w, const bf16* bias, const bf16* residual,
        u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const SwiGlu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Small>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    linear_dx_128x256_bf16(bf16* dx, const bf16* dy, const bf16* w, u32 rows, u32 depth, u32 columns) {
    backward_input<Large>(Store{dx, columns}, dy, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_dx_128x128_bf16(bf16* dx, const bf16* dy, const bf16* w, u32 rows, u32 depth, u32 columns) {
    backward_input<Medium>(Store{dx, columns}, dy, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_dx_64x64_bf16(bf16* dx, const bf16* dy, const bf16* w, u32 rows, u32 depth, u32 columns) {
    backward_input<Small>(Store{dx, columns}, dy, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    linear_dx_swiglu_128x256_bf16(bf16* dpre, const bf16* dy, const bf16* w, const bf16* pre, u32 rows, u32 depth, u32 columns) {
    backward_input<Large>(GateGradient{dpre, pre, columns}, dy, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_dx_swiglu_128x128_bf16(bf16* dpre, const bf16* dy, const bf16* w, const bf16* pre, u32 rows, u32 depth, u32 columns) {
    backward_input<Medium>(GateGradient{dpre, pre, columns}, dy, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_dx_swiglu_64x64_bf16(bf16* dpre, const bf16* dy, const bf16* w, const bf16* pre, u32 rows, u32 depth, u32 columns) {
    backward_input<Small>(GateGradient{dpre, pre, columns}, dy, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    linear_dw_128x256_bf16(bf16* dw, const bf16* dy, const bf16* x, u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Large>(Gradient<bf16>{dw, columns, accumulate != 0}, dy, x, rows, columns, 0, depth);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_dw_128x128_bf16(bf16* dw, const bf16* dy, const bf16* x, u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Medium>(Gradient<bf16>{dw, columns, accumulate != 0}, dy, x, rows, columns, 0, depth);
}

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_dw_64x64_bf16(bf16* dw, const bf16* dy, const bf16* x, u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Small>(Gradient<bf16>{dw, columns, accumulate != 0}, dy, x, rows, columns, 0, depth);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    linear_dw_128x256_f32(float* dw, const bf16* dy, const bf16* x, u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Large>(Gradient<float>{dw, columns, accumulate != 0}, dy, x, rows, columns, 0, depth);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_dw_128x128_f32(float* dw, const bf16* dy, const bf16* x, u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Medium>(Gradient<float>{dw, columns, accumulate != 0}, dy, x, rows, columns, 0, depth);
}

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_dw_64x64_f32(float* dw, const bf16* dy, const bf16* x, u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Small>(Gradient<float>{dw, columns, accumulate != 0}, dy, x, rows, columns, 0, depth);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_dw_split_128x128_f32(float* parts, const bf16* dy, const bf16* x, u32 depth, u32 rows, u32 columns, u32 part_depth) {
    const u32 begin = blockIdx.y * part_depth;
    const Gradient<float> part{parts + u64(blockIdx.y) * rows * columns, columns, false};
    backward_weight<Medium>(part, dy, x, rows, columns, begin, min(depth, begin + part_depth));
}

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_dw_split_64x64_f32(float* parts, const bf16* dy, const bf16* x, u32 depth, u32 rows, u32 columns, u32 part_depth) {
    const u32 begin = blockIdx.y * part_depth;
    const Gradient<float> part{parts + u64(blockIdx.y) * rows * columns, columns, false};
    backward_weight<Small>(part, dy, x, rows, columns, begin, min(depth, begin + part_depth));
}

extern "C" __global__ void __launch_bounds__(256, 4)
    linear_dw_sum_bf16(bf16* dw, const float* parts, u32 count, u32 splits, u32 accumulate) {
    sum_parts(dw, parts, count, splits, accumulate != 0);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    linear_dw_sum_f32(float* dw, const float* parts, u32 count, u32 splits, u32 accumulate) {
    sum_parts(dw, parts, count, splits, accumulate != 0);
}
