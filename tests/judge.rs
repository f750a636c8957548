//! What is asked of the kernels of an op, in the simulator: that they agree with the CPU under the tolerance
//! law, without findings, with the same bits under every schedule; and that numbers which a result does not
//! depend on change no bit of it, whatever they are.
mod attended;
mod rows;

use std::{
    collections::{BTreeMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    iter,
    ops::Range,
};
use transfusion_core::{
    Error,
    agreement::{self, Application, Expected},
    cases::{self, Case},
    device::Device,
    launch::{Launch, Target},
    tensor::{DType, Host, Shape, Spec},
};
use transfusion_ptx::{BASE, Module};
use transfusion_ptxsim::{Options, Schedule, SimDevice, SimOptions};

/// The machines that launches are made for. On the small ones blocks walk over many rows, and large tiles pay
/// for small cases.
const TARGETS: [Target; 3] = [
    Target::A100,
    Target { name: "four SMs", sms: 4, ..Target::A100 },
    Target { name: "two SMs", sms: 2, ..Target::A100 },
];

/// The same for kernels of Hopper. On two SMs blocks walk over many tiles with one ring of stages; eight split a depth. Too
/// little shared memory leaves the gradient of attention to two passes, for heads of 64 or of 128.
const HOPPERS: [Target; 5] = [
    Target { name: "two SMs", sms: 2, ..Target::H200 },
    Target { name: "eight SMs", sms: 8, ..Target::H200 },
    Target::H200,
    Target { name: "155 KB", shared: 155 << 10, ..Target::H200 },
    Target { name: "199 KB", shared: 199 << 10, ..Target::H200 },
];

/// Host threads of a schedule, by position.
const THREADS: [usize; 4] = [1, 3, 2, 1];

/// Blocks that run at the same time on each of them.
const TOGETHER: [usize; 4] = [1, 1, 2, 3];

/// Warp instructions without effect after which a launch counts as stuck.
const PATIENCE: u64 = 1_000_000;

/// Warp instructions of blocks that run together after which a launch counts as endless.
const LIMIT: u64 = 300_000_000;

/// Applications that do more are not asked again and again with poison.
const SECRET_FLOPS: u64 = 16_000_000;

/// The same for rungs, of which there are many.
const RUNG_FLOPS: u64 = 150_000;

/// What may stand where nobody looks. The last is 3e38 in bf16.
const POISON: [f64; 3] = [f64::NAN, f64::INFINITY, 2.990_487_403_754_736_6e38];

/// The questions about the kernels of one op, with the answers.
pub struct Exam {
    targets: &'static [Target],
    questions: Vec<Question>,
    /// Each with the machines that it is asked on.
    secrets: Vec<(Secret, Vec<usize>)>,
}

/// An application from the case tables.
struct Question {
    case: String,
    application: Application,
    expected: Expected,
    /// Of the exam's machines, those whose launches differ.
    targets: Vec<usize>,
}

/// An application, and what some of its results must not depend on.
pub struct Secret {
    case: String,
    application: Application,
    hidings: Vec<Hiding>,
}

/// Elements of the operands that are poisoned, and what that does to the results.
struct Hiding {
    what: String,
    /// The operands, where contracts of rungs say of each whether it is safe to poison what a mask hides of it.
    operands: &'static [&'static str],
    /// Of the operands.
    poisoned: Vec<Part>,
    /// Of the results: what may change, and becomes NaN if the poison is.
    touched: Vec<Part>,
}

/// Which operand or result, and elements of it.
type Part = (usize, Range<usize>);

/// A simulated GPU, with these kernels instead of the shipped ones of the same names.
///
/// # Panics
/// If one of them is no PTX.
pub fn simulator(target: Target, schedule: usize, kernels: &[Module]) -> SimDevice {
    let simulation = Options {
        schedule: Schedule::SEVERAL[schedule],
        threads: THREADS[schedule],
        together: TOGETHER[schedule],
        patience: PATIENCE,
        limit: LIMIT,
        traffic: false,
        ..Options::default()
    };
    SimDevice::new(SimOptions { target, simulation, kernels: kernels.to_vec() }).unwrap()
}

/// A result that changes with what it must not depend on.
pub struct Leak {
    /// What was poisoned, where contracts of rungs speak of it.
    pub operands: &'static [&'static str],
    /// Where and how.
    pub what: String,
}

/// What results of a rung must not depend on, and how that is asked: as of the op's own kernel, the gradient and what
/// is large left out.
///
/// # Panics
/// If a case is refused.
pub fn secrets(op: &str) -> Vec<Secret> {
    if op == "attention" {
        return attended::secrets(&[64]).into_iter().filter(|s| s.application.op.name() == op).collect();
    }
    let own = cases::all().into_iter().filter(|case| case.op == op);
    let small = |(_, a): &(String, Application)| a.op.name() == op && a.cost().flops <= RUNG_FLOPS;
    own.flat_map(|case| applications(&case))
        .filter(small)
        .filter_map(|(case, a)| rows::secret(&case, &a))
        .collect()
}

/// Every fault that the exam of a module finds in these kernels, where they stand in for the shipped ones.
pub fn faults(stem: &str, kernels: &[Module]) -> Vec<String> {
    Exam::new(stem).faults(kernels).collect()
}

impl Exam {
    /// The exam of a module of kernels: of its ops and their gradients.
    ///
    /// # Panics
    /// If a case is refused.
    pub fn new(stem: &str) -> Exam {
        let (tables, targets) = (tables(stem), machines(stem));
        let about = |c: &&Case| tables.contains(&c.op);
        let all = cases::all();
        let mut asked = HashSet::new();
        let all = all.iter().filter(about).flat_map(applications).filter(|(_, a)| asked.insert(identity(a)));
        let mut questions: Vec<Question> = all.filter_map(|q| question(q, stem, targets)).collect();
        // The small first: a fault shows soon.
        questions.sort_by_key(Question::flops);
        let secrets = if tables == ["attention"] {
            // Narrow heads have no kernels of Hopper's.
            let all = attended::secrets(if arch(stem) == BASE { &[32, 64, 128] } else { &[64, 128] });
            // With little memory the kernels are those that begin again in any case.
            let roomy = |t: &usize| targets[*t].shared == targets[0].shared;
            let on =
                |s: &Secret| self::targets(&s.application, arch(stem), targets).into_iter().filter(roomy);
            let with_machines = |s: Secret| {
                let on = on(&s).collect();
                (s, on)
            };
            all.into_iter().map(with_machines).collect()
        } else {
            let small = questions.iter().filter(|q| q.flops() <= SECRET_FLOPS);
            small.filter_map(|q| rows::secret(&q.case, &q.application)).map(|s| (s, vec![0])).collect()
        };
        Exam { targets, questions, secrets }
    }

    /// With how many different extents of operands and results, however these are stored, each op is asked that takes
    /// more than single numbers.
    pub fn shapes(&self) -> BTreeMap<&'static str, usize> {
        let mut all: BTreeMap<&str, HashSet<Vec<Shape>>> = BTreeMap::new();
        for Question { application, expected, .. } in
            self.questions.iter().filter(|q| !q.takes_single_numbers())
        {
            let specs = application.specs.iter().chain(&expected.outs);
            all.entry(application.op.name()).or_default().insert(specs.map(|s| s.shape).collect());
        }
        all.into_iter().map(|(op, shapes)| (op, shapes.len())).collect()
    }

    /// What is wrong with these kernels, where they stand in for the shipped ones; looked for as it is asked
    /// for.
    pub fn faults<'a>(&'a self, kernels: &'a [Module]) -> impl Iterator<Item = String> + 'a {
        self.disagreements(kernels, |_| ()).chain(self.leaks(kernels))
    }

    /// Where they disagree with the CPU, have findings, or with themselves under another schedule. `done` gets
    /// every machine at last.
    pub fn disagreements<'a>(
        &'a self,
        kernels: &'a [Module],
        mut done: impl FnMut(&SimDevice) + 'a,
    ) -> impl Iterator<Item = String> + 'a {
        let schedules = 0..Schedule::SEVERAL.len();
        let of = |target| schedules.clone().map(|s| simulator(target, s, kernels)).collect();
        let mut machines: Vec<Vec<SimDevice>> = self.targets.iter().copied().map(of).collect();
        let mut questions = self.questions.iter();
        iter::from_fn(move || match questions.next() {
            Some(question) => Some(question.ask(&mut machines)),
            None => {
                machines.drain(..).flatten().for_each(|m| done(&m));
                None
            }
        })
        .flatten()
    }

    /// Where poison comes through, or does not come through where it should.
    pub fn leaks<'a>(&'a self, kernels: &'a [Module]) -> impl Iterator<Item = String> + 'a {
        let mut machines: Vec<SimDevice> = self.targets.iter().map(|&t| simulator(t, 0, kernels)).collect();
        let each = self.secrets.iter().flat_map(|(s, on)| on.iter().map(move |&t| (s, t)));
        each.flat_map(move |(s, t)| s.leaks(&s.application, &mut machines[t])).map(|leak| leak.what)
    }
}

/// The architecture of a module of shipped kernels.
///
/// # Panics
/// If there is no such module.
pub fn arch(stem: &str) -> &'static str {
    let module = transfusion_ptx::modules().iter().find(|m| m.stem == stem);
    &module.unwrap_or_else(|| panic!("no module {stem}")).arch
}

/// The machines that a module is asked on.
fn machines(stem: &str) -> &'static [Target] {
    if arch(stem) == BASE { &TARGETS } else { &HOPPERS }
}

/// The case tables that a module is held under.
fn tables(stem: &str) -> Vec<&str> {
    match stem {
        "attention_decode" | "attention_wgmma" | "attention_wgmma_bwd" => vec!["attention"],
        "cross_entropy_wgmma" => vec!["cross_entropy"],
        "linear_few" | "linear_wgmma" => vec!["linear"],
        "gather_rows" => vec!["gather_rows", "embedding"],
        "patchify" => vec!["patchify", "unpatchify"],
        "swiglu" => vec!["swiglu", "silu"],
        "time_embedding" => vec!["time_embedding", "sine_positions"],
        _ => vec![stem],
    }
}

/// What a case asks of its op and the gradient, on every storage type that there are kernels for.
fn applications(case: &Case) -> Vec<(String, Application)> {
    let own = |a: &Application| !matches!(a.plan(Some(&TARGETS[0])), Err(Error::NoKernel { .. }));
    let of = |float| agreement::applications(case, float, &mut agreement::cpu(1).unwrap()).unwrap();
    let all = [DType::Bf16, DType::F32].into_iter().flat_map(of).filter(own);
    all.map(|application| (format!("{case:?}"), application)).collect()
}

/// What tells an application from others: cases that differ in a gradient alone have the others in common.
fn identity(a: &Application) -> (String, u64) {
    let mut hasher = DefaultHasher::new();
    a.ins.iter().for_each(|host| host.view().bytes().hash(&mut hasher));
    (format!("{:?} {:?}", a.op, a.specs), hasher.finish())
}

/// What a module is asked about an application, if any of the machines launches a kernel of its architecture.
fn question((case, application): (String, Application), stem: &str, on: &[Target]) -> Option<Question> {
    let targets = targets(&application, arch(stem), on);
    let ask = |targets| {
        let expected = application.expected(&mut agreement::cpu(1).unwrap()).unwrap();
        Question { case, application, expected, targets }
    };
    (!targets.is_empty()).then_some(targets).map(ask)
}

/// Of the machines, those whose launches differ and have a kernel of this architecture among them.
fn targets(a: &Application, arch: &str, on: &[Target]) -> Vec<usize> {
    let launches = |t: &Target| {
        let steps = a.plan(Some(t)).unwrap().steps;
        steps.into_iter().flat_map(|step| step.launches).collect::<Vec<_>>()
    };
    let own = |l: &Launch| match l {
        Launch::Kernel { entry, .. } => {
            transfusion_ptx::find(on[0].arch, entry).is_some_and(|(module, _)| module.arch == arch)
        }
        _ => false,
    };
    let all: Vec<_> = on.iter().map(launches).collect();
    let new = |&t: &usize| !all[..t].contains(&all[t]);
    (0..all.len()).filter(new).filter(|&t| arch == BASE || all[t].iter().any(own)).collect()
}

impl Question {
    fn flops(&self) -> u64 {
        self.application.cost().flops
    }

    /// Whether its op takes one number of each operand and refuses two.
    fn takes_single_numbers(&self) -> bool {
        let Application { op, specs, .. } = &self.application;
        let two: Vec<Spec> = specs.iter().map(|s| Spec::new([2], s.dtype)).collect();
        !specs.is_empty() && specs.iter().all(|s| s.shape.dims() == [1]) && op.infer(&two).is_err()
    }

    fn ask(&self, machines: &mut [Vec<SimDevice>]) -> Vec<String> {
        let mut faults = vec![];
        for &target in &self.targets {
            let machines = &mut machines[target];
            let mut first: Option<Vec<Host>> = None;
            for (s, machine) in machines.iter_mut().enumerate() {
                match (self.application.run(machine), &first) {
                    (Err(e), _) => faults.push(self.fault(&e.to_string())),
                    (Ok(have), Some(first)) if same_bits(first, &have) => {}
                    (Ok(_), Some(_)) => faults.push(self.fault(&format!("schedule {s} changes bits"))),
                    (Ok(have), None) => {
                        let law = self.expected.compare(&have).into_iter().filter(|w| !w.holds());
                        faults.extend(law.map(|worst| self.fault(&format!("value: {worst}"))));
                        first = Some(have);
                    }
                }
                if !faults.is_empty() {
                    return faults;
                }
            }
        }
        faults
    }

    fn fault(&self, what: &str) -> String {
        format!("{}: {}: {what}", self.case, self.application)
    }
}

impl Secret {
    /// The application.
    pub fn application(&self) -> &Application {
        &self.application
    }

    /// The operands of which a mask hides parts, where contracts of rungs speak of that.
    pub fn masked(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.hidings.iter().flat_map(|hiding| hiding.operands.iter().copied())
    }

    /// Where poison comes through, or does not come through where it should, in this implementation of the
    /// application.
    pub fn leaks(&self, on: &Application, machine: &mut dyn Device) -> Vec<Leak> {
        let fault = |operands, what: &str| Leak {
            operands,
            what: format!("{}: {}: {what}", self.case, self.application.op.name()),
        };
        let clean = match on.run(machine) {
            Ok(clean) => clean,
            Err(e) => return vec![fault(&[], &e.to_string())],
        };
        let ask = |(n, hiding): (usize, &Hiding)| {
            // NaN says most; infinity and a number near it take turns.
            [POISON[0], POISON[1 + n % 2]].map(|poison| {
                let leak = match hiding.application(on, poison).run(machine) {
                    Ok(have) => hiding.leak(&clean, &have, poison),
                    Err(e) => Some(e.to_string()),
                };
                let what = format!("poison: {} = {poison:.0e}", hiding.what);
                leak.map(|leak| fault(hiding.operands, &format!("{what}: {leak}")))
            })
        };
        self.hidings.iter().enumerate().flat_map(ask).flatten().collect()
    }
}

impl Hiding {
    fn application(&self, clean: &Application, poison: f64) -> Application {
        let mut poisoned = clean.clone();
        for (i, (spec, host)) in clean.specs.iter().zip(&mut poisoned.ins).enumerate() {
            let mut values = host.to_f64();
            let own = self.poisoned.iter().filter(|(operand, _)| *operand == i);
            own.for_each(|(_, range)| values[range.clone()].fill(poison));
            *host = Host::from_f64(spec.dtype, values);
        }
        poisoned
    }

    /// The first result that the poison changes although it should not, or spares although it should not.
    fn leak(&self, clean: &[Host], have: &[Host], poison: f64) -> Option<String> {
        for (r, (clean, have)) in
            clean.iter().map(Host::to_f64).zip(have.iter().map(Host::to_f64)).enumerate()
        {
            let mut touched = vec![false; clean.len()];
            let own = self.touched.iter().filter(|(result, _)| *result == r);
            own.for_each(|(_, range)| touched[range.clone()].fill(true));
            for (e, (clean, have)) in clean.iter().zip(&have).enumerate() {
                if !touched[e] && clean.to_bits() != have.to_bits() {
                    return Some(format!("result {r} element {e} becomes {have:e}, was {clean:e}"));
                }
                if touched[e] && poison.is_nan() && !have.is_nan() {
                    return Some(format!("result {r} element {e} stays {have:e}"));
                }
            }
        }
        None
    }
}

/// Whether all results are the same, bit by bit.
fn same_bits(a: &[Host], b: &[Host]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.view().bytes() == b.view().bytes())
}
