//! Matrix products of f32 whose factors are rounded to bf16, on processors with AVX-512 BF16: twice the
//! products an instruction. Blocks, panels and strips as in [`super::matmul`], but of pairs: a word holds the
//! elements `2p` and `2p + 1` of the inner dimension, the first in its low half, as `vdpbf16ps` takes them. Sums
//! are f32, in an order fixed by the shapes.
use super::{Cpu, matmul::Mat, transpose::transpose_8x8};
use half::bf16;
use std::arch::x86_64::*;

/// Inner dimension of a block, in pairs.
const DEPTH: usize = 128;
/// Rows of a tile: with two registers to a row its sums take 16 of 32.
const ROWS: usize = 8;
/// Columns of a tile.
const COLUMNS: usize = 32;

/// Whether this processor has the instructions.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
}

/// Words that [`product`] borrows for a left factor of `rows` rows: a panel, and a block in strips.
pub(super) fn space(rows: usize) -> usize {
    DEPTH * COLUMNS + rows.div_ceil(ROWS) * ROWS * DEPTH
}

/// `c = a b`, or `c += a b`, on this thread.
///
/// # Panics
/// Unless [`is_available`], or if shapes differ.
pub(super) fn product(c: &mut [f32], a: Mat<'_, f32>, b: Mat<'_, f32>, accumulate: bool, cpu: &Cpu) {
    assert!(is_available(), "no AVX-512 BF16");
    cpu.scratch(space(a.rows), |spare: &mut [f32]| {
        let (panel, strips) = bytemuck::cast_slice_mut(spare).split_at_mut(DEPTH * COLUMNS);
        #[expect(unsafe_code, reason = "instructions chosen at run time")]
        // SAFETY: the processor has the instructions that the function is compiled for: asserted above.
        unsafe {
            blocks(c, a, b.t(), accumulate, panel, strips);
        }
    });
}

/// `c = a b^T`: both factors are read along their rows.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16")]
fn blocks(
    c: &mut [f32],
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    mut accumulate: bool,
    panel: &mut [u32],
    strips: &mut [u32],
) {
    let (n, k) = (b.rows, a.cols);
    if k == 0 && !accumulate {
        c.fill(0.0);
    }
    for from in (0..k).step_by(2 * DEPTH) {
        let inner = (2 * DEPTH).min(k - from);
        let depth = inner.div_ceil(2);
        for (s, strip) in strips.chunks_mut(depth * ROWS).take(a.rows.div_ceil(ROWS)).enumerate() {
            pack(a, s * ROWS, from, inner, strip.as_chunks_mut::<ROWS>().0);
        }
        for (j, at) in (0..n).step_by(COLUMNS).enumerate() {
            let panel = &mut panel.as_chunks_mut::<COLUMNS>().0[..depth];
            pack(b, j * COLUMNS, from, inner, panel);
            for (s, strip) in strips.chunks(depth * ROWS).take(a.rows.div_ceil(ROWS)).enumerate() {
                let sums = tile(panel, strip.as_chunks::<ROWS>().0);
                for (sum, c) in sums.into_iter().zip(c[s * ROWS * n..].chunks_mut(n)) {
                    store(&mut c[at..n.min(at + COLUMNS)], sum, accumulate);
                }
            }
        }
        accumulate = true;
    }
}

/// The sums of a tile, of a strip of the left factor and a panel of the right.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn tile(panel: &[[u32; COLUMNS]], strip: &[[u32; ROWS]]) -> [[__m512; 2]; ROWS] {
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    for (b, a) in panel.iter().zip(strip) {
        let b: [__m512bh; 2] = bytemuck::cast(*b);
        for (sums, a) in sums.iter_mut().zip(a) {
            let a = bytemuck::cast::<__m512i, __m512bh>(_mm512_set1_epi32(*a as i32));
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = _mm512_dpbf16_ps(*sum, a, b);
            }
        }
    }
    sums
}

/// Writes or adds one row of a tile, of which the last panel has fewer columns.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn store(c: &mut [f32], sum: [__m512; 2], accumulate: bool) {
    let mut sum: [f32; COLUMNS] = bytemuck::cast(sum);
    match <&mut [f32; COLUMNS]>::try_from(&mut *c) {
        Ok(c) if accumulate => c.iter_mut().zip(sum).for_each(|(c, x)| *c += x),
        Ok(c) => *c = sum,
        Err(_) => {
            if accumulate {
                sum.iter_mut().zip(&*c).for_each(|(x, c)| *x += c);
            }
            c.copy_from_slice(&sum[..c.len()]);
        }
    }
}

/// `to[p][w]` is the pair of the elements `from + 2p` and `from + 2p + 1` of row `at + w`: `inner` elements of
/// `W` rows. What lies beyond the matrix is zero.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn pack<const W: usize>(x: Mat<'_, f32>, at: usize, from: usize, inner: usize, to: &mut [[u32; W]]) {
    let whole = at + W <= x.rows;
    let mut done = 0;
    if whole && x.col_stride == 1 {
        done = inner / (2 * LANES);
        for (p, to) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate().take(done) {
            pack_rows(x, at, from + p * 2 * LANES, to);
        }
        done *= LANES;
    } else if whole && x.row_stride == 1 {
        done = inner / 2;
        for (p, to) in to.iter_mut().enumerate().take(done) {
            pack_columns(x.t(), at, from + 2 * p, to);
        }
    }
    for (p, to) in to.iter_mut().enumerate().skip(done) {
        for (w, to) in to.iter_mut().enumerate() {
            let of = |k: usize| match at + w < x.rows && k < from + inner {
                true => u32::from(bf16::from_f32(x.at(at + w, k)).to_bits()),
                false => 0,
            };
            *to = of(from + 2 * p) | of(from + 2 * p + 1) << 16;
        }
    }
}

/// Pairs that a block has of every row.
const LANES: usize = 8;

/// Blocks of 8 pairs of each row, transposed.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn pack_rows<const W: usize>(x: Mat<'_, f32>, at: usize, from: usize, to: &mut [[u32; W]; LANES]) {
    let Some(v3) = pulp::x86::V3::try_new() else { return };
    for w in (0..W).step_by(LANES) {
        let mut block = [_mm256_setzero_ps(); LANES];
        for (i, block) in block.iter_mut().enumerate() {
            let row = x.run(at + w + i, from, 2 * LANES);
            let [low, high] = halves(row);
            *block = bytemuck::cast(_mm256_cvtne2ps_pbh(high, low));
        }
        for (to, pairs) in to.iter_mut().zip(transpose_8x8(v3, block)) {
            to[w..w + LANES].copy_from_slice(&bytemuck::cast::<__m256, [u32; LANES]>(pairs));
        }
    }
}

/// One pair of each column, from two rows.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn pack_columns<const W: usize>(x: Mat<'_, f32>, at: usize, from: usize, to: &mut [u32; W]) {
    // Where the halves of the pairs lie among the low elements and, behind them, the high ones.
    const INTERLEAVED: [u16; 16] = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15];
    let (low, high) = (x.run(from, at, W), x.run(from + 1, at, W));
    let low = low.as_chunks::<LANES>().0.iter();
    for ((low, high), to) in low.zip(high.as_chunks::<LANES>().0).zip(to.as_chunks_mut::<LANES>().0) {
        let halves = _mm256_cvtne2ps_pbh(bytemuck::cast(*high), bytemuck::cast(*low));
        *to = bytemuck::cast(_mm256_permutexvar_epi16(bytemuck::cast(INTERLEAVED), bytemuck::cast(halves)));
    }
}

/// The first 16 elements of a slice as two registers.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn halves(x: &[f32]) -> [__m256; 2] {
    let mut all = [0.0; 2 * LANES];
    all.copy_from_slice(x);
    bytemuck::cast(all)
}
