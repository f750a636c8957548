//! Cross entropy fused with the output projection, in chunks of rows, so that the logits of the whole
//! batch never exist at once:
//!   `loss = sum_r (lse[r] - z[r, target r]) / count`,   `z = h w^T`,   `lse = ln sum_v exp z[r, v]`
use super::prelude::*;
use crate::tensor::Host;

mod kernels;
mod plain;

#[derive(Debug)]
struct CrossEntropy {
    precision: Precision,
}

/// `dh` and `dw`; `dw` is added to an accumulator where there is one.
#[derive(Debug)]
struct CrossEntropyBwd {
    sum: Accumulation,
    precision: Precision,
}

impl Graph {
    /// The loss `[1]` of rows `h [R, C]` under the output projection `w [V, C]`: the sum of the cross
    /// entropy in nats of `targets` i32 `[R]`, divided by `count [1]`. Targets outside of `0..V` are
    /// unused; a count of zero yields zero.
    #[track_caller]
    pub fn cross_entropy(&mut self, h: Tensor, w: Tensor, targets: Tensor, count: Tensor) -> Tensor {
        let op = CrossEntropy { precision: self.precision };
        self.push::<2>(op, &[h, w, targets, count])[0]
    }
}

/// Rows whose logits one task holds.
const TASK: usize = 192;

/// Rows whose probabilities exist at once in the backward pass.
fn window(vocabulary: usize) -> usize {
    (4_000_000 / vocabulary.max(1)).clamp(TASK, 2048).next_multiple_of(TASK)
}

/// `1 / count`, or zero.
fn inverse<T: Real>(count: T) -> T {
    if count > T::ZERO { T::ONE / count } else { T::ZERO }
}

/// A target as an index, if its row is in use.
#[inline(always)]
fn used(target: i32, vocabulary: usize) -> Option<usize> {
    usize::try_from(target).ok().filter(|&t| t < vocabulary)
}

/// `ln sum exp` of a row.
#[inline(always)]
fn log_sum_exp<T: Real>(z: &[T]) -> T {
    let mut lanes = [T::NEG_INFINITY; LANES];
    let (chunks, rest) = z.as_chunks::<LANES>();
    for c in chunks {
        for l in 0..LANES {
            lanes[l] = lanes[l].max(c[l]);
        }
    }
    let top = lanes.iter().chain(rest).fold(T::NEG_INFINITY, |m, x| m.max(*x));
    top + sum(z.len(), |i| (z[i] - top).exp()).ln()
}

fn shapes(ins: &[Spec]) -> Result<(), String> {
    let [h, w, targets, count] = operands(&ins[..4])?;
    floats(&[h, w, count])?;
    integers(targets)?;
    if h.shape.last() == 0 {
        return Err(format!("{h:?} has no columns"));
    }
    if h.shape.last() != w.shape.last() {
        return Err(format!("inner dimensions differ: {h:?} times the transpose of {w:?}"));
    }
    if targets.shape.numel() != h.shape.rows() || count.shape.numel() != 1 {
        return Err(format!("{targets:?} is no target for every row of {h:?}, or count {count:?} not [1]"));
    }
    Ok(())
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        shapes(ins)?;
        let sums = ins[0].dtype.accumulator();
        Ok(vec![Spec::new([1], sums), Spec::new([ins[0].shape.rows()], sums)])
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], threads: usize) -> Vec<usize> {
        let (rows, v) = (ins[0].shape.rows(), ins[1].shape.rows());
        let (task, size) = (TASK.min(rows), ins[0].dtype.accumulator().size());
        let each = [task * v * size, rows_space(task, true, ins[0].dtype, self.precision)];
        [vec![rows * size], each.repeat(threads.min(rows.div_ceil(TASK)))].concat()
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        let [loss, lse] = outs else { return };
        real!(loss, T => {
            let (c, v) = (ins[1].shape.last(), ins[1].shape.rows());
            let (h, w) = (T::read(&ins[0]), Mat::new(T::read(&ins[1]), v, c).t());
            let (targets, lse) = (ins[2].i32(), T::write(lse));
            let rows = targets.len();
            cpu.scratch(rows, |each: &mut [T]| {
                let tasks = lse.par_chunks_mut(TASK).zip(each.par_chunks_mut(TASK));
                let tasks = tasks.zip(h.par_chunks(TASK * c).zip(targets.par_chunks(TASK)));
                tasks.for_each(|((lse, each), (h, targets))| {
                    if targets.iter().all(|&t| used(t, v).is_none()) {
                        lse.fill(T::ZERO);
                        each.fill(T::ZERO);
                        return;
                    }
                    cpu.scratch(lse.len() * v, |z: &mut [T]| {
                        matmul_rows(z, Mat::new(h, lse.len(), c), w, false, self.precision, cpu);
                        simd!({
                            for (r, z) in z.chunks(v).enumerate() {
                                (lse[r], each[r]) = (T::ZERO, T::ZERO);
                                if let Some(target) = used(targets[r], v) {
                                    lse[r] = log_sum_exp(z);
                                    each[r] = lse[r] - z[target];
                                }
                            }
                        });
                    });
                });
                T::write(loss)[0] = sum(rows, |r| each[r]) * inverse(T::read(&ins[3])[0]);
            });
        });
    }

    fn plain(&self, specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
        plain::forward(specs, ins)
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::forward(ins, on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let product = 2 * ins[0].shape.numel() as u64 * ins[1].shape.rows() as u64;
        Cost { flops: product, bytes: traffic(ins, outs) }
    }

    fn precision(&self, _: &[Spec]) -> Precision {
        self.precision
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let stop = || Grad::Stop("the count is data");
        let Some(dloss) = d[0] else { return Ok(vec![stop(); n.ins.len()]) };
        let mut ins = n.ins.clone();
        ins.extend([n.outs[1], dloss]);
        ins.extend(g.accumulator(n.ins[1]));
        let sum = g.accumulation(n.ins[1]);
        let [dh, dw] = g.push(CrossEntropyBwd { sum, precision: self.precision }, &ins);
        Ok(vec![Grad::To(dh), sum.grad(dw), Grad::Integer, stop()])
    }
}

impl Op for CrossEntropyBwd {
    fn name(&self) -> &'static str {
        "cross_entropy_bwd"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        shapes(ins)?;
        Ok(vec![ins[0], ins.get(6).copied().unwrap_or(ins[1])])
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], threads: usize) -> Vec<usize> {
        let (c, v) = (ins[1].shape.last(), ins[1].shape.rows());
        let (rows, size) = (ins[0].shape.rows().min(window(v)), ins[0].dtype.accumulator().size());
        let task = rows_space(TASK.min(rows), true, ins[0].dtype, self.precision);
        let tasks = vec![task; threads.min(rows.div_ceil(TASK))];
        let weight = product_space(v, false, ins[0].dtype, self.precision, threads);
        [vec![rows * v * size], most([tasks, [vec![rows * c * size], weight].concat()])].concat()
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        let [dh, dw] = outs else { return };
        real!(dh, T => {
            let (c, v) = (ins[1].shape.last(), ins[1].shape.rows());
            let [h, w, lse] = [0, 1, 4].map(|i| T::read(&ins[i]));
            let (targets, dh, dw) = (ins[2].i32(), T::write(dh), T::write(dw));
            let scale = T::read(&ins[5])[0] * inverse(T::read(&ins[3])[0]);
            if !self.sum.is_added() {
                dw.fill(T::ZERO);
            }
            // Rows after the last one in use cost nothing.
            let n = targets.iter().rposition(|&t| used(t, v).is_some()).map_or(0, |last| last + 1);
            dh[n * c..].fill(T::ZERO);
            let (rows, w) = (window(v), Mat::new(w, v, c));
            for (i, dh) in dh[..n * c].chunks_mut(rows * c).enumerate() {
                let (n, at) = (dh.len() / c, i * rows);
                let (h, lse, targets) = (&h[at * c..][..n * c], &lse[at..][..n], &targets[at..][..n]);
                cpu.scratch(n * v, |dz: &mut [T]| {
                    let tasks = dz.par_chunks_mut(TASK * v).zip(dh.par_chunks_mut(TASK * c));
                    tasks.enumerate().for_each(|(j, (dz, dh))| {
                        let (m, at) = (dh.len() / c, j * TASK);
                        matmul_rows(dz, Mat::new(&h[at * c..], m, c), w.t(), false, self.precision, cpu);
                        simd!(logits_gradient(dz, v, &targets[at..], &lse[at..], scale));
                        matmul_rows(dh, Mat::new(dz, m, v), w, false, self.precision, cpu);
                    });
                    let mut add = |h: &[T]| {
                        matmul(dw, Mat::new(dz, n, v).t(), Mat::new(h, n, c), true, self.precision, cpu);
                    };
                    if targets.iter().all(|&t| used(t, v).is_some()) {
                        return add(h);
                    }
                    // What stands in an unused row may be no number, and zero times that is none either.
                    cpu.scratch(n * c, |kept: &mut [T]| {
                        for ((kept, h), &t) in kept.chunks_mut(c).zip(h.chunks(c)).zip(targets) {
                            kept.copy_from_slice(h);
                            if used(t, v).is_none() {
                                kept.fill(T::ZERO);
                            }
                        }
                        add(kept);
                    });
                });
            }
        });
    }

    fn plain(&self, specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
        plain::backward(specs, ins, self.sum)
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::backward(ins, outs, self.sum.is_added(), on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let product = 2 * ins[0].shape.numel() as u64 * ins[1].shape.rows() as u64;
        Cost { flops: 3 * product, bytes: traffic(self.sum.read(ins, 1), outs) }
    }

    fn precision(&self, _: &[Spec]) -> Precision {
        self.precision
    }

    fn memory(&self, out: usize) -> Memory {
        if out == 1 { self.sum.memory(6) } else { Memory::Own }
    }
}

/// From logits to their gradient, in place: `(softmax(z) - onehot(target)) scale`.
#[inline(always)]
fn logits_gradient<T: Real>(z: &mut [T], v: usize, targets: &[i32], lse: &[T], scale: T) {
    for (r, z) in z.chunks_mut(v).enumerate() {
        let Some(target) = used(targets[r], v) else {
            z.fill(T::ZERO);
            continue;
        };
        for z in z.iter_mut() {
            *z = (*z - lse[r]).exp() * scale;
        }
        z[target] = z[target] - scale;
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case = |name: &str, r: usize, c: usize, v: usize, targets: &[i32], count: f64| {
        Case::new("cross_entropy", name, |g, x| vec![g.cross_entropy(x[0], x[1], x[2], x[3])])
            .normal([r, c])
            .normal([v, c])
            .ints([r], targets)
            .constant([1], Fill::Values(vec![count]))
    };
    let mut cases = vec![
        case("one row", 1, 3, 5, &[2], 1.0),
        case("unused rows", 7, 13, 11, &[3, -1, 10, 0, 11, 5, -1], 5.0),
        case("another count", 131, 8, 37, &[0, 5, 36, -1, 7], 40.0),
        case("nothing counted", 3, 4, 8, &[-1], 0.0),
        // On Hopper's kernels, too.
        case("nothing counted of many", 131, 72, 257, &[3, -1, 5, 256, 257], 0.0).large(),
        case("few used, whole vectors", 19, 8, 16, &[3, -1, 15, 0, 16, -7], 9.0),
        // Rows without a target hold no numbers at all.
        Case::new("cross_entropy", "unused rows hold NaN", |g, x| {
            vec![g.cross_entropy(x[0], x[1], x[2], x[3])]
        })
        .floats([6, 8], Fill::Values([[0.5; 8], [f64::NAN; 8], [-1.5; 8]].concat()))
        .normal([11, 8])
        .ints([6], &[3, -1, 10, 0, 11, 7])
        .constant([1], Fill::Values(vec![4.0])),
    ];
    // Odd and prime rows and vocabularies, every edge of a tile, of a row's vectors and of its lanes, and more rows
    // than one chunk has.
    let large = [
        (1, 8, 8),
        (3, 16, 5),
        (7, 8, 13),
        (5, 24, 37),
        (17, 40, 64),
        (31, 8, 127),
        (64, 64, 128),
        (65, 32, 129),
        (127, 16, 251),
        (128, 8, 256),
        (129, 48, 257),
        (131, 8, 263),
        (33, 72, 511),
        (9, 8, 1021),
        (13, 16, 1032),
        (5, 8, 2048),
        (6, 8, 2049),
        (2, 8, 4099),
        (3, 24, 5000),
        (1, 16, 8193),
        (255, 8, 96),
        (257, 64, 40),
        (300, 8, 31),
        (401, 24, 72),
        (61, 128, 61),
        (19, 200, 19),
        (4, 264, 1000),
        (523, 8, 17),
        (1031, 8, 24),
        (97, 56, 677),
        (8, 8, 1),
        (4099, 8, 8),
        (4111, 16, 11),
        (4099, 64, 72),
        (8201, 8, 16),
        // Enough for every tile of Hopper's.
        (19, 72, 1032),
        (131, 136, 129),
        (257, 72, 129),
        (131, 72, 257),
        (33, 72, 1032),
        (131, 72, 263),
        (131, 200, 129),
        (193, 136, 129),
        (97, 136, 257),
        (193, 72, 257),
        (257, 72, 193),
        (97, 72, 515),
        (389, 72, 129),
        (131, 72, 391),
        (131, 264, 193),
        (97, 200, 264),
        (193, 264, 193),
        (131, 264, 256),
        (61, 72, 1032),
        (257, 72, 384),
        (131, 72, 515),
        (193, 264, 136),
        (131, 520, 193),
    ];
    let random = |r: usize, c: usize, v: usize| {
        let targets: Vec<i32> = (0..r)
            .map(|i| match (i % 5, i % 11) {
                (3, _) => -1,
                (_, 7) => v as i32,
                _ => (i * 7919 % v) as i32,
            })
            .collect();
        let count = targets.iter().filter(|&&t| t >= 0 && t < v as i32).count().max(1);
        Case::new("cross_entropy", format!("{r}x{c}x{v}"), |g, x| {
            vec![g.cross_entropy(x[0], x[1], x[2], x[3])]
        })
        .normal([r, c])
        .floats([v, c], Fill::Normal(0.5))
        .ints([r], &targets)
        .constant([1], Fill::Values(vec![count as f64]))
        .large()
    };
    cases.extend(large.map(|(r, c, v)| random(r, c, v)));
    let sums = [(7, 16, 24), (67, 8, 131), (130, 40, 64), (4099, 8, 8), (4111, 16, 11), (5, 8, 2051)];
    cases.extend(sums.map(|(r, c, v)| random(r, c, v).accumulating()));
    let sums = [(7, 16, 24), (67, 8, 131), (4099, 8, 8), (4111, 16, 11)];
    cases.extend(sums.map(|(r, c, v)| random(r, c, v).beginning()));
    let narrow = [(67, 8, 131), (4099, 8, 8), (130, 40, 64)];
    cases.push(random(67, 8, 131).accumulating_in(DType::Bf16).beginning());
    cases.extend(narrow.map(|(r, c, v)| random(r, c, v).accumulating_in(DType::Bf16)));
    cases
}
