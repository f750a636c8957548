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

/// What the two types have in common.
macro_rules! shared {
    ($t:ident, $dtype:ident, $vector:ident, $splat:ident, $mul_add:ident) => {
        const DTYPE: DType = DType::$dtype;
        const ZERO: $t = 0.0;
        const ONE: $t = 1.0;
        const NEG_INFINITY: $t = $t::NEG_INFINITY;
        type Vector<S: pulp::Simd> = S::$vector;

        #[inline(always)]
        fn of(x: f64) -> $t {
            x as $t
        }
        #[inline(always)]
        fn f64(self) -> f64 {
            self as f64
        }
        #[inline(always)]
        fn mul_add(self, a: $t, b: $t) -> $t {
            $t::mul_add(self, a, b)
        }
        #[inline(always)]
        fn sqrt(self) -> $t {
            $t::sqrt(self)
        }
        #[inline(always)]
        fn ln(self) -> $t {
            $t::ln(self)
        }
        #[inline(always)]
        fn sin(self) -> $t {
            $t::sin(self)
        }
        #[inline(always)]
        fn cos(self) -> $t {
            $t::cos(self)
        }
        #[inline(always)]
        fn is_finite(self) -> bool {
            $t::is_finite(self)
        }
        #[inline(always)]
        fn splat<S: pulp::Simd>(simd: S, x: $t) -> S::$vector {
            simd.$splat(x)
        }
        #[inline(always)]
        fn fma<S: pulp::Simd>(simd: S, a: S::$vector, b: S::$vector, c: S::$vector) -> S::$vector {
            simd.$mul_add(a, b, c)
        }
        fn read<'a>(operand: &In<'a>) -> &'a [$t] {
            if let View::$dtype(v) = operand.data { v } else { &[] }
        }
        fn write<'a>(operand: &'a mut Out<'_>) -> &'a mut [$t] {
            if let ViewMut::$dtype(v) = &mut operand.data { v } else { &mut [] }
        }
    };
}

impl Real for f32 {
    shared!(f32, F32, f32s, splat_f32s, mul_add_f32s);

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
}

impl Real for f64 {
    shared!(f64, F64, f64s, splat_f64s, mul_add_f64s);

    #[inline(always)]
    fn exp(self) -> f64 {
        f64::exp(self)
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

/// Rounds to what `stored` holds of it: nothing is lost but to bf16.
#[inline(always)]
pub fn round<T: Real>(x: &mut [T], stored: DType) {
    if stored == DType::Bf16 {
        x.iter_mut().for_each(|x| *x = T::of(half::bf16::from_f32(x.f64() as f32).to_f64()));
    }
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
