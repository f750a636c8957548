//! The optimiser step: gradient norm and clipping, AdamW, and the running mean of the weights.
//! Loshchilov & Hutter 2019 (decoupled decay); Polyak & Juditsky 1992 (averaging)
//!
//! Everything that changes between steps is a tensor. A gradient that is not finite makes the scale
//! zero, and a zero scale leaves weights, moments and means as they are.
use super::prelude::*;
use std::{collections::HashSet, sync::Arc};

mod kernels;

/// What stays the same from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f64,
}

/// The states that one parameter's step updates.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStates {
    /// The weight.
    pub param: Tensor,
    /// Its f32 master copy, where the weight is bf16.
    pub master: Option<Tensor>,
    /// First moment.
    pub m: Tensor,
    /// Second moment.
    pub v: Tensor,
    /// Gradient, which is read.
    pub grad: Tensor,
}

#[derive(Debug)]
struct SumSquares;

#[derive(Debug)]
struct Clip {
    max_norm: f64,
}

#[derive(Debug)]
struct AdamWStep {
    hyper: AdamW,
    params: usize,
    /// States of each that it moves: 3, or 4 with a master copy.
    states: usize,
}

#[derive(Debug)]
struct Ema {
    /// Means, each with what it follows.
    pairs: usize,
}

impl Graph {
    /// `sum [1] += sum of x^2` over all tensors `xs`, in place, in their order. Neighbours of one type share
    /// launches, up to 32 of them.
    #[track_caller]
    pub fn sum_squares_into(&mut self, mut sum: Tensor, xs: &[Tensor]) -> Tensor {
        for some in self.together(xs, |&x| vec![x], |&x| self.decoded(x)) {
            let ins: Vec<Tensor> = [sum].into_iter().chain(some.iter().copied()).collect();
            [sum] = self.push(SumSquares, &ins);
        }
        sum
    }

    /// `(norm, scale)`, each `[1]`, from a sum of squares: `scale = min(1, max_norm / norm)`, or zero
    /// where the norm is not finite.
    #[track_caller]
    pub fn clip(&mut self, sum_squares: Tensor, max_norm: f64) -> [Tensor; 2] {
        self.push(Clip { max_norm }, &[sum_squares])
    }

    /// One step of every parameter of `all`, in place; the new weights (the master copies where there are some), in order. `schedule [3]` holds the learning rate,
    /// `1 - beta1^t` and `1 - beta2^t`; `scale [1]` multiplies the gradients. Neighbours that are stored in
    /// the same types share a launch, up to 32 of them.
    #[track_caller]
    pub fn adamw(
        &mut self,
        hyper: AdamW,
        all: &[AdamWStates],
        schedule: Tensor,
        scale: Tensor,
    ) -> Vec<Tensor> {
        let mut new = Vec::with_capacity(all.len());
        for some in self.together(all, AdamWStates::tensors, |s| self.spec(s.param).shape.numel()) {
            let states = some[0].tensors().len() - 1;
            let op = AdamWStep { hyper, params: some.len(), states };
            let ins = some.iter().flat_map(AdamWStates::tensors).chain([schedule, scale]);
            let outs = self.apply(Arc::new(op), &ins.collect::<Vec<_>>());
            let moved = if states == 4 { 3 } else { 0 };
            new.extend(
                (0..some.len()).map(|i| outs.get(i * states + moved).copied().unwrap_or(Tensor::VOID)),
            );
        }
        new
    }

    /// `mean += (1 - decay) (x - mean)` of every pair `[mean, x]`, in place, unless `scale` is zero; `decay` and
    /// `scale` `[1]`. Pairs share launches as in [`Graph::adamw`].
    #[track_caller]
    pub fn ema_into(&mut self, pairs: &[[Tensor; 2]], decay: Tensor, scale: Tensor) -> Vec<Tensor> {
        let mut means = Vec::with_capacity(pairs.len());
        for some in self.together(pairs, |pair| pair.to_vec(), |pair| self.spec(pair[0]).shape.numel()) {
            let ins = some.iter().flatten().copied().chain([decay, scale]);
            let outs = self.apply(Arc::new(Ema { pairs: some.len() }), &ins.collect::<Vec<_>>());
            means.extend((0..some.len()).map(|i| outs.get(i).copied().unwrap_or(Tensor::VOID)));
        }
        means
    }

    /// Neighbours that one op may take: of the same types, so many as a launch takes and, but for one alone, no
    /// more than [`ELEMENTS`] by `size`. What is named again comes later, for another op: what the first one moved a plan
    /// then refuses as read when it was replaced.
    fn together<'a, T>(
        &self,
        all: &'a [T],
        tensors: impl Fn(&T) -> Vec<Tensor>,
        size: impl Fn(&T) -> usize,
    ) -> Vec<&'a [T]> {
        let (mut groups, mut rest) = (Vec::new(), all);
        while let Some(first) = rest.first() {
            let types = |x: &T| tensors(x).iter().map(|&t| self.spec(t).dtype).collect::<Vec<_>>();
            let wanted = types(first);
            let (mut elements, mut named) = (0, HashSet::new());
            let fits = |x: &&T| {
                elements += size(x);
                elements <= ELEMENTS && types(x) == wanted && tensors(x).into_iter().all(|t| named.insert(t))
            };
            let count = rest.iter().take(TOGETHER).take_while(fits).count().max(1);
            let (group, others) = rest.split_at(count);
            groups.push(group);
            rest = others;
        }
        groups
    }

    /// What counts of a tensor that an op only reads: nothing, unless the CPU device decodes it. A quarter then, since
    /// AdamW decodes up to four tensors of each parameter.
    fn decoded(&self, x: Tensor) -> usize {
        let s = self.spec(x);
        if s.dtype == DType::Bf16 { s.shape.numel().div_ceil(4) } else { 0 }
    }
}

impl AdamWStates {
    /// In the order in which the op takes them.
    fn tensors(&self) -> Vec<Tensor> {
        [self.param, self.m, self.v].into_iter().chain(self.master).chain([self.grad]).collect()
    }
}

const CHUNK: usize = 16 * 1024;
/// Parameters that one op moves, means, or tensors that it sums: the rows of its kernels' tables.
const TOGETHER: usize = 32;
/// Their elements, where the CPU device decodes some of them: it decodes all bf16 operands of an op at once, and of more a
/// launch is nothing beside its work.
const ELEMENTS: usize = 1 << 25;

impl Op for SumSquares {
    fn name(&self) -> &'static str {
        "sum_squares"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        floats(ins)?;
        let sum = ins[0];
        if sum.shape.numel() != 1 { Err(format!("{sum:?} is not one number")) } else { Ok(vec![sum]) }
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], _: usize) -> Vec<usize> {
        let chunks = ins[1..].iter().map(|x| x.shape.numel().div_ceil(CHUNK));
        vec![chunks.max().unwrap_or(0) * size_of::<f64>()]
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        real!(outs[0], T => {
            // Every chunk in T, the chunks in f64, in their order.
            let squares = |x: &[T]| cpu.scratch(x.len().div_ceil(CHUNK), |parts: &mut [f64]| {
                let each = parts.par_iter_mut().zip(x.par_chunks(CHUNK));
                each.for_each(|(part, x)| *part = simd!(dot(x, x)).f64());
                parts.iter().sum::<f64>()
            });
            let total: f64 = ins[1..].iter().map(|x| squares(T::read(x))).sum();
            let sum = &mut T::write(&mut outs[0])[0];
            *sum = T::of(sum.f64() + total);
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::sum_squares(ins, on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let squares: usize = ins[1..].iter().map(|x| x.shape.numel()).sum();
        Cost { flops: 2 * squares as u64, bytes: traffic(ins, outs) }
    }

    fn memory(&self, _: usize) -> Memory {
        Memory::InPlace { input: 0 }
    }
}

impl Op for Clip {
    fn name(&self) -> &'static str {
        "clip"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [sum] = operands(ins)?;
        floats(ins)?;
        if sum.shape.numel() != 1 { Err(format!("{sum:?} is not one number")) } else { Ok(vec![sum; 2]) }
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        let [norm, scale] = outs else { return };
        real!(norm, T => {
            let n = T::read(&ins[0])[0].f64().sqrt();
            T::write(norm)[0] = T::of(n);
            T::write(scale)[0] = match n.is_finite() {
                true => T::of((self.max_norm / n.max(1e-12)).min(1.0)),
                false => T::ZERO,
            };
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], _: &Target) -> Result<Kernels, String> {
        kernels::clip(ins, self.max_norm)
    }
}

impl Op for AdamWStep {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        floats(ins)?;
        let (all, numbers) = ins.split_at(self.params * (self.states + 1));
        for own in all.chunks(self.states + 1) {
            if let Some(s) = own.iter().find(|s| s.shape != own[0].shape) {
                return Err(format!("state {s:?} is not of the weight's shape {:?}", own[0]));
            }
            if own[1].dtype != own[2].dtype {
                return Err(format!("moments {:?} and {:?} differ in type", own[1], own[2]));
            }
        }
        let [schedule, scale] = operands(numbers)?;
        if schedule.shape.numel() != 3 || scale.shape.numel() != 1 {
            return Err(format!("schedule {schedule:?} is not [3] or scale {scale:?} not [1]"));
        }
        Ok(all.chunks(self.states + 1).flat_map(|own| &own[..self.states]).copied().collect())
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        let [states @ .., schedule, scale] = ins else { return };
        real!(outs[1], T => {
            let scale = T::read(scale)[0];
            if scale == T::ZERO {
                return;
            }
            let step = StepOf::new(&self.hyper, T::read(schedule), scale);
            let grads = states.iter().skip(self.states).step_by(self.states + 1);
            outs.chunks_mut(self.states).zip(grads).for_each(|(own, grad)| step.of(own, T::read(grad)));
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::adamw(&self.hyper, self.states, ins, on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        // With a master copy the weight is only written.
        let read = |own: &[Spec]| traffic(&own[usize::from(self.states == 4)..], &[]);
        let read: u64 = ins[..self.params * (self.states + 1)].chunks(self.states + 1).map(read).sum();
        let elements: usize = outs.iter().step_by(self.states).map(|s| s.shape.numel()).sum();
        Cost { flops: 14 * elements as u64, bytes: read + traffic(&[], outs) }
    }

    fn memory(&self, out: usize) -> Memory {
        Memory::InPlace { input: out + out / self.states }
    }
}

/// One step's numbers.
struct StepOf<T> {
    beta1: T,
    beta2: T,
    eps: T,
    rate: T,
    keep: T,
    root: T,
    scale: T,
}

impl<T: Real> StepOf<T> {
    fn new(h: &AdamW, schedule: &[T], scale: T) -> Self {
        let (lr, c1, c2) = (schedule[0].f64(), schedule[1].f64(), schedule[2].f64());
        StepOf {
            beta1: T::of(h.beta1),
            beta2: T::of(h.beta2),
            eps: T::of(h.eps),
            rate: T::of(lr / c1),
            keep: T::of(1.0 - lr * h.weight_decay),
            root: T::of(1.0 / c2.sqrt()),
            scale,
        }
    }

    /// The step of one parameter.
    fn of(&self, own: &mut [Out<'_>], grad: &[T]) {
        let [param, m, v, master @ ..] = own else { return };
        let (m, v) = (T::write(m), T::write(v));
        let (param, copy) = match master {
            [master, ..] => (T::write(master), T::write(param)),
            [] => (T::write(param), &mut [][..]),
        };
        let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        let each = param.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK)).zip(moments);
        each.for_each(|((p, g), (m, v))| simd!(self.apply(p, m, v, g)));
        copy.copy_from_slice(&param[..copy.len()]);
    }

    #[inline(always)]
    fn apply(&self, p: &mut [T], m: &mut [T], v: &mut [T], g: &[T]) {
        let n = p.len();
        let (m, v, g) = (&mut m[..n], &mut v[..n], &g[..n]);
        for i in 0..n {
            let d = g[i] * self.scale;
            m[i] = self.beta1 * m[i] + (T::ONE - self.beta1) * d;
            v[i] = self.beta2 * v[i] + (T::ONE - self.beta2) * d * d;
            p[i] = self.keep * p[i] - self.rate * m[i] / (v[i].sqrt() * self.root + self.eps);
        }
    }
}

impl Op for Ema {
    fn name(&self) -> &'static str {
        "ema"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        floats(ins)?;
        let (pairs, numbers) = ins.split_at(2 * self.pairs);
        let [decay, scale] = operands(numbers)?;
        if let Some(p) = pairs.chunks(2).find(|p| p[0].shape != p[1].shape) {
            return Err(format!("mean {:?} of {:?}", p[0], p[1]));
        }
        if decay.shape.numel() != 1 || scale.shape.numel() != 1 {
            return Err(format!("decay {decay:?} or scale {scale:?} is not [1]"));
        }
        Ok(pairs.iter().step_by(2).copied().collect())
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => {
            let [decay, scale] = [0, 1].map(|i| T::read(&ins[2 * self.pairs + i])[0]);
            if scale == T::ZERO {
                return;
            }
            for (mean, x) in outs.iter_mut().zip(ins.iter().skip(1).step_by(2)) {
                let each = T::write(mean).par_chunks_mut(CHUNK).zip(T::read(x).par_chunks(CHUNK));
                each.for_each(|(mean, x)| simd!({
                    for (mean, x) in mean.iter_mut().zip(x) {
                        *mean += (T::ONE - decay) * (*x - *mean);
                    }
                }));
            }
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::ema(ins, self.pairs, on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let elements: usize = outs.iter().map(|s| s.shape.numel()).sum();
        Cost { flops: 3 * elements as u64, bytes: traffic(ins, outs) }
    }

    fn memory(&self, out: usize) -> Memory {
        Memory::InPlace { input: 2 * out }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let hyper = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let broken = || Fill::Values(vec![1.0, f64::NAN, f64::INFINITY, -2.0, 0.0]);
    let joined = |lengths: &[usize]| match lengths.len() {
        n @ 0..12 => lengths[..n].iter().map(usize::to_string).collect::<Vec<_>>().join(" and "),
        n => format!("{n} tensors"),
    };
    // Moments as after gradients of size `past`. Narrow moments and gradients are of the type under test.
    let stored = |case: Case, narrow: bool, n: usize, fill: Fill| match narrow {
        true => case.floats([n], fill),
        false => case.single([n], fill),
    };
    let step_of = move |narrow: [bool; 2],
                        past: f64,
                        name: &str,
                        master: bool,
                        n: usize,
                        scale: f64,
                        gradient: Fill| {
        let case = Case::new("adamw", name, move |g, x| {
            let s = AdamWStates { param: x[0], m: x[1], v: x[2], grad: x[3], master: master.then(|| x[6]) };
            g.adamw(hyper, &[s], x[4], x[5])
        });
        let [moments, gradients] = narrow;
        let case = stored(case.normal([n]), moments, n, Fill::Normal(0.1 * past));
        let case = stored(case, moments, n, Fill::Uniform(0.1 * past * past, past * past));
        let case = stored(case, gradients, n, gradient)
            .single([3], Fill::Values(vec![0.01, 0.19, 0.0975]))
            .single([1], Fill::Values(vec![scale]));
        if master { case.single([n], Fill::Normal(1.0)) } else { case }.without_gradient()
    };
    let step_after = move |past: f64, name: &str, master: bool, n: usize, scale: f64, gradient: Fill| {
        step_of([false; 2], past, name, master, n, scale, gradient)
    };
    let step = move |name: &str, master: bool, n: usize, scale: f64, gradient: Fill| {
        step_after(1.0, name, master, n, scale, gradient)
    };
    let any = |master: bool, n: usize| {
        let name = format!("{n}{}", if master { ", master copy" } else { "" });
        step(&name, master, n, 0.25 + (n % 3) as f64, Fill::Normal(0.1)).large()
    };
    // Parameters of these lengths, weights and master copies behind the other states of each.
    let steps_of = move |narrow: [bool; 2], master: bool, scale: f64, lengths: &[usize]| {
        let each = if master { 5 } else { 4 };
        let params = lengths.len();
        let build = move |g: &mut Graph, x: &[Tensor]| {
            let of = |own: &[Tensor]| {
                let master = own.get(4).copied();
                AdamWStates { param: own[0], m: own[1], v: own[2], grad: own[3], master }
            };
            let (own, numbers) = x.split_at(params * each);
            let all: Vec<AdamWStates> = own.chunks(each).map(of).collect();
            g.adamw(hyper, &all, numbers[0], numbers[1])
        };
        let of_type = |on: bool, word| if on { word } else { "" };
        let [moments, gradients] = narrow;
        let name = format!(
            "{}{}{}{}, scale {scale}",
            joined(lengths),
            of_type(master, ", master copies"),
            of_type(moments, ", moments narrow"),
            of_type(gradients, ", gradients narrow")
        );
        let gradient = |i: usize| if scale == 0.0 { broken() } else { Fill::Normal(0.1 + 0.1 * i as f64) };
        let with = |case: Case, (i, &n): (usize, &usize)| {
            let case = stored(case.normal([n]), moments, n, Fill::Normal(0.1));
            let case = stored(case, moments, n, Fill::Uniform(0.1, 1.0));
            let case = stored(case, gradients, n, gradient(i));
            if master { case.single([n], Fill::Normal(1.0)) } else { case }
        };
        let case = lengths.iter().enumerate().fold(Case::new("adamw", name, build), with);
        case.single([3], Fill::Values(vec![0.01, 0.19, 0.0975]))
            .single([1], Fill::Values(vec![scale]))
            .without_gradient()
    };
    let squares_of = |lengths: &[usize]| {
        let case = Case::new("sum_squares", joined(lengths), |g, x| vec![g.sum_squares_into(x[0], &x[1..])])
            .single([1], Fill::Values(vec![2.0]))
            .without_gradient();
        lengths.iter().fold(case, |case, &n| case.normal([n]))
    };
    let squares = |n: usize| squares_of(&[n]);
    let clip = |name: &str, sum: f64| {
        let build = |g: &mut Graph, x: &[Tensor]| g.clip(x[0], 1.0).to_vec();
        Case::new("clip", name, build).single([1], Fill::Values(vec![sum])).without_gradient()
    };
    // A norm that is not finite is no result to compare.
    let cut = |name: &str, sum: f64| {
        let build = |g: &mut Graph, x: &[Tensor]| vec![g.clip(x[0], 3.0)[1]];
        Case::new("clip", name, build).single([1], Fill::Values(vec![sum])).without_gradient()
    };
    let ema = |name: String, n: usize, decay: f64, scale: f64| {
        Case::new("ema", name, |g, x| g.ema_into(&[[x[0], x[1]]], x[2], x[3]))
            .single([n], Fill::Normal(1.0))
            .normal([n])
            .single([1], Fill::Values(vec![decay]))
            .single([1], Fill::Values(vec![scale]))
            .without_gradient()
    };
    let means_of = |scale: f64, lengths: &[usize]| {
        let (pairs, name) = (lengths.len(), format!("{}, scale {scale}", joined(lengths)));
        let build = move |g: &mut Graph, x: &[Tensor]| {
            let (all, numbers) = x.split_at(2 * pairs);
            let all: Vec<[Tensor; 2]> = all.chunks(2).map(|pair| [pair[0], pair[1]]).collect();
            g.ema_into(&all, numbers[0], numbers[1])
        };
        let with = |case: Case, &n: &usize| case.single([n], Fill::Normal(1.0)).normal([n]);
        let case = lengths.iter().fold(Case::new("ema", name, build), with);
        case.single([1], Fill::Values(vec![0.9])).single([1], Fill::Values(vec![scale])).without_gradient()
    };
    let mut cases = vec![
        step("plain", false, 37, 0.5, Fill::Normal(1.0)),
        step("master copy", true, 16_411, 0.5, Fill::Normal(1.0)),
        step("skipped", false, 43, 0.0, broken()),
        step("skipped, master copy", true, 1029, 0.0, broken()),
        step_after(1e-8, "gradients as small as eps", false, 61, 1.0, Fill::Normal(1e-8)),
        squares(20_011),
        steps_of([false; 2], false, 0.5, &[3, 40, 1, 17]),
        steps_of([false; 2], true, 0.5, &[5, 2, 1029]),
        steps_of([false; 2], true, 0.0, &[43, 6]),
        steps_of([false; 2], false, 0.5, &[7; 35]),
        steps_of([false; 2], true, 0.5, &[0, 9, 0]),
        squares_of(&[17, 40_009, 1, 5]),
        squares_of(&[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]),
        squares_of(&[7; 35]),
        squares_of(&[0, 9, 0]),
        clip("long", 16.0),
        clip("short", 0.25),
        clip("nothing", 0.0),
        clip("tiny", 1e-38),
        clip("the bound itself", 1.0),
        cut("infinite", f64::INFINITY),
        cut("not a number", f64::NAN),
        cut("below zero", -1.0),
        cut("huge", 3e38),
        ema("decay 0.9".into(), 37, 0.9, 1.0),
        ema("skipped".into(), 41, 0.9, 0.0),
        ema("at once".into(), 1027, 0.0, 0.5),
        means_of(1.0, &[3, 40, 1, 1029]),
        means_of(0.0, &[5, 41]),
        means_of(1.0, &[6; 33]),
    ];
    // Every tail, ends of blocks, and more than the grid takes at once.
    let lengths =
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 31, 61, 64, 127, 251, 509, 768, 1021, 1023, 1024, 1025, 2039, 2047];
    let longer = [2048, 2049, 3071, 4099, 5003, 8191, 10_007, 16_384, 444_001];
    for n in lengths.into_iter().chain(longer) {
        cases.extend([false, true].map(|master| any(master, n)));
        cases.push(squares(n).large());
        cases.push(ema(n.to_string(), n, 0.99, 1.0).large());
    }
    cases.push(squares(900_001).large());
    // Vectors that fill the grid so that the next tensor begins in its middle, at its end, or anywhere.
    let several: [&[usize]; 8] = [
        &[1024, 1024],
        &[7, 2048, 8],
        &[4099, 1, 1021, 15],
        &[16_384, 16_384, 16_384, 16_384, 16_384, 16_384, 16_384, 16_384],
        &[444_001, 3, 200_003],
        &[5, 900_001, 61, 9, 65_537, 2, 8, 333_333],
        &[64, 64, 64, 64, 64, 64, 64],
        &[540_672, 270_336, 1_081_344],
    ];
    cases.extend(several.map(|lengths| squares_of(lengths).large()));
    cases.extend(several.map(|lengths| means_of(1.0, lengths).large()));
    for master in [false, true] {
        cases.extend(several.map(|lengths| steps_of([false; 2], master, 0.5, lengths).large()));
        cases.push(steps_of([false; 2], master, 0.0, &[4099, 2, 8191, 1]).large());
    }
    // Norms and biases of a model, and more rows than one table has.
    let widths: Vec<usize> = (0..35).map(|i| [768, 64, 64, 3, 1, 2049, 4][i % 7]).collect();
    cases.push(steps_of([false; 2], true, 0.5, &widths).large());
    cases.push(means_of(1.0, &widths).large());
    cases.push(squares_of(&widths).large());
    cases.push(squares_of(&widths[..32]).large());
    for (narrow, what) in [([true, false], "moments"), ([false, true], "gradient"), ([true; 2], "both")] {
        let case = |n: usize, scale: f64, gradient: Fill| {
            let name = format!("{n}, {what} narrow, scale {scale}");
            step_of(narrow, 1.0, &name, true, n, scale, gradient)
        };
        cases.push(case(1029, 0.5, Fill::Normal(1.0)));
        cases.push(case(43, 0.0, broken()));
        cases.extend([1, 3, 6, 1023, 5003, 444_001].map(|n| case(n, 0.5, Fill::Normal(0.1)).large()));
        cases.extend([0.5, 0.0].map(|scale| steps_of(narrow, true, scale, &[1023, 5, 4099, 64]).large()));
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{CpuDevice, CpuOptions, Device, Place},
        op::Kind,
        plan::Plan,
    };

    #[test]
    fn neighbours_of_the_same_types_go_together() {
        let mut g = Graph::new();
        let mut state =
            |i: usize, what: &str, n: usize, dtype| g.state(Kind::Optim, &format!("{i}.{what}"), [n], dtype);
        let all: Vec<AdamWStates> = (0..70)
            .map(|i| {
                let narrow = (40..50).contains(&i);
                let n = if i > 65 { ELEMENTS / 2 } else { i };
                let param = state(i, "w", n, if narrow { DType::Bf16 } else { DType::F32 });
                let [m, v, grad] = ["m", "v", "g"].map(|what| state(i, what, n, DType::F32));
                AdamWStates { param, m, v, grad, master: narrow.then(|| state(i, "master", n, DType::F32)) }
            })
            .collect();
        let schedule = g.input("schedule", [3], DType::F32);
        let scale = g.input("scale", [1], DType::F32);
        let hyper = AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
        let new = g.adamw(hyper, &all, schedule, scale);
        g.check().unwrap();
        let states: Vec<usize> = g.nodes().iter().map(|n| n.outs.len()).collect();
        assert_eq!((new.len(), states), (70, [32 * 3, 8 * 3, 10 * 4, 17 * 3, 2 * 3, 3].to_vec()));
        assert_eq!(g.spec(new[45]), g.spec(all[45].master.unwrap()));
        let latest = g.state(Kind::Optim, "69.w", [ELEMENTS / 2], DType::F32);
        assert_eq!(new[69], latest);
    }

    #[test]
    fn sums_take_as_many_as_the_cpu_decodes() {
        let mut g = Graph::new();
        let mut state = |i: usize, dtype| g.state(Kind::Grad, &i.to_string(), [ELEMENTS], dtype);
        let wide = (0..34).map(|i| state(i, DType::F32)).collect::<Vec<_>>();
        let narrow = (34..43).map(|i| state(i, DType::Bf16)).collect::<Vec<_>>();
        let zero = g.fill(0.0, [1], DType::F32);
        let sum = g.sum_squares_into(zero, &[wide, narrow].concat());
        g.check().unwrap();
        let taken = g.nodes().iter().skip(1).map(|n| n.ins.len() - 1);
        assert_eq!((taken.collect::<Vec<_>>(), g.sum_squares_into(sum, &[])), (vec![32, 2, 4, 4, 1], sum));
    }

    #[test]
    fn a_parameter_that_is_named_again_is_refused() {
        let mut g = Graph::new();
        let mut state = |what| g.state(Kind::Optim, what, [3], DType::F32);
        let [param, m, v, grad] = ["w", "m", "v", "g"].map(&mut state);
        let s = AdamWStates { param, master: None, m, v, grad };
        let (schedule, scale) = (g.input("schedule", [3], DType::F32), g.input("scale", [1], DType::F32));
        let hyper = AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
        g.adamw(hyper, &[s, s], schedule, scale);
        let refused = Plan::new(&g).unwrap_err();
        assert!(
            matches!(refused, crate::Error::Overwritten { reader: "adamw", by: "adamw", .. }),
            "{refused}"
        );
    }

    /// Three steps against the formula of the paper, a step that is skipped between them.
    #[test]
    fn steps_follow_the_paper_and_a_gradient_that_is_not_finite_changes_nothing() {
        let hyper = AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
        let mut g = Graph::new();
        let state = |g: &mut Graph, kind, name| g.state(kind, name, [1], DType::F64);
        let s = AdamWStates {
            param: state(&mut g, Kind::Param, "w"),
            master: None,
            m: state(&mut g, Kind::Optim, "m"),
            v: state(&mut g, Kind::Optim, "v"),
            grad: state(&mut g, Kind::Grad, "w"),
        };
        let schedule = g.input("schedule", [3], DType::F64);
        let zero = g.fill(0.0, [1], DType::F64);
        let sum = g.sum_squares_into(zero, &[s.grad]);
        let [norm, scale] = g.clip(sum, 2.0);
        let mean = state(&mut g, Kind::Ema, "w");
        let decay = g.fill(0.5, [1], DType::F64);
        let new = g.adamw(hyper, &[s], schedule, scale);
        g.ema_into(&[[mean, new[0]]], decay, scale);
        g.output("norm", norm);
        let mut device = CpuDevice::new(CpuOptions { threads: 1, poison: true }).unwrap();
        let plan = device.open(Plan::new(&g).unwrap().into()).unwrap();
        let (mut w, mut m, mut v, mut mean) = (1.5, 0.0, 0.0, 0.0);
        device.write(Place::State(Kind::Param, "w"), View::F64(&[w])).unwrap();
        let mut t = 0;
        for grad in [0.5, -8.0, f64::NAN, f64::INFINITY, 1.0] {
            if grad.is_finite() {
                t += 1;
                let d = grad * f64::min(1.0, 2.0 / f64::abs(grad));
                (m, v) = (0.9 * m + 0.1 * d, 0.99 * v + 0.01 * d * d);
                let (mh, vh) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.99f64.powi(t)));
                w -= 0.01 * (mh / (vh.sqrt() + 1e-8) + 0.1 * w);
                mean += 0.5 * (w - mean);
            }
            let schedule = [0.01, 1.0 - 0.9f64.powi(t), 1.0 - 0.99f64.powi(t)];
            device.write(Place::Input(plan, "schedule"), View::F64(&schedule)).unwrap();
            device.write(Place::State(Kind::Grad, "w"), View::F64(&[grad])).unwrap();
            device.run(plan).unwrap();
            let mut read = |kind, name| device.fetch(Place::State(kind, name)).unwrap().to_f64()[0];
            let have = [(Kind::Param, "w"), (Kind::Optim, "m"), (Kind::Optim, "v"), (Kind::Ema, "w")];
            for ((kind, name), want) in have.into_iter().zip([w, m, v, mean]) {
                let have = read(kind, name);
                assert!((have - want).abs() < 1e-7, "{kind:?} {name}: {have} {want}");
            }
            assert_eq!(read(Kind::Grad, "w").to_bits(), grad.to_bits());
        }
    }
}
