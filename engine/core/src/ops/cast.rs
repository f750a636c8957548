//! The same numbers in another float type, or in memory of their own; and the same memory under
//! another shape.
use super::{lots, prelude::*};

#[derive(Debug)]
struct Cast {
    to: DType,
    /// Whether its place is that of the second operand.
    over: bool,
}

#[derive(Debug)]
struct Reshape {
    to: Shape,
}

impl Graph {
    /// `x` as floats of type `to`, rounded to nearest; a copy where it has that type.
    #[track_caller]
    pub fn cast(&mut self, x: Tensor, to: DType) -> Tensor {
        self.push::<1>(Cast { to, over: false }, &[x])[0]
    }

    /// `place = x`, in place, whatever was there: the new version of `place`, which may be of another float type than
    /// `x` and fold its elements otherwise.
    #[track_caller]
    pub fn store_into(&mut self, place: Tensor, x: Tensor) -> Tensor {
        let to = self.spec(place).dtype;
        self.push::<1>(Cast { to, over: true }, &[x, place])[0]
    }

    /// The same elements under another shape; nothing moves.
    #[track_caller]
    pub fn reshape(&mut self, x: Tensor, to: impl Into<Shape>) -> Tensor {
        self.push::<1>(Reshape { to: to.into() }, &[x])[0]
    }
}

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        floats(ins)?;
        if !self.over {
            let [x] = operands(ins)?;
            floats(&[Spec::new(x.shape, self.to)])?;
            return Ok(vec![Spec::new(x.shape, self.to)]);
        }
        let [x, place] = operands(ins)?;
        match x.shape.numel() == place.shape.numel() {
            true => Ok(vec![place]),
            false => Err(format!("{x:?} does not fit the place of {place:?}")),
        }
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        match (ins[0].data, &mut outs[0].data) {
            (View::F32(x), ViewMut::F32(y)) => y.copy_from_slice(x),
            (View::F64(x), ViewMut::F64(y)) => y.copy_from_slice(x),
            (View::F32(x), ViewMut::F64(y)) => y.iter_mut().zip(x).for_each(|(y, x)| *y = f64::from(*x)),
            (View::F64(x), ViewMut::F32(y)) => y.iter_mut().zip(x).for_each(|(y, x)| *y = *x as f32),
            _ => {}
        }
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        let (x, y) = (ins[0], outs[0]);
        let suffix = lots::suffix(x.dtype, y.dtype)?;
        if x.dtype == y.dtype {
            return Ok(lots::single(Launch::Copy { from: Operand::In(0), to: Operand::Out(0) }));
        }
        let count = size(x.shape.numel())?;
        let args = vec![Arg::output(0), Arg::input(0), Arg::U32(count)];
        let lot = lots::lot(&[x.dtype, y.dtype]);
        Ok(lots::single(lots::over(format!("cast_fwd_{suffix}"), count, lot, on, args)))
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 0, bytes: traffic(&ins[..1], outs) }
    }

    fn memory(&self, _: usize) -> Memory {
        if self.over { Memory::Over { input: 1 } } else { Memory::Own }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let Some(dy) = d[0] else { return Ok(vec![Grad::Stop("no gradient arrived"); n.ins.len()]) };
        let x = g.spec(n.ins[0]);
        let dx = if x.dtype == self.to { dy } else { g.cast(dy, x.dtype) };
        let dx = if g.spec(dx).shape == x.shape { dx } else { g.reshape(dx, x.shape) };
        let before = self.over.then_some(Grad::Stop("what was there is not read"));
        Ok([Grad::To(dx)].into_iter().chain(before).collect())
    }
}

impl Op for Reshape {
    fn name(&self) -> &'static str {
        "reshape"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        let [x] = operands(ins)?;
        if x.shape.numel() != self.to.numel() {
            return Err(format!(
                "{x:?} has {} elements, {:?} has {}",
                x.shape.numel(),
                self.to,
                self.to.numel()
            ));
        }
        Ok(vec![Spec::new(self.to, x.dtype)])
    }

    fn eval(&self, _: &[In<'_>], _: &mut [Out<'_>], _: &Cpu) {}

    fn cost(&self, _: &[Spec], _: &[Spec]) -> Cost {
        Cost::default()
    }

    fn memory(&self, _: usize) -> Memory {
        Memory::View { input: 0, offset: 0 }
    }

    fn adjoint(&self, g: &mut Graph, n: &Node, d: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        let from = g.spec(n.ins[0]).shape;
        let stop = Grad::Stop("no gradient arrived");
        Ok(vec![d[0].map_or(stop, |dy| Grad::To(g.reshape(dy, from)))])
    }
}

pub(super) fn cases() -> Vec<Case> {
    let copy = |n: usize, c: usize| {
        let build = |g: &mut Graph, x: &[Tensor]| vec![g.cast(x[0], g.spec(x[0]).dtype)];
        Case::new("cast", format!("copy of {n}x{c}"), build).normal([n, c])
    };
    // There and back, which every gradient goes the other way.
    let widened = |n: usize, c: usize| {
        let build = |g: &mut Graph, x: &[Tensor]| vec![g.cast(x[0], g.spec(x[0]).dtype.accumulator())];
        Case::new("cast", format!("{n}x{c} to the accumulator type"), build).normal([n, c])
    };
    let sizes =
        [(1, 1), (1, 3), (1, 4), (5, 1), (2, 4), (3, 5), (1, 31), (7, 9), (8, 16), (13, 64), (1, 1023)];
    let more =
        [(1, 1024), (1, 1025), (31, 67), (64, 96), (127, 33), (251, 88), (509, 61), (1021, 257), (3, 8191)];
    let more = more.into_iter().chain([(1201, 768), (2207, 1031)]);
    let more = more.chain([(1, 7), (1, 9), (17, 2), (23, 12), (41, 41), (61, 129), (131, 520)]);
    let sizes = sizes.into_iter().chain(more).map(|(n, c)| widened(n, c).large());
    let stored = |n: usize, c: usize| {
        let build = |g: &mut Graph, x: &[Tensor]| vec![g.store_into(x[0], x[1]), g.store_into(x[2], x[1])];
        let case = Case::new("cast", format!("{n}x{c}, stored over others"), build);
        case.normal([n, c]).normal([n, c]).single([n, c], Fill::Normal(1.0)).without_gradient()
    };
    let mut cases = vec![
        copy(3, 7),
        copy(257, 65).large(),
        widened(3, 7),
        stored(3, 7),
        stored(31, 67).large(),
        Case::new("reshape", "folded", |g, x| {
            let y = g.reshape(x[0], [6, 5]);
            vec![g.add(y, x[1])]
        })
        .normal([2, 3, 5])
        .normal([6, 5]),
    ];
    cases.extend(sizes);
    cases
}
