// A few neighbouring elements as floats, and the walk of a grid over an array of any length.
#pragma once
#include "pack.cuh"

// `N` elements, aligned to `N` of them: in vectors of 16 bytes where they fill those.
template <int N>
INLINE void load_span(float (&x)[N], const float* from) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int e = 0; e < N; e += 4) {
            const float4 v = *reinterpret_cast<const float4*>(from + e);
            x[e] = v.x, x[e + 1] = v.y, x[e + 2] = v.z, x[e + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int e = 0; e < N; e++) x[e] = from[e];
    }
}

template <int N>
INLINE void load_span(float (&x)[N], const bf16* from) {
    if constexpr (N == 8) {
        unpack(x, load16(from));
    } else if constexpr (N == 4) {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        x[0] = low(v.x), x[1] = high(v.x), x[2] = low(v.y), x[3] = high(v.y);
    } else {
#pragma unroll
        for (int e = 0; e < N; e++) x[e] = to_float(from[e]);
    }
}

template <int N>
INLINE void store_span(float* to, const float (&x)[N]) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int e = 0; e < N; e += 4) *reinterpret_cast<float4*>(to + e) = make_float4(x[e], x[e + 1], x[e + 2], x[e + 3]);
    } else {
#pragma unroll
        for (int e = 0; e < N; e++) to[e] = x[e];
    }
}

template <int N>
INLINE void store_span(bf16* to, const float (&x)[N]) {
    if constexpr (N == 8) {
        store16(to, packed(x));
    } else if constexpr (N == 4) {
        *reinterpret_cast<uint2*>(to) = make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
    } else {
#pragma unroll
        for (int e = 0; e < N; e++) store_one(to + e, x[e]);
    }
}

template <int N>
struct Count {
    static constexpr int value = N;
};

// The grid calls `each(at, Count<N>())` for every whole span of `count` elements, and `each(at, Count<1>())`
// for those that are left.
template <int N, typename F>
INLINE void walk(u32 count, const F& each) {
    const u32 first = blockIdx.x * blockDim.x + threadIdx.x, spans = count / N;
    for (u32 i = first; i < spans; i += gridDim.x * blockDim.x) each(i * N, Count<N>());
    if (N > 1 && spans * N + first < count) each(spans * N + first, Count<1>());
}
