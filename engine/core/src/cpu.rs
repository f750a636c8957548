//! What ops compute with on the CPU: a real number type, chunks that do not depend on the number of
//! threads, vector instructions chosen at run time, and matrix products.
//!
//! Every sum is taken in an order fixed by the shapes alone, so results have the same bits with any
//! number of threads.
mod matmul;
mod real;
mod sin_cos;

pub use matmul::{Mat, matmul, matmul_block, piece_rows};
pub use real::{LANES, Real, axpy, dot, sum};
pub use sin_cos::sin_cos;

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

/// Evaluates an expression with the widest vector instructions that this processor has. A macro,
/// since only a closure that is marked to be inlined is compiled for those instructions; what it calls
/// must be `#[inline(always)]` too.
macro_rules! simd {
    ($body:expr) => {
        pulp::Arch::new().dispatch(crate::cpu::Vectorised(
            #[inline(always)]
            || $body,
        ))
    };
}
pub(crate) use simd;

/// A closure for [`simd!`]. It is called as `FnMut`: called as `FnOnce`, a closure that does not consume
/// what it captures goes through a shim of the compiler's, which is never inlined.
pub(crate) struct Vectorised<F>(pub(crate) F);

impl<F: FnMut() -> R, R> pulp::WithSimd for Vectorised<F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(mut self, _: S) -> R {
        (self.0)()
    }
}

/// How many rows of `width` elements one parallel chunk takes: about 16 k elements.
pub fn chunk_rows(width: usize) -> usize {
    (16 * 1024 / width.max(1)).max(1)
}
