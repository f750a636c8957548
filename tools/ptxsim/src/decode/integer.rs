//! Integer arithmetic, logic, shifts, bit fields, comparisons and moves.
#![allow(clippy::neg_cmp_op_on_partial_ord, clippy::double_comparisons)] // the forms differ for NaN

use super::builder::Builder;
use crate::allocate::Place;
use crate::counters::Class;
use crate::exec::arithmetic::{CalledCompare, Compare, Join, Logic, Select, Split};
use crate::exec::lane::{Flushed, Lane};
use crate::syntax::Parsed;
use crate::syntax::ast::{Operand, Type};

use Type::*;

/// Division as the hardware has it: by zero gives all ones.
fn divide_u32(a: u32, b: u32) -> u32 {
    a.checked_div(b).unwrap_or(u32::MAX)
}

fn divide_s32(a: i32, b: i32) -> i32 {
    if b == 0 { -1 } else { a.wrapping_div(b) }
}

fn divide_u64(a: u64, b: u64) -> u64 {
    a.checked_div(b).unwrap_or(u64::MAX)
}

fn divide_s64(a: i64, b: i64) -> i64 {
    if b == 0 { -1 } else { a.wrapping_div(b) }
}

/// `2^n - 1` with `n` up to 32.
fn ones32(n: u32) -> u32 {
    if n >= 32 { u32::MAX } else { (1 << n) - 1 }
}

fn ones64(n: u32) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

fn extract_u32(a: u32, position: u32, length: u32) -> u32 {
    a.checked_shr(position & 255).unwrap_or(0) & ones32(length & 255)
}

fn extract_s32(a: i32, position: u32, length: u32) -> i32 {
    let (position, length) = (position & 255, length & 255);
    if length == 0 {
        return 0;
    }
    let shifted = a >> position.min(31);
    if length >= 32 { shifted } else { shifted << (32 - length) >> (32 - length) }
}

fn extract_u64(a: u64, position: u32, length: u32) -> u64 {
    a.checked_shr(position & 255).unwrap_or(0) & ones64(length & 255)
}

fn insert32(a: u32, b: u32, position: u32, length: u32) -> u32 {
    let position = position & 255;
    let mask = ones32(length & 255).checked_shl(position).unwrap_or(0);
    b & !mask | a.checked_shl(position).unwrap_or(0) & mask
}

fn insert64(a: u64, b: u64, position: u32, length: u32) -> u64 {
    let position = position & 255;
    let mask = ones64(length & 255).checked_shl(position).unwrap_or(0);
    b & !mask | a.checked_shl(position).unwrap_or(0) & mask
}

/// The result bit for each of the eight combinations of `a`, `b`, `c` is a bit of the table.
fn lop3(a: u32, b: u32, c: u32, table: i64) -> u32 {
    let mut out = 0;
    for n in 0..8 {
        if table >> n & 1 != 0 {
            let pick = |x: u32, bit: i32| if n & bit != 0 { x } else { !x };
            out |= pick(a, 4) & pick(b, 2) & pick(c, 1);
        }
    }
    out
}

/// Four bytes of eight, chosen by nibbles; the high bit of a nibble spreads the sign.
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = u64::from(b) << 32 | u64::from(a);
    let mut out = 0;
    for n in 0..4 {
        let nibble = selector >> (4 * n) & 15;
        let byte = (bytes >> (8 * (nibble & 7))) as u8;
        let value = if nibble & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte };
        out |= u32::from(value) << (8 * n);
    }
    out
}

/// The position of the highest bit that differs from the sign, or all ones.
fn find_u32(a: u32) -> u32 {
    31u32.wrapping_sub(a.leading_zeros())
}

fn find_s32(a: i32) -> u32 {
    find_u32(if a < 0 { !a as u32 } else { a as u32 })
}

/// Dispatches on a two-width bit operation.
macro_rules! by_width {
    ($b:expr, $ty:expr, $map:ident, |$($p:ident),+| $e:expr) => {
        match $ty.bytes() {
            2 => $b.$map(|$($p: u16),+| -> u16 { $e }),
            4 => $b.$map(|$($p: u32),+| -> u32 { $e }),
            8 => $b.$map(|$($p: u64),+| -> u64 { $e }),
            _ => $b.unknown(),
        }
    };
}

/// Dispatches on the type of an integer operation.
macro_rules! by_type {
    ($b:expr, $ty:expr, $map:ident, |$($p:ident),+| $e:expr) => {
        match $ty {
            U16 => $b.$map(|$($p: u16),+| -> u16 { $e }),
            S16 => $b.$map(|$($p: i16),+| -> i16 { $e }),
            U32 => $b.$map(|$($p: u32),+| -> u32 { $e }),
            S32 => $b.$map(|$($p: i32),+| -> i32 { $e }),
            U64 => $b.$map(|$($p: u64),+| -> u64 { $e }),
            S64 => $b.$map(|$($p: i64),+| -> i64 { $e }),
            _ => $b.unknown(),
        }
    };
}

/// Dispatches on the relation of a comparison.
macro_rules! relations {
    ($b:expr, $compare:ident, $relation:expr, $lane:ty, |$x:ident| $value:expr) => {{
        match $relation {
            "eq" => compare!($b, $compare, $lane, |$x| $value, ==),
            "ne" => compare!($b, $compare, $lane, |$x| $value, !=),
            "lt" | "lo" => compare!($b, $compare, $lane, |$x| $value, <),
            "le" | "ls" => compare!($b, $compare, $lane, |$x| $value, <=),
            "gt" | "hi" => compare!($b, $compare, $lane, |$x| $value, >),
            "ge" | "hs" => compare!($b, $compare, $lane, |$x| $value, >=),
            _ => $b.unknown(),
        }
    }};
}

macro_rules! compare {
    ($b:expr, $compare:ident, $lane:ty, |$x:ident| $value:expr, $op:tt) => {
        $b.$compare(|p: $lane, q: $lane| {
            let (p, q) = ({ let $x = p; $value }, { let $x = q; $value });
            p $op q
        })
    };
}

/// Relations of floats: plain ones are false for NaN but `ne`, which is so too; those with `u` are true for NaN.
macro_rules! float_relations {
    ($b:expr, $compare:ident, $relation:expr, $lane:ty, |$x:ident| $value:expr) => {{
        macro_rules! with {
            (|$p:ident, $q:ident| $e:expr) => {
                $b.$compare(|p: $lane, q: $lane| {
                    let ($p, $q) = (
                        {
                            let $x = p;
                            $value
                        },
                        {
                            let $x = q;
                            $value
                        },
                    );
                    $e
                })
            };
        }
        match $relation {
            "eq" => with!(|p, q| p == q),
            "ne" => with!(|p, q| p < q || p > q),
            "lt" => with!(|p, q| p < q),
            "le" => with!(|p, q| p <= q),
            "gt" => with!(|p, q| p > q),
            "ge" => with!(|p, q| p >= q),
            "equ" => with!(|p, q| !(p < q || p > q)),
            "neu" => with!(|p, q| p != q),
            "ltu" => with!(|p, q| !(p >= q)),
            "leu" => with!(|p, q| !(p > q)),
            "gtu" => with!(|p, q| !(p <= q)),
            "geu" => with!(|p, q| !(p < q)),
            "num" => with!(|p, q| !p.is_nan() && !q.is_nan()),
            "nan" => with!(|p, q| p.is_nan() || q.is_nan()),
            _ => $b.unknown(),
        }
    }};
}

const RELATIONS: [&str; 18] = [
    "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu",
    "num", "nan",
];

impl Builder<'_, '_> {
    pub(super) fn integer(&mut self) -> Parsed<()> {
        match self.parts[0] {
            "and" | "or" | "xor" | "not" => self.logic(),
            "shl" | "shr" | "shf" => self.shift(),
            "mul" | "mad" | "mul24" | "mad24" => self.multiply(),
            "bfe" | "bfi" | "popc" | "clz" | "brev" | "bfind" | "lop3" | "prmt" => self.bits(),
            _ => self.simple_integer(),
        }
    }

    fn simple_integer(&mut self) -> Parsed<()> {
        let ty = self.ty()?;
        match self.parts[0] {
            "add" => by_type!(self, ty, map2, |a, b| a.wrapping_add(b)),
            "sub" => by_type!(self, ty, map2, |a, b| a.wrapping_sub(b)),
            "min" => by_type!(self, ty, map2, |a, b| a.min(b)),
            "max" => by_type!(self, ty, map2, |a, b| a.max(b)),
            "neg" => by_type!(self, ty, map1, |a| a.wrapping_neg()),
            "abs" => match ty {
                S16 => self.map1(|a: i16| a.wrapping_abs()),
                S32 => self.map1(|a: i32| a.wrapping_abs()),
                S64 => self.map1(|a: i64| a.wrapping_abs()),
                _ => self.unknown(),
            },
            "div" => match ty {
                U16 => self.map2(|a: u16, b: u16| a.checked_div(b).unwrap_or(u16::MAX)),
                S16 => self.map2(|a: i16, b: i16| if b == 0 { -1 } else { a.wrapping_div(b) }),
                U32 => self.map2(divide_u32),
                S32 => self.map2(divide_s32),
                U64 => self.map2(divide_u64),
                S64 => self.map2(divide_s64),
                _ => self.unknown(),
            },
            "rem" => match ty {
                U16 => self.map2(|a: u16, b: u16| a.checked_rem(b).unwrap_or(a)),
                S16 => self.map2(|a: i16, b: i16| if b == 0 { a } else { a.wrapping_rem(b) }),
                U32 => self.map2(|a: u32, b: u32| a.checked_rem(b).unwrap_or(a)),
                S32 => self.map2(|a: i32, b: i32| if b == 0 { a } else { a.wrapping_rem(b) }),
                U64 => self.map2(|a: u64, b: u64| a.checked_rem(b).unwrap_or(a)),
                S64 => self.map2(|a: i64, b: i64| if b == 0 { a } else { a.wrapping_rem(b) }),
                _ => self.unknown(),
            },
            "sad" => match ty {
                U32 => self.map3(|a: u32, b: u32, c: u32| c.wrapping_add(a.abs_diff(b))),
                S32 => self.map3(|a: i32, b: i32, c: u32| c.wrapping_add(a.abs_diff(b))),
                _ => self.unknown(),
            },
            "cnot" => by_width!(self, ty, map1, |a| (a == 0).into()),
            _ => self.unknown(),
        }
    }

    fn multiply(&mut self) -> Parsed<()> {
        let ty = self.ty()?;
        let add = self.parts[0].starts_with("mad");
        if self.parts[0].ends_with("24") {
            self.need("lo")?;
            return match (ty, add) {
                (U32, false) => self.map2(|a: u32, b: u32| (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff)),
                (S32, false) => self.map2(|a: i32, b: i32| (a << 8 >> 8).wrapping_mul(b << 8 >> 8)),
                _ => self.unknown(),
            };
        }
        if self.take("wide") {
            return match (ty, add) {
                (U16, false) => self.map2(|a: u16, b: u16| u32::from(a) * u32::from(b)),
                (S16, false) => self.map2(|a: i16, b: i16| i32::from(a) * i32::from(b)),
                (U32, false) => self.map2(|a: u32, b: u32| u64::from(a) * u64::from(b)),
                (S32, false) => self.map2(|a: i32, b: i32| i64::from(a) * i64::from(b)),
                (U16, true) => {
                    self.map3(|a: u16, b: u16, c: u32| (u32::from(a) * u32::from(b)).wrapping_add(c))
                }
                (S16, true) => {
                    self.map3(|a: i16, b: i16, c: i32| (i32::from(a) * i32::from(b)).wrapping_add(c))
                }
                (U32, true) => {
                    self.map3(|a: u32, b: u32, c: u64| (u64::from(a) * u64::from(b)).wrapping_add(c))
                }
                (S32, true) => {
                    self.map3(|a: i32, b: i32, c: i64| (i64::from(a) * i64::from(b)).wrapping_add(c))
                }
                _ => self.unknown(),
            };
        }
        if self.take("hi") {
            return match (ty, add) {
                (U16, false) => self.map2(|a: u16, b: u16| ((u32::from(a) * u32::from(b)) >> 16) as u16),
                (U32, false) => self.map2(|a: u32, b: u32| ((u64::from(a) * u64::from(b)) >> 32) as u32),
                (S32, false) => self.map2(|a: i32, b: i32| ((i64::from(a) * i64::from(b)) >> 32) as i32),
                (U64, false) => self.map2(|a: u64, b: u64| ((u128::from(a) * u128::from(b)) >> 64) as u64),
                (S64, false) => self.map2(|a: i64, b: i64| ((i128::from(a) * i128::from(b)) >> 64) as i64),
                (U32, true) => self.map3(|a: u32, b: u32, c: u32| {
                    (((u64::from(a) * u64::from(b)) >> 32) as u32).wrapping_add(c)
                }),
                (S32, true) => self.map3(|a: i32, b: i32, c: i32| {
                    (((i64::from(a) * i64::from(b)) >> 32) as i32).wrapping_add(c)
                }),
                _ => self.unknown(),
            };
        }
        self.need("lo")?;
        if add {
            by_type!(self, ty, map3, |a, b, c| a.wrapping_mul(b).wrapping_add(c))
        } else {
            by_type!(self, ty, map2, |a, b| a.wrapping_mul(b))
        }
    }

    fn logic(&mut self) -> Parsed<()> {
        let ty = self.ty()?;
        if ty == Pred {
            return match self.parts[0] {
                "and" => self.predicate_logic(|a, b| a & b),
                "or" => self.predicate_logic(|a, b| a | b),
                "xor" => self.predicate_logic(|a, b| a ^ b),
                _ => self.predicate_logic(|a, _| !a),
            };
        }
        match self.parts[0] {
            "and" => by_width!(self, ty, map2, |a, b| a & b),
            "or" => by_width!(self, ty, map2, |a, b| a | b),
            "xor" => by_width!(self, ty, map2, |a, b| a ^ b),
            _ => by_width!(self, ty, map1, |a| !a),
        }
    }

    fn predicate_logic<F: Fn(u32, u32) -> u32 + Copy>(&mut self, _: F) -> Parsed<()> {
        let (d, _) = self.predicate(self.operand(0)?)?;
        let (a, negate_a) = self.predicate(self.operand(1)?)?;
        let (b, negate_b) =
            if self.operands() > 2 { self.predicate(self.operand(2)?)? } else { (a, negate_a) };
        (self.inst.d, self.inst.a, self.inst.b) = (d, a, b);
        self.inst.mode = u8::from(negate_a) | u8::from(negate_b) << 1;
        self.run::<Logic<F>>()
    }

    /// `mov.pred p, -1`
    fn set_predicate(&mut self, value: bool) -> Parsed<()> {
        let (p, _) = self.predicate(self.operand(0)?)?;
        (self.inst.d, self.inst.a, self.inst.b) = (p, p, p);
        if value { self.logic_of(|_, _| u32::MAX) } else { self.logic_of(|_, _| 0) }
    }

    fn logic_of<F: Fn(u32, u32) -> u32 + Copy>(&mut self, _: F) -> Parsed<()> {
        self.run::<Logic<F>>()
    }

    fn shift(&mut self) -> Parsed<()> {
        let (left, right) = (self.take("l"), self.take("r"));
        let (clamp, _) = (self.take("clamp"), self.take("wrap"));
        let ty = self.ty()?;
        match (self.parts[0], ty) {
            ("shl", B16) => self.map2(|a: u16, b: u32| a.checked_shl(b).unwrap_or(0)),
            ("shl", B32) => self.map2(|a: u32, b: u32| if b > 31 { 0 } else { a << b }),
            ("shl", B64) => self.map2(|a: u64, b: u32| if b > 63 { 0 } else { a << b }),
            ("shr", B16 | U16) => self.map2(|a: u16, b: u32| a.checked_shr(b).unwrap_or(0)),
            ("shr", B32 | U32) => self.map2(|a: u32, b: u32| if b > 31 { 0 } else { a >> b }),
            ("shr", B64 | U64) => self.map2(|a: u64, b: u32| if b > 63 { 0 } else { a >> b }),
            ("shr", S16) => self.map2(|a: i16, b: u32| a >> b.min(15)),
            ("shr", S32) => self.map2(|a: i32, b: u32| a >> b.min(31)),
            ("shr", S64) => self.map2(|a: i64, b: u32| a >> b.min(63)),
            ("shf", B32) => match (left, right, clamp) {
                (true, false, false) => self.map3(|a: u32, b: u32, c: u32| {
                    ((u64::from(b) << 32 | u64::from(a)) << (c & 31) >> 32) as u32
                }),
                (true, false, true) => self.map3(|a: u32, b: u32, c: u32| {
                    ((u64::from(b) << 32 | u64::from(a)) << c.min(32) >> 32) as u32
                }),
                (false, true, false) => self
                    .map3(|a: u32, b: u32, c: u32| ((u64::from(b) << 32 | u64::from(a)) >> (c & 31)) as u32),
                (false, true, true) => self
                    .map3(|a: u32, b: u32, c: u32| ((u64::from(b) << 32 | u64::from(a)) >> c.min(32)) as u32),
                _ => self.unknown(),
            },
            _ => self.unknown(),
        }
    }

    fn bits(&mut self) -> Parsed<()> {
        let shift_amount = self.take("shiftamt");
        let ty = self.ty()?;
        match (self.parts[0], ty) {
            ("bfe", U32) => self.map3(extract_u32),
            ("bfe", S32) => self.map3(extract_s32),
            ("bfe", U64) => self.map3(extract_u64),
            ("bfi", B32) => self.map4(insert32),
            ("bfi", B64) => self.map4(insert64),
            ("popc", B32) => self.map1(|a: u32| a.count_ones()),
            ("popc", B64) => self.map1(|a: u64| a.count_ones()),
            ("clz", B32) => self.map1(|a: u32| a.leading_zeros()),
            ("clz", B64) => self.map1(|a: u64| a.leading_zeros()),
            ("brev", B32) => self.map1(|a: u32| a.reverse_bits()),
            ("brev", B64) => self.map1(|a: u64| a.reverse_bits()),
            ("bfind", U32) if !shift_amount => self.map1(find_u32),
            ("bfind", S32) if !shift_amount => self.map1(find_s32),
            ("bfind", U32) => self.map1(|a: u32| if a == 0 { u32::MAX } else { a.leading_zeros() }),
            ("lop3", B32) => self.map3_imm(lop3),
            ("prmt", B32) => self.map3(permute),
            _ => self.unknown(),
        }
    }

    pub(super) fn comparison(&mut self) -> Parsed<()> {
        match self.parts[0] {
            "setp" => self.setp(),
            "selp" => self.selp(),
            "slct" => {
                let by = self.ty()?;
                match (self.ty()?, by) {
                    (B32 | U32 | S32 | F32, S32) => {
                        self.map3(|a: u32, b: u32, c: i32| if c >= 0 { a } else { b })
                    }
                    (B32 | U32 | S32 | F32, F32) => {
                        self.map3(|a: u32, b: u32, c: f32| if c >= 0.0 { a } else { b })
                    }
                    _ => self.unknown(),
                }
            }
            _ => self.unknown(),
        }
    }

    fn setp(&mut self) -> Parsed<()> {
        let Some(relation) = RELATIONS.into_iter().find(|r| self.take(r)) else { return self.unknown() };
        let join = self.take_any(&[("and", Join::And), ("or", Join::Or), ("xor", Join::Xor)]);
        let flush = self.take("ftz");
        let join = join.unwrap_or(Join::None);
        if join != Join::None {
            let (p, negated) = self.predicate(self.operand(3)?)?;
            self.inst.c = p;
            self.inst.mode = join.encode(negated);
        }
        match self.ty()? {
            B16 | U16 => relations!(self, called_compare, relation, u16, |x| x),
            S16 => relations!(self, called_compare, relation, i16, |x| x),
            B32 | U32 => relations!(self, compare, relation, u32, |x| x),
            S32 => relations!(self, compare, relation, i32, |x| x),
            B64 | U64 => relations!(self, compare, relation, u64, |x| x),
            S64 => relations!(self, compare, relation, i64, |x| x),
            F32 if flush => float_relations!(self, compare, relation, Flushed, |x| x.0),
            F32 => float_relations!(self, compare, relation, f32, |x| x),
            F64 => float_relations!(self, called_compare, relation, f64, |x| x),
            F16 => float_relations!(self, called_compare, relation, crate::exec::lane::F16, |x| x.0),
            Bf16 => float_relations!(self, called_compare, relation, crate::exec::lane::Bf16, |x| x.0),
            _ => self.unknown(),
        }
    }

    fn compare<A: Lane, F: Fn(A, A) -> bool + Copy>(&mut self, _: F) -> Parsed<()> {
        self.compared::<A>()?;
        self.run::<Compare<A, F>>()
    }

    fn called_compare<A: Lane, F: Fn(A, A) -> bool + Copy>(&mut self, f: F) -> Parsed<()> {
        self.compared::<A>()?;
        self.inst.imm = CalledCompare::<A>::pointer(f);
        if A::WIDE { self.run::<CalledCompare<u64>>() } else { self.run::<CalledCompare<u32>>() }
    }

    /// The operands of a comparison.
    fn compared<A: Lane>(&mut self) -> Parsed<()> {
        if let Operand::Pair(first, second) = self.operand(0)? {
            self.inst.d = self.predicate(first)?.0;
            self.inst.list = self.predicate(second)?.0;
            self.inst.count = 2;
        } else {
            self.inst.d = self.predicate(self.operand(0)?)?.0;
        }
        self.inst.a = self.source::<A>(Place::A, 1)?;
        self.inst.b = self.source::<A>(Place::B, 2)?;
        Ok(())
    }

    fn selp(&mut self) -> Parsed<()> {
        let ty = self.ty()?;
        self.expect_operands(4)?;
        let (p, negated) = self.predicate(self.operand(3)?)?;
        self.inst.c = p;
        self.inst.mode = negated.into();
        if ty.bytes() == 8 { self.select::<u64>() } else { self.select::<u32>() }
    }

    fn select<T: Lane>(&mut self) -> Parsed<()> {
        self.inst.a = self.source::<T>(Place::A, 1)?;
        self.inst.b = self.source::<T>(Place::B, 2)?;
        self.destination::<T>(0)?;
        self.run::<Select<T>>()
    }

    pub(super) fn mov(&mut self) -> Parsed<()> {
        let ty = self.ty()?;
        match (self.operand(0)?, self.operand(1)?) {
            (_, Operand::Symbol(name)) if name == "%clock" => self.clock(|serial: u32| serial),
            (_, Operand::Symbol(name)) if name == "%clock64" || name == "%globaltimer" => {
                self.clock(u64::from)
            }
            (Operand::Vector(halves), _) => self.unpack(ty, halves),
            (_, Operand::Vector(halves)) => self.pack(ty, halves),
            (_, Operand::Integer(v)) if ty == Pred => self.set_predicate(*v != 0),
            _ if ty == Pred => self.predicate_logic(|a, _| a),
            _ => by_width!(self, ty, map1, |a| a),
        }
    }

    /// `mov.b32 {a, b}, c`
    fn unpack(&mut self, ty: Type, halves: &[Operand]) -> Parsed<()> {
        let [low, high] = halves else { return self.wrong("two halves are supported") };
        let (low, high) = (self.destination_of(low, false, false)?, self.destination_of(high, false, false)?);
        self.inst.d = self.using(Place::D, low, true);
        self.inst.b = self.using(Place::B, high, true);
        match ty.bytes() {
            8 => {
                self.inst.a = self.source::<u64>(Place::A, 1)?;
                self.split(|a: u64| (a as u32, (a >> 32) as u32))
            }
            4 => {
                self.inst.a = self.source::<u32>(Place::A, 1)?;
                self.split(|a: u32| (a as u16, (a >> 16) as u16))
            }
            _ => self.unknown(),
        }
    }

    fn split<A: Lane, R: Lane, F: Fn(A) -> (R, R) + Copy>(&mut self, _: F) -> Parsed<()> {
        self.run::<Split<A, R, F>>()
    }

    /// `mov.b32 c, {a, b}`
    fn pack(&mut self, ty: Type, halves: &[Operand]) -> Parsed<()> {
        let [low, high] = halves else { return self.wrong("two halves are supported") };
        let (low, high) = (self.source_of(low, false)?, self.source_of(high, false)?);
        self.inst.a = self.using(Place::A, low, false);
        self.inst.b = self.using(Place::B, high, false);
        match ty.bytes() {
            8 => {
                self.destination::<u64>(0)?;
                self.join_halves(|a: u32, b: u32| u64::from(b) << 32 | u64::from(a))
            }
            4 => {
                self.destination::<u32>(0)?;
                self.join_halves(|a: u16, b: u16| u32::from(b) << 16 | u32::from(a))
            }
            _ => self.unknown(),
        }
    }

    fn join_halves<A: Lane, R: Lane, F: Fn(A, A) -> R + Copy>(&mut self, _: F) -> Parsed<()> {
        self.class(Class::Integer);
        self.run::<crate::exec::arithmetic::Map2<A, A, R, F>>()
    }
}
