// One step of AdamW over one tensor, in place, and its gradient set to zero.      Loshchilov & Hutter 2019
//   d = scale g,  m = b1 m + (1 - b1) d,  v = b2 v + (1 - b2) d^2
//   w = (1 - lr decay) w - lr / c1 m / (sqrt(v / c2) + eps)
// schedule holds lr, c1 and c2, in which b1^t and b2^t are. A scale of zero means a gradient that is not finite:
// then only the gradient is written.
//
// entry                   grid               block  shared  arguments                                                           bytes  flops
// adamw_step_bf16         min(N/1024,4*sms)  256    0       param m v grad | schedule scale | N | beta1 beta2 eps decay         28N    14N
// adamw_step_f32          min(N/1024,4*sms)  256    0       param m v grad | schedule scale | N | beta1 beta2 eps decay         32N    14N
// adamw_step_master_bf16  min(N/1024,4*sms)  256    0       param m v grad master | schedule scale | N | beta1 beta2 eps decay  34N    14N
// adamw_step_master_f32   min(N/1024,4*sms)  256    0       param m v grad master | schedule scale | N | beta1 beta2 eps decay  36N    14N
// adamw_step_master_moments_bf16       min(N/1024,4*sms)  256  0  param m v grad master | schedule scale | N | beta1 beta2 eps decay  26N  14N
// adamw_step_master_grad_bf16          min(N/1024,4*sms)  256  0  param m v grad master | schedule scale | N | beta1 beta2 eps decay  30N  14N
// adamw_step_master_moments_grad_bf16  min(N/1024,4*sms)  256  0  param m v grad master | schedule scale | N | beta1 beta2 eps decay  22N  14N
//
// Moments and gradients are stored in f32; in bf16 where a name says moments, grad.
// Needs   tensors 16-byte aligned; any N. With a master copy param is only written.
// Rounds  moments and weight once, on store; f32 between.
#include "common/lots.cuh"

constexpr int THREADS = 256;

// `weight` is what the step moves; `copy` receives its result where that is another tensor.
template <typename W, typename P, typename M, typename G>
INLINE void step(W* weight, P* copy, M* first, M* second, G* grad, const float* schedule, const float* scale, u32 count,
                 float beta1, float beta2, float eps, float decay) {
    const float factor = *scale;
    if (factor == 0.0f) {
        for_lots<4>(count, [&](auto lot, u32 at) {
            const float zeros[lot.SIZE] = {};
            store(grad + at, zeros);
        });
        return;
    }
    const float rate = schedule[0] / schedule[1], keep = 1.0f - schedule[0] * decay, root = 1.0f / sqrtf(schedule[2]);
    for_lots<4>(count, [&](auto lot, u32 at) {
        float w[lot.SIZE], m[lot.SIZE], v[lot.SIZE], g[lot.SIZE];
        load(w, weight + at);
        load(m, first + at);
        load(v, second + at);
        load(g, grad + at);
#pragma unroll
        for (int e = 0; e < lot.SIZE; e++) {
            const float d = g[e] * factor;
            m[e] = beta1 * m[e] + (1.0f - beta1) * d;
            v[e] = beta2 * v[e] + (1.0f - beta2) * d * d;
            w[e] = keep * w[e] - rate * m[e] / (sqrtf(v[e]) * root + eps);
            g[e] = 0.0f;
        }
        store(weight + at, w);
        if (copy != nullptr) store(copy + at, w);
        store(first + at, m);
        store(second + at, v);
        store(grad + at, g);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_bf16(bf16* param, float* m, float* v, float* grad, const float* schedule, const float* scale, u32 count,
        float beta1, float beta2, float eps, float decay) {
    step(param, static_cast<bf16*>(nullptr), m, v, grad, schedule, scale, count, beta1, beta2, eps, decay);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_f32(float* param, float* m, float* v, float* grad, const float* schedule, const float* scale, u32 count,
        float beta1, float beta2, float eps, float decay) {
    step(param, static_cast<float*>(nullptr), m, v, grad, schedule, scale, count, beta1, beta2, eps, decay);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_master_bf16(bf16* param, float* m, float* v, float* grad, float* master, const float* schedule,
        const float* scale, u32 count, float beta1, float beta2, float eps, float decay) {
    step(master, param, m, v, grad, schedule, scale, count, beta1, beta2, eps, decay);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_master_f32(float* param, float* m, float* v, float* grad, float* master, const float* schedule,
        const float* scale, u32 count, float beta1, float beta2, float eps, float decay) {
    step(master, param, m, v, grad, schedule, scale, count, beta1, beta2, eps, decay);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_master_moments_bf16(bf16* param, bf16* m, bf16* v, float* grad, float* master, const float* schedule,
        const float* scale, u32 count, float beta1, float beta2, float eps, float decay) {
    step(master, param, m, v, grad, schedule, scale, count, beta1, beta2, eps, decay);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_master_grad_bf16(bf16* param, float* m, float* v, bf16* grad, float* master, const float* schedule,
        const float* scale, u32 count, float beta1, float beta2, float eps, float decay) {
    step(master, param, m, v, grad, schedule, scale, count, beta1, beta2, eps, decay);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_step_master_moments_grad_bf16(bf16* param, bf16* m, bf16* v, bf16* grad, float* master, const float* schedule,
        const float* scale, u32 count, float beta1, float beta2, float eps, float decay) {
    step(master, param, m, v, grad, schedule, scale, count, beta1, beta2, eps, decay);
}
