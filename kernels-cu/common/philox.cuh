// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011) and Gaussians made from its words, the
// same bits as the host makes.
#pragma once
#include "ptx.cuh"

// What a stream is used for; numbers as on the host.
constexpr u32 NOISE = 5, SAMPLER = 7;

// The random numbers of one seed, purpose and document.
struct Stream {
    u32 key[2], purpose, document[2];

    // Four words of block `block`.
    INLINE void words(u32 (&w)[4], u32 block) const {
        u32 a = block, b = purpose, c = document[0], d = document[1], k0 = key[0], k1 = key[1];
#pragma unroll
        for (int round = 0; round < 10; round++) {
            const u64 p = u64(a) * 0xD2511F53u, q = u64(c) * 0xCD9E8D57u;
            a = u32(q >> 32) ^ b ^ k0, b = u32(q), c = u32(p >> 32) ^ d ^ k1, d = u32(p);
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        w[0] = a, w[1] = b, w[2] = c, w[3] = d;
    }

    // Four standard normals of block `block`: elements 4 block and on.
    INLINE void normals(float (&z)[4], u32 block) const {
        u32 w[4];
        words(w, block);
        box_muller(z[0], z[1], w[0], w[1]);
        box_muller(z[2], z[3], w[2], w[3]);
    }

    // Natural logarithm of a normal number in (0, 1]: x = m 2^e with m in [sqrt(1/2), sqrt(2)),
    // ln m = 2 atanh((m-1)/(m+1)).
    INLINE static float log_unit(float x) {
        const u32 bits = __float_as_uint(x);
        const int e = int(bits - 0x3f3504f3u) >> 23;
        const float m = __uint_as_float(bits - (u32(e) << 23));
        const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
        float p = fmaf(0.22222198f, z, 0.2857143f);
        p = fmaf(fmaf(p, z, 0.4f), z, 0.6666667f);
        p = fmaf(p, z * s, 2.0f * s);
        return fmaf(float(e), LN_2, p);
    }

    // (sin 2 pi u, cos 2 pi u) for u in [0, 1): nearest quarter turn, then Taylor polynomials of the rest.
    INLINE static void sin_cos_turn(float& sine, float& cosine, float u) {
        const float q = floorf(u * 4.0f + 0.5f);
        const float x = (u - q * 0.25f) * 6.2831855f, z = x * x;
        float s = fmaf(fmaf(2.7557319e-6f, z, -1.984127e-4f), z, 8.333334e-3f);
        s = fmaf(fmaf(s, z, -0.16666667f), z * x, x);
        float c = fmaf(fmaf(-2.755732e-7f, z, 2.4801587e-5f), z, -1.3888889e-3f);
        c = fmaf(fmaf(fmaf(c, z, 4.1666668e-2f), z, -0.5f), z, 1.0f);
        const int turns = int(q) & 3;
        if (turns % 2 == 1) {
            const float other = s;
            s = c, c = other;
        }
        sine = turns == 2 || turns == 3 ? -s : s;
        cosine = turns == 1 || turns == 2 ? -c : c;
    }

    // Box & Muller 1958.
    INLINE static void box_muller(float& a, float& b, u32 radius, u32 angle) {
        const float u = float((radius >> 8) + 1) * (1.0f / 16777216.0f);
        const float r = sqrtf(fmaxf(-2.0f * log_unit(u), 0.0f));
        float s, c;
        sin_cos_turn(s, c, float(angle >> 8) * (1.0f / 16777216.0f));
        a = __fmul_rn(r, c), b = __fmul_rn(r, s);
    }
};
