// The gradient's norm, and what it is multiplied by.                                  Pascanu et al. 2013
//   norm = sqrt(sum),   scale = min(1, most / norm), or 0 where the norm is not finite
//
// entry          grid  block  shared  arguments                  bytes  flops
// clip_norm_f32  1     32     0       norm scale | sum | | most  12     3
//
// Rounds  once, on store; f32.
#include "common/ptx.cuh"

extern "C" __global__ void __launch_bounds__(32) clip_norm_f32(float* norm, float* scale, const float* sum, float most) {
    if (threadIdx.x != 0) return;
    const float length = sqrtf(*sum);
    *norm = length;
    *scale = length < INFINITY ? fminf(most / fmaxf(length, 1e-12f), 1.0f) : 0.0f;
}
