//! Matrix products in the manner of Goto and van de Geijn (2008): every piece of the result packs the
//! right factor panel by panel, each of which stays in cache while the rows of the piece pass by, and sums
//! tiles of the result in registers. Every element is summed in an order fixed by the shapes alone: over
//! the inner dimension, in blocks of [`DEPTH`].
#[cfg(target_arch = "x86_64")]
use super::bf16;
use super::{Cpu, Real, axpy, dot, simd, transpose};
use crate::tensor::DType;
use rayon::prelude::*;

/// Inner dimension of a block: a panel of it fits the first-level cache.
const DEPTH: usize = 256;
/// Products of so few rows read the right factor once, where it lies.
pub const FEW: usize = 4;
/// Elements of the right factor that one parallel task meets a few rows with.
const TASK: usize = 16 * 1024;

/// What the factors of a matrix product of f32 may be rounded to; sums are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Nothing.
    #[default]
    F32,
    /// bf16, where the machine is faster with it: a CPU that has AVX-512 BF16. Products of few rows are not
    /// rounded.
    Bf16,
}

impl Precision {
    /// Whether this machine rounds for it.
    pub fn rounds(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Precision::Bf16 && bf16::is_available();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// That of a product with so many rows: few are not rounded.
    pub fn of_rows(self, rows: usize) -> Precision {
        if rows <= FEW { Precision::F32 } else { self }
    }
}

/// A strided matrix.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a, T> {
    data: &'a [T],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// Contiguous row-major `rows x cols`.
    ///
    /// # Panics
    /// If `data` is shorter.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Mat { data: &data[..rows * cols], rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Itself, if it is of f32.
    #[cfg(target_arch = "x86_64")]
    fn single(self) -> Mat<'a, f32>
    where
        T: bytemuck::Pod,
    {
        let Mat { data, rows, cols, row_stride, col_stride } = self;
        Mat { data: bytemuck::cast_slice(data), rows, cols, row_stride, col_stride }
    }

    /// Its transpose.
    pub fn t(self) -> Self {
        let Mat { data, rows, cols, row_stride, col_stride } = self;
        Mat { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }

    /// Rows `at..at + n`.
    pub fn rows(self, at: usize, n: usize) -> Self {
        Mat { data: &self.data[(at * self.row_stride).min(self.data.len())..], rows: n, ..self }
    }

    /// The element of row `i` and column `j`.
    #[inline(always)]
    pub(super) fn at(&self, i: usize, j: usize) -> T
    where
        T: Copy,
    {
        self.data[i * self.row_stride + j * self.col_stride]
    }

    /// `n` neighbours in row `i` from column `j` on; only where rows are contiguous.
    #[inline(always)]
    pub(super) fn run(&self, i: usize, j: usize, n: usize) -> &'a [T] {
        &self.data[i * self.row_stride + j..][..n]
    }
}

/// `c = a b`, or `c += a b`; `c` is contiguous and row-major. Rows of `c` are shared out among
/// threads.
pub fn matmul<T: Real>(
    c: &mut [T],
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    accumulate: bool,
    precision: Precision,
    cpu: &Cpu,
) {
    let (m, n) = (a.rows, b.cols);
    if m * n == 0 {
        return;
    }
    if m <= FEW {
        return few(&mut c[..m * n], a, b, accumulate);
    }
    let step = piece_rows(m);
    c[..m * n].par_chunks_mut(step * n).enumerate().for_each(|(i, c)| {
        matmul_rows(c, a.rows(i * step, c.len() / n), b, accumulate, precision, cpu);
    });
}

/// Rows of one parallel piece of a product with `m` rows: one piece for each thread, since every piece
/// packs the right factor again. That costs less than to pass it between the caches of processors. No
/// sum crosses pieces, so how many there are changes no bit.
pub fn piece_rows(m: usize) -> usize {
    rows_of_piece(m, rayon::current_num_threads())
}

fn rows_of_piece(m: usize, threads: usize) -> usize {
    m.div_ceil(threads).next_multiple_of(if m < PIECE * threads { STRIP } else { PIECE })
}

/// As [`matmul`], on this thread; for some rows of a product of more than [`FEW`].
///
/// # Panics
/// If the inner dimensions differ or `c` is shorter than the product.
pub fn matmul_rows<T: Real>(
    c: &mut [T],
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    accumulate: bool,
    precision: Precision,
    cpu: &Cpu,
) {
    assert!(a.cols == b.rows, "inner dimensions {} and {}", a.cols, b.rows);
    let c = &mut c[..a.rows * b.cols];
    #[cfg(target_arch = "x86_64")]
    if T::DTYPE == DType::F32 && precision.rounds() {
        return bf16::product(bytemuck::cast_slice_mut(c), a.single(), b.single(), accumulate, cpu);
    }
    cpu.scratch(DEPTH * PANEL + strips_len(a.rows, a.col_stride == 1), |spare: &mut [T]| {
        let (packed, strips) = spare.split_at_mut(DEPTH * PANEL);
        pulp::Arch::new().dispatch(Product { c, a, b, accumulate, packed, strips });
    });
}

/// Elements of a block of the left factor in strips.
fn strips_len(rows: usize, contiguous: bool) -> usize {
    if contiguous { 0 } else { rows.div_ceil(SHORT) * STRIP * DEPTH }
}

/// Bytes that [`matmul_rows`] borrows for `rows` rows of a left factor of `dtype`, contiguous or not.
pub fn rows_space(rows: usize, contiguous: bool, dtype: DType, precision: Precision) -> usize {
    #[cfg(target_arch = "x86_64")]
    if dtype != DType::F64 && precision.rounds() {
        return 4 * bf16::space(rows);
    }
    (DEPTH * PANEL + strips_len(rows, contiguous)) * dtype.accumulator().size()
}

/// Bytes that [`matmul`] borrows at the same time for a left factor of `m` rows, one buffer for each piece.
pub fn product_space(
    m: usize,
    contiguous: bool,
    dtype: DType,
    precision: Precision,
    threads: usize,
) -> Vec<usize> {
    if m <= FEW {
        return vec![];
    }
    let rows = rows_of_piece(m, threads);
    vec![rows_space(rows.min(m), contiguous, dtype, precision); m.div_ceil(rows)]
}

/// Most columns of a panel.
const PANEL: usize = 32;

/// A few rows: columns are shared out among threads.
fn few<T: Real>(c: &mut [T], a: Mat<'_, T>, b: Mat<'_, T>, accumulate: bool) {
    let (k, n) = (b.rows, b.cols);
    let columns = (TASK / k.max(1)).clamp(1, n);
    for (i, c) in c.chunks_mut(n).enumerate() {
        let row = a.rows(i, 1);
        c.par_chunks_mut(columns)
            .enumerate()
            .for_each(|(t, c)| simd!(few_columns(c, row, b, t * columns, accumulate)));
    }
}

#[inline(always)]
fn few_columns<T: Real>(c: &mut [T], a: Mat<'_, T>, b: Mat<'_, T>, from: usize, accumulate: bool) {
    if !accumulate {
        c.fill(T::ZERO);
    }
    if b.row_stride == 1 && a.col_stride == 1 {
        let (a, b) = (a.run(0, 0, b.rows), b.t());
        for (j, c) in c.iter_mut().enumerate() {
            *c += dot(a, b.run(from + j, 0, b.cols));
        }
    } else {
        for p in 0..b.rows {
            let x = a.data[p * a.col_stride];
            if b.col_stride == 1 {
                axpy(c, x, b.run(p, from, c.len()));
            } else {
                let column = &b.data[p * b.row_stride..];
                c.iter_mut().enumerate().for_each(|(j, c)| *c += x * column[(from + j) * b.col_stride]);
            }
        }
    }
}

/// Rows from `from` on of the columns `at..at + W`.
#[inline(always)]
fn pack_panel<T: Real, const W: usize>(b: Mat<'_, T>, from: usize, at: usize, to: &mut [[T; W]]) {
    let width = W.min(b.cols - at);
    if width < W {
        to.fill([T::ZERO; W]);
    }
    if b.col_stride == 1 {
        for (p, to) in to.iter_mut().enumerate() {
            match <&[T; W]>::try_from(b.run(from + p, at, width)) {
                Ok(whole) => *to = *whole,
                Err(_) => to[..width].copy_from_slice(b.run(from + p, at, width)),
            }
        }
    } else if b.row_stride == 1 && width == W {
        let columns: [&[T]; W] = std::array::from_fn(|w| b.t().run(at + w, from, to.len()));
        transpose(columns, to);
    } else {
        for (p, to) in to.iter_mut().enumerate() {
            for (w, to) in to.iter_mut().enumerate().take(width) {
                *to = b.data[(from + p) * b.row_stride + (at + w) * b.col_stride];
            }
        }
    }
}

/// Rows of a tile on a processor with AVX2, the fewest of all but those without vectors.
const SHORT: usize = 6;
/// Most rows of a tile, padded to whole vectors.
const STRIP: usize = 8;
/// Pieces are whole tiles on every processor but for the last, where there are enough rows for that.
const PIECE: usize = 24;

/// Some rows of a product.
struct Product<'a, 'b, T> {
    c: &'a mut [T],
    a: Mat<'b, T>,
    b: Mat<'b, T>,
    accumulate: bool,
    /// Room for a panel of `b`.
    packed: &'a mut [T],
    /// Room for a block of `a` in strips, where its rows are not contiguous.
    strips: &'a mut [T],
}

impl<T: Real> pulp::WithSimd for Product<'_, '_, T> {
    type Output = ();

    /// A tile of `R` rows and `N` vectors takes `R N` registers: 12 of the 16 of AVX2, 16 of the 32 of AVX-512 and
    /// of Neon.
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        match S::F32_LANES {
            16 => self.run::<S, 8, STRIP, 2>(simd),
            8 => self.run::<S, SHORT, STRIP, 2>(simd),
            4 => self.run::<S, 4, 4, 4>(simd),
            _ if T::DTYPE == DType::F64 => self.run::<S, 2, 2, 8>(simd),
            _ => self.run::<S, 2, 2, 16>(simd),
        }
    }
}

impl<T: Real> Product<'_, '_, T> {
    #[inline(always)]
    fn run<S: pulp::Simd, const R: usize, const P: usize, const N: usize>(self, simd: S) {
        let Product { c, a, b, mut accumulate, packed, strips } = self;
        let (n, width) = (b.cols, size_of::<[T::Vector<S>; N]>() / size_of::<T>());
        if a.cols == 0 && !accumulate {
            c.fill(T::ZERO);
        }
        for from in (0..a.cols).step_by(DEPTH) {
            let depth = DEPTH.min(a.cols - from);
            let strips = strips.as_chunks_mut::<P>().0;
            if a.col_stride != 1 {
                pack_strips::<T, R, P>(a, from, depth, strips);
            }
            for j in (0..n).step_by(width) {
                let packed = &mut packed[..depth * width];
                match width {
                    8 => pack_panel(b, from, j, packed.as_chunks_mut::<8>().0),
                    16 => pack_panel(b, from, j, packed.as_chunks_mut::<16>().0),
                    _ => pack_panel(b, from, j, packed.as_chunks_mut::<PANEL>().0),
                }
                let panel = bytemuck::cast_slice::<T, T::Vector<S>>(packed).as_chunks::<N>().0;
                for i in (0..a.rows).step_by(R) {
                    let sum = if a.col_stride == 1 {
                        let mut rows = [&[][..]; R];
                        for (r, row) in rows.iter_mut().enumerate() {
                            *row = a.run((i + r).min(a.rows - 1), from, depth);
                        }
                        tile_of_rows::<T, S, R, N>(simd, panel, rows)
                    } else {
                        tile_of_strip::<T, S, R, P, N>(simd, panel, &strips[i / R * depth..][..depth])
                    };
                    for (r, sum) in sum.iter().enumerate().take(a.rows - i) {
                        store(simd, &mut c[(i + r) * n + j..][..width.min(n - j)], sum, accumulate);
                    }
                }
            }
            accumulate = true;
        }
    }
}

/// A tile of the result, of a panel of the right factor and `R` rows of the left.
#[inline(always)]
fn tile_of_rows<T: Real, S: pulp::Simd, const R: usize, const N: usize>(
    simd: S,
    b: &[[T::Vector<S>; N]],
    rows: [&[T]; R],
) -> [[T::Vector<S>; N]; R] {
    let mut sum = [[T::splat(simd, T::ZERO); N]; R];
    let (turns, rest) = b.as_chunks::<UNROLL>();
    let mut a = [&[][..]; R];
    for r in 0..R {
        a[r] = &rows[r].as_chunks::<UNROLL>().0[..turns.len()];
    }
    for (t, b) in turns.iter().enumerate() {
        for u in 0..UNROLL {
            for r in 0..R {
                add_product::<T, S, N>(simd, &mut sum[r], a[r][t][u], &b[u]);
            }
        }
    }
    for (p, b) in rest.iter().enumerate() {
        for r in 0..R {
            add_product::<T, S, N>(simd, &mut sum[r], rows[r][turns.len() * UNROLL + p], b);
        }
    }
    sum
}

/// A tile of the result, of a panel of the right factor and a strip of the left.
#[inline(always)]
fn tile_of_strip<T: Real, S: pulp::Simd, const R: usize, const P: usize, const N: usize>(
    simd: S,
    b: &[[T::Vector<S>; N]],
    a: &[[T; P]],
) -> [[T::Vector<S>; N]; R] {
    let mut sum = [[T::splat(simd, T::ZERO); N]; R];
    let ((b_turns, b_rest), (a_turns, a_rest)) = (b.as_chunks::<UNROLL>(), a.as_chunks::<UNROLL>());
    for (b, a) in b_turns.iter().zip(a_turns) {
        for u in 0..UNROLL {
            for r in 0..R {
                add_product::<T, S, N>(simd, &mut sum[r], a[u][r], &b[u]);
            }
        }
    }
    for (b, a) in b_rest.iter().zip(a_rest) {
        for r in 0..R {
            add_product::<T, S, N>(simd, &mut sum[r], a[r], b);
        }
    }
    sum
}

/// How often the loops over the inner dimension are unrolled.
const UNROLL: usize = 4;

/// One row of a tile: `sum += a b`.
#[inline(always)]
fn add_product<T: Real, S: pulp::Simd, const N: usize>(
    simd: S,
    sum: &mut [T::Vector<S>; N],
    a: T,
    b: &[T::Vector<S>; N],
) {
    let a = T::splat(simd, a);
    for v in 0..N {
        sum[v] = T::fma(simd, a, b[v], sum[v]);
    }
}

/// Writes or adds one row of a tile, of which the last panel has fewer columns.
#[inline(always)]
fn store<T: Real, S: pulp::Simd, const N: usize>(
    simd: S,
    c: &mut [T],
    sum: &[T::Vector<S>; N],
    accumulate: bool,
) {
    if c.len() == size_of_val(sum) / size_of::<T>() {
        let c = bytemuck::cast_slice_mut::<T, T::Vector<S>>(c);
        for (c, sum) in c.iter_mut().zip(sum) {
            *c = if accumulate { T::fma(simd, T::splat(simd, T::ONE), *c, *sum) } else { *sum };
        }
    } else {
        for (c, sum) in c.iter_mut().zip(bytemuck::cast_slice::<T::Vector<S>, T>(sum)) {
            *c = if accumulate { *c + *sum } else { *sum };
        }
    }
}

/// Columns `from..from + depth` of `a` in strips of `R` rows, padded to `P`: `[m / R][depth][P]`. What
/// lies beyond the last row stays arbitrary: it reaches rows of tiles that are not stored.
#[inline(always)]
fn pack_strips<T: Real, const R: usize, const P: usize>(
    a: Mat<'_, T>,
    from: usize,
    depth: usize,
    strips: &mut [[T; P]],
) {
    // Several strips at once, so that a line of memory is read once.
    for first in (0..a.rows).step_by(TOGETHER * R) {
        for p in 0..depth {
            for i in (first..a.rows.min(first + TOGETHER * R)).step_by(R) {
                let to = &mut strips[i / R * depth + p];
                if a.row_stride == 1 && i + P <= a.rows {
                    to.copy_from_slice(a.t().run(from + p, i, P));
                } else {
                    for (r, to) in to.iter_mut().enumerate().take(R.min(a.rows - i)) {
                        *to = a.data[(i + r) * a.row_stride + (from + p) * a.col_stride];
                    }
                }
            }
        }
    }
}

/// Strips that are packed together.
const TOGETHER: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Real>(m: usize, n: usize, k: usize) {
        let cpu = Cpu::default();
        let a: Vec<T> = (0..m * k).map(|i| T::of((i * 7 % 13) as f64 - 6.0)).collect();
        let b: Vec<T> = (0..k * n).map(|i| T::of((i * 5 % 11) as f64 - 5.0)).collect();
        let turned = |x: &[T], rows: usize, cols: usize| -> Vec<T> {
            (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
        };
        let (at, bt) = (turned(&a, m, k), turned(&b, k, n));
        let (at, bt) = (Mat::new(&at, k, m).t(), Mat::new(&bt, n, k).t());
        let (a, b) = (Mat::new(&a, m, k), Mat::new(&b, k, n));
        let want = |i: usize, j: usize| {
            (0..k).map(|p| a.data[i * k + p].f64() * b.data[p * n + j].f64()).sum::<f64>()
        };
        let mut c = vec![T::ONE; m * n];
        // Small integers: every order of summing is exact, and so is bf16.
        for precision in [Precision::F32, Precision::Bf16] {
            for (times, (a, b)) in [(a, b), (a, bt), (at, b), (at, bt)].into_iter().enumerate() {
                matmul(&mut c, a, b, times > 0, precision, &cpu);
                for i in 0..m {
                    for j in 0..n {
                        let want = (times + 1) as f64 * want(i, j);
                        let have = c[i * n + j].f64();
                        assert_eq!(have, want, "{m}x{n}x{k} at {i},{j}, {precision:?} product {times}");
                    }
                }
            }
        }
    }

    /// Without vectors, the same numbers.
    fn scalar<T: Real>() {
        let (m, n, k) = (5, 19, 11);
        let a: Vec<T> = (0..m * k).map(|i| T::of((i * 7 % 13) as f64 - 6.0)).collect();
        let b: Vec<T> = (0..k * n).map(|i| T::of((i * 5 % 11) as f64 - 5.0)).collect();
        let (a, b) = (Mat::new(&a, m, k), Mat::new(&b, k, n));
        let mut want = vec![T::ZERO; m * n];
        matmul(&mut want, a, b, false, Precision::F32, &Cpu::default());
        let (mut have, mut packed) = (vec![T::ZERO; m * n], vec![T::ZERO; DEPTH * PANEL]);
        let product = Product { c: &mut have, a, b, accumulate: false, packed: &mut packed, strips: &mut [] };
        pulp::WithSimd::with_simd(product, pulp::Scalar::new());
        assert_eq!(have, want);
    }

    /// Factors are rounded to the nearest bf16 and ties to even, sums are f32; NaN and infinity arrive.
    #[test]
    fn bf16_products_round_factors_alone() {
        let cpu = Cpu::default();
        let factor = |i: usize| ((i * 7919 % 4093) as f32 - 2046.0) * 1.37e-3;
        let (m, n, k) = (29, 45, 77);
        let (a, b): (Vec<f32>, Vec<f32>) =
            ((0..m * k).map(factor).collect(), (3..n * k + 3).map(factor).collect());
        let rounded =
            |x: &[f32]| -> Vec<f32> { x.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect() };
        let (wide, narrow) = (rounded(&a), rounded(&b));
        let mut have = vec![0.0; m * n];
        matmul(&mut have, Mat::new(&a, m, k), Mat::new(&b, k, n), false, Precision::Bf16, &cpu);
        let rounds = Precision::Bf16.rounds();
        let (x, y) = if rounds { (&wide, &narrow) } else { (&a, &b) };
        for (at, have) in have.iter().enumerate() {
            let products = (0..k).map(|p| f64::from(x[at / n * k + p]) * f64::from(y[p * n + at % n]));
            let (want, size) = products.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + f64::abs(x)));
            assert!((f64::from(*have) - want).abs() <= 1e-6 * size, "{at}: {have} {want}");
        }
        let mut odd = a.clone();
        (odd[k + 5], odd[2 * k + 76]) = (f32::NAN, f32::INFINITY);
        matmul(&mut have, Mat::new(&odd, m, k), Mat::new(&b, k, n), false, Precision::Bf16, &cpu);
        assert!(
            have[n..2 * n].iter().all(|x| x.is_nan()) && !have[2 * n].is_finite() && have[3 * n].is_finite()
        );
    }

    #[test]
    fn products_need_no_vectors() {
        scalar::<f32>();
        scalar::<f64>();
    }

    #[test]
    fn products_agree_with_the_definition() {
        for (m, n, k) in [
            (1, 1, 1),
            (3, 5, 7),
            (4, 300, 70),
            (5, 16, 3),
            (17, 33, 1),
            (130, 67, 29),
            (1, 129, 64),
            (64, 1, 300),
            (37, 19, 513),
            (40, 64, 600),
            (9, 35, 16),
            (6, 8, 0),
        ] {
            check::<f32>(m, n, k);
            check::<f64>(m, n, k);
        }
    }
}
