// The sum of the squares of up to 32 tensors, added to a number.
//   sum += sum_i sum_n xi[n]^2
// Each of P blocks adds its share of all of them, as if they lay behind one another; `add` adds the parts of all
// blocks, in order. The T tensors are the first rows of xs: x N.
//
// entry                   grid               block  shared  arguments              bytes  flops
// sum_squares_parts_bf16  min(N/2048,4*sms)  256    32      parts | xs:32x2 | T |  2N+4P  2N
// sum_squares_parts_f32   min(N/1024,4*sms)  256    32      parts | xs:32x2 | T |  4N+4P  2N
// sum_squares_add_f32     1                  256    32      sum | parts | P |      4P+8   P
//
// N counts all elements.
// Needs   every x 16-byte aligned; any N of each below 2^31; nothing is read of an x of which there is nothing.
// Rounds  sums in f32, fixed order (deterministic for a grid).
#include "common/reduce.cuh"
#include "common/tensors.cuh"

constexpr int THREADS = 256;

template <typename T>
struct Operand {
    const T* x;
    u64 count;
};

template <typename T>
struct Operands {
    Operand<T> rows[32];
};

template <typename T>
INLINE void store_part(float* parts, const Operands<T>& xs, u32 tensors) {
    // A sum for each place in a vector: short chains, and few roundings.
    float sums[WIDTH<T>] = {};
    u32 next = blockIdx.x * THREADS + threadIdx.x;
#pragma unroll 1
    for (u32 t = 0; t < tensors; t++) {
        const Operand<T>& row = xs.rows[t];
        for_lots_of_next<WIDTH<T>>(next, u32(row.count), [&](auto lot, u32 at) {
            float v[lot.SIZE];
            load(v, row.x + at);
#pragma unroll
            for (int e = 0; e < lot.SIZE; e++) sums[e] = fmaf(v[e], v[e], sums[e]);
        });
    }
#pragma unroll
    for (int width = WIDTH<T> / 2; width > 0; width /= 2)
#pragma unroll
        for (int e = 0; e < width; e++) sums[e] += sums[e + width];
    __shared__ float slots[THREADS / 32];
    const float total = block_reduce<Sum, THREADS>(sums[0], slots);
    if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    sum_squares_parts_bf16(float* parts, const __grid_constant__ Operands<bf16> xs, u32 tensors) {
    store_part(parts, xs, tensors);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    sum_squares_parts_f32(float* parts, const __grid_constant__ Operands<float> xs, u32 tensors) {
    store_part(parts, xs, tensors);
}

extern "C" __global__ void __launch_bounds__(THREADS) sum_squares_add_f32(float* sum, const float* parts, u32 blocks) {
    __shared__ float slots[THREADS / 32];
    float mine = 0.0f;
    for (u32 p = threadIdx.x; p < blocks; p += THREADS) mine += parts[p];
    const float total = block_reduce<Sum, THREADS>(mine, slots);
    if (threadIdx.x == 0) *sum += total;
}
