//! `y = value` everywhere.
use super::prelude::*;

#[derive(Debug)]
struct Fill {
    value: f32,
    spec: Spec,
}

impl Graph {
    /// A tensor whose elements are all `value`.
    #[track_caller]
    pub fn fill(&mut self, value: f32, shape: impl Into<Shape>, dtype: DType) -> Tensor {
        self.push::<1>(Fill { value, spec: Spec::new(shape, dtype) }, &[])[0]
    }
}

impl Op for Fill {
    fn name(&self) -> &'static str {
        "fill"
    }

    fn infer(&self, _: &[Spec]) -> Result<Vec<Spec>, String> {
        Ok(vec![self.spec])
    }

    fn eval(&self, _: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        match &mut outs[0].data {
            ViewMut::I32(y) => y.fill(self.value as i32),
            ViewMut::U8(y) => y.fill(self.value as u8),
            _ => real!(outs[0], T => T::write(&mut outs[0]).fill(T::of(f64::from(self.value)))),
        }
    }

    fn adjoint(&self, _: &mut Graph, _: &Node, _: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        Ok(vec![])
    }
}

pub(super) fn cases() -> Vec<Case> {
    let build = |g: &mut Graph, _: &[Tensor]| vec![g.fill(0.375, [3, 5], DType::F32)];
    vec![Case::new("fill", "3x5", build).without_gradient()]
}
