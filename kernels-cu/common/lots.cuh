// Arrays of any length, taken in lots: `N` elements that lie side by side and cross the bus in one access of
// up to 16 bytes, and what is left over one by one.
#pragma once
#include "pack.cuh"

INLINE void load(float (&x)[1], const bf16* from) { x[0] = to_float(*from); }
INLINE void load(float (&x)[1], const float* from) { x[0] = *from; }

INLINE void load(float (&x)[2], const bf16* from) {
    u32 pair = *reinterpret_cast<const u32*>(from);
    x[0] = low(pair);
    x[1] = high(pair);
}

INLINE void load(float (&x)[2], const float* from) {
    float2 v = *reinterpret_cast<const float2*>(from);
    x[0] = v.x;
    x[1] = v.y;
}

INLINE void load(float (&x)[4], const bf16* from) {
    uint2 v = *reinterpret_cast<const uint2*>(from);
    x[0] = low(v.x);
    x[1] = high(v.x);
    x[2] = low(v.y);
    x[3] = high(v.y);
}

INLINE void load(float (&x)[4], const float* from) { unpack(x, load16(from)); }
INLINE void load(float (&x)[8], const bf16* from) { unpack(x, load16(from)); }

// Each rounds once.
INLINE void store(bf16* to, const float (&x)[1]) { store_one(to, x[0]); }
INLINE void store(float* to, const float (&x)[1]) { *to = x[0]; }
INLINE void store(bf16* to, const float (&x)[2]) { *reinterpret_cast<u32*>(to) = pack(x[0], x[1]); }
INLINE void store(float* to, const float (&x)[2]) { *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]); }

INLINE void store(bf16* to, const float (&x)[4]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
}

INLINE void store(float* to, const float (&x)[4]) { store16(to, packed(x)); }
INLINE void store(bf16* to, const float (&x)[8]) { store16(to, packed(x)); }

// The largest lot of which no operand takes more than 16 bytes.
template <typename A, typename B>
constexpr int LOT = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

// Says the size of a lot to a lambda: `float x[lot.SIZE]`.
template <int N>
struct Lot {
    static constexpr int SIZE = N;
};

// Calls f(lot, i) for the lots that begin at element i of `count`, shared out to `threads` threads. The array
// begins at a multiple of 16 bytes, unless N is 1.
template <int N, typename F>
INLINE void for_lots(u32 count, u32 thread, u32 threads, F f) {
    const u32 whole = count / N;
    for (u32 v = thread; v < whole; v += threads) f(Lot<N>{}, v * N);
    if constexpr (N > 1)
        for (u32 i = whole * N + thread; i < count; i += threads) f(Lot<1>{}, i);
}

// The same, shared out to the whole grid.
template <int N, typename F>
INLINE void for_lots(u32 count, F f) {
    for_lots<N>(count, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x, f);
}
