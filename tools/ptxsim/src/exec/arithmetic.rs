//! Lane-wise instructions: closures over the values of one lane, applied to all.

use super::lane::{LANES, Lane, lanes};
use super::{Flow, Inst, Instruction, Machine};
use std::marker::PhantomData;

/// A value of a type that has only one.
///
/// The closures of lane-wise instructions capture nothing, so that their type alone tells the decoder's choice to
/// the executor.
#[inline(always)]
fn the<F: Copy>() -> F {
    const { assert!(size_of::<F>() == 0, "the closure of an instruction must capture nothing") };
    // SAFETY: `F` is a closure without captures that the decoder held a value of; it has no bytes to read.
    unsafe { std::ptr::NonNull::<F>::dangling().read() }
}

/// `d = f(a)`
pub(crate) struct Map1<A, R, F>(PhantomData<(A, R, F)>);

impl<A: Lane, R: Lane, F: Fn(A) -> R + Copy> Instruction for Map1<A, R, F> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let a = x.warp.registers.get::<A>(i.a);
        let f = the::<F>();
        let mut out = [f(a[0]); LANES];
        for l in 0..LANES {
            out[l] = f(a[l]);
        }
        x.warp.registers.put(i.d, out, x.active);
        Flow::Next
    }
}

/// `d = f(a)` through a pointer in `imm`, for what kernels seldom do: one small function per form instead of a
/// loop over the lanes for each.
pub(crate) struct Called1<A, R>(PhantomData<(A, R)>);

impl<A: Lane, R: Lane> Called1<A, R> {
    /// The pointer that stands for a closure.
    pub(crate) fn pointer<F: Fn(A) -> R + Copy>(_: F) -> i64 {
        fn call<A: Lane, R: Lane, F: Fn(A) -> R + Copy>(a: A::Word) -> R::Word {
            the::<F>()(A::unpack(a)).pack()
        }
        (call::<A, R, F> as fn(A::Word) -> R::Word as *const ()).expose_provenance() as i64
    }
}

impl<A: Lane, R: Lane> Instruction for Called1<A, R> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        // SAFETY: the decoder put the result of `pointer` for the same words here.
        let f = unsafe {
            std::mem::transmute::<*const (), fn(A::Word) -> R::Word>(std::ptr::with_exposed_provenance(
                i.imm as usize,
            ))
        };
        for l in lanes(x.active) {
            let word = f(x.warp.registers.words::<A>(i.a)[l]);
            x.warp.registers.words_mut::<R>(i.d)[l] = word;
        }
        Flow::Next
    }
}

/// `d = f(a, b)`
pub(crate) struct Map2<A, B, R, F>(PhantomData<(A, B, R, F)>);

impl<A: Lane, B: Lane, R: Lane, F: Fn(A, B) -> R + Copy> Instruction for Map2<A, B, R, F> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let (a, b) = (x.warp.registers.get::<A>(i.a), x.warp.registers.get::<B>(i.b));
        let f = the::<F>();
        let mut out = [f(a[0], b[0]); LANES];
        for l in 0..LANES {
            out[l] = f(a[l], b[l]);
        }
        x.warp.registers.put(i.d, out, x.active);
        Flow::Next
    }
}

/// `d = f(a, b, c)`
pub(crate) struct Map3<A, B, C, R, F>(PhantomData<(A, B, C, R, F)>);

impl<A: Lane, B: Lane, C: Lane, R: Lane, F: Fn(A, B, C) -> R + Copy> Instruction for Map3<A, B, C, R, F> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let r = &x.warp.registers;
        let (a, b, c) = (r.get::<A>(i.a), r.get::<B>(i.b), r.get::<C>(i.c));
        let f = the::<F>();
        let mut out = [f(a[0], b[0], c[0]); LANES];
        for l in 0..LANES {
            out[l] = f(a[l], b[l], c[l]);
        }
        x.warp.registers.put(i.d, out, x.active);
        Flow::Next
    }
}

/// `d = f(a, b, c, imm)`, with a constant of the instruction
pub(crate) struct Map3Imm<A, B, C, R, F>(PhantomData<(A, B, C, R, F)>);

impl<A: Lane, B: Lane, C: Lane, R: Lane, F: Fn(A, B, C, i64) -> R + Copy> Instruction
    for Map3Imm<A, B, C, R, F>
{
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let r = &x.warp.registers;
        let (a, b, c) = (r.get::<A>(i.a), r.get::<B>(i.b), r.get::<C>(i.c));
        let f = the::<F>();
        let mut out = [f(a[0], b[0], c[0], i.imm); LANES];
        for l in 0..LANES {
            out[l] = f(a[l], b[l], c[l], i.imm);
        }
        x.warp.registers.put(i.d, out, x.active);
        Flow::Next
    }
}

/// `d = f(a, b, c, e)` with the fourth operand in the list
pub(crate) struct Map4<A, B, C, E, R, F>(PhantomData<(A, B, C, E, R, F)>);

impl<A: Lane, B: Lane, C: Lane, E: Lane, R: Lane, F: Fn(A, B, C, E) -> R + Copy> Instruction
    for Map4<A, B, C, E, R, F>
{
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let fourth = x.listed(i, 0);
        let r = &x.warp.registers;
        let (a, b, c, e) = (r.get::<A>(i.a), r.get::<B>(i.b), r.get::<C>(i.c), r.get::<E>(fourth));
        let f = the::<F>();
        let mut out = [f(a[0], b[0], c[0], e[0]); LANES];
        for l in 0..LANES {
            out[l] = f(a[l], b[l], c[l], e[l]);
        }
        x.warp.registers.put(i.d, out, x.active);
        Flow::Next
    }
}

/// `(d, b) = (f(a), g(a))`: the halves of a register
pub(crate) struct Split<A, R, F>(PhantomData<(A, R, F)>);

impl<A: Lane, R: Lane, F: Fn(A) -> (R, R) + Copy> Instruction for Split<A, R, F> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let a = x.warp.registers.get::<A>(i.a);
        let f = the::<F>();
        let (mut low, mut high) = ([f(a[0]).0; LANES], [f(a[0]).1; LANES]);
        for l in 0..LANES {
            (low[l], high[l]) = f(a[l]);
        }
        x.warp.registers.put(i.d, low, x.active);
        x.warp.registers.put(i.b, high, x.active);
        Flow::Next
    }
}

/// How a comparison joins another predicate: `setp.lt.and.f32 p, a, b, c`.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Join {
    None,
    And,
    Or,
    Xor,
}

impl Join {
    /// Bits of `mode`: the joiner, and whether the joined predicate is negated.
    pub(crate) fn encode(self, negated: bool) -> u8 {
        self as u8 | u8::from(negated) << 2
    }

    #[inline(always)]
    fn apply(mode: u8, bits: u32, other: u32) -> u32 {
        let other = if mode & 4 != 0 { !other } else { other };
        match mode & 3 {
            1 => bits & other,
            2 => bits | other,
            3 => bits ^ other,
            _ => bits,
        }
    }
}

/// `d|list = f(a, b) join c`: comparisons into predicates
pub(crate) struct Compare<A, F>(PhantomData<(A, F)>);

impl<A: Lane, F: Fn(A, A) -> bool + Copy> Instruction for Compare<A, F> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let (a, b) = (x.warp.registers.get::<A>(i.a), x.warp.registers.get::<A>(i.b));
        let f = the::<F>();
        let mut bits = 0;
        for l in 0..LANES {
            bits |= u32::from(f(a[l], b[l])) << l;
        }
        put_comparison(x, i, bits)
    }
}

#[inline(always)]
fn put_comparison(x: &mut Machine<'_>, i: &Inst, bits: u32) -> Flow {
    let other = x.warp.registers.predicate(i.c);
    x.warp.registers.put_predicate(i.d, Join::apply(i.mode, bits, other), x.active);
    if i.count == 2 {
        x.warp.registers.put_predicate(i.list, Join::apply(i.mode, !bits, other), x.active);
    }
    Flow::Next
}

/// [`Compare`] through a pointer in `imm`, for types that kernels seldom compare.
pub(crate) struct CalledCompare<A>(PhantomData<A>);

impl<A: Lane> CalledCompare<A> {
    /// The pointer that stands for a closure.
    pub(crate) fn pointer<F: Fn(A, A) -> bool + Copy>(_: F) -> i64 {
        fn call<A: Lane, F: Fn(A, A) -> bool + Copy>(a: A::Word, b: A::Word) -> bool {
            the::<F>()(A::unpack(a), A::unpack(b))
        }
        (call::<A, F> as fn(A::Word, A::Word) -> bool as *const ()).expose_provenance() as i64
    }
}

impl<A: Lane> Instruction for CalledCompare<A> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        // SAFETY: the decoder put the result of `pointer` for the same words here.
        let f = unsafe {
            std::mem::transmute::<*const (), fn(A::Word, A::Word) -> bool>(std::ptr::with_exposed_provenance(
                i.imm as usize,
            ))
        };
        let mut bits = 0;
        for l in lanes(x.active) {
            let (a, b) = (x.warp.registers.words::<A>(i.a)[l], x.warp.registers.words::<A>(i.b)[l]);
            bits |= u32::from(f(a, b)) << l;
        }
        put_comparison(x, i, bits)
    }
}

/// `d = a or b by predicate c`
pub(crate) struct Select<A>(PhantomData<A>);

impl<A: Lane> Instruction for Select<A> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let (a, b) = (x.warp.registers.get::<A>(i.a), x.warp.registers.get::<A>(i.b));
        let p = x.warp.registers.predicate(i.c);
        let p = if i.mode != 0 { !p } else { p };
        let mut out = a;
        for l in 0..LANES {
            out[l] = if p >> l & 1 != 0 { a[l] } else { b[l] };
        }
        x.warp.registers.put(i.d, out, x.active);
        Flow::Next
    }
}

/// `d = f(a, b)` on predicates; bits 0 and 1 of `mode` negate `a` and `b`
pub(crate) struct Logic<F>(PhantomData<F>);

impl<F: Fn(u32, u32) -> u32 + Copy> Instruction for Logic<F> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let negate = |p: u32, bit: u8| if i.mode & bit != 0 { !p } else { p };
        let (a, b) = (x.warp.registers.predicate(i.a), x.warp.registers.predicate(i.b));
        let value = the::<F>()(negate(a, 1), negate(b, 2));
        x.warp.registers.put_predicate(i.d, value, x.active);
        Flow::Next
    }
}

/// `d = f(warp)`: clocks
pub(crate) struct FromWarp<R, F>(PhantomData<(R, F)>);

impl<R: Lane, F: Fn(u32) -> R + Copy> Instruction for FromWarp<R, F> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let value = the::<F>()(x.warp.serial);
        x.warp.registers.put(i.d, [value; LANES], x.active);
        Flow::Next
    }
}

/// Nothing: hints, and fences whose order the simulator keeps anyway.
pub(crate) struct Nothing;

impl Instruction for Nothing {
    #[inline(always)]
    unsafe fn execute(_: &mut Machine<'_>, _: &Inst) -> Flow {
        Flow::Next
    }
}
