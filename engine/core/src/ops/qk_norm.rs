//! Each q head and each k head of a packed row through a norm of its own: `y = x r w`,
//! `r = 1 / sqrt(mean x^2 + eps)` over the head.   Dehghani et al. 2023
use super::{
    Heads, lots,
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
    sum: Accumulation,
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

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        let layout = Layout::new(self.heads, ins)?;
        let args = [Arg::output(0), Arg::input(0), Arg::input(1), Arg::input(2)];
        let grid = [layout.blocks(lots::BLOCKS, on), 1, 1];
        let entry = format!("qk_norm_fwd_{}", layout.dtype);
        Ok(lots::single(Launch::kernel(entry, grid, lots::THREADS, 0, layout.args(&args, self.eps))))
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let normed = ins[0].shape.rows() * self.heads.qk_columns();
        Cost { flops: 4 * normed as u64, bytes: traffic(ins, outs) }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let Some(dy) = d[0] else { return Ok(vec![Grad::Stop("no gradient arrived"); 3]) };
        let (qkv, wq, wk) = (n.ins[0], n.ins[1], n.ins[2]);
        let bwd = |sum| QkNormBwd { heads: self.heads, eps: self.eps, sum };
        let sum = g.accumulation(wq);
        Ok(match (g.accumulator(wq), g.accumulator(wk)) {
            (Some(sum_q), Some(sum_k)) if sum_q != sum_k && sum == g.accumulation(wk) => {
                let [dqkv, sum_q, sum_k] = g.push(bwd(sum), &[qkv, wq, wk, dy, sum_q, sum_k]);
                vec![Grad::To(dqkv), Grad::Into(sum_q), Grad::Into(sum_k)]
            }
            _ => g.push::<3>(bwd(Accumulation::Apart), &[qkv, wq, wk, dy]).map(Grad::To).to_vec(),
        })
    }
}

/// Blocks of the backward pass that an SM holds at once, as the kernel's launch bounds promise.
const BACKWARD_BLOCKS: u32 = 4;

/// How the heads of packed rows are shared out to groups of lanes.
struct Layout {
    dtype: &'static str,
    rows: u32,
    heads: Heads,
    width: u32,
    vectors: u32,
}

impl Layout {
    fn new(heads: Heads, ins: &[Spec]) -> Result<Layout, String> {
        let (x, width) = (ins[0], size(heads.width)?);
        lots::suffix(x.dtype, x.dtype)?;
        if let Some(w) = ins[1..3].iter().find(|w| w.dtype != x.dtype) {
            return Err(format!("the scale {w:?} should be of the dtype of {x:?}; cast it"));
        }
        let vectors = width / lots::lot(&[x.dtype]);
        if !width.is_multiple_of(8) || vectors > 32 {
            return Err(format!(
                "heads of {width} columns are no multiple of 8 up to {}; use another width, or the CPU device",
                32 * lots::lot(&[x.dtype])
            ));
        }
        size(x.shape.numel())?;
        Ok(Layout { dtype: x.dtype.name(), rows: size(x.shape.rows())?, heads, width, vectors })
    }

    /// Heads of a row.
    fn all(&self) -> u32 {
        (self.heads.heads + 2 * self.heads.kv_heads) as u32
    }

    fn blocks(&self, per_sm: u32, on: &Target) -> u32 {
        lots::groups(self.rows * self.all(), self.vectors, per_sm, on)
    }

    fn args(&self, operands: &[Arg], eps: f64) -> Vec<Arg> {
        let Heads { heads, kv_heads, .. } = self.heads;
        let sizes =
            [self.rows, self.all(), heads as u32, (heads + kv_heads) as u32, self.width].map(Arg::U32);
        operands.iter().cloned().chain(sizes).chain([Arg::F32(eps as f32)]).collect()
    }
}

/// Rows that sum their `dwq` and `dwk` together.
fn chunk(rows: usize, packed: usize) -> usize {
    chunk_rows(packed).max(rows.div_ceil(64))
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

    fn workspace(&self, ins: &[Spec], _: &[Spec], _: usize) -> Vec<usize> {
        let rows = ins[0].shape.rows();
        let parts = rows.div_ceil(chunk(rows, self.heads.packed_width()));
        vec![parts * 2 * self.heads.width * ins[0].dtype.accumulator().size()]
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        let [dx, dwq, dwk] = outs else { return };
        real!(dx, T => {
            let (rows, packed, width) = (dx.shape.rows(), self.heads.packed_width(), self.heads.width);
            let [x, wq, wk, dy] = [0, 1, 2, 3].map(|i| T::read(&ins[i]));
            let (dx, dwq, dwk) = (T::write(dx), T::write(dwq), T::write(dwk));
            let chunk = chunk(rows, packed);
            if !self.sum.is_added() {
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

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        let layout = Layout::new(self.heads, ins)?;
        let parts = layout.blocks(BACKWARD_BLOCKS, on);
        let operands = [Arg::output(0), Arg::scratch(0), Arg::scratch(1)];
        let operands: Vec<Arg> = operands.into_iter().chain((0..4).map(Arg::input)).collect();
        let entry = format!("qk_norm_bwd_{}", layout.dtype);
        // A row of sums for each warp and each of q and k.
        let shared = 2 * lots::WARPS * layout.width * 4;
        let args = layout.args(&operands, self.eps);
        let mut launches = vec![Launch::kernel(entry, [parts, 1, 1], lots::THREADS, shared, args)];
        for (i, dw) in outs[1..].iter().enumerate() {
            let entry = format!("qk_norm_bwd_sum_{}", lots::suffix(dw.dtype, dw.dtype)?);
            let sizes = [parts, layout.width, self.sum.is_added().into()].map(Arg::U32);
            let args = [Arg::output(1 + i), Arg::scratch(i)].into_iter().chain(sizes).collect();
            launches.push(Launch::kernel(entry, [layout.width.div_ceil(32), 1, 1], lots::THREADS, 0, args));
        }
        Ok(Kernels { scratch: vec![parts.max(1) as usize * layout.width as usize * 4; 2], launches })
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let normed = ins[0].shape.rows() * self.heads.qk_columns();
        // Of the values only the gradient is read.
        let unread = ins[0].shape.rows() * self.heads.kv_columns() * ins[0].dtype.size();
        Cost { flops: 13 * normed as u64, bytes: traffic(self.sum.read(ins, 2), outs) - unread as u64 }
    }

    fn memory(&self, out: usize) -> Memory {
        if out > 0 { self.sum.memory(3 + out) } else { Memory::Own }
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

/// Rows of the 1.4B model.
pub(super) fn speed_cases() -> Vec<Case> {
    let heads = Heads { heads: 16, kv_heads: 16, width: 128 };
    let build = move |g: &mut Graph, x: &[Tensor]| vec![g.qk_norm(x[0], x[1], x[2], heads, 1e-5)];
    let case = Case::new("qk_norm", "16384 rows", build).normal([16_384, heads.packed_width()]);
    vec![case.normal([128]).normal([128]).accumulating().large()]
}

pub(super) fn cases() -> Vec<Case> {
    let case = |name: String, n: usize, heads: usize, kv_heads: usize, width: usize| {
        let heads = Heads { heads, kv_heads, width };
        Case::new("qk_norm", name, move |g, x| vec![g.qk_norm(x[0], x[1], x[2], heads, 1e-5)])
            .normal([n, heads.packed_width()])
            .normal([width])
            .normal([width])
    };
    let small = [
        case("one row".into(), 1, 1, 1, 3),
        case("7 rows of 3 + 1 heads".into(), 7, 3, 1, 5),
        case("several chunks".into(), 617, 2, 1, 34),
        case("accumulated".into(), 5, 3, 1, 8).accumulating(),
        case("sums begin".into(), 5, 3, 1, 8).beginning(),
        case("sums in bf16".into(), 67, 3, 1, 8).accumulating_in(DType::Bf16),
    ];
    // Rows, query heads, key heads, width: every size of group, full and with idle lanes, and rows that wrap
    // the grid.
    let shapes = [
        (1, 1, 1, 8),
        (2, 1, 1, 16),
        (3, 2, 1, 24),
        (5, 3, 1, 32),
        (7, 4, 2, 40),
        (11, 1, 1, 48),
        (13, 3, 3, 64),
        (17, 2, 2, 72),
        (19, 6, 2, 80),
        (23, 5, 1, 96),
        (29, 7, 1, 104),
        (31, 4, 4, 112),
        (37, 2, 1, 120),
        (41, 1, 1, 128),
        (43, 8, 2, 16),
        (47, 9, 3, 8),
        (53, 3, 1, 56),
        (59, 2, 2, 88),
        (61, 12, 4, 32),
        (67, 1, 1, 136),
        (71, 4, 1, 192),
        (79, 2, 1, 256),
        (101, 16, 4, 64),
        (127, 5, 5, 8),
        (257, 3, 1, 32),
        (521, 2, 1, 128),
        (1031, 6, 2, 8),
        (4513, 6, 1, 64),
        (73, 7, 7, 24),
        (83, 10, 2, 48),
    ];
    let name = |(n, heads, kv_heads, width)| format!("{n} rows of {heads} + {kv_heads} heads of {width}");
    let large = shapes.map(|s| case(name(s), s.0, s.1, s.2, s.3).large());
    let sums = [shapes[6], shapes[13], shapes[25], (1021, 3, 1, 16)];
    let sums =
        sums.map(|s| case(format!("{}, accumulated", name(s)), s.0, s.1, s.2, s.3).accumulating().large());
    let begun = [shapes[13], (1021, 3, 1, 16)];
    let begun =
        begun.map(|s| case(format!("{}, sums begin", name(s)), s.0, s.1, s.2, s.3).beginning().large());
    small.into_iter().chain(large).chain(sums).chain(begun).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_that_fit_no_group_are_refused() {
        let refused = |width: usize, dtype: DType| {
            let heads = Heads { heads: 2, kv_heads: 1, width };
            let w = Spec::new([width], dtype);
            let op = QkNorm { heads, eps: 1e-5 };
            op.kernels(&[Spec::new([3, 4 * width], dtype), w, w], &[], &Target::H200).unwrap_err()
        };
        assert!(refused(12, DType::Bf16).contains("multiple of 8 up to 256"));
        assert!(refused(264, DType::Bf16).contains("CPU device"));
        assert!(refused(136, DType::F32).contains("up to 128"));
        assert!(refused(8, DType::F64).contains("cast"));
    }
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
