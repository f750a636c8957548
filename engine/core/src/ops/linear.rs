//! `y = act(x w^T + bias) + residual`: every matrix product of the model. Fusion is said, not found:
//! what follows the product is its [`Epilogue`]. An activation takes what is stored of the product, so that it
//! has the bits of an op of its own: those that recomputation finds.
use super::{
    Heads,
    add::column_sum,
    prelude::*,
    rope::{Qkv, Rope, RopeBwd, Rotary},
    swiglu::{SiluBwd, SwiGluBwd, silu_row, swiglu_bwd_row, swiglu_row},
};
use crate::{agreement, tensor::Host};
use std::fmt;

pub(super) mod kernels;

/// What is applied to the product.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    #[default]
    None,
    /// `silu`.
    Silu,
    /// SwiGLU over interleaved gate and up: halves the width.
    SwiGlu,
}

/// What follows a matrix product, in this order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue {
    /// `[M]`, added to every row of the product.
    pub bias: Option<Tensor>,
    /// Then this.
    pub activation: Activation,
    /// Added at last; of the result's shape.
    pub residual: Option<Tensor>,
    /// Or, with neither of the two, its heads turn.
    pub rotary: Option<Rotary>,
}

/// The left factor of a product: a tensor, or SwiGLU of one, which the gradient then reaches without that of the
/// factor being stored.
#[derive(Clone, Copy, Debug)]
pub struct Factor {
    x: Tensor,
    pre: Option<Tensor>,
}

impl Factor {
    /// The factor itself.
    pub fn tensor(self) -> Tensor {
        self.x
    }
}

impl From<Tensor> for Factor {
    fn from(x: Tensor) -> Factor {
        Factor { x, pre: None }
    }
}

#[derive(Clone, Copy, Debug)]
struct Linear {
    bias: bool,
    activation: Activation,
    residual: bool,
    rotary: Option<Rope>,
    precision: Precision,
    gated: Gated,
}

/// What the left factor of a product is SwiGLU of. Only the adjoint asks for it: ops that differ in nothing else are
/// written alike.
#[derive(Clone, Copy)]
struct Gated(Option<Tensor>);

impl fmt::Debug for Gated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0.is_some(), f)
    }
}

/// `dx = dy w`; or, where x is SwiGLU of `pre`, the gradient of that.
#[derive(Debug)]
struct LinearDx {
    precision: Precision,
    gated: bool,
}

/// `dw = dy^T x`, in an accumulator where there is one.
#[derive(Debug)]
struct LinearDw {
    sum: Accumulation,
    precision: Precision,
}

impl Graph {
    /// `x [N, K]` times the transpose of `w [M, K]`, and what follows it: `[N, M]`, or `[N, M / 2]`
    /// after SwiGLU.
    #[track_caller]
    pub fn linear(&mut self, x: impl Into<Factor>, w: Tensor, e: Epilogue) -> Tensor {
        self.linear_and_pre(x.into(), w, e)[0]
    }

    /// SwiGLU of `pre [N, 2F]` as the factor of a product.
    #[track_caller]
    pub fn gated(&mut self, pre: Tensor) -> Factor {
        Factor { x: self.swiglu(pre), pre: Some(pre) }
    }

    /// The same of `x [N, K]` times the transpose of `w [2F, K]`.
    #[track_caller]
    pub fn gated_linear(&mut self, x: Tensor, w: Tensor) -> Factor {
        let e = Epilogue { activation: Activation::SwiGlu, ..Default::default() };
        let [x, pre] = self.linear_and_pre(x.into(), w, e);
        Factor { x, pre: Some(pre) }
    }

    /// The same of heads that turn before they attend: `x [N, K]` times the transpose of `w [(H + 2 Hkv) D, K]`.
    #[track_caller]
    pub fn rotary_linear(&mut self, x: Tensor, w: Tensor, rotary: Rotary) -> Qkv {
        let e = Epilogue { rotary: Some(rotary), ..Default::default() };
        let [x, before] = self.linear_and_pre(x.into(), w, e);
        Qkv::turned(x, before, self.spec(x).shape, rotary)
    }

    /// The result, and the product before the activation or the rotation where there is one.
    #[track_caller]
    fn linear_and_pre(&mut self, Factor { x, pre }: Factor, w: Tensor, e: Epilogue) -> [Tensor; 2] {
        let (bias, residual) = (e.bias.is_some(), e.residual.is_some());
        let rotary = e.rotary.map(|r| Rope { heads: r.heads, theta: r.theta });
        let (activation, precision) = (e.activation, self.precision);
        let op = Linear { bias, activation, residual, rotary, precision, gated: Gated(pre) };
        let positions = e.rotary.map(|r| r.positions);
        let ins: Vec<Tensor> = [x, w].into_iter().chain(e.bias).chain(e.residual).chain(positions).collect();
        self.push(op, &ins)
    }
}

impl Linear {
    /// Position of the residual among the inputs.
    fn residual_at(&self) -> Option<usize> {
        self.residual.then_some(2 + usize::from(self.bias))
    }

    /// The rotation of the result, and the position of its positions among the inputs.
    fn rotary_at(&self) -> Option<(Rope, usize)> {
        self.rotary.map(|rope| (rope, 2 + usize::from(self.bias) + usize::from(self.residual)))
    }

    /// Bias, activation and residual over finished rows of the product `pre`, which is stored as `stored`;
    /// `y` is empty where `pre` itself is the result.
    #[inline(always)]
    fn finish<T: Real>(&self, pre: &mut [T], stored: DType, y: &mut [T], bias: &[T], residual: &[T]) {
        if self.bias {
            pre.chunks_mut(bias.len()).for_each(|row| axpy(row, T::ONE, bias));
        }
        if self.activation != Activation::None {
            round(pre, stored);
        }
        match self.activation {
            Activation::None if self.residual => axpy(pre, T::ONE, residual),
            Activation::None => {}
            Activation::Silu => silu_row(pre, y),
            Activation::SwiGlu => swiglu_row(pre, y),
        }
        axpy(y, T::ONE, residual);
    }

    fn run<T: Real>(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        let (n, k) = (ins[0].shape.rows(), ins[0].shape.last());
        let m = ins[1].shape.rows();
        let (x, w) = (Mat::new(T::read(&ins[0]), n, k), Mat::new(T::read(&ins[1]), m, k).t());
        let bias = if self.bias { T::read(&ins[2]) } else { &[] };
        let residual = self.residual_at().map_or(&[][..], |i| T::read(&ins[i]));
        let step = piece_rows(n);
        let stored = outs.last().map_or(T::DTYPE, |pre| pre.stored);
        let (y, pre) = match outs {
            [y, pre] if self.rotary.is_none() => (T::write(y), T::write(pre)),
            [pre, ..] => (&mut [][..], T::write(pre)),
            [] => return,
        };
        // Results per row, 0 where the product itself is the result.
        let width = y.len() / n.max(1);
        let piece = |i: usize, pre: &mut [T], y: &mut [T]| {
            let rows = pre.len() / m;
            match n <= FEW {
                true => matmul(pre, x, w, false, self.precision, cpu),
                false => matmul_rows(pre, x.rows(i * step, rows), w, false, self.precision, cpu),
            }
            let out = if width == 0 { m } else { width };
            let residual = if self.residual { &residual[i * step * out..][..rows * out] } else { &[] };
            simd!(self.finish(pre, stored, y, bias, residual));
        };
        let pres = pre.par_chunks_mut((step * m).max(1)).enumerate();
        if width == 0 {
            pres.for_each(|(i, pre)| piece(i, pre, &mut []));
            if let Some((rope, at)) = self.rotary_at() {
                rope.run(&[], ins[at].i32(), pre, 1.0, cpu);
            }
        } else {
            pres.zip(y.par_chunks_mut(step * width)).for_each(|((i, pre), y)| piece(i, pre, y));
        }
    }
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        floats(&ins[..ins.len() - usize::from(self.rotary.is_some())])?;
        let (x, w) = (ins[0], ins[1]);
        if w.shape.dims().len() != 2 || x.shape.last() != w.shape.last() {
            return Err(format!("inner dimensions differ: {x:?} times the transpose of {w:?}"));
        }
        let pre = x.shape.with_last(w.shape.rows());
        if self.bias && ins[2].shape.dims() != [pre.last()] {
            return Err(format!("bias {:?} does not fit {pre:?}", ins[2]));
        }
        let y = match self.activation {
            Activation::SwiGlu if !pre.last().is_multiple_of(2) => {
                return Err(format!("{pre:?} has no pairs of gate and up"));
            }
            Activation::SwiGlu => pre.with_last(pre.last() / 2),
            _ => pre,
        };
        if let Some(r) = self.residual_at().filter(|&i| ins[i].shape != y) {
            return Err(format!("residual {:?} does not fit {y:?}", ins[r]));
        }
        let (y, pre) = (Spec::new(y, x.dtype), Spec::new(pre, x.dtype));
        if let Some((rope, at)) = self.rotary_at() {
            if self.residual || self.activation != Activation::None {
                return Err("heads turn in place of an activation or a residual, not beside them".into());
            }
            rope.infer(&[y, ins[at]])?;
            // The heads before they turn: nobody stores them, only their gradient arrives.
            return Ok(vec![y, Spec::new([0], y.dtype)]);
        }
        Ok(if self.activation == Activation::None { vec![y] } else { vec![y, pre] })
    }

    fn workspace(&self, ins: &[Spec], outs: &[Spec], threads: usize) -> Vec<usize> {
        let product = product_space(ins[0].shape.rows(), true, ins[0].dtype, self.precision, threads);
        match self.rotary {
            Some(rope) => most([product, rope.space(outs[0])]),
            None => product,
        }
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        real!(outs[0], T => self.run::<T>(ins, outs, cpu));
    }

    /// Heads that turn after they were stored.
    fn plain(&self, specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
        let (rope, at) = self.rotary_at()?;
        let product = Linear { rotary: None, ..*self };
        let y = agreement::stored(product, &specs[..at], &ins[..at])?.pop()?;
        let qkv = product.infer(&specs[..at]).ok()?[0];
        let turned = agreement::stored(rope, &[qkv, specs[at]], &[y, ins[at].clone()])?;
        Some(turned.into_iter().chain([Host::from_f64(qkv.dtype, [])]).collect())
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::forward(self, ins, outs, on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let product = 2 * ins[0].shape.numel() as u64 * ins[1].shape.rows() as u64;
        let turned = self.rotary.map_or(0, |rope| rope.flops(outs[0]));
        Cost { flops: product + turned, bytes: traffic(ins, outs) }
    }

    fn precision(&self, ins: &[Spec]) -> Precision {
        self.precision.of_rows(ins[0].shape.rows())
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let stop = Grad::Stop("no gradient arrived");
        let (x, w) = (n.ins[0], n.ins[1]);
        let of_result = d[0].map(|dy| match self.activation {
            Activation::None => match self.rotary_at() {
                Some((rope, at)) => g.push::<1>(RopeBwd(rope), &[dy, n.ins[at]])[0],
                None => dy,
            },
            Activation::Silu => g.push::<1>(SiluBwd, &[n.outs[1], dy])[0],
            Activation::SwiGlu => g.push::<1>(SwiGluBwd, &[n.outs[1], dy])[0],
        });
        // A product whose factor this result is gives its gradient to what was activated, attention to what has turned.
        let dpre = match (of_result, d.get(1).copied().flatten()) {
            (Some(a), Some(b)) => g.add(a, b),
            (one, other) => match one.or(other) {
                Some(dpre) => dpre,
                None => return Ok(vec![stop; n.ins.len()]),
            },
        };
        let precision = self.precision;
        // The weight's comes first, so that dx may lie where x did.
        let sum = g.accumulation(w);
        let ins: Vec<Tensor> = [dpre, x].into_iter().chain(g.accumulator(w)).collect();
        let dw = sum.grad(g.push::<1>(LinearDw { sum, precision }, &ins)[0]);
        // A gradient of another shape or type than the result's goes the long way.
        let of_pre = LinearDx { precision, gated: true };
        let fits = |pre: &Tensor| of_pre.infer(&[dpre, w, *pre].map(|t| g.spec(t))).is_ok();
        let dx = match self.gated.0.filter(fits) {
            None => Grad::To(g.push::<1>(LinearDx { precision, gated: false }, &[dpre, w])[0]),
            Some(pre) => {
                let [d] = g.push(of_pre, &[dpre, w, pre]);
                g.arrive(pre, d);
                Grad::Stop("it goes to what SwiGLU made it of")
            }
        };
        let mut grads = vec![dx, dw];
        if self.bias {
            let db = column_sum(g, dpre, n.ins[2]);
            grads.push(g.give(n.ins[2], db));
        }
        if self.residual {
            grads.push(d[0].map_or(stop, Grad::To));
        }
        if self.rotary.is_some() {
            grads.push(Grad::Integer);
        }
        Ok(grads)
    }
}

impl Op for LinearDx {
    fn name(&self) -> &'static str {
        "linear_dx"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let (dy, w) = (ins[0], ins[1]);
        let dx = Spec::new(dy.shape.with_last(w.shape.last()), dy.dtype);
        if !self.gated {
            return Ok(vec![dx]);
        }
        let pre = ins[2];
        if pre != Spec::new(dx.shape.with_last(2 * dx.shape.last()), dx.dtype) {
            return Err(format!("{dx:?} is no gradient of SwiGLU of {pre:?}"));
        }
        Ok(vec![pre])
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], threads: usize) -> Vec<usize> {
        let (rows, width) = (ins[0].shape.rows(), ins[1].shape.last());
        let product = product_space(rows, true, ins[0].dtype, self.precision, threads);
        let gated = self.gated.then(|| rows * width * ins[0].dtype.accumulator().size());
        product.into_iter().chain(gated).collect()
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        real!(outs[0], T => {
            let (n, m, k) = (ins[0].shape.rows(), ins[0].shape.last(), ins[1].shape.last());
            let (dy, w) = (Mat::new(T::read(&ins[0]), n, m), Mat::new(T::read(&ins[1]), m, k));
            let to = T::write(&mut outs[0]);
            if !self.gated {
                return matmul(to, dy, w, false, self.precision, cpu);
            }
            let pre = T::read(&ins[2]);
            cpu.scratch(n * k, |dx: &mut [T]| {
                matmul(dx, dy, w, false, self.precision, cpu);
                let chunk = chunk_rows(2);
                let rows = to.par_chunks_mut(2 * chunk).zip(pre.par_chunks(2 * chunk)).zip(dx.par_chunks(chunk));
                rows.for_each(|((to, pre), dx)| simd!(swiglu_bwd_row(pre, dx, to)));
            });
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::backward_input(ins, on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let product = 2 * ins[0].shape.numel() as u64 * ins[1].shape.last() as u64;
        Cost { flops: product, bytes: traffic(ins, outs) }
    }

    fn precision(&self, ins: &[Spec]) -> Precision {
        self.precision.of_rows(ins[0].shape.rows())
    }
}

impl Op for LinearDw {
    fn name(&self) -> &'static str {
        "linear_dw"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let (dy, x) = (ins[0], ins[1]);
        let dw = Spec::new([dy.shape.last(), x.shape.last()], x.dtype);
        Ok(vec![ins.get(2).copied().unwrap_or(dw)])
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], threads: usize) -> Vec<usize> {
        product_space(ins[0].shape.last(), false, ins[0].dtype, self.precision, threads)
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        real!(outs[0], T => {
            let (n, m, k) = (ins[0].shape.rows(), ins[0].shape.last(), ins[1].shape.last());
            let (dy, x) = (Mat::new(T::read(&ins[0]), n, m).t(), Mat::new(T::read(&ins[1]), n, k));
            matmul(T::write(&mut outs[0]), dy, x, self.sum.is_added(), self.precision, cpu);
        });
    }

    fn plain(&self, specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
        let alone = LinearDw { sum: Accumulation::Apart, precision: self.precision };
        agreement::then_summed(alone, self.sum, specs, ins, 0)
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::backward_weight(ins, outs, self.sum.is_added(), on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let product = 2 * ins[0].shape.numel() as u64 * ins[1].shape.last() as u64;
        Cost { flops: product, bytes: traffic(self.sum.read(ins, 1), outs) }
    }

    fn precision(&self, ins: &[Spec]) -> Precision {
        self.precision.of_rows(ins[0].shape.last())
    }

    fn memory(&self, _: usize) -> Memory {
        self.sum.memory(2)
    }
}

/// A large square product, and those of a layer of the 1.4B model.
pub(super) fn speed_cases() -> Vec<Case> {
    [(8192, 8192, 8192), (16_384, 2048, 6144), (16_384, 2048, 2048), (16_384, 5504, 2048)]
        .map(|(n, k, m)| {
            let build = |g: &mut Graph, x: &[Tensor]| vec![g.linear(x[0], x[1], Epilogue::default())];
            Case::new("linear", format!("{n}x{k}x{m}"), build)
                .normal([n, k])
                .normal([m, k])
                .accumulating()
                .large()
        })
        .into()
}

pub(super) fn cases() -> Vec<Case> {
    let plain = |n: usize, k: usize, m: usize| {
        let build = |g: &mut Graph, x: &[Tensor]| vec![g.linear(x[0], x[1], Epilogue::default())];
        Case::new("linear", format!("{n}x{k}x{m}"), build).normal([n, k]).normal([m, k])
    };
    let fused = |name: &str, activation| {
        Case::new("linear", name, move |g, x| {
            let e = Epilogue { bias: Some(x[2]), activation, residual: Some(x[3]), rotary: None };
            vec![g.linear(x[0], x[1], e)]
        })
    };
    // A product of what is gated, whose gradient goes to gate and up; and the network that it belongs to.
    let gated = |n: usize, k: usize, m: usize| {
        let build = |g: &mut Graph, x: &[Tensor]| {
            let h = g.gated(x[0]);
            vec![g.linear(h, x[1], Epilogue::default())]
        };
        Case::new("linear", format!("{n}x{k}x{m}, gated"), build).normal([n, 2 * k]).normal([m, k])
    };
    let network = |name: &str, twice: bool| {
        let build = move |g: &mut Graph, x: &[Tensor]| {
            let h = g.gated_linear(x[0], x[1]);
            let y = g.linear(h, x[2], Epilogue { residual: Some(x[0]), ..Default::default() });
            if twice { vec![y, h.tensor()] } else { vec![y] }
        };
        Case::new("linear", name, build).normal([21, 8]).normal([48, 8]).normal([8, 24])
    };
    let mut cases = vec![
        gated(1, 1, 1),
        gated(7, 13, 5),
        gated(131, 29, 67),
        network("feed-forward", false),
        network("feed-forward whose middle is a result too", true),
        plain(1, 1, 1),
        plain(7, 13, 5),
        plain(131, 29, 67),
        fused("bias, residual", Activation::None).normal([5, 7]).normal([6, 7]).normal([6]).normal([5, 6]),
        fused("bias, silu, residual", Activation::Silu)
            .normal([5, 7])
            .normal([6, 7])
            .normal([6])
            .normal([5, 6]),
        fused("bias, swiglu, residual", Activation::SwiGlu)
            .normal([133, 7])
            .normal([6, 7])
            .normal([6])
            .normal([133, 3]),
        plain(9, 16, 24).accumulating(),
        plain(9, 16, 24).accumulating_in(DType::Bf16),
        plain(9, 16, 24).beginning(),
        plain(9, 16, 24).accumulating_in(DType::Bf16).beginning(),
        fused("bias, residual, sums begin", Activation::None)
            .normal([5, 8])
            .normal([16, 8])
            .normal([16])
            .normal([5, 16])
            .beginning(),
        fused("bias, residual, sums in bf16", Activation::None)
            .normal([5, 8])
            .normal([16, 8])
            .normal([16])
            .normal([5, 16])
            .accumulating_in(DType::Bf16),
    ];
    // With 8 SMs the weight gradient of this one is split in tiles of 128x128.
    cases.push(plain(2003, 256, 256).large());
    cases.push(plain(2003, 256, 256).accumulating().large());
    cases.push(plain(2003, 256, 256).accumulating_in(DType::Bf16).large());
    cases.push(plain(2003, 256, 256).beginning().large());
    cases.push(plain(67, 264, 136).beginning().large());
    // And these of an H200 with 8 SMs in each of its tiles.
    cases.push(plain(1531, 128, 128).large());
    cases.push(plain(1531, 136, 136).large());
    // More small tiles than an H200 has SMs.
    cases.push(plain(1097, 72, 520).large());
    // Odd and prime row counts, depths that wrap the ring of stages, edges on every side, splits.
    let products = [
        (1, 8, 8),
        (3, 40, 16),
        (16, 32, 64),
        (61, 136, 72),
        (64, 128, 64),
        (65, 264, 56),
        (127, 96, 136),
        (128, 64, 128),
        (129, 72, 264),
        (131, 200, 256),
        (257, 48, 40),
        (193, 512, 8),
        (509, 8, 120),
        (521, 256, 96),
        (1031, 24, 72),
        (2, 16, 8),
        (5, 24, 24),
        (13, 104, 32),
        (31, 160, 40),
        (37, 288, 16),
        (63, 88, 200),
        (97, 120, 48),
        (113, 376, 24),
        (151, 56, 312),
        (211, 32, 104),
        (313, 16, 88),
        (641, 72, 8),
        (2053, 8, 16),
        (67, 456, 88),
        (83, 136, 152),
        (139, 328, 200),
        (181, 72, 168),
        (229, 152, 136),
        // Enough for every tile of Hopper's, of warpgroups together and apart.
        (130, 520, 256),
        (300, 136, 392),
        (450, 72, 520),
        (257, 200, 264),
        (389, 88, 456),
        (261, 72, 136),
        (530, 264, 136),
        (271, 328, 328),
        (333, 392, 72),
        (131, 136, 136),
        (131, 200, 264),
        (259, 456, 200),
        (131, 136, 264),
        (139, 264, 136),
        (131, 264, 200),
        (65, 264, 264),
        (131, 136, 200),
        (193, 136, 200),
        (269, 72, 200),
        (269, 72, 136),
    ];
    cases.extend(products.map(|(n, k, m)| plain(n, k, m).large()));
    cases.extend(products.map(|(n, k, m)| plain(n, k, m).accumulating().large()));
    let some = products.into_iter().step_by(2).chain([(131, 200, 264)]);
    cases.extend(some.map(|(n, k, m)| gated(n, k, m).large()));
    let narrow = products.into_iter().step_by(4);
    cases.extend(narrow.map(|(n, k, m)| plain(n, k, m).accumulating_in(DType::Bf16).large()));
    // Few rows, as in decoding: every number that has a kernel, and depths that wrap a warp's step.
    let few = [
        (1, 8, 8),
        (1, 520, 24),
        (2, 264, 40),
        (2, 776, 16),
        (3, 1032, 8),
        (4, 24, 72),
        (4, 512, 104),
        (5, 256, 88),
        (6, 248, 32),
        (7, 1544, 24),
        (8, 40, 136),
        (8, 784, 56),
    ];
    cases.extend(few.map(|(n, k, m)| plain(n, k, m).large()));
    // What follows the product: every activation with and without bias and residual, on few rows and on many, in every
    // tile of Hopper's.
    let activations = [
        (Activation::None, [(1, 40, 200), (67, 40, 200), (130, 520, 256), (257, 200, 264), (300, 136, 392)]),
        (Activation::Silu, [(3, 40, 136), (130, 40, 136), (130, 520, 256), (257, 200, 264), (300, 136, 392)]),
        (
            Activation::SwiGlu,
            [(8, 40, 144), (149, 40, 144), (130, 520, 256), (257, 200, 264), (300, 136, 392)],
        ),
    ];
    for (activation, shapes) in activations {
        let flags = [(false, false), (true, false), (false, true), (true, true)];
        let small = shapes[..2].iter().flat_map(|shape| flags.map(|f| (*shape, f)));
        let large = shapes[2..].iter().map(|shape| (*shape, (true, true)));
        for ((n, k, m), (bias, residual)) in small.chain(large) {
            let y = if activation == Activation::SwiGlu { m / 2 } else { m };
            let build = move |g: &mut Graph, x: &[Tensor]| {
                let e = Epilogue {
                    bias: bias.then(|| x[2]),
                    activation,
                    residual: residual.then(|| x[2 + usize::from(bias)]),
                    rotary: None,
                };
                vec![g.linear(x[0], x[1], e)]
            };
            let name = format!("{n}x{k}x{m}, {activation:?}, bias {bias}, residual {residual}");
            let mut case = Case::new("linear", name, build).normal([n, k]).floats([m, k], Fill::Normal(0.3));
            if bias {
                case = case.normal([m]);
            }
            if residual {
                case = case.normal([n, y]);
            }
            cases.push(case.large());
        }
    }
    cases.extend(rotary_cases());
    cases
}

/// Heads that turn: on few rows and on many, with and without bias, rows in use and others.
fn rotary_cases() -> Vec<Case> {
    let case = |n: usize, k: usize, heads: Heads, bias: bool| {
        let build = move |g: &mut Graph, x: &[Tensor]| {
            let rotary = Some(Rotary { positions: x[2], heads, theta: 1e4 });
            let e = Epilogue { bias: bias.then(|| x[3]), rotary, ..Epilogue::default() };
            vec![g.linear(x[0], x[1], e)]
        };
        // One row alone is in use, and has turned.
        let at = |i: usize| match (i + n) % 7 {
            3 => -1,
            4 => 100_003 + i as i32,
            _ => ((5 + i) % 1021) as i32,
        };
        let m = heads.packed_width();
        let Heads { heads: q, kv_heads: kv, width } = heads;
        let name = format!("{n}x{k}x{m}, {q} and {kv} heads of {width}, bias {bias}");
        let case = Case::new("linear", name, build).normal([n, k]).floats([m, k], Fill::Normal(0.3));
        let case = case.ints([n], &(0..n).map(at).collect::<Vec<_>>());
        if bias { case.normal([m]) } else { case }
    };
    let heads = |heads, kv_heads, width| Heads { heads, kv_heads, width };
    let small = [case(5, 7, heads(2, 1, 6), false), case(9, 5, heads(1, 1, 2), true)];
    let large = [
        (1, 40, heads(2, 1, 32), false),
        (1, 136, heads(1, 1, 64), true),
        (6, 136, heads(1, 1, 64), true),
        (8, 264, heads(3, 1, 40), true),
        (4, 72, heads(2, 2, 128), false),
        (2, 520, heads(5, 1, 8), true),
        (3, 40, heads(1, 1, 24), false),
        (7, 200, heads(4, 2, 16), false),
        (5, 8, heads(6, 3, 64), true),
        (37, 72, heads(3, 1, 24), false),
        (130, 520, heads(2, 1, 64), true),
        (257, 200, heads(3, 3, 32), false),
        (300, 136, heads(4, 1, 64), true),
        (67, 264, heads(1, 1, 128), false),
        (193, 200, heads(1, 1, 256), true),
        (269, 72, heads(5, 2, 40), false),
        (139, 264, heads(9, 4, 8), true),
    ];
    small
        .into_iter()
        .chain([
            attending_case(Heads { heads: 2, kv_heads: 1, width: 4 }, 5, 6),
            attending_case(Heads { heads: 3, kv_heads: 1, width: 64 }, 67, 72).large(),
        ])
        .chain(large.map(|(n, k, h, bias)| case(n, k, h, bias).large()))
        .collect()
}

/// Heads that attend after they have turned, and that somebody else reads besides: gradients of both arrive.
fn attending_case(heads: Heads, t: usize, k: usize) -> Case {
    let m = heads.packed_width();
    let build = move |g: &mut Graph, x: &[Tensor]| {
        let qkv = g.rotary_linear(x[0], x[1], Rotary { positions: x[2], heads, theta: 1e2 });
        let rows = qkv.reshape(g, [2, t, m]);
        vec![g.attention(rows, x[3], x[4], heads), g.swiglu(qkv.tensor())]
    };
    let at = |i: usize| if i % 7 == 3 { -1 } else { (i * 5 % 23) as i32 };
    let ends: Vec<i32> = (0..2 * t).map(|i| (i % t) as i32 + 1).collect();
    Case::new("linear", format!("{} heads of {} that attend", heads.heads, heads.width), build)
        .normal([2 * t, k])
        .floats([m, k], Fill::Normal(0.3))
        .ints([2 * t], &(0..2 * t).map(at).collect::<Vec<_>>())
        .ints([2, t], &vec![0; 2 * t])
        .ints([2, t], &ends)
}
