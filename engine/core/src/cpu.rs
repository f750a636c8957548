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

pub use matmul::{FEW, Mat, Precision, matmul, matmul_rows, piece_rows, product_space, rows_space};
pub use real::{LANES, Real, axpy, dot, round, sum};
pub(crate) use simd::{Vectorised, simd};
pub use sin_cos::sin_cos;
pub use transpose::transpose;

use crate::error::{Error, Result};
use std::{cmp::Reverse, sync::Mutex};

/// What [`crate::op::Op::eval`] may use beside its operands.
#[derive(Debug, Default)]
pub struct Cpu {
    spare: Mutex<Vec<Vec<u64>>>,
}

impl Cpu {
    /// Lends `len` reals of scratch memory with arbitrary contents: the smallest spare buffer that is large enough.
    /// A device keeps as many as [`crate::op::Op::workspace`] asks for, so that nothing is allocated here.
    pub fn scratch<T: Real, R>(&self, len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
        let words = (len * size_of::<T>()).div_ceil(8);
        let mut buffer = self.take(words);
        if buffer.len() < words {
            buffer.resize(words, 0);
        }
        let r = f(&mut bytemuck::cast_slice_mut::<u64, T>(&mut buffer)[..len]);
        self.lock().push(buffer);
        r
    }

    /// Keeps buffers in which what takes `bytes` at the same time finds room, beside what was kept for others.
    ///
    /// # Errors
    /// If there is no memory for them.
    pub fn reserve(&self, bytes: &[usize]) -> Result<()> {
        let mut spare = self.lock();
        spare.sort_unstable_by_key(|buffer| Reverse(buffer.len()));
        for (i, bytes) in most([bytes.to_vec()]).into_iter().enumerate() {
            let words = bytes.div_ceil(8);
            if spare.get(i).is_some_and(|buffer| buffer.len() >= words) {
                continue;
            }
            let mut buffer = Vec::new();
            let what = || "the working space of ops".to_string();
            let full = |_| Error::Memory { need: bytes as u64, free: None, what: what() };
            buffer.try_reserve_exact(words).map_err(full)?;
            buffer.resize(words, 0);
            match spare.get_mut(i) {
                Some(smaller) => *smaller = buffer,
                None => spare.push(buffer),
            }
        }
        Ok(())
    }

    /// The spare buffer that fits `words` best: the smallest that is large enough, else the largest.
    fn take(&self, words: usize) -> Vec<u64> {
        let mut spare = self.lock();
        let fit = |b: &Vec<u64>| if b.len() < words { (1, usize::MAX - b.len()) } else { (0, b.len()) };
        let best = (0..spare.len()).min_by_key(|&i| fit(&spare[i]));
        best.map(|i| spare.swap_remove(i)).unwrap_or_default()
    }

    /// Bytes of the spare buffers.
    #[cfg(test)]
    pub(crate) fn spare_bytes(&self) -> usize {
        self.lock().iter().map(|buffer| 8 * buffer.len()).sum()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u64>>> {
        self.spare.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Of buffers that are borrowed at the same time by one or another, those that serve all of them: the largest of
/// each, the second largest of each, and so on, in this order.
pub fn most(lists: impl IntoIterator<Item = Vec<usize>>) -> Vec<usize> {
    let mut all = Vec::new();
    for mut list in lists {
        list.sort_unstable_by_key(|bytes| Reverse(*bytes));
        all.resize(all.len().max(list.len()), 0);
        all.iter_mut().zip(list).for_each(|(all, one)| *all = one.max(*all));
    }
    all
}

/// How many rows of `width` elements one parallel chunk takes: about 16 k elements.
pub fn chunk_rows(width: usize) -> usize {
    (16 * 1024 / width.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spare_buffer_that_fits_best_is_lent() {
        let cpu = Cpu::default();
        let sizes = || {
            let mut sizes: Vec<usize> = cpu.lock().iter().map(Vec::len).collect();
            sizes.sort_unstable();
            sizes
        };
        // Four buffers at once, then each again on its own.
        cpu.scratch(10, |_: &mut [f64]| {
            cpu.scratch(1000, |_: &mut [f64]| {
                cpu.scratch(100, |_: &mut [f64]| cpu.scratch(1, |_: &mut [f64]| ()))
            });
        });
        assert_eq!(sizes(), [1, 10, 100, 1000]);
        for len in [2, 1000, 60, 10, 0] {
            cpu.scratch(len, |x: &mut [f64]| assert_eq!(x.len(), len));
        }
        assert_eq!(sizes(), [1, 10, 100, 1000]);
        // What is too large for all makes the largest larger.
        cpu.scratch(1001, |_: &mut [f64]| ());
        assert_eq!(sizes(), [1, 10, 100, 1001]);
        // Kept for two at once: what is there serves the larger, and a smaller one gives way.
        cpu.reserve(&[8 * 300, 8 * 900]).unwrap();
        assert_eq!(sizes(), [1, 10, 300, 1001]);
        let none = cpu.reserve(&[usize::MAX / 2]).unwrap_err().to_string();
        assert!(none.contains("the working space of ops"), "{none}");
        assert_eq!(sizes(), [1, 10, 300, 1001]);
    }
}
