// What cross entropy does to logits, between the products that linear.cu makes.
//   lse[n] = ln sum_v exp z[n,v],   loss = sum_n (lse[n] - z[n, target n]) / count
//   dz[n,v] = (exp(z[n,v] - lse[n]) - [v = target n]) dloss / count                       in place of z
//
// The logits of a chunk of N rows exist at once; a row of them has M places, the vocabulary rounded up to whole
// vectors of 16 bytes. A row belongs to a warp (narrow) or to a block (wide), which reads it once: sums of exponentials
// follow the largest logit so far. Where M exceeds V, the products run over `pad`'s copy of the weights, with rows of
// zeros behind. R counts the rows of all chunks. A target outside 0..V is unused, and a count of zero yields zero.
// What stands in an unused row of h may be no number, and zero times that is none either: the product that makes dw
// takes `kept`, h with zeros in those rows. It is held where dh will be.
//
// entry                               grid                block  shared  arguments                                              bytes    flops
// cross_entropy_fwd_rows_narrow_bf16  min(N/8,4*sms)      256    0       lse each | logits targets | N V M |                    2NM      10NV
// cross_entropy_fwd_rows_wide_bf16    min(N,4*sms)        256    32      lse each | logits targets | N V M |                    2NM      10NV
// cross_entropy_fwd_sum_f32           1                   256    32      loss | each count | R |                                4R       R
// cross_entropy_bwd_rows_narrow_bf16  min(N/8,4*sms)      256    0       logits kept | targets lse count dloss h | N V M C |    4NM+4NC  6NV
// cross_entropy_bwd_rows_wide_bf16    min(N,4*sms)        256    0       logits kept | targets lse count dloss h | N V M C |    4NM+4NC  6NV
// cross_entropy_pad_bf16              min(MC/2048,4*sms)  256    0       padded | w | VC MC |                                   2VC+2MC  -
//
// Needs   C % 8 == 0, rows 16-byte aligned; any N and V.
// Rounds  logits once, when the product stores them; their gradient once more; sums in f32, fixed order
//         (deterministic).
#include "common/cross_entropy.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;
// Vectors that a thread has under way at once.
constexpr int DEEP = 4;

// A row of logits and the `LANES` threads that it belongs to.
template <int LANES>
struct Row {
    static constexpr int ROWS = THREADS / LANES;
    static constexpr u32 STEP = LANES * 8;

    INLINE static u32 lane() { return threadIdx.x % LANES; }
    INLINE static u32 first() { return blockIdx.x * ROWS + threadIdx.x / LANES; }

    template <typename Op>
    INLINE static float reduce(float x, float* slots) {
        if constexpr (LANES == 32) {
            return warp_reduce<Op>(x);
        } else {
            return block_reduce<Op, THREADS>(x, slots);
        }
    }

    // Calls `each(column, vector)` for this lane's vectors; `DEEP` of them are loaded before the first is used.
    template <typename F>
    INLINE static void walk(const bf16* row, u32 width, const F& each) {
        for (u32 from = lane() * 8; from < width; from += DEEP * STEP) {
            Vec16 v[DEEP];
#pragma unroll
            for (int i = 0; i < DEEP; i++)
                if (from + i * STEP < width) v[i] = load16(row + from + i * STEP);
#pragma unroll
            for (int i = 0; i < DEEP; i++)
                if (from + i * STEP < width) each(from + i * STEP, v[i]);
        }
    }
};

// The sum of exponentials of what came so far, in units of the largest.
struct Exponentials {
    float top = -INFINITY, sum = 0.0f;

    INLINE void add(const float (&z)[8]) {
        float most = top;
#pragma unroll
        for (int e = 0; e < 8; e++) most = fmaxf(most, z[e]);
        sum *= exp_fast(top - most);
#pragma unroll
        for (int e = 0; e < 8; e++) sum += exp_fast(z[e] - most);
        top = most;
    }
};

template <typename R>
INLINE void forward(float* lse, float* each, const bf16* logits, const int* targets, u32 rows, u32 vocabulary, u32 width,
                    float* slots) {
    for (u32 n = R::first(); n < rows; n += gridDim.x * R::ROWS) {
        const bf16* row = logits + u64(n) * width;
        const int target = targets[n];
        float log_sum = 0.0f, loss = 0.0f;
        if (is_used(target, vocabulary)) {
            Exponentials mine;
            R::walk(row, width, [&](u32 column, const Vec16& v) {
                float z[8];
                unpack(z, v);
#pragma unroll
                for (int e = 0; e < 8; e++)
                    if (column + e >= vocabulary) z[e] = -INFINITY;
                mine.add(z);
            });
            const float top = R::template reduce<Max>(mine.top, slots);
            const float sum = R::template reduce<Sum>(mine.sum * exp_fast(mine.top - top), slots);
            log_sum = top + log2_fast(sum) * LN_2;
            if (R::lane() == 0) loss = log_sum - to_float(row[target]);
        }
        if (R::lane() == 0) lse[n] = log_sum, each[n] = loss;
    }
}

template <typename R>
INLINE void backward(bf16* logits, bf16* kept, const int* targets, const float* lse, const float* count,
                     const float* dloss, const bf16* h, u32 rows, u32 vocabulary, u32 width, u32 depth) {
    const float scale = *dloss * inverse(*count);
    for (u32 n = R::first(); n < rows; n += gridDim.x * R::ROWS) {
        bf16* row = logits + u64(n) * width;
        const u32 target = targets[n];
        const bool used = is_used(target, vocabulary);
        for (u32 c = R::lane() * 8; c < depth; c += R::STEP)
            store16(kept + u64(n) * depth + c, used ? load16(h + u64(n) * depth + c) : Vec16{});
        if (!used) {
            for (u32 c = R::lane() * 8; c < width; c += R::STEP) store16(row + c, Vec16{});
            continue;
        }
        const float log_sum = lse[n];
        R::walk(row, width, [&](u32 column, const Vec16& v) {
            float z[8];
            unpack(z, v);
            logits_gradient(z, column, target, vocabulary, log_sum, scale);
            store16(row + column, packed(z));
        });
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    cross_entropy_fwd_rows_narrow_bf16(float* lse, float* each, const bf16* logits, const int* targets, u32 rows,
        u32 vocabulary, u32 width) {
    forward<Row<32>>(lse, each, logits, targets, rows, vocabulary, width, nullptr);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    cross_entropy_fwd_rows_wide_bf16(float* lse, float* each, const bf16* logits, const int* targets, u32 rows,
        u32 vocabulary, u32 width) {
    __shared__ float slots[THREADS / 32];
    forward<Row<THREADS>>(lse, each, logits, targets, rows, vocabulary, width, slots);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_fwd_sum_f32(float* loss, const float* each, const float* count, u32 rows) {
    __shared__ float slots[THREADS / 32];
    float mine = 0.0f;
    for (u32 n = threadIdx.x; n < rows; n += THREADS) mine += each[n];
    const float total = block_reduce<Sum, THREADS>(mine, slots);
    if (threadIdx.x == 0) *loss = total * inverse(*count);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    cross_entropy_bwd_rows_narrow_bf16(bf16* logits, bf16* kept, const int* targets, const float* lse,
        const float* count, const float* dloss, const bf16* h, u32 rows, u32 vocabulary, u32 width, u32 depth) {
    backward<Row<32>>(logits, kept, targets, lse, count, dloss, h, rows, vocabulary, width, depth);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    cross_entropy_bwd_rows_wide_bf16(bf16* logits, bf16* kept, const int* targets, const float* lse,
        const float* count, const float* dloss, const bf16* h, u32 rows, u32 vocabulary, u32 width, u32 depth) {
    backward<Row<THREADS>>(logits, kept, targets, lse, count, dloss, h, rows, vocabulary, width, depth);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    cross_entropy_pad_bf16(bf16* padded, const bf16* w, u32 count, u32 total) {
    for (u32 at = (blockIdx.x * THREADS + threadIdx.x) * 8; at < total; at += gridDim.x * THREADS * 8)
        store16(padded + at, at < count ? load16(w + at) : Vec16{});
}
