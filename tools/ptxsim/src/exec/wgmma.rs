//! `wgmma`: matrix products of a warpgroup on shared memory.
//!
//! The product is computed when it is issued. Its reads of shared memory belong to an agent of the warpgroup, and
//! its registers are watched, until a `wait_group` that all four warps have reached.

use super::access::{Kind, agent, shared_place};
use super::lane::LANES;
use super::product::{BFloat, Element, Float16, Tf32};
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

/// Elements in 16 bytes.
const fn per_unit<E: Element>() -> usize {
    4 * E::PARTS
}

/// The elements of 16 bytes.
#[inline(always)]
fn unpack<E: Element>(bytes: [u8; 16]) -> [f32; 8] {
    let mut out = [0.0; 8];
    let (words, _) = bytes.as_chunks::<4>();
    for (n, value) in out[..per_unit::<E>()].iter_mut().enumerate() {
        *value = E::part(u32::from_le_bytes(words[n / E::PARTS]), n % E::PARTS);
    }
    out
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
            let sums = [0, 1, 2, 3].map(|row| x.listed(i, n * 4 + row));
            let mut c = if keep { read_accumulators(x, sums) } else { [[0.0; 8]; 16] };
            multiply_add(&a, &right, &mut c);
            write_accumulators(x, sums, &c);
        }
        if x.run.checks.has(FindingKind::WgmmaRegister) {
            let watched = rows + if i.mode & A_IN_REGISTERS != 0 { K / per_unit::<E>() * 2 } else { 0 };
            for n in 0..watched {
                let row = x.listed(i, n);
                x.warp.wgmma.watch(row);
            }
        }
        Flow::Next
    }
}

/// `c += a b`, column by column of `a`, each step fused.
#[inline(always)]
fn multiply_add<const K: usize>(a: &[[f32; K]; 16], b: &[[f32; 8]; K], c: &mut [[f32; 8]; 16]) {
    // Eight rows at a time keep enough sums in flight to hide the latency of the multiply-add.
    for r in [0, 8] {
        let mut sums = [[0.0; 8]; 8];
        sums.copy_from_slice(&c[r..r + 8]);
        for k in 0..K {
            for q in 0..8 {
                let left = a[r + q][k];
                for n in 0..8 {
                    sums[q][n] = left.mul_add(b[k][n], sums[q][n]);
                }
            }
        }
        c[r..r + 8].copy_from_slice(&sums);
    }
}

/// Accumulators of `f32`: lane `4 g + t` has columns `2 t`, `2 t + 1` of rows `g` (first two) and `g + 8`.
#[inline(always)]
fn read_accumulators(x: &Machine<'_>, rows: [u32; 4]) -> [[f32; 8]; 16] {
    let mut c = [[0.0; 8]; 16];
    for (n, row) in rows.into_iter().enumerate() {
        let words = x.warp.registers.words::<u32>(row);
        for l in 0..LANES {
            c[l / 4 + n / 2 * 8][2 * (l % 4) + n % 2] = f32::from_bits(words[l]);
        }
    }
    c
}

#[inline(always)]
fn write_accumulators(x: &mut Machine<'_>, rows: [u32; 4], c: &[[f32; 8]; 16]) {
    for (n, row) in rows.into_iter().enumerate() {
        let words = x.warp.registers.words_mut::<u32>(row);
        for l in 0..LANES {
            words[l] = c[l / 4 + n / 2 * 8][2 * (l % 4) + n % 2].to_bits();
        }
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
            for part in 0..E::PARTS {
                a[row][column + part] = E::part(words[l], part);
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
            for unit in 0..K / per_unit::<E>() {
                let values = unpack::<E>(read_unit(x, d.unit(first + r as u32, unit as u32, true)));
                row[unit * per_unit::<E>()..][..per_unit::<E>()].copy_from_slice(&values[..per_unit::<E>()]);
            }
        }
    } else {
        for k in 0..K {
            for unit in 0..16 / per_unit::<E>() {
                let along = first / per_unit::<E>() as u32 + unit as u32;
                let values = unpack::<E>(read_unit(x, d.unit(k as u32, along, false)));
                for (n, v) in values[..per_unit::<E>()].iter().enumerate() {
                    a[unit * per_unit::<E>() + n][k] = *v;
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
            for unit in 0..K / per_unit::<E>() {
                let values = unpack::<E>(read_unit(x, d.unit(first + c as u32, unit as u32, true)));
                for (n, v) in values[..per_unit::<E>()].iter().enumerate() {
                    b[unit * per_unit::<E>() + n][c] = *v;
                }
            }
        }
    } else {
        for (k, row) in b.iter_mut().enumerate() {
            for unit in 0..8 / per_unit::<E>() {
                let along = first / per_unit::<E>() as u32 + unit as u32;
                let values = unpack::<E>(read_unit(x, d.unit(k as u32, along, false)));
                row[unit * per_unit::<E>()..][..per_unit::<E>()].copy_from_slice(&values[..per_unit::<E>()]);
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
