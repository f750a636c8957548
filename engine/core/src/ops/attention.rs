//! `o[i] = sum_j p[i, j] v[j]`, `p[i, j] = exp(q[i] . k[j] / sqrt(D) - lse[i])` over the keys
//! `row_start[i] <= j < row_end[i]`.   Vaswani et al. 2017; grouped queries: Ainslie et al. 2023; by
//! tiles, never storing p: Dao et al. 2022.
//!
//! The two arrays hold for any mask whose rows are intervals: causal text, packed documents, images
//! inside text, windows, a cache. A key outside a query's interval is never multiplied by anything
//! that reaches the query, not even by zero: whatever it holds, NaN included, changes no bit.
mod kernels;
mod plain;

use super::{
    heads::Heads,
    prelude::*,
    rope::{Before, Qkv, Rope, RopeBwd, Rotary, Turned},
};
use crate::{agreement, tensor::Host};
use std::ops::Range;

/// Queries that share every load of a key.
const GROUP: usize = 4;
/// Queries of one parallel task of the forward pass.
const TILE: usize = 64;
/// Keys that stay in cache while queries pass by.
const KEYS: usize = 128;

/// Operands: `qkv, row_start, row_end`, or `q, k, v, slots, row_start, row_end`.
#[derive(Clone, Copy, Debug)]
struct Attention {
    heads: Heads,
    cached: bool,
    turned: Turned,
}

/// Operands: those of [`Attention`], then `o, lse, do`, and positions where heads turn back. Results: `dqkv`, or `dq, dk, dv`.
#[derive(Clone, Copy, Debug)]
struct AttentionBwd {
    of: Attention,
    rope: Option<Rope>,
    unordered: bool,
}

impl Graph {
    /// Attention inside the rows of `qkv [B, T, (H + 2 Hkv) D]`: `[B, T, H D]`. `row_start` and
    /// `row_end` are i32 `[B, T]`, clamped to `0..T`; a query whose interval is empty yields zero.
    #[track_caller]
    pub fn attention(
        &mut self,
        qkv: impl Into<Qkv>,
        row_start: Tensor,
        row_end: Tensor,
        heads: Heads,
    ) -> Tensor {
        let Qkv { x, turned } = qkv.into();
        // Heads of another shape turn back by themselves.
        let turned = Turned(turned.0.filter(|before| before.rope.heads == heads));
        self.push::<2>(Attention { heads, cached: false, turned }, &[x, row_start, row_end])[0]
    }

    /// Attention of `q [B, Tq, W]`, whose first H D columns are the queries (so packed rows will do),
    /// over the caches `k` and `v [S, Tk, Hkv D]`: `[B, Tq, H D]`. Row b reads cache `slots[b]` (i32
    /// `[B]`; outside `0..S` the row is idle and yields zero). `row_start` and `row_end`, i32
    /// `[B, Tq]`, count positions of the cache.
    #[track_caller]
    pub fn attention_cached(
        &mut self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        row_start: Tensor,
        row_end: Tensor,
        heads: Heads,
    ) -> Tensor {
        let op = Attention { heads, cached: true, turned: Turned(None) };
        self.push::<2>(op, &[q, k, v, slots, row_start, row_end])[0]
    }
}

/// One head's columns in consecutive rows.
#[derive(Clone, Copy)]
struct Columns<'a, T> {
    data: &'a [T],
    stride: usize,
    width: usize,
}

impl<'a, T: Real> Columns<'a, T> {
    #[inline(always)]
    fn row(&self, i: usize) -> &'a [T] {
        &self.data[i * self.stride..][..self.width]
    }

    /// Rows `rows`, `W` at a time transposed: element (i, d) goes to `[i / W][d][i % W]`.
    #[inline(always)]
    fn panels<const W: usize>(&self, rows: Range<usize>, to: &mut [T]) {
        let mut i = rows.start;
        while i < rows.end {
            let panel = &mut to[i / W * W * self.width..][..W * self.width];
            let whole = i.is_multiple_of(W) && i + W <= rows.end;
            if whole {
                let rows: [&[T]; W] = std::array::from_fn(|w| self.row(i + w));
                transpose(rows, panel.as_chunks_mut::<W>().0);
            } else {
                for (x, to) in self.row(i).iter().zip(panel.chunks_exact_mut(W)) {
                    to[i % W] = *x;
                }
            }
            i += if whole { W } else { 1 };
        }
    }

    /// Rows `rows` at a stride of `padded`; the columns beyond the width stay arbitrary.
    #[inline(always)]
    fn pad(&self, rows: Range<usize>, padded: usize, to: &mut [T]) {
        for i in rows {
            to[i * padded..][..self.width].copy_from_slice(self.row(i));
        }
    }
}

/// The operands of either form, as one problem.
struct Problem<'a, T> {
    heads: Heads,
    queries: usize,
    keys: usize,
    slots: Option<(&'a [i32], usize)>,
    start: &'a [i32],
    end: &'a [i32],
    q: (&'a [T], usize),
    k: (&'a [T], usize),
    v: (&'a [T], usize),
}

impl<'a, T: Real> Problem<'a, T> {
    fn new(op: &Attention, ins: &[In<'a>]) -> Self {
        let (heads, q) = (op.heads, T::read(&ins[0]));
        let (queries, stride) = (ins[0].shape.dims()[1], ins[0].shape.last());
        if op.cached {
            let kv = heads.kv_columns();
            let (slots, caches) = (ins[3].i32(), ins[1].shape.dims()[0]);
            Problem {
                heads,
                queries,
                keys: ins[1].shape.dims()[1],
                slots: Some((slots, caches)),
                start: ins[4].i32(),
                end: ins[5].i32(),
                q: (q, stride),
                k: (T::read(&ins[1]), kv),
                v: (T::read(&ins[2]), kv),
            }
        } else {
            let from = |at: usize| &q[at.min(q.len())..];
            Problem {
                heads,
                queries,
                keys: queries,
                slots: None,
                start: ins[1].i32(),
                end: ins[2].i32(),
                q: (q, stride),
                k: (from(heads.q_columns()), stride),
                v: (from(heads.q_columns() + heads.kv_columns()), stride),
            }
        }
    }

    /// Which rows of k and v batch row `b` reads.
    fn slot(&self, b: usize) -> Option<usize> {
        match self.slots {
            None => Some(b),
            Some((slots, caches)) => usize::try_from(slots[b]).ok().filter(|&s| s < caches),
        }
    }

    /// The keys that query `i` of row `b` sees; a query that is not there sees none.
    #[inline(always)]
    fn seen(&self, b: usize, i: usize) -> Range<usize> {
        if i >= self.queries {
            return 0..0;
        }
        let clamp = |x: i32| usize::try_from(x).unwrap_or(0).min(self.keys);
        let (start, end) = (clamp(self.start[b * self.queries + i]), clamp(self.end[b * self.queries + i]));
        if start < end { start..end } else { 0..0 }
    }

    /// The smallest interval that holds every key that some query of `queries` sees.
    fn union(&self, b: usize, queries: Range<usize>) -> Range<usize> {
        hull(queries.map(|i| self.seen(b, i)))
    }

    fn q(&self, b: usize, head: usize) -> Columns<'a, T> {
        let (width, (data, stride)) = (self.heads.width, self.q);
        Columns { data: &data[b * self.queries * stride + head * width..], stride, width }
    }

    fn kv(&self, (data, stride): (&'a [T], usize), slot: usize, head: usize) -> Columns<'a, T> {
        let width = self.heads.width;
        Columns { data: &data[slot * self.keys * stride + head * width..], stride, width }
    }

    /// Keys in whole panels.
    fn panel_keys(&self) -> usize {
        self.keys.next_multiple_of(LANES)
    }

    fn scale(&self) -> T {
        T::of(1.0 / (self.heads.width as f64).sqrt())
    }
}

/// The smallest interval that holds all of `ranges`, empty ones aside.
#[inline(always)]
fn hull(ranges: impl Iterator<Item = Range<usize>>) -> Range<usize> {
    let all = ranges.filter(|r| !r.is_empty()).reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
    all.unwrap_or(0..0)
}

/// What a group of queries sees of the keys `tile..tile + KEYS`, counted from `tile`.
#[inline(always)]
fn within(seen: &[Range<usize>; GROUP], tile: usize) -> [Range<usize>; GROUP] {
    std::array::from_fn(|r| {
        let clip = |x: usize| x.clamp(tile, tile + KEYS) - tile;
        clip(seen[r].start)..clip(seen[r].end)
    })
}

/// The panels that hold the keys `keys`.
fn panels_of(keys: Range<usize>) -> Range<usize> {
    keys.start / LANES..keys.end.div_ceil(LANES)
}

/// Numbers that belong to each query of a group and key of a tile.
type Pairs<T> = [[T; KEYS]; GROUP];

/// `s[r][j] = x[r] . y[j]` for all keys of `panels`, of `x` interleaved and `y` in panels.
#[inline(always)]
fn products<T: Real>(s: &mut Pairs<T>, x: &[T], y: &[T], width: usize, panels: Range<usize>) {
    for p in panels {
        let mut sum = [[T::ZERO; LANES]; GROUP];
        let panel = y[p * width * LANES..][..width * LANES].chunks_exact(LANES);
        for (y, x) in panel.zip(x.chunks_exact(GROUP)) {
            for r in 0..GROUP {
                for l in 0..LANES {
                    sum[r][l] = y[l].mul_add(x[r], sum[r][l]);
                }
            }
        }
        for r in 0..GROUP {
            s[r][p * LANES..][..LANES].copy_from_slice(&sum[r]);
        }
    }
}

/// `y[r] += sum_j s[r][j] x[j]` over keys that the whole group sees.
#[inline(always)]
fn gather<T: Real>(y: &mut [T], s: &Pairs<T>, x: &[T], padded: usize, keys: Range<usize>) {
    if keys.is_empty() {
        return;
    }
    let s: [&[T]; GROUP] = std::array::from_fn(|r| &s[r][keys.clone()]);
    for c in (0..padded).step_by(LANES) {
        let mut sum = rows_at(y, padded, c);
        for n in 0..keys.len() {
            let x = &x[(keys.start + n) * padded + c..][..LANES];
            for r in 0..GROUP {
                for l in 0..LANES {
                    sum[r][l] = x[l].mul_add(s[r][n], sum[r][l]);
                }
            }
        }
        for r in 0..GROUP {
            y[r * padded + c..][..LANES].copy_from_slice(&sum[r]);
        }
    }
}

/// The same over keys that not every query sees.
#[inline(always)]
fn gather_ragged<T: Real>(
    y: &mut [T],
    s: &Pairs<T>,
    x: &[T],
    padded: usize,
    keys: Range<usize>,
    seen: &[Range<usize>; GROUP],
) {
    for c in (0..padded).step_by(LANES) {
        let mut sum = rows_at(y, padded, c);
        for n in keys.clone() {
            let x = &x[n * padded + c..][..LANES];
            for r in 0..GROUP {
                if seen[r].contains(&n) {
                    for l in 0..LANES {
                        sum[r][l] = x[l].mul_add(s[r][n], sum[r][l]);
                    }
                }
            }
        }
        for r in 0..GROUP {
            y[r * padded + c..][..LANES].copy_from_slice(&sum[r]);
        }
    }
}

/// `x[j] += sum_r s[r][j] y[r]` for keys that the whole group sees.
#[inline(always)]
fn scatter<T: Real>(x: &mut [T], s: &Pairs<T>, y: &[T], padded: usize, keys: Range<usize>) {
    if keys.is_empty() {
        return;
    }
    let s: [&[T]; GROUP] = std::array::from_fn(|r| &s[r][keys.clone()]);
    for c in (0..padded).step_by(LANES) {
        let of = rows_at(y, padded, c);
        for n in 0..keys.len() {
            let x = &mut x[(keys.start + n) * padded + c..][..LANES];
            for r in 0..GROUP {
                for l in 0..LANES {
                    x[l] = of[r][l].mul_add(s[r][n], x[l]);
                }
            }
        }
    }
}

/// The same for keys that not every query sees.
#[inline(always)]
fn scatter_ragged<T: Real>(
    x: &mut [T],
    s: &Pairs<T>,
    y: &[T],
    padded: usize,
    keys: Range<usize>,
    seen: &[Range<usize>; GROUP],
) {
    for c in (0..padded).step_by(LANES) {
        let of = rows_at(y, padded, c);
        for n in keys.clone() {
            let x = &mut x[n * padded + c..][..LANES];
            for r in 0..GROUP {
                if seen[r].contains(&n) {
                    for l in 0..LANES {
                        x[l] = of[r][l].mul_add(s[r][n], x[l]);
                    }
                }
            }
        }
    }
}

/// The elements `c..c + LANES` of a group's rows.
#[inline(always)]
fn rows_at<T: Real>(x: &[T], padded: usize, c: usize) -> [[T; LANES]; GROUP] {
    let mut rows = [[T::ZERO; LANES]; GROUP];
    for r in 0..GROUP {
        rows[r].copy_from_slice(&x[r * padded + c..][..LANES]);
    }
    rows
}

/// The keys that a whole group sees, and those before and behind them that some of it see.
#[inline(always)]
fn shares(seen: &[Range<usize>; GROUP]) -> (Range<usize>, [Range<usize>; 2]) {
    let all = hull(seen.iter().cloned());
    let start = seen.iter().map(|s| s.start).fold(0, usize::max);
    let end = seen.iter().map(|s| s.end).fold(KEYS, usize::min);
    if start < end { (start..end, [all.start..start, end..all.end]) } else { (0..0, [all, 0..0]) }
}

/// Scores become exponentials below their maximum. Returns the maximum of `top` and the scores, and
/// the sum of the exponentials.
#[inline(always)]
fn exponentials<T: Real>(s: &mut [T], seen: &Range<usize>, scale: T, top: T) -> (T, T) {
    let (start, end) = (seen.start as i32, seen.end as i32);
    let panels = panels_of(seen.clone());
    let s = &mut s[panels.start * LANES..panels.end * LANES];
    let mut most = [top; LANES];
    let mut at = (panels.start * LANES) as i32;
    for s in s.chunks_exact_mut(LANES) {
        for l in 0..LANES {
            let j = at + l as i32;
            s[l] = if j >= start && j < end { s[l] * scale } else { T::NEG_INFINITY };
            most[l] = most[l].max(s[l]);
        }
        at += LANES as i32;
    }
    let top = most.into_iter().fold(top, T::max);
    let mut total = [T::ZERO; LANES];
    for s in s.chunks_exact_mut(LANES) {
        for l in 0..LANES {
            s[l] = (s[l] - top).exp();
            total[l] += s[l];
        }
    }
    (top, sum(LANES, |l| total[l]))
}

/// Keys and values of one head, laid out for the forward pass.
struct Packed<'a, T> {
    k: &'a [T],
    v: &'a [T],
}

/// The state of a query tile's softmax: maximum, sum, and weighted sum of values.
struct Softmax<'a, T> {
    top: [T; TILE],
    total: [T; TILE],
    o: &'a mut [T],
}

impl<T: Real> Problem<'_, T> {
    fn forward(&self, o: &mut [T], lse: &mut [T], cpu: &Cpu) {
        let (rows, lses) = (self.queries * self.heads.q_columns(), self.queries * self.heads.heads);
        if self.queries < GROUP {
            let each = o.par_chunks_mut(rows).zip(lse.par_chunks_mut(lses)).enumerate();
            return each.for_each(|(b, (o, lse))| match self.slot(b) {
                Some(slot) => self.few(b, slot, o, lse, cpu),
                None => [o, lse].into_iter().for_each(|x| x.fill(T::ZERO)),
            });
        }
        // A batch row to a thread at a time: what more of them are packed into would be touched in vain.
        let (n, len) = (rayon::current_num_threads().min(o.len() / rows), self.packed_len());
        cpu.scratch(n * len, |packed: &mut [T]| {
            for (i, (o, lse)) in o.chunks_mut(n * rows).zip(lse.chunks_mut(n * lses)).enumerate() {
                let each = o.par_chunks_mut(rows).zip(lse.par_chunks_mut(lses));
                each.zip(packed.par_chunks_mut(len)).enumerate().for_each(
                    |(r, ((o, lse), packed))| match self.slot(i * n + r) {
                        Some(slot) => self.many(i * n + r, slot, o, lse, packed, cpu),
                        None => [o, lse].into_iter().for_each(|x| x.fill(T::ZERO)),
                    },
                );
            }
        });
    }

    /// Few queries: keys and values are read where they lie.
    fn few(&self, b: usize, slot: usize, o: &mut [T], lse: &mut [T], cpu: &Cpu) {
        let (h, width) = (self.heads, self.heads.width);
        cpu.scratch(self.panel_keys(), |s: &mut [T]| {
            simd!({
                for (n, o) in o.chunks_exact_mut(width).enumerate() {
                    let (i, head) = (n / h.heads, n % h.heads);
                    let k = self.kv(self.k, slot, head / h.group());
                    let v = self.kv(self.v, slot, head / h.group());
                    let (q, seen) = (self.q(b, head).row(i), self.seen(b, i));
                    for j in seen.clone() {
                        s[j] = dot(q, k.row(j));
                    }
                    let (top, total) = exponentials(s, &seen, self.scale(), T::NEG_INFINITY);
                    o.fill(T::ZERO);
                    for j in seen.clone() {
                        axpy(o, s[j], v.row(j));
                    }
                    lse[head * self.queries + i] = finish(o, &seen, top, total);
                }
            });
        });
    }

    /// Elements of the packed keys and of the packed values of a head.
    fn head_lens(&self) -> [usize; 2] {
        [self.heads.width, self.heads.padded()].map(|width| self.panel_keys() * width)
    }

    /// Elements that [`Problem::many`] packs: keys and values of all heads, `lse` tile by tile.
    fn packed_len(&self) -> usize {
        let [k_len, v_len] = self.head_lens();
        self.heads.kv_heads * (k_len + v_len) + self.queries.div_ceil(TILE) * self.heads.heads * TILE
    }

    /// Elements that [`Problem::tile`] borrows.
    fn tile_len(&self) -> usize {
        TILE * (self.heads.width + self.heads.padded())
    }

    /// Many queries: keys and values of the row are packed once, then query tiles go in parallel.
    fn many(&self, b: usize, slot: usize, o: &mut [T], lse: &mut [T], all: &mut [T], cpu: &Cpu) {
        let h = self.heads;
        let union = self.union(b, 0..self.queries);
        let [k_len, v_len] = self.head_lens();
        let (packed, parts) = all.split_at_mut(h.kv_heads * (k_len + v_len));
        packed.par_chunks_mut(k_len + v_len).enumerate().for_each(|(head, packed)| {
            let (k, v) = packed.split_at_mut(k_len);
            simd!({
                self.kv(self.k, slot, head).panels::<LANES>(union.clone(), k);
                self.kv(self.v, slot, head).pad(union.clone(), h.padded(), v);
            });
        });
        let packed = &*packed;
        let tiles =
            o.par_chunks_mut(TILE * h.q_columns()).zip(parts.par_chunks_mut(h.heads * TILE)).enumerate();
        tiles.for_each(|(t, (o, lse))| {
            for head in 0..h.heads {
                let (k, v) = packed[head / h.group() * (k_len + v_len)..][..k_len + v_len].split_at(k_len);
                let lse = &mut lse[head * TILE..][..TILE];
                self.tile(b, t * TILE, head, &Packed { k, v }, o, lse, cpu);
            }
        });
        for (t, part) in parts.chunks(h.heads * TILE).enumerate() {
            for (lse, part) in lse.chunks_mut(self.queries).zip(part.chunks(TILE)) {
                let n = TILE.min(self.queries - t * TILE);
                lse[t * TILE..][..n].copy_from_slice(&part[..n]);
            }
        }
    }

    /// One head of the queries from `first` on; `o` holds the tile's rows of all heads.
    fn tile(
        &self,
        b: usize,
        first: usize,
        head: usize,
        packed: &Packed<'_, T>,
        o: &mut [T],
        lse: &mut [T],
        cpu: &Cpu,
    ) {
        let h = self.heads;
        let rows = o.len() / h.q_columns();
        cpu.scratch(self.tile_len(), |all: &mut [T]| {
            let (q, sum) = all.split_at_mut(TILE * h.width);
            let tile = self.q(b, head);
            let tile = Columns { data: &tile.data[first * tile.stride..], ..tile };
            simd!({
                tile.panels::<GROUP>(0..rows, q);
                sum.fill(T::ZERO);
                let mut state = Softmax { top: [T::NEG_INFINITY; TILE], total: [T::ZERO; TILE], o: sum };
                let union = self.union(b, first..first + rows);
                for at in (union.start / KEYS * KEYS..union.end).step_by(KEYS) {
                    for g in (0..rows).step_by(GROUP) {
                        let seen = std::array::from_fn(|r| self.seen(b, first + g + r));
                        self.group(
                            g,
                            &q[g * h.width..][..GROUP * h.width],
                            &within(&seen, at),
                            at,
                            packed,
                            &mut state,
                        );
                    }
                }
                for i in 0..rows {
                    let o = &mut o[i * h.q_columns() + head * h.width..][..h.width];
                    o.copy_from_slice(&state.o[i * h.padded()..][..h.width]);
                    lse[i] = finish(o, &self.seen(b, first + i), state.top[i], state.total[i]);
                }
            });
        });
    }

    /// One group of queries meets the key tile at `at`.
    #[inline(always)]
    fn group(
        &self,
        g: usize,
        q: &[T],
        seen: &[Range<usize>; GROUP],
        at: usize,
        packed: &Packed<'_, T>,
        state: &mut Softmax<'_, T>,
    ) {
        let (width, padded) = (self.heads.width, self.heads.padded());
        let keys = hull(seen.iter().cloned());
        if keys.is_empty() {
            return;
        }
        let (k, v) = (&packed.k[at * width..], &packed.v[at * padded..]);
        let mut s = [[T::ZERO; KEYS]; GROUP];
        products(&mut s, q, k, width, panels_of(keys));
        let o = &mut state.o[g * padded..][..GROUP * padded];
        for r in 0..GROUP {
            if seen[r].is_empty() {
                continue;
            }
            let before = state.top[g + r];
            let (top, total) = exponentials(&mut s[r], &seen[r], self.scale(), before);
            let shrink = (before - top).exp();
            state.top[g + r] = top;
            state.total[g + r] = state.total[g + r].mul_add(shrink, total);
            o[r * padded..][..padded].iter_mut().for_each(|o| *o = *o * shrink);
        }
        let (common, ragged) = shares(seen);
        gather(o, &s, v, padded, common);
        for keys in ragged {
            gather_ragged(o, &s, v, padded, keys, seen);
        }
    }
}

/// Divides the weighted sum of values by the sum of weights and returns its logarithm; zeros if the
/// query sees nothing.
#[inline(always)]
fn finish<T: Real>(o: &mut [T], seen: &Range<usize>, top: T, total: T) -> T {
    if seen.is_empty() {
        o.fill(T::ZERO);
        return T::ZERO;
    }
    let share = T::ONE / total;
    o.iter_mut().for_each(|o| *o = *o * share);
    top + total.ln()
}

/// What arrives at the backward pass beside the operands.
struct Arrived<'a, T> {
    o: &'a [T],
    lse: &'a [T],
    d: &'a [T],
}

/// Cuts the first `n` elements off.
fn cut<'a, T>(rest: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    let (first, others) = std::mem::take(rest).split_at_mut(n);
    *rest = others;
    first
}

/// The gradients of one key head and its query heads, rows padded to whole vectors: `dq [G, Tq]`,
/// then `dk [Tk]`, `dv [Tk]`.
struct Gradients<'a, T> {
    dq: &'a mut [T],
    dk: &'a mut [T],
    dv: &'a mut [T],
}

/// One query head, laid out for the backward pass: interleaved by groups, and in padded rows.
struct QueryHead<'a, T> {
    q_groups: &'a [T],
    d_groups: &'a [T],
    q: &'a [T],
    d: &'a [T],
    /// `sum_d do o`.
    delta: &'a [T],
}

/// One key head, laid out for the backward pass: in panels, and keys in padded rows.
struct KeyHead<'a, T> {
    k_panels: &'a mut [T],
    v_panels: &'a mut [T],
    k: &'a mut [T],
}

impl<T: Real> Problem<'_, T> {
    /// Queries in whole groups.
    fn group_queries(&self) -> usize {
        self.queries.next_multiple_of(GROUP)
    }

    /// Elements of the [`Gradients`] of one key head.
    fn gradient_len(&self) -> usize {
        (self.heads.group() * self.group_queries() + 2 * self.keys) * self.heads.padded()
    }

    fn gradients<'a>(&self, mut all: &'a mut [T]) -> Gradients<'a, T> {
        let padded = self.heads.padded();
        let dq = cut(&mut all, self.heads.group() * self.group_queries() * padded);
        let dk = cut(&mut all, self.keys * padded);
        Gradients { dq, dk, dv: all }
    }

    /// The gradients of batch row `b`, one part for each key head.
    fn backward(&self, b: usize, arrived: &Arrived<'_, T>, parts: &mut [T], cpu: &Cpu) {
        parts.par_chunks_mut(self.gradient_len()).enumerate().for_each(|(head, part)| {
            part.fill(T::ZERO);
            if let Some(slot) = self.slot(b) {
                self.backward_head(b, slot, head, arrived, self.gradients(part), cpu);
            }
        });
    }

    fn backward_head(
        &self,
        b: usize,
        slot: usize,
        head: usize,
        arrived: &Arrived<'_, T>,
        to: Gradients<'_, T>,
        cpu: &Cpu,
    ) {
        let (h, padded, queries) = (self.heads, self.heads.padded(), self.group_queries());
        let [key_len, query_len] = self.backward_lens();
        let union = self.union(b, 0..self.queries);
        cpu.scratch(key_len + h.group() * query_len, |mut all: &mut [T]| {
            simd!({
                let keys = self.pack_keys(slot, head, &union, cut(&mut all, key_len));
                for g in 0..h.group() {
                    self.pack_queries(
                        b,
                        head * h.group() + g,
                        arrived,
                        &mut all[g * query_len..][..query_len],
                    );
                }
                for at in (union.start / KEYS * KEYS..union.end).step_by(KEYS) {
                    for g in 0..h.group() {
                        let q = self.query_head(&all[g * query_len..][..query_len]);
                        let lse = &arrived.lse[(b * h.heads + head * h.group() + g) * self.queries..];
                        for i in (0..self.queries).step_by(GROUP) {
                            let dq = &mut to.dq[(g * queries + i) * padded..][..GROUP * padded];
                            let tile = at * padded..(at + KEYS).min(self.keys) * padded;
                            let (dk, dv) = (&mut to.dk[tile.clone()], &mut to.dv[tile]);
                            self.backward_group(b, i, at, &q, &keys, lse, Gradients { dq, dk, dv });
                        }
                    }
                }
            });
        });
    }

    #[inline(always)]
    fn pack_keys<'a>(
        &self,
        slot: usize,
        head: usize,
        union: &Range<usize>,
        mut all: &'a mut [T],
    ) -> KeyHead<'a, T> {
        let len = self.panel_keys() * self.heads.width;
        let (k_panels, v_panels) = (cut(&mut all, len), cut(&mut all, len));
        let (k, v) = (self.kv(self.k, slot, head), self.kv(self.v, slot, head));
        k.panels::<LANES>(union.clone(), k_panels);
        v.panels::<LANES>(union.clone(), v_panels);
        k.pad(union.clone(), self.heads.padded(), all);
        KeyHead { k_panels, v_panels, k: all }
    }

    /// Elements of a [`KeyHead`] and of a [`QueryHead`].
    fn backward_lens(&self) -> [usize; 2] {
        let key_len = self.panel_keys() * (2 * self.heads.width + self.heads.padded());
        [key_len, self.query_lens().iter().sum()]
    }

    /// Elements of the parts of a [`QueryHead`], in their order.
    fn query_lens(&self) -> [usize; 5] {
        let (h, n) = (self.heads, self.group_queries());
        [n * h.width, n * h.width, n * h.padded(), n * h.padded(), n]
    }

    /// What [`Problem::pack_queries`] left.
    #[inline(always)]
    fn query_head<'a>(&self, mut all: &'a [T]) -> QueryHead<'a, T> {
        let [q_groups, d_groups, q, d, delta] = self.query_lens().map(
            #[inline(always)]
            |n| {
                let (part, rest) = all.split_at(n);
                all = rest;
                part
            },
        );
        QueryHead { q_groups, d_groups, q, d, delta }
    }

    #[inline(always)]
    fn pack_queries<'r>(&self, b: usize, head: usize, arrived: &Arrived<'r, T>, mut all: &mut [T]) {
        let (h, rows) = (self.heads, 0..self.queries);
        let [q_groups, d_groups, q, d, delta] = self.query_lens().map(
            #[inline(always)]
            |n| cut(&mut all, n),
        );
        let result = |x: &'r [T]| Columns {
            data: &x[b * self.queries * h.q_columns() + head * h.width..],
            stride: h.q_columns(),
            width: h.width,
        };
        let (from, o, grad) = (self.q(b, head), result(arrived.o), result(arrived.d));
        from.panels::<GROUP>(rows.clone(), q_groups);
        grad.panels::<GROUP>(rows.clone(), d_groups);
        from.pad(rows.clone(), h.padded(), q);
        grad.pad(rows.clone(), h.padded(), d);
        for i in rows {
            delta[i] = dot(o.row(i), grad.row(i));
        }
    }

    /// The queries `i..i + GROUP` meet the key tile at `at`; `to` holds their rows and the tile's.
    #[inline(always)]
    fn backward_group(
        &self,
        b: usize,
        i: usize,
        at: usize,
        query: &QueryHead<'_, T>,
        key: &KeyHead<'_, T>,
        lse: &[T],
        to: Gradients<'_, T>,
    ) {
        let (width, padded, scale) = (self.heads.width, self.heads.padded(), self.scale());
        let seen = within(&std::array::from_fn(|r| self.seen(b, i + r)), at);
        let keys = hull(seen.iter().cloned());
        if keys.is_empty() {
            return;
        }
        let (mut p, mut ds) = ([[T::ZERO; KEYS]; GROUP], [[T::ZERO; KEYS]; GROUP]);
        let panels = panels_of(keys);
        products(&mut p, &query.q_groups[i * width..], &key.k_panels[at * width..], width, panels.clone());
        products(&mut ds, &query.d_groups[i * width..], &key.v_panels[at * width..], width, panels);
        for r in 0..GROUP {
            if seen[r].is_empty() {
                continue;
            }
            let (lse, delta) = (lse[i + r], query.delta[i + r]);
            let panels = panels_of(seen[r].clone());
            let keys = panels.start * LANES..panels.end * LANES;
            for (p, ds) in p[r][keys.clone()].iter_mut().zip(&mut ds[r][keys]) {
                *p = p.mul_add(scale, -lse).exp();
                *ds = *p * (*ds - delta) * scale;
            }
        }
        let (q, d, k) = (&query.q[i * padded..], &query.d[i * padded..], &key.k[at * padded..]);
        let Gradients { dq, dk, dv } = to;
        let (common, ragged) = shares(&seen);
        gather(dq, &ds, k, padded, common.clone());
        scatter(dk, &ds, q, padded, common.clone());
        scatter(dv, &p, d, padded, common);
        for keys in ragged {
            gather_ragged(dq, &ds, k, padded, keys.clone(), &seen);
            scatter_ragged(dk, &ds, q, padded, keys.clone(), &seen);
            scatter_ragged(dv, &p, d, padded, keys, &seen);
        }
    }

    /// Row `i` of `dq` from the parts of a batch row: all heads side by side.
    fn dq_row(&self, parts: &[T], i: usize, dq: &mut [T]) {
        let (h, padded) = (self.heads, self.heads.padded());
        for (head, dq) in dq.chunks_mut(h.width).enumerate() {
            let part = &parts[head / h.group() * self.gradient_len()..];
            let row = head % h.group() * self.group_queries() + i;
            dq.copy_from_slice(&part[row * padded..][..h.width]);
        }
    }

    /// `dk[j] += `, `dv[j] += ` from the parts of a batch row: all heads side by side.
    fn add_dkv_row(&self, parts: &[T], j: usize, dk: &mut [T], dv: &mut [T]) {
        let (h, padded) = (self.heads, self.heads.padded());
        let before = h.group() * self.group_queries();
        for (head, (dk, dv)) in dk.chunks_mut(h.width).zip(dv.chunks_mut(h.width)).enumerate() {
            let part = &parts[head * self.gradient_len()..];
            dk.iter_mut().zip(&part[(before + j) * padded..]).for_each(|(dk, part)| *dk += *part);
            dv.iter_mut().zip(&part[(before + self.keys + j) * padded..]).for_each(|(dv, part)| *dv += *part);
        }
    }

    /// `dqkv`, batch rows in parallel.
    fn backward_packed(&self, arrived: &Arrived<'_, T>, dqkv: &mut [T], cpu: &Cpu) {
        let (row, len) = (self.queries * self.q.1, self.heads.kv_heads * self.gradient_len());
        // As in `forward`.
        let n = rayon::current_num_threads().min(dqkv.len() / row);
        cpu.scratch(n * len, |parts: &mut [T]| {
            for (i, dqkv) in dqkv.chunks_mut(n * row).enumerate() {
                let each = dqkv.par_chunks_mut(row).zip(parts.par_chunks_mut(len)).enumerate();
                each.for_each(|(r, (dqkv, parts))| self.backward_row(i * n + r, arrived, dqkv, parts, cpu));
            }
        });
    }

    /// `dqkv` of batch row `b`.
    fn backward_row(&self, b: usize, arrived: &Arrived<'_, T>, dqkv: &mut [T], parts: &mut [T], cpu: &Cpu) {
        let (h, stride) = (self.heads, self.q.1);
        self.backward(b, arrived, parts, cpu);
        let parts = &*parts;
        dqkv.par_chunks_mut(TILE * stride).enumerate().for_each(|(t, rows)| {
            for (n, row) in rows.chunks_mut(stride).enumerate() {
                let (q, kv) = row.split_at_mut(h.q_columns());
                let (k, v) = kv.split_at_mut(h.kv_columns());
                self.dq_row(parts, t * TILE + n, q);
                k.fill(T::ZERO);
                v.fill(T::ZERO);
                self.add_dkv_row(parts, t * TILE + n, k, v);
            }
        });
    }

    /// `dq`, `dk`, `dv`. Batch rows may share a cache: their parts are added in the order of the rows.
    fn backward_cached(&self, arrived: &Arrived<'_, T>, [dq, dk, dv]: [&mut [T]; 3], cpu: &Cpu) {
        let (h, stride) = (self.heads, self.q.1);
        let part_len = h.kv_heads * self.gradient_len();
        let batch = dq.len() / (self.queries * stride).max(1);
        cpu.scratch(batch * part_len, |parts: &mut [T]| {
            let rows =
                parts.par_chunks_mut(part_len).zip(dq.par_chunks_mut(self.queries * stride)).enumerate();
            rows.for_each(|(b, (parts, dq))| {
                self.backward(b, arrived, parts, cpu);
                for (i, row) in dq.chunks_mut(stride).enumerate() {
                    let (q, others) = row.split_at_mut(h.q_columns());
                    self.dq_row(parts, i, q);
                    others.fill(T::ZERO);
                }
            });
            let parts = &*parts;
            let len = self.keys * h.kv_columns();
            dk.par_chunks_mut(len).zip(dv.par_chunks_mut(len)).enumerate().for_each(|(slot, (dk, dv))| {
                dk.fill(T::ZERO);
                dv.fill(T::ZERO);
                let readers = parts.chunks(part_len).enumerate().filter(|(b, _)| self.slot(*b) == Some(slot));
                for (_, parts) in readers {
                    let rows = dk.chunks_mut(h.kv_columns()).zip(dv.chunks_mut(h.kv_columns())).enumerate();
                    rows.for_each(|(j, (dk, dv))| self.add_dkv_row(parts, j, dk, dv));
                }
            });
        });
    }
}

impl Attention {
    /// Batch rows, queries and keys, if the operands fit together.
    fn sizes(&self, ins: &[Spec]) -> Result<[usize; 3], String> {
        self.heads.divide()?;
        let (q, caches, masks) = match (self.cached, ins) {
            (false, [qkv, start, end]) => (qkv, None, [start, end]),
            (true, [q, k, v, slots, start, end]) => (q, Some((k, v, slots)), [start, end]),
            _ => return Err(format!("{} inputs are no attention", ins.len())),
        };
        let h = self.heads;
        let &[batch, queries, width] = q.shape.dims() else {
            return Err(format!("{q:?} should be [B, T, columns]"));
        };
        floats(&[*q])?;
        for mask in masks {
            integers(*mask)?;
            if mask.shape.dims() != [batch, queries] {
                return Err(format!("mask {mask:?} does not fit {q:?}"));
            }
        }
        let Some((k, v, slots)) = caches else {
            let fits = width == h.q_columns() + 2 * h.kv_columns();
            return if fits {
                Ok([batch, queries, queries])
            } else {
                Err(format!("{q:?} does not hold {h:?}"))
            };
        };
        floats(&[*k, *v])?;
        integers(*slots)?;
        if width < h.q_columns()
            || k.shape != v.shape
            || k.shape.dims().len() != 3
            || k.shape.last() != h.kv_columns()
        {
            return Err(format!("{q:?}, {k:?}, {v:?} do not hold {h:?}"));
        }
        if slots.shape.dims() != [batch] {
            return Err(format!("slots {slots:?} do not fit {q:?}"));
        }
        if k.shape.dims()[0] == 0 {
            return Err(format!("{k:?} holds no cache; use one at least"));
        }
        Ok([batch, queries, k.shape.dims()[1]])
    }

    /// Batch rows, and a problem of such sizes without operands.
    fn problem(&self, ins: &[Spec]) -> (usize, Problem<'static, f32>) {
        let ([batch, queries, keys], none) = (self.sizes(ins).unwrap_or_default(), (&[][..], 0));
        let (heads, slots, start, end) = (self.heads, None, &[][..], &[][..]);
        (batch, Problem { heads, queries, keys, slots, start, end, q: none, k: none, v: none })
    }

    /// The products of every query with every key, `count` of them: what the static shapes allow. How
    /// many a mask leaves is known only when it runs.
    fn flops(&self, ins: &[Spec], count: u64) -> u64 {
        let [batch, queries, keys] = self.sizes(ins).unwrap_or_default();
        count * 2 * (batch * self.heads.q_columns() * queries * keys) as u64
    }

    /// How many operands describe the problem.
    fn operands(&self) -> usize {
        if self.cached { 6 } else { 3 }
    }
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [batch, queries, _] = self.sizes(ins)?;
        let o = Spec::new([batch, queries, self.heads.q_columns()], ins[0].dtype);
        Ok(vec![o, Spec::new([batch, self.heads.heads, queries], o.dtype.accumulator())])
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], threads: usize) -> Vec<usize> {
        let ((batch, p), size) = (self.problem(ins), ins[0].dtype.accumulator().size());
        let rows = threads.min(batch);
        if p.queries < GROUP {
            return vec![p.panel_keys() * size; rows];
        }
        let tiles = threads.min(rows * p.queries.div_ceil(TILE));
        [vec![rows * p.packed_len() * size], vec![p.tile_len() * size; tiles]].concat()
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        let [o, lse] = outs else { return };
        real!(o, T => {
            let (o, lse) = (T::write(o), T::write(lse));
            if !o.is_empty() {
                Problem::<T>::new(self, ins).forward(o, lse, cpu);
            }
        });
    }

    fn plain(&self, specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
        plain::forward(self, specs, ins)
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::forward(self, ins, on)
    }

    /// See [`Attention::flops`].
    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: self.flops(ins, 2), bytes: traffic(ins, outs) }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let Some(d) = d[0] else { return Ok(vec![Grad::Stop("lse is no result"); n.ins.len()]) };
        let unordered = g.unordered;
        let ins = n.ins.iter().chain(&n.outs).copied().chain([d]);
        let mut grads = vec![Grad::Integer; n.ins.len()];
        if self.cached {
            let op = AttentionBwd { of: *self, rope: None, unordered };
            let given: [Tensor; 3] = g.push(op, &ins.collect::<Vec<_>>());
            grads.iter_mut().zip(given).for_each(|(grad, given)| *grad = Grad::To(given));
            return Ok(grads);
        }
        let before = self.turned.0;
        let op = AttentionBwd { of: *self, rope: before.map(|b| b.rope), unordered };
        let ins: Vec<Tensor> = ins.chain(before.map(|b| b.positions)).collect();
        let [dqkv] = g.push(op, &ins);
        grads[0] = match before {
            None => Grad::To(dqkv),
            Some(Before { heads, shape, .. }) => {
                let dqkv = g.reshape(dqkv, shape);
                g.arrive(heads, dqkv);
                Grad::Stop("it goes to what the heads were before they turned")
            }
        };
        Ok(grads)
    }
}

impl Op for AttentionBwd {
    fn name(&self) -> &'static str {
        "attention_bwd"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        if let (Some(rope), Some(&positions)) = (self.rope, ins.last()) {
            rope.infer(&[ins[0], positions])?;
        }
        Ok(ins[..if self.of.cached { 3 } else { 1 }].to_vec())
    }

    fn workspace(&self, ins: &[Spec], _: &[Spec], threads: usize) -> Vec<usize> {
        let operands = &ins[..self.of.operands()];
        let ((batch, p), size) = (self.of.problem(operands), ins[0].dtype.accumulator().size());
        // With caches the gradients of all batch rows wait for each other.
        let rows = if self.of.cached { batch } else { threads.min(batch) };
        let heads = threads.min(rows * p.heads.kv_heads);
        let [key_len, query_len] = p.backward_lens();
        let head = (key_len + p.heads.group() * query_len) * size;
        let all = [vec![rows * p.heads.kv_heads * p.gradient_len() * size], vec![head; heads]].concat();
        match self.rope {
            Some(rope) => most([all, rope.space(ins[0])]),
            None => all,
        }
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        real!(outs[0], T => {
            let problem = Problem::<T>::new(&self.of, ins);
            let at = self.of.operands();
            let [o, lse, d] = [at, at + 1, at + 2].map(|i| T::read(&ins[i]));
            let arrived = Arrived { o, lse, d };
            match outs {
                [dqkv] if !o.is_empty() => problem.backward_packed(&arrived, T::write(dqkv), cpu),
                [dq, dk, dv] if !o.is_empty() => {
                    problem.backward_cached(&arrived, [T::write(dq), T::write(dk), T::write(dv)], cpu);
                }
                _ => outs.iter_mut().for_each(|out| T::write(out).fill(T::ZERO)),
            }
            if let ([dqkv], Some(rope), Some(positions)) = (outs, self.rope, ins.last()) {
                rope.run(&[], positions.i32(), T::write(dqkv), -1.0, cpu);
            }
        });
    }

    fn plain(&self, specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
        let turned = self.of.operands() + 3;
        let given = plain::backward(&self.of, &specs[..turned], &ins[..turned])?;
        let Some(rope) = self.rope else { return Some(given) };
        let dqkv = given.into_iter().chain(ins.last().cloned()).collect::<Vec<_>>();
        agreement::stored(RopeBwd(rope), &[specs[0], *specs.last()?], &dqkv)
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        kernels::backward(self, ins, outs, on)
    }

    /// See [`Attention::flops`].
    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let turned = self.rope.map_or(0, |rope| rope.flops(ins[0]));
        Cost { flops: self.of.flops(&ins[..self.of.operands()], 5) + turned, bytes: traffic(ins, outs) }
    }
}

/// `row_start` and `row_end`.
type Mask = (Vec<i32>, Vec<i32>);

/// The mask of one packed row: documents of a length, each with an image at a span, `0..0` for none.
fn documents(docs: &[(usize, Range<usize>)]) -> Mask {
    let (mut start, mut end) = (vec![], vec![]);
    for (len, image) in docs {
        let first = start.len();
        for i in 0..*len {
            start.push(first as i32);
            end.push((first + if image.contains(&i) { image.end } else { i + 1 }) as i32);
        }
    }
    (start, end)
}

/// `batch` packed rows of `t` positions.
fn packed_case(name: &str, heads: Heads, batch: usize, t: usize, mask: Mask) -> Case {
    Case::new("attention", name, move |g, x| vec![g.attention(x[0], x[1], x[2], heads)])
        .normal([batch, t, heads.q_columns() + 2 * heads.kv_columns()])
        .ints([batch, t], &mask.0)
        .ints([batch, t], &mask.1)
}

/// The same of heads that turn before.
fn turned_case(name: &str, heads: Heads, batch: usize, t: usize, mask: Mask) -> Case {
    // Every seventh row is unused, others are far away.
    let at = |i: usize| match i % 7 {
        3 => -1,
        4 => 100_003 + i as i32,
        _ => (i % t) as i32,
    };
    Case::new("attention", name, move |g, x| {
        let qkv = g.rotary(x[0], Rotary { positions: x[3], heads, theta: 1e4 });
        vec![g.attention(qkv, x[1], x[2], heads)]
    })
    .normal([batch, t, heads.packed_width()])
    .ints([batch, t], &mask.0)
    .ints([batch, t], &mask.1)
    .ints([batch * t], &(0..batch * t).map(at).collect::<Vec<_>>())
}

/// Queries of `width` columns over 5 caches of 19 positions.
fn cached_case(name: &str, heads: Heads, queries: usize, width: usize, slots: &[i32]) -> Case {
    long_cached_case(name, heads, [queries, 19], width, slots)
}

fn long_cached_case(
    name: &str,
    heads: Heads,
    [queries, keys]: [usize; 2],
    width: usize,
    slots: &[i32],
) -> Case {
    let (batch, kv, last) = (slots.len(), [5, keys, heads.kv_columns()], keys as i32);
    let rows = || 0..(batch * queries) as i32;
    let start: Vec<i32> = rows().map(|i| [0, 3, last, last - 3][i as usize / queries % 4]).collect();
    let end: Vec<i32> = rows().map(|i| last - (i * 5) % 13).collect();
    Case::new("attention", name, move |g, x| {
        vec![g.attention_cached(x[0], x[1], x[2], x[3], x[4], x[5], heads)]
    })
    .normal([batch, queries, width])
    .normal(kv)
    .normal(kv)
    .ints([batch], slots)
    .ints([batch, queries], &start)
    .ints([batch, queries], &end)
}

/// Rows of 4096 positions: causal text, and documents of captions and images of 256 patches.
pub(super) fn speed_cases() -> Vec<Case> {
    let mixed: Vec<_> = (0..8).map(|_| (512, 128..384)).collect();
    let mut all = Vec::new();
    for (name, mask) in [("causal", documents(&[(4096, 0..0)])), ("images", documents(&mixed))] {
        for (count, width) in [(32, 64), (16, 128)] {
            let heads = Heads { heads: count, kv_heads: count, width };
            all.push(packed_case(&format!("{name}, D {width}"), heads, 4, 4096, mask.clone()).large());
        }
    }
    all
}

pub(super) fn cases() -> Vec<Case> {
    let heads = |heads, kv_heads, width| Heads { heads, kv_heads, width };
    let causal = |t: usize| documents(&[(t, 0..0)]);
    let mixed = documents(&[(9, 0..0), (20, 4..15), (1, 0..0), (7, 0..7)]);
    let several = documents(&[(40, 0..0), (30, 7..23), (61, 8..61)]);
    let holes = (vec![0, 3, 2, 9, 4, -7, 0, 99, 5], vec![1, 3, 7, 4, 99, 6, 0, 99, -1]);
    vec![
        packed_case("one position", heads(1, 1, 4), 2, 1, causal(1)),
        packed_case("causal 37", heads(2, 2, 8), 2, 37, causal(37)),
        packed_case("documents with images, 4/2 heads", heads(4, 2, 16), 2, 37, mixed),
        packed_case("several tiles, 4/1 heads of 5", heads(4, 1, 5), 1, 131, several),
        packed_case("several tiles, causal", heads(2, 1, 20), 1, 131, causal(131)),
        packed_case("any intervals", heads(3, 3, 5), 2, 9, holes.clone()),
        turned_case("any intervals of turned heads", heads(3, 3, 6), 2, 9, holes),
        cached_case("one query", heads(4, 2, 8), 1, 32, &[3, -1, 0, 4]),
        cached_case("seven queries of packed rows", heads(4, 2, 5), 7, 40, &[2, 2, -1, 0, 9, 1]),
    ]
    .into_iter()
    .chain(device_cases())
    .collect()
}

/// Head widths that kernels have, and sizes that wrap their tiles and stages.
fn device_cases() -> Vec<Case> {
    let heads = |heads, kv_heads, width| Heads { heads, kv_heads, width };
    let causal = |t: usize| documents(&[(t, 0..0)]);
    let bounds = |t: usize, f: fn(i32, i32) -> (i32, i32)| (0..t as i32).map(|i| f(i, t as i32)).unzip();
    let mut cases = vec![];
    for d in [32, 64, 128] {
        let mixed = documents(&[(50, 3..40), (1, 0..0), (90, 20..84), (70, 0..70)]);
        let masks: [(&str, Heads, usize, usize, Mask); 10] = [
            ("one position", heads(2, 1, d), 3, 1, causal(1)),
            ("causal", heads(2, 2, d), 2, 67, causal(67)),
            ("causal, tiles and one more", heads(2, 1, d), 1, 257, causal(257)),
            ("documents with images", heads(4, 2, d), 1, 211, mixed),
            ("all see all", heads(3, 3, d), 1, 193, bounds(193, |_, t| (0, t))),
            ("whole tiles", heads(1, 1, d), 2, 256, bounds(256, |_, t| (0, t))),
            // Each row one key short of a whole tile at the front, or at the back.
            (
                "almost whole tiles",
                heads(1, 1, d),
                1,
                256,
                bounds(256, |i, t| if i < 128 { (1, 191) } else { (0, t - 1) }),
            ),
            ("windows", heads(2, 1, d), 1, 229, bounds(229, |i, _| (i - 17, i + 9))),
            ("any intervals", heads(2, 1, d), 1, 150, bounds(150, |i, t| ((i * 37) % t, (i * 53) % t))),
            ("nothing", heads(1, 1, d), 1, 70, bounds(70, |i, _| (i, i))),
        ];
        cases.extend(masks.map(|(name, heads, batch, t, mask)| {
            packed_case(&format!("{name}, heads of {d}"), heads, batch, t, mask).large()
        }));
        let turned = [
            ("turned heads", heads(3, 1, d), 2, 67, causal(67)),
            ("turned heads of whole tiles", heads(1, 1, d), 1, 256, bounds(256, |_, t| (0, t))),
            ("turned heads of documents", heads(2, 2, d), 1, 197, documents(&[(130, 3..90), (67, 0..0)])),
        ];
        cases.extend(turned.map(|(name, heads, batch, t, mask)| {
            turned_case(&format!("{name}, heads of {d}"), heads, batch, t, mask).large()
        }));
        let slots = [
            ("one query", heads(4, 2, d), 1, 4, &[3, 4, -1][..]),
            ("seven queries of packed rows", heads(4, 1, d), 7, 6, &[2, 2, -1, 0, 5, 1]),
            ("several tiles of queries", heads(2, 2, d), 133, 2, &[1, 4]),
            ("three queries of a group of three", heads(6, 2, d), 3, 6, &[1, 0, 4]),
            ("one query and one head", heads(3, 3, d), 1, 3, &[2, 5, 0]),
        ];
        cases.extend(slots.map(|(name, heads, queries, columns, slots)| {
            cached_case(&format!("{name}, heads of {d}"), heads, queries, columns * d, slots).large()
        }));
        // The widths that Hopper has kernels for: walks that wrap their rings, and halves of a block that see different
        // tiles, or none.
        let walks: [(&str, usize, Mask); 5] = [
            ("a long walk", 647, causal(647)),
            (
                "many documents",
                389,
                documents(&[(150, 0..0), (3, 0..0), (60, 9..41), (130, 0..128), (46, 0..0)]),
            ),
            ("windows far behind", 397, bounds(397, |i, _| (i - 290, i - 97))),
            (
                "halves that see nothing",
                263,
                bounds(263, |i, t| if i / 64 % 2 == 0 { (0, 0) } else { (5, t) }),
            ),
            (
                "halves far apart",
                523,
                bounds(523, |i, t| if i / 64 % 2 == 0 { (0, 31) } else { (t - 13, t) }),
            ),
        ];
        if d >= 64 {
            cases.extend(walks.map(|(name, t, mask)| {
                packed_case(&format!("{name}, heads of {d}"), heads(1, 1, d), 1, t, mask).large()
            }));
        }
        let long = [
            ("many queries over many keys", heads(2, 1, d), [130, 331], 2, &[-1, 3][..]),
            ("one query over many keys", heads(2, 2, d), [1, 331], 2, &[3, 1]),
            ("a group's queries over many keys", heads(4, 1, d), [2, 523], 4, &[4, -1, 0]),
        ];
        cases.extend(long.map(|(name, heads, sizes, columns, slots)| {
            long_cached_case(&format!("{name}, heads of {d}"), heads, sizes, columns * d, slots).large()
        }));
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cases::contents,
        device::{CpuDevice, CpuOptions, Device, Place},
        op::Kind,
        plan::Plan,
        tensor::Host,
    };
    use std::sync::Arc;

    const HEADS: Heads = Heads { heads: 2, kv_heads: 1, width: 6 };

    /// Outputs, then gradients, of attention whose float inputs are `floats` and whose masks are the
    /// last of `ints`.
    fn run(floats: &[(Spec, Vec<f32>)], ints: &[(Spec, Vec<i32>)]) -> Vec<Vec<f32>> {
        let mut g = Graph::new();
        let name = |i: usize| format!("in{i}");
        let params: Vec<Tensor> = floats
            .iter()
            .enumerate()
            .map(|(i, (s, _))| g.state(Kind::Param, &name(i), s.shape, s.dtype))
            .collect();
        let others: Vec<Tensor> =
            ints.iter().enumerate().map(|(i, (s, _))| g.input(&name(i), s.shape, s.dtype)).collect();
        let o = match (&params[..], &others[..]) {
            (&[qkv], &[start, end]) => g.attention(qkv, start, end, HEADS),
            (&[q, k, v], &[slots, start, end]) => g.attention_cached(q, k, v, slots, start, end, HEADS),
            _ => unreachable!("one of the two forms"),
        };
        g.output("o", o);
        let seed = g.spec(o);
        let d = g.input("d", seed.shape, seed.dtype);
        g.backward_from(&[(o, d)], &params).unwrap();
        let mut device = CpuDevice::new(CpuOptions { threads: 2, poison: true }).unwrap();
        let plan = device.open(Arc::new(Plan::new(&g).unwrap())).unwrap();
        for (i, (_, x)) in floats.iter().enumerate() {
            device.write(Place::State(Kind::Param, &name(i)), View::F32(x)).unwrap();
        }
        for (i, (_, x)) in ints.iter().enumerate() {
            device.write(Place::Input(plan, &name(i)), View::I32(x)).unwrap();
        }
        let d = contents(seed, &crate::cases::Fill::Normal(1.0), 9);
        device.write(Place::Input(plan, "d"), d.view()).unwrap();
        device.run(plan).unwrap();
        let mut fetch = |at: Place<'_>| match device.fetch(at).unwrap() {
            Host::F32(x) => x,
            other => panic!("{other:?}"),
        };
        let mut all = vec![fetch(Place::Output(plan, "o"))];
        for i in 0..floats.len() {
            all.push(fetch(Place::State(Kind::Grad, &name(i))));
        }
        all
    }

    #[test]
    fn nothing_is_attended_where_there_is_nothing() {
        for [batch, t] in [[0, 5], [2, 0]] {
            let mask = || (Spec::new([batch, t], DType::I32), vec![0; batch * t]);
            let all = run(&[normal([batch, t, HEADS.packed_width()], 1)], &[mask(), mask()]);
            assert!(all.iter().all(Vec::is_empty), "{all:?}");
            let caches = [normal([3, 7, 6], 1), normal([3, 7, 6], 2)];
            let slots = (Spec::new([batch], DType::I32), vec![1; batch]);
            let q = normal([batch, t, 12], 0);
            let all = run(&[q, caches[0].clone(), caches[1].clone()], &[slots, mask(), mask()]);
            assert!(all[..2].iter().all(Vec::is_empty), "{all:?}");
            assert_eq!(all[2..], [vec![0.0; 3 * 7 * 6], vec![0.0; 3 * 7 * 6]]);
        }
    }

    #[test]
    fn heads_of_another_shape_turn_back_by_themselves() {
        let gradients = |own: Heads| {
            let mut g = Graph::new();
            let qkv = g.state(Kind::Param, "qkv", [1, 5, 16], DType::F32);
            let [start, end] = ["start", "end"].map(|name| g.input(name, [1, 5], DType::I32));
            let positions = g.input("positions", [5], DType::I32);
            let heads = Heads { heads: 2, kv_heads: 1, width: 4 };
            let turned = g.rotary(qkv, Rotary { positions, heads, theta: 1e4 });
            let o = g.attention(turned, start, end, own);
            let d = g.input("d", g.spec(o).shape, DType::F32);
            g.backward_from(&[(o, d)], &[qkv]).unwrap();
            let steps = Plan::new(&g).unwrap().steps;
            steps.iter().filter(|s| s.op.name().ends_with("_bwd")).map(|s| s.op.name()).collect::<Vec<_>>()
        };
        assert_eq!(gradients(Heads { heads: 2, kv_heads: 1, width: 4 }), ["attention_bwd"]);
        assert_eq!(gradients(Heads { heads: 6, kv_heads: 1, width: 2 }), ["attention_bwd", "rope_bwd"]);
    }

    fn normal(dims: [usize; 3], stream: u64) -> (Spec, Vec<f32>) {
        let spec = Spec::new(dims, DType::F32);
        let x = contents(spec, &crate::cases::Fill::Normal(1.0), stream).to_f64();
        (spec, x.into_iter().map(|x| x as f32).collect())
    }

    fn masks(queries: usize, start: Vec<i32>, end: Vec<i32>) -> [(Spec, Vec<i32>); 2] {
        let spec = Spec::new([start.len() / queries, queries], DType::I32);
        [(spec, start), (spec, end)]
    }

    /// Row-wise bits of `x`, for rows that `keep` names.
    fn bits(x: &[f32], width: usize, keep: impl Fn(usize) -> bool) -> Vec<u32> {
        let rows = x.chunks(width).enumerate().filter(|(i, _)| keep(*i));
        rows.flat_map(|(_, row)| row.iter().map(|x| x.to_bits())).collect()
    }

    #[test]
    fn hidden_keys_change_no_bit_of_packed_rows() {
        // Key 30 is seen by its own query alone; the second document sees nothing of the first.
        let (start, end) = documents(&[(31, 0..0), (40, 3..20)]);
        for hidden in [f32::NAN, 1e30] {
            for (poisoned, clean) in [(30..31, 0..30), (0..31, 31..71), (31..71, 0..31)] {
                let (spec, x) = normal([1, 71, 24], 0);
                let mut y = x.clone();
                for row in y.chunks_mut(24).skip(poisoned.start).take(poisoned.len()) {
                    row[12..].fill(hidden);
                }
                let mask = masks(71, start.clone(), end.clone());
                let (a, b) = (run(&[(spec, x)], &mask), run(&[(spec, y)], &mask));
                assert_eq!(bits(&a[0], 12, |i| clean.contains(&i)), bits(&b[0], 12, |i| clean.contains(&i)));
                // dq of clean queries; and dk, dv too where no poisoned query looks at them.
                let from = if poisoned == (30..31) { 12 } else { 24 };
                let gradient = |r: &[Vec<f32>]| -> Vec<u32> {
                    let rows = r[1].chunks(24).enumerate().filter(|(i, _)| clean.contains(i));
                    rows.flat_map(|(_, row)| row[..from].iter().map(|x| x.to_bits())).collect()
                };
                assert_eq!(gradient(&a), gradient(&b), "{hidden} in {poisoned:?}");
                assert!(a.iter().flatten().all(|x| x.is_finite()));
            }
        }
    }

    #[test]
    fn hidden_keys_change_no_bit_of_cached_rows() {
        for (queries, hidden) in [(1, f32::NAN), (1, 1e30), (7, f32::NAN), (7, 1e30)] {
            let slots = (Spec::new([2], DType::I32), vec![2, 0]);
            let start = [0, 17].into_iter().flat_map(|s| vec![s; queries]).collect();
            let end = [20, 33].into_iter().flat_map(|e| (0..queries as i32).map(move |i| e + i)).collect();
            let [start, end] = masks(queries, start, end);
            let last = [20 + queries - 1, 33 + queries - 1];
            let ints = [slots, start, end];
            let caches = [normal([3, 50, 6], 1), normal([3, 50, 6], 2)];
            let poison = |(spec, x): &(Spec, Vec<f32>)| {
                let mut x = x.clone();
                for (n, row) in x.chunks_mut(6).enumerate() {
                    let seen = [17..last[1], 0..0, 0..last[0]][n / 50].contains(&(n % 50));
                    if !seen {
                        row.fill(hidden);
                    }
                }
                (*spec, x)
            };
            let q = normal([2, queries, 12], 0);
            let a = run(&[q.clone(), caches[0].clone(), caches[1].clone()], &ints);
            let b = run(&[q, poison(&caches[0]), poison(&caches[1])], &ints);
            for (a, b) in a.iter().zip(&b) {
                assert_eq!(bits(a, 6, |_| true), bits(b, 6, |_| true), "{queries} queries, {hidden}");
            }
        }
    }

    /// The formula of this file, of one query head.
    fn by_definition(q: &[f32], k: &[&[f32]], v: &[&[f32]]) -> Vec<f64> {
        let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let scale = 1.0 / (q.len() as f64).sqrt();
        let weights: Vec<f64> = k.iter().map(|k| (product(q, k) * scale).exp()).collect();
        let total: f64 = weights.iter().sum();
        let value = |d: usize| weights.iter().zip(v).map(|(w, v)| w * f64::from(v[d])).sum::<f64>();
        (0..q.len()).map(|d| if k.is_empty() { 0.0 } else { value(d) / total }).collect()
    }

    #[test]
    fn results_agree_with_the_definition() {
        // Few queries and many take different ways; both forms, every kind of interval.
        for queries in [1, 3, 4, 7, 150] {
            let keys = 150;
            let start: Vec<i32> = (0..queries as i32).map(|i| [0, 3, -5, 140, 60][i as usize % 5]).collect();
            let end: Vec<i32> = (0..queries as i32).map(|i| [150, 9, 131, 999, 60][i as usize % 5]).collect();
            let (q, k, v) = (normal([1, queries, 12], 0), normal([2, keys, 6], 1), normal([2, keys, 6], 2));
            let slots = (Spec::new([1], DType::I32), vec![1]);
            let [first, last] = masks(queries, start.clone(), end.clone());
            let cached = run(&[q.clone(), k.clone(), v.clone()], &[slots, first.clone(), last.clone()]);
            let rows = |x: &(Spec, Vec<f32>)| -> Vec<Vec<f32>> {
                x.1[keys * 6..].chunks(6).map(<[f32]>::to_vec).collect()
            };
            let (k, v) = (rows(&k), rows(&v));
            let mut all = vec![cached];
            if queries == keys {
                let row = |i: usize| [&q.1[i * 12..][..12], &k[i], &v[i]].concat();
                let qkv = (Spec::new([1, keys, 24], DType::F32), (0..keys).flat_map(row).collect());
                all.push(run(&[qkv], &[first, last]));
            }
            for (i, n) in (0..queries).flat_map(|i| [(i, 0), (i, 1)]) {
                let (start, end) = (start[i].max(0) as usize, (end[i] as usize).min(keys));
                let (k, v): (Vec<&[f32]>, Vec<&[f32]>) =
                    (start..end).map(|j| (k[j].as_slice(), v[j].as_slice())).unzip();
                let at = i * 12 + n * 6;
                let want = by_definition(&q.1[at..][..6], &k, &v);
                for have in &all {
                    for (have, want) in have[0][at..][..6].iter().zip(&want) {
                        let off = (f64::from(*have) - want).abs();
                        assert!(off <= 1e-5, "query {i} of {queries}, head {n}: {have}, not {want}");
                    }
                }
            }
        }
    }
}
