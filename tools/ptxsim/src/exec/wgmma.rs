//! `wgmma`: matrix products of a warpgroup on shared memory.
//!
//! The product is computed when it is issued. Its reads of shared memory belong to an agent of the warpgroup, and
//! its registers are watched, until a `wait_group` that all four warps have reached.

use super::access::{Kind, agent, shared_place};
use super::matrix::{
    BFloat, Float16, Half, four_rows, multiply_add, read_accumulators, tf32, write_accumulators,
};
use super::team::{BARRIERS, Columns};
use super::warp::{Warp, uniform};
use super::{Flow, Inst, Instruction, Machine};
use crate::finding::{FindingKind, Place};
use crate::launch::Swizzle;
use crate::run::SHARED_BASE;
use std::marker::PhantomData;

/// The products of a warp that are under way.
#[derive(Default)]
pub(crate) struct InFlight {
    /// One bit for each register row that a product under way reads or writes.
    rows: Vec<u64>,
    /// Rows and last serial of each group, the latest open.
    groups: Vec<Group>,
    open: Group,
    serial: u32,
    /// Groups that the wait under way leaves.
    keep: usize,
}

#[derive(Default)]
struct Group {
    rows: Vec<u32>,
    serial: u32,
}

impl InFlight {
    pub(crate) fn start(&mut self, base: u32) {
        *self = Self { serial: base, ..Self::default() };
    }

    /// Whether registers are under watch.
    #[inline(always)]
    pub(crate) fn watched(&self) -> bool {
        !self.rows.is_empty()
    }

    fn watches(&self, row: u32) -> bool {
        self.rows.get(row as usize / 64).is_some_and(|w| w >> (row % 64) & 1 != 0)
    }

    fn watch(&mut self, row: u32) {
        let word = row as usize / 64;
        if self.rows.len() <= word {
            self.rows.resize(word + 1, 0);
        }
        self.rows[word] |= 1 << (row % 64);
        self.open.rows.push(row);
    }

    /// Forgets all but the `keep` latest groups; returns the serial of the last one forgotten.
    fn retire(&mut self) -> Option<u32> {
        let done = self.groups.len().saturating_sub(self.keep);
        let last = self.groups.drain(..done).next_back()?.serial;
        self.rows.clear();
        let rest: Vec<u32> = self.groups.iter().chain([&self.open]).flat_map(|g| g.rows.clone()).collect();
        let open = std::mem::take(&mut self.open);
        rest.into_iter().for_each(|row| self.watch(row));
        self.open = open;
        Some(last)
    }
}

/// Reports if the current instruction touches a watched register.
pub(crate) fn check_touches(x: &Machine<'_>) {
    let touched = &x.run.kernel.touches[x.pc as usize];
    if touched.iter().any(|row| x.warp.wgmma.watches(*row)) {
        let why = "a register of a `wgmma.mma_async` is used before `wgmma.wait_group` made it safe";
        x.report(FindingKind::WgmmaRegister, 0, Place::None, why);
    }
}

/// A wait is over for all warps of the group: the reads of shared memory are known to be complete.
pub(crate) fn completed(warp: &mut Warp, columns: Columns) {
    let column = columns.first_group as usize + warp.index / 4;
    if let Some(serial) = warp.wgmma.retire()
        && let Some(known) = warp.knows.clock.get_mut(column)
    {
        *known = (*known).max(serial);
    }
}

/// `wgmma.commit_group`
pub(crate) struct Commit;

impl Instruction for Commit {
    unsafe fn execute(x: &mut Machine<'_>, _: &Inst) -> Flow {
        if x.converged() {
            let w = &mut x.warp.wgmma;
            let mut group = std::mem::take(&mut w.open);
            group.serial = w.serial;
            w.groups.push(group);
        }
        Flow::Next
    }
}

/// `wgmma.wait_group imm`: a meeting of the four warps.
pub(crate) struct Wait;

impl Instruction for Wait {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if !x.converged() {
            return Flow::Next;
        }
        let group = x.warp.index / 4;
        if (group + 1) * 4 > x.cta().warps {
            let why = "wgmma needs warpgroups of four whole warps";
            x.report(FindingKind::Operand, 0, Place::None, why);
            return Flow::Next;
        }
        x.warp.wgmma.keep = i.imm as usize;
        super::barrier::join(x, BARRIERS + group, 128);
        Flow::Stop
    }
}

/// A matrix in shared memory, as a 64-bit descriptor has it.
#[derive(Clone, Copy)]
struct Descriptor {
    start: u32,
    leading: u32,
    stride: u32,
    swizzle: Swizzle,
}

impl Descriptor {
    fn decode(bits: u64) -> Self {
        let field = |shift: u32| ((bits >> shift & 0x3fff) as u32) << 4;
        let swizzle = match bits >> 62 {
            0 => Swizzle::None,
            1 => Swizzle::Bytes128,
            2 => Swizzle::Bytes64,
            _ => Swizzle::Bytes32,
        };
        Self { start: field(0), leading: field(16), stride: field(32), swizzle }
    }

    /// The address of 16 bytes: along k for a k-major matrix, `unit` of `row`; along m or n for the other, where
    /// `unit` counts 16 bytes along m or n and `row` is k.
    #[inline(always)]
    fn unit(&self, row: u32, unit: u32, k_major: bool) -> u32 {
        let span = self.swizzle.span();
        let (outer, inner) = (row / 8, row % 8);
        let offset = match (k_major, span) {
            (true, 0) => outer * self.stride + unit * self.leading + inner * 16,
            (true, _) => outer * self.stride + inner * span + unit * 16,
            (false, 0) => unit * self.stride + outer * self.leading + inner * 16,
            (false, _) => {
                let units = span / 16;
                unit / units * self.leading + unit % units * 16 + outer * self.stride + inner * span
            }
        };
        self.swizzle.apply(self.start.wrapping_add(offset))
    }
}

/// The element of a product: its size and how a word of 16 bytes unpacks.
pub(crate) trait Element {
    /// Elements in 16 bytes.
    const PER_UNIT: usize;
    fn unpack(bytes: [u8; 16]) -> [f32; 8];
    /// The A fragment in registers: 16 rows of `K`.
    fn fragment(word: u32) -> (f32, f32);
}

impl<H: Half> Element for H {
    const PER_UNIT: usize = 8;

    #[inline(always)]
    fn unpack(bytes: [u8; 16]) -> [f32; 8] {
        let mut out = [0.0; 8];
        for (n, value) in out.iter_mut().enumerate() {
            *value = H::to_f32(u16::from_le_bytes([bytes[2 * n], bytes[2 * n + 1]]));
        }
        out
    }

    #[inline(always)]
    fn fragment(word: u32) -> (f32, f32) {
        (H::to_f32(word as u16), H::to_f32((word >> 16) as u16))
    }
}

/// `tf32` elements.
pub(crate) struct Tf32;

impl Element for Tf32 {
    const PER_UNIT: usize = 4;

    #[inline(always)]
    fn unpack(bytes: [u8; 16]) -> [f32; 8] {
        let mut out = [0.0; 8];
        let (words, _) = bytes.as_chunks::<4>();
        for (value, word) in out.iter_mut().zip(words) {
            *value = tf32(u32::from_le_bytes(*word));
        }
        out
    }

    fn fragment(word: u32) -> (f32, f32) {
        (tf32(word), 0.0)
    }
}

/// Bits of `mode`.
pub(crate) const A_IN_REGISTERS: u8 = 1;
pub(crate) const A_TRANSPOSED: u8 = 2;
pub(crate) const B_TRANSPOSED: u8 = 4;
pub(crate) const NEGATE_A: u8 = 8;
pub(crate) const NEGATE_B: u8 = 16;

/// `wgmma.mma_async`: descriptors in wide rows `a` and `b`, predicate `c` to keep the accumulators; the list has the
/// accumulator rows, then the four of A if it is in registers. `count` is n over 8. `K` elements in one step.
pub(crate) struct Wgmma<E, const K: usize>(PhantomData<E>);

/// Accumulates over n in steps of 8 columns, so that one step is an `mma`.
impl<E: Element, const K: usize> Instruction for Wgmma<E, K> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if !x.converged() {
            return Flow::Next;
        }
        if x.run.kernel.unfenced.contains(&x.pc) {
            let why = "registers of this product are written without `wgmma.fence` between";
            x.report(FindingKind::WgmmaFence, 0, Place::None, why);
        }
        x.warp.wgmma.serial += 1;
        let (columns, rows) = (usize::from(i.count), usize::from(i.count) * 4);
        let keep = uniform_predicate(x, i.c);
        let a = if i.mode & A_IN_REGISTERS != 0 {
            registers_a::<E, K>(x, i, rows)
        } else {
            let descriptor = Descriptor::decode(uniform(x, i.a));
            let first = x.warp.index as u32 % 4 * 16;
            shared_a::<E, K>(x, descriptor, first, i.mode & A_TRANSPOSED == 0)
        };
        let sign = if (i.mode & NEGATE_A != 0) != (i.mode & NEGATE_B != 0) { -1.0 } else { 1.0 };
        let a = a.map(|row| row.map(|v| v * sign));
        let b = Descriptor::decode(uniform(x, i.b));
        for n in 0..columns {
            let right = shared_b::<E, K>(x, b, n as u32 * 8, i.mode & B_TRANSPOSED == 0);
            let sums = four_rows(x, i, n * 4);
            let mut c = if keep { read_accumulators(x, sums) } else { [[0.0; 8]; 16] };
            multiply_add(&a, &right, &mut c);
            write_accumulators(x, sums, &c);
        }
        if x.run.checks.has(FindingKind::WgmmaRegister) {
            let watched = rows + if i.mode & A_IN_REGISTERS != 0 { K / E::PER_UNIT * 2 } else { 0 };
            for n in 0..watched {
                let row = x.listed(i, n);
                x.warp.wgmma.watch(row);
            }
        }
        Flow::Next
    }
}

fn uniform_predicate(x: &Machine<'_>, predicate: u32) -> bool {
    x.warp.registers.predicate(predicate) >> (x.active.trailing_zeros() & 31) & 1 != 0
}

/// A from registers: the fragment of `mma`.
#[inline(always)]
fn registers_a<E: Element, const K: usize>(x: &Machine<'_>, i: &Inst, first: usize) -> [[f32; K]; 16] {
    let mut a = [[0.0; K]; 16];
    let half = K / 2;
    let per_lane = half / 4;
    for n in 0..4 {
        let words = x.warp.registers.words::<u32>(x.listed(i, first + n));
        for l in 0..32 {
            let (row, column) = (l / 4 + n % 2 * 8, n / 2 * half + l % 4 * per_lane);
            let (low, high) = E::fragment(words[l]);
            a[row][column] = low;
            if per_lane == 2 {
                a[row][column + 1] = high;
            }
        }
    }
    a
}

/// Rows `first` to `first + 16` of A in shared memory.
#[inline(always)]
fn shared_a<E: Element, const K: usize>(
    x: &mut Machine<'_>,
    d: Descriptor,
    first: u32,
    k_major: bool,
) -> [[f32; K]; 16] {
    let mut a = [[0.0; K]; 16];
    if k_major {
        for (r, row) in a.iter_mut().enumerate() {
            for unit in 0..K / E::PER_UNIT {
                let values = E::unpack(read_unit(x, d.unit(first + r as u32, unit as u32, true)));
                row[unit * E::PER_UNIT..][..E::PER_UNIT].copy_from_slice(&values[..E::PER_UNIT]);
            }
        }
    } else {
        for k in 0..K {
            for unit in 0..16 / E::PER_UNIT {
                let along = first / E::PER_UNIT as u32 + unit as u32;
                let values = E::unpack(read_unit(x, d.unit(k as u32, along, false)));
                for (n, v) in values[..E::PER_UNIT].iter().enumerate() {
                    a[unit * E::PER_UNIT + n][k] = *v;
                }
            }
        }
    }
    a
}

/// Columns `first` to `first + 8` of B in shared memory.
#[inline(always)]
fn shared_b<E: Element, const K: usize>(
    x: &mut Machine<'_>,
    d: Descriptor,
    first: u32,
    k_major: bool,
) -> [[f32; 8]; K] {
    let mut b = [[0.0; 8]; K];
    if k_major {
        for c in 0..8 {
            for unit in 0..K / E::PER_UNIT {
                let values = E::unpack(read_unit(x, d.unit(first + c as u32, unit as u32, true)));
                for (n, v) in values[..E::PER_UNIT].iter().enumerate() {
                    b[unit * E::PER_UNIT + n][c] = *v;
                }
            }
        }
    } else {
        for (k, row) in b.iter_mut().enumerate() {
            for unit in 0..8 / E::PER_UNIT {
                let along = first / E::PER_UNIT as u32 + unit as u32;
                let values = E::unpack(read_unit(x, d.unit(k as u32, along, false)));
                row[unit * E::PER_UNIT..][..E::PER_UNIT].copy_from_slice(&values[..E::PER_UNIT]);
            }
        }
    }
    b
}

/// 16 bytes of shared memory, read by the warpgroup's agent.
#[inline(always)]
fn read_unit(x: &mut Machine<'_>, address: u32) -> [u8; 16] {
    let rank = x.rank;
    if address < SHARED_BASE || address + 16 > x.run.shared_end {
        let why = "the matrix that a descriptor names leaves shared memory";
        x.report(FindingKind::OutOfBounds, 0, shared_place(address), why);
        return [0; 16];
    }
    let cta = &mut x.ctas[rank];
    if let Some(shadow) = &mut cta.shadow {
        let mut who = agent(x.warp, 255, false, x.pc);
        who.record = (cta.columns.first_group + (x.warp.index / 4) as u16, x.warp.wgmma.serial);
        who.asynchronous = true;
        let faults = shadow.read(&who, address, 16);
        if faults.any() {
            x.report_shared(faults, rank, address, 0, Kind::Read);
        }
    }
    // SAFETY: the address was just checked.
    unsafe { x.ctas[rank].shared(address).cast::<[u8; 16]>().read_unaligned() }
}

/// Products of `bf16` and of `f16` in steps of 16, of `tf32` in steps of 8.
pub(crate) type WgmmaBf16 = Wgmma<BFloat, 16>;
pub(crate) type WgmmaF16 = Wgmma<Float16, 16>;
pub(crate) type WgmmaTf32 = Wgmma<Tf32, 8>;
