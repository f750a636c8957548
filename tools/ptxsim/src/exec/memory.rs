//! Loads and stores: [`access`](super::access) admits each lane, then bytes move.

use super::access::{Kind, NO_POINTERS, Pointers};
use super::lane::{FULL, LANES, Lane, Row, lanes};
use super::{Flow, Inst, Instruction, Machine};
use crate::finding::{FindingKind, Place};
use crate::run::{LOCAL_SLOT, SHARED_SLOT};
use std::marker::PhantomData;

/// Copies the elements of the admitted lanes into registers.
#[inline(always)]
fn move_in(x: &mut Machine<'_>, i: &Inst, admitted: u32, pointers: &Pointers) {
    let signed = i.mode & 1 != 0;
    for n in 0..usize::from(i.count) {
        let row = x.listed(i, n);
        let registers = &mut x.warp.registers;
        // SAFETY: `pointers` are admitted for `count` elements of `size` bytes.
        unsafe {
            if i.size == 8 {
                let words = registers.words_mut::<u64>(row);
                for l in lanes(admitted) {
                    words[l] = pointers[l].cast::<u64>().add(n).read_unaligned();
                }
            } else {
                let words = registers.words_mut::<u32>(row);
                for l in lanes(admitted) {
                    words[l] = load_word(pointers[l], n, i.size, signed);
                }
            }
        }
    }
}

/// Element `n` behind a pointer, extended to 32 bits.
///
/// # Safety
///
/// The pointer must be good for it.
#[inline(always)]
unsafe fn load_word(p: *const u8, n: usize, size: u8, signed: bool) -> u32 {
    // SAFETY: by the caller's promise.
    unsafe {
        match (size, signed) {
            (4, _) => p.cast::<u32>().add(n).read_unaligned(),
            (2, false) => p.cast::<u16>().add(n).read_unaligned().into(),
            (2, true) => i32::from(p.cast::<i16>().add(n).read_unaligned()) as u32,
            (_, false) => (*p.add(n)).into(),
            (_, true) => i32::from(*p.cast::<i8>().add(n)) as u32,
        }
    }
}

/// Copies registers to the elements of the admitted lanes.
#[inline(always)]
fn move_out(x: &mut Machine<'_>, i: &Inst, admitted: u32, pointers: &Pointers) {
    for n in 0..usize::from(i.count) {
        let row = x.listed(i, n);
        let registers = &x.warp.registers;
        // SAFETY: `pointers` are admitted for `count` elements of `size` bytes.
        unsafe {
            if i.size == 8 {
                let words = registers.words::<u64>(row);
                for l in lanes(admitted) {
                    pointers[l].cast::<u64>().add(n).write_unaligned(words[l]);
                }
            } else {
                let words = registers.words::<u32>(row);
                for l in lanes(admitted) {
                    match i.size {
                        4 => pointers[l].cast::<u32>().add(n).write_unaligned(words[l]),
                        2 => pointers[l].cast::<u16>().add(n).write_unaligned(words[l] as u16),
                        _ => *pointers[l].add(n) = words[l] as u8,
                    }
                }
            }
        }
    }
}

/// A state space: how an address register is read and an access is checked.
pub(crate) trait Space {
    /// Whether addresses are wide.
    const WIDE: bool;
    fn admit(x: &mut Machine<'_>, i: &Inst, kind: Kind, pointers: &mut Pointers) -> u32;
}

/// `row + imm` in each lane.
#[inline(always)]
pub(crate) fn wide_addresses(x: &Machine<'_>, i: &Inst) -> Row<u64> {
    let mut a = x.warp.registers.get::<u64>(i.a);
    a.iter_mut().for_each(|a| *a = a.wrapping_add(i.imm as u64));
    a
}

/// `row + imm` in each lane, for shared memory.
#[inline(always)]
pub(crate) fn narrow_addresses(x: &Machine<'_>, i: &Inst) -> Row<u32> {
    let mut a = x.warp.registers.get::<u32>(i.a);
    a.iter_mut().for_each(|a| *a = a.wrapping_add(i.imm as u32));
    a
}

pub(crate) struct Global;
pub(crate) struct Shared;
pub(crate) struct Local;
pub(crate) struct Generic;

impl Space for Global {
    const WIDE: bool = true;

    #[inline(always)]
    fn admit(x: &mut Machine<'_>, i: &Inst, kind: Kind, pointers: &mut Pointers) -> u32 {
        let addresses = wide_addresses(x, i);
        x.admit_global(&addresses, x.active, u32::from(i.size) * u32::from(i.count), kind, pointers)
    }
}

impl Space for Shared {
    const WIDE: bool = false;

    #[inline(always)]
    fn admit(x: &mut Machine<'_>, i: &Inst, kind: Kind, pointers: &mut Pointers) -> u32 {
        let addresses = narrow_addresses(x, i);
        x.admit_shared(&addresses, x.active, u32::from(i.size) * u32::from(i.count), kind, pointers)
    }
}

impl Space for Local {
    const WIDE: bool = false;

    #[inline(always)]
    fn admit(x: &mut Machine<'_>, i: &Inst, kind: Kind, pointers: &mut Pointers) -> u32 {
        let mut addresses = wide_addresses(x, i);
        addresses.iter_mut().for_each(|a| *a &= 0xffff_ffff);
        x.admit_local(&addresses, x.active, u32::from(i.size) * u32::from(i.count), kind, pointers)
    }
}

impl Space for Generic {
    const WIDE: bool = true;

    fn admit(x: &mut Machine<'_>, i: &Inst, kind: Kind, pointers: &mut Pointers) -> u32 {
        let addresses = wide_addresses(x, i);
        let size = u32::from(i.size) * u32::from(i.count);
        let (mut shared, mut local) = (0u32, 0u32);
        let (mut narrow, mut within) = ([0; LANES], [0; LANES]);
        for l in lanes(x.active) {
            narrow[l] = addresses[l] as u32;
            within[l] = addresses[l] & 0xffff_ffff;
            shared |= u32::from(addresses[l] >> 32 == SHARED_SLOT) << l;
            local |= u32::from(addresses[l] >> 32 == LOCAL_SLOT) << l;
        }
        let global = x.active & !shared & !local;
        let mut admitted = 0;
        if shared != 0 {
            admitted |= x.admit_shared(&narrow, shared, size, kind, pointers);
        }
        if local != 0 {
            admitted |= x.admit_local(&within, local, size, kind, pointers);
        }
        if global != 0 {
            admitted |= x.admit_global(&addresses, global, size, kind, pointers);
        }
        admitted
    }
}

/// Bits of `mode`: an access that may see what another block released, or tell it; and one that acquires or releases.
pub(crate) const STRONG: u8 = 2;
pub(crate) const ORDERS: u8 = 4;

/// The lanes whose words in global memory other blocks may synchronise with.
pub(crate) fn synchronising<S: Space>(x: &Machine<'_>, i: &Inst, admitted: u32) -> u32 {
    if !S::WIDE {
        return 0;
    }
    let addresses = wide_addresses(x, i);
    lanes(admitted).filter(|&l| addresses[l] >> 32 > LOCAL_SLOT).fold(0, |mask, l| mask | 1 << l)
}

/// `ld`: rows in the list, address `a + imm`; bit 0 of `mode` extends the sign, others are [`STRONG`] and [`ORDERS`].
pub(crate) struct Load<S>(PhantomData<S>);

impl<S: Space> Instruction for Load<S> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let mut pointers = NO_POINTERS;
        let kind = if i.mode & STRONG != 0 { Kind::Look } else { Kind::Read };
        let admitted = S::admit(x, i, kind, &mut pointers);
        // A load may write over the row of its address.
        let words = if i.mode & STRONG != 0 { synchronising::<S>(x, i, admitted) } else { 0 };
        move_in(x, i, admitted, &pointers);
        lanes(words).for_each(|l| x.acquire(pointers[l], i.mode & ORDERS != 0));
        Flow::Next
    }
}

/// `st`: rows in the list, address `a + imm`.
pub(crate) struct Store<S>(PhantomData<S>);

impl<S: Space> Instruction for Store<S> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let mut pointers = NO_POINTERS;
        let kind = if i.mode & STRONG != 0 { Kind::Tell } else { Kind::Write };
        let admitted = S::admit(x, i, kind, &mut pointers);
        if i.mode & STRONG != 0 {
            let words = synchronising::<S>(x, i, admitted);
            lanes(words).for_each(|l| x.release(pointers[l], i.mode & ORDERS != 0));
        }
        move_out(x, i, admitted, &pointers);
        *x.progress += 1;
        Flow::Next
    }
}

/// A global access whose lanes follow one another without a gap, checked as one.
#[inline(always)]
fn contiguous(x: &mut Machine<'_>, i: &Inst, kind: Kind) -> Option<*mut u8> {
    if x.active != FULL {
        return None;
    }
    let size = u64::from(i.size) * u64::from(i.count);
    let words = x.warp.registers.words::<u64>(i.a);
    let first = words[0];
    let mut straight = true;
    for l in 0..LANES {
        straight &= words[l] == first.wrapping_add(l as u64 * size);
    }
    let address = first.wrapping_add(i.imm as u64);
    if !straight {
        return None;
    }
    let bytes = x.run.find(address, 32 * size, size, kind.writes())?;
    // SAFETY: `find` admitted these bytes, each with its mark.
    unsafe {
        if kind == Kind::Write {
            std::ptr::write_bytes(bytes.written, 1, 32 * size as usize);
        } else if x.run.uninitialised {
            let marks = std::slice::from_raw_parts(bytes.written, 32 * size as usize);
            if marks.iter().fold(1, |all, w| all & w) != 1 {
                return None;
            }
        }
    }
    x.check_conflict(bytes, 32 * size as u32, kind, 0, address);
    let sectors = (address % 32 + 32 * size).div_ceil(32) as u32;
    x.count_global(FULL, size as u32, sectors);
    if x.run.options.traffic {
        x.touch(address, 32 * size, kind);
    }
    Some(bytes.data)
}

/// `ld.global`, with a short way for contiguous lanes.
pub(crate) struct LoadGlobal;

impl Instruction for LoadGlobal {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if i.mode & STRONG == 0
            && let Some(data) = contiguous(x, i, Kind::Read)
        {
            let size = usize::from(i.size) * usize::from(i.count);
            if i.size == 4 && i.count == 1 {
                let row = x.listed(i, 0);
                // SAFETY: 32 words were admitted.
                *x.warp.registers.words_mut::<u32>(row) = unsafe { data.cast::<Row<u32>>().read_unaligned() };
                return Flow::Next;
            }
            let mut pointers = NO_POINTERS;
            for (l, p) in pointers.iter_mut().enumerate() {
                *p = data.wrapping_add(l * size);
            }
            move_in(x, i, FULL, &pointers);
            return Flow::Next;
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { Load::<Global>::execute(x, i) }
    }
}

/// `st.global`, with a short way for contiguous lanes.
pub(crate) struct StoreGlobal;

impl Instruction for StoreGlobal {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if i.mode & STRONG == 0
            && let Some(data) = contiguous(x, i, Kind::Write)
        {
            let size = usize::from(i.size) * usize::from(i.count);
            let mut pointers = NO_POINTERS;
            for (l, p) in pointers.iter_mut().enumerate() {
                *p = data.wrapping_add(l * size);
            }
            move_out(x, i, FULL, &pointers);
            *x.progress += 1;
            return Flow::Next;
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { Store::<Global>::execute(x, i) }
    }
}

/// `ld.param`: byte `imm` of the parameter block plus row `a`, the same in all lanes.
pub(crate) struct LoadParam;

impl Instruction for LoadParam {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let size = usize::from(i.size);
        let base = super::warp::uniform::<u64>(x, i.a).wrapping_add(i.imm as u64);
        for n in 0..usize::from(i.count) {
            let first = (base as usize).wrapping_add(n * size);
            let Some(bytes) = x.run.params.get(first..first.saturating_add(size)) else {
                x.report(FindingKind::OutOfBounds, 0, Place::None, "read beyond the parameters");
                return Flow::Next;
            };
            let row = x.listed(i, n);
            let mut value = [0; 8];
            value[..size].copy_from_slice(bytes);
            if size == 8 {
                x.warp.registers.put(row, [u64::from_le_bytes(value); LANES], x.active);
            } else {
                // SAFETY: the array has eight bytes.
                let word = unsafe { load_word(value.as_ptr(), 0, i.size, i.mode & 1 != 0) };
                x.warp.registers.put(row, [word; LANES], x.active);
            }
        }
        Flow::Next
    }
}

/// One lane's value of a listed row as 64 bits, for operations on either width.
#[inline(always)]
pub(crate) fn wide_lane(x: &Machine<'_>, row: u32, lane: usize, size: u8) -> u64 {
    if size == 8 {
        x.warp.registers.lane::<u64>(row, lane)
    } else {
        x.warp.registers.lane::<u32>(row, lane).into()
    }
}

/// Writes one lane of a row of either width.
#[inline(always)]
pub(crate) fn put_wide_lane(x: &mut Machine<'_>, row: u32, lane: usize, size: u8, value: u64) {
    if size == 8 {
        x.warp.registers.words_mut::<u64>(row)[lane] = value.pack();
    } else {
        x.warp.registers.words_mut::<u32>(row)[lane] = (value as u32).pack();
    }
}
