//! Whether a device agrees with the CPU about an op, under the tolerance law of flash-attention (Dao et
//! al. 2022), row by row:
//!   `max e <= 2 max e0 + ulp`,   `e = |device - yardstick|`,   `e0 = |plain - yardstick|`
//! The yardstick is the op in f64 on the same, already rounded operands; plain is the op as an unfused
//! implementation stores it in the storage type ([`Op::plain`]); the unit in the last place is that of the
//! largest number of the row. A row is the innermost dimension. Integers agree if they are equal.
use crate::{
    cases::{Case, Fill, contents},
    device::{CpuDevice, CpuOptions, Device, Place, PlanId},
    error::Result,
    graph::{Graph, Role},
    launch::{Cost, Target},
    op::{Memory, Op},
    plan::Plan,
    tensor::{DType, Host, Spec, Tensor},
};
use std::{collections::HashMap, fmt, sync::Arc};

/// One application of an op to given numbers, and what its results should be.
#[derive(Clone, Debug)]
pub struct Application {
    /// The op.
    pub op: Arc<dyn Op>,
    /// Types of the operands.
    pub specs: Vec<Spec>,
    /// The operands.
    pub ins: Vec<Host>,
    /// Types of the results.
    pub outs: Vec<Spec>,
    /// The results as an unfused implementation stores them.
    pub plain: Vec<Host>,
    /// The results in f64 (in f32 where the op has no f64 form).
    pub yardstick: Vec<Vec<f64>>,
}

/// How near one result came to the bound.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Worst {
    /// Which result.
    pub result: usize,
    /// Row of the worst element.
    pub row: usize,
    /// Its column.
    pub column: usize,
    /// What the device says.
    pub have: f64,
    /// The yardstick.
    pub want: f64,
    /// Largest error of the row over the bound of the row: more than 1 breaks the law.
    pub ratio: f64,
}

impl Worst {
    /// Whether the law holds.
    pub fn holds(&self) -> bool {
        self.ratio <= 1.0
    }
}

impl fmt::Display for Worst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Worst { result, row, column, have, want, ratio } = self;
        write!(f, "result {result} at [{row}, {column}]: {have} for {want}, {ratio:.2} of the tolerance")
    }
}

/// Every application of an op in the program of a case, forward and backward, when floats are stored as
/// `float`. Views are left out.
///
/// # Errors
/// If an op refuses the case.
pub fn applications(case: &Case, float: DType) -> Result<Vec<Application>> {
    let g = case.graph(float, case.differentiable)?;
    let mut values: HashMap<Tensor, Host> = HashMap::new();
    let mut given = case.values(float).into_iter();
    for (i, value) in g.values().iter().enumerate() {
        let host = match value.role {
            Role::Temp => continue,
            _ if value.name.starts_with("in") && value.role != Role::State(crate::op::Kind::Grad) => {
                given.next()
            }
            _ => None,
        };
        let random = || contents(value.spec, &Fill::Normal(1.0), 2000 + i as u64);
        values.insert(Tensor(i as u32), host.unwrap_or_else(random));
    }
    let mut all = Vec::new();
    for node in g.nodes() {
        let ins: Vec<Host> = node.ins.iter().filter_map(|t| values.get(t).cloned()).collect();
        let specs = node.ins.iter().map(|&t| g.spec(t)).collect();
        let application = Application::new(node.op.clone(), specs, ins)?;
        let exact = application.run(&mut cpu()?)?;
        values.extend(node.outs.iter().copied().zip(exact));
        if !(0..node.outs.len()).all(|o| matches!(node.op.memory(o), Memory::View { .. })) {
            all.push(application);
        }
    }
    Ok(all)
}

fn cpu() -> Result<CpuDevice> {
    CpuDevice::new(CpuOptions { threads: 1, poison: true })
}

impl Application {
    /// An application to operands of these types, run on the CPU.
    ///
    /// # Errors
    /// If the op refuses them.
    pub fn new(op: Arc<dyn Op>, specs: Vec<Spec>, ins: Vec<Host>) -> Result<Application> {
        let mut a = Application { op, specs, ins, outs: vec![], plain: vec![], yardstick: vec![] };
        let (g, outs) = a.graph();
        g.check()?;
        a.outs = outs.iter().map(|&t| g.spec(t)).collect();
        let wide = a.widened(DType::F64).run(&mut cpu()?);
        let wide = wide.or_else(|_| a.widened(DType::F32).run(&mut cpu()?))?;
        a.yardstick = wide.iter().map(Host::to_f64).collect();
        a.plain = match a.op.plain(&a.specs, &a.ins) {
            Some(plain) => plain,
            None => a.run(&mut cpu()?)?,
        };
        Ok(a)
    }

    /// The same numbers in wider floats.
    fn widened(&self, float: DType) -> Application {
        let wide = |dtype: DType| if dtype.is_float() && dtype.size() < float.size() { float } else { dtype };
        let pairs = self.specs.iter().zip(&self.ins);
        let ins = pairs.map(|(s, host)| match wide(s.dtype) {
            same if same == s.dtype => host.clone(),
            other => Host::from_f64(other, host.to_f64()),
        });
        Application {
            ins: ins.collect(),
            specs: self.specs.iter().map(|s| Spec { dtype: wide(s.dtype), ..*s }).collect(),
            op: self.op.clone(),
            outs: vec![],
            plain: vec![],
            yardstick: vec![],
        }
    }

    /// The program of this one application: inputs `in0`, `in1`, ..., outputs `out0`, `out1`, ...
    fn graph(&self) -> (Graph, Vec<Tensor>) {
        let mut g = Graph::new();
        let ins: Vec<Tensor> = self
            .specs
            .iter()
            .enumerate()
            .map(|(i, s)| g.input(&format!("in{i}"), s.shape, s.dtype))
            .collect();
        let outs = g.apply(self.op.clone(), &ins);
        outs.iter().enumerate().for_each(|(i, &t)| g.output(&format!("out{i}"), t));
        (g, outs)
    }

    /// Its plan for a machine, or for the CPU.
    ///
    /// # Errors
    /// If the op refuses its operands or has no kernel for them.
    pub fn plan(&self, target: Option<&Target>) -> Result<Plan> {
        let (g, _) = self.graph();
        target.map_or_else(|| Plan::new(&g), |t| Plan::lowered(&g, t))
    }

    /// Opens it on a device and writes its operands.
    ///
    /// # Errors
    /// As [`Application::plan`], or if the device fails.
    pub fn open(&self, device: &mut dyn Device) -> Result<PlanId> {
        let plan = Arc::new(self.plan(device.target().as_ref())?);
        let held: Vec<bool> = (0..self.ins.len()).map(|i| plan.input(&format!("in{i}")).is_some()).collect();
        let id = device.open(plan)?;
        for (i, host) in self.ins.iter().enumerate().filter(|(i, _)| held[*i]) {
            device.write(Place::Input(id, &format!("in{i}")), host.view())?;
        }
        Ok(id)
    }

    /// Runs it on a device and returns its results.
    ///
    /// # Errors
    /// As [`Application::open`].
    pub fn run(&self, device: &mut dyn Device) -> Result<Vec<Host>> {
        let id = self.open(device)?;
        let results = device.run(id).and_then(|()| {
            let outs = 0..self.graph().1.len();
            outs.map(|i| device.fetch(Place::Output(id, &format!("out{i}")))).collect()
        });
        device.close(id);
        results
    }

    /// How near results came to the bound, each at its worst.
    pub fn compare(&self, have: &[Host]) -> Vec<Worst> {
        let each = self.outs.iter().zip(have).zip(self.plain.iter().zip(&self.yardstick)).enumerate();
        each.map(|(i, ((spec, have), (plain, want)))| worst(i, *spec, &have.to_f64(), &plain.to_f64(), want))
            .collect()
    }

    /// What it costs.
    pub fn cost(&self) -> Cost {
        self.op.cost(&self.specs, &self.outs)
    }

    /// Types of operands and results, readably.
    pub fn describe(&self) -> String {
        let list = |specs: &[Spec]| specs.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>().join(" ");
        format!("{} {} <- {}", self.op.name(), list(&self.outs), list(&self.specs))
    }
}

/// The unit in the last place of numbers as large as `x`.
fn ulp(x: f64, dtype: DType) -> f64 {
    let (digits, least) = match dtype {
        DType::Bf16 => (7, f64::from(f32::MIN_POSITIVE)),
        DType::F32 => (23, f64::from(f32::MIN_POSITIVE)),
        DType::F64 => (52, f64::MIN_POSITIVE),
        DType::I32 | DType::U8 => return 0.0,
    };
    2f64.powi(x.max(least).log2().floor() as i32 - digits)
}

/// The element that comes nearest to the bound of its row, or exceeds it most.
fn worst(result: usize, spec: Spec, have: &[f64], plain: &[f64], want: &[f64]) -> Worst {
    let mut worst = Worst { result, row: 0, column: 0, have: 0.0, want: 0.0, ratio: 0.0 };
    let columns = spec.shape.last().max(1);
    let rows = have.chunks(columns).zip(plain.chunks(columns)).zip(want.chunks(columns));
    for (row, ((have, plain), want)) in rows.enumerate() {
        let largest = want.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f64::max);
        let slack = plain.iter().zip(want).map(|(p, w)| error(*p, *w)).filter(|e| e.is_finite());
        let bound = 2.0 * slack.fold(0.0, f64::max) + ulp(largest, spec.dtype);
        for (column, (&have, &want)) in have.iter().zip(want).enumerate() {
            let e = error(have, want);
            let ratio = if e == 0.0 { 0.0 } else { e / bound };
            if ratio > worst.ratio {
                worst = Worst { result, row, column, have, want, ratio };
            }
        }
    }
    worst
}

/// Distance; numbers that are not finite are near to their like only.
fn error(have: f64, want: f64) -> f64 {
    let alike = have == want || (have.is_nan() && want.is_nan());
    match (alike, have.is_finite() && want.is_finite()) {
        (true, _) => 0.0,
        (false, true) => (have - want).abs(),
        (false, false) => f64::INFINITY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(dtype: DType, columns: usize, have: &[f64], plain: &[f64], want: &[f64]) -> Worst {
        worst(0, Spec::new([have.len() / columns, columns], dtype), have, plain, want)
    }

    #[test]
    fn the_law_is_one_of_rows() {
        // Row 0 is large and inexact, row 1 small and exact: the slack of one is none for the other.
        let want = [100.0, 50.0, 0.5, 0.25];
        let plain = [100.5, 50.0, 0.5, 0.25];
        let ulp = 2f64.powi(-1 - 7);
        let near = [101.4, 50.0, 0.5 + 0.9 * ulp, 0.25];
        assert!(judge(DType::Bf16, 2, &near, &plain, &want).holds());
        let far = [100.0, 50.0, 0.5, 0.25 + 1.1 * ulp];
        let found = judge(DType::Bf16, 2, &far, &plain, &want);
        assert!(!found.holds());
        assert_eq!((found.row, found.column), (1, 1));
    }

    #[test]
    fn what_is_not_finite_agrees_with_its_like_only() {
        let want = [1.0, f64::NAN, f64::INFINITY];
        assert!(judge(DType::F32, 3, &want, &want, &want).holds());
        for broken in [[f64::NAN, f64::NAN, f64::INFINITY], [1.0, 0.0, f64::INFINITY], [1.0, f64::NAN, 3.0]] {
            assert!(!judge(DType::F32, 3, &broken, &want, &want).holds(), "{broken:?}");
        }
    }

    #[test]
    fn integers_agree_if_they_are_equal() {
        let want = [3.0, -7.0];
        assert!(judge(DType::I32, 2, &want, &want, &want).holds());
        assert!(!judge(DType::I32, 2, &[3.0, -6.0], &want, &want).holds());
    }

    #[test]
    fn plain_results_are_rough_but_right() {
        for a in crate::cases::all().iter().flat_map(|case| applications(case, DType::Bf16).unwrap()) {
            for (plain, want) in a.plain.iter().zip(&a.yardstick) {
                let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
                let size = norm(&mut want.iter().copied().filter(|x| x.is_finite()));
                let off = norm(&mut plain.to_f64().iter().zip(want).map(|(p, w)| error(*p, *w)));
                assert!(off <= 0.02 * size.max(1e-2), "{}: {off:.1e} of {size:.1e}", a.describe());
            }
        }
    }

    #[test]
    fn the_cpu_agrees_with_itself() {
        for case in crate::cases::all() {
            for float in [DType::F32, DType::Bf16] {
                for a in applications(&case, float).unwrap() {
                    let have = a.run(&mut cpu().unwrap()).unwrap();
                    for w in a.compare(&have) {
                        assert!(w.holds(), "{case:?}, {}: {w}", a.describe());
                    }
                }
            }
        }
    }
}
