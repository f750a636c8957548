// Mean squared error of each image, and their weighted mean.                      Ho et al. 2020 (L_simple)
//   errors[i] = mean_e (pred - target)^2,   loss = sum_i weights[i] errors[i] / count
//   dpred = 2 dloss weights[i] / (count E) (pred - target)
// An image of weight zero is not read. Loss and gradient are zero if the count is.
// Forward, an image belongs to a block; `loss` then adds the images in a fixed order. Backward it belongs to the B
// blocks of a column of the grid. E counts the values of an image, n those of all.
//
// entry             grid  block  shared  arguments                                     bytes    flops
// mse_fwd_bf16      I     256    36      errors | pred target weights | E |            4n+8I    3n
// mse_fwd_f32       I     256    36      errors | pred target weights | E |            8n+8I    3n
// mse_fwd_bf16_f32  I     256    36      errors | pred target weights | E |            6n+8I    3n
// mse_fwd_loss_f32  1     256    32      loss | errors weights count | I |             8I+8     2I
// mse_bwd_bf16      I,B   256    4       dpred | pred target weights count dloss | E |  6n+4I   2n
// mse_bwd_f32       I,B   256    4       dpred | pred target weights count dloss | E |  12n+4I  2n
// mse_bwd_bf16_f32  I,B   256    4       dpred | pred target weights count dloss | E |  8n+4I   2n
//
// Dtypes are those of pred and, where it differs, of the target.
// Needs   Operands begin at multiples of 16 bytes.
// Rounds  once, on store; sums in f32, fixed order (deterministic).
#include "common/lots.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;

// This thread's share of the squared error of an image.
template <int N, typename P, typename T>
INLINE float squares(const P* pred, const T* target, u32 size) {
    float sum = 0.0f;
    for_lots<N>(size, threadIdx.x, THREADS, [&](auto lot, u32 e) {
        float p[lot.SIZE], t[lot.SIZE];
        load(p, pred + e);
        load(t, target + e);
#pragma unroll
        for (int j = 0; j < lot.SIZE; j++) sum = fmaf(p[j] - t[j], p[j] - t[j], sum);
    });
    return sum;
}

template <typename P, typename T>
INLINE void forward(float* errors, const P* pred, const T* target, const float* weights, u32 size) {
    constexpr int N = LOT<P, T>;
    __shared__ float slots[THREADS / 32];
    __shared__ float weight;
    if (threadIdx.x == 0) weight = weights[blockIdx.x];
    __syncthreads();
    const u64 at = u64(blockIdx.x) * size;
    float sum = 0.0f;
    if (weight != 0.0f)
        sum = size % N == 0 ? squares<N>(pred + at, target + at, size) : squares<1>(pred + at, target + at, size);
    sum = block_reduce<Sum, THREADS>(sum, slots);
    if (threadIdx.x == 0) errors[blockIdx.x] = sum / float(size);
}

template <int N, typename P, typename T>
INLINE void differences(P* dpred, const P* pred, const T* target, u32 size, float scale) {
    for_lots<N>(size, blockIdx.y * THREADS + threadIdx.x, gridDim.y * THREADS, [=](auto lot, u32 e) {
        float p[lot.SIZE] = {}, t[lot.SIZE] = {};
        if (scale != 0.0f) {
            load(p, pred + e);
            load(t, target + e);
        }
#pragma unroll
        for (int j = 0; j < lot.SIZE; j++) p[j] = scale * (p[j] - t[j]);
        store(dpred + e, p);
    });
}

template <typename P, typename T>
INLINE void backward(P* dpred, const P* pred, const T* target, const float* weights, const float* count,
                     const float* dloss, u32 size) {
    constexpr int N = LOT<P, T>;
    __shared__ float shared;
    if (threadIdx.x == 0) {
        const float weight = weights[blockIdx.x];
        const bool used = weight != 0.0f && *count != 0.0f;
        shared = used ? 2.0f * *dloss * weight / (*count * float(size)) : 0.0f;
    }
    __syncthreads();
    const float scale = shared;
    const u64 at = u64(blockIdx.x) * size;
    if (size % N == 0) differences<N>(dpred + at, pred + at, target + at, size, scale);
    else differences<1>(dpred + at, pred + at, target + at, size, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    mse_fwd_bf16(float* errors, const bf16* pred, const bf16* target, const float* weights, u32 size) {
    forward(errors, pred, target, weights, size);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    mse_fwd_f32(float* errors, const float* pred, const float* target, const float* weights, u32 size) {
    forward(errors, pred, target, weights, size);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    mse_fwd_bf16_f32(float* errors, const bf16* pred, const float* target, const float* weights, u32 size) {
    forward(errors, pred, target, weights, size);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    mse_fwd_loss_f32(float* loss, const float* errors, const float* weights, const float* count, u32 images) {
    __shared__ float slots[THREADS / 32];
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < images; i += THREADS) sum = fmaf(weights[i], errors[i], sum);
    sum = block_reduce<Sum, THREADS>(sum, slots);
    if (threadIdx.x == 0) *loss = *count == 0.0f ? 0.0f : sum / *count;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    mse_bwd_bf16(bf16* dpred, const bf16* pred, const bf16* target, const float* weights, const float* count, const float* dloss, u32 size) {
    backward(dpred, pred, target, weights, count, dloss, size);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    mse_bwd_f32(float* dpred, const float* pred, const float* target, const float* weights, const float* count, const float* dloss, u32 size) {
    backward(dpred, pred, target, weights, count, dloss, size);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    mse_bwd_bf16_f32(bf16* dpred, const bf16* pred, const float* target, const float* weights, const float* count, const float* dloss, u32 size) {
    backward(dpred, pred, target, weights, count, dloss, size);
}
