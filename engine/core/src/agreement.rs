//! Whether a device agrees with the CPU about an op, under the tolerance law of flash-attention (Dao et
//! al. 2022), row by row:
//!   `max e <= 2 max e0 + ulp`,   `e = |device - yardstick|`,   `e0 = |plain - yardstick|`
//! The yardstick is the op in f64 on the same, already rounded operands; plain is the op as an unfused
//! implementation stores it in the storage type ([`Op::plain`]); the unit in the last place is that of the
//! largest number of the row, four of them where numbers are stored in f32, since there the order of a sum
//! counts as much as the rounding of its result. A row is the innermost dimension. Integers agree if they
//! are equal.
use crate::{
    cases::{self, Case, Fill, contents},
    device::{CpuDevice, CpuOptions, Device, Place, PlanId},
    error::{Error, Result},
    graph::{Graph, Node, Role},
    launch::{Cost, Target},
    op::{Accumulation, Kind, Memory, Op},
    plan::Plan,
    tensor::{DType, Host, Spec, Tensor},
};
use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, LazyLock},
};

/// One application of an op to given numbers.
#[derive(Clone, Debug)]
pub struct Application {
    /// The op.
    pub op: Arc<dyn Op>,
    /// Types of the operands.
    pub specs: Vec<Spec>,
    /// The operands.
    pub ins: Vec<Host>,
}

/// What the results of an application should be.
#[derive(Clone, Debug)]
pub struct Expected {
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
    /// The tolerance of its row.
    pub bound: f64,
    /// Its error over the tolerance: more than 1 breaks the law.
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
        let Worst { result, row, column, have, want, ratio, .. } = self;
        write!(f, "result {result} at [{row}, {column}]: {have} for {want}, {ratio:.2} of the tolerance")
    }
}

/// Every application of an op in the program of a case, forward and backward, when floats are stored as
/// `float`. Left out are views, and ops that only help here and have a case table of their own. What one
/// yields to the next is computed on `device`, or on the CPU where that lacks a kernel.
///
/// # Errors
/// If an op refuses the case, or the device fails.
pub fn applications(case: &Case, float: DType, device: &mut dyn Device) -> Result<Vec<Application>> {
    let g = case.graph(float, case.differentiable)?;
    let named = g.nodes().iter().any(|n| about(case.op, n.op.name()));
    let mut walk = Walk::new(&g, g.nodes().iter().collect(), given(case, float, &g));
    let mut all = Vec::new();
    while let Some(application) = walk.step(device)? {
        let elsewhere = named && asked_elsewhere(case.op, application.op.name());
        if !application.is_view() && !elsewhere {
            all.push(application);
        }
    }
    Ok(all)
}

/// A program, node by node: each is applied alone to what those before it yielded.
#[derive(Debug)]
pub struct Walk<'g> {
    g: &'g Graph,
    nodes: std::vec::IntoIter<&'g Node>,
    values: HashMap<Tensor, Host>,
    /// How often each is still wanted: afterwards it is let go.
    wanted: HashMap<Tensor, usize>,
}

impl<'g> Walk<'g> {
    /// A walk over these nodes of a program, in order, from the contents of its inputs and states. What no node
    /// reads is let go at once.
    pub fn new(g: &'g Graph, nodes: Vec<&'g Node>, mut given: HashMap<Tensor, Host>) -> Walk<'g> {
        let mut wanted = HashMap::new();
        nodes.iter().flat_map(|n| &n.ins).for_each(|t| *wanted.entry(*t).or_default() += 1);
        given.retain(|t, _| wanted.contains_key(t));
        Walk { g, nodes: nodes.into_iter(), values: given, wanted }
    }

    fn take(&mut self, t: Tensor) -> Result<Host> {
        let wanted = self.wanted.entry(t).or_default();
        *wanted = wanted.saturating_sub(1);
        let value = match wanted {
            0 => self.values.remove(&t),
            _ => self.values.get(&t).cloned(),
        };
        value.ok_or_else(|| Error::Graph(format!("{t:?} has no value: it is neither given nor made before")))
    }

    /// The next application; `None` behind the last. What it yields to later ones is computed on `device`, or
    /// on the CPU where that lacks a kernel.
    ///
    /// # Errors
    /// If the op refuses its operands, or the device fails.
    pub fn step(&mut self, device: &mut dyn Device) -> Result<Option<Application>> {
        let Some(node) = self.nodes.next() else { return Ok(None) };
        let ins = node.ins.iter().map(|t| self.take(*t)).collect::<Result<Vec<Host>>>()?;
        let specs = node.ins.iter().map(|&t| self.g.spec(t)).collect();
        let application = Application { op: node.op.clone(), specs, ins };
        let outs = match application.run(device) {
            Err(Error::NoKernel { .. }) => application.run(&mut cpu(1)?)?,
            other => other?,
        };
        let wanted = node.outs.iter().copied().zip(outs).filter(|(t, _)| self.wanted.contains_key(t));
        self.values.extend(wanted);
        Ok(Some(application))
    }
}

/// Whether a case table is about an op or its gradient.
fn about(table: &str, op: &str) -> bool {
    op.strip_prefix(table).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
}

/// Whether not this table but another one is about an op.
fn asked_elsewhere(table: &str, op: &str) -> bool {
    static TABLES: LazyLock<HashSet<&str>> = LazyLock::new(|| cases::all().iter().map(|c| c.op).collect());
    !about(table, op) && TABLES.iter().any(|t| about(t, op))
}

/// What the host writes before a run: the case's inputs, and random gradients to start from.
fn given(case: &Case, float: DType, g: &Graph) -> HashMap<Tensor, Host> {
    let mut inputs = case.values(float).into_iter();
    let mut values = HashMap::new();
    for (i, value) in g.values().iter().enumerate() {
        let host = match value.role {
            Role::Temp => continue,
            Role::Input | Role::State(Kind::Param) if value.name.starts_with("in") => inputs.next(),
            _ => None,
        };
        let random = || contents(value.spec, &Fill::Normal(1.0), 2000 + i as u64);
        values.insert(Tensor(i as u32), host.unwrap_or_else(random));
    }
    values
}

/// A CPU of so many threads (0: one for each core) that shows reads of what nothing wrote.
///
/// # Errors
/// If they cannot be started.
pub fn cpu(threads: usize) -> Result<CpuDevice> {
    CpuDevice::new(CpuOptions { threads, poison: true })
}

impl Application {
    /// What it should yield, by a CPU.
    ///
    /// # Errors
    /// If the op refuses the operands.
    pub fn expected(&self, cpu: &mut CpuDevice) -> Result<Expected> {
        let (g, outs) = self.graph();
        g.check()?;
        let wide = self.widened(DType::F64).run(cpu);
        let wide = wide.or_else(|_| self.widened(DType::F32).run(cpu))?;
        let plain = match self.op.plain(&self.specs, &self.ins) {
            Some(plain) => plain,
            None => self.run(cpu)?,
        };
        Ok(Expected {
            outs: outs.iter().map(|&t| g.spec(t)).collect(),
            plain,
            yardstick: wide.iter().map(Host::to_f64).collect(),
        })
    }

    /// The same numbers in wider floats.
    fn widened(&self, float: DType) -> Application {
        let wide = |dtype: DType| if dtype.is_float() && dtype.size() < float.size() { float } else { dtype };
        let pairs = self.specs.iter().zip(&self.ins);
        let ins = pairs.map(|(s, host)| match wide(s.dtype) {
            same if same == s.dtype => host.clone(),
            other => Host::from_f64(other, host.to_f64()),
        });
        let specs = self.specs.iter().map(|s| Spec { dtype: wide(s.dtype), ..*s });
        Application { ins: ins.collect(), specs: specs.collect(), op: self.op.clone() }
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

    /// Whether nothing has to run: every result is a view.
    pub fn is_view(&self) -> bool {
        let results = self.graph().1.len();
        (0..results).all(|o| matches!(self.op.memory(o), Memory::View { .. }))
    }

    /// Its plan for a machine, or for the CPU.
    ///
    /// # Errors
    /// If the op refuses its operands or has no kernel for them.
    pub fn plan(&self, target: Option<&Target>) -> Result<Plan> {
        Plan::on(&self.graph().0, target)
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

    /// What it costs.
    pub fn cost(&self) -> Cost {
        let (g, outs) = self.graph();
        let outs: Vec<Spec> = outs.iter().map(|&t| g.spec(t)).collect();
        self.op.cost(&self.specs, &outs)
    }
}

impl fmt::Display for Application {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.op.name())?;
        self.specs.iter().try_for_each(|s| write!(f, " {s:?}"))?;
        write!(f, " ->")?;
        self.op.infer(&self.specs).unwrap_or_default().iter().try_for_each(|s| write!(f, " {s:?}"))
    }
}

impl Expected {
    /// How near results came to the bound, each at its worst.
    pub fn compare(&self, have: &[Host]) -> Vec<Worst> {
        let each = self.outs.iter().zip(have).zip(self.plain.iter().zip(&self.yardstick)).enumerate();
        each.map(|(i, ((spec, have), (plain, want)))| worst(i, *spec, &have.to_f64(), &plain.to_f64(), want))
            .collect()
    }
}

/// The results of `op` on the CPU, stored.
pub fn stored(op: impl Op + 'static, specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
    let application = Application { op: Arc::new(op), specs: specs.into(), ins: ins.into() };
    application.run(&mut cpu(1).ok()?).ok()
}

/// The results of `op` on all operands but the last, stored, and `result` then added to that last one in
/// f32, or stored there: an op that accumulates, unfused. `None` unless it does, and the operands are bf16.
pub fn then_summed(
    op: impl Op + 'static,
    how: Accumulation,
    specs: &[Spec],
    ins: &[Host],
    result: usize,
) -> Option<Vec<Host>> {
    if how == Accumulation::Apart {
        return None;
    }
    let ((sum_spec, specs), (sum, ins)) = (specs.split_last()?, ins.split_last()?);
    if specs.first()?.dtype != DType::Bf16 || sum_spec.dtype != DType::F32 {
        return None;
    }
    let mut results = stored(op, specs, ins)?;
    let delta = results.get(result)?.to_f64();
    let before = |x: f64| if how.is_added() { x } else { 0.0 };
    let sums = sum.to_f64().into_iter().map(before).zip(&delta).map(|(a, b)| a + b);
    results[result] = Host::from_f64(DType::F32, sums);
    Some(results)
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
    let mut worst = Worst { result, row: 0, column: 0, have: 0.0, want: 0.0, bound: 0.0, ratio: 0.0 };
    let columns = spec.shape.last().max(1);
    let rows = have.chunks(columns).zip(plain.chunks(columns)).zip(want.chunks(columns));
    for (row, ((have, plain), want)) in rows.enumerate() {
        let largest = want.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f64::max);
        let slack = plain.iter().zip(want).map(|(p, w)| error(*p, *w)).filter(|e| e.is_finite());
        let units = if spec.dtype == DType::F32 { 4.0 } else { 1.0 };
        let bound = 2.0 * slack.fold(0.0, f64::max) + units * ulp(largest, spec.dtype);
        for (column, (&have, &want)) in have.iter().zip(want).enumerate() {
            let e = error(have, want);
            let ratio = if e == 0.0 { 0.0 } else { e / bound };
            if ratio > worst.ratio {
                worst = Worst { result, row, column, have, want, bound, ratio };
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

    /// Every application of the cases that the CPU checks.
    fn all(float: DType) -> Vec<Application> {
        let cases = crate::cases::all();
        let of = |case: &Case| applications(case, float, &mut cpu(1).unwrap()).unwrap();
        cases.iter().filter(|c| !c.large).flat_map(of).collect()
    }

    #[test]
    fn plain_results_are_rough_but_right() {
        let mut cpu = cpu(1).unwrap();
        for a in all(DType::Bf16) {
            let expected = a.expected(&mut cpu).unwrap();
            for (plain, want) in expected.plain.iter().zip(&expected.yardstick) {
                let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
                let size = norm(&mut want.iter().copied().filter(|x| x.is_finite()));
                let off = norm(&mut plain.to_f64().iter().zip(want).map(|(p, w)| error(*p, *w)));
                assert!(off <= 0.03 * size.max(1e-2), "{a}: {off:.1e} of {size:.1e}");
            }
        }
    }

    #[test]
    fn the_yardstick_is_not_rounded() {
        // To round is what a cast does.
        for a in all(DType::Bf16).iter().filter(|a| a.op.name() != "cast") {
            let wide = a.widened(DType::F64);
            let floats = |specs: &[Spec]| specs.iter().any(|s| s.dtype.is_float());
            let outs = if floats(&a.specs) { a.op.infer(&wide.specs).unwrap_or_default() } else { vec![] };
            assert!(outs.iter().all(|s| !s.dtype.is_float() || s.dtype == DType::F64), "{a}: {outs:?}");
        }
    }

    #[test]
    fn the_cpu_agrees_with_itself() {
        let mut cpu = cpu(1).unwrap();
        for a in [DType::F32, DType::Bf16].into_iter().flat_map(all) {
            let have = a.run(&mut cpu).unwrap();
            for w in a.expected(&mut cpu).unwrap().compare(&have) {
                assert!(w.holds(), "{a}: {w}");
            }
        }
    }
}
