// The sum of the squares of a tensor, added to a number.
//   sum += sum_n x[n]^2
// Each of P blocks adds its share; `add` adds the parts of all blocks, in order.
//
// entry                   grid               block  shared  arguments          bytes  flops
// sum_squares_parts_bf16  min(N/2048,4*sms)  256    32      parts | x | N |    2N+4P  2N
// sum_squares_parts_f32   min(N/1024,4*sms)  256    32      parts | x | N |    4N+4P  2N
// sum_squares_add_f32     1                  256    32      sum | parts | P |  4P+8   P
//
// Needs   x 16-byte aligned; any N.
// Rounds  sums in f32, fixed order (deterministic for a grid).
#include "common/reduce.cuh"
#include "common/lots.cuh"

constexpr int THREADS = 256;

template <typename T>
INLINE void add_parts(float* parts, const T* x, u32 count) {
    // A sum for each place in a vector: short chains, and few roundings.
    float sums[WIDTH<T>] = {};
    for_lots<WIDTH<T>>(count, [&](auto lot, u32 at) {
        float v[lot.SIZE];
        load(v, x + at);
#pragma unroll
        for (int e = 0; e < lot.SIZE; e++) sums[e] = fmaf(v[e], v[e], sums[e]);
    });
#pragma unroll
    for (int width = WIDTH<T> / 2; width > 0; width /= 2)
#pragma unroll
        for (int e = 0; e < width; e++) sums[e] += sums[e + width];
    __shared__ float slots[THREADS / 32];
    const float total = block_reduce<Sum, THREADS>(sums[0], slots);
    if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) sum_squares_parts_bf16(float* parts, const bf16* x, u32 count) {
    add_parts(parts, x, count);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) sum_squares_parts_f32(float* parts, const float* x, u32 count) {
    add_parts(parts, x, count);
}

extern "C" __global__ void __launch_bounds__(THREADS) sum_squares_add_f32(float* sum, const float* parts, u32 blocks) {
    __shared__ float slots[THREADS / 32];
    float mine = 0.0f;
    for (u32 p = threadIdx.x; p < blocks; p += THREADS) mine += parts[p];
    const float total = block_reduce<Sum, THREADS>(mine, slots);
    if (threadIdx.x == 0) *sum += total;
}
