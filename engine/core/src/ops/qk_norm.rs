//! Each q head and each k head of a packed row through a norm of its own: `y = x r w`,
//! `r = 1 / sqrt(mean x^2 + eps)` over the head.   Dehghani et al. 2023
use super::{
    Heads,
    prelude::*,
    rmsnorm::{backward_row, rstd},
};

#[derive(Debug)]
struct QkNorm {
    heads: Heads,
    eps: f64,
}

/// `dqkv`, `dwq`, `dwk`; the latter two are added to accumulators where there are any.
#[derive(Debug)]
struct QkNormBwd {
    heads: Heads,
    eps: f64,
    accumulate: bool,
}

impl Graph {
    /// `qkv [.., (H + 2 Hkv) D]` with every q head normalised and scaled by `wq [D]`, every k head by
    /// `wk [D]`, and the v heads as they are.
    #[track_caller]
    pub fn qk_norm(&mut self, qkv: Tensor, wq: Tensor, wk: Tensor, heads: Heads, eps: f64) -> Tensor {
        self.push::<1>(QkNorm { heads, eps }, &[qkv, wq, wk])[0]
    }
}

impl Op for QkNorm {
    fn name(&self) -> &'static str {
        "qk_norm"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [qkv, wq, wk] = operands(ins)?;
        floats(ins)?;
        self.heads.check(qkv)?;
        if let Some(w) = [wq, wk].iter().find(|w| w.shape.dims() != [self.heads.width]) {
            return Err(format!("{w:?} does not scale heads of {} columns", self.heads.width));
        }
        Ok(vec![qkv])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => {
            let (packed, width) = (self.heads.packed_width(), self.heads.width);
            let [x, wq, wk] = [0, 1, 2].map(|i| T::read(&ins[i]));
            let (y, chunk) = (T::write(&mut outs[0]), chunk_rows(packed));
            let rows = y.par_chunks_mut(chunk * packed).zip(x.par_chunks(chunk * packed));
            rows.for_each(|(y, x)| simd!({
                y.copy_from_slice(x);
                for row in y.chunks_mut(packed) {
                    for (h, y) in row[..self.heads.qk_columns()].chunks_mut(width).enumerate() {
                        let (r, w) = (rstd(y, self.eps), if h < self.heads.heads { wq } else { wk });
                        y.iter_mut().zip(w).for_each(|(y, w)| *y = *y * r * *w);
                    }
                }
            }));
        });
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let normed = ins[0].shape.rows() * self.heads.qk_columns();
        Cost { flops: 4 * normed as u64, bytes: traffic(ins, outs) }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let Some(dy) = d[0] else { return Ok(vec![Grad::Stop("no gradient arrived"); 3]) };
        let (qkv, wq, wk) = (n.ins[0], n.ins[1], n.ins[2]);
        let bwd = |accumulate| QkNormBwd { heads: self.heads, eps: self.eps, accumulate };
        Ok(match (g.accumulator(wq), g.accumulator(wk)) {
            (Some(sum_q), Some(sum_k)) if sum_q != sum_k => {
                let [dqkv, sum_q, sum_k] = g.push(bwd(true), &[qkv, wq, wk, dy, sum_q, sum_k]);
                vec![Grad::To(dqkv), Grad::Into(sum_q), Grad::Into(sum_k)]
            }
            _ => g.push::<3>(bwd(false), &[qkv, wq, wk, dy]).map(Grad::To).to_vec(),
        })
    }
}

impl Op for QkNormBwd {
    fn name(&self) -> &'static str {
        "qk_norm_bwd"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        Ok(match ins {
            [qkv, _, _, _, sum_q, sum_k] => vec![*qkv, *sum_q, *sum_k],
            _ => ins[..3].to_vec(),
        })
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        let [dx, dwq, dwk] = outs else { return };
        real!(dx, T => {
            let (rows, packed, width) = (dx.shape.rows(), self.heads.packed_width(), self.heads.width);
            let [x, wq, wk, dy] = [0, 1, 2, 3].map(|i| T::read(&ins[i]));
            let (dx, dwq, dwk) = (T::write(dx), T::write(dwq), T::write(dwk));
            let chunk = chunk_rows(packed).max(rows.div_ceil(64));
            if !self.accumulate {
                dwq.fill(T::ZERO);
                dwk.fill(T::ZERO);
            }
            // Each chunk sums its own dwq and dwk; the sums are added in the order of the chunks.
            cpu.scratch(rows.div_ceil(chunk) * 2 * width, |parts: &mut [T]| {
                let pieces = dx.par_chunks_mut(chunk * packed).zip(parts.par_chunks_mut(2 * width)).enumerate();
                pieces.for_each(|(i, (dx, dw))| simd!({
                    dw.fill(T::ZERO);
                    for (j, dx) in dx.chunks_mut(packed).enumerate() {
                        let row = (i * chunk + j) * packed..(i * chunk + j + 1) * packed;
                        self.row(&x[row.clone()], [wq, wk], &dy[row], dx, dw);
                    }
                }));
                for part in parts.chunks(2 * width) {
                    axpy(dwq, T::ONE, &part[..width]);
                    axpy(dwk, T::ONE, &part[width..]);
                }
            });
        });
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let normed = ins[0].shape.rows() * self.heads.qk_columns();
        Cost { flops: 13 * normed as u64, bytes: traffic(ins, outs) }
    }

    fn memory(&self, out: usize) -> Memory {
        if out > 0 && self.accumulate { Memory::InPlace { input: 3 + out } } else { Memory::Own }
    }
}

impl QkNormBwd {
    /// One packed row; `dw` holds `dwq`, then `dwk`.
    #[inline(always)]
    fn row<T: Real>(&self, x: &[T], w: [&[T]; 2], dy: &[T], dx: &mut [T], dw: &mut [T]) {
        let width = self.heads.width;
        dx.copy_from_slice(dy);
        for (h, dx) in dx[..self.heads.qk_columns()].chunks_mut(width).enumerate() {
            let head = h * width..(h + 1) * width;
            let (x, dy, k) = (&x[head.clone()], &dy[head], usize::from(h >= self.heads.heads));
            backward_row(x, w[k], dy, rstd(x, self.eps), dx, &mut dw[k * width..][..width]);
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case = |name, n: usize, heads: usize, kv_heads: usize, width: usize| {
        let heads = Heads { heads, kv_heads, width };
        Case::new("qk_norm", name, move |g, x| vec![g.qk_norm(x[0], x[1], x[2], heads, 1e-5)])
            .normal([n, heads.packed_width()])
            .normal([width])
            .normal([width])
    };
    vec![
        case("one row", 1, 1, 1, 3),
        case("7 rows of 3 + 1 heads", 7, 3, 1, 5),
        case("several chunks", 617, 2, 1, 34),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{CpuDevice, CpuOptions, Device, Place},
        op::Kind,
        plan::Plan,
        tensor::Host,
    };
    use std::sync::Arc;

    /// Gradients of the weights `names` after two runs.
    fn gradients(names: [&str; 2]) -> Vec<Vec<f64>> {
        let mut g = Graph::new();
        let qkv = g.input("qkv", [1, 6], DType::F64);
        let [wq, wk] = names.map(|w| g.state(Kind::Param, w, [2], DType::F64));
        let y = g.qk_norm(qkv, wq, wk, Heads { heads: 1, kv_heads: 1, width: 2 }, 0.0);
        let d = g.fill(1.0, [1, 6], DType::F64);
        let params = if wq == wk { vec![wq] } else { vec![wq, wk] };
        g.backward_from(&[(y, d)], &params).unwrap();
        let mut device = CpuDevice::new(CpuOptions { threads: 2, poison: true }).unwrap();
        let plan = device.open(Arc::new(Plan::new(&g).unwrap())).unwrap();
        let x = Host::F64(vec![3.0, 3.0, -5.0, 5.0, 0.0, 0.0]);
        device.write(Place::Input(plan, "qkv"), x.view()).unwrap();
        device.run(plan).unwrap();
        device.run(plan).unwrap();
        names.map(|w| device.fetch(Place::State(Kind::Grad, w)).unwrap().to_f64()).to_vec()
    }

    #[test]
    fn weights_accumulate_and_may_be_shared() {
        assert_eq!(gradients(["wq", "wk"]), [[2.0, 2.0], [-2.0, 2.0]]);
        assert_eq!(gradients(["w", "w"]), [[0.0, 4.0]; 2]);
    }
}
