//! Sines and cosines at geometric frequencies: of noise levels, `[cos(t f_j).., sin(t f_j)..]` with
//! `f_j = 10000^(-j / (C/2))`, and of places in a picture.   Vaswani et al. 2017; Peebles & Xie 2023
use super::{lots, prelude::*};

#[derive(Debug)]
struct TimeEmbedding {
    width: usize,
    dtype: DType,
}

#[derive(Debug)]
struct SinePositions {
    grid: usize,
    width: usize,
    dtype: DType,
}

impl Graph {
    /// `[I, width]` of `dtype`: the embedding of each of the noise levels `times [I]` (f32; in an f64 graph
    /// both are f64): `width / 2` cosines, then as many sines.
    #[track_caller]
    pub fn time_embedding(&mut self, times: Tensor, width: usize, dtype: DType) -> Tensor {
        self.push::<1>(TimeEmbedding { width, dtype }, &[times])[0]
    }

    /// `[grid^2, width]` of `dtype`: for each patch of a picture of `grid x grid` patches, in raster
    /// order, `[sin(px w_j).., cos(px w_j).., sin(py w_j).., cos(py w_j)..]` with
    /// `w_j = 10000^(-j / (width/4))`.
    #[track_caller]
    pub fn sine_positions(&mut self, grid: usize, width: usize, dtype: DType) -> Tensor {
        self.push::<1>(SinePositions { grid, width, dtype }, &[])[0]
    }
}

/// `10000^(-j / n)` for the n elements.
fn frequencies(f: &mut [f64]) {
    let n = f.len() as f64;
    for (j, f) in f.iter_mut().enumerate() {
        *f = 10_000f64.powf(-(j as f64) / n);
    }
}

/// The ratio of neighbours among `n` frequencies as a fraction of 2^64.
fn ratio(n: usize) -> Arg {
    Arg::U64((10_000f64.powf(-1.0 / n as f64) * 2f64.powi(64)) as u64)
}

/// The sines, and the cosines, of `x` times each frequency.
#[inline(always)]
fn waves<T: Real>(x: f64, frequencies: &[f64], sines: &mut [T], cosines: &mut [T]) {
    for ((sin, cos), f) in sines.iter_mut().zip(cosines).zip(frequencies) {
        let (s, c) = sin_cos(x * f);
        (*sin, *cos) = (T::of(s), T::of(c));
    }
}

impl Op for TimeEmbedding {
    fn name(&self) -> &'static str {
        "time_embedding"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [times] = operands(ins)?;
        let dtype = if times.dtype == DType::F64 { DType::F64 } else { self.dtype };
        let y = Spec::new([times.shape.numel(), self.width], dtype);
        floats(&[times, y])?;
        if times.dtype == DType::Bf16 {
            return Err(format!("{times:?} is too coarse for noise levels; use f32"));
        }
        if self.width == 0 || !self.width.is_multiple_of(2) {
            return Err(format!("{} columns are not sines and as many cosines", self.width));
        }
        Ok(vec![y])
    }

    fn workspace(&self, _: &[Spec], _: &[Spec], _: usize) -> Vec<usize> {
        vec![self.width / 2 * size_of::<f64>()]
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        real!(outs[0], T => cpu.scratch(self.width / 2, |f| {
            frequencies(f);
            let (times, y) = (T::read(&ins[0]), T::write(&mut outs[0]));
            y.par_chunks_mut(self.width).zip(times).for_each(|(y, t)| simd!({
                let (cosines, sines) = y.split_at_mut(f.len());
                waves(t.f64(), f, sines, cosines);
            }));
        }));
    }

    fn kernels(&self, _: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        let entry = format!("time_embedding_fwd_{}", lots::suffix(outs[0].dtype, outs[0].dtype)?);
        let waves = size(outs[0].shape.numel())? / 2;
        let sizes = [waves, size(self.width)?].map(Arg::U32);
        let args =
            [Arg::output(0), Arg::input(0)].into_iter().chain(sizes).chain([ratio(self.width / 2)]).collect();
        let lot = lots::lot(&[outs[0].dtype]);
        let lot = if (self.width / 2).is_multiple_of(lot as usize) { lot } else { 1 };
        Ok(lots::single(lots::over(entry, waves, lot, on, args)))
    }

    fn adjoint(&self, _: &mut Graph, _: &Node, _: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        Ok(vec![Grad::Stop("noise levels are given")])
    }
}

impl Op for SinePositions {
    fn name(&self) -> &'static str {
        "sine_positions"
    }

    fn infer(&self, _: &[Spec]) -> Result<Vec<Spec>, String> {
        let y = Spec::new([self.grid * self.grid, self.width], self.dtype);
        floats(&[y])?;
        if self.width == 0 || !self.width.is_multiple_of(4) {
            return Err(format!("{} columns are not four equal parts", self.width));
        }
        Ok(vec![y])
    }

    fn workspace(&self, _: &[Spec], _: &[Spec], _: usize) -> Vec<usize> {
        vec![self.width / 4 * size_of::<f64>()]
    }

    fn eval(&self, _: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        real!(outs[0], T => cpu.scratch(self.width / 4, |f| {
            frequencies(f);
            T::write(&mut outs[0]).par_chunks_mut(self.width).enumerate().for_each(|(p, y)| simd!({
                let (along, down) = y.split_at_mut(2 * f.len());
                for (at, part) in [(p % self.grid, along), (p / self.grid, down)] {
                    let (sines, cosines) = part.split_at_mut(f.len());
                    waves(at as f64, f, sines, cosines);
                }
            }));
        }));
    }

    fn kernels(&self, _: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        let entry = format!("sine_positions_fwd_{}", lots::suffix(self.dtype, self.dtype)?);
        let waves = size(outs[0].shape.numel())? / 2;
        let sizes = [waves, size(self.grid)?, size(self.width)?].map(Arg::U32);
        let args = [Arg::output(0)].into_iter().chain(sizes).chain([ratio(self.width / 4)]).collect();
        Ok(lots::single(lots::over(entry, waves, 1, on, args)))
    }

    fn adjoint(&self, _: &mut Graph, _: &Node, _: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        Ok(vec![])
    }
}

pub(super) fn cases() -> Vec<Case> {
    // Added to something, so that the result takes the float type under test and a gradient passes.
    let times = |name: String, n: usize, width: usize| {
        let build = move |g: &mut Graph, x: &[Tensor]| {
            let y = g.time_embedding(x[0], width, g.spec(x[1]).dtype);
            vec![g.add(x[1], y)]
        };
        Case::new("time_embedding", name, build)
            .constant([n], Fill::Uniform(-300.0, 1000.0))
            .normal([n, width])
    };
    let positions = |name: String, grid: usize, width: usize| {
        let build = move |g: &mut Graph, x: &[Tensor]| {
            let y = g.sine_positions(grid, width, g.spec(x[0]).dtype);
            vec![g.add(x[0], y)]
        };
        Case::new("sine_positions", name, build).normal([grid * grid, width])
    };
    let small = [
        times("one level".into(), 1, 2),
        times("7 levels".into(), 7, 26),
        positions("one patch".into(), 1, 4),
        positions("5 x 5".into(), 5, 28),
    ];
    let levels =
        [(1, 8), (2, 6), (3, 256), (5, 64), (11, 34), (13, 128), (17, 2), (31, 100), (64, 256), (127, 512)];
    let more = [
        (131, 62),
        (257, 14),
        (509, 40),
        (1021, 18),
        (2, 1024),
        (3, 4096),
        (9001, 62),
        (4, 10),
        (6, 12),
        (9, 20),
        (10, 22),
        (19, 24),
        (23, 28),
        (29, 30),
        (37, 72),
        (53, 96),
        (71, 200),
        (1, 2048),
        (7, 4),
        (83, 130),
    ];
    let levels =
        levels.into_iter().chain(more).map(|(n, width)| times(format!("{n}x{width}"), n, width).large());
    let grids = [
        (1, 8),
        (2, 4),
        (2, 64),
        (3, 12),
        (4, 256),
        (5, 20),
        (7, 100),
        (8, 128),
        (11, 36),
        (13, 16),
        (16, 512),
    ];
    let more = [
        (17, 8),
        (23, 60),
        (32, 64),
        (61, 24),
        (2, 2048),
        (131, 36),
        (6, 8),
        (9, 16),
        (10, 24),
        (12, 32),
        (14, 40),
        (19, 48),
        (29, 44),
        (31, 52),
        (37, 16),
        (41, 20),
        (1, 4),
        (21, 12),
        (43, 68),
    ];
    let grids = grids
        .into_iter()
        .chain(more)
        .map(|(n, width)| positions(format!("{n}x{n}, {width}"), n, width).large());
    small.into_iter().chain(levels).chain(grids).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cases::forward,
        device::{CpuDevice, CpuOptions},
        tensor::Host,
    };

    fn run(case: &Case) -> Vec<f64> {
        let device = CpuDevice::new(CpuOptions { threads: 2, poison: true }).unwrap();
        forward(case, DType::F64, device).unwrap().iter().flat_map(Host::to_f64).collect()
    }

    fn close(have: &[f64], want: &[f64]) {
        assert_eq!(have.len(), want.len());
        assert!(have.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-15), "{have:?} {want:?}");
    }

    #[test]
    fn cosines_come_before_sines() {
        let case = Case::new("time_embedding", "", |g, x| vec![g.time_embedding(x[0], 4, DType::F64)]);
        let t = 250f64;
        let want = [t.cos(), (t / 100.0).cos(), t.sin(), (t / 100.0).sin()];
        close(&run(&case.constant([1], Fill::Values(vec![t]))), &want);
    }

    #[test]
    fn columns_come_before_rows() {
        let case = Case::new("sine_positions", "", |g, _| vec![g.sine_positions(2, 4, DType::F64)]);
        let (s, c) = 1f64.sin_cos();
        let want = [[0.0, 1.0, 0.0, 1.0], [s, c, 0.0, 1.0], [0.0, 1.0, s, c], [s, c, s, c]].concat();
        close(&run(&case), &want);
    }

    #[test]
    fn odd_widths_are_refused() {
        let mut g = Graph::new();
        g.sine_positions(2, 6, DType::F32);
        assert!(g.check().unwrap_err().to_string().contains("four equal parts"));
    }
}
