//! Atomics: `atom` and `red` on global and shared memory.

use super::access::{Kind, Pointers};
use super::lane::lanes;
use super::memory::{Space, put_wide_lane, synchronising, wide_lane};
use super::{Flow, Inst, Instruction, Machine};
use crate::math::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

/// What an atomic does with the old value and its operand (or operands, for `cas`).
pub(crate) type Update = fn(old: u64, operand: u64, second: u64) -> u64;

/// `atom` (`mode` 1: the list starts with the destination) and `red`; the operands follow in the list.
///
/// `imm` is the offset of the address; `d` chooses the update from [`UPDATES`].
pub(crate) struct Atomic<S>(PhantomData<S>);

impl<S: Space> Instruction for Atomic<S> {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let mut pointers: Pointers = [std::ptr::null_mut(); 32];
        let admitted = S::admit(x, i, Kind::Atomic, &mut pointers);
        let update = UPDATES[i.d as usize].update;
        let returns = i.mode & 1 != 0;
        let words = synchronising::<S>(x, i, admitted);
        lanes(words).for_each(|l| x.release(pointers[l], i.mode & RELEASE != 0));
        let first = usize::from(returns) * usize::from(i.count);
        // Vector atomics update each element on its own.
        for n in 0..usize::from(i.count) {
            let operand = x.listed(i, first + n);
            let second = if i.mode & 2 != 0 { x.listed(i, first + 1) } else { operand };
            for l in lanes(admitted) {
                let value = wide_lane(x, operand, l, i.size);
                let other = wide_lane(x, second, l, i.size);
                // SAFETY: the access was admitted with its natural alignment.
                let old = unsafe { apply(pointers[l], n, i.size, |old| update(old, value, other)) };
                if returns {
                    let row = x.listed(i, n);
                    put_wide_lane(x, row, l, i.size, old);
                }
            }
        }
        if returns {
            lanes(words).for_each(|l| x.acquire(pointers[l], i.mode & ACQUIRE != 0));
        }
        *x.progress += 1;
        Flow::Next
    }
}

/// Bits of `mode`.
pub(crate) const ACQUIRE: u8 = 4;
pub(crate) const RELEASE: u8 = 8;

/// Updates element `n` in one step and returns its old value.
///
/// # Safety
///
/// The element must be valid and aligned.
unsafe fn apply(p: *mut u8, n: usize, size: u8, f: impl Fn(u64) -> u64) -> u64 {
    // SAFETY: by the caller's promise; all simulated memory is shared between host threads as raw bytes.
    unsafe {
        let done = match size {
            8 => AtomicU64::from_ptr(p.cast::<u64>().add(n)).fetch_update(Relaxed, Relaxed, |v| Some(f(v))),
            4 => AtomicU32::from_ptr(p.cast::<u32>().add(n))
                .fetch_update(Relaxed, Relaxed, |v| Some(f(v.into()) as u32))
                .map(u64::from)
                .map_err(u64::from),
            _ => AtomicU16::from_ptr(p.cast::<u16>().add(n))
                .fetch_update(Relaxed, Relaxed, |v| Some(f(v.into()) as u16))
                .map(u64::from)
                .map_err(u64::from),
        };
        match done {
            Ok(old) | Err(old) => old,
        }
    }
}

/// An operation and the types that it is for.
pub(crate) struct Named {
    pub(crate) operation: &'static str,
    pub(crate) types: &'static [&'static str],
    update: Update,
}

macro_rules! updates {
    ($($operation:literal, [$($type:literal),+], |$old:ident, $a:ident, $b:pat_param| $value:expr;)*) => {
        /// Every atomic operation.
        pub(crate) static UPDATES: &[Named] = &[$(
            Named { operation: $operation, types: &[$($type),+], update: |$old, $a, $b| $value },
        )*];
    };
}

fn f(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn halves(old: u64, a: u64, f: impl Fn(u16, u16) -> u16) -> u64 {
    let low = f(old as u16, a as u16);
    let high = f((old >> 16) as u16, (a >> 16) as u16);
    u64::from(low) | u64::from(high) << 16
}

fn add_f16(a: u16, b: u16) -> u16 {
    f32_to_f16(f16_to_f32(a) + f16_to_f32(b))
}

fn add_bf16(a: u16, b: u16) -> u16 {
    f32_to_bf16(bf16_to_f32(a) + bf16_to_f32(b))
}

updates! {
    "add", ["u32", "s32"], |old, a, _| u64::from((old as u32).wrapping_add(a as u32));
    "add", ["u64", "s64"], |old, a, _| old.wrapping_add(a);
    "add", ["f32"], |old, a, _| (f(old) + f(a)).to_bits().into();
    "add", ["f64"], |old, a, _| (f64::from_bits(old) + f64::from_bits(a)).to_bits();
    "add", ["f16"], |old, a, _| add_f16(old as u16, a as u16).into();
    "add", ["bf16"], |old, a, _| add_bf16(old as u16, a as u16).into();
    "add", ["f16x2"], |old, a, _| halves(old, a, add_f16);
    "add", ["bf16x2"], |old, a, _| halves(old, a, add_bf16);
    "min", ["u32", "u64"], |old, a, _| old.min(a);
    "max", ["u32", "u64"], |old, a, _| old.max(a);
    "min", ["s32"], |old, a, _| (old as u32 as i32).min(a as u32 as i32) as u32 as u64;
    "max", ["s32"], |old, a, _| (old as u32 as i32).max(a as u32 as i32) as u32 as u64;
    "min", ["s64"], |old, a, _| (old as i64).min(a as i64) as u64;
    "max", ["s64"], |old, a, _| (old as i64).max(a as i64) as u64;
    "and", ["b32", "b64"], |old, a, _| old & a;
    "or", ["b32", "b64"], |old, a, _| old | a;
    "xor", ["b32", "b64"], |old, a, _| old ^ a;
    "exch", ["b32", "b64", "u32", "u64"], |_old, a, _| a;
    "cas", ["b16", "b32", "b64", "u32", "u64"], |old, a, b| if old == a { b } else { old };
    "inc", ["u32"], |old, a, _| if old >= a { 0 } else { old + 1 };
    "dec", ["u32"], |old, a, _| if old == 0 || old > a { a } else { old - 1 };
}
