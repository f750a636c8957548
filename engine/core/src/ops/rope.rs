//! Rotary positions: each pair of adjacent columns of a q or k head turns by an angle,
//! `(x[2j], x[2j+1]) -> (x[2j] cos a - x[2j+1] sin a, x[2j] sin a + x[2j+1] cos a)`,
//! `a = position theta^(-2j/D)`.   Su et al. 2021
//!
//! Angles are computed in f64 from the position alone, so a row turns the same in every batch.
use super::{Heads, lots, prelude::*};
use crate::tensor::Shape;
use std::fmt;

/// Rotary positions of packed heads.
#[derive(Clone, Copy, Debug)]
pub struct Rotary {
    /// i32, one for each row; a row at a negative position is unused and stays as it is.
    pub positions: Tensor,
    /// What the rows hold.
    pub heads: Heads,
    /// Base of the angles.
    pub theta: f64,
}

/// Packed heads that attend: a tensor, or one whose q and k heads have turned; the gradient then reaches what they were
/// before without that of the turned ones being stored.
#[derive(Clone, Copy, Debug)]
pub struct Qkv {
    pub(super) x: Tensor,
    pub(super) turned: Turned,
}

impl Qkv {
    pub(super) fn turned(x: Tensor, before: Tensor, shape: Shape, rotary: Rotary) -> Qkv {
        let Rotary { positions, heads, theta } = rotary;
        let rope = Rope { heads, theta };
        Qkv { x, turned: Turned(Some(Before { heads: before, shape, positions, rope })) }
    }

    /// The heads themselves.
    pub fn tensor(self) -> Tensor {
        self.x
    }

    /// The same under another shape.
    #[track_caller]
    pub fn reshape(self, g: &mut Graph, shape: impl Into<Shape>) -> Qkv {
        Qkv { x: g.reshape(self.x, shape), ..self }
    }
}

impl From<Tensor> for Qkv {
    fn from(x: Tensor) -> Qkv {
        Qkv { x, turned: Turned(None) }
    }
}

/// What heads were before they turned. Only the adjoint of a reader asks for it: ops that differ in nothing else are
/// written alike.
#[derive(Clone, Copy)]
pub(super) struct Turned(pub Option<Before>);

/// Heads before they turned, the shape of their gradient, and how they did.
#[derive(Clone, Copy)]
pub(super) struct Before {
    pub heads: Tensor,
    pub shape: Shape,
    pub positions: Tensor,
    pub rope: Rope,
}

impl fmt::Debug for Turned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0.is_some(), f)
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Rope {
    pub heads: Heads,
    pub theta: f64,
}

/// The rotation back, in memory of its own: others may read the gradient that arrives.
#[derive(Debug)]
pub(super) struct RopeBwd(pub Rope);

impl Graph {
    /// Turns the q and k heads of `qkv [.., (H + 2 Hkv) D]`, in place, by `positions` (i32, one for
    /// each row). A row at a negative position is unused and stays as it is.
    #[track_caller]
    pub fn rope(&mut self, qkv: Tensor, positions: Tensor, heads: Heads, theta: f64) -> Tensor {
        self.push::<1>(Rope { heads, theta }, &[qkv, positions])[0]
    }

    /// The same for heads that attend.
    #[track_caller]
    pub fn rotary(&mut self, qkv: Tensor, rotary: Rotary) -> Qkv {
        let x = self.rope(qkv, rotary.positions, rotary.heads, rotary.theta);
        Qkv::turned(x, qkv, self.spec(qkv).shape, rotary)
    }
}

/// Turns every pair of a head by its `[cos, sin]`.
#[inline(always)]
fn turn<T: Real>(head: &mut [T], table: &[T]) {
    for (x, t) in head.as_chunks_mut::<2>().0.iter_mut().zip(table.as_chunks::<2>().0) {
        *x = [x[0] * t[0] - x[1] * t[1], x[0] * t[1] + x[1] * t[0]];
    }
}

impl Rope {
    /// Turns the rows of `y` by `sign` times their angles; rows of `x`, if there are any, are copied
    /// into `y` before.
    pub(super) fn run<T: Real>(&self, x: &[T], positions: &[i32], y: &mut [T], sign: f64, cpu: &Cpu) {
        let (packed, width) = (self.heads.packed_width(), self.heads.width);
        let chunk = chunk_rows(packed);
        // Angles of one step, and for each chunk the turns of its current row.
        cpu.scratch(width / 2, |steps: &mut [f64]| {
            for (j, step) in steps.iter_mut().enumerate() {
                *step = sign * self.theta.powf(-((2 * j) as f64) / width as f64);
            }
            cpu.scratch(positions.len().div_ceil(chunk) * width, |tables: &mut [T]| {
                let pieces = y.par_chunks_mut(chunk * packed).zip(positions.par_chunks(chunk));
                pieces.zip(tables.par_chunks_mut(width)).enumerate().for_each(|(i, ((y, at), table))| {
                    if !x.is_empty() {
                        y.copy_from_slice(&x[i * chunk * packed..][..y.len()]);
                    }
                    let used = y.chunks_mut(packed).zip(at).filter(|(_, at)| **at >= 0);
                    used.for_each(|(row, &at)| simd!(self.turn_row(row, at, steps, table)));
                });
            });
        });
    }

    /// Bytes of what [`Rope::run`] borrows for rows of `x`.
    pub(super) fn space(&self, x: Spec) -> Vec<usize> {
        let chunks = x.shape.rows().div_ceil(chunk_rows(self.heads.packed_width()));
        let tables = chunks * self.heads.width * x.dtype.accumulator().size();
        vec![self.heads.width / 2 * size_of::<f64>(), tables]
    }

    #[inline(always)]
    fn turn_row<T: Real>(&self, row: &mut [T], position: i32, steps: &[f64], table: &mut [T]) {
        for (turn, step) in table.as_chunks_mut::<2>().0.iter_mut().zip(steps) {
            let (sin, cos) = sin_cos(f64::from(position) * step);
            *turn = [T::of(cos), T::of(sin)];
        }
        row[..self.heads.qk_columns()].chunks_mut(self.heads.width).for_each(|head| turn(head, table));
    }
}

/// Heads that a thread turns by the angles it has found, at least.
const TOGETHER: u32 = 4;
/// Threads that fill an SM well enough.
const SM_THREADS: u32 = 1024;

impl Rope {
    /// What turns the q and k heads of `y` in place.
    pub(super) fn forward(&self, y: Arg, positions: Arg, qkv: Spec, on: &Target) -> Result<Launch, String> {
        self.launch("fwd", vec![y, positions], qkv, on)
    }

    /// What turns those of `y` back, in place.
    pub(super) fn backward(&self, y: Arg, positions: Arg, qkv: Spec, on: &Target) -> Result<Launch, String> {
        self.launch("bwd", vec![y.clone(), y, positions], qkv, on)
    }

    /// theta^(-2/D) as a fraction of 2^64, for heads that kernels turn.
    pub(super) fn ratio(&self) -> Result<u64, String> {
        let width = self.heads.width;
        if !width.is_multiple_of(8) {
            return Err(format!(
                "heads of {width} columns are no multiple of 8; use another width, or the CPU device"
            ));
        }
        if self.theta < 1.0 {
            return Err(format!("theta is {}; the kernel takes 1 and more; use the CPU device", self.theta));
        }
        Ok((self.theta.powf(-2.0 / width as f64) * 2f64.powi(64)) as u64)
    }

    /// The pass over the rows: forward over the q and k heads in place, backward over all.
    fn launch(&self, pass: &str, args: Vec<Arg>, x: Spec, on: &Target) -> Result<Launch, String> {
        let (width, ratio) = (size(self.heads.width)?, self.ratio()?);
        let entry = format!("rope_{pass}_{}", lots::suffix(x.dtype, x.dtype)?);
        size(x.shape.numel())?;
        let (rows, vectors) = (size(x.shape.rows())?, width / lots::lot(&[x.dtype]));
        let turning = size(self.heads.heads + self.heads.kv_heads)?;
        let heads = turning + size(self.heads.kv_heads)?;
        let walked = if pass == "fwd" { turning } else { heads };
        let shares = (on.sms * SM_THREADS).div_ceil((rows * vectors).max(1)).clamp(1, walked);
        let together = walked.div_ceil(shares).max(TOGETHER);
        let items = rows * walked.div_ceil(together) * vectors;
        let sizes = [rows, width, heads, turning, together].map(Arg::U32);
        let args = args.into_iter().chain(sizes).chain([Arg::U64(ratio)]).collect();
        let grid = [lots::blocks(items, lots::THREADS, on), 1, 1];
        Ok(Launch::kernel(entry, grid, lots::THREADS, 4 * width, args))
    }

    /// Multiplications and additions on the pairs of the q and k heads of `qkv`; sines are not counted.
    pub(super) fn flops(&self, qkv: Spec) -> u64 {
        6 * (qkv.shape.rows() * self.heads.qk_columns() / 2) as u64
    }
}

impl Op for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [qkv, positions] = operands(ins)?;
        floats(&[qkv])?;
        integers(positions)?;
        self.heads.check(qkv)?;
        if !self.heads.width.is_multiple_of(2) {
            return Err(format!("heads of {} columns are no pairs; use an even width", self.heads.width));
        }
        if self.theta.is_nan() || self.theta <= 0.0 {
            return Err(format!("theta is {}, not positive", self.theta));
        }
        if positions.shape.numel() != qkv.shape.rows() {
            return Err(format!("{positions:?} does not give one position to each row of {qkv:?}"));
        }
        Ok(vec![qkv])
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], _: usize) -> Vec<usize> {
        self.space(ins[0])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        real!(outs[0], T => self.run::<T>(&[], ins[1].i32(), T::write(&mut outs[0]), 1.0, cpu));
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        Ok(lots::single(self.forward(Arg::output(0), Arg::input(1), ins[0], on)?))
    }

    /// The value heads stay where they are.
    fn cost(&self, ins: &[Spec], _: &[Spec]) -> Cost {
        let turned = ins[0].shape.rows() * self.heads.qk_columns() * ins[0].dtype.size();
        Cost { flops: self.flops(ins[0]), bytes: (2 * turned + ins[1].bytes()) as u64 }
    }

    fn memory(&self, _: usize) -> Memory {
        Memory::InPlace { input: 0 }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let Some(dy) = d[0] else { return Ok(vec![Grad::Stop("no gradient arrived"); 2]) };
        let [dx] = g.push(RopeBwd(*self), &[dy, n.ins[1]]);
        Ok(vec![Grad::To(dx), Grad::Integer])
    }
}

impl Op for RopeBwd {
    fn name(&self) -> &'static str {
        "rope_bwd"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        self.0.infer(ins)
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], _: usize) -> Vec<usize> {
        self.0.space(ins[0])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        real!(outs[0], T => {
            self.0.run::<T>(T::read(&ins[0]), ins[1].i32(), T::write(&mut outs[0]), -1.0, cpu);
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        let args = vec![Arg::output(0), Arg::input(0), Arg::input(1)];
        Ok(lots::single(self.0.launch("bwd", args, ins[0], on)?))
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: self.0.flops(ins[0]), bytes: traffic(ins, outs) }
    }
}

/// Rows of the 1.4B model.
pub(super) fn speed_cases() -> Vec<Case> {
    let heads = Heads { heads: 16, kv_heads: 16, width: 128 };
    let build = move |g: &mut Graph, x: &[Tensor]| vec![g.rope(x[0], x[1], heads, 1e4)];
    let case = Case::new("rope", "16384 rows", build).normal([16_384, heads.packed_width()]);
    vec![case.ints([16_384], &(0..4096).collect::<Vec<_>>()).large()]
}

pub(super) fn cases() -> Vec<Case> {
    let case = |name: &str, n: usize, heads: usize, kv_heads: usize, width: usize, positions: &[i32]| {
        let heads = Heads { heads, kv_heads, width };
        Case::new("rope", name, move |g, x| vec![g.rope(x[0], x[1], heads, 1e4)])
            .normal([n, heads.packed_width()])
            .ints([n], positions)
    };
    // Rows, query heads, key heads, width: heads shared out to threads in every way, and positions far and near.
    let shapes = [
        (1, 1, 1, 8),
        (2, 1, 1, 16),
        (3, 2, 1, 8),
        (5, 3, 1, 24),
        (7, 4, 2, 32),
        (11, 1, 1, 64),
        (13, 3, 3, 16),
        (17, 2, 2, 40),
        (19, 6, 2, 8),
        (23, 5, 1, 32),
        (29, 7, 1, 16),
        (31, 4, 4, 64),
        (37, 2, 1, 128),
        (41, 1, 1, 256),
        (43, 8, 2, 24),
        (47, 9, 3, 8),
        (53, 3, 1, 72),
        (59, 2, 2, 96),
        (61, 12, 4, 16),
        (67, 1, 1, 48),
        (71, 4, 1, 80),
        (101, 2, 1, 64),
        (127, 5, 5, 8),
        (131, 16, 4, 8),
        (257, 3, 1, 32),
        (521, 2, 1, 16),
        (1031, 1, 1, 8),
        (6961, 1, 1, 128),
        (73, 2, 2, 120),
        (83, 11, 1, 8),
    ];
    let large = shapes.map(|(n, heads, kv_heads, width)| {
        let at = |i: usize| match i % 5 {
            3 => -1,
            4 => 100_003 + i as i32,
            _ => (i % 1021) as i32,
        };
        let name = format!("{n} rows of {heads} + {kv_heads} heads of {width}");
        case(&name, n, heads, kv_heads, width, &(0..n).map(at).collect::<Vec<_>>()).large()
    });
    let small = [
        case("one pair", 1, 1, 1, 2, &[3]),
        case("grouped, unused rows", 7, 3, 1, 6, &[0, 1, -1, 100_000, 2, i32::MIN, 7]),
        case("several chunks", 331, 2, 2, 18, &(0..331).map(|n| n % 173).collect::<Vec<_>>()),
        case("the last position", 2, 1, 1, 8, &[i32::MAX, 1]),
    ];
    small.into_iter().chain(large).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cases::forward,
        device::{CpuDevice, CpuOptions},
        tensor::Host,
    };

    #[test]
    fn pairs_turn_by_their_angles_and_values_stay() {
        let heads = Heads { heads: 1, kv_heads: 1, width: 4 };
        let case = Case::new("rope", "", move |g, x| vec![g.rope(x[0], x[1], heads, 100.0)])
            .floats([2, 12], Fill::Values(vec![1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 5.0, 6.0, 7.0, 8.0]))
            .ints([2], &[3, -1]);
        let device = CpuDevice::new(CpuOptions::default()).unwrap();
        let y = forward(&case, DType::F64, device).unwrap().iter().flat_map(Host::to_f64).collect::<Vec<_>>();
        let head = [3f64.cos(), 3f64.sin(), -0.3f64.sin(), 0.3f64.cos()];
        let want = [head, head, [5.0, 6.0, 7.0, 8.0]].concat();
        assert!(want.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-15), "{y:?}");
        assert_eq!(y[12..], [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 5.0, 6.0, 7.0, 8.0]);
    }

    #[test]
    fn what_the_kernel_cannot_turn_is_refused() {
        let refused = |width: usize, theta: f64| {
            let rope = Rope { heads: Heads { heads: 2, kv_heads: 1, width }, theta };
            let ins = [Spec::new([3, 4 * width], DType::Bf16), Spec::new([3], DType::I32)];
            rope.kernels(&ins, &ins[..1], &Target::H200).unwrap_err()
        };
        assert!(refused(18, 1e4).contains("multiple of 8"));
        assert!(refused(16, 0.5).contains("CPU device"));
    }

    #[test]
    fn odd_heads_are_refused() {
        let mut g = Graph::new();
        let (x, at) = (g.input("x", [2, 9], DType::F32), g.input("at", [2], DType::I32));
        g.rope(x, at, Heads { heads: 1, kv_heads: 1, width: 3 }, 1e4);
        assert!(g.check().unwrap_err().to_string().contains("even width"));
    }
}
