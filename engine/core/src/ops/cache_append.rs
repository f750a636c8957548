//! `keys[slots[b], positions[b, t]] = src[b, t, at..at + W]`, and values of the `W` columns behind: new keys and values
//! enter their caches.
use super::{prelude::*, rows::named};

#[derive(Debug)]
struct CacheAppend {
    columns_at: usize,
}

impl Graph {
    /// Writes columns `columns_at..columns_at + W` of `src [B, T, Ws]` into `keys [S, Tcap, W]`, and the `W` columns
    /// behind them into `values`, likewise; in place, at `slots` (i32 `[B]`) and `positions` (i32 `[B, T]`). A slot
    /// or a position that is negative or outside the caches is unused and writes nothing; of rows that meet in
    /// one place the last stays. Gives both caches.
    #[track_caller]
    pub fn cache_append(
        &mut self,
        [keys, values]: [Tensor; 2],
        src: Tensor,
        slots: Tensor,
        positions: Tensor,
        columns_at: usize,
    ) -> [Tensor; 2] {
        self.push::<2>(CacheAppend { columns_at }, &[keys, values, src, slots, positions])
    }
}

/// Rows of a batch row that a warp takes.
const TOGETHER: usize = 4;
/// Threads of a block, and blocks that an SM holds.
const THREADS: u32 = 256;
const BLOCKS: u32 = 4;

impl Op for CacheAppend {
    fn name(&self) -> &'static str {
        "cache_append"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [cache, values, src, slots, positions] = operands(ins)?;
        floats(&[cache, src])?;
        integers(slots)?;
        integers(positions)?;
        let (&[_, _, width], &[b, t, columns]) = (cache.shape.dims(), src.shape.dims()) else {
            return Err(format!("{cache:?} and {src:?} should be [S, Tcap, W] and [B, T, Ws]"));
        };
        if values != cache {
            return Err(format!("values {values:?} do not lie as keys {cache:?}"));
        }
        if cache.dtype != src.dtype {
            return Err(format!("{src:?} is of another type than {cache:?}"));
        }
        if self.columns_at.checked_add(2 * width).is_none_or(|end| end > columns) {
            return Err(format!("{src:?} has no 2 x {width} columns from column {}", self.columns_at));
        }
        if slots.shape.dims() != [b] || positions.shape.dims() != [b, t] {
            return Err(format!("{slots:?} and {positions:?} do not give places to {src:?}"));
        }
        Ok(vec![cache; 2])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        for (which, out) in outs.iter_mut().enumerate() {
            real!(out, T => self.run::<T>(ins, which, out));
        }
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        let (&[slots, capacity, width], &[b, t, columns]) = (ins[0].shape.dims(), ins[2].shape.dims()) else {
            return Err("the operands are no cache and no rows".into());
        };
        if !matches!(ins[0].dtype, DType::Bf16 | DType::F32) {
            return Err(format!("no kernel writes {:?}; use bf16 or f32, or the CPU device", ins[0]));
        }
        let mut args = vec![Arg::output(0), Arg::output(1)];
        args.extend([2, 3, 4].map(Arg::input));
        for n in [b, t, slots, capacity, width, columns, self.columns_at] {
            args.push(Arg::size(n)?);
        }
        let entry = format!("cache_append_rows_{}", ins[0].dtype.name());
        let warps = size(2 * b * t.div_ceil(TOGETHER))?;
        let grid = [warps.div_ceil(THREADS / 32).min(on.sms * BLOCKS), 1, 1];
        Ok(Kernels { scratch: vec![], launches: vec![Launch::kernel(entry, grid, THREADS, 0, args)] })
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let keys = ins[2].shape.rows() * outs[0].shape.last() * outs[0].dtype.size();
        Cost { flops: 0, bytes: (4 * keys + ins[3].bytes() + ins[4].bytes()) as u64 }
    }

    fn memory(&self, out: usize) -> Memory {
        Memory::InPlace { input: out }
    }

    fn adjoint(&self, _: &mut Graph, _: &Node, _: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let stop = Grad::Stop("caches are written while sampling only");
        Ok(vec![stop, stop, stop, Grad::Integer, Grad::Integer])
    }
}

impl CacheAppend {
    /// Keys or values. Slots in parallel; each goes through the batch in order.
    fn run<T: Real>(&self, ins: &[In<'_>], which: usize, cache: &mut Out<'_>) {
        let (&[count, capacity, width], &[_, t, columns]) = (cache.shape.dims(), ins[2].shape.dims()) else {
            return;
        };
        let (src, slots, positions) = (T::read(&ins[2]), ins[3].i32(), ins[4].i32());
        let at = self.columns_at + which * width;
        let slices = T::write(cache).par_chunks_mut((capacity * width).max(1)).enumerate();
        slices.for_each(|(slot, cache)| {
            let here = |b: &usize| named(slots[*b], count) == Some(slot);
            for n in (0..slots.len()).filter(here).flat_map(|b| b * t..(b + 1) * t) {
                if let Some(position) = named(positions[n], capacity) {
                    let row = &src[n * columns + at..][..width];
                    cache[position * width..][..width].copy_from_slice(row);
                }
            }
        });
    }
}

pub(super) fn cases() -> Vec<Case> {
    let wide =
        |name: String, at: usize, [s, capacity, w]: [usize; 3], columns: usize, places: (&[i32], &[i32])| {
            let (slots, positions) = places;
            let (b, t) = (slots.len(), positions.len() / slots.len());
            let append = move |g: &mut Graph, x: &[Tensor]| {
                g.cache_append([x[0], x[1]], x[2], x[3], x[4], at).to_vec()
            };
            Case::new("cache_append", name, append)
                .normal([s, capacity, w])
                .normal([s, capacity, w])
                .normal([b, t, columns])
                .ints([b], slots)
                .ints([b, t], positions)
                .without_gradient()
        };
    let case = |name: &str, at: usize, cache: [usize; 3], slots: &[i32], positions: &[i32]| {
        wide(name.into(), at, cache, at + 2 * cache[2] + 1, (slots, positions))
    };
    // The last batch row goes where the first does, those between them elsewhere.
    let around: Vec<i32> = (0..12 * 9).map(|n| if n < 11 * 9 { n } else { n - 11 * 9 }).collect();
    let prompt: Vec<i32> = (0..5 * 31).map(|n| n % 31 - 2).collect();
    let mut cases = vec![
        case("one token", 0, [1, 1, 1], &[0], &[0]),
        case("unused slots and positions", 3, [3, 5, 2], &[2, -1, 0, 3], &[4, -1, 0, 1, 5, 3, 2, 2]),
        case("prompts", 8, [7, 29, 7], &[6, 1, -1, 3, 0], &prompt),
        // The last of the rows that meet stays, within a batch row and between them.
        case("meetings", 2, [2, 4, 9], &[1, 0, 1], &[3, 3, 0, 1, 1, 3, 0, 0, 1, 2, 3, 9]),
        case("meetings around others", 1, [1, 100, 8], &[0; 12], &around),
        case("all in one place", 1, [1, 2, 8], &[0; 3], &[1; 3 * 70]),
    ];
    // Decoding and prompts: rows of whole vectors, of none, and odd ones; idle slots; rows beyond a warp's.
    let shapes = [
        ([1, 8, 8], 1, 1, 8, 24),
        ([2, 16, 16], 2, 1, 16, 48),
        ([4, 32, 64], 3, 1, 128, 256),
        ([8, 64, 128], 8, 1, 256, 512),
        ([5, 17, 32], 5, 1, 31, 95),
        ([33, 3, 24], 40, 1, 48, 96),
        ([3, 40, 8], 2, 33, 16, 32),
        ([2, 64, 256], 2, 64, 256, 768),
        ([2, 70, 264], 1, 67, 0, 528),
        ([1, 131, 40], 1, 127, 40, 121),
        ([4, 10, 12], 4, 8, 12, 36),
        ([2, 301, 8], 2, 300, 8, 24),
        ([64, 2, 7], 64, 2, 7, 21),
        ([6, 5, 1], 7, 3, 2, 5),
        ([3, 999, 16], 5, 801, 16, 48),
        ([1, 3, 2], 1, 3, 0, 4),
        ([2, 5, 3], 3, 5, 1, 7),
        ([3, 7, 16], 2, 7, 8, 40),
        ([5, 11, 1], 11, 1, 0, 2),
        ([7, 13, 40], 7, 2, 40, 120),
        ([11, 17, 9], 13, 5, 4, 23),
        ([1, 31, 72], 1, 31, 72, 216),
        ([2, 33, 33], 2, 32, 33, 99),
        ([13, 8, 256], 17, 3, 0, 512),
        ([17, 19, 8], 19, 19, 8, 24),
        ([4, 127, 24], 3, 127, 24, 72),
        ([1, 257, 136], 1, 256, 8, 280),
    ];
    for (cache, b, t, at, columns) in shapes {
        let slots: Vec<i32> =
            (0..b).map(|i| if i % 4 == 3 { -1 } else { (i * 5 % cache[0]) as i32 }).collect();
        let place = |i: usize| if i % 13 == 12 { -1 } else { (i % t + i / t) as i32 };
        let positions: Vec<i32> = (0..b * t).map(place).collect();
        let name = format!("{b}x{t} into {cache:?}");
        cases.push(wide(name, at, cache, columns, (&slots, &positions)).large());
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cases::forward,
        device::{CpuDevice, CpuOptions},
    };

    #[test]
    fn used_rows_reach_their_places_and_nothing_else_changes() {
        let append = |g: &mut Graph, x: &[Tensor]| g.cache_append([x[0], x[1]], x[2], x[3], x[4], 1).to_vec();
        let case = Case::new("cache_append", "", append)
            .floats([2, 3, 1], Fill::Values(vec![0.0]))
            .floats([2, 3, 1], Fill::Values(vec![0.5]))
            .floats([3, 2, 3], Fill::Values((1..=18).map(f64::from).collect()))
            .ints([3], &[1, -1, 0])
            .ints([3, 2], &[2, 0, 1, 1, 3, 1]);
        let device = CpuDevice::new(CpuOptions { threads: 2, poison: true }).unwrap();
        let out = forward(&case, DType::Bf16, device).unwrap();
        assert_eq!(out[0].to_f64(), [0.0, 17.0, 0.0, 5.0, 0.0, 2.0]);
        assert_eq!(out[1].to_f64(), [0.5, 18.0, 0.5, 6.0, 0.5, 3.0]);
    }
}
