// One step of the reverse process, in place, with classifier-free guidance.              Ho & Salimans 2022
//   p = u + guidance (c - u),   x0 = clip(kx x + kp p),   e = (x - a x0) / b
//   x' = c0 x0 + c1 e + c2 x + c3 z + c4 m,   m' = m0 x0 + m1 e + m2 x
// A row of steps holds kx kp a b clip guidance c0..c4 m0..m2 of an image. z is Philox noise, the same bits as on
// the host, and is not made where c3 is zero. The predictions u without the condition are behind those with it.
//
// entry               grid                   block  shared  arguments                                             bytes  flops
// sampler_update_f32  min(E/1024,4*sms/I),I  256    76      x memory | prediction steps seed keys | I E guided |  20IE   24IE
//
// Needs   tensors 16-byte aligned; any size.
// Rounds  every product and every sum, as the host does; f32.
#include "common/lots.cuh"
#include "common/random.cuh"

constexpr int THREADS = 256;

// sum + a b, rounded twice as on the host: pictures of both are the same bits.
INLINE float plus(float sum, float a, float b) { return __fadd_rn(sum, __fmul_rn(a, b)); }

struct Step {
    static constexpr int WIDTH = 14;
    float kx, kp, a, b, clip, guidance, next[5], memory[3];

    // One element, in place. What is not a number stays so.
    INLINE void apply(float& x, float& m, float with, float without, bool guided, float z) const {
        const float p = guided ? plus(without, guidance, with - without) : with;
        float x0 = plus(__fmul_rn(kx, x), kp, p);
        x0 = clip < x0 ? clip : x0;
        x0 = -clip > x0 ? -clip : x0;
        const float e = plus(x, -a, x0) / b;
        float to = plus(__fmul_rn(next[0], x0), next[1], e);
        to = plus(plus(plus(to, next[2], x), next[3], z), next[4], m);
        m = plus(plus(__fmul_rn(memory[0], x0), memory[1], e), memory[2], x);
        x = to;
    }
};

// The step of the block's image, and the words that key its noise, through shared memory: read from global memory
// once.
INLINE Step load_step(Stream& stream, u32& first, const float* steps, const u32* seed, const u32* keys, u32 quads) {
    __shared__ float row[Step::WIDTH];
    __shared__ u32 words[5];
    const u32 image = blockIdx.y, t = threadIdx.x;
    if (t < Step::WIDTH) row[t] = steps[image * Step::WIDTH + t];
    if (t < 2) words[t] = seed[t];
    if (t >= 2 && t < 5) words[t] = keys[image * 3 + t - 2];
    __syncthreads();
    stream = {{words[0], words[1]}, PURPOSE_SAMPLER, {words[2], words[3]}};
    // Blocks of four are counted in the 30 bits that elements leave them.
    first = u32(max(int(words[4]), 0)) * quads & 0x3fffffffu;
    return {row[0], row[1], row[2], row[3], row[4], row[5], {row[6], row[7], row[8], row[9], row[10]}, {row[11], row[12], row[13]}};
}

template <int N>
INLINE void update(float* x, float* memory, const float* with, const float* without, bool guided, const Step& step,
                   const float* z) {
    float a[N], m[N], c[N], u[N] = {};
    load(a, x);
    load(m, memory);
    load(c, with);
    if (guided) load(u, without);
#pragma unroll
    for (int e = 0; e < N; e++) step.apply(a[e], m[e], c[e], u[e], guided, z[e]);
    store(x, a);
    store(memory, m);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    sampler_update_f32(float* x, float* memory, const float* prediction, const float* steps, const u32* seed, const u32* keys,
        u32 images, u32 numel, u32 guided) {
    const u32 quads = (numel + 3) / 4;
    const u64 base = u64(blockIdx.y) * numel, behind = u64(images) * numel;
    Stream stream;
    u32 first;
    const Step step = load_step(stream, first, steps, seed, keys, quads);
    for (u32 q = blockIdx.x * THREADS + threadIdx.x; q < quads; q += gridDim.x * THREADS) {
        float z[4] = {};
        if (step.next[3] != 0.0f) normals(z, stream, first + q);
        const u64 at = base + q * 4;
        const float *with = prediction + at, *without = with + behind;
        if (numel % 4 == 0) {
            update<4>(x + at, memory + at, with, without, guided != 0, step, z);
        } else {
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (q * 4 + e < numel) update<1>(x + at + e, memory + at + e, with + e, without + e, guided != 0, step, z + e);
        }
    }
}
