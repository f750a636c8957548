// Rows picked out of a table, y[r] = x[index[r]], and their gradients put back. An index that names no row is
// unused: it picks zeros and puts back nothing. Also the embedding.
//   dx[v] (+)= sum over the r with index[r] = v of dy[r], in the order of r
//
// Forward, a row belongs to a group of lanes. Backward, `sort` lists the r of every row of the table, in order:
// each block of it owns 256 rows, one a thread, and goes through all indices twice; first it counts, then it
// writes. `starts[v]` is where the list of row v begins in `order`, `starts[V]` where the last one ends. Then `sum`
// adds up: a block takes 8 rows and 32 lots of columns; a warp takes the list of one row if it is short, all
// warps together the long ones. L is the lot: 8 of bf16, 4 of f32 or of both, 1 where C is no multiple of it.
//
// entry                         grid             block  shared  arguments                               bytes
// gather_rows_fwd_bf16          min(R/8,8*sms)   256    0       y | x index | R V C |                   4RC+4R
// gather_rows_fwd_f32           min(R/8,8*sms)   256    0       y | x index | R V C |                   8RC+4R
// gather_rows_bwd_sort_i32      V/256            256    6336    starts order | index | R V |            8RV/256+8R+4V
// gather_rows_bwd_sum_bf16      V/8,C/32L        256    48+1024L  dx | dy starts order | V C accumulate |  2RC+2VC+4R+4V
// gather_rows_bwd_sum_f32       V/8,C/32L        256    48+1024L  dx | dy starts order | V C accumulate |  4RC+4VC+4R+4V
// gather_rows_bwd_sum_bf16_f32  V/8,C/32L        256    48+1024L  dx | dy starts order | V C accumulate |  2RC+8RC+4R+4V
//
// The sum's last dtype is that of dx, one before it that of dy where they differ.
// Needs   Operands begin at multiples of 16 bytes.
// Rounds  once, on store; sums in f32, fixed order (deterministic).
#include "common/lots.cuh"
#include "common/rows.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
// Lists longer than this are shared by the warps of a block.
constexpr u32 LONG = 64;

template <typename Word>
INLINE void gather(Word* y, const Word* x, const int* index, u32 count, u32 rows, u32 words) {
    const Groups groups(words);
    groups.for_rows(count, [&](u32 r, bool there) {
        int n = groups.from_first(there && groups.lane == 0 ? index[r] : -1);
        if (!there) return;
        const bool used = names(n, rows);
        const Word* from = x + u64(used ? n : 0) * words;
        Word* to = y + u64(r) * words;
        for (u32 w = groups.lane; w < words; w += groups.lanes) to[w] = used ? from[w] : Word{};
    });
}

template <typename T>
INLINE void forward(T* y, const T* x, const int* index, u32 count, u32 rows, u32 width) {
    in_words<T>(width, [&](auto word, u32 words) {
        using Word = decltype(word);
        gather(words_of<Word>(y), words_of<Word>(x), index, count, rows, words);
    });
}

// Indices that a block looks at, one after another, and those of them that name its rows.
constexpr int EACH = 4;
struct Batch {
    u32 place[THREADS * EACH];
    u16 row[THREADS * EACH];
    u32 found[WARPS * EACH];
};

// Calls f(row, r) for the indices that name one of the 256 rows from `first` on, in order; every thread of the
// block sees all of them. Returns how many of the indices that this thread looked at name rows before.
template <typename F>
INLINE u32 for_mine(Batch& batch, const int* index, u32 count, u32 first, u32 rows, F f) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 before = 0;
    for (u32 begin = 0; begin < count; begin += THREADS * EACH) {
        // Warp w looks at indices w 32 EACH + e 32 + lane of the batch: in order of (w, e, lane).
        int n[EACH];
        u32 votes[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const u32 r = begin + (warp * EACH + e) * 32 + lane;
            n[e] = r < count ? index[r] : -1;
            before += names(n[e], min(first, rows));
            n[e] = names(n[e], rows) ? n[e] - int(first) : -1;
            votes[e] = __ballot_sync(0xffffffffu, names(n[e], THREADS));
            if (lane == 0) batch.found[warp * EACH + e] = __popc(votes[e]);
        }
        __syncthreads();
        u32 total = 0, at[EACH];
#pragma unroll
        for (int k = 0; k < WARPS * EACH; k++) {
            if (k / EACH == warp) at[k % EACH] = total;
            total += batch.found[k];
        }
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            if (!names(n[e], THREADS)) continue;
            const u32 slot = at[e] + __popc(votes[e] & ((1u << lane) - 1));
            batch.row[slot] = u16(n[e]);
            batch.place[slot] = begin + (warp * EACH + e) * 32 + lane;
        }
        __syncthreads();
        for (u32 k = 0; k < total; k++) f(batch.row[k], batch.place[k]);
        // The lists are read until here.
        __syncthreads();
    }
    return before;
}

INLINE void sort(int* starts, int* order, const int* index, u32 count, u32 rows) {
    __shared__ Batch batch;
    __shared__ u32 sums[WARPS], befores[WARPS];
    const u32 first = blockIdx.x * THREADS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 mine = 0;
    u32 before = for_mine(batch, index, count, first, rows, [&](u32 row, u32) { mine += row == threadIdx.x; });
    // Exclusive sums over the threads of the block.
    u32 upto = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        u32 below = __shfl_up_sync(0xffffffffu, upto, offset);
        if (lane >= offset) upto += below;
    }
    before = warp_reduce<Sum>(before);
    if (lane == 31) {
        sums[warp] = upto;
        befores[warp] = before;
    }
    __syncthreads();
    u32 start = upto - mine;
#pragma unroll
    for (int w = 0; w < WARPS; w++) start += befores[w] + (w < warp ? sums[w] : 0);
    if (first + threadIdx.x < rows) starts[first + threadIdx.x] = start;
    if (first + threadIdx.x == rows - 1) starts[rows] = start + mine;
    for_mine(batch, index, count, first, rows, [&](u32 row, u32 r) {
        if (row == threadIdx.x) order[start++] = r;
    });
}

// sum[e] += the columns from c on of rows order[k], order[k + step], ... of dy.
template <int N, typename T>
INLINE void add_rows(float (&sum)[N], const T* dy, const int* order, u32 begin, u32 end, u32 step, u32 width,
                     u32 c) {
#pragma unroll 4
    for (u32 k = begin; k < end; k += step) {
        float d[N];
        load(d, dy + u64(u32(order[k])) * width + c);
#pragma unroll
        for (int e = 0; e < N; e++) sum[e] += d[e];
    }
}

template <int N, typename D, typename T>
INLINE void sum_rows(D* dx, const T* dy, const u32 (&bounds)[WARPS + 1], const int* order, u32 rows, u32 width,
                     u32 accumulate) {
    extern __shared__ __align__(16) float sums[];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = (blockIdx.y * 32 + lane) * N;
    const u32 first = blockIdx.x * WARPS, end = min(first + WARPS, rows);
    // Short lists: warp w has row first + w.
    const u32 v = first + warp;
    if (v < end && c < width) {
        const u32 from = bounds[warp], to = bounds[warp + 1];
        if (to - from <= LONG && (to > from || !accumulate)) {
            float sum[N] = {};
            if (accumulate) load(sum, dx + u64(v) * width + c);
            add_rows(sum, dy, order, from, to, 1, width, c);
            store(dx + u64(v) * width + c, sum);
        }
    }
    // Long ones: each warp adds every eighth row, then the warps are added in order.
    for (u32 v = first; v < end; v++) {
        const u32 from = bounds[v - first], to = bounds[v - first + 1];
        if (to - from <= LONG) continue;
        float sum[N] = {};
        if (c < width) add_rows(sum, dy, order, from + warp, to, WARPS, width, c);
#pragma unroll
        for (int e = 0; e < N; e++) sums[(warp * N + e) * 32 + lane] = sum[e];
        __syncthreads();
        if (warp == 0 && c < width) {
            float total[N] = {};
            if (accumulate) load(total, dx + u64(v) * width + c);
#pragma unroll
            for (int e = 0; e < N; e++)
#pragma unroll
                for (int w = 0; w < WARPS; w++) total[e] += sums[(w * N + e) * 32 + lane];
            store(dx + u64(v) * width + c, total);
        }
        // The next row's sums take the place of these.
        __syncthreads();
    }
}

template <typename D, typename T>
INLINE void backward(D* dx, const T* dy, const int* starts, const int* order, u32 rows, u32 width,
                     u32 accumulate) {
    constexpr int N = LOT<D, T>;
    // Where the lists of the block's rows begin, and where the last one ends.
    __shared__ u32 bounds[WARPS + 1];
    const u32 first = blockIdx.x * WARPS;
    if (threadIdx.x <= WARPS && first + threadIdx.x <= rows) bounds[threadIdx.x] = starts[first + threadIdx.x];
    __syncthreads();
    if (width % N == 0) sum_rows<N>(dx, dy, bounds, order, rows, width, accumulate);
    else sum_rows<1>(dx, dy, bounds, order, rows, width, accumulate);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gather_rows_fwd_bf16(bf16* y, const bf16* x, const int* index, u32 count, u32 rows, u32 width) {
    forward(y, x, index, count, rows, width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gather_rows_fwd_f32(float* y, const float* x, const int* index, u32 count, u32 rows, u32 width) {
    forward(y, x, index, count, rows, width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gather_rows_bwd_sort_i32(int* starts, int* order, const int* index, u32 count, u32 rows) {
    sort(starts, order, index, count, rows);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gather_rows_bwd_sum_bf16(bf16* dx, const bf16* dy, const int* starts, const int* order, u32 rows, u32 width, u32 accumulate) {
    backward(dx, dy, starts, order, rows, width, accumulate);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gather_rows_bwd_sum_f32(float* dx, const float* dy, const int* starts, const int* order, u32 rows, u32 width, u32 accumulate) {
    backward(dx, dy, starts, order, rows, width, accumulate);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gather_rows_bwd_sum_bf16_f32(float* dx, const bf16* dy, const int* starts, const int* order, u32 rows, u32 width, u32 accumulate) {
    backward(dx, dy, starts, order, rows, width, accumulate);
}
