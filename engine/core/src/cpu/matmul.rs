//! Matrix products through the `gemm` crates, cut into pieces by shape alone.
use super::Real;
use crate::tensor::DType;
use rayon::prelude::*;

/// A strided matrix.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// Row-major `rows x cols` whose rows lie `stride` apart.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        Mat { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// Contiguous row-major `rows x cols`.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Mat::strided(data, rows, cols, cols)
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

    /// Elements that the matrix spans in `data`.
    fn span(&self) -> usize {
        if self.rows == 0 || self.cols == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride + 1
    }
}

/// `c = a b`, or `c += a b`; `c` is contiguous and row-major. Rows of `c` are shared out among
/// threads.
pub fn matmul<T: Real>(c: &mut [T], a: Mat<'_, T>, b: Mat<'_, T>, accumulate: bool) {
    let (m, n) = (a.rows, b.cols);
    if m * n == 0 {
        return;
    }
    let step = piece_rows(m);
    c[..m * n].par_chunks_mut(step * n).enumerate().for_each(|(i, c)| {
        matmul_block(c, n, a.rows(i * step, c.len() / n), b, T::ONE, accumulate);
    });
}

/// Rows of one parallel piece of a product with `m` rows. The right factor is packed again for every
/// piece, so a piece has at least 64 rows.
pub fn piece_rows(m: usize) -> usize {
    m.div_ceil(4).clamp(64, 512).next_multiple_of(4)
}

/// `c = alpha a b`, or `c += alpha a b`, on this thread; rows of `c` lie `c_stride` apart.
///
/// # Panics
/// If an operand is shorter than its shape.
#[expect(unsafe_code, reason = "gemm's kernels take raw pointers; the assertions bound every access")]
pub fn matmul_block<T: Real>(
    c: &mut [T],
    c_stride: usize,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    alpha: T,
    accumulate: bool,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    if m == 0 || n == 0 {
        return;
    }
    assert!(k == b.rows && n <= c_stride, "inner dimensions {k} and {}", b.rows);
    assert!((m - 1) * c_stride + n <= c.len() && a.span() <= a.data.len() && b.span() <= b.data.len());
    let serial = gemm_common::Parallelism::None;
    // c is row-major: compute its transpose, which gemm sees column-major, from the transposes.
    macro_rules! run {
        ($gemm:path, $t:ty) => {
            $gemm()(
                n,
                m,
                k,
                c.as_mut_ptr().cast::<$t>(),
                c_stride as isize,
                1,
                accumulate,
                b.data.as_ptr().cast::<$t>(),
                b.row_stride as isize,
                b.col_stride as isize,
                a.data.as_ptr().cast::<$t>(),
                a.row_stride as isize,
                a.col_stride as isize,
                1.0,
                alpha.f64() as $t,
                false,
                false,
                false,
                serial,
            )
        };
    }
    // SAFETY: the assertions above keep every element of the three matrices inside its slice, `c` is
    // borrowed exclusively, and `T` is the type that its dtype names.
    unsafe {
        match T::DTYPE {
            DType::F64 => run!(gemm_f64::gemm::f64::get_gemm_fn, f64),
            _ => run!(gemm_f32::gemm::f32::get_gemm_fn, f32),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_agree_with_the_definition() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (17, 33, 1), (130, 67, 29), (1, 129, 64), (64, 1, 300)] {
            let a: Vec<f64> = (0..m * k).map(|i| (i * 7 % 13) as f64 - 6.0).collect();
            let b: Vec<f64> = (0..k * n).map(|i| (i * 5 % 11) as f64 - 5.0).collect();
            let want = |i: usize, j: usize| (0..k).map(|p| a[i * k + p] * b[p * n + j]).sum::<f64>();
            let mut c = vec![1.0; m * n];
            matmul(&mut c, Mat::new(&a, m, k), Mat::new(&b, k, n), false);
            for i in 0..m {
                for j in 0..n {
                    assert_eq!(c[i * n + j], want(i, j), "{m}x{n}x{k} at {i},{j}");
                }
            }
            // The same product from transposed storage, added on top.
            let bt: Vec<f64> = (0..k * n).map(|i| b[i % k * n + i / k]).collect();
            matmul(&mut c, Mat::new(&a, m, k), Mat::new(&bt, n, k).t(), true);
            for i in 0..m {
                for j in 0..n {
                    assert_eq!(c[i * n + j], 2.0 * want(i, j));
                }
            }
        }
    }
}
