//! What ops compute with on the CPU: a real number type, chunks for threads, vector instructions chosen at
//! run time, and matrix products.
//!
//! Every sum is taken in an order fixed by the shapes alone, so results have the same bits with any
//! number of threads. Work may be cut by the number of threads only where no sum crosses the cut.
#[cfg(target_arch = "x86_64")]
mod bf16;
mod matmul;
mod real;
mod simd;
mod sin_cos;
mod transpose;

pub use matmul::{FEW, Mat, Precision, matmul, matmul_rows, piece_rows};
pub use real::{LANES, Real, axpy, dot, round, sum};
pub(crate) use simd::{Vectorised, simd};
pub use sin_cos::sin_cos;
pub use transpose::transpose;

use std::sync::Mutex;

/// What [`crate::op::Op::eval`] may use beside its operands.
#[derive(Debug, Default)]
pub struct Cpu {
    spare: Mutex<Vec<Vec<u64>>>,
}

impl Cpu {
    /// Lends `len` reals of scratch memory with arbitrary contents. Buffers are kept, so that a
    /// plan that has run once allocates nothing more.
    pub fn scratch<T: Real, R>(&self, len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
        let words = (len * size_of::<T>()).div_ceil(8);
        let mut buffer = self.lock().pop().unwrap_or_default();
        if buffer.len() < words {
            buffer.resize(words, 0);
        }
        let r = f(&mut bytemuck::cast_slice_mut::<u64, T>(&mut buffer)[..len]);
        self.lock().push(buffer);
        r
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u64>>> {
        self.spare.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// How many rows of `width` elements one parallel chunk takes: about 16 k elements.
pub fn chunk_rows(width: usize) -> usize {
    (16 * 1024 / width.max(1)).max(1)
}
