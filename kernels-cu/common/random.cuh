// Counter-based random numbers, the same as those of the CPU.
#pragma once
#include "waves.cuh"

// What a stream is for; as `Purpose` of the engine.
constexpr u32 PURPOSE_NOISE = 5, PURPOSE_SAMPLER = 7;

// The random numbers of one (seed, purpose, document).
struct Stream {
    u32 key[2], purpose, document[2];
};

// Ten rounds of Philox 4x32.   Salmon et al. 2011
INLINE uint4 philox(uint4 counter, u32 k0, u32 k1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u32 p_high = __umulhi(counter.x, 0xd2511f53u), p_low = counter.x * 0xd2511f53u;
        const u32 q_high = __umulhi(counter.z, 0xcd9e8d57u), q_low = counter.z * 0xcd9e8d57u;
        counter = make_uint4(q_high ^ counter.y ^ k0, q_low, p_high ^ counter.w ^ k1, p_low);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return counter;
}

// Natural logarithm of a normal number in (0, 1], to about 2 units in the last place.
INLINE float natural_log(float x) {
    // x = m 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh((m-1)/(m+1)).
    const u32 bits = __float_as_uint(x);
    const int e = int(bits - 0x3f3504f3u) >> 23;
    const float m = __uint_as_float(bits - (u32(e) << 23));
    const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
    float p = fmaf(fmaf(fmaf(0.22222198f, z, 0.2857143f), z, 0.4f), z, 0.6666667f);
    p = fmaf(p, z * s, 2.0f * s);
    return fmaf(float(e), LN_2, p);
}

// Two standard normals from two words.   Box & Muller 1958
INLINE void box_muller(float& a, float& b, u32 radius, u32 angle) {
    const float u = float((radius >> 8) + 1) * (1.0f / 16777216.0f);
    const float r = sqrtf(fmaxf(-2.0f * natural_log(u), 0.0f));
    const float turn = float(angle >> 8) * (1.0f / 16777216.0f), quarter = floorf(fmaf(turn, 4.0f, 0.5f));
    const Wave w = quarter_wave(fmaf(quarter, -0.25f, turn), u32(quarter));
    a = __fmul_rn(r, w.cos);
    b = __fmul_rn(r, w.sin);
}

// Four standard normals: those of elements 4 `block` and the next of a stream.
INLINE void normals(float (&z)[4], const Stream& s, u32 block) {
    const uint4 words = philox(make_uint4(block, s.purpose, s.document[0], s.document[1]), s.key[0], s.key[1]);
    box_muller(z[0], z[1], words.x, words.y);
    box_muller(z[2], z[3], words.z, words.w);
}
