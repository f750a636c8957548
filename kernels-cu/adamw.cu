// One step of AdamW over up to 32 tensors, in place.                              Loshchilov & Hutter 2019
//   d = scale g,  m = b1 m + (1 - b1) d,  v = b2 v + (1 - b2) d^2
//   w = (1 - lr decay) w - lr / c1 m / (sqrt(v / c2) + eps)
// schedule holds lr, c1 and c2, in which b1^t and b2^t are. A scale of zero means a gradient that is not finite:
// then nothing changes. The grid shares all tensors out as if they lay behind one another; the T of them are the first rows
// of states: param m v master grad N, of which grad is only read.
//
// entry                                grid               block  shared  arguments                                                bytes  flops
// adamw_step_bf16                      min(N/1024,4*sms)  256    0       states:32x6 | schedule scale | T | beta1 beta2 eps decay  24N    14N
// adamw_step_f32                       min(N/1024,4*sms)  256    0       states:32x6 | schedule scale | T | beta1 beta2 eps decay  28N    14N
// adamw_step_master_bf16               min(N/1024,4*sms)  256    0       states:32x6 | schedule scale | T | beta1 beta2 eps decay  30N    14N
// adamw_step_master_f32                min(N/1024,4*sms)  256    0       states:32x6 | schedule scale | T | beta1 beta2 eps decay  32N    14N
// adamw_step_master_moments_bf16       min(N/1024,4*sms)  256    0       states:32x6 | schedule scale | T | beta1 beta2 eps decay  22N    14N
// adamw_step_master_grad_bf16          min(N/1024,4*sms)  256    0       states:32x6 | schedule scale | T | beta1 beta2 eps decay  28N    14N
// adamw_step_master_moments_grad_bf16  min(N/1024,4*sms)  256    0       states:32x6 | schedule scale | T | beta1 beta2 eps decay  20N    14N
//
// N counts all elements. Moments and gradients are stored in f32; in bf16 where a name says moments, grad.
// Needs   tensors 16-byte aligned; any N of each below 2^31. With a master copy param is only written.
// Rounds  moments and weight once, on store; f32 between.
#include "common/tensors.cuh"

constexpr int THREADS = 256;

template <typename P, typename M, typename G>
struct State {
    P* param;
    M* first;
    M* second;
    float* master;
    const G* grad;
    u64 count;
};

template <typename P, typename M = float, typename G = float>
struct States {
    State<P, M, G> rows[32];
};

// What is the same for all tensors.
struct Numbers {
    float factor, rate, keep, root, beta1, beta2, eps;

    INLINE Numbers(const float* schedule, float scale, float beta1, float beta2, float eps, float decay)
        : factor(scale), rate(schedule[0] / schedule[1]), keep(1.0f - schedule[0] * decay),
          root(1.0f / sqrtf(schedule[2])), beta1(beta1), beta2(beta2), eps(eps) {}
};

// `weight` is what the step moves; `copy` receives its result where that is another tensor.
template <typename W, typename P, typename M, typename G>
INLINE void step(W* weight, P* copy, M* first, M* second, const G* grad, u32& next, u32 count, const Numbers& n) {
    for_lots_of_next<4>(next, count, [&](auto lot, u32 at) {
        float w[lot.SIZE], m[lot.SIZE], v[lot.SIZE], g[lot.SIZE];
        load(w, weight + at);
        load(m, first + at);
        load(v, second + at);
        load(g, grad + at);
#pragma unroll
        for (int e = 0; e < lot.SIZE; e++) {
            const float d = g[e] * n.factor;
            m[e] = n.beta1 * m[e] + (1.0f - n.beta1) * d;
            v[e] = n.beta2 * v[e] + (1.0f - n.beta2) * d * d;
            w[e] = n.keep * w[e] - n.rate * m[e] / (sqrtf(v[e]) * n.root + n.eps);
        }
        store(weight + at, w);
        if (copy != nullptr) store(copy + at, w);
        store(first + at, m);
        store(second + at, v);
    });
}

// Of the first `tensors` rows; with master copies it is those that the step moves.
template <bool MASTER, typename P, typename M, typename G>
INLINE void update(const States<P, M, G>& states, const float* schedule, const float* scale, u32 tensors, float beta1,
                   float beta2, float eps, float decay) {
    if (*scale == 0.0f) return;
    const Numbers numbers(schedule, *scale, beta1, beta2, eps, decay);
    u32 next = blockIdx.x * THREADS + threadIdx.x;
#pragma unroll 1
    for (u32 t = 0; t < tensors; t++) {
        const State<P, M, G>& s = states.rows[t];
        const u32 count = u32(s.count);
        if constexpr (MASTER) step(s.master, s.param, s.first, s.second, s.grad, next, count, numbers);
        else step(s.param, static_cast<P*>(nullptr), s.first, s.second, s.grad, next, count, numbers);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_bf16(const __grid_constant__ States<bf16> states, const float* schedule, const float* scale,
        u32 tensors, float beta1, float beta2, float eps, float decay) {
    update<false>(states, schedule, scale, tensors, beta1, beta2, eps, decay);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_f32(const __grid_constant__ States<float> states, const float* schedule, const float* scale,
        u32 tensors, float beta1, float beta2, float eps, float decay) {
    update<false>(states, schedule, scale, tensors, beta1, beta2, eps, decay);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_master_bf16(const __grid_constant__ States<bf16> states, const float* schedule, const float* scale,
        u32 tensors, float beta1, float beta2, float eps, float decay) {
    update<true>(states, schedule, scale, tensors, beta1, beta2, eps, decay);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_master_f32(const __grid_constant__ States<float> states, const float* schedule, const float* scale,
        u32 tensors, float beta1, float beta2, float eps, float decay) {
    update<true>(states, schedule, scale, tensors, beta1, beta2, eps, decay);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_master_moments_bf16(const __grid_constant__ States<bf16, bf16> states, const float* schedule, const float* scale,
        u32 tensors, float beta1, float beta2, float eps, float decay) {
    update<true>(states, schedule, scale, tensors, beta1, beta2, eps, decay);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_master_grad_bf16(const __grid_constant__ States<bf16, float, bf16> states, const float* schedule, const float* scale,
        u32 tensors, float beta1, float beta2, float eps, float decay) {
    update<true>(states, schedule, scale, tensors, beta1, beta2, eps, decay);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_master_moments_grad_bf16(const __grid_constant__ States<bf16, bf16, bf16> states, const float* schedule, const float* scale,
        u32 tensors, float beta1, float beta2, float eps, float decay) {
    update<true>(states, schedule, scale, tensors, beta1, beta2, eps, decay);
}
