//! `y = a + scale b`, where `b` may be repeated.
use super::{lots, prelude::*};

/// How the rows of `b` meet the rows of `a`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// One to one.
    None,
    /// Row `n` of `a` meets row `n / count` of `b`: one row for each group of `count`.
    Each(usize),
    /// Row `n` of `a` meets row `n % rows(b)` of `b`: the same block again and again.
    Tile,
}

impl Repeat {
    fn row(self, n: usize, rows: usize) -> usize {
        match self {
            Repeat::None => n,
            Repeat::Each(count) => n / count,
            Repeat::Tile => n % rows,
        }
    }

    /// Rows that `b` must have.
    fn accepts(self, a: usize, b: usize) -> bool {
        match self {
            Repeat::None => a == b,
            Repeat::Each(count) => count > 0 && b * count == a,
            Repeat::Tile => b > 0 && a.is_multiple_of(b),
        }
    }
}

#[derive(Debug)]
struct Add {
    scale: f32,
    repeat: Repeat,
    in_place: bool,
}

impl Graph {
    /// `a + b`.
    #[track_caller]
    pub fn add(&mut self, a: Tensor, b: Tensor) -> Tensor {
        self.add_scaled(a, b, 1.0, Repeat::None)
    }

    /// `a + scale b`; `a [N, C]`, `b` with as many rows as `repeat` says.
    #[track_caller]
    pub fn add_scaled(&mut self, a: Tensor, b: Tensor, scale: f32, repeat: Repeat) -> Tensor {
        self.push::<1>(Add { scale, repeat, in_place: false }, &[a, b])[0]
    }

    /// `sum += b`, in place: the new version of `sum`, which may be of a wider float type than `b`.
    #[track_caller]
    pub fn add_into(&mut self, sum: Tensor, b: Tensor) -> Tensor {
        self.push::<1>(Add { scale: 1.0, repeat: Repeat::None, in_place: true }, &[sum, b])[0]
    }
}

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [a, b] = operands(ins)?;
        floats(ins)?;
        if a.shape.last() != b.shape.last() || !self.repeat.accepts(a.shape.rows(), b.shape.rows()) {
            return Err(format!("{b:?} cannot be added to {a:?} with {:?}", self.repeat));
        }
        Ok(vec![a])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => self.run::<T>(&ins[0], &ins[1], &mut outs[0]));
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        let (a, b) = (ins[0], ins[1]);
        let entry = format!("add_fwd_{}", lots::suffix(b.dtype, a.dtype)?);
        let (count, width) = (size(outs[0].shape.numel())?, a.shape.last());
        // Element i meets element i / outer inner + i % inner of b.
        let (outer, inner) = match self.repeat {
            Repeat::None => (0, 0),
            Repeat::Each(group) => (size(group * width)?, size(width)?),
            Repeat::Tile => (u32::MAX - 15, size(b.shape.numel())?),
        };
        let sizes = [count, outer, inner].map(Arg::U32);
        let args = [Arg::output(0), Arg::input(0), Arg::input(1)].into_iter().chain(sizes);
        let args = args.chain([Arg::F32(self.scale)]).collect();
        Ok(lots::single(lots::over(entry, count, lots::lot(&[a.dtype, b.dtype]), on, args)))
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 2 * outs[0].shape.numel() as u64, bytes: traffic(ins, outs) }
    }

    fn memory(&self, _: usize) -> Memory {
        if self.in_place { Memory::InPlace { input: 0 } } else { Memory::Own }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let Some(dy) = d[0] else { return Ok(vec![Grad::Stop("no gradient arrived"); 2]) };
        let (scale, repeat) = (self.scale, self.repeat);
        let db = if scale == 1.0 && repeat == Repeat::None {
            dy
        } else {
            let b = g.spec(n.ins[1]);
            g.push::<1>(AddBwd { scale, repeat, b }, &[dy])[0]
        };
        Ok(vec![Grad::To(dy), Grad::To(db)])
    }
}

impl Add {
    fn run<T: Real>(&self, a: &In<'_>, b: &In<'_>, y: &mut Out<'_>) {
        let (width, rows, scale) = (y.shape.last(), b.shape.rows(), T::of(f64::from(self.scale)));
        let (a, b, y) = (T::read(a), T::read(b), T::write(y));
        let chunk = chunk_rows(width);
        y.par_chunks_mut(chunk * width).enumerate().for_each(|(i, y)| {
            simd!({
                if !self.in_place {
                    y.copy_from_slice(&a[i * chunk * width..][..y.len()]);
                }
                for (r, y) in y.chunks_mut(width).enumerate() {
                    let n = self.repeat.row(i * chunk + r, rows);
                    axpy(y, scale, &b[n * width..][..width]);
                }
            });
        });
    }
}

/// `db = scale * (sum of the rows of dy that met each row of b)`.
#[derive(Debug)]
struct AddBwd {
    scale: f32,
    repeat: Repeat,
    b: Spec,
}

/// The gradient of a bias that was added to every row: the sum of the rows of `dy`.
#[track_caller]
pub(super) fn column_sum(g: &mut Graph, dy: Tensor, bias: Tensor) -> Tensor {
    let b = g.spec(bias);
    g.push::<1>(AddBwd { scale: 1.0, repeat: Repeat::Tile, b }, &[dy])[0]
}

impl Op for AddBwd {
    fn name(&self) -> &'static str {
        "add_bwd"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [dy] = operands(ins)?;
        let dtype = if dy.dtype == DType::F64 { DType::F64 } else { self.b.dtype };
        Ok(vec![Spec { dtype, ..self.b }])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => self.run::<T>(&ins[0], &mut outs[0]));
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        let (dy, db) = (ins[0], outs[0]);
        let suffix = lots::suffix(dy.dtype, db.dtype)?;
        let (rows, width) = (db.shape.rows(), size(db.shape.last())?);
        let (groups, met, width) = match self.repeat {
            Repeat::None => {
                let count = size(db.shape.numel())?;
                let args = vec![Arg::output(0), Arg::input(0), Arg::U32(count), Arg::F32(self.scale)];
                let (entry, lot) = (format!("add_bwd_scale_{suffix}"), lots::lot(&[dy.dtype, db.dtype]));
                return Ok(lots::single(lots::over(entry, count, lot, on, args)));
            }
            Repeat::Each(group) => (size(rows)?, size(group)?, width),
            Repeat::Tile => (1, size(dy.shape.rows() / rows.max(1))?, size(db.shape.numel())?),
        };
        column_sums(dy.dtype, db.dtype, [groups, met, width], self.scale, on)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 2 * ins[0].shape.numel() as u64, bytes: traffic(ins, outs) }
    }
}

/// Rows that a block sums at least, so that its part of the sum counts little beside them.
const PART_ROWS: u32 = 128;
/// Blocks of the pass over the rows for each SM.
const PART_BLOCKS: u32 = 4;

/// The sums of the columns of `groups` matrices of `rows` rows.
fn column_sums(
    from: DType,
    to: DType,
    extents: [u32; 3],
    scale: f32,
    on: &Target,
) -> Result<Kernels, String> {
    let [groups, rows, width] = extents;
    let lot = if width.is_multiple_of(lots::lot(&[from])) { lots::lot(&[from]) } else { 1 };
    let columns = groups * width.div_ceil(32 * lot);
    let parts = (on.sms * PART_BLOCKS / columns.max(1)).clamp(1, rows.div_ceil(PART_ROWS).max(1));
    let pass = |entry, result, scale: Option<f32>| {
        let args = [result, Arg::input(0)].into_iter().chain(extents.map(Arg::U32));
        let args = args.chain(scale.map(Arg::F32)).collect();
        Launch::kernel(entry, [columns, parts, 1], lots::THREADS, lots::THREADS * (lot + 1) * 4, args)
    };
    if parts == 1 {
        let entry = format!("add_bwd_columns_{}", lots::suffix(from, to)?);
        return Ok(lots::single(pass(entry, Arg::output(0), Some(scale))));
    }
    let begin = pass(format!("add_bwd_parts_{}", from.name()), Arg::scratch(0), None);
    let all = groups * width;
    let args = vec![Arg::output(0), Arg::scratch(0), Arg::U32(parts), Arg::U32(all), Arg::F32(scale)];
    let entry = format!("add_bwd_sum_{}", to.name());
    let finish = Launch::kernel(entry, [all.div_ceil(32), 1, 1], lots::THREADS, 0, args);
    Ok(Kernels { scratch: vec![parts as usize * all as usize * 4], launches: vec![begin, finish] })
}

impl AddBwd {
    fn run<T: Real>(&self, dy: &In<'_>, db: &mut Out<'_>) {
        let (width, n, rows) = (db.shape.last(), dy.shape.rows(), db.shape.rows());
        let (dy, db, scale) = (T::read(dy), T::write(db), T::of(f64::from(self.scale)));
        db.par_chunks_mut(width).enumerate().for_each(|(row, db)| {
            db.fill(T::ZERO);
            let mut gather = |n: usize| simd!(axpy(db, scale, &dy[n * width..][..width]));
            match self.repeat {
                Repeat::None => gather(row),
                Repeat::Each(count) => (row * count..(row + 1) * count).for_each(gather),
                Repeat::Tile => (row..n).step_by(rows).for_each(gather),
            }
        });
    }
}

/// A residual, a bias and an accumulator of the 1.4B model.
pub(super) fn speed_cases() -> Vec<Case> {
    let (n, c) = (16_384, 2048);
    let residual = |g: &mut Graph, x: &[Tensor]| vec![g.add(x[0], x[1])];
    let bias = |g: &mut Graph, x: &[Tensor]| vec![g.add_scaled(x[0], x[1], 1.0, Repeat::Tile)];
    let sum = |g: &mut Graph, x: &[Tensor]| vec![g.add_into(x[0], x[1])];
    vec![
        Case::new("add", "residual", residual).normal([n, c]).normal([n, c]).large(),
        Case::new("add", "bias", bias).normal([n, c]).normal([1, c]).large(),
        Case::new("add", "into f32", sum).single([n, c], Fill::Normal(1.0)).normal([n, c]).large(),
    ]
}

pub(super) fn cases() -> Vec<Case> {
    let repeated = |name: &str, a: [usize; 2], b: [usize; 2], scale: f32, repeat: Repeat| {
        Case::new("add", name, move |g, x| vec![g.add_scaled(x[0], x[1], scale, repeat)]).normal(a).normal(b)
    };
    let in_place = |n: usize, c: usize| {
        let build = |g: &mut Graph, x: &[Tensor]| vec![g.add_into(x[0], x[1])];
        Case::new("add", format!("in place, {n}x{c}"), build).normal([n, c]).normal([n, c])
    };
    // One operand is f32 whatever is stored otherwise.
    let mixed = |a: [usize; 2], b: [usize; 2], repeat: Repeat, wide: bool| {
        let build = move |g: &mut Graph, x: &[Tensor]| vec![g.add_scaled(x[0], x[1], 0.75, repeat)];
        let name = format!("{}x{}, {repeat:?}, wide operand {wide}", a[0], a[1]);
        let one = |case: Case, shape: [usize; 2], wide: bool| match wide {
            true => case.single(shape, Fill::Normal(1.0)),
            false => case.normal(shape),
        };
        one(one(Case::new("add", name, build), a, wide), b, !wide)
    };
    let mut cases = vec![
        repeated("7x13", [7, 13], [7, 13], 1.0, Repeat::None),
        repeated("scaled scalar", [1, 1], [1, 1], 5.0, Repeat::None),
        repeated("each row for 4", [12, 5], [3, 5], 1.0, Repeat::Each(4)),
        repeated("tile of 4", [12, 5], [4, 5], -0.5, Repeat::Tile),
        in_place(3, 5),
        mixed([3, 7], [3, 7], Repeat::None, true),
        mixed([3, 7], [3, 7], Repeat::None, false),
    ];
    // Lengths that leave a rest of every kind, that fill the grid of a machine, and that wrap it.
    for (n, c) in [(1, 8), (5, 9), (17, 24), (31, 67), (257, 264), (1021, 512)] {
        cases.push(repeated(&format!("{n}x{c}"), [n, c], [n, c], 1.0, Repeat::None).large());
        cases.push(in_place(n, c).large());
    }
    cases.push(repeated("2207x1031", [2207, 1031], [2207, 1031], -2.0, Repeat::None).large());
    for (n, c, wide) in [(29, 40, true), (29, 40, false), (41, 17, true)] {
        cases.push(mixed([n, c], [n, c], Repeat::None, wide).large());
    }
    for (n, wide) in [(35, true), (35, false), (1290, true), (1290, false)] {
        cases.push(mixed([n, 24], [5, 24], Repeat::Each(n / 5), wide).large());
    }
    // Rows of b, times that each is met, columns: sums within one block, over parts, and over groups.
    for (rows, times, c) in [
        (1, 7, 8),
        (1, 131, 24),
        (3, 5, 16),
        (1, 1031, 256),
        (1, 389, 77),
        (7, 129, 264),
        (13, 3, 520),
        (61, 67, 5),
    ] {
        let (a, b) = ([rows * times, c], [rows, c]);
        let each = format!("{rows}x{c}, each {times} times");
        cases.push(repeated(&each, a, b, 1.5, Repeat::Each(times)).large());
        cases.push(repeated(&format!("{rows}x{c}, tiled {times} times"), a, b, 1.0, Repeat::Tile).large());
    }
    // And each way in turn: columns that are no whole lots or blocks of them, rows around those of a part.
    for (i, (rows, times, c)) in [
        (1, 2, 1),
        (2, 2, 8),
        (2, 3, 7),
        (57, 16, 192),
        (3, 31, 32),
        (5, 64, 40),
        (11, 17, 48),
        (1, 127, 264),
        (1, 128, 136),
        (1, 129, 128),
        (1, 257, 65),
        (4, 31, 56),
        (9, 11, 13),
        (17, 2, 256),
        (23, 8, 17),
        (29, 4, 72),
        (31, 9, 33),
        (37, 3, 120),
        (1, 521, 520),
        (2, 300, 260),
    ]
    .into_iter()
    .enumerate()
    {
        let repeat = if i % 2 == 0 { Repeat::Tile } else { Repeat::Each(times) };
        let name = format!("{rows}x{c}, {repeat:?}");
        cases.push(repeated(&name, [rows * times, c], [rows, c], 1.25, repeat).large());
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Grid of the pass over the rows.
    fn grid(dy: [usize; 2], b: [usize; 2], repeat: Repeat) -> [u32; 3] {
        let op = AddBwd { scale: 1.0, repeat, b: Spec::new(b, DType::Bf16) };
        let ins = [Spec::new(dy, DType::Bf16)];
        let kernels = op.kernels(&ins, &op.infer(&ins).unwrap(), &Target::H200).unwrap();
        match &kernels.launches[0] {
            Launch::Kernel { grid, .. } => *grid,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn long_columns_are_cut_into_parts_of_enough_rows() {
        assert_eq!(grid([16_384, 2048], [1, 2048], Repeat::Tile), [8, 66, 1]);
        assert_eq!(grid([512, 2048], [1, 2048], Repeat::Tile), [8, 4, 1]);
        assert_eq!(grid([64 * 256, 1024], [64, 1024], Repeat::Each(256)), [256, 2, 1]);
        assert_eq!(grid([16_384, 13], [1, 13], Repeat::Tile), [1, 128, 1]);
    }

    #[test]
    fn integers_and_f64_have_no_kernel() {
        let spec = Spec::new([3, 4], DType::F64);
        let op = Add { scale: 1.0, repeat: Repeat::None, in_place: false };
        assert!(op.kernels(&[spec, spec], &[spec], &Target::H200).unwrap_err().contains("CPU device"));
    }
}
