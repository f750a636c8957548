//! Matrices of a warp: `ldmatrix`, `stmatrix`, `mma`.
//!
//! In a fragment of 16-bit elements, lane `4 g + t` holds elements `2 t` and `2 t + 1` of row `g`: a row of eight
//! elements is four neighbouring lanes, contiguous in a register row.

use super::access::Kind;
use super::lane::{LANES, Row};
use super::memory::narrow_addresses;
use super::{Flow, Inst, Instruction, Machine};
use crate::math::{bf16_to_f32, f16_to_f32, f32_to_f16};
use std::marker::PhantomData;

/// `ldmatrix`: `count` matrices into the rows of the list, addresses `a + imm`; `mode` 1 transposes.
pub(crate) struct LoadMatrix;

/// `stmatrix`, likewise.
pub(crate) struct StoreMatrix;

type Tile = [[u16; 8]; 8];

impl Machine<'_> {
    /// The rows of matrix `n` in shared memory, where they may be accessed.
    #[inline(always)]
    fn matrix_rows(&mut self, addresses: &Row<u32>, n: usize, kind: Kind) -> [Option<*mut u8>; 8] {
        let mut rows = [None; 8];
        for (r, row) in rows.iter_mut().enumerate() {
            let lane = n * 8 + r;
            let address = addresses[lane];
            let rank = self.rank;
            if !self.shared_in_bounds(rank, address, 16, lane, kind == Kind::Write) {
                continue;
            }
            if self.run.shadowed {
                self.shadow_access(rank, address, 16, lane, kind);
            }
            *row = Some(self.cta().shared(address));
        }
        if self.run.options.traffic {
            self.count_shared(128, row_wavefronts(&addresses[n * 8..n * 8 + 8]), 1);
        }
        rows
    }
}

/// Passes that eight rows of 16 bytes take: rows in the same four banks wait for each other.
fn row_wavefronts(addresses: &[u32]) -> u32 {
    let mut most = 1;
    for (n, a) in addresses.iter().enumerate() {
        let same = |b: &&u32| (**b ^ a) >> 4 & 7 == 0;
        let mut depth = 1;
        for (m, b) in addresses[..n].iter().enumerate().filter(|(_, b)| same(b)) {
            depth += u32::from(b >> 4 != a >> 4 && !addresses[..m].iter().any(|c| c >> 4 == b >> 4));
        }
        most = most.max(depth);
    }
    most
}

impl Instruction for LoadMatrix {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if !x.converged() {
            return Flow::Next;
        }
        let addresses = narrow_addresses(x, i);
        for n in 0..usize::from(i.count) {
            let rows = x.matrix_rows(&addresses, n, Kind::Read);
            let destination = x.listed(i, n);
            let out = x.warp.registers.words_mut::<u32>(destination);
            // SAFETY: 16 bytes of each row were admitted.
            let row = |g: usize| rows[g].map_or([0; 4], |p| unsafe { p.cast::<[u32; 4]>().read_unaligned() });
            let (quads, _) = out.as_chunks_mut::<4>();
            if i.mode == 0 {
                for (g, quad) in quads.iter_mut().enumerate() {
                    *quad = row(g);
                }
            } else {
                let tile: [[u32; 4]; 8] = [0, 1, 2, 3, 4, 5, 6, 7].map(row);
                for (g, quad) in quads.iter_mut().enumerate() {
                    let half = |r: usize| tile[r][g / 2] >> (16 * (g % 2)) & 0xffff;
                    for (t, word) in quad.iter_mut().enumerate() {
                        *word = half(2 * t) | half(2 * t + 1) << 16;
                    }
                }
            }
        }
        Flow::Next
    }
}

impl Instruction for StoreMatrix {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if !x.converged() {
            return Flow::Next;
        }
        let addresses = narrow_addresses(x, i);
        for n in 0..usize::from(i.count) {
            let words = *x.warp.registers.words::<u32>(x.listed(i, n));
            let mut tile: Tile = [[0; 8]; 8];
            for l in 0..LANES {
                let (g, t) = (l / 4, l % 4);
                let (low, high) = (words[l] as u16, (words[l] >> 16) as u16);
                if i.mode == 1 {
                    (tile[2 * t][g], tile[2 * t + 1][g]) = (low, high);
                } else {
                    (tile[g][2 * t], tile[g][2 * t + 1]) = (low, high);
                }
            }
            let rows = x.matrix_rows(&addresses, n, Kind::Write);
            for (row, to) in tile.iter().zip(rows) {
                if let Some(to) = to {
                    // SAFETY: 16 bytes were admitted.
                    unsafe { to.cast::<[u16; 8]>().write_unaligned(*row) };
                }
            }
        }
        *x.progress += 1;
        Flow::Next
    }
}

/// A 16-bit format of tensor-core operands.
pub(crate) trait Half {
    fn to_f32(bits: u16) -> f32;
}

pub(crate) struct BFloat;
pub(crate) struct Float16;

impl Half for BFloat {
    #[inline(always)]
    fn to_f32(bits: u16) -> f32 {
        bf16_to_f32(bits)
    }
}

impl Half for Float16 {
    #[inline(always)]
    fn to_f32(bits: u16) -> f32 {
        f16_to_f32(bits)
    }
}

/// A word of `tf32`: the tensor core ignores the low 13 bits.
#[inline(always)]
pub(crate) fn tf32(word: u32) -> f32 {
    f32::from_bits(word & 0xffff_e000)
}

/// `c += a b`, column by column of `a`, each step fused.
#[inline(always)]
pub(crate) fn multiply_add<const K: usize>(a: &[[f32; K]; 16], b: &[[f32; 8]; K], c: &mut [[f32; 8]; 16]) {
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

/// Rows of four lanes.
#[inline(always)]
fn quads(row: &Row<u32>) -> &[[u32; 4]; 8] {
    let (quads, _) = row.as_chunks::<4>();
    match quads.try_into() {
        Ok(quads) => quads,
        Err(_) => unreachable!("32 lanes are eight quads"),
    }
}

#[inline(always)]
fn unpack<H: Half>(quad: &[u32; 4], out: &mut [f32]) {
    for t in 0..4 {
        out[2 * t] = H::to_f32(quad[t] as u16);
        out[2 * t + 1] = H::to_f32((quad[t] >> 16) as u16);
    }
}

/// Eight elements, those with even index first: a sum over k may go in any fixed order, and this one needs no
/// interleaving.
#[inline(always)]
fn unpack_even_odd<H: Half>(quad: &[u32; 4], out: &mut [f32]) {
    for t in 0..4 {
        out[t] = H::to_f32(quad[t] as u16);
        out[t + 4] = H::to_f32((quad[t] >> 16) as u16);
    }
}

/// Accumulators of `f32`: lane `4 g + t` has columns `2 t`, `2 t + 1` of rows `g` (first two) and `g + 8`.
#[inline(always)]
pub(crate) fn read_accumulators(x: &Machine<'_>, rows: [u32; 4]) -> [[f32; 8]; 16] {
    let mut c = [[0.0; 8]; 16];
    for (n, row) in rows.into_iter().enumerate() {
        let quads = quads(x.warp.registers.words::<u32>(row));
        for g in 0..8 {
            for t in 0..4 {
                c[g + n / 2 * 8][2 * t + n % 2] = f32::from_bits(quads[g][t]);
            }
        }
    }
    c
}

#[inline(always)]
pub(crate) fn write_accumulators(x: &mut Machine<'_>, rows: [u32; 4], c: &[[f32; 8]; 16]) {
    for (n, row) in rows.into_iter().enumerate() {
        let words = x.warp.registers.words_mut::<u32>(row);
        for l in 0..LANES {
            words[l] = c[l / 4 + n / 2 * 8][2 * (l % 4) + n % 2].to_bits();
        }
    }
}

#[inline(always)]
fn read_half_accumulators(x: &Machine<'_>, rows: [u32; 2]) -> [[f32; 8]; 16] {
    let mut c = [[0.0; 8]; 16];
    for (n, row) in rows.into_iter().enumerate() {
        for (g, quad) in quads(x.warp.registers.words::<u32>(row)).iter().enumerate() {
            unpack::<Float16>(quad, &mut c[g + 8 * n]);
        }
    }
    c
}

#[inline(always)]
fn write_half_accumulators(x: &mut Machine<'_>, rows: [u32; 2], c: &[[f32; 8]; 16]) {
    for (n, row) in rows.into_iter().enumerate() {
        let words = x.warp.registers.words_mut::<u32>(row);
        for l in 0..LANES {
            let (g, t) = (l / 4 + 8 * n, 2 * (l % 4));
            words[l] = u32::from(f32_to_f16(c[g][t])) | u32::from(f32_to_f16(c[g][t + 1])) << 16;
        }
    }
}

/// `mma.m16n8k16` (`K` 16) and `.m16n8k8` (`K` 8) of 16-bit floats.
///
/// The list has the rows of d, a, b, c in the order of the instruction; `mode` 1: `f16` accumulators.
pub(crate) struct Mma<H, const K: usize>(PhantomData<H>);

impl<H: Half, const K: usize> Instruction for Mma<H, K> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if !x.converged() {
            return Flow::Next;
        }
        let sums = if i.mode == 1 { 2 } else { 4 };
        let (a_rows, b_rows) = (K / 4, K / 8);
        let mut a = [[0.0; K]; 16];
        for n in 0..a_rows {
            let words = quads(x.warp.registers.words::<u32>(x.listed(i, sums + n)));
            for g in 0..8 {
                unpack_even_odd::<H>(&words[g], &mut a[g + n % 2 * 8][n / 2 * 8..][..8]);
            }
        }
        let mut b = [[0.0; 8]; K];
        for n in 0..b_rows {
            let words = quads(x.warp.registers.words::<u32>(x.listed(i, sums + a_rows + n)));
            for t in 0..4 {
                for g in 0..8 {
                    b[n * 8 + t][g] = H::to_f32(words[g][t] as u16);
                    b[n * 8 + t + 4][g] = H::to_f32((words[g][t] >> 16) as u16);
                }
            }
        }
        accumulate(x, i, &a, &b, sums + a_rows + b_rows);
        Flow::Next
    }
}

/// `mma.m16n8k8` (`K` 8) and `.m16n8k4` (`K` 4) of `tf32`, with the list of [`Mma`].
pub(crate) struct MmaTf32<const K: usize>;

impl<const K: usize> Instruction for MmaTf32<K> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if !x.converged() {
            return Flow::Next;
        }
        let (a_rows, b_rows) = (K / 2, K / 4);
        let mut a = [[0.0; K]; 16];
        for n in 0..a_rows {
            let words = x.warp.registers.words::<u32>(x.listed(i, 4 + n));
            for l in 0..LANES {
                a[l / 4 + n % 2 * 8][l % 4 + n / 2 * 4] = tf32(words[l]);
            }
        }
        let mut b = [[0.0; 8]; K];
        for n in 0..b_rows {
            let words = x.warp.registers.words::<u32>(x.listed(i, 4 + a_rows + n));
            for l in 0..LANES {
                b[l % 4 + 4 * n][l / 4] = tf32(words[l]);
            }
        }
        accumulate(x, i, &a, &b, 4 + a_rows + b_rows);
        Flow::Next
    }
}

/// Four rows of the list, from `first`.
#[inline(always)]
pub(crate) fn four_rows(x: &Machine<'_>, i: &Inst, first: usize) -> [u32; 4] {
    [x.listed(i, first), x.listed(i, first + 1), x.listed(i, first + 2), x.listed(i, first + 3)]
}

/// `d = a b + c`, with the rows of `c` in the list from `first` and those of `d` at its start.
#[inline(always)]
fn accumulate<const K: usize>(
    x: &mut Machine<'_>,
    i: &Inst,
    a: &[[f32; K]; 16],
    b: &[[f32; 8]; K],
    first: usize,
) {
    if i.mode == 1 {
        let mut c = read_half_accumulators(x, [x.listed(i, first), x.listed(i, first + 1)]);
        multiply_add(a, b, &mut c);
        let rows = [x.listed(i, 0), x.listed(i, 1)];
        write_half_accumulators(x, rows, &c);
    } else {
        let mut c = read_accumulators(x, four_rows(x, i, first));
        multiply_add(a, b, &mut c);
        let rows = four_rows(x, i, 0);
        write_accumulators(x, rows, &c);
    }
}
