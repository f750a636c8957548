//! What `kernels-cu/attention.cu` and, for few queries, `attention_decode.cu` are launched with; on Hopper
//! `attention_wgmma.cu` and `attention_wgmma_bwd.cu`.
use super::super::prelude::*;
use super::{super::rope::Rope, Attention, AttentionBwd};
use crate::launch::{Geometry, Operand};

const THREADS: u32 = 128;
/// Queries of a forward tile and of a tile of dq.
const QUERIES: u32 = 128;
/// Queries that share a span, and the tile of the pass that prepares them.
const SPAN: u32 = 64;
/// Keys of a forward tile.
const KEYS: u32 = 64;

/// Threads of a block on Hopper, and the rows that it keeps.
const HOPPER_THREADS: u32 = 384;
const HOPPER_ROWS: u32 = 128;
/// Queries of a block, and keys of a tile that passes by, forward; where blocks would be few, and queries or keys backward.
const HOPPER_FORWARD: u32 = 128;
const HOPPER_FEW: u32 = 64;
const HOPPER_BACKWARD: u32 = 64;
/// The most that a block has besides.
const HOPPER_STATIC: u32 = 3072;

/// Scratch of Hopper's backward pass: two words, and one for each head and 64 queries; dq in f32.
const WORDS: usize = 3;
const SUMS: usize = 4;

/// Most queries of a batch row that are decoded: their keys are split over blocks.
const DECODED: u32 = 4;
/// Least keys of a split.
const SPLIT_KEYS: u32 = 64;

/// Tiles and shared bytes that depend on the head width.
#[derive(Clone, Copy, Debug)]
struct Width {
    width: u32,
    /// Keys of a block that makes dk and dv.
    own_keys: u32,
    /// Keys that pass by a block that makes dq.
    passing_keys: u32,
}

impl Width {
    fn new(width: usize) -> Result<Width, String> {
        match width {
            32 | 64 => Ok(Width { width: width as u32, own_keys: 128, passing_keys: 64 }),
            128 => Ok(Width { width: 128, own_keys: 64, passing_keys: 32 }),
            _ => Err(format!("no kernel has heads of {width}; use 32, 64 or 128, or the CPU device")),
        }
    }

    /// Bytes of a tile of rows.
    fn tile(self, rows: u32) -> u32 {
        rows * self.width * 2
    }

    /// Queries, and two stages of keys and values.
    fn forward_shared(self) -> u32 {
        self.tile(QUERIES) + 4 * self.tile(KEYS)
    }

    /// Keys and values, and two stages of queries, gradients, their stats, intervals and span.
    fn keys_shared(self) -> u32 {
        2 * self.tile(self.own_keys) + 2 * (2 * self.tile(SPAN) + SPAN * 16 + 128)
    }

    /// Queries and gradients, and two stages of keys and values.
    fn queries_shared(self) -> u32 {
        2 * self.tile(QUERIES) + 4 * self.tile(self.passing_keys)
    }

    /// On Hopper; narrow heads have no kernels there.
    fn hopper(self) -> Option<Hopper> {
        let ring =
            |own: u32, stages: u32, stage: u32| own * self.tile(HOPPER_ROWS) + stages * (stage + 16) + 8;
        let [forward, once, keys] = match self.width {
            64 => [4, 4, 4],
            128 => [2, 2, 3],
            _ => return None,
        };
        let passing = 2 * self.tile(HOPPER_BACKWARD);
        let of_keys = |stages: u32| ring(2, stages, passing + HOPPER_BACKWARD * 16 + 1024);
        // Twice ds of a tile, and its dq in f32.
        let sums = 2 * HOPPER_ROWS * HOPPER_BACKWARD * 2 + 2 * self.tile(HOPPER_BACKWARD);
        Some(Hopper {
            forward: ring(1, 2 * forward, self.tile(HOPPER_FORWARD)),
            few: self.tile(HOPPER_FEW) + 4 * forward * (self.tile(HOPPER_FEW) + 16) + 8,
            once: Some(of_keys(once).next_multiple_of(1024) + sums),
            keys: of_keys(keys),
            queries: ring(2, 4, passing),
        })
    }
}

/// Dynamic shared bytes on Hopper: tiles that a block keeps, the stages of what passes by, and their barriers.
#[derive(Clone, Copy, Debug)]
struct Hopper {
    forward: u32,
    few: u32,
    /// Backward in one pass, where that fits; then in two.
    once: Option<u32>,
    keys: u32,
    queries: u32,
}

/// The operands of either form, as the kernels receive them.
struct Problem {
    width: Width,
    /// Byte offsets of keys and values in their operands.
    q: Arg,
    k: Arg,
    v: Arg,
    slots: Arg,
    start: Arg,
    end: Arg,
    batch: u32,
    queries: u32,
    keys: u32,
    heads: u32,
    kv_heads: u32,
    q_stride: u32,
    kv_stride: u32,
    /// Whether keys lie in caches, and how many there are; 0 where batch rows hold their own.
    slotted: bool,
    caches: u32,
    scale: f32,
}

impl Problem {
    fn new(op: &Attention, ins: &[Spec], on: &Target) -> Result<Problem, String> {
        let [batch, queries, keys] = op.sizes(ins)?;
        let h = op.heads;
        let floats = if op.cached { &ins[..3] } else { &ins[..1] };
        if let Some(s) = floats.iter().find(|s| s.dtype != DType::Bf16) {
            return Err(format!("the tensor cores multiply bf16, not {s:?}; cast it, or use the CPU device"));
        }
        let width = Width::new(h.width)?;
        let need = width.forward_shared().max(width.keys_shared()).max(width.queries_shared());
        if need > on.shared {
            return Err(format!(
                "{} has too little shared memory for heads of {}; use the CPU device",
                on.name, h.width
            ));
        }
        let (q_stride, kv_stride) =
            (size(ins[0].shape.last())?, size(if op.cached { h.kv_columns() } else { ins[0].shape.last() })?);
        if !q_stride.is_multiple_of(8) {
            return Err(format!("rows of {q_stride} are no multiple of 8; pad them, or use the CPU device"));
        }
        if batch.max(h.heads) > 65535 {
            return Err(format!("{batch} rows of {} heads exceed the grid; split the batch", h.heads));
        }
        let inside = |columns: usize| Arg::Address(Operand::In(0), columns as u64 * 2);
        let input = Arg::input;
        // The form without caches does not read the slots; any operand stands for them.
        let [k, v, slots, start, end] = match op.cached {
            true => [input(1), input(2), input(3), input(4), input(5)],
            false => [inside(h.q_columns()), inside(h.qk_columns()), input(1), input(1), input(2)],
        };
        Ok(Problem {
            width,
            q: input(0),
            k,
            v,
            slots,
            start,
            end,
            batch: size(batch)?,
            queries: size(queries)?,
            keys: size(keys)?,
            heads: size(h.heads)?,
            kv_heads: size(h.kv_heads)?,
            q_stride,
            kv_stride,
            slotted: op.cached,
            caches: if op.cached { size(ins[1].shape.dims()[0])? } else { 0 },
            scale: (1.0 / (h.width as f64).sqrt()) as f32,
        })
    }

    fn entry(&self, pass: &str) -> String {
        format!("attention_{pass}_d{}_bf16", self.width.width)
    }

    /// The sizes that the three large kernels share, and the scale.
    fn sizes(&self) -> Vec<Arg> {
        let group = self.heads / self.kv_heads;
        let sizes = [self.queries, self.keys, self.heads, group, self.q_stride, self.kv_stride, self.caches];
        sizes.map(Arg::U32).into_iter().chain([Arg::F32(self.scale)]).collect()
    }

    /// Blocks over tiles of queries, heads and batch rows.
    fn over_queries(&self, tile: u32) -> [u32; 3] {
        [self.queries.div_ceil(tile), self.heads, self.batch]
    }

    /// Blocks over tiles of keys, heads of keys, and caches or batch rows.
    fn over_keys(&self, tile: u32) -> [u32; 3] {
        let caches = if self.slotted { self.caches } else { self.batch };
        [self.keys.div_ceil(tile), self.kv_heads, caches]
    }

    /// Few queries over many keys: splits of the keys, and a pass that merges them.
    fn decode(&self, on: &Target) -> Result<Kernels, String> {
        let group = self.heads / self.kv_heads;
        let together = if group * self.queries == 1 { 1 } else { 4 };
        let blocks = self.kv_heads * (group * self.queries).div_ceil(together);
        // As many splits as give every multiprocessor two blocks.
        let wanted = (2 * on.sms).div_ceil(blocks * self.batch);
        let chunk = self.keys.div_ceil(wanted).max(SPLIT_KEYS).next_multiple_of(SPLIT_KEYS);
        let splits = self.keys.div_ceil(chunk).max(1);

        let rows = [self.batch, self.heads, self.queries].into_iter().map(|n| n as usize).product::<usize>();
        let parts = rows * splits as usize;
        let scratch = vec![parts * self.width.width as usize * 4, parts * 8];
        let rows = size(rows)?;
        let mut args = vec![Arg::scratch(0), Arg::scratch(1)];
        args.extend([&self.q, &self.k, &self.v, &self.slots, &self.start, &self.end].map(Arg::clone));
        args.extend(
            [self.queries, self.keys, self.heads, group, self.q_stride, self.kv_stride, self.caches, chunk]
                .map(Arg::U32),
        );
        args.push(Arg::F32(self.scale));
        let grid = [splits, blocks, self.batch];
        let decode = Launch::kernel(self.entry(&format!("fwd_decode_{together}")), grid, THREADS, 0, args);

        let sizes = [rows, self.queries, self.heads, self.width.width, splits].map(Arg::U32);
        let args = [Arg::output(0), Arg::output(1), Arg::scratch(0), Arg::scratch(1)]
            .into_iter()
            .chain(sizes)
            .chain([Arg::F32(self.scale)]);
        let grid = [rows.div_ceil(THREADS / 32), 1, 1];
        let merge = Launch::kernel("attention_fwd_merge_bf16", grid, THREADS, 0, args.collect());
        Ok(Kernels { scratch, launches: vec![decode, merge] })
    }

    /// Hopper's kernels, where there are some that can read the operands: a tensor map is never empty.
    fn hopper(&self, on: &Target) -> Option<Hopper> {
        let there = on.arch == Target::H200.arch && self.keys > 0 && self.kv_stride > 0;
        let fits = |shared: u32| shared + HOPPER_STATIC <= on.shared;
        let h = self.width.hopper().filter(|h| there && fits(h.forward.max(h.keys).max(h.queries)))?;
        Some(Hopper { once: h.once.filter(|&once| fits(once)), ..h })
    }

    /// A tensor map of rows, so many in each batch row or cache, that `height` at a time are copied of.
    fn map(of: &Arg, [layers, rows, stride]: [u32; 3], height: u32) -> Arg {
        let &Arg::Address(operand, _) = of else { return of.clone() };
        let row = u64::from(stride) * 2;
        let geometry = Geometry {
            offset: 0,
            element: 2,
            extents: vec![stride.into(), rows.into(), layers.into()],
            strides: vec![row, row * u64::from(rows)],
            tile: vec![64, height, 1],
            swizzle: 128,
        };
        Arg::Map(operand, geometry)
    }

    /// Maps of queries, keys and values.
    fn maps(&self, height: u32) -> [Arg; 3] {
        let layers = if self.caches > 0 { self.caches } else { self.batch };
        let kv = |of| Self::map(of, [layers, self.keys, self.kv_stride], height);
        [Self::map(&self.q, [self.batch, self.queries, self.q_stride], height), kv(&self.k), kv(&self.v)]
    }

    /// The columns of a row in which the first head of keys and that of values begin.
    fn columns(&self) -> Result<[Arg; 2], String> {
        let of = |of: &Arg| match of {
            Arg::Address(_, offset) => Arg::size(*offset as usize / 2),
            _ => Ok(Arg::U32(0)),
        };
        Ok([of(&self.k)?, of(&self.v)?])
    }

    fn group(&self) -> u32 {
        self.heads / self.kv_heads
    }

    /// Blocks of fewer queries, whose warpgroups share out the keys, where others would leave half of the machine idle.
    fn hopper_forward(&self, h: Hopper, on: &Target) -> Result<Launch, String> {
        let few = self.over_queries(HOPPER_FEW).iter().product::<u32>() <= on.sms;
        let (pass, tile, shared) =
            if few { ("fwd_few_wgmma", HOPPER_FEW, h.few) } else { ("fwd_wgmma", HOPPER_FORWARD, h.forward) };
        let mut args = vec![Arg::output(0), Arg::output(1)];
        args.extend(self.maps(tile));
        args.extend([&self.slots, &self.start, &self.end].map(Arg::clone));
        args.extend([self.queries, self.keys, self.heads, self.group()].map(Arg::U32));
        args.extend(self.columns()?);
        args.extend([Arg::U32(self.caches), Arg::F32(self.scale)]);
        Ok(Launch::kernel(self.entry(pass), self.over_queries(tile), HOPPER_THREADS, shared, args))
    }

    /// What was prepared becomes dq, dk and dv: in one pass, and where something is not finite in two; or in two alone.
    /// All of them turn dq and dk back, if there is a rotation.
    fn hopper_backward(
        &self,
        h: Hopper,
        [dq, dk, dv]: [Arg; 3],
        grad: &Arg,
        prepared: &[Arg; 3],
        rotation: Option<&(Rope, Arg)>,
        unordered: bool,
    ) -> Result<Vec<Launch>, String> {
        let width = self.heads * self.width.width;
        let grad = Self::map(grad, [self.batch, self.queries, width], HOPPER_BACKWARD);
        let reads = self.maps(HOPPER_BACKWARD).into_iter().chain([grad]).chain(prepared.iter().cloned());
        let reads: Vec<Arg> = reads.chain([self.slots.clone()]).collect();
        // Positions that are not there are named all the same, and not read.
        let positions = rotation.map_or(&self.start, |(_, positions)| positions);
        let ratio = rotation.map(|(rope, _)| rope.ratio()).transpose()?.unwrap_or(0);
        let turning = [Arg::U32(rotation.is_some().into()), Arg::U64(ratio), Arg::F32(self.scale)];
        let [words, sums] = [Arg::scratch(WORDS), Arg::scratch(SUMS)];
        let wanted = Arg::Address(Operand::Scratch(WORDS), 4);
        let args = |outs: &[Arg], more: &[Arg], batch: Option<u32>, stride: u32, last: &[u32]| {
            let sizes = [self.queries, self.keys, self.heads, self.group(), stride];
            let sizes = batch.into_iter().chain(sizes).map(Arg::U32).chain(self.columns()?);
            let last = last.iter().copied().map(Arg::U32).chain(turning.clone());
            let reads = outs.iter().chain(&reads).chain([positions]).chain(more).cloned();
            Ok::<_, String>(reads.chain(sizes).chain(last).collect())
        };
        let launch = |pass, grid, threads, shared, args| {
            Launch::kernel(self.entry(&format!("{pass}_wgmma")), grid, threads, shared, args)
        };
        let fill = |scratch, byte| Launch::Fill { what: Operand::Scratch(scratch), byte };
        let (over_keys, over_queries) = (self.over_keys(HOPPER_ROWS), self.over_queries(HOPPER_ROWS));
        let (batch, keys, queries) = (Some(self.batch), self.kv_stride, self.q_stride);
        let outs = [dk.clone(), dv.clone(), sums.clone(), words.clone()];
        let once = args(&outs, &[], batch, keys, &[self.caches, (!unordered).into()])?;
        let finish = [dq.clone(), words, sums, prepared[2].clone(), positions.clone()];
        let finish = finish.into_iter().chain([self.queries, queries].map(Arg::U32));
        let finish = finish.chain(turning.clone()).collect();
        let wanted = [wanted];
        let [twice_keys, twice_queries] = [
            args(&[dk, dv], &wanted, batch, keys, &[self.caches])?,
            args(&[dq], &wanted, None, queries, &[self.caches])?,
        ];
        // What is added to in any order must be zeros.
        let zeros = unordered.then(|| fill(SUMS, 0));
        let mut all = match h.once {
            Some(shared) => vec![
                fill(WORDS, 0),
                launch("bwd", over_keys, HOPPER_THREADS, shared, once),
                launch("bwd_finish", self.over_queries(SPAN), THREADS, self.width.tile(SPAN), finish),
            ],
            None => vec![fill(WORDS, 1)],
        };
        all.splice(0..0, zeros);
        all.extend([
            launch("bwd_keys", over_keys, HOPPER_THREADS, h.keys, twice_keys),
            launch("bwd_queries", over_queries, HOPPER_THREADS, h.queries, twice_queries),
        ]);
        Ok(all)
    }

    /// The launch that makes dk and dv, and the one that makes dq, of what was prepared.
    fn backward(&self, [dq, dk, dv]: [Arg; 3], grad: &Arg, prepared: &[Arg; 3]) -> Vec<Launch> {
        let width = self.width;
        let reads = [&self.q, &self.k, &self.v, grad].into_iter().chain(prepared).chain([&self.slots]);
        let reads: Vec<Arg> = reads.cloned().collect();
        let args = |outs: &[Arg], batch: Option<u32>| {
            let all = outs.iter().chain(&reads).cloned();
            all.chain(batch.map(Arg::U32)).chain(self.sizes()).collect()
        };
        vec![
            Launch::kernel(
                self.entry("bwd_keys"),
                self.over_keys(width.own_keys),
                THREADS,
                width.keys_shared(),
                args(&[dk, dv], Some(self.batch)),
            ),
            Launch::kernel(
                self.entry("bwd_queries"),
                self.over_queries(QUERIES),
                THREADS,
                width.queries_shared(),
                args(&[dq], None),
            ),
        ]
    }

    fn is_empty(&self) -> bool {
        self.batch == 0 || self.queries == 0
    }
}

pub(super) fn forward(op: &Attention, ins: &[Spec], on: &Target) -> Result<Kernels, String> {
    let p = Problem::new(op, ins, on)?;
    if p.is_empty() {
        return Ok(Kernels::default());
    }
    if p.queries <= DECODED {
        return p.decode(on);
    }
    if let Some(h) = p.hopper(on) {
        return Ok(Kernels { scratch: vec![], launches: vec![p.hopper_forward(h, on)?] });
    }
    let mut args = vec![Arg::output(0), Arg::output(1)];
    args.extend([&p.q, &p.k, &p.v, &p.slots, &p.start, &p.end].map(Arg::clone));
    args.extend(p.sizes());
    let (grid, shared) = (p.over_queries(QUERIES), p.width.forward_shared());
    Ok(Kernels {
        scratch: vec![],
        launches: vec![Launch::kernel(p.entry("fwd"), grid, THREADS, shared, args)],
    })
}

/// Scratch: stats (2 f32 a query and head), intervals (2 i32 a query), spans (4 i32 for 64 queries); on Hopper `WORDS` and
/// `SUMS`.
pub(super) fn backward(
    &AttentionBwd { of: ref op, rope, unordered }: &AttentionBwd,
    ins: &[Spec],
    outs: &[Spec],
    on: &Target,
) -> Result<Kernels, String> {
    let own = op.operands();
    let p = Problem::new(op, &ins[..own], on)?;
    let fill = |o: usize| Launch::Fill { what: Operand::Out(o), byte: 0 };
    if p.is_empty() {
        return Ok(Kernels { scratch: vec![], launches: (0..outs.len()).map(fill).collect() });
    }
    let spans = p.queries.div_ceil(SPAN) as usize;
    let rows = p.batch as usize * spans * SPAN as usize;
    let mut scratch = vec![rows * p.heads as usize * 8, rows * 8, p.batch as usize * spans * 16];
    let [o, lse, grad] = [own, own + 1, own + 2].map(Arg::input);
    let prepared = [Arg::scratch(0), Arg::scratch(1), Arg::scratch(2)];
    let h = op.heads;
    let [dq, dk, dv] = match op.cached {
        true => [0, 1, 2].map(Arg::output),
        false => [0, h.q_columns(), h.qk_columns()].map(|c| Arg::Address(Operand::Out(0), c as u64 * 2)),
    };

    let mut args = prepared.to_vec();
    args.extend([&o, &lse, &grad, &p.slots, &p.start, &p.end].map(Arg::clone));
    args.extend([p.queries, p.keys, p.heads, p.caches].map(Arg::U32));
    let prepare = Launch::kernel(p.entry("bwd_prepare"), p.over_queries(SPAN), THREADS, 0, args);

    let rotation = rope.map(|rope| (rope, Arg::input(own + 3)));
    let mut passes = match p.hopper(on) {
        Some(h) => {
            let tiles = p.heads as usize * p.batch as usize * spans;
            let sums = h.once.map_or(0, |_| tiles * p.width.tile(SPAN) as usize * 2);
            scratch.extend([(2 + tiles) * 4, sums]);
            p.hopper_backward(h, [dq, dk, dv], &grad, &prepared, rotation.as_ref(), unordered)?
        }
        None => p.backward([dq, dk, dv], &grad, &prepared),
    };
    if let Some((rope, positions)) = rotation.filter(|_| p.hopper(on).is_none()) {
        passes.push(rope.backward(Arg::output(0), positions, outs[0], on)?);
    }
    // Columns of packed rows beside the queries.
    let others = (op.cached && ins[0].shape.last() > h.q_columns()).then(|| fill(0));
    // Without keys there is nothing over them to launch.
    let some = |l: &Launch| !matches!(l, Launch::Kernel { grid, .. } if grid.contains(&0));
    let launches = others.into_iter().chain([prepare]).chain(passes.into_iter().filter(some)).collect();
    Ok(Kernels { scratch, launches })
}

#[cfg(test)]
mod tests {
    use super::super::Heads;
    use super::{super::Turned, *};

    fn packed(batch: usize, t: usize, heads: Heads, dtype: DType) -> [Spec; 3] {
        let mask = Spec::new([batch, t], DType::I32);
        [Spec::new([batch, t, heads.packed_width()], dtype), mask, mask]
    }

    fn op(heads: usize, kv_heads: usize, width: usize, cached: bool) -> Attention {
        Attention { heads: Heads { heads, kv_heads, width }, cached, turned: Turned(None) }
    }

    fn launches(kernels: &Kernels) -> Vec<(&str, [u32; 3], u32)> {
        let of = |l| match l {
            &Launch::Kernel { ref entry, grid, shared, .. } => (entry.as_str(), grid, shared),
            Launch::Fill { .. } => ("fill", [0; 3], 0),
            other => panic!("{other:?}"),
        };
        kernels.launches.iter().map(of).collect()
    }

    #[test]
    fn packed_rows_point_into_one_operand() {
        let op = op(4, 2, 64, false);
        let k = forward(&op, &packed(3, 300, op.heads, DType::Bf16), &Target::A100).unwrap();
        assert_eq!(launches(&k), [("attention_fwd_d64_bf16", [3, 4, 3], 48 << 10)]);
        let Launch::Kernel { args, .. } = &k.launches[0] else { panic!("{k:?}") };
        let at = |columns: u64| Arg::Address(Operand::In(0), columns * 2);
        assert_eq!(args[2..5], [at(0), at(256), at(384)]);
    }

    #[test]
    fn hopper_reads_layers_of_rows() {
        let op = op(4, 2, 64, false);
        let on = |sms| forward(&op, &packed(3, 300, op.heads, DType::Bf16), &Target { sms, ..Target::H200 });
        assert_eq!(launches(&on(60).unwrap()), [("attention_fwd_few_wgmma_d64_bf16", [5, 4, 3], 139_528)]);
        let k = on(59).unwrap();
        assert_eq!(launches(&k), [("attention_fwd_wgmma_d64_bf16", [3, 4, 3], 147_592)]);
        let Launch::Kernel { args, .. } = &k.launches[0] else { panic!("{k:?}") };
        let Arg::Map(Operand::In(0), map) = &args[3] else { panic!("{args:?}") };
        assert_eq!((&map.extents[..], &map.strides[..]), (&[512, 300, 3][..], &[1024, 307_200][..]));
        assert_eq!(args[2..5], [(); 3].map(|()| Arg::Map(Operand::In(0), map.clone())));
        assert_eq!(args[12..14], [Arg::U32(256), Arg::U32(384)]);
    }

    fn backward(op: &Attention, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        super::backward(&AttentionBwd { of: *op, rope: None, unordered: false }, ins, outs, on)
    }

    #[test]
    fn hopper_leaves_narrow_heads_to_other_kernels() {
        let op = op(4, 2, 32, false);
        let k = forward(&op, &packed(1, 300, op.heads, DType::Bf16), &Target::H200).unwrap();
        assert_eq!(launches(&k)[0].0, "attention_fwd_d32_bf16");
    }

    #[test]
    fn few_queries_split_the_keys() {
        let op = op(16, 4, 128, true);
        let (q, cache) = (Spec::new([2, 1, 3072], DType::Bf16), Spec::new([2, 4096, 512], DType::Bf16));
        let (slots, mask) = (Spec::new([2], DType::I32), Spec::new([2, 1], DType::I32));
        let k = forward(&op, &[q, cache, cache, slots, mask, mask], &Target::H200).unwrap();
        assert_eq!(
            launches(&k),
            [("attention_fwd_decode_4_d128_bf16", [32, 4, 2], 0), ("attention_fwd_merge_bf16", [8, 1, 1], 0)]
        );
        assert_eq!(k.scratch, [2 * 16 * 32 * 128 * 4, 2 * 16 * 32 * 8]);
    }

    #[test]
    fn backward_prepares_then_makes_keys_and_queries() {
        let op = op(4, 2, 128, false);
        let [qkv, start, end] = packed(3, 300, op.heads, DType::Bf16);
        let o = Spec::new([3, 300, 512], DType::Bf16);
        let lse = Spec::new([3, 4, 300], DType::F32);
        let on = |target| backward(&op, &[qkv, start, end, o, lse, o], &[qkv], target).unwrap();
        let k = on(&Target::A100);
        assert_eq!(k.scratch, [3 * 320 * 4 * 8, 3 * 320 * 8, 3 * 5 * 16]);
        assert_eq!(
            launches(&k),
            [
                ("attention_bwd_prepare_d128_bf16", [5, 4, 3], 0),
                ("attention_bwd_keys_d128_bf16", [5, 2, 3], 100_608),
                ("attention_bwd_queries_d128_bf16", [3, 4, 3], 98_304),
            ]
        );
        let k = on(&Target::H200);
        assert_eq!(k.scratch[WORDS..], [(2 + 60) * 4, 60 * 64 * 128 * 4]);
        assert_eq!(
            launches(&k),
            [
                ("attention_bwd_prepare_d128_bf16", [5, 4, 3], 0),
                ("fill", [0; 3], 0),
                ("attention_bwd_wgmma_d128_bf16", [3, 2, 3], 201_728),
                ("attention_bwd_finish_wgmma_d128_bf16", [5, 4, 3], 16_384),
                ("attention_bwd_keys_wgmma_d128_bf16", [3, 2, 3], 170_040),
                ("attention_bwd_queries_wgmma_d128_bf16", [3, 4, 3], 196_680),
            ]
        );
    }

    #[test]
    fn heads_turn_back_behind_what_has_no_kernels_for_it() {
        let op = op(4, 2, 64, false);
        let [qkv, start, end] = packed(3, 300, op.heads, DType::Bf16);
        let (o, lse) = (Spec::new([3, 300, 256], DType::Bf16), Spec::new([3, 4, 300], DType::F32));
        let ins = [qkv, start, end, o, lse, o, Spec::new([900], DType::I32)];
        let op = AttentionBwd { of: op, rope: Some(Rope { heads: op.heads, theta: 1e4 }), unordered: false };
        let last = |on| {
            let k = super::backward(&op, &ins, &[qkv], on).unwrap();
            launches(&k).last().unwrap().0.to_string()
        };
        assert_eq!(last(&Target::A100), "rope_bwd_bf16");
        assert_eq!(last(&Target::H200), "attention_bwd_queries_wgmma_d64_bf16");
    }

    #[test]
    fn what_is_added_in_any_order_begins_with_zeros() {
        let op = op(4, 2, 64, false);
        let [qkv, start, end] = packed(3, 300, op.heads, DType::Bf16);
        let (o, lse) = (Spec::new([3, 300, 256], DType::Bf16), Spec::new([3, 4, 300], DType::F32));
        for unordered in [false, true] {
            let op = AttentionBwd { of: op, rope: None, unordered };
            let k = super::backward(&op, &[qkv, start, end, o, lse, o], &[qkv], &Target::H200).unwrap();
            let zeros = k.launches.contains(&Launch::Fill { what: Operand::Scratch(SUMS), byte: 0 });
            assert_eq!(zeros, unordered);
            let once = k.launches.iter().find_map(|l| match l {
                Launch::Kernel { entry, args, .. } if entry.contains("bwd_wgmma") => Some(args),
                _ => None,
            });
            let ordered = once.unwrap().iter().rev().nth(3);
            assert_eq!(ordered, Some(&Arg::U32((!unordered).into())));
        }
    }

    #[test]
    fn backward_in_two_passes_alone_where_one_does_not_fit() {
        let op = op(4, 2, 64, false);
        let [qkv, start, end] = packed(3, 300, op.heads, DType::Bf16);
        let (o, lse) = (Spec::new([3, 300, 256], DType::Bf16), Spec::new([3, 4, 300], DType::F32));
        let little = Target { shared: 155 << 10, ..Target::H200 };
        let k = backward(&op, &[qkv, start, end, o, lse, o], &[qkv], &little).unwrap();
        assert_eq!(k.scratch[SUMS], 0);
        assert!(k.launches.contains(&Launch::Fill { what: Operand::Scratch(WORDS), byte: 1 }));
        let names: Vec<_> = launches(&k).into_iter().map(|l| l.0).collect();
        let passes =
            ["prepare", "keys_wgmma", "queries_wgmma"].map(|p| format!("attention_bwd_{p}_d64_bf16"));
        assert_eq!(names, [&passes[0], "fill", &passes[1], &passes[2]]);
    }

    #[test]
    fn cached_rows_clear_the_columns_beside_the_queries() {
        let op = op(2, 1, 32, true);
        let (q, cache) = (Spec::new([3, 7, 128], DType::Bf16), Spec::new([5, 19, 32], DType::Bf16));
        let (slots, mask) = (Spec::new([3], DType::I32), Spec::new([3, 7], DType::I32));
        let (o, lse) = (Spec::new([3, 7, 64], DType::Bf16), Spec::new([3, 2, 7], DType::F32));
        let ins = [q, cache, cache, slots, mask, mask, o, lse, o];
        let k = backward(&op, &ins, &[q, cache, cache], &Target::H200).unwrap();
        let names: Vec<_> = launches(&k).into_iter().map(|l| l.0).collect();
        let passes = ["prepare", "keys", "queries"].map(|p| format!("attention_bwd_{p}_d32_bf16"));
        assert_eq!(names[0], "fill");
        assert_eq!(names[1..], passes);
        assert_eq!(launches(&k)[2].1, [1, 1, 5]);
    }

    #[test]
    fn refusals_name_the_remedy() {
        let refused =
            |op: &Attention, dtype| forward(op, &packed(1, 5, op.heads, dtype), &Target::H200).unwrap_err();
        assert!(refused(&op(2, 1, 40, false), DType::Bf16).contains("32, 64 or 128"));
        assert!(refused(&op(2, 1, 64, false), DType::F32).contains("cast"));
        let poor = Target { shared: 64 << 10, ..Target::H200 };
        let wide = op(1, 1, 128, false);
        assert!(forward(&wide, &packed(1, 5, wide.heads, DType::Bf16), &poor).is_err());
    }
}
