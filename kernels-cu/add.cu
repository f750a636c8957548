// Sums, with rows that may be repeated, and their backward.
//   y = a + scale b[i / outer inner + i % inner],   i = index of an element of y
//   db[j] = scale sum of dy[i] over the i that met j
// Repeated rows are Each (outer = count C, inner = C) or Tile (outer beyond the array, inner = rows(b) C).
//
// Forward, a thread keeps its lot of a repeated row for up to 16 of the rows that meet it.
//
// Backwards, y falls into G matrices of K rows and W columns, whose columns are summed: blocks take 32 lots of
// columns, and all of the rows or, where these are many, one of P shares of them: then they leave parts [P, G W], which
// `sum` adds in order. `scale` is the backward of what is not repeated. L is the lot: 8 of bf16, 4 of f32, 1 where W
// is no multiple of it.
//
// entry                     grid               block  shared        arguments                    bytes      flops
// add_fwd_bf16              min(n/2048,8*sms)  256    0             y | a b | n outer inner | s  6n         2n
// add_fwd_f32               min(n/1024,8*sms)  256    0             y | a b | n outer inner | s  12n        2n
// add_fwd_bf16_f32          min(n/1024,8*sms)  256    0             y | a b | n outer inner | s  10n        2n
// add_fwd_f32_bf16          min(n/1024,8*sms)  256    0             y | a b | n outer inner | s  8n         2n
// add_bwd_scale_bf16        min(n/2048,8*sms)  256    0             db | dy | n | s              4n         n
// add_bwd_scale_f32         min(n/1024,8*sms)  256    0             db | dy | n | s              8n         n
// add_bwd_scale_bf16_f32    min(n/1024,8*sms)  256    0             db | dy | n | s              6n         n
// add_bwd_scale_f32_bf16    min(n/1024,8*sms)  256    0             db | dy | n | s              6n         n
// add_bwd_columns_bf16      G*W/32L            256    0+1024L+1024  db | dy | G K W | s          2GKW+2GW   GKW
// add_bwd_columns_f32       G*W/32L            256    0+1024L+1024  db | dy | G K W | s          4GKW+4GW   GKW
// add_bwd_columns_bf16_f32  G*W/32L            256    0+1024L+1024  db | dy | G K W | s          2GKW+4GW   GKW
// add_bwd_columns_f32_bf16  G*W/32L            256    0+1024L+1024  db | dy | G K W | s          4GKW+2GW   GKW
// add_bwd_parts_bf16        G*W/32L,P          256    0+1024L+1024  parts | dy | G K W |         2GKW+4PGW  GKW
// add_bwd_parts_f32         G*W/32L,P          256    0+1024L+1024  parts | dy | G K W |         4GKW+4PGW  GKW
// add_bwd_sum_bf16          G*W/32             256    1024          db | parts | P W | s         4PW+2W     PW
// add_bwd_sum_f32           G*W/32             256    1024          db | parts | P W | s         4PW+4W     PW
//
// An entry's last dtype is that of the result, one before it that of b, or of dy, where they differ.
// Needs   Operands begin at multiples of 16 bytes.
// Rounds  once, on store; sums in f32, fixed order (deterministic).
#include "common/lots.cuh"
#include "common/parts.cuh"

constexpr int THREADS = 256;

template <int N, typename T, typename B>
INLINE void add_lots(T* y, const T* a, const B* b, u32 n, float scale) {
    for_lots<N>(n, [=](auto lot, u32 i) {
        float x[lot.SIZE], z[lot.SIZE];
        load(x, a + i);
        load(z, b + i);
#pragma unroll
        for (int e = 0; e < lot.SIZE; e++) x[e] = fmaf(scale, z[e], x[e]);
        store(y + i, x);
    });
}

// Rows that meet a repeated one and share a thread.
constexpr u32 SHARED_ROWS = 16;

// A lot lies inside a row. Neighbouring threads have neighbouring lots, then neighbouring rows.
template <int N, typename T, typename B>
INLINE void add_repeated(T* y, const T* a, const B* b, u32 n, u32 outer, u32 inner, float scale) {
    if (n == 0) return;
    const u32 group = min(outer, n), repeats = group / inner, lots = inner / N;
    const u32 shares = (repeats + SHARED_ROWS - 1) / SHARED_ROWS, items = n / group * shares * lots;
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < items; i += gridDim.x * THREADS) {
        const u32 c = i % lots * N, g = i / lots / shares;
        float z[N];
        load(z, b + g * inner + c);
#pragma unroll 4
        for (u32 k = i / lots % shares; k < repeats; k += shares) {
            const u32 at = g * group + k * inner + c;
            float x[N];
            load(x, a + at);
#pragma unroll
            for (int e = 0; e < N; e++) x[e] = fmaf(scale, z[e], x[e]);
            store(y + at, x);
        }
    }
}

// Without repetition `outer` is zero.
template <typename T, typename B>
INLINE void add(T* y, const T* a, const B* b, u32 n, u32 outer, u32 inner, float scale) {
    constexpr int N = LOT<T, B>;
    if (outer == 0) add_lots<N>(y, a, b, n, scale);
    else if (inner % N == 0 && outer % N == 0) add_repeated<N>(y, a, b, n, outer, inner, scale);
    else add_repeated<1>(y, a, b, n, outer, inner, scale);
}

template <typename T, typename B>
INLINE void scaled(B* db, const T* dy, u32 n, float scale) {
    for_lots<LOT<T, B>>(n, [=](auto lot, u32 i) {
        float x[lot.SIZE];
        load(x, dy + i);
#pragma unroll
        for (int e = 0; e < lot.SIZE; e++) x[e] *= scale;
        store(db + i, x);
    });
}

// Rows k = first, first + step, ... of matrix g, summed by one warp; then the warps of the block in order.
template <int N, typename T, typename B>
INLINE void column_sums(B* to, const T* dy, u32 groups, u32 rows, u32 width, float scale) {
    // Element e of every lane lies side by side, a row of them in so many words, so that lanes meet different
    // banks when they write and when they read.
    constexpr int WARPS = THREADS / 32, ROW = N == 1 ? 32 : 32 + 32 / N;
    extern __shared__ __align__(16) float sums[];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, blocks = (width + 32 * N - 1) / (32 * N);
    const u32 g = blockIdx.x / blocks, begin = blockIdx.x % blocks * 32 * N, c = begin + lane * N;
    float sum[N] = {};
    if (c < width) {
        const T* from = dy + u64(g) * rows * width + c;
#pragma unroll 4
        for (u32 k = blockIdx.y * WARPS + warp; k < rows; k += gridDim.y * WARPS) {
            float x[N];
            load(x, from + u64(k) * width);
#pragma unroll
            for (int e = 0; e < N; e++) sum[e] += x[e];
        }
    }
#pragma unroll
    for (int e = 0; e < N; e++) sums[(warp * N + e) * ROW + lane] = sum[e];
    __syncthreads();
    const u32 mine = threadIdx.x;
    if (mine >= 32 * N || begin + mine >= width) return;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += sums[(w * N + mine % N) * ROW + mine / N];
    store_one(to + (u64(blockIdx.y) * groups + g) * width + begin + mine, total * scale);
}

template <typename T, typename B>
INLINE void columns(B* to, const T* dy, u32 groups, u32 rows, u32 width, float scale) {
    if (width % WIDTH<T> == 0) column_sums<WIDTH<T>>(to, dy, groups, rows, width, scale);
    else column_sums<1>(to, dy, groups, rows, width, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_fwd_bf16(bf16* y, const bf16* a, const bf16* b, u32 n, u32 outer, u32 inner, float s) {
    add(y, a, b, n, outer, inner, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_fwd_f32(float* y, const float* a, const float* b, u32 n, u32 outer, u32 inner, float s) {
    add(y, a, b, n, outer, inner, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_fwd_bf16_f32(float* y, const float* a, const bf16* b, u32 n, u32 outer, u32 inner, float s) {
    add(y, a, b, n, outer, inner, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_fwd_f32_bf16(bf16* y, const bf16* a, const float* b, u32 n, u32 outer, u32 inner, float s) {
    add(y, a, b, n, outer, inner, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_bwd_scale_bf16(bf16* db, const bf16* dy, u32 n, float s) {
    scaled(db, dy, n, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_bwd_scale_f32(float* db, const float* dy, u32 n, float s) {
    scaled(db, dy, n, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_bwd_scale_bf16_f32(float* db, const bf16* dy, u32 n, float s) {
    scaled(db, dy, n, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_bwd_scale_f32_bf16(bf16* db, const float* dy, u32 n, float s) {
    scaled(db, dy, n, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_bwd_columns_bf16(bf16* db, const bf16* dy, u32 groups, u32 rows, u32 width, float s) {
    columns(db, dy, groups, rows, width, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_bwd_columns_f32(float* db, const float* dy, u32 groups, u32 rows, u32 width, float s) {
    columns(db, dy, groups, rows, width, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_bwd_columns_bf16_f32(float* db, const bf16* dy, u32 groups, u32 rows, u32 width, float s) {
    columns(db, dy, groups, rows, width, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_bwd_columns_f32_bf16(bf16* db, const float* dy, u32 groups, u32 rows, u32 width, float s) {
    columns(db, dy, groups, rows, width, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_bwd_parts_bf16(float* parts, const bf16* dy, u32 groups, u32 rows, u32 width) {
    columns(parts, dy, groups, rows, width, 1.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_bwd_parts_f32(float* parts, const float* dy, u32 groups, u32 rows, u32 width) {
    columns(parts, dy, groups, rows, width, 1.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_bwd_sum_bf16(bf16* db, const float* parts, u32 count, u32 width, float s) {
    sum_parts<THREADS>(db, parts, count, width, 0, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_bwd_sum_f32(float* db, const float* parts, u32 count, u32 width, float s) {
    sum_parts<THREADS>(db, parts, count, width, 0, s);
}
