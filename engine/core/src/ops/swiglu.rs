//! Gated activation: `y = silu(gate) up`, `silu(x) = x / (1 + e^-x)`.   Shazeer 2020 (SwiGLU)
//!
//! Gate and up lie interleaved, `x[n, 2f]` and `x[n, 2f + 1]`, so that the two meet in one register
//! of the product that made them.
use super::prelude::*;

#[derive(Debug)]
pub(super) struct SwiGlu;

/// `dx` from `x` and `dy`.
#[derive(Debug)]
pub(super) struct SwiGluBwd;

/// `dx = dy silu'(x)`.
#[derive(Debug)]
pub(super) struct SiluBwd;

impl Graph {
    /// `silu(x[n, 2f]) x[n, 2f + 1]`: `[N, 2F]` to `[N, F]`.
    #[track_caller]
    pub fn swiglu(&mut self, x: Tensor) -> Tensor {
        self.push::<1>(SwiGlu, &[x])[0]
    }
}

/// `(silu(x), silu'(x))`.
#[inline(always)]
fn silu<T: Real>(x: T) -> (T, T) {
    let s = T::ONE / (T::ONE + (-x).exp());
    (x * s, s * (T::ONE + x * (T::ONE - s)))
}

/// One row of `silu`.
#[inline(always)]
pub(super) fn silu_row<T: Real>(x: &[T], y: &mut [T]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = silu(*x).0;
    }
}

/// One row of SwiGLU.
#[inline(always)]
pub(super) fn swiglu_row<T: Real>(x: &[T], y: &mut [T]) {
    for (y, x) in y.iter_mut().zip(x.as_chunks::<2>().0) {
        *y = silu(x[0]).0 * x[1];
    }
}

impl Op for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [x] = operands(ins)?;
        floats(ins)?;
        if !x.shape.last().is_multiple_of(2) {
            return Err(format!("{x:?} has no pairs of gate and up"));
        }
        Ok(vec![Spec::new(x.shape.with_last(x.shape.last() / 2), x.dtype)])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => {
            let (x, y) = (T::read(&ins[0]), T::write(&mut outs[0]));
            let chunk = chunk_rows(2);
            y.par_chunks_mut(chunk).zip(x.par_chunks(2 * chunk)).for_each(|(y, x)| simd!(swiglu_row(x, y)));
        });
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 6 * outs[0].shape.numel() as u64, bytes: traffic(ins, outs) }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let stop = Grad::Stop("no gradient arrived");
        Ok(vec![d[0].map_or(stop, |dy| Grad::To(g.push::<1>(SwiGluBwd, &[n.ins[0], dy])[0]))])
    }
}

impl Op for SwiGluBwd {
    fn name(&self) -> &'static str {
        "swiglu_bwd"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [x, _] = operands(ins)?;
        Ok(vec![x])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => {
            let (x, dy, dx) = (T::read(&ins[0]), T::read(&ins[1]), T::write(&mut outs[0]));
            let chunk = chunk_rows(2);
            let rows = dx.par_chunks_mut(2 * chunk).zip(x.par_chunks(2 * chunk)).zip(dy.par_chunks(chunk));
            rows.for_each(|((dx, x), dy)| simd!({
                let pairs = dx.as_chunks_mut::<2>().0.iter_mut().zip(x.as_chunks::<2>().0);
                for ((dx, x), dy) in pairs.zip(dy) {
                    let (y, slope) = silu(x[0]);
                    *dx = [*dy * x[1] * slope, *dy * y];
                }
            }));
        });
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 6 * outs[0].shape.numel() as u64, bytes: traffic(ins, outs) }
    }
}

impl Op for SiluBwd {
    fn name(&self) -> &'static str {
        "silu_bwd"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [x, _] = operands(ins)?;
        Ok(vec![x])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => {
            let (x, dy, dx) = (T::read(&ins[0]), T::read(&ins[1]), T::write(&mut outs[0]));
            simd!({
                for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
                    *dx = *dy * silu(*x).1;
                }
            });
        });
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 6 * outs[0].shape.numel() as u64, bytes: traffic(ins, outs) }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case =
        |name, n: usize, f: usize| Case::new("swiglu", name, |g, x| vec![g.swiglu(x[0])]).normal([n, 2 * f]);
    vec![case("7x13", 7, 13), case("one row", 1, 5), case("257x64", 257, 64)]
}
