//! The most that a CPU does: multiply-adds in registers, bytes to and from memory.
use std::{
    hint::black_box,
    sync::Barrier,
    time::{Duration, Instant},
};
use transfusion_core::cpu::Precision;

/// A rate of multiply-adds, and what does them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Peak {
    /// FLOP/s; 0 is unknown.
    pub rate: f64,
    /// The instruction, or where the figure is from.
    pub of: &'static str,
}

/// Multiply-adds in registers of all threads, of the kind that products use which may round their factors so.
pub fn peak(threads: usize, precision: Precision, time: Duration) -> Peak {
    #[cfg(target_arch = "x86_64")]
    if precision.rounds() {
        return Peak { rate: together(threads, time, || pairs::sums), of: "bf16 dot products" };
    }
    let _ = precision;
    let rate = together(threads, time, || || pulp::Arch::new().dispatch(MultiplyAdds));
    Peak { rate, of: "f32 multiply-adds" }
}

/// Bytes/s read and written by a copy of more than any cache holds.
pub fn bandwidth(threads: usize) -> f64 {
    const BYTES: usize = 128 << 20;
    let bytes = BYTES / threads;
    together(threads, Duration::from_millis(150), || {
        let (from, mut to) = (vec![1u8; bytes], vec![0u8; bytes]);
        move || {
            to.copy_from_slice(black_box(&from));
            black_box(&mut to);
            2.0 * bytes as f64
        }
    })
}

/// What `threads` threads do at once, added up: each calls `work` again and again for a while, the best piece
/// counting, in units of `work` a second.
fn together<W>(threads: usize, time: Duration, make: impl Fn() -> W + Sync) -> f64
where
    W: FnMut() -> f64,
{
    let ready = Barrier::new(threads);
    let one = || {
        let mut work = make();
        work();
        ready.wait();
        let (begin, mut best) = (Instant::now(), 0.0f64);
        while begin.elapsed() < time {
            let start = Instant::now();
            let done = work();
            best = best.max(done / start.elapsed().as_secs_f64());
        }
        best
    };
    std::thread::scope(|s| {
        let all: Vec<_> = (0..threads).map(|_| s.spawn(one)).collect();
        all.into_iter().map(|t| t.join().unwrap_or(0.0)).sum()
    })
}

/// Independent sums: enough to hide the latency of two units.
const SUMS: usize = 16;
/// Rounds of a piece: a fraction of a millisecond.
const ROUNDS: usize = 20_000;

struct MultiplyAdds;

impl pulp::WithSimd for MultiplyAdds {
    /// FLOP done.
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) -> f64 {
        let x = simd.splat_f32s(black_box(0.999));
        let y = simd.splat_f32s(black_box(1e-3));
        let mut sums = [simd.splat_f32s(1.0); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = simd.mul_add_f32s(*sum, x, y);
            }
        }
        let total = sums.into_iter().fold(simd.splat_f32s(0.0), |a, b| simd.add_f32s(a, b));
        black_box(simd.reduce_sum_f32s(total));
        (2 * SUMS * ROUNDS * S::F32_LANES) as f64
    }
}

/// Products of two pairs of bf16 added to every f32 of a register: `vdpbf16ps`.
#[cfg(target_arch = "x86_64")]
mod pairs {
    use super::{ROUNDS, SUMS};
    use std::{arch::x86_64::*, hint::black_box};
    use transfusion_core::cpu::Precision;

    /// FLOP done.
    ///
    /// # Panics
    /// If the processor does not have the instruction.
    pub(super) fn sums() -> f64 {
        assert!(Precision::Bf16.rounds(), "no AVX-512 BF16");
        #[expect(unsafe_code, reason = "instructions chosen at run time")]
        // SAFETY: the processor has the instructions that the function is compiled for: asserted above.
        unsafe {
            dot_products();
        }
        (2 * 2 * 16 * SUMS * ROUNDS) as f64
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn dot_products() {
        let [x, y] = [0.5, 1e-3].map(|x| _mm512_set1_ps(black_box(x)));
        let (x, y) = (_mm512_cvtne2ps_pbh(x, x), _mm512_cvtne2ps_pbh(y, y));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, x, y);
            }
        }
        black_box(&sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_of_what_the_products_use() {
        let time = Duration::from_millis(5);
        let [single, narrow] = [Precision::F32, Precision::Bf16].map(|p| peak(1, p, time));
        assert!(single.rate > 1e8 && narrow.rate > 1e8 && bandwidth(1) > 1e7, "{single:?} {narrow:?}");
        assert_eq!(single.of, "f32 multiply-adds");
        assert_eq!(narrow.of == "bf16 dot products", Precision::Bf16.rounds());
    }
}
