//! `cvt`.

use super::builder::Builder;
use crate::counters::Class;
use crate::exec::lane::{Bf16 as Brain, F16 as Half, Flushed};
use crate::math::{f32_to_bf16, f32_to_f16};
use crate::syntax::Parsed;
use crate::syntax::ast::Type::{self, *};

/// How a float becomes a whole number.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Round {
    Nearest,
    Zero,
    Down,
    Up,
}

/// Dispatches on the rounding of a conversion to an integer (saturating; NaN gives zero for `f32`).
macro_rules! to_integer {
    ($b:expr, $round:expr, $from:ty, $to:ty, |$x:ident| $value:expr) => {
        match $round {
            Round::Nearest => $b.called1(|$x: $from| $value.round_ties_even() as $to),
            Round::Zero => $b.called1(|$x: $from| $value.trunc() as $to),
            Round::Down => $b.called1(|$x: $from| $value.floor() as $to),
            Round::Up => $b.called1(|$x: $from| $value.ceil() as $to),
        }
    };
}

/// Dispatches on the target of a conversion from a float.
macro_rules! float_to_integers {
    ($b:expr, $round:expr, $to:expr, $from:ty, |$x:ident| $value:expr) => {
        match $to {
            U8 => to_integer!($b, $round, $from, u8, |$x| $value),
            S8 => to_integer!($b, $round, $from, i8, |$x| $value),
            U16 => to_integer!($b, $round, $from, u16, |$x| $value),
            S16 => to_integer!($b, $round, $from, i16, |$x| $value),
            U32 => to_integer!($b, $round, $from, u32, |$x| $value),
            S32 => to_integer!($b, $round, $from, i32, |$x| $value),
            U64 => to_integer!($b, $round, $from, u64, |$x| $value),
            S64 => to_integer!($b, $round, $from, i64, |$x| $value),
            _ => $b.unknown(),
        }
    };
}

/// Dispatches on the target of a conversion between integers; narrow targets fill a word by their sign.
macro_rules! integer_to {
    ($b:expr, $map:ident, $to:expr, $from:ty) => {
        match $to {
            U8 => $b.$map(|x: $from| u32::from(x as u8)),
            S8 => $b.$map(|x: $from| i32::from(x as i8)),
            U16 | B16 => $b.$map(|x: $from| u32::from(x as u16)),
            S16 => $b.$map(|x: $from| i32::from(x as i16)),
            U32 | B32 => $b.$map(|x: $from| x as u32),
            S32 => $b.$map(|x: $from| x as i32),
            U64 | B64 => $b.$map(|x: $from| x as u64),
            S64 => $b.$map(|x: $from| x as i64),
            F32 => $b.$map(|x: $from| x as f32),
            F64 => $b.$map(|x: $from| x as f64),
            F16 => $b.$map(|x: $from| Half(x as f32)),
            Bf16 => $b.$map(|x: $from| Brain(x as f32)),
            _ => $b.unknown(),
        }
    };
}

/// Saturating conversion between integers.
macro_rules! clamp_to {
    ($b:expr, $to:expr, $from:ty) => {
        match $to {
            U8 => $b.called1(|x: $from| x.clamp(0 as $from, 255 as $from) as u32),
            S8 => $b.called1(|x: $from| (x as i64).clamp(-128, 127) as i32),
            U16 => $b.called1(|x: $from| (x as i64).clamp(0, 65535) as u32),
            S16 => $b.called1(|x: $from| (x as i64).clamp(-32768, 32767) as i32),
            U32 => $b.called1(|x: $from| (x as i64).clamp(0, u32::MAX.into()) as u32),
            S32 => $b.called1(|x: $from| (x as i64).clamp(i32::MIN.into(), i32::MAX.into()) as i32),
            _ => $b.unknown(),
        }
    };
}

fn saturate(x: f32) -> f32 {
    if x > 0.0 { x.min(1.0) } else { 0.0 }
}

/// `tf32` rounded to nearest, ties away from zero.
fn to_tf32(x: f32) -> u32 {
    if x.is_nan() { 0x7fff_ffff } else { x.to_bits().wrapping_add(0x1000) & 0xffff_e000 }
}

/// The larger of zero and a number.
fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

impl Builder<'_, '_> {
    pub(super) fn cvt(&mut self) -> Parsed<()> {
        let flush = self.take("ftz");
        let saturating = self.take("sat");
        let rectify = self.take("relu");
        let whole = self.take_any(&[
            ("rni", Round::Nearest),
            ("rzi", Round::Zero),
            ("rmi", Round::Down),
            ("rpi", Round::Up),
        ]);
        if self.take("tf32") {
            return self.cvt_tf32();
        }
        let from = self.ty()?;
        let to = self.ty()?;
        if whole.is_none() && (is_float(from) || is_float(to)) {
            self.class(Class::Float);
            return self.cvt_float(to, from, flush, saturating, rectify);
        }
        if let Some(round) = whole {
            self.class(Class::Float);
            return self.cvt_whole(to, from, round, flush);
        }
        if rectify || flush {
            return self.unknown();
        }
        if saturating {
            return match from {
                U16 => clamp_to!(self, to, u16),
                S16 => clamp_to!(self, to, i32),
                U32 => clamp_to!(self, to, u32),
                S32 => clamp_to!(self, to, i32),
                S64 => clamp_to!(self, to, i64),
                _ => self.unknown(),
            };
        }
        self.cvt_integer(to, from)
    }

    fn cvt_integer(&mut self, to: Type, from: Type) -> Parsed<()> {
        match from {
            U8 | B8 => integer_to!(self, called1, to, u8),
            S8 => integer_to!(self, called1, to, i8),
            U16 | B16 => integer_to!(self, called1, to, u16),
            S16 => integer_to!(self, called1, to, i16),
            U32 | B32 => integer_to!(self, map1, to, u32),
            S32 => integer_to!(self, map1, to, i32),
            U64 | B64 => integer_to!(self, map1, to, u64),
            S64 => integer_to!(self, map1, to, i64),
            _ => self.unknown(),
        }
    }

    /// To a whole number, as an integer or as a float.
    fn cvt_whole(&mut self, to: Type, from: Type, round: Round, flush: bool) -> Parsed<()> {
        match (to, from) {
            (F32, F32) => match round {
                Round::Nearest => self.map1(|x: f32| x.round_ties_even()),
                Round::Zero => self.map1(|x: f32| x.trunc()),
                Round::Down => self.map1(|x: f32| x.floor()),
                Round::Up => self.map1(|x: f32| x.ceil()),
            },
            (F64, F64) => match round {
                Round::Nearest => self.map1(|x: f64| x.round_ties_even()),
                Round::Zero => self.map1(|x: f64| x.trunc()),
                Round::Down => self.map1(|x: f64| x.floor()),
                Round::Up => self.map1(|x: f64| x.ceil()),
            },
            (_, F32) if flush => float_to_integers!(self, round, to, Flushed, |x| x.0),
            (_, F32) => float_to_integers!(self, round, to, f32, |x| x),
            (_, F64) => float_to_integers!(self, round, to, f64, |x| x),
            (_, F16) => float_to_integers!(self, round, to, Half, |x| x.0),
            (_, Bf16) => float_to_integers!(self, round, to, Brain, |x| x.0),
            _ => self.unknown(),
        }
    }

    fn cvt_float(&mut self, to: Type, from: Type, flush: bool, sat: bool, rectify: bool) -> Parsed<()> {
        self.take("rn");
        if sat {
            return match (to, from, rectify) {
                (F32, F32, false) if flush => self.map1(|x: Flushed| Flushed(saturate(x.0))),
                (F32, F32, false) => self.map1(saturate),
                _ => self.unknown(),
            };
        }
        match (to, from, rectify) {
            (Bf16x2, F32, _) | (F16x2, F32, _) => self.cvt_pair(to, rectify),
            (Bf16, F32, false) => self.map1(|x: f32| Brain(x)),
            (Bf16, F32, true) => self.map1(|x: f32| Brain(relu(x))),
            (F16, F32, false) => self.map1(|x: f32| Half(x)),
            (F16, F32, true) => self.map1(|x: f32| Half(relu(x))),
            (F32, Bf16, false) => self.map1(|x: Brain| x.0),
            (F32, F16, false) => self.map1(|x: Half| x.0),
            (F32, F32, false) if flush => self.map1(|x: Flushed| x),
            (F32, F32, false) => self.map1(|x: f32| x),
            (F32, F64, false) if flush => self.map1(|x: f64| Flushed(x as f32)),
            (F32, F64, false) => self.map1(|x: f64| x as f32),
            (F64, F32, false) if flush => self.map1(|x: Flushed| f64::from(x.0)),
            (F64, F32, false) => self.map1(|x: f32| f64::from(x)),
            (F64, F16, false) => self.map1(|x: Half| f64::from(x.0)),
            (F64, F64, false) => self.map1(|x: f64| x),
            (_, U8 | S8 | U16 | S16 | U32 | S32 | U64 | S64, false) if to != F16 && to != Bf16 => {
                self.cvt_integer(to, from)
            }
            (F16 | Bf16, U8 | S8 | U16 | S16, false) => self.cvt_integer(to, from),
            _ => self.unknown(),
        }
    }

    /// `cvt.rn.bf16x2.f32 d, a, b`: `a` goes to the high half.
    fn cvt_pair(&mut self, to: Type, rectify: bool) -> Parsed<()> {
        match (to, rectify) {
            (Bf16x2, false) => {
                self.map2(|a: f32, b: f32| u32::from(f32_to_bf16(a)) << 16 | u32::from(f32_to_bf16(b)))
            }
            (Bf16x2, true) => self.map2(|a: f32, b: f32| {
                u32::from(f32_to_bf16(relu(a))) << 16 | u32::from(f32_to_bf16(relu(b)))
            }),
            (_, false) => {
                self.map2(|a: f32, b: f32| u32::from(f32_to_f16(a)) << 16 | u32::from(f32_to_f16(b)))
            }
            (_, true) => self
                .map2(|a: f32, b: f32| u32::from(f32_to_f16(relu(a))) << 16 | u32::from(f32_to_f16(relu(b)))),
        }
    }

    /// `cvt.rna.tf32.f32`
    fn cvt_tf32(&mut self) -> Parsed<()> {
        self.class(Class::Float);
        self.need("rna")?;
        match self.ty()? {
            F32 => self.map1(to_tf32),
            _ => self.unknown(),
        }
    }
}

fn is_float(ty: Type) -> bool {
    matches!(ty, F16 | F16x2 | Bf16 | Bf16x2 | F32 | F64)
}
