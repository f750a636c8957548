// RMSNorm, forward and backward.                                                Zhang & Sennrich 2019
//   y[n,c] = x[n,c] r[n] w[c],   r[n] = 1 / sqrt(mean_c x[n,c]^2 + eps)
//   dx[n,c] = r[n] (w[c] dy[n,c] - x[n,c] r[n]^2 mean_c(w dy x)) + arrived[n,c]
//   dw[c] = sum_n dy[n,c] x[n,c] r[n]
// arrived is the gradient of x from its other uses, the residual's in a transformer.
//
// A row belongs to a warp (narrow) or to a block (wide) and stays in registers, so that every element
// crosses the bus once. Blocks walk over the rows; each keeps its part of dw in registers and writes it
// once, and `sum` adds the parts of all blocks. P counts the blocks of the backward pass.
//
// entry                    grid            block  shared  arguments                                        bytes           flops
// rmsnorm_fwd_narrow_bf16  min(N/8,4*sms)  256    0       y r | x w | N C | eps                            4NC+4N+2C       4NC
// rmsnorm_fwd_narrow_f32   min(N/8,4*sms)  256    0       y r | x w | N C | eps                            8NC+4N+4C       4NC
// rmsnorm_fwd_wide_bf16    min(N,4*sms)    256    32      y r | x w | N C | eps                            4NC+4N+2C       4NC
// rmsnorm_fwd_wide_f32     min(N,4*sms)    256    32      y r | x w | N C | eps                            8NC+4N+4C       4NC
// rmsnorm_bwd_narrow_bf16  min(N/8,2*sms)  256    0+32C   dx parts | x w r dy arrived | N C has_arrived |  8NC+4N+2C+4PC   12NC
// rmsnorm_bwd_narrow_f32   min(N/8,2*sms)  256    0+32C   dx parts | x w r dy arrived | N C has_arrived |  16NC+4N+4C+4PC  12NC
// rmsnorm_bwd_wide_bf16    min(N,2*sms)    256    32      dx parts | x w r dy arrived | N C has_arrived |  8NC+4N+2C+4PC   12NC
// rmsnorm_bwd_wide_f32     min(N,2*sms)    256    32      dx parts | x w r dy arrived | N C has_arrived |  16NC+4N+4C+4PC  12NC
// rmsnorm_bwd_sum_bf16     C/32            256    1024    dw | parts | P C accumulate |                    4PC+2C          PC
// rmsnorm_bwd_sum_f32      C/32            256    1024    dw | parts | P C accumulate |                    4PC+4C          PC
//
// Needs   C % 8 == 0, rows 16-byte aligned; C <= 1024 (narrow bf16), 512 (narrow f32), 8192 (wide bf16),
//         4096 (wide f32). arrived is not read unless has_arrived says so.
// Rounds  once, on store; sums in f32, fixed order (deterministic).
#include "common/parts.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;

// How a row is shared out: `LANES` threads hold `VECTORS` vectors each, vector i of lane l beginning at
// element (i LANES + l) WIDTH.
template <typename T, int LANES_, int VECTORS_>
struct Layout {
    static constexpr int LANES = LANES_;
    static constexpr int VECTORS = VECTORS_;
    static constexpr int ROWS = THREADS / LANES;
    static constexpr int WORDS = WIDTH<T>;

    INLINE static u32 lane() { return threadIdx.x % LANES; }
    INLINE static u32 first_row() { return blockIdx.x * ROWS + threadIdx.x / LANES; }
    INLINE static u32 column(int i) { return (i * LANES + lane()) * WORDS; }

    // Vectors beyond the row read as zero.
    INLINE static void load(Vec16 (&v)[VECTORS], const T* row, u32 width) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) v[i] = column(i) < width ? load16(row + column(i)) : Vec16{};
    }

    INLINE static float sum(float x) {
        if constexpr (LANES == 32) {
            return warp_reduce<Sum>(x);
        } else {
            __shared__ float slots[THREADS / 32];
            return block_reduce<Sum, THREADS>(x, slots);
        }
    }
};

template <typename T>
using Narrow = Layout<T, 32, 4>;
template <typename T>
using Wide = Layout<T, THREADS, 4>;

template <typename T, typename L>
INLINE void forward(T* y, float* r, const T* x, const T* w, u32 rows, u32 width, float eps) {
    Vec16 scale[L::VECTORS];
    L::load(scale, w, width);
    for (u32 n = L::first_row(); n < rows; n += gridDim.x * L::ROWS) {
        Vec16 row[L::VECTORS];
        L::load(row, x + u64(n) * width, width);
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < L::VECTORS; i++) {
            float v[L::WORDS];
            unpack(v, row[i]);
#pragma unroll
            for (int e = 0; e < L::WORDS; e++) squares = fmaf(v[e], v[e], squares);
        }
        float rstd = 1.0f / sqrtf(L::sum(squares) / float(width) + eps);
        if (L::lane() == 0) r[n] = rstd;
#pragma unroll
        for (int i = 0; i < L::VECTORS; i++) {
            float v[L::WORDS], s[L::WORDS];
            unpack(v, again(row[i]));
            unpack(s, scale[i]);
#pragma unroll
            for (int e = 0; e < L::WORDS; e++) v[e] *= rstd * s[e];
            if (L::column(i) < width) store16(y + u64(n) * width + L::column(i), packed(v));
        }
    }
}

// dx of the block's rows; their part of dw stays in `part`.
template <typename T, typename L>
INLINE void backward_rows(float (&part)[L::VECTORS][L::WORDS], T* dx, const T* x, const T* w, const float* r,
                          const T* dy, const T* arrived, u32 rows, u32 width) {
    Vec16 scale[L::VECTORS];
    L::load(scale, w, width);
    for (u32 n = L::first_row(); n < rows; n += gridDim.x * L::ROWS) {
        Vec16 row[L::VECTORS], grad[L::VECTORS], have[L::VECTORS] = {};
        L::load(row, x + u64(n) * width, width);
        L::load(grad, dy + u64(n) * width, width);
        if (arrived != nullptr) L::load(have, arrived + u64(n) * width, width);
        float rstd = r[n], dot = 0.0f;
#pragma unroll
        for (int i = 0; i < L::VECTORS; i++) {
            float v[L::WORDS], s[L::WORDS], d[L::WORDS];
            unpack(v, row[i]);
            unpack(s, scale[i]);
            unpack(d, grad[i]);
#pragma unroll
            for (int e = 0; e < L::WORDS; e++) {
                dot = fmaf(s[e] * d[e], v[e], dot);
                part[i][e] = fmaf(d[e], v[e] * rstd, part[i][e]);
            }
        }
        float k = rstd * rstd * (L::sum(dot) / float(width));
#pragma unroll
        for (int i = 0; i < L::VECTORS; i++) {
            float v[L::WORDS], s[L::WORDS], d[L::WORDS], h[L::WORDS];
            unpack(v, again(row[i]));
            unpack(s, again(scale[i]));
            unpack(d, again(grad[i]));
            unpack(h, have[i]);
#pragma unroll
            for (int e = 0; e < L::WORDS; e++) d[e] = fmaf(rstd, fmaf(s[e], d[e], -v[e] * k), h[e]);
            if (L::column(i) < width) store16(dx + u64(n) * width + L::column(i), packed(d));
        }
    }
}

template <int WORDS>
INLINE void store_floats(float* to, const float (&x)[WORDS]) {
#pragma unroll
    for (int e = 0; e < WORDS; e += 4) *reinterpret_cast<float4*>(to + e) = make_float4(x[e], x[e + 1], x[e + 2], x[e + 3]);
}

template <typename T, typename L>
INLINE void backward(T* dx, float* parts, const T* x, const T* w, const float* r, const T* dy, const T* arrived,
                     u32 rows, u32 width) {
    float part[L::VECTORS][L::WORDS] = {};
    backward_rows<T, L>(part, dx, x, w, r, dy, arrived, rows, width);
    float* to = parts + u64(blockIdx.x) * width;
    if constexpr (L::ROWS == 1) {
#pragma unroll
        for (int i = 0; i < L::VECTORS; i++)
            if (L::column(i) < width) store_floats(to + L::column(i), part[i]);
    } else {
        // One row of sums for each warp.
        extern __shared__ __align__(16) float sums[];
#pragma unroll
        for (int i = 0; i < L::VECTORS; i++)
            if (L::column(i) < width) store_sums(sums + threadIdx.x / L::LANES * width + L::column(i), part[i]);
        __syncthreads();
        for (u32 c = threadIdx.x; c < width; c += THREADS) {
            float sum = sums[c];
#pragma unroll
            for (int k = 1; k < L::ROWS; k++) sum += sums[k * width + c];
            to[c] = sum;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    rmsnorm_fwd_narrow_bf16(bf16* y, float* r, const bf16* x, const bf16* w, u32 rows, u32 width, float eps) {
    forward<bf16, Narrow<bf16>>(y, r, x, w, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    rmsnorm_fwd_narrow_f32(float* y, float* r, const float* x, const float* w, u32 rows, u32 width, float eps) {
    forward<float, Narrow<float>>(y, r, x, w, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    rmsnorm_fwd_wide_bf16(bf16* y, float* r, const bf16* x, const bf16* w, u32 rows, u32 width, float eps) {
    forward<bf16, Wide<bf16>>(y, r, x, w, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    rmsnorm_fwd_wide_f32(float* y, float* r, const float* x, const float* w, u32 rows, u32 width, float eps) {
    forward<float, Wide<float>>(y, r, x, w, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    rmsnorm_bwd_narrow_bf16(bf16* dx, float* parts, const bf16* x, const bf16* w, const float* r, const bf16* dy, const bf16* arrived,
        u32 rows, u32 width, u32 has_arrived) {
    backward<bf16, Narrow<bf16>>(dx, parts, x, w, r, dy, has_arrived ? arrived : nullptr, rows, width);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    rmsnorm_bwd_narrow_f32(float* dx, float* parts, const float* x, const float* w, const float* r, const float* dy, const float* arrived,
        u32 rows, u32 width, u32 has_arrived) {
    backward<float, Narrow<float>>(dx, parts, x, w, r, dy, has_arrived ? arrived : nullptr, rows, width);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    rmsnorm_bwd_wide_bf16(bf16* dx, float* parts, const bf16* x, const bf16* w, const float* r, const bf16* dy, const bf16* arrived,
        u32 rows, u32 width, u32 has_arrived) {
    backward<bf16, Wide<bf16>>(dx, parts, x, w, r, dy, has_arrived ? arrived : nullptr, rows, width);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    rmsnorm_bwd_wide_f32(float* dx, float* parts, const float* x, const float* w, const float* r, const float* dy, const float* arrived,
        u32 rows, u32 width, u32 has_arrived) {
    backward<float, Wide<float>>(dx, parts, x, w, r, dy, has_arrived ? arrived : nullptr, rows, width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rmsnorm_bwd_sum_bf16(bf16* dw, const float* parts, u32 count, u32 width, u32 accumulate) {
    sum_parts<THREADS>(dw, parts, count, width, accumulate);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rmsnorm_bwd_sum_f32(float* dw, const float* parts, u32 count, u32 width, u32 accumulate) {
    sum_parts<THREADS>(dw, parts, count, width, accumulate);
}
