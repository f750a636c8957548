// Matrix products on Hopper's tensor cores, with what follows them: those of linear.cu, where a copy engine can take
// their operands.
//   y[n,m] = act(sum_k x[n,k] w[m,k] + bias[m]) + residual[n,m]     (fwd; act: none, silu, SwiGLU over pairs)
//   dx[n,k] = sum_m dy[n,m] w[m,k],   dw[m,k] (+)= sum_n dy[n,m] x[n,k]
//
// One thread of the first warpgroup copies tiles, `DEPTH` deep, into a ring of stages; two warpgroups multiply them,
// each 64 rows by all columns of the tile, one group of products ahead of the stage that they hand back. Either
// operand may lie along the depth or across it: the tensor cores read both, so nothing is transposed. What a tile has
// beyond the matrix arrives as zeros and is not stored. There are as many blocks as the machine has SMs, and each
// takes every so many-th item: the copies of the next run while the last is stored. An item is a tile of the result
// or, where dw has fewer tiles than that, of one of S parts of its depth N, which `linear_dw_sum` adds in order.
// T counts tiles: ceil(rows / tile rows) ceil(columns / tile columns).
//
// Target  sm_90a
//
// entry                                 grid  block  shared    arguments                                                     bytes         flops
// linear_fwd_wgmma_128x256_bf16         <=T   384    0+217152  y | x:map w:map bias residual | N M K has_bias has_residual |      2NK+2MK+4NM   2NMK
// linear_fwd_wgmma_128x128_bf16         <=T   384    0+217184  y | x:map w:map bias residual | N M K has_bias has_residual |      2NK+2MK+4NM   2NMK
// linear_fwd_silu_wgmma_128x256_bf16    <=T   384    0+217152  y pre | x:map w:map bias residual | N M K has_bias has_residual |  2NK+2MK+6NM   2NMK
// linear_fwd_silu_wgmma_128x128_bf16    <=T   384    0+217184  y pre | x:map w:map bias residual | N M K has_bias has_residual |  2NK+2MK+6NM   2NMK
// linear_fwd_swiglu_wgmma_128x256_bf16  <=T   384    0+217152  y pre | x:map w:map bias residual | N M K has_bias has_residual |  2NK+2MK+4NM   2NMK
// linear_fwd_swiglu_wgmma_128x128_bf16  <=T   384    0+217184  y pre | x:map w:map bias residual | N M K has_bias has_residual |  2NK+2MK+4NM   2NMK
// linear_dx_wgmma_128x256_bf16          <=T   384    0+217152  dx | dy:map w:map | N M K |                                        2NM+2MK+2NK   2NMK
// linear_dx_wgmma_128x128_bf16          <=T   384    0+217184  dx | dy:map w:map | N M K |                                        2NM+2MK+2NK   2NMK
// linear_dw_wgmma_128x256_bf16          <=T   384    0+217152  dw | dy:map x:map | N M K accumulate |                             2NM+2NK+2MK   2NMK
// linear_dw_wgmma_128x128_bf16          <=T   384    0+217184  dw | dy:map x:map | N M K accumulate |                             2NM+2NK+2MK   2NMK
// linear_dw_wgmma_128x256_f32           <=T   384    0+217152  dw | dy:map x:map | N M K accumulate |                             2NM+2NK+4MK   2NMK
// linear_dw_wgmma_128x128_f32           <=T   384    0+217184  dw | dy:map x:map | N M K accumulate |                             2NM+2NK+4MK   2NMK
// linear_dw_split_wgmma_128x256_f32     <=TS  384    0+217152  parts | dy:map x:map | N M K depth |                               2NM+2NK+4SMK  2NMK
// linear_dw_split_wgmma_128x128_f32     <=TS  384    0+217184  parts | dy:map x:map | N M K depth |                               2NM+2NK+4SMK  2NMK
//
// Needs   K % 8 == 0 and M % 8 == 0, so that rows are 16-byte aligned; no extent of 0; depth % 64 == 0. The boxes of
//         maps hold 64 elements of a row, swizzled by 128 bytes, and of an operand along the depth all vectors of a
//         tile, of one across it 64 rows. bias and residual are not read unless has_bias, has_residual say so.
// Rounds  once, on store; pre too, before the activation; sums in f32, fixed order (deterministic).
#include "common/hopper.cuh"
#include "common/product.cuh"

// A block's tile and the ring of stages that feeds it; behind that, the room of warps that finish rows, and barriers.
template <int COLUMNS_, int STAGES_>
struct Tile {
    static constexpr int ROWS = 128, COLUMNS = COLUMNS_, DEPTH = 64, STAGES = STAGES_;
    static constexpr u32 A_BYTES = ROWS * DEPTH * 2, B_BYTES = COLUMNS * DEPTH * 2, STAGE_BYTES = A_BYTES + B_BYTES;
    // Columns that a warp finishes at once.
    static constexpr int WIDE = 32;
    static constexpr u32 FINISH = STAGES * STAGE_BYTES, BARRIERS = FINISH + 8 * FINISH_BYTES<WIDE>;
};

using Large = Tile<256, 4>;
using Medium = Tile<128, 6>;

// A block of 64 vectors at a depth of 64, under the swizzle of 128 bytes.
constexpr u32 BLOCK_BYTES = 64 * 128;

// A stage of the ring, and how often the ring was walked.
template <typename T>
struct Stage {
    u32 shared, index = 0, phase = 0;

    INLINE u32 tiles() const { return shared + index * T::STAGE_BYTES; }
    // Its phases end when copies have filled it, and when eight warps have read it.
    INLINE u32 full() const { return shared + T::BARRIERS + index * 16; }
    INLINE u32 empty() const { return full() + 8; }

    INLINE void advance() {
        if (++index == T::STAGES) index = 0, phase ^= 1;
    }
};

// What the blocks have to do: every tile of the result, for each part of the depth.
template <typename T>
struct Items {
    Raster<T::ROWS, T::COLUMNS> raster;
    u32 depth, part_depth;

    // Calls `each(corner, part, begin, steps)` for those of this block.
    template <typename Each>
    INLINE void visit(const Each& each) const {
        const u32 tiles = raster.tiles(), items = tiles * ((depth + part_depth - 1) / part_depth);
        for (u32 i = blockIdx.x; i < items; i += gridDim.x) {
            const u32 part = i / tiles, begin = part * part_depth, end = min(depth, begin + part_depth);
            each(raster.place(i % tiles), part, begin, (end - begin + T::DEPTH - 1) / T::DEPTH);
        }
    }
};

// Copies `SIZE` vectors of an operand from `first` on at depth `k`. ALONG: a vector is a row of memory, else a column.
template <int SIZE, bool ALONG>
INLINE void fetch(u32 to, const TensorMap& map, u32 barrier, u32 first, u32 k) {
    if constexpr (ALONG) {
        copy_box(to, map, barrier, k, first);
    } else {
#pragma unroll
        for (int i = 0; i < SIZE / 64; i++) copy_box(to + i * BLOCK_BYTES, map, barrier, first + i * 64, k);
    }
}

template <typename T, bool A_ALONG, bool B_ALONG>
INLINE void produce(const TensorMap& a, const TensorMap& b, const Items<T>& items, u32 shared) {
    Stage<T> stage{shared};
    items.visit([&](Corner corner, u32, u32 begin, u32 steps) {
        for (u32 step = 0; step < steps; step++) {
            const u32 k = begin + step * T::DEPTH;
            wait_phase(stage.empty(), stage.phase ^ 1);
            arrive_expecting(stage.full(), T::STAGE_BYTES);
            fetch<T::ROWS, A_ALONG>(stage.tiles(), a, stage.full(), corner.row, k);
            fetch<T::COLUMNS, B_ALONG>(stage.tiles() + T::A_BYTES, b, stage.full(), corner.column, k);
            stage.advance();
        }
    });
}

// The products of one stage. 16 of depth are 32 bytes along rows, or 16 rows.
template <typename T, bool A_ALONG, bool B_ALONG>
INLINE void multiply(float (&acc)[T::COLUMNS / 32][4][4], u32 a, u32 b, bool keep) {
    const u64 left = matrix_at(a, BLOCK_BYTES), right = matrix_at(b, BLOCK_BYTES);
    constexpr u32 A_STEP = (A_ALONG ? 32 : 16 * 128) >> 4, B_STEP = (B_ALONG ? 32 : 16 * 128) >> 4;
    begin_products();
#pragma unroll
    for (int k = 0; k < T::DEPTH / 16; k++) {
        multiply_add<A_ALONG, B_ALONG>(acc, left + k * A_STEP, right + k * B_STEP, keep || k > 0);
    }
    commit_products();
}

// `out(part)` takes the finished rows of a part.
template <typename T, bool A_ALONG, bool B_ALONG, typename Out>
INLINE void consume(const Items<T>& items, u32 shared, u32 rows, u32 columns, const Out& out) {
    const u32 warp = threadIdx.x / 32 - 4, below = warp / 4 * 64;
    const bool leads = threadIdx.x % 32 == 0;
    Stage<T> stage{shared};
    items.visit([&](Corner corner, u32 part, u32, u32 steps) {
        float acc[T::COLUMNS / 32][4][4];
        // Begins the products of the next stage; returns the barrier that hands it back.
        const auto begin = [&](bool keep) {
            wait_phase(stage.full(), stage.phase);
            multiply<T, A_ALONG, B_ALONG>(acc, stage.tiles() + below * 128, stage.tiles() + T::A_BYTES, keep);
            const u32 read = stage.empty();
            stage.advance();
            return read;
        };
        u32 last = begin(false);
        for (u32 step = 1; step < steps; step++) {
            const u32 next = begin(true);
            wait_products<1>();
            if (leads) arrive(last);
            last = next;
        }
        wait_products<0>();
        if (leads) arrive(last);
        const u32 room = shared + T::FINISH + warp * FINISH_BYTES<T::WIDE>;
#pragma unroll
        for (int i = 0; i < T::COLUMNS / T::WIDE; i++) {
            finish_rows<T::WIDE>(acc[i], room, corner.row + below + warp % 4 * 16, corner.column + i * T::WIDE, rows, columns,
                                 out(part));
        }
    });
}

extern __shared__ __align__(1024) char shared_memory[];

template <typename T, bool A_ALONG, bool B_ALONG, typename Out>
INLINE void product(const TensorMap& a, const TensorMap& b, u32 rows, u32 columns, u32 depth, u32 part_depth,
                    const Out& out) {
    const u32 shared = shared_address(shared_memory);
    const Items<T> items{{rows, columns}, depth, part_depth};
    if (threadIdx.x == 0) {
        prefetch_map(a);
        prefetch_map(b);
        for (Stage<T> stage{shared}; stage.phase == 0; stage.advance()) {
            init_barrier(stage.full(), 1);
            init_barrier(stage.empty(), 8);
        }
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        release_registers<40>();
        if (threadIdx.x == 0) produce<T, A_ALONG, B_ALONG>(a, b, items, shared);
    } else {
        claim_registers<232>();
        consume<T, A_ALONG, B_ALONG>(items, shared, rows, columns, out);
    }
}

template <typename T, typename Activation>
INLINE void forward(const Activation& out, const TensorMap& x, const TensorMap& w, u32 rows, u32 depth) {
    product<T, true, true>(x, w, rows, out.columns, depth, depth, [&](u32) { return out; });
}

template <typename T>
INLINE void backward_input(bf16* dx, const TensorMap& dy, const TensorMap& w, u32 rows, u32 columns, u32 depth) {
    product<T, true, false>(dy, w, rows, columns, depth, depth, [&](u32) { return Store{dx, columns}; });
}

template <typename T, typename Element>
INLINE void backward_weight(Element* dw, const TensorMap& dy, const TensorMap& x, u32 rows, u32 columns, u32 depth,
                            bool accumulate) {
    const Sum<Element> out{dw, columns, accumulate};
    product<T, false, false>(dy, x, rows, columns, depth, depth, [&](u32) { return out; });
}

template <typename T>
INLINE void backward_weight_parts(float* parts, const TensorMap& dy, const TensorMap& x, u32 rows, u32 columns, u32 depth,
                                  u32 part_depth) {
    const auto out = [&](u32 part) { return Sum<float>{parts + u64(part) * rows * columns, columns, false}; };
    product<T, false, false>(dy, x, rows, columns, depth, part_depth, out);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_fwd_wgmma_128x256_bf16(bf16* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const None out{{y, nullptr, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Large>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_fwd_wgmma_128x128_bf16(bf16* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const None out{{y, nullptr, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Medium>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_fwd_silu_wgmma_128x256_bf16(bf16* y, bf16* pre, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const Silu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Large>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_fwd_silu_wgmma_128x128_bf16(bf16* y, bf16* pre, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const Silu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Medium>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_fwd_swiglu_wgmma_128x256_bf16(bf16* y, bf16* pre, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const SwiGlu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Large>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_fwd_swiglu_wgmma_128x128_bf16(bf16* y, bf16* pre, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        const bf16* bias, const bf16* residual, u32 rows, u32 columns, u32 depth, u32 has_bias, u32 has_residual) {
    const SwiGlu out{{y, pre, bias, residual, columns, has_bias != 0, has_residual != 0}};
    forward<Medium>(out, x, w, rows, depth);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_dx_wgmma_128x256_bf16(bf16* dx, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap w,
        u32 rows, u32 depth, u32 columns) {
    backward_input<Large>(dx, dy, w, rows, columns, depth);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_dx_wgmma_128x128_bf16(bf16* dx, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap w,
        u32 rows, u32 depth, u32 columns) {
    backward_input<Medium>(dx, dy, w, rows, columns, depth);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_dw_wgmma_128x256_bf16(bf16* dw, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Large>(dw, dy, x, rows, columns, depth, accumulate != 0);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_dw_wgmma_128x128_bf16(bf16* dw, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Medium>(dw, dy, x, rows, columns, depth, accumulate != 0);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_dw_wgmma_128x256_f32(float* dw, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Large>(dw, dy, x, rows, columns, depth, accumulate != 0);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_dw_wgmma_128x128_f32(float* dw, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 accumulate) {
    backward_weight<Medium>(dw, dy, x, rows, columns, depth, accumulate != 0);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_dw_split_wgmma_128x256_f32(float* parts, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 part_depth) {
    backward_weight_parts<Large>(parts, dy, x, rows, columns, depth, part_depth);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_dw_split_wgmma_128x128_f32(float* parts, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x,
        u32 depth, u32 rows, u32 columns, u32 part_depth) {
    backward_weight_parts<Medium>(parts, dy, x, rows, columns, depth, part_depth);
}
