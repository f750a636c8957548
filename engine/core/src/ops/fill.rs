//! `y = value` everywhere.
use super::{lots, prelude::*};

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

    fn kernels(&self, _: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        let dtype = self.spec.dtype;
        let bytes = match dtype {
            DType::F32 => self.value.to_ne_bytes().to_vec(),
            DType::Bf16 => half::bf16::from_f32(self.value).to_ne_bytes().to_vec(),
            DType::I32 => (self.value as i32).to_ne_bytes().to_vec(),
            DType::U8 => vec![self.value as u8],
            DType::F64 => return Err("no kernel fills f64; use f32, or the CPU device".into()),
        };
        if bytes.iter().all(|b| *b == bytes[0]) {
            return Ok(lots::single(Launch::Fill { what: Operand::Out(0), byte: bytes[0] }));
        }
        let count = size(outs[0].shape.numel())?;
        let args = vec![Arg::output(0), Arg::U32(count), Arg::F32(self.value)];
        Ok(lots::single(lots::over(
            format!("fill_fwd_{}", dtype.name()),
            count,
            lots::lot(&[dtype]),
            on,
            args,
        )))
    }

    fn adjoint(&self, _: &mut Graph, _: &Node, _: &[Option<Tensor>]) -> crate::Result<Vec<Grad>> {
        Ok(vec![])
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case = |value: f32, n: usize, c: usize, dtype: DType| {
        let build = move |g: &mut Graph, _: &[Tensor]| vec![g.fill(value, [n, c], dtype)];
        let name = format!("{n}x{c} of {} {value}", dtype.name());
        let case = Case::new("fill", name, build).without_gradient();
        if n * c > 15 { case.large() } else { case }
    };
    let sizes =
        [(3, 5), (1, 1), (1, 7), (1, 8), (5, 9), (31, 33), (64, 64), (127, 61), (509, 257), (2207, 1031)];
    let floats = [DType::F32, DType::Bf16, DType::I32];
    // Around a lot, a warp's lots and a block's, and beyond a small machine's grid.
    let more = [
        (2, 3),
        (1, 9),
        (1, 15),
        (1, 16),
        (1, 17),
        (3, 11),
        (7, 7),
        (13, 13),
        (17, 8),
        (19, 24),
        (23, 1),
        (29, 31),
        (1, 2047),
        (1, 2048),
        (1, 2049),
        (37, 128),
        (61, 67),
        (97, 101),
        (131, 264),
        (257, 255),
        (1021, 33),
    ];
    let patterns =
        sizes.into_iter().chain(more).flat_map(|(n, c)| floats.map(|dtype| case(-2.375, n, c, dtype)));
    // The same byte everywhere.
    let bytes =
        [(0.0, DType::F32), (0.0, DType::Bf16), (-1.0, DType::I32), (7.0, DType::U8), (0.0, DType::I32)];
    patterns.chain(bytes.map(|(value, dtype)| case(value, 13, 5, dtype))).collect()
}
