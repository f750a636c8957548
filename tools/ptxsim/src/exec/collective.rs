//! Exchanges within a warp: shuffles, votes, matches, reductions.

use super::lane::{LANES, Lane, lanes};
use super::warp::uniform;
use super::{Flow, Inst, Instruction, Machine};
use crate::finding::{FindingKind, Place};
use std::marker::PhantomData;

/// Reports if the member mask names other lanes than those that execute.
#[inline(always)]
pub(crate) fn check_mask(x: &Machine<'_>, mask: u32) {
    if mask & x.warp.live != x.active {
        let first = x.active.trailing_zeros() as usize & 31;
        let why = format!("member mask {mask:#010x}, but lanes {:#010x} execute", x.active);
        x.report(FindingKind::InactiveLane, first, Place::None, why);
    }
}

/// The ways to choose the source lane of `shfl`.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Shuffle {
    Butterfly,
    Down,
    Up,
    Index,
}

/// `shfl.sync`: value `a`, lane `b`, clamp and segment `c`, member mask in the list. A predicate for "in range" in
/// `imm` if `count` is 1.
pub(crate) struct Shfl;

impl Instruction for Shfl {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let mask = uniform::<u32>(x, x.listed(i, 0));
        check_mask(x, mask);
        let r = &x.warp.registers;
        let (a, b, c) = (r.get::<u32>(i.a), r.get::<u32>(i.b), r.get::<u32>(i.c));
        let mut out = [0; LANES];
        let (mut inside, mut wanted) = (0u32, 0u32);
        for l in 0..LANES {
            let (source, valid) = source_lane(i.mode, l as u32, b[l], c[l]);
            out[l] = a[source as usize & 31];
            inside |= u32::from(valid) << l;
            wanted |= if x.active >> l & 1 != 0 { 1 << (source & 31) } else { 0 };
        }
        if wanted & !x.active != 0 {
            let why = format!("reads lanes {:#010x}, which do not take part", wanted & !x.active);
            x.report(FindingKind::InactiveLane, 0, Place::None, why);
        }
        x.warp.registers.put(i.d, out, x.active);
        if i.count == 1 {
            x.warp.registers.put_predicate(i.imm as u32, inside, x.active);
        }
        Flow::Next
    }
}

/// The lane that `lane` reads from, and whether it was in range (otherwise a lane reads itself).
#[inline(always)]
fn source_lane(mode: u8, lane: u32, b: u32, c: u32) -> (u32, bool) {
    let (clamp, segment, offset) = (c & 31, c >> 8 & 31, b & 31);
    let last = lane & segment | clamp & !segment;
    let first = lane & segment;
    let (source, valid) = match mode {
        m if m == Shuffle::Butterfly as u8 => (lane ^ offset, lane ^ offset <= last),
        m if m == Shuffle::Down as u8 => (lane + offset, lane + offset <= last),
        m if m == Shuffle::Up as u8 => {
            (lane.wrapping_sub(offset), lane as i32 - offset as i32 >= last as i32)
        }
        _ => {
            let source = first | offset & !segment;
            (source, source <= last)
        }
    };
    if valid { (source, true) } else { (lane, false) }
}

/// `vote.sync`: `mode` 0 all, 1 any, 2 uni (into predicate `d`), 3 ballot (into row `d`); predicate `a`, negated if
/// `count` is 1; member mask in row `b`.
pub(crate) struct Vote;

impl Instruction for Vote {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let mask = uniform::<u32>(x, i.b);
        check_mask(x, mask);
        let p = x.warp.registers.predicate(i.a);
        let votes = (if i.count == 1 { !p } else { p }) & x.active;
        let all = votes == x.active;
        let answer = match i.mode {
            0 => all,
            1 => votes != 0,
            _ => all || votes == 0,
        };
        if i.mode == 3 {
            x.warp.registers.put(i.d, [votes; LANES], x.active);
        } else {
            x.warp.registers.put_predicate(i.d, if answer { u32::MAX } else { 0 }, x.active);
        }
        Flow::Next
    }
}

/// `activemask`
pub(crate) struct ActiveMask;

impl Instruction for ActiveMask {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        x.warp.registers.put(i.d, [x.active; LANES], x.active);
        Flow::Next
    }
}

/// `match.any.sync` (`mode` 0) and `match.all.sync` (1, with a predicate in `imm` if `count` is 1).
pub(crate) struct Match<T>(PhantomData<T>);

impl<T: Lane<Word: PartialEq>> Instruction for Match<T> {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let mask = uniform::<u32>(x, i.b);
        check_mask(x, mask);
        let words = *x.warp.registers.words::<T>(i.a);
        let mut out = [0; LANES];
        for l in lanes(x.active) {
            out[l] = lanes(x.active).filter(|o| words[*o] == words[l]).fold(0, |m, o| m | 1 << o);
        }
        if i.mode == 1 {
            let all = out[x.active.trailing_zeros() as usize & 31] == x.active;
            out = [if all { x.active } else { 0 }; LANES];
            if i.count == 1 {
                x.warp.registers.put_predicate(i.imm as u32, if all { u32::MAX } else { 0 }, x.active);
            }
        }
        x.warp.registers.put(i.d, out, x.active);
        Flow::Next
    }
}

/// `redux.sync`: the reduction of row `a` over the active lanes, by `mode`.
pub(crate) struct Reduce;

impl Reduce {
    pub(crate) const OPERATIONS: [(&str, &[&str]); 7] = [
        ("add", &["u32", "s32"]),
        ("min", &["u32"]),
        ("max", &["u32"]),
        ("min", &["s32"]),
        ("max", &["s32"]),
        ("and", &["b32"]),
        ("or", &["b32"]),
    ];
    /// Behind the table above.
    pub(crate) const XOR: u8 = 7;
}

impl Instruction for Reduce {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let mask = uniform::<u32>(x, i.b);
        check_mask(x, mask);
        let a = x.warp.registers.get::<u32>(i.a);
        let values = lanes(x.active).map(|l| a[l]);
        let result = values.reduce(|p, q| match i.mode {
            0 => p.wrapping_add(q),
            1 => p.min(q),
            2 => p.max(q),
            3 => (p as i32).min(q as i32) as u32,
            4 => (p as i32).max(q as i32) as u32,
            5 => p & q,
            6 => p | q,
            _ => p ^ q,
        });
        x.warp.registers.put(i.d, [result.unwrap_or(0); LANES], x.active);
        Flow::Next
    }
}

/// `elect.sync d|p, mask`: the lowest lane is chosen; the predicate is in `imm`.
pub(crate) struct Elect;

impl Instruction for Elect {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let mask = uniform::<u32>(x, i.b);
        check_mask(x, mask);
        let leader = x.active.trailing_zeros() & 31;
        x.warp.registers.put(i.d, [leader; LANES], x.active);
        x.warp.registers.put_predicate(i.imm as u32, 1 << leader, x.active);
        Flow::Next
    }
}
