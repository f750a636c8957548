// The sum of the squares of up to eight tensors, added to a number.
//   sum += sum_i sum_n xi[n]^2
// Each of P blocks adds its share of all of them, as if they lay behind each other; `add` adds the parts of all
// blocks, in order. N counts all elements.
//
// entry                   grid               block  shared  arguments                                                    bytes  flops
// sum_squares_parts_bf16  min(N/2048,4*sms)  256    32      parts | x0 x1 x2 x3 x4 x5 x6 x7 | N0 N1 N2 N3 N4 N5 N6 N7 |  2N+4P  2N
// sum_squares_parts_f32   min(N/1024,4*sms)  256    32      parts | x0 x1 x2 x3 x4 x5 x6 x7 | N0 N1 N2 N3 N4 N5 N6 N7 |  4N+4P  2N
// sum_squares_add_f32     1                  256    32      sum | parts | P |                                            4P+8   P
//
// Needs   every x 16-byte aligned; any Ni; nothing is read of an x of which there is nothing.
// Rounds  sums in f32, fixed order (deterministic for a grid).
#include "common/reduce.cuh"
#include "common/lots.cuh"

constexpr int THREADS = 256;

// What a thread has of all tensors.
template <typename T>
struct Squares {
    // A sum for each place in a vector: short chains, and few roundings.
    float sums[WIDTH<T>] = {};
    u32 thread = blockIdx.x * THREADS + threadIdx.x;

    INLINE void add(const T* x, u32 count) {
        const u32 threads = gridDim.x * THREADS;
        for_lots<WIDTH<T>>(count, thread, threads, [&](auto lot, u32 at) {
            float v[lot.SIZE];
            load(v, x + at);
#pragma unroll
            for (int e = 0; e < lot.SIZE; e++) sums[e] = fmaf(v[e], v[e], sums[e]);
        });
        // The next tensor begins with the thread behind that of the last vector of this one.
        thread = (thread + threads - count / WIDTH<T> % threads) % threads;
    }
};

template <typename T>
INLINE void store_part(float* parts, float (&sums)[WIDTH<T>]) {
#pragma unroll
    for (int width = WIDTH<T> / 2; width > 0; width /= 2)
#pragma unroll
        for (int e = 0; e < width; e++) sums[e] += sums[e + width];
    __shared__ float slots[THREADS / 32];
    const float total = block_reduce<Sum, THREADS>(sums[0], slots);
    if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    sum_squares_parts_bf16(float* parts, const bf16* x0, const bf16* x1, const bf16* x2, const bf16* x3,
        const bf16* x4, const bf16* x5, const bf16* x6, const bf16* x7, u32 n0, u32 n1, u32 n2, u32 n3,
        u32 n4, u32 n5, u32 n6, u32 n7) {
    Squares<bf16> squares;
    squares.add(x0, n0);
    squares.add(x1, n1);
    squares.add(x2, n2);
    squares.add(x3, n3);
    squares.add(x4, n4);
    squares.add(x5, n5);
    squares.add(x6, n6);
    squares.add(x7, n7);
    store_part<bf16>(parts, squares.sums);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    sum_squares_parts_f32(float* parts, const float* x0, const float* x1, const float* x2, const float* x3,
        const float* x4, const float* x5, const float* x6, const float* x7, u32 n0, u32 n1, u32 n2, u32 n3,
        u32 n4, u32 n5, u32 n6, u32 n7) {
    Squares<float> squares;
    squares.add(x0, n0);
    squares.add(x1, n1);
    squares.add(x2, n2);
    squares.add(x3, n3);
    squares.add(x4, n4);
    squares.add(x5, n5);
    squares.add(x6, n6);
    squares.add(x7, n7);
    store_part<float>(parts, squares.sums);
}

extern "C" __global__ void __launch_bounds__(THREADS) sum_squares_add_f32(float* sum, const float* parts, u32 blocks) {
    __shared__ float slots[THREADS / 32];
    float mine = 0.0f;
    for (u32 p = threadIdx.x; p < blocks; p += THREADS) mine += parts[p];
    const float total = block_reduce<Sum, THREADS>(mine, slots);
    if (threadIdx.x == 0) *sum += total;
}
