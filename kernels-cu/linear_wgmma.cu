// Matrix products on Hopper's tensor cores, with what follows them: those of linear.cu, where a copy engine can take
// their operands. The main loop is in common/product_wgmma.cuh.
//   y[n,m] = act(sum_k x[n,k] w[m,k] + bias[m]) + residual[n,m]     (fwd; act: none, silu, SwiGLU over pairs)
//   y[n,m] = (x w^T + bias)[n,m], heads turned by positions[n]                         (rope)
//   dx[n,k] = sum_m dy[n,m] w[m,k],   dw[m,k] (+)= sum_n dy[n,m] x[n,k]
//   dpre[n,2k], dpre[n,2k+1] = dx[n,k] dSwiGLU(pre[n,2k], pre[n,2k+1])                (dx_swiglu: x[n,k] is SwiGLU of pre)
//
// Tiles of 128x256 are multiplied by two warpgroups together, those of 128x192 and 64x128 by one of them. Where dw has
// fewer tiles than the machine has SMs, S parts of its depth N are summed apart, and `linear_dw_sum` adds them in order.
// T counts tiles, pairs of rows of them: 2 ceil(rows / 2 tile rows) ceil(columns / tile columns). Clusters of 2.
//
// Target  sm_90a
//
// entry                                 grid  block  shared    arguments                                                              bytes         flops
// linear_fwd_wgmma_128x256_bf16         <=T   384    0+230480  y | x:map w:map bias residual | N M K has_bias has_residual |          2NK+2MK+4NM   2NMK
// linear_fwd_wgmma_128x192_bf16         <=T   384    0+230496  y | x:map w:map bias residual | N M K has_bias has_residual |          2NK+2MK+4NM   2NMK
// linear_fwd_wgmma_64x128_bf16          <=T   384    0+230544  y | x:map w:map bias residual | N M K has_bias has_residual |          2NK+2MK+4NM   2NMK
// linear_fwd_silu_wgmma_128x256_bf16    <=T   384    0+230480  y pre | x:map w:map bias residual | N M K has_bias has_residual |      2NK+2MK+6NM   2NMK
// linear_fwd_silu_wgmma_128x192_bf16    <=T   384    0+230496  y pre | x:map w:map bias residual | N M K has_bias has_residual |      2NK+2MK+6NM   2NMK
// linear_fwd_silu_wgmma_64x128_bf16     <=T   384    0+230544  y pre | x:map w:map bias residual | N M K has_bias has_residual |      2NK+2MK+6NM   2NMK
// linear_fwd_swiglu_wgmma_128x256_bf16  <=T   384    0+230480  y pre | x:map w:map bias residual | N M K has_bias has_residual |      2NK+2MK+4NM   2NMK
// linear_fwd_swiglu_wgmma_128x192_bf16  <=T   384    0+230496  y pre | x:map w:map bias residual | N M K has_bias has_residual |      2NK+2MK+4NM   2NMK
// linear_fwd_swiglu_wgmma_64x128_bf16   <=T   384    0+230544  y pre | x:map w:map bias residual | N M K has_bias has_residual |      2NK+2MK+4NM   2NMK
// linear_fwd_rope_wgmma_128x256_bf16    <=T   384    0+230480  y | x:map w:map bias positions | N M K has_bias D turning ratio:u64 |  2NK+2MK+2NM   2NMK
// linear_fwd_rope_wgmma_128x192_bf16    <=T   384    0+230496  y | x:map w:map bias positions | N M K has_bias D turning ratio:u64 |  2NK+2MK+2NM   2NMK
// linear_fwd_rope_wgmma_64x128_bf16     <=T   384    0+230544  y | x:map w:map bias positions | N M K has_bias D turning ratio:u64 |  2NK+2MK+2NM   2NMK
// linear_dx_wgmma_128x256_bf16          <=T   384    0+230480  dx:map | dy:map w:map | N M K |                                        2NM+2MK+2NK   2NMK
// linear_dx_wgmma_128x192_bf16          <=T   384    0+230496  dx:map | dy:map w:map | N M K |                                        2NM+2MK+2NK   2NMK
// linear_dx_wgmma_64x128_bf16           <=T   384    0+230544  dx:map | dy:map w:map | N M K |                                        2NM+2MK+2NK   2NMK
// linear_dx_swiglu_wgmma_128x256_bf16   <=T   384    0+230480  dpre | dy:map w:map pre | N M K |                                      2NM+2MK+8NK   2NMK
// linear_dx_swiglu_wgmma_128x192_bf16   <=T   384    0+230496  dpre | dy:map w:map pre | N M K |                                      2NM+2MK+8NK   2NMK
// linear_dx_swiglu_wgmma_64x128_bf16    <=T   384    0+230544  dpre | dy:map w:map pre | N M K |                                      2NM+2MK+8NK   2NMK
// linear_dw_wgmma_128x256_bf16          <=T   384    0+230480  dw | dy:map x:map | N M K accumulate |                                 2NM+2NK+2MK   2NMK
// linear_dw_wgmma_128x192_bf16          <=T   384    0+230496  dw | dy:map x:map | N M K accumulate |                                 2NM+2NK+2MK   2NMK
// linear_dw_wgmma_64x128_bf16           <=T   384    0+230544  dw | dy:map x:map | N M K accumulate |                                 2NM+2NK+2MK   2NMK
// linear_dw_wgmma_128x256_f32           <=T   384    0+230480  dw | dy:map x:map | N M K accumulate |                                 2NM+2NK+4MK   2NMK
// linear_dw_wgmma_128x192_f32           <=T   384    0+230496  dw | dy:map x:map | N M K accumulate |                                 2NM+2NK+4MK   2NMK
// linear_dw_wgmma_64x128_f32            <=T   384    0+230544  dw | dy:map x:map | N M K accumulate |                                 2NM+2NK+4MK   2NMK
// linear_dw_split_wgmma_128x256_f32     <=TS  384    0+230480  parts | dy:map x:map | N M K depth |                                   2NM+2NK+4SMK  2NMK
// linear_dw_split_wgmma_128x192_f32     <=TS  384    0+230496  parts | dy:map x:map | N M K depth |                                   2NM+2NK+4SMK  2NMK
// linear_dw_split_wgmma_64x128_f32      <=TS  384    0+230544  parts | dy:map x:map | N M K depth |                                   2NM+2NK+4SMK  2NMK
//
// Needs   K % 8 == 0 and M % 8 == 0, so that rows are 16-byte aligned; no extent of 0; depth % 64 == 0. The boxes of
//         maps hold 64 elements of a row, swizzled by 128 bytes: of a left factor along the depth all vectors of a tile, of
//         a right one half of them; of a left factor across it 64 rows, of a right one 32; of dx 16 rows. bias and residual
//         are not read unless has_bias, has_residual say so.
// Rounds  once, on store; pre too, before the activation; sums in f32, fixed order (deterministic).
#include "common/gate.cuh"
#include "common/product_wgmma.cuh"
#include "common/waves.cuh"

template <typename T, typename Activation>
INLINE void forward(const Activation& out, const TensorMap& x, const TensorMap& w, u32 rows, u32 depth) {
    product<T, true, true>(x, w, rows, out.columns, depth, depth, [&](const Sums<T>& acc, const Place& at) {
        finish<T>(acc, at, rows, out.columns, out);
    });
}

// The first `turning` columns are heads of `width` columns, whose pairs turn by their row's position, as in rope.cu.
template <typename T>
struct Rope : Epilogue {
    const int* positions;
    u32 width, turning;

    // Where the frequencies of a head's pairs are.
    INLINE static u64* frequencies() { return reinterpret_cast<u64*>(shared_memory + T::BEHIND); }

    INLINE void operator()(u64 row, u32 column, float (&v)[8]) const {
        add_bias(v, column);
        const int position = column < turning ? positions[row] : -1;
        if (position >= 0) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const Wave w = wave(turns(position, frequencies()[column % width / 2 + j]));
                const float x = v[2 * j], y = v[2 * j + 1];
                v[2 * j] = x * w.cos - y * w.sin, v[2 * j + 1] = x * w.sin + y * w.cos;
            }
        }
        store(v, row, column);
    }
};

template <typename T>
INLINE void forward_rope(const Rope<T>& out, const TensorMap& x, const TensorMap& w, u32 rows, u32 depth, u64 ratio) {
    for (u32 j = threadIdx.x; j < out.width / 2; j += blockDim.x) out.frequencies()[j] = frequency(ratio, j);
    forward<T>(out, x, w, rows, depth);
}

template <typename T>
INLINE void backward_input(const TensorMap& dx, const TensorMap& dy, const TensorMap& w, u32 rows, u32 columns, u32 depth) {
    product_in_boxes<T, true, false>(dx, dy, w, rows, columns, depth, Rounded{});
}

template <typename T>
INLINE void backward_gated_input(const GateGradient& out, const TensorMap& dy, const TensorMap& w, u32 rows, u32 depth) {
    product<T, true, false>(dy, w, rows, out.columns, depth, depth, [&](const Sums<T>& acc, const Place& at) {
        finish<T>(acc, at, rows, out.columns, out);
    });
}

template <typename T, typename Element>
INLINE void backward_weight(Element* dw, const TensorMap& dy, const TensorMap& x, u32 rows, u32 columns, u32 depth,
                            bool accumulate) {
    product<T, false, false>(dy, x, rows, columns, depth, depth, [&](const Sums<T>& acc, const Place& at) {
        finish<T>(acc, at, rows, columns, Gradient<Element>{dw, columns, accumulate});
    });
}

template <typename T>
INLINE void backward_weight_parts(float* parts, const TensorMap& dy, const TensorMap& x, u32 rows, u32 columns, u32 depth,
                                  u32 part_depth) {
    product<T, false, false>(dy, x, rows, columns, depth, part_depth, [&](const Sums<T>& acc, const Place& at) {
        finish<T>(acc, at, rows, columns, Gradient<float>{parts + u64(at.part) * rows * columns, columns, false});
    });
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_fwd_wgmma_128x256_bf16(bf16* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const None out{{y, nullptr, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Together>(out, x, w, rows, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_fwd_wgmma_128x192_bf16(bf16* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const None out{{y, nullptr, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Apart>(out, x, w, rows, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_fwd_wgmma_64x128_bf16(bf16* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const None out{{y, nullptr, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Few>(out, x, w, rows, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_fwd_silu_wgmma_128x256_bf16(bf16* y, bf16* pre, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const Silu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Together>(out, x, w, rows, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_fwd_silu_wgmma_128x192_bf16(bf16* y, bf16* pre, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const Silu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Apart>(out, x, w, rows, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_fwd_silu_wgmma_64x128_bf16(bf16* y, bf16* pre, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const Silu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Few>(out, x, w, rows, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_fwd_swiglu_wgmma_128x256_bf16(bf16* y, bf16* pre, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const SwiGlu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Together>(out, x, w, rows, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_fwd_swiglu_wgmma_128x192_bf16(bf16* y, bf16* pre, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const SwiGlu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Apart>(out, x, w, rows, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_fwd_swiglu_wgmma_64x128_bf16(bf16* y, bf16* pre, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const SwiGlu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Few>(out, x, w, rows, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_fwd_rope_wgmma_128x256_bf16(bf16* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const bf16* bias, const int* positions,
        u32 rows, u32 columns, u32 depth, u32 has_bias, u32 width, u32 turning, u64 ratio) {
    forward_rope<Together>({{y, nullptr, bias, nullptr, columns, has_bias != 0, false}, positions, width, turning}, x, w, rows, depth, ratio);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_fwd_rope_wgmma_128x192_bf16(bf16* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const bf16* bias, const int* positions,
        u32 rows, u32 columns, u32 depth, u32 has_bias, u32 width, u32 turning, u64 ratio) {
    forward_rope<Apart>({{y, nullptr, bias, nullptr, columns, has_bias != 0, false}, positions, width, turning}, x, w, rows, depth, ratio);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_fwd_rope_wgmma_64x128_bf16(bf16* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const bf16* bias, const int* positions,
        u32 rows, u32 columns, u32 depth, u32 has_bias, u32 width, u32 turning, u64 ratio) {
    forward_rope<Few>({{y, nullptr, bias, nullptr, columns, has_bias != 0, false}, positions, width, turning}, x, w, rows, depth, ratio);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dx_wgmma_128x256_bf16(const __grid_constant__ TensorMap dx, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap w,
        u32 rows, u32 depth, u32 columns) {
    backward_input<Together>(dx, dy, w, rows, columns, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dx_wgmma_128x192_bf16(const __grid_constant__ TensorMap dx, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap w,
        u32 rows, u32 depth, u32 columns) {
    backward_input<Apart>(dx, dy, w, rows, columns, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dx_wgmma_64x128_bf16(const __grid_constant__ TensorMap dx, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap w,
        u32 rows, u32 depth, u32 columns) {
    backward_input<Few>(dx, dy, w, rows, columns, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dx_swiglu_wgmma_128x256_bf16(bf16* dpre, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap w,
        const bf16* pre, u32 rows, u32 depth, u32 columns) {
    backward_gated_input<Together>(GateGradient{dpre, pre, columns}, dy, w, rows, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dx_swiglu_wgmma_128x192_bf16(bf16* dpre, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap w,
        const bf16* pre, u32 rows, u32 depth, u32 columns) {
    backward_gated_input<Apart>(GateGradient{dpre, pre, columns}, dy, w, rows, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dx_swiglu_wgmma_64x128_bf16(bf16* dpre, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap w,
        const bf16* pre, u32 rows, u32 depth, u32 columns) {
    backward_gated_input<Few>(GateGradient{dpre, pre, columns}, dy, w, rows, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dw_wgmma_128x256_bf16(bf16* dw, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Together>(dw, dy, x, rows, columns, depth, accumulate != 0);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dw_wgmma_128x192_bf16(bf16* dw, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Apart>(dw, dy, x, rows, columns, depth, accumulate != 0);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dw_wgmma_64x128_bf16(bf16* dw, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Few>(dw, dy, x, rows, columns, depth, accumulate != 0);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dw_wgmma_128x256_f32(float* dw, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Together>(dw, dy, x, rows, columns, depth, accumulate != 0);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dw_wgmma_128x192_f32(float* dw, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Apart>(dw, dy, x, rows, columns, depth, accumulate != 0);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dw_wgmma_64x128_f32(float* dw, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Few>(dw, dy, x, rows, columns, depth, accumulate != 0);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dw_split_wgmma_128x256_f32(float* parts, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 part_depth) {
    backward_weight_parts<Together>(parts, dy, x, rows, columns, depth, part_depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dw_split_wgmma_128x192_f32(float* parts, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 part_depth) {
    backward_weight_parts<Apart>(parts, dy, x, rows, columns, depth, part_depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    linear_dw_split_wgmma_64x128_f32(float* parts, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 part_depth) {
    backward_weight_parts<Few>(parts, dy, x, rows, columns, depth, part_depth);
}
