//! Gated activation: `y = silu(gate) up`, `silu(x) = x / (1 + e^-x)`.   Shazeer 2020 (SwiGLU)
//!
//! Gate and up lie interleaved, `x[n, 2f]` and `x[n, 2f + 1]`, so that the two meet in one register
//! of the product that made them.
use super::{lots, prelude::*};
use crate::ops::linear::{Activation, Epilogue};

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
    let (ys, rest) = y.as_chunks_mut::<LANES>();
    let whole = ys.len() * PAIRS;
    for (y, x) in ys.iter_mut().zip(x.as_chunks::<PAIRS>().0) {
        let (gate, up) = halves(x);
        for l in 0..LANES {
            y[l] = silu(gate[l]).0 * up[l];
        }
    }
    for (y, x) in rest.iter_mut().zip(x[whole..].as_chunks::<2>().0) {
        *y = silu(x[0]).0 * x[1];
    }
}

/// One row of the gradient of SwiGLU.
#[inline(always)]
pub(super) fn swiglu_bwd_row<T: Real>(x: &[T], dy: &[T], dx: &mut [T]) {
    let (dxs, rest) = dx.as_chunks_mut::<PAIRS>();
    let whole = dxs.len() * LANES;
    for ((dx, x), dy) in dxs.iter_mut().zip(x.as_chunks::<PAIRS>().0).zip(dy.as_chunks::<LANES>().0) {
        let (gate, up) = halves(x);
        let (mut dgate, mut dup) = ([T::ZERO; LANES], [T::ZERO; LANES]);
        for l in 0..LANES {
            let (y, slope) = silu(gate[l]);
            (dgate[l], dup[l]) = (dy[l] * up[l] * slope, dy[l] * y);
        }
        for l in 0..LANES {
            (dx[2 * l], dx[2 * l + 1]) = (dgate[l], dup[l]);
        }
    }
    let pairs = rest.as_chunks_mut::<2>().0.iter_mut().zip(x[2 * whole..].as_chunks::<2>().0);
    for ((dx, x), dy) in pairs.zip(&dy[whole..]) {
        let (y, slope) = silu(x[0]);
        *dx = [*dy * x[1] * slope, *dy * y];
    }
}

/// Elements of [`LANES`] gates and ups.
const PAIRS: usize = 2 * LANES;

/// Gates and ups.
#[inline(always)]
fn halves<T: Real>(x: &[T; PAIRS]) -> ([T; LANES], [T; LANES]) {
    let (mut gate, mut up) = ([T::ZERO; LANES], [T::ZERO; LANES]);
    for l in 0..LANES {
        (gate[l], up[l]) = (x[2 * l], x[2 * l + 1]);
    }
    (gate, up)
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

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        pairs("swiglu_fwd", ins, outs[0].shape.numel(), on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 6 * outs[0].shape.numel() as u64, bytes: traffic(ins, outs) }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let stop = Grad::Stop("no gradient arrived");
        Ok(vec![d[0].map_or(stop, |dy| Grad::To(g.push::<1>(SwiGluBwd, &[n.ins[0], dy])[0]))])
    }
}

/// The pass over `pairs` of gate and up.
fn pairs(pass: &str, ins: &[Spec], pairs: usize, on: &Target) -> Result<Kernels, String> {
    let dtype = ins[0].dtype;
    elements(pass, ins, pairs, lots::lot(&[dtype]) / 2, on)
}

/// The pass over `count` elements, or pairs, `lot` to a thread.
fn elements(pass: &str, ins: &[Spec], count: usize, lot: u32, on: &Target) -> Result<Kernels, String> {
    let entry = format!("{pass}_{}", lots::suffix(ins[0].dtype, ins[0].dtype)?);
    let count = size(count)?;
    size(ins[0].shape.numel())?;
    let operands = (0..ins.len()).map(Arg::input);
    let args = [Arg::output(0)].into_iter().chain(operands).chain([Arg::U32(count)]).collect();
    Ok(lots::single(lots::over(entry, count, lot, on, args)))
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
            rows.for_each(|((dx, x), dy)| simd!(swiglu_bwd_row(x, dy, dx)));
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        pairs("swiglu_bwd", ins, ins[1].shape.numel(), on)
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
            let chunk = chunk_rows(1);
            let rows = dx.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).zip(dy.par_chunks(chunk));
            rows.for_each(|((dx, x), dy)| simd!({
                for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
                    *dx = *dy * silu(*x).1;
                }
            }));
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        elements("silu_bwd", ins, ins[0].shape.numel(), lots::lot(&[ins[0].dtype]), on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 6 * outs[0].shape.numel() as u64, bytes: traffic(ins, outs) }
    }
}

/// Rows of the 1.4B model.
pub(super) fn speed_cases() -> Vec<Case> {
    let build = |g: &mut Graph, x: &[Tensor]| vec![g.swiglu(x[0])];
    vec![Case::new("swiglu", "16384x5504", build).normal([16_384, 2 * 5504]).large()]
}

pub(super) fn cases() -> Vec<Case> {
    let case = |n: usize, f: usize| {
        Case::new("swiglu", format!("{n}x{f}"), |g, x| vec![g.swiglu(x[0])]).normal([n, 2 * f])
    };
    // Saturated gates of both signs.
    let steep =
        Case::new("swiglu", "steep", |g, x| vec![g.swiglu(x[0])]).floats([31, 46], Fill::Normal(40.0));
    let small = [(7, 13), (1, 5), (257, 64)];
    let large = [
        (1, 1),
        (1, 2),
        (1, 3),
        (1, 4),
        (5, 1),
        (2, 8),
        (3, 11),
        (7, 16),
        (11, 24),
        (13, 31),
        (17, 40),
        (23, 65),
        (29, 96),
        (31, 128),
        (37, 127),
        (61, 256),
        (67, 129),
        (101, 88),
        (127, 344),
        (131, 61),
        (251, 96),
        (257, 33),
        (509, 172),
        (521, 8),
        (1021, 40),
        (1031, 7),
        (1201, 264),
        (2207, 515),
        (71, 6),
        (3, 2),
        (4099, 1),
    ];
    // SiLU is no op of its own forward: it follows a product.
    let silu = large.map(|(n, f)| {
        let e = Epilogue { activation: Activation::Silu, ..Default::default() };
        Case::new("silu", format!("{n}x{}", 8 * f), move |g, x| vec![g.linear(x[0], x[1], e)])
            .normal([n, 8])
            .normal([8 * f, 8])
            .large()
    });
    let swiglu = large.into_iter().map(|(n, f)| case(n, f).large()).chain([steep.large()]);
    small.into_iter().map(|(n, f)| case(n, f)).chain(swiglu).chain(silu).collect()
}
