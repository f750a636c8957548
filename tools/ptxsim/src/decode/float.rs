//! Floating-point arithmetic.

use super::builder::Builder;
use crate::counters::Class;
use crate::exec::lane::{Bf16 as Brain, Bf16x2 as BrainPair, F16 as Half, F16x2 as HalfPair, Flushed};
use crate::math;
use crate::syntax::Parsed;
use crate::syntax::ast::Type::{self, *};

/// An operation on `f32`, with `.ftz` or without.
macro_rules! single {
    ($b:expr, $flush:expr, $map:ident, |$($p:ident),+| $e:expr) => {
        if $flush {
            $b.$map(|$($p: Flushed),+| { $(let $p = $p.0;)+ Flushed($e) })
        } else {
            $b.$map(|$($p: f32),+| -> f32 { $e })
        }
    };
}

/// An operation on 16-bit floats, single or in pairs, computed in `f32` and rounded once.
macro_rules! halves {
    ($b:expr, $ty:expr, $map:ident, |$($p:ident),+| $e:expr) => {
        match $ty {
            Bf16 => $b.$map(|$($p: Brain),+| { $(let $p = $p.0;)+ Brain($e) }),
            F16 => $b.$map(|$($p: Half),+| { $(let $p = $p.0;)+ Half($e) }),
            Bf16x2 => $b.$map(|$($p: BrainPair),+| {
                BrainPair({ $(let $p = $p.0;)+ $e }, { $(let $p = $p.1;)+ $e })
            }),
            F16x2 => $b.$map(|$($p: HalfPair),+| {
                HalfPair({ $(let $p = $p.0;)+ $e }, { $(let $p = $p.1;)+ $e })
            }),
            _ => $b.unknown(),
        }
    };
}

/// The smaller number, or the number beside a NaN.
#[inline(always)]
fn minimum(a: f32, b: f32) -> f32 {
    // Minus zero is smaller than zero.
    if a < b || b.is_nan() || a == b && a.is_sign_negative() { a } else { b }
}

#[inline(always)]
fn maximum(a: f32, b: f32) -> f32 {
    if a > b || b.is_nan() || a == b && a.is_sign_positive() { a } else { b }
}

/// NaN if either is, as `.NaN` asks.
#[inline(always)]
fn or_nan(a: f32, b: f32, otherwise: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { otherwise }
}

#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

/// A product and sum in double precision: exact for 16-bit floats, up to the final rounding.
#[inline(always)]
fn fused(a: f32, b: f32, c: f32) -> f64 {
    f64::from(a) * f64::from(b) + f64::from(c)
}

fn bf16(x: f64) -> f32 {
    math::bf16_to_f32(math::f64_to_bf16(x))
}

fn f16(x: f64) -> f32 {
    math::f16_to_f32(math::f64_to_f16(x))
}

impl Builder<'_, '_> {
    pub(super) fn float(&mut self) -> Parsed<()> {
        self.class(Class::Float);
        match self.parts[0] {
            "div" | "sqrt" | "rsqrt" | "rcp" | "ex2" | "lg2" | "sin" | "cos" | "tanh" => self.special(),
            _ => {
                let flush = self.take("ftz");
                let ty = self.ty()?;
                // The default rounding; others are refused as unknown modifiers.
                self.take("rn");
                match ty {
                    F32 => self.single(flush),
                    F64 => self.double(),
                    _ => self.half(ty),
                }
            }
        }
    }

    fn single(&mut self, flush: bool) -> Parsed<()> {
        let nan = self.take("NaN");
        match (self.parts[0], nan) {
            ("add", false) => single!(self, flush, map2, |a, b| a + b),
            ("sub", false) => single!(self, flush, map2, |a, b| a - b),
            ("mul", false) => single!(self, flush, map2, |a, b| a * b),
            ("fma" | "mad", false) => single!(self, flush, map3, |a, b, c| a.mul_add(b, c)),
            ("min", false) => single!(self, flush, map2, |a, b| minimum(a, b)),
            ("max", false) => single!(self, flush, map2, |a, b| maximum(a, b)),
            ("min", true) => single!(self, flush, map2, |a, b| or_nan(a, b, minimum(a, b))),
            ("max", true) => single!(self, flush, map2, |a, b| or_nan(a, b, maximum(a, b))),
            ("neg", false) => single!(self, flush, map1, |a| f32::from_bits(a.to_bits() ^ 1 << 31)),
            ("abs", false) => single!(self, flush, map1, |a| f32::from_bits(a.to_bits() & !(1 << 31))),
            ("copysign", false) => self.map2(|a: f32, b: f32| b.copysign(a)),
            _ => self.unknown(),
        }
    }

    fn double(&mut self) -> Parsed<()> {
        match self.parts[0] {
            "add" => self.map2(|a: f64, b: f64| a + b),
            "sub" => self.map2(|a: f64, b: f64| a - b),
            "mul" => self.map2(|a: f64, b: f64| a * b),
            "fma" | "mad" => self.map3(|a: f64, b: f64, c: f64| a.mul_add(b, c)),
            "min" => self.map2(|a: f64, b: f64| a.min(b)),
            "max" => self.map2(|a: f64, b: f64| a.max(b)),
            "neg" => self.map1(|a: f64| -a),
            "abs" => self.map1(|a: f64| a.abs()),
            "copysign" => self.map2(|a: f64, b: f64| b.copysign(a)),
            _ => self.unknown(),
        }
    }

    fn half(&mut self, ty: Type) -> Parsed<()> {
        let (rectify, nan) = (self.take("relu"), self.take("NaN"));
        match (self.parts[0], rectify, nan) {
            ("add", false, false) => halves!(self, ty, map2, |a, b| a + b),
            ("sub", false, false) => halves!(self, ty, map2, |a, b| a - b),
            ("mul", false, false) => halves!(self, ty, map2, |a, b| a * b),
            ("min", false, false) => halves!(self, ty, map2, |a, b| minimum(a, b)),
            ("max", false, false) => halves!(self, ty, map2, |a, b| maximum(a, b)),
            ("min", false, true) => halves!(self, ty, map2, |a, b| or_nan(a, b, minimum(a, b))),
            ("max", false, true) => halves!(self, ty, map2, |a, b| or_nan(a, b, maximum(a, b))),
            ("neg", false, false) => match ty.bytes() {
                2 => self.map1(|a: u16| a ^ 0x8000),
                _ => self.map1(|a: u32| a ^ 0x8000_8000),
            },
            ("abs", false, false) => match ty.bytes() {
                2 => self.map1(|a: u16| a & 0x7fff),
                _ => self.map1(|a: u32| a & 0x7fff_7fff),
            },
            ("fma", rectify, false) => self.fused_half(ty, rectify),
            _ => self.unknown(),
        }
    }

    fn fused_half(&mut self, ty: Type, rectify: bool) -> Parsed<()> {
        match (ty, rectify) {
            (Bf16, false) => self.map3(|a: Brain, b: Brain, c: Brain| Brain(bf16(fused(a.0, b.0, c.0)))),
            (F16, false) => self.map3(|a: Half, b: Half, c: Half| Half(f16(fused(a.0, b.0, c.0)))),
            (Bf16x2, false) => self.map3(|a: BrainPair, b: BrainPair, c: BrainPair| {
                BrainPair(bf16(fused(a.0, b.0, c.0)), bf16(fused(a.1, b.1, c.1)))
            }),
            (F16x2, false) => self.map3(|a: HalfPair, b: HalfPair, c: HalfPair| {
                HalfPair(f16(fused(a.0, b.0, c.0)), f16(fused(a.1, b.1, c.1)))
            }),
            (Bf16x2, true) => self.map3(|a: BrainPair, b: BrainPair, c: BrainPair| {
                BrainPair(relu(bf16(fused(a.0, b.0, c.0))), relu(bf16(fused(a.1, b.1, c.1))))
            }),
            (F16x2, true) => self.map3(|a: HalfPair, b: HalfPair, c: HalfPair| {
                HalfPair(relu(f16(fused(a.0, b.0, c.0))), relu(f16(fused(a.1, b.1, c.1))))
            }),
            _ => self.unknown(),
        }
    }

    /// Division, roots and the functions of the special-function unit.
    fn special(&mut self) -> Parsed<()> {
        self.class(Class::Special);
        let flush = self.take("ftz");
        let approximate = self.take("approx") || self.take("full");
        let rounded = self.take("rn");
        let ty = self.ty()?;
        if approximate == rounded {
            return self.unknown();
        }
        match (self.parts[0], ty) {
            ("div", F32) => single!(self, flush, map2, |a, b| a / b),
            ("div", F64) if rounded => self.map2(|a: f64, b: f64| a / b),
            ("sqrt", F32) => single!(self, flush, map1, |a| a.sqrt()),
            ("sqrt", F64) if rounded => self.map1(|a: f64| a.sqrt()),
            ("rcp", F32) => single!(self, flush, map1, |a| 1.0 / a),
            ("rcp", F64) if rounded => self.map1(|a: f64| 1.0 / a),
            ("rsqrt", F32) if approximate => single!(self, flush, map1, |a| 1.0 / a.sqrt()),
            ("rsqrt", F64) if approximate => self.map1(|a: f64| 1.0 / a.sqrt()),
            ("ex2", F32) if approximate => single!(self, flush, map1, |a| math::ex2(a)),
            ("lg2", F32) if approximate => single!(self, flush, map1, |a| math::lg2(a)),
            ("sin", F32) if approximate => single!(self, flush, map1, |a| a.sin()),
            ("cos", F32) if approximate => single!(self, flush, map1, |a| a.cos()),
            ("tanh", F32) if approximate => self.map1(|a: f32| a.tanh()),
            ("ex2", F16 | F16x2 | Bf16 | Bf16x2) if approximate => halves!(self, ty, map1, |a| math::ex2(a)),
            ("tanh", F16 | F16x2 | Bf16 | Bf16x2) if approximate => halves!(self, ty, map1, |a| a.tanh()),
            _ => self.unknown(),
        }
    }
}
