//! The two types that ops compute in, and reductions in a fixed order.
use crate::tensor::{DType, In, Out, View, ViewMut};
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

/// Partial sums of a reduction: a fixed number on every machine, wide enough for its vectors.
pub const LANES: usize = 16;

/// `f32` or `f64`.
pub trait Real:
    bytemuck::Pod
    + Default
    + PartialOrd
    + Send
    + Sync
    + std::fmt::Debug
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + 'static
{
    /// Its dtype.
    const DTYPE: DType;
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// Below every finite number.
    const NEG_INFINITY: Self;

    /// From an f64, rounded.
    fn of(x: f64) -> Self;
    /// To an f64.
    fn f64(self) -> f64;
    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// `e^self`; for f32 a polynomial that vectorises, within 2 units in the last place, zero below
    /// -87 and infinite above 88.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Sine.
    fn sin(self) -> Self;
    /// Cosine.
    fn cos(self) -> Self;
    /// Whether it is neither infinite nor NaN.
    fn is_finite(self) -> bool;
    /// The larger; `self` if the other is NaN.
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if other > self { other } else { self }
    }
    /// The smaller; `self` if the other is NaN.
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        if other < self { other } else { self }
    }
    /// A register of them.
    type Vector<S: pulp::Simd>: bytemuck::Pod;
    /// A register that holds `x` everywhere.
    fn splat<S: pulp::Simd>(simd: S, x: Self) -> Self::Vector<S>;
    /// `a * b + c`, rounded once.
    fn fma<S: pulp::Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// The elements of an operand of this type; none of another.
    fn read<'a>(operand: &In<'a>) -> &'a [Self];
    /// The elements of an operand of this type; none of another.
    fn write<'a>(operand: &'a mut Out<'_>) -> &'a mut [Self];
}

impl Real for f32 {
    const DTYPE: DType = DType::F32;
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const NEG_INFINITY: f32 = f32::NEG_INFINITY;

    #[inline(always)]
    fn of(x: f64) -> f32 {
        x as f32
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn mul_add(self, a: f32, b: f32) -> f32 {
        f32::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn exp(self) -> f32 {
        // x = n ln 2 + r, |r| <= ln 2 / 2; e^r by its Taylor polynomial; 2^n through the exponent.
        // Adding 1.5 * 2^23 rounds to an integer, which the low bits of the sum then hold.
        const ROUND: f32 = 12_582_912.0;
        let x = Real::min(Real::max(self, -87.0), 88.0);
        let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
        let n = rounded - ROUND;
        let r = n.mul_add(-1.428_606_8e-6, n.mul_add(-0.693_145_75, x));
        let p = 1.388_888_9e-3_f32.mul_add(r, 8.333_334e-3).mul_add(r, 4.166_666_8e-2);
        let p = p.mul_add(r, 0.166_666_67).mul_add(r, 0.5).mul_add(r, 1.0).mul_add(r, 1.0);
        let y = p * f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
        let y = if self < -87.0 { 0.0 } else { y };
        if self > 88.0 { f32::INFINITY } else { y }
    }
    #[inline(always)]
    fn ln(self) -> f32 {
        f32::ln(self)
    }
    #[inline(always)]
    fn sin(self) -> f32 {
        f32::sin(self)
    }
    #[inline(always)]
    fn cos(self) -> f32 {
        f32::cos(self)
    }
    #[inline(always)]
    fn is_finite(self) -> bool {
        f32::is_finite(self)
    }
    type Vector<S: pulp::Simd> = S::f32s;
    #[inline(always)]
    fn splat<S: pulp::Simd>(simd: S, x: f32) -> S::f32s {
        simd.splat_f32s(x)
    }
    #[inline(always)]
    fn fma<S: pulp::Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_f32s(a, b, c)
    }
    fn read<'a>(operand: &In<'a>) -> &'a [f32] {
        if let View::F32(v) = operand.data { v } else { &[] }
    }
    fn write<'a>(operand: &'a mut Out<'_>) -> &'a mut [f32] {
        if let ViewMut::F32(v) = &mut operand.data { v } else { &mut [] }
    }
}

impl Real for f64 {
    const DTYPE: DType = DType::F64;
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const NEG_INFINITY: f64 = f64::NEG_INFINITY;

    #[inline(always)]
    fn of(x: f64) -> f64 {
        x
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn mul_add(self, a: f64, b: f64) -> f64 {
        f64::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn exp(self) -> f64 {
        f64::exp(self)
    }
    #[inline(always)]
    fn ln(self) -> f64 {
        f64::ln(self)
    }
    #[inline(always)]
    fn sin(self) -> f64 {
        f64::sin(self)
    }
    #[inline(always)]
    fn cos(self) -> f64 {
        f64::cos(self)
    }
    #[inline(always)]
    fn is_finite(self) -> bool {
        f64::is_finite(self)
    }
    type Vector<S: pulp::Simd> = S::f64s;
    #[inline(always)]
    fn splat<S: pulp::Simd>(simd: S, x: f64) -> S::f64s {
        simd.splat_f64s(x)
    }
    #[inline(always)]
    fn fma<S: pulp::Simd>(simd: S, a: S::f64s, b: S::f64s, c: S::f64s) -> S::f64s {
        simd.mul_add_f64s(a, b, c)
    }
    fn read<'a>(operand: &In<'a>) -> &'a [f64] {
        if let View::F64(v) = operand.data { v } else { &[] }
    }
    fn write<'a>(operand: &'a mut Out<'_>) -> &'a mut [f64] {
        if let ViewMut::F64(v) = &mut operand.data { v } else { &mut [] }
    }
}

/// Sum of `f(i)` over `0..n`, in [`LANES`] partial sums.
#[inline(always)]
pub fn sum<T: Real>(n: usize, f: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let whole = n / LANES * LANES;
    let mut i = 0;
    while i < whole {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + l);
        }
        i += LANES;
    }
    for (l, lane) in lanes.iter_mut().enumerate().take(n - whole) {
        *lane += f(whole + l);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Inner product of the common length of two slices.
#[inline(always)]
pub fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    let mut lanes = [T::ZERO; LANES];
    let (heads, tail) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = heads.remainder().iter().zip(tail.remainder());
    for (x, y) in heads.zip(tail) {
        for l in 0..LANES {
            lanes[l] = x[l].mul_add(y[l], lanes[l]);
        }
    }
    for (l, (x, y)) in rest.enumerate() {
        lanes[l] = x.mul_add(*y, lanes[l]);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `y += a x` over the common length.
#[inline(always)]
pub fn axpy<T: Real>(y: &mut [T], a: T, x: &[T]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = x.mul_add(a, *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        for i in -1_000_000..=900_000 {
            let x = i as f32 * 1e-4;
            let (have, want) = (f64::from(Real::exp(x)), f64::from(x).exp());
            if x < -87.0 {
                assert!(have < 1.7e-38, "{x}: {have}");
            } else if x <= 88.0 {
                assert!((have - want).abs() <= 2.5e-7 * want, "{x}: {have} {want}");
            }
        }
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(f32::INFINITY), f32::INFINITY);
        assert!(Real::exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_cover_every_length() {
        for n in 0..70 {
            let x: Vec<f64> = (0..n).map(|i| f64::from(i) + 0.5).collect();
            let want: f64 = x.iter().sum();
            assert_eq!(sum(x.len(), |i| x[i]), want);
            assert_eq!(dot(&x, &vec![1.0; x.len()]), want);
        }
    }
}
