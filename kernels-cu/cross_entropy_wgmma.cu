// Cross entropy as the end of the product that makes the logits, on Hopper's tensor cores: the logits are never stored.
//   lse[n] = ln sum_v exp z[n,v],   each[n] = lse[n] - z[n, target n]                     z = h w^T
//   dz[n,v] = (exp(z[n,v] - lse[n]) - [v = target n]) dloss / count
//
// Forward, a block reduces every row of its tile to the largest logit and the sum of exponentials against it, one of P
// parts, and leaves the target's logit in `each`; `merge` brings the parts of a row together. Backward makes the logits
// again and stores their gradient, rounded once, in rows of M places: the vocabulary rounded up to whole vectors of 16
// bytes. Unused rows and targets as in cross_entropy.cu, from whose loss on all is the same; `keep` makes what its
// backward pass calls kept. T counts tiles as in linear_wgmma.cu.
//
// Target  sm_90a
//
// entry                                 grid     block  shared    arguments                                             bytes        flops
// cross_entropy_fwd_wgmma_128x256_bf16  <=T      384    0+230480  parts each | h:map w:map targets | N V C |            2NC+2VC+8NP  2NVC+10NV
// cross_entropy_fwd_wgmma_128x192_bf16  <=T      384    0+230496  parts each | h:map w:map targets | N V C |            2NC+2VC+8NP  2NVC+10NV
// cross_entropy_fwd_wgmma_64x128_bf16   <=T      384    0+230544  parts each | h:map w:map targets | N V C |            2NC+2VC+8NP  2NVC+10NV
// cross_entropy_fwd_merge_f32           N/8      256    0         lse each | parts targets | N V P |                    8NP          10NP
// cross_entropy_bwd_wgmma_128x256_bf16  <=T      384    0+230480  dz:map | h:map w:map targets lse count dloss | N V M C |  2NC+2VC+2NM  2NVC+6NV
// cross_entropy_bwd_wgmma_128x192_bf16  <=T      384    0+230496  dz:map | h:map w:map targets lse count dloss | N V M C |  2NC+2VC+2NM  2NVC+6NV
// cross_entropy_bwd_wgmma_64x128_bf16   <=T      384    0+230544  dz:map | h:map w:map targets lse count dloss | N V M C |  2NC+2VC+2NM  2NVC+6NV
// cross_entropy_bwd_keep_bf16           NC/2048  256    0         kept | h targets | N V C |                            4NC          -
//
// Needs   C % 8 == 0, rows 16-byte aligned; maps as in linear_wgmma.cu, of h and w as its forward pass, of dz as its dx;
//         any N and V but 0.
// Rounds  dz once; sums in f32, fixed order (deterministic).
#include "common/cross_entropy.cuh"
#include "common/product_wgmma.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;

// The largest of some logits of a row, and the sum of exponentials against it.
struct Exponentials {
    float top, sum;

    template <int OFFSET>
    INLINE void join() {
        const float other = __shfl_xor_sync(0xffffffffu, top, OFFSET), most = fmaxf(top, other);
        const float its = __shfl_xor_sync(0xffffffffu, sum, OFFSET);
        // Where there was none so far, nothing is there to be scaled.
        sum = most == -INFINITY ? 0.0f : sum * exp_fast(top - most) + its * exp_fast(other - most);
        top = most;
    }
};

// Of one row, the logits that four neighbouring lanes have, two of every eight columns each.
template <int SLICES>
INLINE Exponentials exponentials(const float (&z)[SLICES][4][4], int half) {
    float top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SLICES * 8; i++) top = fmaxf(top, z[i / 8][i / 2 % 4][half * 2 + i % 2]);
    const float against = top == -INFINITY ? 0.0f : top * LOG2_E;
#pragma unroll
    for (int i = 0; i < SLICES * 8; i++) sum += exp2_fast(fmaf(z[i / 8][i / 2 % 4][half * 2 + i % 2], LOG2_E, -against));
    Exponentials all{top, sum};
    all.join<1>();
    all.join<2>();
    return all;
}

template <typename T>
struct Statistics {
    float2* parts;
    float* each;
    const int* targets;
    u32 rows, vocabulary;

    // A row of a warp's sums.
    INLINE void take_row(const float (&z)[T::COLUMNS / 32][4][4], int half, u32 row, const Place& at) const {
        const u32 lane = threadIdx.x % 32, column = at.column + lane % 4 * 2;
        const Exponentials all = exponentials(z, half);
        if (row >= rows) return;
        const u32 tiles = (vocabulary + T::COLUMNS - 1) / T::COLUMNS;
        if (lane % 4 == 0) parts[u64(row) * tiles + at.column / T::COLUMNS] = make_float2(all.top, all.sum);
        const u32 target = targets[row];
        if (target < vocabulary && target - at.column < T::COLUMNS && target % 8 / 2 == lane % 4) {
#pragma unroll
            for (int i = 0; i < T::COLUMNS / 4; i++)
                if (column + i / 2 * 8 + i % 2 == target) each[row] = z[i / 8][i / 2 % 4][half * 2 + i % 2];
        }
    }
    // What is beyond the vocabulary is as unlikely as can be.
    INLINE void mask(Sums<T>& acc, const Place& at) const {
        const u32 column = at.column + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < T::BLOCKS * T::COLUMNS / 2; i++) {
            const int j = i / T::BLOCKS;
            if (column + j / 4 * 8 + j % 2 >= vocabulary) acc[i % T::BLOCKS][j / 16][j / 4 % 4][j % 4] = -INFINITY;
        }
    }
    INLINE void operator()(Sums<T>& acc, const Place& at) const {
        if (at.column + T::COLUMNS > vocabulary) mask(acc, at);
#pragma unroll
        for (int i = 0; i < T::BLOCKS; i++) {
            const u32 row = at.row + i * 64 + threadIdx.x % 32 / 4;
            take_row(acc[i], 0, row, at);
            take_row(acc[i], 1, row + 8, at);
        }
    }
};

template <typename T>
INLINE void forward(float2* parts, float* each, const TensorMap& h, const TensorMap& w, const int* targets, u32 rows,
                    u32 vocabulary, u32 depth) {
    const Statistics<T> take{parts, each, targets, rows, vocabulary};
    product<T, true, true>(h, w, rows, vocabulary, depth, depth, take);
}

// What is stored of logits.
struct LogitsGradient {
    struct Row {
        int target;
        float lse;
        // All bits of a row that is used.
        u32 mask;
    };
    const int* targets;
    const float* lse;
    u32 rows, vocabulary;
    float scale;

    INLINE Row row(u32 n) const {
        const int target = n < rows ? targets[n] : -1;
        if (!is_used(target, vocabulary)) return {target, 0.0f, 0};
        return {target, lse[n], ~0u};
    }
    INLINE u32 operator()(const Row& of, u32 column, float a, float b) const {
        float z[2] = {a, b};
        logits_gradient(z, column, of.target, vocabulary, of.lse, scale);
        return pack(z[0], z[1]) & of.mask;
    }
};

template <typename T>
INLINE void backward(const TensorMap& dz, const TensorMap& h, const TensorMap& w, const int* targets, const float* lse,
                     float scale, u32 rows, u32 vocabulary, u32 width, u32 depth) {
    product_in_boxes<T, true, true>(dz, h, w, rows, width, depth, LogitsGradient{targets, lse, rows, vocabulary, scale});
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    cross_entropy_fwd_wgmma_128x256_bf16(float2* parts, float* each, const __grid_constant__ TensorMap h,
        const __grid_constant__ TensorMap w, const int* targets, u32 rows, u32 vocabulary, u32 depth) {
    forward<Together>(parts, each, h, w, targets, rows, vocabulary, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    cross_entropy_fwd_wgmma_128x192_bf16(float2* parts, float* each, const __grid_constant__ TensorMap h,
        const __grid_constant__ TensorMap w, const int* targets, u32 rows, u32 vocabulary, u32 depth) {
    forward<Apart>(parts, each, h, w, targets, rows, vocabulary, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    cross_entropy_fwd_wgmma_64x128_bf16(float2* parts, float* each, const __grid_constant__ TensorMap h,
        const __grid_constant__ TensorMap w, const int* targets, u32 rows, u32 vocabulary, u32 depth) {
    forward<Few>(parts, each, h, w, targets, rows, vocabulary, depth);
}

// A warp brings the parts of a row together.
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_fwd_merge_f32(float* lse, float* each, const float2* parts, const int* targets, u32 rows, u32 vocabulary,
        u32 count) {
    const u32 row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    float log_sum = 0.0f, loss = 0.0f;
    if (is_used(targets[row], vocabulary)) {
        float top = -INFINITY, sum = 0.0f;
        for (u32 p = lane; p < count; p += 32) top = fmaxf(top, parts[u64(row) * count + p].x);
        top = warp_reduce<Max>(top);
        for (u32 p = lane; p < count; p += 32) {
            const float2 part = parts[u64(row) * count + p];
            sum += part.y * exp_fast(part.x - top);
        }
        log_sum = top + log2_fast(warp_reduce<Sum>(sum)) * LN_2;
        loss = log_sum - each[row];
    }
    if (lane == 0) lse[row] = log_sum, each[row] = loss;
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    cross_entropy_bwd_wgmma_128x256_bf16(const __grid_constant__ TensorMap dz, const __grid_constant__ TensorMap h,
        const __grid_constant__ TensorMap w, const int* targets, const float* lse, const float* count, const float* dloss,
        u32 rows, u32 vocabulary, u32 width, u32 depth) {
    backward<Together>(dz, h, w, targets, lse, *dloss * inverse(*count), rows, vocabulary, width, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    cross_entropy_bwd_wgmma_128x192_bf16(const __grid_constant__ TensorMap dz, const __grid_constant__ TensorMap h,
        const __grid_constant__ TensorMap w, const int* targets, const float* lse, const float* count, const float* dloss,
        u32 rows, u32 vocabulary, u32 width, u32 depth) {
    backward<Apart>(dz, h, w, targets, lse, *dloss * inverse(*count), rows, vocabulary, width, depth);
}

extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(384, 1)
    cross_entropy_bwd_wgmma_64x128_bf16(const __grid_constant__ TensorMap dz, const __grid_constant__ TensorMap h,
        const __grid_constant__ TensorMap w, const int* targets, const float* lse, const float* count, const float* dloss,
        u32 rows, u32 vocabulary, u32 width, u32 depth) {
    backward<Few>(dz, h, w, targets, lse, *dloss * inverse(*count), rows, vocabulary, width, depth);
}

// h without its unused rows.
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_bwd_keep_bf16(bf16* kept, const bf16* h, const int* targets, u32 rows, u32 vocabulary, u32 depth) {
    const u32 vectors = depth / 8, at = blockIdx.x * THREADS + threadIdx.x;
    if (at >= rows * vectors) return;
    const bool used = is_used(targets[at / vectors], vocabulary);
    store16(kept + u64(at) * 8, used ? load16(h + u64(at) * 8) : Vec16{});
}
