//! What `kernels-cu/cross_entropy.cu` is launched with, and the products of `kernels-cu/linear.cu` around it; on Hopper
//! `cross_entropy_wgmma.cu`, whose products end in cross entropy.
use super::super::{
    linear::kernels::{
        Ending, Extents, WeightGradient, check, input_gradient, product, sum_parts, weight_gradient,
    },
    prelude::*,
};
use crate::launch::Operand;

/// Threads of a block.
const THREADS: u32 = 256;
/// Blocks that an SM holds at once, as the kernels' launch bounds promise.
const BLOCKS: u32 = 4;
/// Elements of a vector of 16 bytes.
const VECTOR: usize = 8;
/// The widest rows that belong to a warp.
const NARROW: usize = 2048;
/// Most rows whose logits exist at once, and most bytes that these take. Every chunk reads the weights
/// and, in the backward pass, adds to their gradient: the rows make up for that.
const ROWS: usize = 4096;
const BYTES: usize = 256 << 20;
/// Chunks have whole tiles of rows.
const TILE: usize = 128;

/// The extents, and how the rows are cut.
struct Problem {
    rows: usize,
    width: usize,
    vocabulary: usize,
    /// Logits of a row: the vocabulary in whole vectors.
    padded: usize,
    /// Rows of a chunk.
    chunk: usize,
}

impl Problem {
    fn new(ins: &[Spec]) -> Result<Problem, String> {
        let (h, w) = (ins[0], ins[1]);
        let (rows, width, vocabulary) = (h.shape.rows(), h.shape.last(), w.shape.rows());
        check(&[h, w], &[width])?;
        if vocabulary == 0 {
            return Err("there is no vocabulary".into());
        }
        let padded = vocabulary.next_multiple_of(VECTOR);
        let most = (BYTES / (2 * padded)).clamp(TILE, ROWS) / TILE * TILE;
        let chunk = rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(TILE);
        Ok(Problem { rows, width, vocabulary, padded, chunk: chunk.min(rows) })
    }

    /// First row and rows of each chunk; a single empty one where there are no rows.
    fn chunks(&self) -> Vec<(usize, usize)> {
        let starts = (0..self.rows.max(1)).step_by(self.chunk.max(1));
        starts.map(|at| (at, self.chunk.min(self.rows - at))).collect()
    }

    fn extents(&self, n: usize) -> Extents {
        Extents { n, k: self.width, m: self.padded }
    }

    /// Bytes of the logits of a chunk.
    fn logits(&self) -> usize {
        self.chunk * self.padded * 2
    }

    fn is_padded(&self) -> bool {
        self.padded > self.vocabulary
    }

    /// The weights, copied where they need rows of zeros behind.
    fn weights(&self, kernels: &mut Kernels, on: &Target) -> Result<Arg, String> {
        if !self.is_padded() {
            return Ok(Arg::input(1));
        }
        let (count, total) = (size(self.vocabulary * self.width)?, size(self.padded * self.width)?);
        let copy = whole(scratch(kernels, total as usize * 2));
        let args = vec![copy.clone(), Arg::input(1), Arg::U32(count), Arg::U32(total)];
        let blocks = total.div_ceil(THREADS * VECTOR as u32).min(on.sms * BLOCKS);
        kernels.launches.push(Launch::kernel("cross_entropy_pad_bf16", [blocks, 1, 1], THREADS, 0, args));
        Ok(copy)
    }

    /// How the product that makes the logits of `n` rows ends on Hopper.
    fn ending(&self, n: usize, on: &Target) -> Result<Option<Ending>, String> {
        Ending::of(Extents { n, k: self.width, m: self.vocabulary }, on)
    }

    /// lse, and the loss of each row, of logits that are never stored.
    fn reduce(
        &self,
        kernels: &mut Kernels,
        ending: &Ending,
        each: Operand,
        on: &Target,
    ) -> Result<(), String> {
        let parts = whole(scratch(kernels, self.rows * ending.across() as usize * 8));
        let [n, v, c] = [self.rows, self.vocabulary, self.width].map(size);
        let (n, v, c) = (n?, v?, c?);
        let (each, targets) = (whole(each), Arg::input(2));
        let outs = vec![parts.clone(), each.clone()];
        let rest = [vec![targets.clone()], [n, v, c].map(Arg::U32).to_vec()].concat();
        let factors = [&Arg::input(0), &Arg::input(1)];
        kernels.launches.push(ending.launch("cross_entropy_fwd", outs, factors, rest, on));
        let sizes = [n, v, ending.across()].map(Arg::U32);
        let args = [Arg::output(1), each, parts, targets].into_iter().chain(sizes).collect();
        let blocks = n.div_ceil(THREADS / 32);
        kernels.launches.push(Launch::kernel(
            "cross_entropy_fwd_merge_f32",
            [blocks, 1, 1],
            THREADS,
            0,
            args,
        ));
        Ok(())
    }

    /// The same of logits, a chunk of rows at a time.
    fn reduce_logits(&self, kernels: &mut Kernels, each: Operand, on: &Target) -> Result<(), String> {
        let logits = whole(scratch(kernels, self.logits()));
        let w = self.weights(kernels, on)?;
        for (at, n) in self.chunks() {
            let h = from_row(Operand::In(0), at, self.width * 2);
            kernels.launches.extend(product(logits.clone(), h, w.clone(), self.extents(n), on)?);
            let lse = from_row(Operand::Out(1), at, 4);
            let args = vec![lse, from_row(each, at, 4), logits.clone(), from_row(Operand::In(2), at, 4)];
            kernels.launches.push(self.over_rows("fwd", args, n, &[], on)?);
        }
        Ok(())
    }

    /// The gradient of the logits of `n` rows from `at` on, and h without its unused rows, where dh will be.
    fn logits_gradient(
        &self,
        kernels: &mut Kernels,
        logits: &Arg,
        w: &Arg,
        (at, n): (usize, usize),
        on: &Target,
    ) -> Result<(), String> {
        let [h, dh] = [Operand::In(0), Operand::Out(0)].map(|of| from_row(of, at, self.width * 2));
        let [targets, lse] = [2, 4].map(|i| from_row(Operand::In(i), at, 4));
        let (count, dloss) = (Arg::input(3), Arg::input(5));
        let Some(ending) = self.ending(n, on)? else {
            kernels.launches.extend(product(logits.clone(), h.clone(), w.clone(), self.extents(n), on)?);
            let args = vec![logits.clone(), dh, targets, lse, count, dloss, h];
            kernels.launches.push(self.over_rows("bwd", args, n, &[self.width], on)?);
            return Ok(());
        };
        let [n, v, m, c] = [n, self.vocabulary, self.padded, self.width].map(size);
        let (n, v, m, c) = (n?, v?, m?, c?);
        let sizes = [n, v, m, c].map(Arg::U32);
        let rest = [targets.clone(), lse, count, dloss].into_iter().chain(sizes).collect();
        let dz = vec![ending.result(logits, m)];
        let factors = [&h, &Arg::input(1)];
        kernels.launches.push(ending.launch("cross_entropy_bwd", dz, factors, rest, on));
        let args = [dh, h, targets].into_iter().chain([n, v, c].map(Arg::U32)).collect();
        let blocks = (n * c).div_ceil(THREADS * VECTOR as u32);
        kernels.launches.push(Launch::kernel(
            "cross_entropy_bwd_keep_bf16",
            [blocks, 1, 1],
            THREADS,
            0,
            args,
        ));
        Ok(())
    }

    /// The pass over the logits of `n` rows; `more` are sizes that it takes besides theirs.
    fn over_rows(
        &self,
        pass: &str,
        mut args: Vec<Arg>,
        n: usize,
        more: &[usize],
        on: &Target,
    ) -> Result<Launch, String> {
        let (variant, together) = if self.padded <= NARROW { ("narrow", 8) } else { ("wide", 1) };
        for extent in [n, self.vocabulary, self.padded].iter().chain(more) {
            args.push(Arg::size(*extent)?);
        }
        let blocks = size(n)?.div_ceil(together).min(on.sms * BLOCKS);
        let entry = format!("cross_entropy_{pass}_rows_{variant}_bf16");
        Ok(Launch::kernel(entry, [blocks, 1, 1], THREADS, 0, args))
    }
}

/// Another scratch buffer.
fn scratch(kernels: &mut Kernels, bytes: usize) -> Operand {
    kernels.scratch.push(bytes);
    Operand::Scratch(kernels.scratch.len() - 1)
}

fn whole(operand: Operand) -> Arg {
    Arg::Address(operand, 0)
}

/// An operand from row `row` of `bytes` each.
fn from_row(operand: Operand, row: usize, bytes: usize) -> Arg {
    Arg::Address(operand, (row * bytes) as u64)
}

pub(super) fn forward(ins: &[Spec], on: &Target) -> Result<Kernels, String> {
    let p = Problem::new(ins)?;
    let mut kernels = Kernels::default();
    let each = scratch(&mut kernels, p.rows * 4);
    match p.ending(p.rows, on)? {
        Some(ending) => p.reduce(&mut kernels, &ending, each, on)?,
        None => p.reduce_logits(&mut kernels, each, on)?,
    }
    let args = vec![Arg::output(0), whole(each), Arg::input(3), Arg::size(p.rows)?];
    kernels.launches.push(Launch::kernel("cross_entropy_fwd_sum_f32", [1; 3], THREADS, 0, args));
    Ok(kernels)
}

pub(super) fn backward(
    ins: &[Spec],
    outs: &[Spec],
    accumulate: bool,
    on: &Target,
) -> Result<Kernels, String> {
    let p = Problem::new(ins)?;
    let mut kernels = Kernels::default();
    let logits = whole(scratch(&mut kernels, p.logits()));
    let split = whole(scratch(&mut kernels, 0));
    let w = p.weights(&mut kernels, on)?;
    let chunks = p.chunks();
    // Where chunks cannot be added to the result itself, an f32 sum of the padded extents is between.
    let result =
        WeightGradient { to: Arg::output(1), dtype: outs[1].dtype, accumulate, parts: split.clone() };
    let direct = !p.is_padded() && (chunks.len() == 1 || result.dtype == DType::F32);
    let mut dw = match direct {
        true => result,
        false => {
            let to = whole(scratch(&mut kernels, p.padded * p.width * 4));
            WeightGradient { to, dtype: DType::F32, accumulate: false, parts: split }
        }
    };
    for (at, n) in chunks {
        let dh = from_row(Operand::Out(0), at, p.width * 2);
        p.logits_gradient(&mut kernels, &logits, &w, (at, n), on)?;
        let (bytes, launches) = weight_gradient(&dw, logits.clone(), dh.clone(), p.extents(n), on)?;
        kernels.scratch[1] = kernels.scratch[1].max(bytes);
        kernels.launches.extend(launches);
        kernels.launches.extend(input_gradient(dh, logits.clone(), w.clone(), p.extents(n), on)?);
        dw.accumulate = true;
    }
    if !direct {
        let result = WeightGradient { to: Arg::output(1), dtype: outs[1].dtype, accumulate, parts: dw.to };
        kernels.launches.push(sum_parts(&result, p.vocabulary * p.width, 1)?);
    }
    Ok(kernels)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs(r: usize, c: usize, v: usize) -> [Spec; 6] {
        let [one, rows] = [1, r].map(|n| Spec::new([n], DType::F32));
        let targets = Spec::new([r], DType::I32);
        [Spec::new([r, c], DType::Bf16), Spec::new([v, c], DType::Bf16), targets, one, rows, one]
    }

    fn entries(kernels: &Kernels) -> Vec<&str> {
        let each = kernels.launches.iter().map(|l| match l {
            Launch::Kernel { entry, .. } => entry.as_str(),
            other => panic!("{other:?}"),
        });
        each.collect()
    }

    #[test]
    fn chunks_cover_the_rows_and_bound_the_logits() {
        for (r, v) in [(0, 8), (1, 8), (4096, 259), (4097, 259), (16_384, 49_152), (70_000, 131_072)] {
            let p = Problem::new(&specs(r, 8, v)).unwrap();
            let chunks = p.chunks();
            assert!(p.logits() <= BYTES && p.chunk <= ROWS, "{r}x{v}: {}", p.chunk);
            assert_eq!(chunks.iter().map(|c| c.1).sum::<usize>(), r, "{r}x{v}");
            assert!(chunks.windows(2).all(|c| c[0].0 + c[0].1 == c[1].0), "{r}x{v}");
        }
    }

    #[test]
    fn chunks_add_to_an_f32_accumulator_itself() {
        let dw = Spec::new([1024, 64], DType::F32);
        let ins = specs(5000, 64, 1024);
        let k = backward(&ins, &[ins[0], dw], true, &Target::H200).unwrap();
        let sums = |k: &Kernels| k.launches.iter().filter(|l| writes(l, Operand::Out(1))).count();
        assert_eq!(sums(&k), 2, "{k:?}");
        assert!(!entries(&k).contains(&"cross_entropy_pad_bf16"));
        // Into bf16 they are rounded once, and an odd vocabulary is padded.
        let k = backward(&ins, &[ins[0], ins[1]], false, &Target::H200).unwrap();
        assert_eq!((sums(&k), entries(&k).last().copied()), (1, Some("linear_dw_sum_bf16")));
        let odd = specs(5000, 64, 1021);
        let k = backward(&odd, &[odd[0], odd[1]], false, &Target::H200).unwrap();
        assert_eq!((sums(&k), entries(&k)[0]), (1, "cross_entropy_pad_bf16"));
    }

    fn writes(launch: &Launch, operand: Operand) -> bool {
        matches!(launch, Launch::Kernel { args, .. } if matches!(args[0], Arg::Address(o, _) if o == operand))
    }

    #[test]
    fn refusals_name_the_remedy() {
        assert!(forward(&specs(3, 12, 8), &Target::H200).unwrap_err().contains("pad"));
        let singles = specs(3, 8, 8).map(|s| Spec::new(s.shape, DType::F32));
        assert!(forward(&singles, &Target::H200).unwrap_err().contains("cast"));
    }
}
