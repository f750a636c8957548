// Rotary positions: each pair of adjacent columns of a q or k head turns by an angle.       Su et al. 2021
//   (x[2j], x[2j+1]) -> (x[2j] cos a - x[2j+1] sin a, x[2j] sin a + x[2j+1] cos a),  a = position ratio^j
// The ratio is theta^(-2/D) as a fraction of 2^64, so that angles are integers and exact at any position.
//
// A thread has one vector of a head; it finds the angles of a row once and turns the vector at that place in
// its share of the heads: rows times shares times V vectors are handed out to the grid. Forward works in
// place on the first H heads (of q and k) and leaves rows at negative positions alone; backward turns the other
// way and copies what does not turn: A heads in all. h counts the heads of a share.
//
// entry          grid                    block  shared  arguments                                     bytes     flops
// rope_fwd_bf16  min(N*H/h*V/256,8*sms)  256    0+4D    y | positions | N D A H h ratio:u64 |         4NHD+4N   3NHD
// rope_fwd_f32   min(N*H/h*V/256,8*sms)  256    0+4D    y | positions | N D A H h ratio:u64 |         8NHD+4N   3NHD
// rope_bwd_bf16  min(N*A/h*V/256,8*sms)  256    0+4D    dx | dy positions | N D A H h ratio:u64 |     4NAD+4N   3NHD
// rope_bwd_f32   min(N*A/h*V/256,8*sms)  256    0+4D    dx | dy positions | N D A H h ratio:u64 |     8NAD+4N   3NHD
//
// Needs   D % 8 == 0, rows 16-byte aligned.
// Rounds  once, on store.
#include "common/lots.cuh"
#include "common/waves.cuh"

constexpr int THREADS = 256;

// How rows are shared out.
struct Plan {
    u32 rows, width, heads, turning, together;
    u64 ratio;
};

// `y` and `x` may be the same memory.
template <bool IN_PLACE, typename T>
INLINE void rope(T* y, const T* x, const int* positions, Plan p) {
    constexpr int N = WIDTH<T>;
    extern __shared__ __align__(16) u64 frequencies[];
    // Those of pair j of every vector lie side by side, so that lanes meet different banks.
    const u32 vectors = p.width / N;
    for (u32 i = threadIdx.x; i < p.width / 2; i += THREADS)
        frequencies[i] = frequency(p.ratio, i % vectors * (N / 2) + i / vectors);
    __syncthreads();
    const u32 heads = IN_PLACE ? p.turning : p.heads;
    const u32 shares = (heads + p.together - 1) / p.together, items = p.rows * shares * vectors;
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < items; i += gridDim.x * THREADS) {
        const u32 v = i % vectors, first = i / vectors % shares * p.together, n = i / (vectors * shares);
        const int position = positions[n];
        if (IN_PLACE && position < 0) continue;
        float cos[N / 2], sin[N / 2];
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            Wave w = wave(turns(max(position, 0), frequencies[j * vectors + v]));
            cos[j] = w.cos;
            sin[j] = IN_PLACE ? w.sin : -w.sin;
        }
        const u64 row = u64(n) * p.heads * p.width + v * N;
        const u32 end = min(first + p.together, heads);
#pragma unroll 2
        for (u32 h = first; h < end; h++) {
            float a[N], b[N];
            load(a, x + row + h * p.width);
            const bool turned = h < p.turning && position >= 0;
#pragma unroll
            for (int j = 0; j < N / 2; j++) {
                b[2 * j] = turned ? a[2 * j] * cos[j] - a[2 * j + 1] * sin[j] : a[2 * j];
                b[2 * j + 1] = turned ? a[2 * j] * sin[j] + a[2 * j + 1] * cos[j] : a[2 * j + 1];
            }
            store(y + row + h * p.width, b);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_fwd_bf16(bf16* y, const int* positions, u32 rows, u32 width, u32 heads, u32 turning, u32 together, u64 ratio) {
    rope<true>(y, y, positions, {rows, width, heads, turning, together, ratio});
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_fwd_f32(float* y, const int* positions, u32 rows, u32 width, u32 heads, u32 turning, u32 together, u64 ratio) {
    rope<true>(y, y, positions, {rows, width, heads, turning, together, ratio});
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_bwd_bf16(bf16* dx, const bf16* dy, const int* positions, u32 rows, u32 width, u32 heads, u32 turning, u32 together, u64 ratio) {
    rope<false>(dx, dy, positions, {rows, width, heads, turning, together, ratio});
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_bwd_f32(float* dx, const float* dy, const int* positions, u32 rows, u32 width, u32 heads, u32 turning, u32 together, u64 ratio) {
    rope<false>(dx, dy, positions, {rows, width, heads, turning, together, ratio});
}
