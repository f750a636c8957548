// The forward process of diffusion: x_t = a x_0 + b noise, and what a model should predict, c x_0 + d noise.
//                      Ho et al. 2020; Nichol & Dhariwal 2021; Salimans & Ho 2022; Liu et al. 2022
// An image belongs to the B blocks of a column of the grid. `counter` makes its noise from the seed and its key
// (document, low and high, and place in the document), `given` reads it. E counts the values of an image, n those of
// all.
//
// entry                          grid  block  shared  arguments                                      bytes
// q_sample_fwd_counter_bf16      I,B   256    36      noised target | x coefficients seed keys | E |  6n
// q_sample_fwd_counter_f32       I,B   256    36      noised target | x coefficients seed keys | E |  12n
// q_sample_fwd_counter_f32_bf16  I,B   256    36      noised target | x coefficients seed keys | E |  8n
// q_sample_fwd_given_bf16        I,B   256    16      noised target | x coefficients noise | E |      8n
// q_sample_fwd_given_f32         I,B   256    16      noised target | x coefficients noise | E |      16n
// q_sample_fwd_given_f32_bf16    I,B   256    16      noised target | x coefficients noise | E |      12n
//
// The last dtype is that of the results, one before it that of x and the noise where they differ.
// Needs   Operands begin at multiples of 16 bytes.
// Rounds  once, on store.
#include "common/lots.cuh"
#include "common/random.cuh"

constexpr int THREADS = 256;

// (a, b, c, d) of an image.
struct Coefficients {
    float a, b, c, d;
};

template <int N, typename X, typename Y>
INLINE void mix(Y* noised, Y* target, const X* x, const float (&z)[N], const Coefficients& k) {
    float v[N], t[N];
    load(v, x);
#pragma unroll
    for (int e = 0; e < N; e++) {
        t[e] = fmaf(k.c, v[e], k.d * z[e]);
        v[e] = fmaf(k.a, v[e], k.b * z[e]);
    }
    store(noised, v);
    store(target, t);
}

template <typename X, typename Y>
INLINE void counter(Y* noised, Y* target, const X* x, const float* coefficients, const int* seed, const int* keys,
                    u32 size) {
    __shared__ float mixed[4];
    __shared__ int named[5];
    const u32 i = blockIdx.x, blocks = (size + 3) / 4;
    if (threadIdx.x < 4) mixed[threadIdx.x] = coefficients[4 * i + threadIdx.x];
    if (threadIdx.x < 2) named[threadIdx.x] = seed[threadIdx.x];
    if (threadIdx.x < 3) named[2 + threadIdx.x] = keys[3 * i + threadIdx.x];
    __syncthreads();
    const Coefficients k = {mixed[0], mixed[1], mixed[2], mixed[3]};
    const Stream stream = {{u32(named[0]), u32(named[1])}, PURPOSE_NOISE, {u32(named[2]), u32(named[3])}};
    // Elements are counted with 32 bits, and four of them make a block of the stream.
    const u32 first = u32(max(named[4], 0)) * blocks & 0x3fffffff;
    for (u32 b = blockIdx.y * THREADS + threadIdx.x; b < blocks; b += gridDim.y * THREADS) {
        float z[4];
        normals(z, stream, first + b);
        const u64 at = u64(i) * size + 4 * b;
        if (size % 4 == 0) {
            mix(noised + at, target + at, x + at, z, k);
        } else {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float one[1] = {z[e]};
                if (4 * b + e < size) mix(noised + at + e, target + at + e, x + at + e, one, k);
            }
        }
    }
}

template <int N, typename X, typename Y>
INLINE void given_lots(Y* noised, Y* target, const X* x, const X* noise, u32 size, const Coefficients& k) {
    for_lots<N>(size, blockIdx.y * THREADS + threadIdx.x, gridDim.y * THREADS, [=](auto lot, u32 e) {
        float z[lot.SIZE];
        load(z, noise + e);
        mix(noised + e, target + e, x + e, z, k);
    });
}

template <typename X, typename Y>
INLINE void given(Y* noised, Y* target, const X* x, const float* coefficients, const X* noise, u32 size) {
    constexpr int N = LOT<X, Y>;
    __shared__ float mixed[4];
    if (threadIdx.x < 4) mixed[threadIdx.x] = coefficients[4 * blockIdx.x + threadIdx.x];
    __syncthreads();
    const Coefficients k = {mixed[0], mixed[1], mixed[2], mixed[3]};
    const u64 at = u64(blockIdx.x) * size;
    if (size % N == 0) given_lots<N>(noised + at, target + at, x + at, noise + at, size, k);
    else given_lots<1>(noised + at, target + at, x + at, noise + at, size, k);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    q_sample_fwd_counter_bf16(bf16* noised, bf16* target, const bf16* x, const float* coefficients, const int* seed, const int* keys, u32 size) {
    counter(noised, target, x, coefficients, seed, keys, size);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    q_sample_fwd_counter_f32(float* noised, float* target, const float* x, const float* coefficients, const int* seed, const int* keys, u32 size) {
    counter(noised, target, x, coefficients, seed, keys, size);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    q_sample_fwd_counter_f32_bf16(bf16* noised, bf16* target, const float* x, const float* coefficients, const int* seed, const int* keys, u32 size) {
    counter(noised, target, x, coefficients, seed, keys, size);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    q_sample_fwd_given_bf16(bf16* noised, bf16* target, const bf16* x, const float* coefficients, const bf16* noise, u32 size) {
    given(noised, target, x, coefficients, noise, size);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    q_sample_fwd_given_f32(float* noised, float* target, const float* x, const float* coefficients, const float* noise, u32 size) {
    given(noised, target, x, coefficients, noise, size);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    q_sample_fwd_given_f32_bf16(bf16* noised, bf16* target, const float* x, const float* coefficients, const float* noise, u32 size) {
    given(noised, target, x, coefficients, noise, size);
}
