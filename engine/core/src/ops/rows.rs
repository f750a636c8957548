//! Rows picked out of a table, `y[r] = x[index[r]]`, and put back, `base[index[r]] = src[r]`.
//!
//! An index that is negative or names no row is unused: it picks a row of zeros and puts back nothing.
use super::prelude::*;

#[derive(Debug)]
struct GatherRows;

/// `dx[index[r]] += dy[r]`, in the order of `r`; on top of an accumulator where there is one.
#[derive(Debug)]
struct GatherRowsBwd {
    x: Spec,
    accumulate: bool,
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

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 0, bytes: (2 * outs[0].bytes() + ins[1].bytes()) as u64 }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let Some(dy) = d[0] else { return Ok(vec![Grad::Stop("no gradient arrived"); 2]) };
        let (x, index) = (g.spec(n.ins[0]), n.ins[1]);
        let dx = match g.accumulator(n.ins[0]) {
            Some(sum) => Grad::Into(g.push::<1>(GatherRowsBwd { x, accumulate: true }, &[dy, index, sum])[0]),
            None => Grad::To(g.push::<1>(GatherRowsBwd { x, accumulate: false }, &[dy, index])[0]),
        };
        Ok(vec![dx, Grad::Integer])
    }
}

impl Op for GatherRowsBwd {
    fn name(&self) -> &'static str {
        "gather_rows_bwd"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        Ok(vec![if self.accumulate { ins[2] } else { self.x }])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => {
            let width = ins[0].shape.last();
            let (dy, index, dx) = (T::read(&ins[0]), ins[1].i32(), T::write(&mut outs[0]));
            if !self.accumulate {
                dx.fill(T::ZERO);
            }
            for_named(dx, width, index, #[inline(always)] |dx, r| axpy(dx, T::ONE, &dy[r * width..][..width]));
        });
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        let (dy, dx) = (ins[0], outs[0]);
        let touched = 2 * dy.shape.numel() * dx.dtype.size();
        let cleared = if self.accumulate { 0 } else { dx.bytes() };
        Cost {
            flops: dy.shape.numel() as u64,
            bytes: (dy.bytes() + ins[1].bytes() + touched + cleared) as u64,
        }
    }

    fn memory(&self, _: usize) -> Memory {
        if self.accumulate { Memory::InPlace { input: 2 } } else { Memory::Own }
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
}

pub(super) fn cases() -> Vec<Case> {
    let gather = |name, n: usize, c: usize, index: &[i32]| {
        Case::new("gather_rows", name, |g, x| vec![g.gather_rows(x[0], x[1])])
            .normal([n, c])
            .ints([index.len()], index)
    };
    let scatter = |name, n: usize, c: usize, index: &[i32]| {
        Case::new("scatter_rows", name, |g, x| vec![g.scatter_rows(x[0], x[1], x[2])])
            .normal([n, c])
            .normal([index.len(), c])
            .ints([index.len()], index)
    };
    let repeated: Vec<i32> = (0..611).map(|r| r * r % 293 - 1).collect();
    let permuted: Vec<i32> = (0..293).map(|r| if r % 5 == 0 { -1 } else { r * 31 % 293 }).collect();
    vec![
        gather("repeated and unused", 5, 7, &[4, 0, -1, 4, 5, 4, i32::MIN, i32::MAX, 1]),
        gather("one", 1, 1, &[0]),
        gather("several chunks", 293, 61, &repeated),
        scatter("unused", 7, 5, &[6, -1, 0, 7, i32::MIN]),
        scatter("one", 1, 1, &[0]),
        scatter("several chunks", 293, 61, &permuted),
    ]
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
