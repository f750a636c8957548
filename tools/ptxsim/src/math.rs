//! Number formats that the host lacks, and the approximate functions of the special-function unit.

/// Exact.
#[inline(always)]
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds to nearest even; every NaN becomes `0x7fff`, as `cvt.rn.bf16.f32` has it.
#[inline(always)]
pub(crate) fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    (if x.is_nan() { 0x7fff } else { rounded }) as u16
}

/// Exact.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    let value = if magnitude >= 0x7c00 {
        f32::from_bits(magnitude << 13 | 0x7f80_0000)
    } else {
        // Subnormals come out right, since the scaling by a power of two is exact.
        f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000)
    };
    f32::from_bits(value.to_bits() | sign)
}

/// Rounds to nearest even; every NaN becomes `0x7fff`.
#[inline(always)]
pub(crate) fn f32_to_f16(x: f32) -> u16 {
    let sign = (x.to_bits() >> 16 & 0x8000) as u16;
    let a = x.abs();
    if x.is_nan() {
        return 0x7fff;
    }
    if a >= 65520.0 {
        return sign | 0x7c00;
    }
    let magnitude = if a < 6.103_515_6e-5 {
        // The sum aligns the last kept bit with the last bit of the mantissa of 0.5.
        (a + 0.5).to_bits() - 0.5f32.to_bits()
    } else {
        let bits = a.to_bits();
        ((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)
    };
    sign | magnitude as u16
}

/// Rounds a double directly to bfloat16, for fused operations.
pub(crate) fn f64_to_bf16(x: f64) -> u16 {
    f32_to_bf16(round_to_odd(x))
}

/// Rounds a double directly to half precision, for fused operations.
pub(crate) fn f64_to_f16(x: f64) -> u16 {
    f32_to_f16(round_to_odd(x))
}

/// The `f32` between which and `x` nothing lies, with an odd last bit where inexact: rounding it again to a
/// narrower format gives the correctly rounded `x`.
fn round_to_odd(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near) == x || x.is_nan() || near.to_bits() & 1 == 1 {
        return near;
    }
    if near.is_infinite() {
        return near;
    }
    let away = f64::from(near).abs() < x.abs();
    f32::from_bits(if away { near.to_bits() + 1 } else { near.to_bits() - 1 })
}

/// `2^x` within 2 units in the last place; branch-free, so that 32 lanes become vector code.
#[inline(always)]
pub(crate) fn ex2(x: f32) -> f32 {
    // Out of this range the result is zero or infinite already; NaN passes through the comparisons.
    let clamped = if x < -151.0 { -151.0 } else { x };
    let clamped = if clamped > 129.0 { 129.0 } else { clamped };
    let whole = clamped.round_ties_even();
    let f = clamped - whole;
    // 2^f on [-0.5, 0.5]: the Taylor series in f ln 2, whose remainder is below 1e-8 here.
    let mut p = 1.525_273e-5f32;
    p = p.mul_add(f, 1.540_353e-4);
    p = p.mul_add(f, 1.333_355_8e-3);
    p = p.mul_add(f, 9.618_129e-3);
    p = p.mul_add(f, 5.550_411e-2);
    p = p.mul_add(f, 2.402_265e-1);
    p = p.mul_add(f, 6.931_472e-1);
    p = p.mul_add(f, 1.0);
    // Two factors, so that subnormal results round once.
    let n = whole as i32;
    let half = n >> 1;
    let scale = |e: i32| f32::from_bits(((e + 127) as u32) << 23);
    p * scale(half) * scale(n - half)
}

/// `log2(x)` within 2 units in the last place or `2^-24` absolute near one.
#[inline(always)]
pub(crate) fn lg2(x: f32) -> f32 {
    x.log2()
}
