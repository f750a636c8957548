//! `y = a + scale b`, where `b` may be repeated.
use super::prelude::*;

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
        let [_] = operands(ins)?;
        Ok(vec![self.b])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        real!(outs[0], T => self.run::<T>(&ins[0], &mut outs[0]));
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 2 * ins[0].shape.numel() as u64, bytes: traffic(ins, outs) }
    }
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

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("add", "7x13", |g, x| vec![g.add(x[0], x[1])]).normal([7, 13]).normal([7, 13]),
        Case::new("add", "scaled scalar", |g, x| vec![g.add_scaled(x[0], x[1], 5.0, Repeat::None)])
            .normal([1])
            .normal([1]),
        Case::new("add", "each row for 4", |g, x| vec![g.add_scaled(x[0], x[1], 1.0, Repeat::Each(4))])
            .normal([12, 5])
            .normal([3, 5]),
        Case::new("add", "tile of 4", |g, x| vec![g.add_scaled(x[0], x[1], -0.5, Repeat::Tile)])
            .normal([12, 5])
            .normal([4, 5]),
        Case::new("add", "in place", |g, x| vec![g.add_into(x[0], x[1])]).normal([3, 5]).normal([3, 5]),
    ]
}
