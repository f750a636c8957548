//! Rows picked out of a table, `y[r] = x[index[r]]`, and put back, `base[index[r]] = src[r]`.
//!
//! An index that is negative or names no row is unused: it picks a row of zeros and puts back nothing.
use super::{lots, prelude::*};

#[derive(Debug)]
struct GatherRows;

/// `dx[index[r]] += dy[r]`, in the order of `r`; on top of an accumulator where there is one.
#[derive(Debug)]
struct GatherRowsBwd {
    x: Spec,
    sum: Accumulation,
}

#[derive(Debug)]
struct ScatterRows;

/// `dbase`: `dy` with the replaced rows zero.
#[derive(Debug)]
struct ScatterRowsBwd;

impl Graph {
    /// `[R, C]`: the rows of `x [N, C]` that `index` (i32, R elements) names, or zeros where it names
    /// none. Indices may repeat.
    #[track_caller]
    pub fn gather_rows(&mut self, x: Tensor, index: Tensor) -> Tensor {
        self.push::<1>(GatherRows, &[x, index])[0]
    }

    /// `base [N, C]`, in place, with the rows that `index` (i32, R elements) names replaced by those of
    /// `src [R, C]`. Indices name different rows, or none.
    #[track_caller]
    pub fn scatter_rows(&mut self, base: Tensor, src: Tensor, index: Tensor) -> Tensor {
        self.push::<1>(ScatterRows, &[base, src, index])[0]
    }
}

/// Which of `rows` rows an index names, if any.
pub(super) fn named(index: i32, rows: usize) -> Option<usize> {
    usize::try_from(index).ok().filter(|&i| i < rows)
}

/// Calls `f(row of table, r)` for every `index[r]` that names a row. Ranges of the table run in
/// parallel, and each of them goes through the indices in order.
fn for_named<T: Real>(table: &mut [T], width: usize, index: &[i32], f: impl Fn(&mut [T], usize) + Sync) {
    let range = (table.len() / width.max(1)).div_ceil(32).max(8);
    table.par_chunks_mut((range * width).max(1)).enumerate().for_each(|(i, table)| {
        let rows = table.len() / width;
        simd!({
            for (r, &n) in index.iter().enumerate() {
                let here = i64::from(n) - (i * range) as i64;
                if let Some(row) = usize::try_from(here).ok().filter(|&row| row < rows) {
                    f(&mut table[row * width..][..width], r);
                }
            }
        });
    });
}

impl Op for GatherRows {
    fn name(&self) -> &'static str {
        "gather_rows"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [x, index] = operands(ins)?;
        floats(&[x])?;
        integers(index)?;
        Ok(vec![Spec::new([index.shape.numel(), x.shape.last()], x.dtype)])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => {
            let (rows, width) = (ins[0].shape.rows(), ins[0].shape.last());
            let (x, index, y) = (T::read(&ins[0]), ins[1].i32(), T::write(&mut outs[0]));
            let chunk = chunk_rows(width);
            let pieces = y.par_chunks_mut((chunk * width).max(1)).zip(index.par_chunks(chunk));
            pieces.for_each(|(y, index)| {
                for (y, &n) in y.chunks_mut(width).zip(index) {
                    match named(n, rows) {
                        Some(n) => y.copy_from_slice(&x[n * width..][..width]),
                        None => y.fill(T::ZERO),
                    }
                }
            });
        });
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        let (x, y) = (ins[0], outs[0]);
        moved("gather_rows_fwd", [Arg::output(0), Arg::input(0), Arg::input(1)], y.shape.rows(), x, on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 0, bytes: (2 * outs[0].bytes() + ins[1].bytes()) as u64 }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let Some(dy) = d[0] else { return Ok(vec![Grad::Stop("no gradient arrived"); 2]) };
        let (x, index) = (g.spec(n.ins[0]), n.ins[1]);
        let sum = g.accumulation(n.ins[0]);
        let ins: Vec<Tensor> = [dy, index].into_iter().chain(g.accumulator(n.ins[0])).collect();
        let [dx] = g.push(GatherRowsBwd { x, sum }, &ins);
        Ok(vec![sum.grad(dx), Grad::Integer])
    }
}

impl Op for GatherRowsBwd {
    fn name(&self) -> &'static str {
        "gather_rows_bwd"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let dtype = if ins[0].dtype == DType::F64 { DType::F64 } else { self.x.dtype };
        Ok(vec![ins.get(2).copied().unwrap_or(Spec { dtype, ..self.x })])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => {
            let width = ins[0].shape.last();
            let (dy, index, dx) = (T::read(&ins[0]), ins[1].i32(), T::write(&mut outs[0]));
            if !self.sum.is_added() {
                dx.fill(T::ZERO);
            }
            for_named(dx, width, index, #[inline(always)] |dx, r| axpy(dx, T::ONE, &dy[r * width..][..width]));
        });
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], _: &Target) -> Result<Kernels, String> {
        let (dy, dx) = (ins[0], outs[0]);
        let suffix = lots::suffix(dy.dtype, dx.dtype)?;
        if dy.dtype == DType::F32 && dx.dtype == DType::Bf16 {
            return Err("no kernel sums f32 into bf16; cast the gradient".into());
        }
        size(dx.shape.numel())?;
        let (count, rows, width) = (size(dy.shape.rows())?, size(dx.shape.rows())?, size(dx.shape.last())?);
        let args = vec![Arg::scratch(0), Arg::scratch(1), Arg::input(1), Arg::U32(count), Arg::U32(rows)];
        let grid = [rows.div_ceil(lots::THREADS), 1, 1];
        let sort = Launch::kernel("gather_rows_bwd_sort_i32", grid, lots::THREADS, 0, args);
        let operands = [Arg::output(0), Arg::input(0), Arg::scratch(0), Arg::scratch(1)];
        let args =
            operands.into_iter().chain([rows, width, self.sum.is_added().into()].map(Arg::U32)).collect();
        let lot = lots::lot(&[dy.dtype, dx.dtype]);
        let lot = if width.is_multiple_of(lot) { lot } else { 1 };
        let grid = [rows.div_ceil(lots::WARPS), width.div_ceil(32 * lot), 1];
        let (entry, shared) = (format!("gather_rows_bwd_sum_{suffix}"), lots::THREADS * lot * 4);
        let sum = Launch::kernel(entry, grid, lots::THREADS, shared, args);
        Ok(Kernels {
            scratch: vec![(rows as usize + 1) * 4, count.max(1) as usize * 4],
            launches: vec![sort, sum],
        })
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let (dy, dx) = (ins[0], outs[0]);
        // Sums are read and written once, however many rows of dy meet in them.
        let met = dy.shape.numel().min(dx.shape.numel()) * dx.dtype.size();
        let sums = if self.sum.is_added() { 2 * met } else { dx.bytes() };
        Cost { flops: dy.shape.numel() as u64, bytes: (dy.bytes() + ins[1].bytes() + sums) as u64 }
    }

    fn memory(&self, _: usize) -> Memory {
        self.sum.memory(2)
    }
}

impl Op for ScatterRows {
    fn name(&self) -> &'static str {
        "scatter_rows"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [base, src, index] = operands(ins)?;
        floats(&[base, src])?;
        integers(index)?;
        if src.shape.last() != base.shape.last() || src.dtype != base.dtype {
            return Err(format!("rows of {src:?} cannot replace rows of {base:?}"));
        }
        if index.shape.numel() != src.shape.rows() {
            return Err(format!("{index:?} does not give one place to each row of {src:?}"));
        }
        Ok(vec![base])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => {
            let width = ins[1].shape.last();
            let (src, index, y) = (T::read(&ins[1]), ins[2].i32(), T::write(&mut outs[0]));
            for_named(y, width, index, |y, r| y.copy_from_slice(&src[r * width..][..width]));
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        let operands = [Arg::output(0), Arg::input(1), Arg::input(2)];
        moved("scatter_rows_fwd", operands, ins[1].shape.rows(), ins[0], on)
    }

    fn cost(&self, ins: &[Spec], _: &[Spec]) -> Cost {
        Cost { flops: 0, bytes: (2 * ins[1].bytes() + ins[2].bytes()) as u64 }
    }

    fn memory(&self, _: usize) -> Memory {
        Memory::InPlace { input: 0 }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let Some(dy) = d[0] else { return Ok(vec![Grad::Stop("no gradient arrived"); 3]) };
        let [dbase] = g.push(ScatterRowsBwd, &[dy, n.ins[2]]);
        let dsrc = g.gather_rows(dy, n.ins[2]);
        Ok(vec![Grad::To(dbase), Grad::To(dsrc), Grad::Integer])
    }
}

impl Op for ScatterRowsBwd {
    fn name(&self) -> &'static str {
        "scatter_rows_bwd"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [dy, _] = operands(ins)?;
        Ok(vec![dy])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => {
            let width = ins[0].shape.last();
            let (dy, index, dbase) = (T::read(&ins[0]), ins[1].i32(), T::write(&mut outs[0]));
            dbase.copy_from_slice(dy);
            for_named(dbase, width, index, |dbase, _| dbase.fill(T::ZERO));
        });
    }

    fn kernels(&self, ins: &[Spec], _: &[Spec], on: &Target) -> Result<Kernels, String> {
        let (dy, index) = (ins[0], ins[1]);
        let entry = format!("scatter_rows_bwd_{}", lots::suffix(dy.dtype, dy.dtype)?);
        let (rows, width) = (size(dy.shape.rows())?, size(dy.shape.last())?);
        let count = size(index.shape.numel())?;
        let clear = Launch::Fill { what: Operand::Scratch(0), byte: 0 };
        let args = vec![Arg::scratch(0), Arg::input(1), Arg::U32(count), Arg::U32(rows)];
        let grid = [count.div_ceil(lots::THREADS), 1, 1];
        let mark = Launch::kernel("scatter_rows_bwd_mark_i32", grid, lots::THREADS, 0, args);
        let args = vec![Arg::output(0), Arg::input(0), Arg::scratch(0), Arg::U32(rows), Arg::U32(width)];
        let grid = [lots::groups(rows, lots::words(width, dy.dtype), lots::BLOCKS, on), 1, 1];
        let rest = Launch::kernel(entry, grid, lots::THREADS, 0, args);
        Ok(Kernels { scratch: vec![rows as usize * 4], launches: vec![clear, mark, rest] })
    }
}

/// The pass that moves `count` rows out of `table`, or into it.
fn moved(pass: &str, operands: [Arg; 3], count: usize, table: Spec, on: &Target) -> Result<Kernels, String> {
    let entry = format!("{pass}_{}", lots::suffix(table.dtype, table.dtype)?);
    let (count, rows, width) = (size(count)?, size(table.shape.rows())?, size(table.shape.last())?);
    let args = operands.into_iter().chain([count, rows, width].map(Arg::U32)).collect();
    let grid = [lots::groups(count, lots::words(width, table.dtype), lots::BLOCKS, on), 1, 1];
    Ok(lots::single(Launch::kernel(entry, grid, lots::THREADS, 0, args)))
}

pub(super) fn cases() -> Vec<Case> {
    let gather = |name: String, n: usize, c: usize, index: &[i32]| {
        Case::new("gather_rows", name, |g, x| vec![g.gather_rows(x[0], x[1])])
            .normal([n, c])
            .ints([index.len()], index)
    };
    let scatter = |name: String, n: usize, c: usize, index: &[i32]| {
        Case::new("scatter_rows", name, |g, x| vec![g.scatter_rows(x[0], x[1], x[2])])
            .normal([n, c])
            .normal([index.len(), c])
            .ints([index.len()], index)
    };
    let repeated: Vec<i32> = (0..611).map(|r| r * r % 293 - 1).collect();
    let permuted: Vec<i32> = (0..293).map(|r| if r % 5 == 0 { -1 } else { r * 31 % 293 }).collect();
    let small = [
        gather("repeated and unused".into(), 5, 7, &[4, 0, -1, 4, 5, 4, i32::MIN, i32::MAX, 1]),
        gather("one".into(), 1, 1, &[0]),
        gather("several chunks".into(), 293, 61, &repeated),
        scatter("unused".into(), 7, 5, &[6, -1, 0, 7, i32::MIN]),
        scatter("one".into(), 1, 1, &[0]),
        scatter("several chunks".into(), 293, 61, &permuted),
    ];
    // Rows of the table, columns, rows that are picked or put back: every way to move a row, more rows than a block
    // sorts, lists that one warp adds and lists that a block adds, and grids that wrap.
    let shapes = [
        (1, 8, 1),
        (2, 8, 3),
        (3, 16, 5),
        (5, 24, 2),
        (7, 32, 11),
        (11, 40, 13),
        (13, 9, 17),
        (17, 64, 19),
        (19, 72, 300),
        (23, 96, 29),
        (29, 128, 31),
        (31, 7, 37),
        (37, 136, 41),
        (41, 248, 43),
        (43, 256, 47),
        (47, 264, 53),
        (53, 512, 59),
        (59, 520, 61),
        (61, 33, 67),
        (67, 1032, 71),
        (255, 8, 256),
        (256, 16, 1024),
        (257, 24, 1025),
        (521, 8, 2053),
        (1031, 48, 509),
        (2, 56, 1500),
        (9001, 8, 4513),
        (4513, 264, 9001),
    ];
    let large = shapes.into_iter().flat_map(|(n, c, r)| {
        // Every fifth is unused; a third of the others name one row.
        let place = |i: usize| match (i % 5, i % 3) {
            (0, _) => [-1, n as i32, i32::MIN, i32::MAX][i / 5 % 4],
            (_, 0) => (n / 2) as i32,
            _ => (i * 7919 % n) as i32,
        };
        let places: Vec<i32> = (0..r).map(place).collect();
        // 7919 is a prime that divides no n.
        let own = |i: usize| if i.is_multiple_of(5) || i >= n { -1 } else { (i * 7919 % n) as i32 };
        let own: Vec<i32> = (0..r).map(own).collect();
        [
            gather(format!("{r} of {n}x{c}"), n, c, &places).large(),
            scatter(format!("{r} into {n}x{c}"), n, c, &own).large(),
        ]
    });
    let sums = [(37, 136, 301), (300, 41, 777), (3, 64, 611)].map(|(n, c, r)| {
        let index: Vec<i32> = (0..r).map(|i| i * i % (n + 1) - 1).collect();
        gather(format!("{r} of {n}x{c}, accumulated"), n as usize, c, &index).accumulating().large()
    });
    let begun = [(37, 136, 301), (300, 41, 777)].map(|(n, c, r)| {
        let index: Vec<i32> = (0..r).map(|i| i * i % (n + 1) - 1).collect();
        gather(format!("{r} of {n}x{c}, sums begin"), n as usize, c, &index).beginning().large()
    });
    let narrow: Vec<i32> = (0..301).map(|i| i * i % 38 - 1).collect();
    let narrow = gather("sums in bf16".into(), 37, 136, &narrow).accumulating_in(DType::Bf16);
    small.into_iter().chain(large).chain(sums).chain(begun).chain([narrow]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::forward_backward;
    use crate::device::{CpuDevice, CpuOptions};

    #[test]
    fn indices_that_name_no_row_pick_zeros_and_put_back_nothing() {
        let run = |case: &Case| {
            let device = CpuDevice::new(CpuOptions { threads: 2, poison: true }).unwrap();
            forward_backward(case, DType::F32, device).unwrap().iter().map(|h| h.to_f64()).collect::<Vec<_>>()
        };
        let numbers = || Fill::Values((1..=4).map(f64::from).collect());
        let gather = Case::new("gather_rows", "", |g, x| vec![g.gather_rows(x[0], x[1])]);
        let results = run(&gather.floats([2, 2], numbers()).ints([4], &[1, -1, 2, 1]));
        assert_eq!(results[0], [3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0]);
        assert_eq!(results[1][..2], [0.0, 0.0]);
        let scatter = Case::new("scatter_rows", "", |g, x| vec![g.scatter_rows(x[0], x[1], x[2])]);
        let zeros = Fill::Values(vec![0.0]);
        let results = run(&scatter.floats([2, 2], zeros).floats([2, 2], numbers()).ints([2], &[-1, 0]));
        assert_eq!(results[0], [3.0, 4.0, 0.0, 0.0]);
        assert_eq!(results[2][..2], [0.0, 0.0]);
    }
}
