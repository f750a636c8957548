//! How floats are stored, and what their products are done in.
use transfusion::config::ModelConfig;
use transfusion_core::{
    cpu::Precision,
    op::Op,
    tensor::{DType, Spec},
};

/// How floats are stored, and what their products are done in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Floats {
    /// What weights and activations are stored as.
    pub stored: DType,
    /// Whether factors of products are bf16.
    pub narrow: bool,
}

impl Floats {
    /// Those of a model: a CPU rounds factors where the model allows it, a GPU has what is stored.
    pub fn of(config: &ModelConfig, on_cpu: bool) -> Floats {
        let stored = config.dtype();
        Floats::at(stored, config.precision(stored), on_cpu)
    }

    /// Those of products of so many rows in such a model.
    pub fn of_rows(config: &ModelConfig, rows: usize, on_cpu: bool) -> Floats {
        let stored = config.dtype();
        Floats::at(stored, config.precision(stored).of_rows(rows), on_cpu)
    }

    /// Those of an op of such a model, on operands of these types.
    pub fn of_op(self, op: &dyn Op, ins: &[Spec], on_cpu: bool) -> Floats {
        Floats::at(self.stored, op.precision(ins), on_cpu)
    }

    /// Those of a class of the other side's variants: `f32`, `medium`, `bf16`.
    pub fn of_class(name: &str) -> Floats {
        let stored = if name == "bf16" { DType::Bf16 } else { DType::F32 };
        Floats { stored, narrow: name != "f32" }
    }

    fn at(stored: DType, allowed: Precision, on_cpu: bool) -> Floats {
        Floats { stored, narrow: if on_cpu { allowed.rounds() } else { stored == DType::Bf16 } }
    }

    /// Whether factors are rounded that are stored in f32.
    pub fn rounded(self) -> bool {
        self.narrow && self.stored == DType::F32
    }

    /// The name of what factors of products are.
    pub fn factors(self) -> &'static str {
        if self.narrow { "bf16" } else { "f32" }
    }
}

/// How far apart the same computation may come out on two sides that do it in another order, relative, by the coarser
/// of both.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// In f32.
    pub f32: f64,
    /// With the factors of products rounded to bf16.
    pub rounded: f64,
    /// With floats stored in bf16.
    pub bf16: f64,
}

impl Tolerance {
    /// Of two sides that compute like this.
    pub fn of(self, sides: [Floats; 2]) -> f64 {
        let one = |side: Floats| match side {
            Floats { stored: DType::Bf16, .. } => self.bf16,
            Floats { narrow: true, .. } => self.rounded,
            _ => self.f32,
        };
        one(sides[0]).max(one(sides[1]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use transfusion::config::MatmulPrecision;
    use transfusion_core::{graph::Graph, ops::Epilogue};

    #[test]
    fn factors_are_rounded_where_the_model_allows_it_and_the_processor_is_faster() {
        let mut config = ModelConfig::preset("tiny").unwrap();
        let rounds = Precision::Bf16.rounds();
        assert!(!Floats::of(&config, false).narrow, "no GPU rounds what is stored in f32");
        assert_eq!(Floats::of(&config, true).rounded(), rounds);
        config.transfusion.as_mut().unwrap().matmul_precision = MatmulPrecision::Float32;
        assert!(!Floats::of(&config, true).narrow);
        config.torch_dtype = "bfloat16".into();
        assert!(Floats::of(&config, false).narrow && !Floats::of(&config, false).rounded());
        assert_eq!(Floats::of(&config, true).narrow, rounds);
    }

    #[test]
    fn products_of_few_rows_are_not_rounded_and_attention_is_not() {
        let mut g = Graph::new();
        g.precision = Precision::Bf16;
        let (w, all) = (g.input("w", [8, 8], DType::F32), Floats { stored: DType::F32, narrow: true });
        for (rows, may) in [(4, false), (5, true)] {
            let x = g.input(&format!("x{rows}"), [rows, 8], DType::F32);
            g.linear(x, w, Epilogue::default());
            let (node, specs) = (g.nodes().last().unwrap(), [g.spec(x), g.spec(w)]);
            let own = all.of_op(node.op.as_ref(), &specs, true);
            assert_eq!(own.narrow, may && Precision::Bf16.rounds(), "{rows} rows");
            let tiny = ModelConfig::preset("tiny").unwrap();
            assert_eq!(Floats::of_rows(&tiny, rows, true), own, "{rows} rows");
        }
        let x = g.input("x", [8, 8], DType::F32);
        g.add(x, w);
        assert!(!all.of_op(g.nodes().last().unwrap().op.as_ref(), &[g.spec(x), g.spec(w)], true).narrow);
    }

    #[test]
    fn the_coarser_side_decides() {
        let t = Tolerance { f32: 1.0, rounded: 2.0, bf16: 3.0 };
        let [plain, rounded] = [false, true].map(|narrow| Floats { stored: DType::F32, narrow });
        let stored = Floats { stored: DType::Bf16, narrow: true };
        assert_eq!([t.of([plain, plain]), t.of([rounded, plain]), t.of([plain, stored])], [1.0, 2.0, 3.0]);
    }
}
