// Vectors of 16 bytes: 8 bf16 or 4 floats, as they cross the memory bus.
#pragma once
#include "ptx.cuh"

struct alignas(16) Vec16 {
    u32 word[4];
};

INLINE Vec16 load16(const void* from) {
    uint4 v = *static_cast<const uint4*>(from);
    return {v.x, v.y, v.z, v.w};
}

INLINE void store16(void* to, const Vec16& v) { store_global(to, v.word); }

// As `again` of a word: the vector is unpacked anew.
INLINE Vec16 again(const Vec16& v) {
    return {again(v.word[0]), again(v.word[1]), again(v.word[2]), again(v.word[3])};
}

// How many elements a vector holds.
template <typename T>
constexpr int WIDTH = 16 / sizeof(T);

INLINE void unpack(float (&x)[8], const Vec16& v) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = low(v.word[i]);
        x[2 * i + 1] = high(v.word[i]);
    }
}

INLINE void unpack(float (&x)[4], const Vec16& v) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = __uint_as_float(v.word[i]);
}

INLINE Vec16 packed(const float (&x)[8]) {
    return {pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])};
}

INLINE Vec16 packed(const float (&x)[4]) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
}

// Rounds one sum on store.
INLINE void store_one(float* to, float x) { *to = x; }
INLINE void store_one(bf16* to, float x) { to->bits = u16(pack(x, 0.0f)); }
