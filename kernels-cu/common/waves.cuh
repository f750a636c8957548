// Sines and cosines of angles that are counted in turns, as fractions of 2^64: what is past a whole turn falls
// off at the top, so that an angle of any size is as exact as a small one.
#pragma once
#include "ptx.cuh"

// 1 / (2 pi): one radian.
#define RADIAN 0x28be60db9391054aull

struct Wave {
    float sin, cos;
};

// Of 2 pi x, for x in [-1/8, 1/8] and a number of quarter turns more. Taylor's polynomials to x^9 and x^10.
INLINE Wave quarter_wave(float turns, u32 quarter) {
    float x = turns * 6.28318530717958647692f, z = x * x;
    float s = fmaf(fmaf(2.7557319e-6f, z, -1.984127e-4f), z, 8.333334e-3f);
    s = fmaf(fmaf(s, z, -0.16666667f), z * x, x);
    float c = fmaf(fmaf(-2.755732e-7f, z, 2.4801587e-5f), z, -1.3888889e-3f);
    c = fmaf(fmaf(fmaf(c, z, 4.1666668e-2f), z, -0.5f), z, 1.0f);
    if (quarter & 1) {
        float t = s;
        s = c;
        c = t;
    }
    return {quarter & 2 ? -s : s, (quarter + 1) & 2 ? -c : c};
}

INLINE Wave wave(u64 turns) {
    u64 quarter = (turns + (1ull << 61)) >> 62;
    long long rest = static_cast<long long>(turns - (quarter << 62));
    return quarter_wave(float(rest) * 5.421010862427522e-20f, u32(quarter));
}

// Of wave j: ratio^j radians, with the ratio as a fraction of 2^64.
INLINE u64 frequency(u64 ratio, u32 j) {
    u64 f = RADIAN;
    for (; j != 0; j /= 2) {
        if (j & 1) f = __umul64hi(f, ratio);
        ratio = __umul64hi(ratio, ratio);
    }
    return f;
}

// How far a wave has come at a whole number.
INLINE u64 turns(int at, u64 frequency) { return u64(static_cast<long long>(at)) * frequency; }

// How far it has come at a float: its digits times the frequency, shifted by its exponent.
INLINE u64 turns(float at, u64 frequency) {
    u32 bits = __float_as_uint(at), exponent = bits >> 23 & 255;
    u64 digits = (bits & 0x7fffff) | (exponent ? 0x800000 : 0);
    int shift = int(exponent ? exponent : 1) - 150;
    u64 low = digits * frequency, high = __umul64hi(digits, frequency), angle;
    if (shift >= 0) angle = shift < 64 ? low << shift : 0;
    else if (shift > -64) angle = low >> -shift | high << (64 + shift);
    else angle = shift > -128 ? high >> (-64 - shift) : 0;
    return at < 0.0f ? 0 - angle : angle;
}
