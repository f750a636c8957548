//! Products of a warp in registers: `mma`.
//!
//! Everything stays where registers have it. Lane `4 g + t` of the accumulators has rows `g` and `g + 8` of the
//! result, columns `2 t` and `2 t + 1`. A step of the sum multiplies what the four lanes of a row hold of A, one lane
//! after the other, with the columns of B at that depth.

use super::lane::{LANES, Row};
use super::{Flow, Inst, Instruction, Machine};
use crate::math::{bf16_to_f32, f16_to_f32, f32_to_f16};
use std::marker::PhantomData;

/// The elements of a factor: one or two in a word.
pub(crate) trait Element {
    /// How many.
    const PARTS: usize;
    fn part(word: u32, part: usize) -> f32;
}

pub(crate) struct BFloat;
pub(crate) struct Float16;
pub(crate) struct Tf32;

impl Element for BFloat {
    const PARTS: usize = 2;

    #[inline(always)]
    fn part(word: u32, part: usize) -> f32 {
        bf16_to_f32((word >> (16 * part)) as u16)
    }
}

impl Element for Float16 {
    const PARTS: usize = 2;

    #[inline(always)]
    fn part(word: u32, part: usize) -> f32 {
        f16_to_f32((word >> (16 * part)) as u16)
    }
}

/// The tensor core ignores the low 13 bits of the word.
impl Element for Tf32 {
    const PARTS: usize = 1;

    #[inline(always)]
    fn part(word: u32, _: usize) -> f32 {
        f32::from_bits(word & 0xffff_e000)
    }
}

/// The bits of the accumulators: of rows from 0 columns `2 t`, then `2 t + 1`; the same of rows from 8.
type Sums = [Row<u32>; 4];

/// Both factors, in `S` steps of four places of the depth. Of two elements in a word the first are one step and the
/// second the next.
#[repr(align(64))]
struct Factors<const S: usize> {
    /// Lane `4 g + t`: row `g`, or `g + 8`, at place `t`.
    left: [[Row<f32>; 2]; S],
    /// At place `t` the even columns and the odd ones.
    right: [[[[f32; 4]; 2]; 4]; S],
}

impl<const S: usize> Factors<S> {
    /// The factors whose rows the list has from `first` on: A and then B.
    #[inline(always)]
    fn read<E: Element>(x: &Machine<'_>, i: &Inst, first: usize) -> Self {
        let row = |n: usize, part: usize| {
            let words = x.warp.registers.words::<u32>(x.listed(i, first + n));
            let mut row = [E::part(words[0], part); LANES];
            for l in 0..LANES {
                row[l] = E::part(words[l], part);
            }
            row
        };
        let left = |s: usize| [0, 1].map(|h| row(s / E::PARTS * 2 + h, s % E::PARTS));
        let right = |s: usize| {
            let row = row((2 * S + s) / E::PARTS, s % E::PARTS);
            let columns = |first: usize| [row[first], row[first + 8], row[first + 16], row[first + 24]];
            [0, 1, 2, 3].map(|t| [columns(t), columns(4 + t)])
        };
        Self { left: std::array::from_fn(left), right: std::array::from_fn(right) }
    }

    /// Each product is added in one rounding, in the order of the steps and places.
    #[inline(always)]
    fn multiply_add(&self, sums: &mut Sums) {
        for (h, sums) in sums.chunks_exact_mut(2).enumerate() {
            for (left, right) in self.left.iter().zip(&self.right) {
                for t in 0..4 {
                    for two in 0..4 {
                        let (a, b) = (left[h][8 * two + t], left[h][8 * two + 4 + t]);
                        let a = [a, a, a, a, b, b, b, b];
                        for (sums, right) in sums.iter_mut().zip(&right[t]) {
                            for l in 0..8 {
                                let sum = &mut sums[8 * two + l];
                                *sum = a[l].mul_add(right[l % 4], f32::from_bits(*sum)).to_bits();
                            }
                        }
                    }
                }
            }
        }
    }

    /// [`multiply_add`](Self::multiply_add) with half a warp in a vector.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn multiply_add_wide(&self, sums: &mut Sums) {
        use std::arch::x86_64::{
            _mm_loadu_ps, _mm512_broadcast_f32x4, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_permutevar_ps,
            _mm512_set1_epi32, _mm512_storeu_ps,
        };
        // SAFETY: a row is two vectors of 16 lanes.
        let load = |row: *const f32| [0, 16].map(|l| unsafe { _mm512_loadu_ps(row.add(l)) });
        let mut c = [0, 1, 2, 3].map(|n: usize| load(sums[n].as_ptr().cast()));
        for (left, right) in self.left.iter().zip(&self.right) {
            let left = [load(left[0].as_ptr()), load(left[1].as_ptr())];
            for t in 0..4 {
                // SAFETY: four columns are a vector of four.
                let b = [0, 1].map(|p: usize| unsafe { _mm_loadu_ps(right[t][p].as_ptr()) });
                let b = b.map(|b| _mm512_broadcast_f32x4(b));
                for (h, left) in left.iter().enumerate() {
                    for v in 0..2 {
                        let a = _mm512_permutevar_ps(left[v], _mm512_set1_epi32(t as i32));
                        for p in 0..2 {
                            c[2 * h + p][v] = _mm512_fmadd_ps(a, b[p], c[2 * h + p][v]);
                        }
                    }
                }
            }
        }
        for (row, c) in sums.iter_mut().zip(c) {
            for v in 0..2 {
                // SAFETY: as above.
                unsafe { _mm512_storeu_ps(row.as_mut_ptr().cast::<f32>().add(16 * v), c[v]) };
            }
        }
    }
}

/// `mma` of 16 rows and 8 columns, `4 S` deep.
///
/// The list has the rows of d, a, b, c in the order of the instruction; `mode` 1: `f16` accumulators.
pub(crate) struct Mma<E, const S: usize>(PhantomData<E>);

impl<E: Element, const S: usize> Instruction for Mma<E, S> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if !x.converged() {
            return Flow::Next;
        }
        #[cfg(target_arch = "x86_64")]
        if x.run.wide_host {
            // SAFETY: the host has AVX-512.
            unsafe { multiply_wide::<E, S>(x, i) };
            return Flow::Next;
        }
        multiply::<E, S>(x, i, Factors::multiply_add);
        Flow::Next
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn multiply_wide<E: Element, const S: usize>(x: &mut Machine<'_>, i: &Inst) {
    multiply::<E, S>(x, i, |factors, sums| factors.multiply_add_wide(sums));
}

/// `d = a b + c`
#[inline(always)]
fn multiply<E: Element, const S: usize>(
    x: &mut Machine<'_>,
    i: &Inst,
    multiply_add: impl FnOnce(&Factors<S>, &mut Sums),
) {
    let halves = i.mode == 1;
    let results = if halves { 2 } else { 4 };
    let factors = Factors::<S>::read::<E>(x, i, results);
    let first = results + 3 * S / E::PARTS;
    let words = |n: usize| *x.warp.registers.words::<u32>(x.listed(i, first + n));
    let mut sums: Sums = [0, 1, 2, 3].map(|n| {
        if halves { words(n / 2).map(|w| Float16::part(w, n % 2).to_bits()) } else { words(n) }
    });
    multiply_add(&factors, &mut sums);
    for n in 0..results {
        let row = x.listed(i, n);
        let words = x.warp.registers.words_mut::<u32>(row);
        if halves {
            let half = |sum: u32| u32::from(f32_to_f16(f32::from_bits(sum)));
            for l in 0..LANES {
                words[l] = half(sums[2 * n][l]) | half(sums[2 * n + 1][l]) << 16;
            }
        } else {
            *words = sums[n];
        }
    }
}
