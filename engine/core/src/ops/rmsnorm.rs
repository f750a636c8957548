//! `y[n, c] = x[n, c] r[n] w[c]`, `r[n] = 1 / sqrt(mean_c x[n, c]^2 + eps)`.   Zhang & Sennrich 2019
use super::prelude::*;
use crate::{agreement, tensor::Host};

mod kernels;

#[derive(Debug)]
struct RmsNorm {
    eps: f64,
}

/// `dx` and `dw`; `dx` is added to what has arrived of it, `dw` to an accumulator, where there is one.
#[derive(Debug)]
struct RmsNormBwd {
    arrived: bool,
    sum: Accumulation,
}

impl RmsNormBwd {
    /// Positions of the operands that are added to.
    fn arrived_at(&self) -> Option<usize> {
        self.arrived.then_some(4)
    }

    fn sum_at(&self) -> Option<usize> {
        (self.sum != Accumulation::Apart).then_some(4 + usize::from(self.arrived))
    }
}

impl Graph {
    /// Normalises every row of `x [N, C]` (or of any shape ending in C) and scales it by `w [C]`.
    #[track_caller]
    pub fn rmsnorm(&mut self, x: Tensor, w: Tensor, eps: f64) -> Tensor {
        self.push::<2>(RmsNorm { eps }, &[x, w])[0]
    }
}

/// `1 / sqrt(mean x^2 + eps)` of one row.
#[inline(always)]
pub(super) fn rstd<T: Real>(x: &[T], eps: f64) -> T {
    T::ONE / (dot(x, x) / T::of(x.len() as f64) + T::of(eps)).sqrt()
}

/// `dx = r (w dy - x r^2 mean(w dy x))` of one row; `dw += dy x r`.
#[inline(always)]
pub(super) fn backward_row<T: Real>(x: &[T], w: &[T], dy: &[T], r: T, dx: &mut [T], dw: &mut [T]) {
    let (x, w, dy) = (&x[..dx.len()], &w[..dx.len()], &dy[..dx.len()]);
    let mean = sum(x.len(), |c| w[c] * dy[c] * x[c]) / T::of(x.len() as f64);
    let k = r * r * mean;
    for c in 0..dx.len() {
        dx[c] = r * (w[c] * dy[c] - x[c] * k);
        dw[c] += dy[c] * x[c] * r;
    }
}

impl Op for RmsNorm {
    fn name(&self) -> &'static str {
        "rmsnorm"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [x, w] = operands(ins)?;
        floats(ins)?;
        if w.shape.dims() != [x.shape.last()] {
            return Err(format!("{w:?} does not scale rows of {x:?}"));
        }
        Ok(vec![x, Spec::new([x.shape.rows()], x.dtype.accumulator())])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        let [y, r] = outs else { return };
        real!(y, T => {
            let (width, chunk) = (ins[1].shape.last(), chunk_rows(ins[1].shape.last()));
            let (x, w, y, r) = (T::read(&ins[0]), T::read(&ins[1]), T::write(y), T::write(r));
            let rows = y.par_chunks_mut(chunk * width).zip(r.par_chunks_mut(chunk)).zip(x.par_chunks(chunk * width));
            rows.for_each(|((y, r), x)| simd!({
                for ((y, r), x) in y.chunks_mut(width).zip(r.iter_mut()).zip(x.chunks(width)) {
                    *r = rstd(x, self.eps);
                    for c in 0..y.len() {
                        y[c] = x[c] * *r * w[c];
                    }
                }
            }));
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::forward(ins, self.eps, on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 4 * outs[0].shape.numel() as u64, bytes: traffic(ins, outs) }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let Some(dy) = d[0] else { return Ok(vec![Grad::Stop("rstd is no result"); 2]) };
        let (x, w, r) = (n.ins[0], n.ins[1], n.outs[1]);
        let (arrived, sum) = (g.take_arrived(x), g.accumulation(w));
        let op = RmsNormBwd { arrived: arrived.is_some(), sum };
        let ins: Vec<Tensor> = [x, w, r, dy].into_iter().chain(arrived).chain(g.accumulator(w)).collect();
        let [dx, dw] = g.push(op, &ins);
        Ok(vec![Grad::To(dx), sum.grad(dw)])
    }
}

/// Rows that sum their `dw` together.
fn chunk(rows: usize, width: usize) -> usize {
    chunk_rows(width).max(rows.div_ceil(64))
}

impl Op for RmsNormBwd {
    fn name(&self) -> &'static str {
        "rmsnorm_bwd"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        if let Some(arrived) = self.arrived_at().map(|i| ins[i]).filter(|&arrived| arrived != ins[0]) {
            return Err(format!("a gradient {arrived:?} has arrived of {:?}", ins[0]));
        }
        Ok(vec![ins[0], self.sum_at().map_or(ins[1], |i| ins[i])])
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], _: usize) -> Vec<usize> {
        let (rows, width) = (ins[0].shape.rows(), ins[0].shape.last());
        vec![rows.div_ceil(chunk(rows, width)) * width * ins[0].dtype.accumulator().size()]
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        let [dx, dw] = outs else { return };
        real!(dx, T => {
            let width = dw.shape.last();
            let [x, w, r, dy] = [0, 1, 2, 3].map(|i| T::read(&ins[i]));
            let arrived = self.arrived_at().map(|i| T::read(&ins[i]));
            let (dx, dw) = (T::write(dx), T::write(dw));
            let chunk = chunk(r.len(), width);
            if !self.sum.is_added() {
                dw.fill(T::ZERO);
            }
            // Each chunk sums its own dw; the sums are added in the order of the chunks.
            cpu.scratch(r.len().div_ceil(chunk) * width, |parts: &mut [T]| {
                let rows = dx.par_chunks_mut(chunk * width).zip(parts.par_chunks_mut(width)).enumerate();
                rows.for_each(|(i, (dx, dw))| simd!({
                    dw.fill(T::ZERO);
                    for (j, dx) in dx.chunks_mut(width).enumerate() {
                        let n = i * chunk + j;
                        let row = n * width..(n + 1) * width;
                        backward_row(&x[row.clone()], w, &dy[row.clone()], r[n], dx, dw);
                        if let Some(arrived) = arrived {
                            axpy(dx, T::ONE, &arrived[row]);
                        }
                    }
                }));
                parts.chunks(width).for_each(|part| axpy(dw, T::ONE, part));
            });
        });
    }

    fn plain(&self, specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
        let alone = RmsNormBwd { sum: Accumulation::Apart, ..*self };
        agreement::then_summed(alone, self.sum, specs, ins, 1)
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::backward(self, ins, outs, on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let each = 11 + u64::from(self.arrived);
        let read = self.sum.read(ins, 1);
        Cost { flops: each * outs[0].shape.numel() as u64, bytes: traffic(read, outs) }
    }

    fn memory(&self, out: usize) -> Memory {
        match self.sum_at() {
            Some(input) if out == 1 => self.sum.memory(input),
            _ => Memory::Own,
        }
    }
}

/// Rows of the 0.16B and the 7B model.
pub(super) fn speed_cases() -> Vec<Case> {
    [(65_536, 768), (16_384, 4096)]
        .map(|(n, c)| {
            let build = |g: &mut Graph, x: &[Tensor]| vec![g.rmsnorm(x[0], x[1], 1e-5)];
            Case::new("rmsnorm", format!("{n}x{c}"), build).normal([n, c]).normal([c]).accumulating().large()
        })
        .into()
}

pub(super) fn cases() -> Vec<Case> {
    let case = |n: usize, c: usize| {
        let build = |g: &mut Graph, x: &[Tensor]| vec![g.rmsnorm(x[0], x[1], 1e-5)];
        Case::new("rmsnorm", format!("{n}x{c}"), build).normal([n, c]).normal([c])
    };
    // A norm beside a residual, whose gradient arrives before that of the norm or behind it.
    let residual = |n: usize, c: usize, before: bool| {
        let build = move |g: &mut Graph, x: &[Tensor]| {
            let (x, w) = (g.add(x[0], x[1]), x[2]);
            if before {
                return vec![g.rmsnorm(x, w, 1e-5), x];
            }
            let y = g.add(x, x);
            vec![y, g.rmsnorm(x, w, 1e-5)]
        };
        let order = if before { "before" } else { "behind" };
        Case::new("rmsnorm", format!("{n}x{c}, residual {order}"), build)
            .normal([n, c])
            .normal([n, c])
            .normal([c])
    };
    let small =
        [(7, 13), (1, 1), (131, 48), (613, 128), (1, 8), (2, 24), (9, 8), (31, 40), (5, 72), (67, 16)];
    // Every count of vectors a lane, rows that leave warps idle and rows that wrap the grid.
    let large = [
        (17, 248),
        (7, 256),
        (7, 264),
        (5, 504),
        (13, 512),
        (13, 520),
        (19, 768),
        (8, 776),
        (3, 1016),
        (29, 1024),
        (11, 1032),
        (5, 1536),
        (2, 2048),
        (3, 2056),
        (1, 3072),
        (7, 4088),
        (3, 4096),
        (2, 4104),
        (3, 5120),
        (2, 8184),
        (2, 8192),
        (1201, 56),
        (4513, 8),
        (257, 320),
    ];
    let large = large.into_iter().map(|(n, c)| case(n, c).large());
    let shared =
        [(7, 13), (131, 48), (1, 8), (9, 8)].map(|(n, c)| [residual(n, c, true), residual(n, c, false)]);
    // Every layout, as a transformer has it.
    let arrived = [(31, 40), (17, 248), (13, 520), (29, 1024), (11, 1032), (3, 4096), (2, 4104), (4513, 8)];
    let arrived = arrived.map(|(n, c)| residual(n, c, true).accumulating().large());
    let sums = [(37, 40), (301, 1024), (5, 1032)].map(|(n, c)| case(n, c).accumulating().large());
    let begun = [(9, 8), (301, 1024), (5, 1032)].map(|(n, c)| case(n, c).beginning().large());
    let begun = begun.into_iter().chain([residual(31, 40, true).beginning(), case(7, 13).beginning()]);
    let narrow = [case(9, 8), case(301, 1024).large(), case(5, 1032).large()];
    let narrow = narrow.map(|case| case.accumulating_in(DType::Bf16));
    let small = small.into_iter().map(|(n, c)| case(n, c));
    small
        .chain(large)
        .chain(shared.into_iter().flatten())
        .chain(arrived)
        .chain(sums)
        .chain(begun)
        .chain(narrow)
        .collect()
}
