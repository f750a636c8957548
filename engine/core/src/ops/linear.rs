//! `y = act(x w^T + bias) + residual`: every matrix product of the model. Fusion is said, not found:
//! what follows the product is its [`Epilogue`]. An activation takes what is stored of the product, so that it
//! has the bits of an op of its own: those that recomputation finds.
use super::{
    add::column_sum,
    prelude::*,
    swiglu::{SiluBwd, SwiGluBwd, silu_row, swiglu_row},
};
use crate::{agreement, tensor::Host};

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
}

#[derive(Debug)]
struct Linear {
    bias: bool,
    activation: Activation,
    residual: bool,
    precision: Precision,
}

/// `dx = dy w`.
#[derive(Debug)]
struct LinearDx {
    precision: Precision,
}

/// `dw = dy^T x`, added to an accumulator where there is one.
#[derive(Debug)]
struct LinearDw {
    accumulate: bool,
    precision: Precision,
}

impl Graph {
    /// `x [N, K]` times the transpose of `w [M, K]`, and what follows it: `[N, M]`, or `[N, M / 2]`
    /// after SwiGLU.
    #[track_caller]
    pub fn linear(&mut self, x: Tensor, w: Tensor, e: Epilogue) -> Tensor {
        let (bias, residual) = (e.bias.is_some(), e.residual.is_some());
        let op = Linear { bias, activation: e.activation, residual, precision: self.precision };
        let ins: Vec<Tensor> = [x, w].into_iter().chain(e.bias).chain(e.residual).collect();
        match e.activation {
            Activation::None => self.push::<1>(op, &ins)[0],
            _ => self.push::<2>(op, &ins)[0],
        }
    }
}

impl Linear {
    /// Position of the residual among the inputs.
    fn residual_at(&self) -> Option<usize> {
        self.residual.then_some(2 + usize::from(self.bias))
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
            [y, pre] => (T::write(y), T::write(pre)),
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
        floats(ins)?;
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
        Ok(if self.activation == Activation::None { vec![y] } else { vec![y, pre] })
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], threads: usize) -> Vec<usize> {
        product_space(ins[0].shape.rows(), true, ins[0].dtype, self.precision, threads)
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        real!(outs[0], T => self.run::<T>(ins, outs, cpu));
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::forward(self, ins, on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let product = 2 * ins[0].shape.numel() as u64 * ins[1].shape.rows() as u64;
        Cost { flops: product, bytes: traffic(ins, outs) }
    }

    fn precision(&self, ins: &[Spec]) -> Precision {
        self.precision.of_rows(ins[0].shape.rows())
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let Some(dy) = d[0] else { return Ok(vec![Grad::Stop("no gradient arrived"); n.ins.len()]) };
        let (x, w) = (n.ins[0], n.ins[1]);
        let dpre = match self.activation {
            Activation::None => dy,
            Activation::Silu => g.push::<1>(SiluBwd, &[n.outs[1], dy])[0],
            Activation::SwiGlu => g.push::<1>(SwiGluBwd, &[n.outs[1], dy])[0],
        };
        let precision = self.precision;
        let [dx] = g.push(LinearDx { precision }, &[dpre, w]);
        let dw = match g.accumulator(w) {
            Some(sum) => {
                Grad::Into(g.push::<1>(LinearDw { accumulate: true, precision }, &[dpre, x, sum])[0])
            }
            None => Grad::To(g.push::<1>(LinearDw { accumulate: false, precision }, &[dpre, x])[0]),
        };
        let mut grads = vec![Grad::To(dx), dw];
        if self.bias {
            let db = column_sum(g, dpre, n.ins[2]);
            grads.push(g.give(n.ins[2], db));
        }
        if self.residual {
            grads.push(Grad::To(dy));
        }
        Ok(grads)
    }
}

impl Op for LinearDx {
    fn name(&self) -> &'static str {
        "linear_dx"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [dy, w] = operands(ins)?;
        Ok(vec![Spec::new(dy.shape.with_last(w.shape.last()), dy.dtype)])
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], threads: usize) -> Vec<usize> {
        product_space(ins[0].shape.rows(), true, ins[0].dtype, self.precision, threads)
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        real!(outs[0], T => {
            let (n, m, k) = (ins[0].shape.rows(), ins[0].shape.last(), ins[1].shape.last());
            let (dy, w) = (Mat::new(T::read(&ins[0]), n, m), Mat::new(T::read(&ins[1]), m, k));
            matmul(T::write(&mut outs[0]), dy, w, false, self.precision, cpu);
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
        Ok(vec![if self.accumulate { ins[2] } else { dw }])
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], threads: usize) -> Vec<usize> {
        product_space(ins[0].shape.last(), false, ins[0].dtype, self.precision, threads)
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        real!(outs[0], T => {
            let (n, m, k) = (ins[0].shape.rows(), ins[0].shape.last(), ins[1].shape.last());
            let (dy, x) = (Mat::new(T::read(&ins[0]), n, m).t(), Mat::new(T::read(&ins[1]), n, k));
            matmul(T::write(&mut outs[0]), dy, x, self.accumulate, self.precision, cpu);
        });
    }

    fn plain(&self, specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
        let alone = LinearDw { accumulate: false, precision: self.precision };
        self.accumulate.then(|| agreement::then_added(alone, specs, ins, 0)).flatten()
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::backward_weight(ins, outs, self.accumulate, on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let product = 2 * ins[0].shape.numel() as u64 * ins[1].shape.last() as u64;
        Cost { flops: product, bytes: traffic(ins, outs) }
    }

    fn precision(&self, ins: &[Spec]) -> Precision {
        self.precision.of_rows(ins[0].shape.last())
    }

    fn memory(&self, _: usize) -> Memory {
        if self.accumulate { Memory::InPlace { input: 2 } } else { Memory::Own }
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
            let e = Epilogue { bias: Some(x[2]), activation, residual: Some(x[3]) };
            vec![g.linear(x[0], x[1], e)]
        })
    };
    let mut cases = vec![
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
    cases
}
