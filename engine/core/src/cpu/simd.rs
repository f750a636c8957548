//! Vector instructions, chosen at run time.

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
