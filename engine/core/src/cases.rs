//! The case table of every op, and what is checked with it: devices agree, gradients agree with
//! central differences, results do not depend on the number of threads.
use crate::{
    cpu::Precision,
    device::{CpuDevice, CpuOptions, Device, Place},
    error::{Error, Result},
    graph::Graph,
    op::Kind,
    ops,
    plan::Plan,
    random::{Purpose, Stream},
    tensor::{DType, Host, Shape, Spec, Tensor},
};
use std::sync::Arc;

/// What an input of a case holds.
#[derive(Clone, Debug)]
pub enum Fill {
    /// Standard normal numbers times a scale.
    Normal(f64),
    /// Uniform in a range.
    Uniform(f64, f64),
    /// These numbers, repeated.
    Values(Vec<f64>),
}

/// An input of a case.
#[derive(Clone, Debug)]
pub struct CaseInput {
    /// Extents.
    pub shape: Shape,
    /// `None`: the float type under test.
    pub dtype: Option<DType>,
    /// Contents.
    pub fill: Fill,
    /// Whether no gradient flows to it, though it may hold floats.
    pub constant: bool,
}

type Build = Box<dyn Fn(&mut Graph, &[Tensor]) -> Vec<Tensor> + Send + Sync>;

/// One application of an op to inputs of given shapes.
pub struct Case {
    /// Name of the op.
    pub op: &'static str,
    /// What is special about it.
    pub name: String,
    /// Inputs.
    pub inputs: Vec<CaseInput>,
    /// Whether its gradient is checked.
    pub differentiable: bool,
    /// Whether it is there to be compared between devices only: smaller cases check the same formula.
    pub large: bool,
    /// Whether the op meets parameters themselves, so that it adds gradients to their accumulators,
    /// instead of copies.
    pub accumulating: bool,
    /// What gradients are summed in where bf16 is under test, as [`Graph::gradients`].
    pub gradients: Option<DType>,
    /// Whether gradients begin in the accumulators, as [`Graph::begins`].
    pub begins: bool,
    build: Build,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.op, self.name)
    }
}

impl Case {
    /// A differentiable case without inputs yet.
    pub fn new(
        op: &'static str,
        name: impl Into<String>,
        build: impl Fn(&mut Graph, &[Tensor]) -> Vec<Tensor> + Send + Sync + 'static,
    ) -> Case {
        Case {
            op,
            name: name.into(),
            inputs: vec![],
            differentiable: true,
            large: false,
            accumulating: false,
            gradients: None,
            begins: false,
            build: Box::new(build),
        }
    }

    /// Adds a float input of standard normal numbers.
    pub fn normal(self, shape: impl Into<Shape>) -> Case {
        self.floats(shape, Fill::Normal(1.0))
    }

    /// Adds a float input.
    pub fn floats(self, shape: impl Into<Shape>, fill: Fill) -> Case {
        self.with(shape, None, fill, false)
    }

    /// Adds an input that is f32 (f64 in an f64 graph) whatever float type is under test.
    pub fn single(self, shape: impl Into<Shape>, fill: Fill) -> Case {
        self.with(shape, Some(DType::F32), fill, false)
    }

    /// Adds what [`Case::single`] does, but as an input that no gradient flows to.
    pub fn constant(self, shape: impl Into<Shape>, fill: Fill) -> Case {
        self.with(shape, Some(DType::F32), fill, true)
    }

    /// Adds an integer input.
    pub fn ints(self, shape: impl Into<Shape>, values: &[i32]) -> Case {
        let fill = Fill::Values(values.iter().map(|&x| f64::from(x)).collect());
        self.with(shape, Some(DType::I32), fill, true)
    }

    fn with(mut self, shape: impl Into<Shape>, dtype: Option<DType>, fill: Fill, constant: bool) -> Case {
        self.inputs.push(CaseInput { shape: shape.into(), dtype, fill, constant });
        self
    }

    /// Says that the op has no derivative.
    pub fn without_gradient(mut self) -> Case {
        self.differentiable = false;
        self
    }

    /// Says that it is there to be compared between devices: what the CPU is checked for alone is left to
    /// smaller cases.
    pub fn large(mut self) -> Case {
        self.large = true;
        self
    }

    /// Hands the parameters themselves to the op: for ops that replace none of them.
    pub fn accumulating(mut self) -> Case {
        self.accumulating = true;
        self
    }

    /// Does the same, and has gradients summed in `dtype` where bf16 is under test.
    pub fn accumulating_in(mut self, dtype: DType) -> Case {
        self.gradients = Some(dtype);
        self.accumulating()
    }

    /// Hands the parameters themselves to the op, which begins its sums in their accumulators.
    pub fn beginning(mut self) -> Case {
        self.begins = true;
        self.accumulating()
    }

    /// The type of input `i` when floats are `float`.
    fn spec(&self, i: usize, float: DType) -> Spec {
        let c = &self.inputs[i];
        let dtype = match c.dtype {
            Some(DType::F32) if float == DType::F64 => DType::F64,
            Some(d) => d,
            None => float,
        };
        Spec::new(c.shape, dtype)
    }

    /// The contents of every input: the same numbers at every float type, but for rounding.
    pub fn values(&self, float: DType) -> Vec<Host> {
        (0..self.inputs.len())
            .map(|i| contents(self.spec(i, float), &self.inputs[i].fill, i as u64))
            .collect()
    }

    /// The graph: float inputs are parameters (copied, so that in-place ops spare them, unless the case
    /// is [`Case::accumulating`]), integers and constants are inputs, outputs are named `out0`, `out1`, ...
    /// Products of what is stored in bf16 may round their factors to it.
    ///
    /// # Errors
    /// If the op refuses the case.
    pub fn graph(&self, float: DType, backward: bool) -> Result<Graph> {
        let mut g = Graph::new();
        g.precision = if float == DType::Bf16 { Precision::Bf16 } else { Precision::F32 };
        g.gradients = self.gradients.filter(|_| float == DType::Bf16);
        g.begins = self.begins;
        let (mut ins, mut params) = (vec![], vec![]);
        for (i, input) in self.inputs.iter().enumerate() {
            let spec = self.spec(i, float);
            if !input.constant {
                let p = g.state(Kind::Param, &format!("in{i}"), spec.shape, spec.dtype);
                params.push(p);
                ins.push(if self.accumulating { p } else { g.cast(p, spec.dtype) });
            } else {
                ins.push(g.input(&format!("in{i}"), spec.shape, spec.dtype));
            }
        }
        let outs = (self.build)(&mut g, &ins);
        g.check()?;
        let mut seeds = vec![];
        for (i, &t) in outs.iter().enumerate() {
            g.output(&format!("out{i}"), t);
            let spec = g.spec(t);
            if backward && spec.dtype.is_float() {
                seeds.push((t, g.input(&format!("d{i}"), spec.shape, spec.dtype)));
            }
        }
        if backward {
            g.backward_from(&seeds, &params)?;
        }
        Ok(g)
    }
}

/// Deterministic contents of a tensor.
pub fn contents(spec: Spec, fill: &Fill, stream: u64) -> Host {
    let s = Stream::new(1, Purpose::Test, stream);
    let n = spec.shape.numel();
    let value = |i: usize| match fill {
        Fill::Normal(scale) => scale * f64::from(s.normal(i as u32)),
        Fill::Uniform(low, high) => low + (high - low) * f64::from(s.uniform(i as u32)),
        Fill::Values(v) => v.get(i % v.len().max(1)).copied().unwrap_or(0.0),
    };
    Host::from_f64(spec.dtype, (0..n).map(value))
}

/// The case tables of all ops.
pub fn all() -> Vec<Case> {
    ops::cases()
}

/// Large cases of the ops whose speed matters most.
pub fn speed() -> Vec<Case> {
    ops::speed_cases()
}

/// A case on a device.
struct Running<D> {
    device: D,
    plan: crate::device::PlanId,
    constant: Vec<bool>,
    outs: usize,
}

impl<D: Device> Running<D> {
    fn new(case: &Case, float: DType, backward: bool, mut device: D) -> Result<Running<D>> {
        let plan = Arc::new(Plan::new(&case.graph(float, backward)?)?);
        let outs = plan.outputs.len();
        let seeds: Vec<_> = plan.inputs.iter().filter(|(n, _)| n.starts_with('d')).cloned().collect();
        let id = device.open(plan)?;
        let constant = case.inputs.iter().map(|c| c.constant).collect();
        let mut running = Running { device, plan: id, constant, outs };
        for (i, host) in case.values(float).iter().enumerate() {
            running.set(i, host)?;
        }
        for (i, (name, slot)) in seeds.iter().enumerate() {
            let d = contents(slot.spec, &Fill::Normal(1.0), 1000 + i as u64);
            running.device.write(Place::Input(id, name), d.view())?;
        }
        Ok(running)
    }

    fn set(&mut self, i: usize, host: &Host) -> Result<()> {
        let name = format!("in{i}");
        let at = match self.constant[i] {
            true => Place::Input(self.plan, &name),
            false => Place::State(Kind::Param, &name),
        };
        match self.device.write(at, host.view()) {
            // An input that the op does not read is not in the plan.
            Err(Error::Place { .. }) if self.constant[i] => Ok(()),
            other => other,
        }
    }

    fn outputs(&mut self) -> Result<Vec<Host>> {
        self.device.run(self.plan)?;
        (0..self.outs).map(|i| self.device.fetch(Place::Output(self.plan, &format!("out{i}")))).collect()
    }
}

/// Runs a case forward and returns its outputs.
///
/// # Errors
/// If the op refuses the case, or the device fails.
pub fn forward(case: &Case, float: DType, device: impl Device) -> Result<Vec<Host>> {
    Running::new(case, float, false, device)?.outputs()
}

/// Runs a case forward and backward and returns its outputs, then the gradient of every parameter.
///
/// # Errors
/// As [`forward`].
pub fn forward_backward(case: &Case, float: DType, device: impl Device) -> Result<Vec<Host>> {
    let mut r = Running::new(case, float, case.differentiable, device)?;
    let mut all = r.outputs()?;
    for i in (0..case.inputs.len()).filter(|&i| case.differentiable && !case.inputs[i].constant) {
        all.push(r.device.fetch(Place::State(Kind::Grad, &format!("in{i}")))?);
    }
    Ok(all)
}

/// The largest disagreement between the adjoint and central differences in f64, relative to the
/// larger of the derivative and the typical derivative of that input.
///
/// # Errors
/// As [`forward`].
pub fn gradient_error(case: &Case) -> Result<f64> {
    let device = || CpuDevice::new(CpuOptions { threads: 1, poison: true });
    let hosts = case.values(DType::F64);
    let gradients: Vec<Vec<f64>> =
        forward_backward(case, DType::F64, device()?)?.iter().map(Host::to_f64).collect();
    let mut probe = Running::new(case, DType::F64, false, device()?)?;
    let weights: Vec<Vec<f64>> = gradients[..probe.outs]
        .iter()
        .enumerate()
        .map(|(i, out)| {
            let spec = Spec::new([out.len()], DType::F64);
            contents(spec, &Fill::Normal(1.0), 1000 + i as u64).to_f64()
        })
        .collect();
    let mut worst: f64 = 0.0;
    let params = (0..hosts.len()).filter(|&i| !case.inputs[i].constant);
    for (k, i) in params.enumerate() {
        let x = hosts[i].to_f64();
        let analytic = &gradients[probe.outs + k];
        let typical = (analytic.iter().map(|d| d * d).sum::<f64>() / x.len().max(1) as f64).sqrt();
        let pick = Stream::new(2, Purpose::Test, i as u64);
        for e in 0..x.len().min(48) {
            let at = if x.len() <= 48 { e } else { pick.below(e as u32, x.len() as u32) as usize };
            let mut value = |delta: f64| -> Result<f64> {
                let mut moved = x.clone();
                moved[at] += delta;
                probe.set(i, &Host::F64(moved))?;
                let outs = probe.outputs()?;
                let terms = outs.iter().zip(&weights);
                Ok(terms.map(|(o, w)| o.to_f64().iter().zip(w).map(|(o, w)| o * w).sum::<f64>()).sum())
            };
            let h = 1e-4 * x[at].abs().max(0.1);
            // Richardson's extrapolation of two central differences: error O(h^4).
            let (wide, near) =
                ((value(h)? - value(-h)?) / (2.0 * h), (value(h / 2.0)? - value(-h / 2.0)?) / h);
            let numeric = (4.0 * near - wide) / 3.0;
            let scale = numeric.abs().max(typical).max(1e-6);
            let error = (analytic[at] - numeric).abs() / scale;
            if error > worst || error.is_nan() {
                worst = error;
            }
        }
        probe.set(i, &hosts[i])?;
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(threads: usize) -> CpuDevice {
        CpuDevice::new(CpuOptions { threads, poison: true }).unwrap()
    }

    #[test]
    fn every_op_has_a_case() {
        let cases = all();
        for op in ops::NAMES {
            assert!(cases.iter().any(|c| c.op == *op), "{op} has no case");
        }
        let unnamed = cases.iter().find(|c| !ops::NAMES.contains(&c.op));
        assert!(unnamed.is_none(), "{unnamed:?} is of no table that NAMES has");
    }

    #[test]
    fn gradients_agree_with_central_differences() {
        for case in all().iter().filter(|c| c.differentiable && !c.large) {
            let error = gradient_error(case).unwrap_or_else(|e| panic!("{case:?}: {e}"));
            assert!(error <= 1e-6, "{case:?}: gradient off by {error:.2e}");
        }
    }

    #[test]
    fn one_two_and_seven_threads_give_the_same_bits() {
        for case in all().into_iter().filter(|c| !c.large) {
            for float in [DType::F32, DType::Bf16] {
                let one = forward_backward(&case, float, cpu(1)).unwrap();
                for threads in [2, 7] {
                    let many = forward_backward(&case, float, cpu(threads)).unwrap();
                    let bytes = |v: &[Host]| v.iter().map(|h| h.view().bytes().to_vec()).collect::<Vec<_>>();
                    assert_eq!(bytes(&one), bytes(&many), "{case:?} with {threads} threads");
                }
            }
        }
    }

    #[test]
    fn ops_work_in_the_space_that_they_ask_for() {
        for case in all() {
            let all = [(DType::F32, 2), (DType::F64, 1), (DType::Bf16, 3), (DType::F32, 7)];
            for &(float, threads) in if case.large { &all[..1] } else { &all } {
                let mut r = Running::new(&case, float, case.differentiable, cpu(threads)).unwrap();
                let asked = r.device.workspace_bytes();
                r.outputs().unwrap();
                let taken = r.device.workspace_bytes();
                assert_eq!(taken, asked, "{case:?} in {float:?} with {threads} threads");
            }
        }
    }

    #[test]
    fn narrow_floats_stay_near_f64() {
        for case in all().into_iter().filter(|c| !c.large) {
            let exact = forward_backward(&case, DType::F64, cpu(1)).unwrap();
            for (float, slack) in [(DType::F32, 2e-5), (DType::Bf16, 6e-2)] {
                let near = forward_backward(&case, float, cpu(2)).unwrap();
                for (o, (a, b)) in exact.iter().zip(&near).enumerate() {
                    let (a, b) = (a.to_f64(), b.to_f64());
                    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
                    let size = norm(&mut a.iter().copied());
                    let off = norm(&mut a.iter().zip(&b).map(|(a, b)| a - b));
                    assert!(
                        off <= slack * size.max(1e-2),
                        "{case:?} {float:?} result {o}: {off:.2e} of {size:.2e}"
                    );
                }
            }
        }
    }
}
