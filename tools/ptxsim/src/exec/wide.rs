//! `mma` of `bf16` for hosts with AVX-512, where a row of registers is two vectors: [`product`](super::product) with
//! the same bits in half the time.
#![cfg(target_arch = "x86_64")]

use super::lane::{Registers, Row};
use super::{Flow, Inst, Instruction, Machine};
use std::arch::x86_64::*;

/// `mma` of 16 rows and 8 columns, `8 N` deep: A has `2 N` rows of registers, B has `N`.
pub(crate) struct WideMma<const N: usize>;

impl<const N: usize> Instruction for WideMma<N> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if x.converged() {
            let list = &x.run.kernel.lists[i.list as usize..][..8 + 3 * N];
            // SAFETY: the decoder chooses this instruction where the host has AVX-512.
            unsafe { multiply::<N>(&mut x.warp.registers, list) };
        }
        Flow::Next
    }
}

// No closures over vectors in here: those that `map` of an array calls are not compiled for AVX-512.

/// Half a row of registers.
#[target_feature(enable = "avx512f")]
#[inline]
fn load(row: &Row<u32>, half: usize) -> __m512i {
    let words = &row[16 * half..][..16];
    // SAFETY: a vector is 16 words.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store(row: &mut Row<u32>, half: usize, values: __m512) {
    let words = &mut row[16 * half..][..16];
    // SAFETY: a vector is 16 words.
    unsafe { _mm512_storeu_ps(words.as_mut_ptr().cast(), values) };
}

/// `d = a b + c`, rows of the list in this order.
#[target_feature(enable = "avx512f,avx512vl")]
fn multiply<const N: usize>(registers: &mut Registers, list: &[u32]) {
    let row = |n: usize| registers.words::<u32>(list[n]);
    let mut sums = [[_mm512_setzero_ps(); 2]; 4];
    for n in 0..4 {
        for v in 0..2 {
            sums[n][v] = _mm512_castsi512_ps(load(row(4 + 3 * N + n), v));
        }
    }
    for n in 0..N {
        let mut columns = [[_mm_setzero_ps(); 4]; 2];
        transpose(row(4 + 2 * N + n), &mut columns);
        for part in 0..2 {
            for t in 0..4 {
                let place = _mm512_set1_epi32(t as i32);
                let right = [columns[0][t], columns[1][t]];
                let right = [spread(right[0], part), spread(right[1], part)];
                for h in 0..2 {
                    for v in 0..2 {
                        let left = element(load(row(4 + 2 * n + h), v), part);
                        let left = _mm512_permutevar_ps(left, place);
                        for p in 0..2 {
                            sums[2 * h + p][v] = _mm512_fmadd_ps(left, right[p], sums[2 * h + p][v]);
                        }
                    }
                }
            }
        }
    }
    for n in 0..4 {
        for v in 0..2 {
            store(registers.words_mut::<u32>(list[n]), v, sums[n][v]);
        }
    }
}

/// The lower or the upper element of each word.
#[target_feature(enable = "avx512f")]
#[inline]
fn element(words: __m512i, part: usize) -> __m512 {
    _mm512_castsi512_ps(match part {
        0 => _mm512_slli_epi32::<16>(words),
        _ => _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32)),
    })
}

/// [`element`] of four columns, for each row of the result.
#[target_feature(enable = "avx512f")]
#[inline]
fn spread(columns: __m128, part: usize) -> __m512 {
    element(_mm512_castps_si512(_mm512_broadcast_f32x4(columns)), part)
}

/// Of a row of B the even and the odd columns, by place.
#[target_feature(enable = "sse2")]
#[inline]
fn transpose(row: &Row<u32>, columns: &mut [[__m128; 4]; 2]) {
    let quads = row.as_chunks::<4>().0;
    for (p, places) in columns.iter_mut().enumerate() {
        let mut rows = [_mm_setzero_ps(); 4];
        for (n, row) in rows.iter_mut().enumerate() {
            // SAFETY: four words are a vector of four.
            *row = unsafe { _mm_loadu_ps(quads[2 * n + p].as_ptr().cast()) };
        }
        let (ab, cd) = (_mm_unpacklo_ps(rows[0], rows[1]), _mm_unpacklo_ps(rows[2], rows[3]));
        let (upper_ab, upper_cd) = (_mm_unpackhi_ps(rows[0], rows[1]), _mm_unpackhi_ps(rows[2], rows[3]));
        *places = [
            _mm_movelh_ps(ab, cd),
            _mm_movehl_ps(cd, ab),
            _mm_movelh_ps(upper_ab, upper_cd),
            _mm_movehl_ps(upper_cd, upper_ab),
        ];
    }
}

#[cfg(test)]
mod tests {
    use super::super::product::{self, BFloat};
    use super::super::team::Random;
    use super::super::wide_host;
    use super::*;

    /// Elements at the edges: zeros, subnormals, the least normal number, one, the largest, infinity, NaN.
    const EDGES: [u32; 12] =
        [0, 0x8000, 1, 0x8001, 0x7f, 0x80, 0x3f80, 0xbf80, 0x7f7f, 0xff7f, 0x7f80, 0x7fc1];

    /// A word of two elements: of any bits, near one, or at the edges.
    fn word(random: &mut Random, kind: u64) -> u32 {
        let bits = random.next();
        match kind {
            0 => bits as u32,
            1 => bits as u32 & 0x80ff_80ff | 0x3f00_3f00,
            _ => EDGES[bits as usize % 12] | EDGES[(bits >> 32) as usize % 12] << 16,
        }
    }

    fn sums(words: &[Row<u32>], multiply: impl FnOnce(&mut Registers, &[u32])) -> Vec<u32> {
        let mut registers = Registers::new(words.len() as u32, 0);
        for (row, words) in words.iter().enumerate() {
            *registers.words_mut::<u32>(row as u32) = *words;
        }
        multiply(&mut registers, &(0..words.len() as u32).collect::<Vec<_>>());
        // Which of two NaN goes on is open.
        let known = |bits: u32| if f32::from_bits(bits).is_nan() { f32::NAN.to_bits() } else { bits };
        (0..4).flat_map(|row| registers.words::<u32>(row).map(known)).collect()
    }

    fn agree<const N: usize, const S: usize>() {
        let mut random = Random(N as u64);
        for turn in 0..300 {
            let words: Vec<Row<u32>> =
                (0..8 + 3 * N).map(|_| std::array::from_fn(|_| word(&mut random, turn % 3))).collect();
            // SAFETY: the caller asked whether the host has AVX-512.
            let wide = sums(&words, |registers, list| unsafe { multiply::<N>(registers, list) });
            let plain =
                sums(&words, |registers, list| product::multiply::<BFloat, S>(registers, list, false));
            assert_eq!(wide, plain, "turn {turn}");
        }
    }

    #[test]
    fn has_the_bits_of_the_portable_product() {
        if wide_host() {
            agree::<1, 2>();
            agree::<2, 4>();
        }
    }
}
