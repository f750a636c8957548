//! Mean squared error of each image, and their weighted mean: `e[i] = mean (pred - target)^2` over
//! image i, `loss = (sum_i weights[i] e[i]) / count`.   Ho et al. 2020 (L_simple)
//!
//! An image of weight zero is not read: its error and its gradient are zero whatever it holds. The
//! loss is zero if `count` is.
use super::{lots, prelude::*};

#[derive(Debug)]
struct Mse;

/// `dpred = 2 dloss weights[i] / (count elements) (pred - target)`.
#[derive(Debug)]
struct MseBwd;

impl Graph {
    /// `(loss [1], per_image [I])` of `pred` and `target`, both `[I, ..]`, with `weights [I]` and
    /// `count [1]` (f32, or f64 in an f64 graph), as are the results. Only the loss carries a gradient,
    /// to `pred` only.
    #[track_caller]
    pub fn mse(&mut self, pred: Tensor, target: Tensor, weights: Tensor, count: Tensor) -> (Tensor, Tensor) {
        let [loss, per_image] = self.push(Mse, &[pred, target, weights, count]);
        (loss, per_image)
    }
}

impl Op for Mse {
    fn name(&self) -> &'static str {
        "mse"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [pred, target, weights, count] = operands(ins)?;
        floats(ins)?;
        let images = pred.shape.dims().first().copied().unwrap_or(0);
        if pred.shape != target.shape || pred.shape.numel() == 0 {
            return Err(format!("{pred:?} and {target:?} are not the same images"));
        }
        let sums = pred.dtype.accumulator();
        for (s, want) in [(weights, Spec::new([images], sums)), (count, Spec::new([1], sums))] {
            if s != want {
                return Err(format!("{s:?} should be {want:?}"));
            }
        }
        Ok(vec![count, weights])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        let [loss, per_image] = outs else { return };
        real!(loss, T => {
            let [pred, target, weights, count] = [0, 1, 2, 3].map(|i| T::read(&ins[i]));
            let (loss, per_image) = (T::write(loss), T::write(per_image));
            let size = pred.len() / weights.len();
            let images = pred.par_chunks(size).zip(target.par_chunks(size));
            per_image.par_iter_mut().zip(weights).zip(images).for_each(|((error, w), (p, t))| {
                let square = |e: usize| (p[e] - t[e]) * (p[e] - t[e]);
                let used = *w != T::ZERO;
                *error = if used { simd!(sum(size, square)) / T::of(size as f64) } else { T::ZERO };
            });
            let empty = count[0] == T::ZERO;
            loss[0] = if empty { T::ZERO } else { dot(weights, per_image) / count[0] };
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], _: &Target) -> Result<Kernels, String> {
        let (images, numel) = (size(ins[2].shape.numel())?, elements(ins)?);
        let operands = [Arg::output(1), Arg::input(0), Arg::input(1), Arg::input(2)];
        let args = operands.into_iter().chain([Arg::U32(numel)]).collect();
        let entry = format!("mse_fwd_{}", suffix(ins)?);
        let errors = Launch::kernel(entry, [images, 1, 1], lots::THREADS, 0, args);
        let args = vec![Arg::output(0), Arg::output(1), Arg::input(2), Arg::input(3), Arg::U32(images)];
        let loss = Launch::kernel("mse_fwd_loss_f32", [1; 3], lots::THREADS, 0, args);
        Ok(Kernels { scratch: vec![], launches: vec![errors, loss] })
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 3 * ins[0].shape.numel() as u64, bytes: traffic(ins, outs) }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let stop = Grad::Stop("targets, weights and counts are given");
        let dpred = match d[0] {
            Some(dloss) => {
                let ins: Vec<Tensor> = n.ins.iter().copied().chain([dloss]).collect();
                Grad::To(g.push::<1>(MseBwd, &ins)[0])
            }
            None => Grad::Stop("errors of single images are reported only; differentiate the loss"),
        };
        Ok(vec![dpred, stop, stop, stop])
    }
}

/// Values of an image.
fn elements(ins: &[Spec]) -> Result<u32, String> {
    size(ins[0].shape.numel() / ins[2].shape.numel().max(1))
}

/// How entries spell the dtypes of predictions and targets.
fn suffix(ins: &[Spec]) -> Result<String, String> {
    match (ins[0].dtype, ins[1].dtype) {
        (DType::F32, DType::Bf16) => Err("no kernel compares f32 with bf16; cast the targets".into()),
        (pred, target) => lots::suffix(pred, target),
    }
}

impl Op for MseBwd {
    fn name(&self) -> &'static str {
        "mse_bwd"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [pred, ..] = operands::<5>(ins)?;
        Ok(vec![pred])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => {
            let [pred, target, weights, count, dloss] = [0, 1, 2, 3, 4].map(|i| T::read(&ins[i]));
            let size = pred.len() / weights.len();
            let images = pred.par_chunks(size).zip(target.par_chunks(size)).zip(weights);
            T::write(&mut outs[0]).par_chunks_mut(size).zip(images).for_each(|(dp, ((p, t), w))| simd!({
                if *w == T::ZERO || count[0] == T::ZERO {
                    return dp.fill(T::ZERO);
                }
                let scale = T::of(2.0) * dloss[0] * *w / (count[0] * T::of(size as f64));
                for ((dp, p), t) in dp.iter_mut().zip(p).zip(t) {
                    *dp = scale * (*p - *t);
                }
            }));
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        let numel = elements(ins)?;
        let operands = [Arg::output(0)].into_iter().chain((0..5).map(Arg::input));
        let args = operands.chain([Arg::U32(numel)]).collect();
        let lot = lots::lot(&[ins[0].dtype, ins[1].dtype]);
        let grid = lots::images(ins[2].shape.numel(), numel, lot, on)?;
        let entry = format!("mse_bwd_{}", suffix(ins)?);
        Ok(lots::single(Launch::kernel(entry, grid, lots::THREADS, 0, args)))
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 2 * outs[0].shape.numel() as u64, bytes: traffic(ins, outs) }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let with = |case: Case, size: usize, pred: Fill, weights: &[f64], count: f64| {
        case.floats([weights.len(), size], pred)
            .constant([weights.len(), size], Fill::Normal(1.0))
            .constant([weights.len()], Fill::Values(weights.to_vec()))
            .constant([1], Fill::Values(vec![count]))
    };
    let loss = |name: &str| Case::new("mse", name, |g, x| vec![g.mse(x[0], x[1], x[2], x[3]).0]);
    let errors = Case::new("mse", "errors of single images", |g, x| {
        let (loss, per_image) = g.mse(x[0], x[1], x[2], x[3]);
        vec![loss, per_image]
    });
    let normal = Fill::Normal(1.0);
    let used_then_not = Fill::Values([[0.5; 7], [f64::NAN; 7]].concat());
    let small = [
        with(loss("one number"), 1, normal.clone(), &[1.0], 1.0),
        with(loss("5 images of 131"), 131, normal.clone(), &[1.0, 0.5, 0.0, 2.0, 1.0], 3.0),
        with(loss("unused images hold NaN"), 7, used_then_not.clone(), &[1.0, 0.0, 1.5, 0.0], 2.0),
        with(loss("count is zero"), 3, normal, &[0.0, 0.0], 0.0),
        with(errors, 7, used_then_not, &[1.0, 0.0, 1.5, 0.0], 2.0).without_gradient(),
    ];
    // Values of an image that are no multiple of a vector, that fill a block, and that take several rounds.
    let weights = [1.0, 0.0, 0.5, 2.0, 1.0, 0.25, 0.0];
    let sizes = [
        (1, 2),
        (2, 3),
        (3, 4),
        (5, 8),
        (7, 16),
        (2, 31),
        (3, 64),
        (5, 100),
        (7, 127),
        (2, 1023),
        (3, 1024),
        (5, 1025),
        (7, 4099),
        (1, 12_288),
        (2, 8192),
        (61, 48),
        (257, 8),
        (601, 75),
        (1, 300_007),
    ];
    let large = sizes.map(|(images, numel)| {
        let weights: Vec<f64> = weights.into_iter().cycle().take(images).collect();
        with(loss(&format!("{images} of {numel}")), numel, Fill::Normal(1.0), &weights, images as f64).large()
    });
    // Targets in the storage type, as the model has them.
    let alike = [(3, 24), (7, 129), (5, 2048), (601, 64), (2, 100_003)].map(|(images, numel)| {
        Case::new("mse", format!("{images} of {numel}, alike"), |g, x| {
            let (loss, per_image) = g.mse(x[0], x[1], x[2], x[3]);
            vec![loss, per_image]
        })
        .normal([images, numel])
        .normal([images, numel])
        .constant([images], Fill::Values(weights.to_vec()))
        .constant([1], Fill::Values(vec![images as f64]))
        .without_gradient()
        .large()
    });
    // And with a gradient.
    let trained =
        [(3, 40), (7, 515), (61, 192), (1021, 16), (1, 7), (2, 9), (11, 33), (13, 256), (17, 1), (131, 67)];
    let trained = trained.map(|(images, numel)| {
        Case::new("mse", format!("{images} of {numel}, trained"), |g, x| {
            let target = g.cast(x[1], g.spec(x[0]).dtype);
            vec![g.mse(x[0], target, x[2], x[3]).0]
        })
        .normal([images, numel])
        .constant([images, numel], Fill::Normal(1.0))
        .constant([images], Fill::Values(weights.to_vec()))
        .constant([1], Fill::Values(vec![images as f64]))
        .large()
    });
    small.into_iter().chain(large).chain(alike).chain(trained).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cases::forward,
        device::{CpuDevice, CpuOptions},
    };

    #[test]
    fn the_loss_is_the_weighted_mean_over_the_count() {
        let case = Case::new("mse", "", |g, x| {
            let (loss, per_image) = g.mse(x[0], x[1], x[2], x[3]);
            vec![loss, per_image]
        })
        .floats([3, 2], Fill::Values(vec![1.0, 3.0, f64::NAN, 0.0, 2.0, 2.0]))
        .constant([3, 2], Fill::Values(vec![0.0]))
        .constant([3], Fill::Values(vec![1.0, 0.0, 0.5]))
        .constant([1], Fill::Values(vec![2.0]));
        let device = CpuDevice::new(CpuOptions { threads: 2, poison: true }).unwrap();
        let out = forward(&case, DType::F32, device).unwrap();
        assert_eq!(out[0].to_f64(), [3.5]);
        assert_eq!(out[1].to_f64(), [5.0, 0.0, 4.0]);
    }
}
