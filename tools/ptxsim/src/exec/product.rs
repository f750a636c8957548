//! Products of a warp in registers: `mma`.
//!
//! Everything stays where registers have it. Lane `4 g + t` of the accumulators has rows `g` and `g + 8` of the
//! result, columns `2 t` and `2 t + 1`. A step of the sum multiplies what the four lanes of a row hold of A, one lane
//! after the other, with the columns of B at that depth.

use super::lane::{LANES, Registers, Row};
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

/// Of B four places of the depth, and of each the even columns and the odd ones.
type Columns = [[[f32; 4]; 2]; 4];

/// Where an `mma` of `S` steps has its factors, in the list from `first` on: A and then B. A step is four places of
/// the depth; of two elements in a word the first belong to one step and the second to the next.
struct Factors<'a, E, const S: usize> {
    registers: &'a Registers,
    rows: &'a [u32],
    element: PhantomData<E>,
}

impl<E: Element, const S: usize> Factors<'_, E, S> {
    /// How many rows they have.
    const ROWS: usize = 3 * S / E::PARTS;

    #[inline(always)]
    fn row(&self, n: usize, part: usize) -> Row<f32> {
        let words = self.registers.words::<u32>(self.rows[n]);
        let mut row = [E::part(words[0], part); LANES];
        for l in 0..LANES {
            row[l] = E::part(words[l], part);
        }
        row
    }

    /// Rows of A from 0 and from 8. Lane `4 g + t` has row `g` at place `t`.
    #[inline(always)]
    fn left(&self, step: usize) -> [Row<f32>; 2] {
        let (n, part) = (step / E::PARTS * 2, step % E::PARTS);
        [self.row(n, part), self.row(n + 1, part)]
    }

    #[inline(always)]
    fn right(&self, step: usize) -> Columns {
        let row = self.row((2 * S + step) / E::PARTS, step % E::PARTS);
        let mut columns: Columns = [[[0.0; 4]; 2]; 4];
        for t in 0..4 {
            for p in 0..2 {
                for n in 0..4 {
                    columns[t][p][n] = row[4 * (2 * n + p) + t];
                }
            }
        }
        columns
    }

    /// Each product is added in one rounding, in the order of the steps and places.
    #[inline(always)]
    fn multiply_add(&self, sums: &mut Sums) {
        for step in 0..S {
            let (left, right) = (self.left(step), self.right(step));
            for (left, sums) in left.iter().zip(sums.as_chunks_mut::<2>().0) {
                for t in 0..4 {
                    for two in 0..4 {
                        let (a, b) = (left[8 * two + t], left[8 * two + 4 + t]);
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
        let list = &x.run.kernel.lists[i.list as usize..];
        multiply::<E, S>(&mut x.warp.registers, list, i.mode == 1);
        Flow::Next
    }
}

/// `d = a b + c`, rows of the list in this order; `halves`: `f16` accumulators.
#[inline(always)]
pub(super) fn multiply<E: Element, const S: usize>(registers: &mut Registers, list: &[u32], halves: bool) {
    let (results, list) = list.split_at(if halves { 2 } else { 4 });
    let (rows, list) = list.split_at(Factors::<E, S>::ROWS);
    let words = |n: usize| *registers.words::<u32>(list[n]);
    let mut sums =
        if halves { half_sums(words(0), words(1)) } else { [words(0), words(1), words(2), words(3)] };
    Factors::<E, S> { registers, rows, element: PhantomData }.multiply_add(&mut sums);
    for (n, row) in results.iter().enumerate() {
        *registers.words_mut::<u32>(*row) =
            if halves { half_words(&sums[2 * n], &sums[2 * n + 1]) } else { sums[n] };
    }
}

/// Accumulators of `f16`, rows from 0 and from 8.
#[inline(always)]
fn half_sums(upper: Row<u32>, lower: Row<u32>) -> Sums {
    let mut sums = [upper, upper, lower, lower];
    for (n, row) in sums.iter_mut().enumerate() {
        for word in row {
            *word = Float16::part(*word, n % 2).to_bits();
        }
    }
    sums
}

#[inline(always)]
fn half_words(even: &Row<u32>, odd: &Row<u32>) -> Row<u32> {
    let half = |sum: u32| u32::from(f32_to_f16(f32::from_bits(sum)));
    let mut words = *even;
    for l in 0..LANES {
        words[l] = half(even[l]) | half(odd[l]) << 16;
    }
    words
}
