//! `transfusion kernels check`.
use super::workbench::{Machine, Workbench};
use crate::{
    console,
    failure::{Failure, Outcome},
};
use clap::Args;
use std::collections::{BTreeMap, HashSet};
use transfusion_core::{
    Error,
    agreement::{self, Application, Worst},
    device::CpuDevice,
};
use transfusion_ptxsim::Schedule;

/// Reasons of refusals that are spelled out for an op.
const REASONS: usize = 2;

/// Hold kernels against the CPU, over the case tables of the ops.
///
/// Every application of an op in a case, forward and backward, runs alone. A result agrees if no row is
/// further from the op in f64 than twice what an unfused implementation in the same storage type is, plus
/// one unit in the last place. In the simulator every launch runs under several schedules, with all checks
/// on: bounds of every operand, reads of what nothing wrote, races, bytes in flight, divergence, deadlock.
#[derive(Args, Debug)]
pub(crate) struct Check {
    #[command(flatten)]
    bench: Workbench,
    /// Schedules of the simulator.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    schedules: u8,
}

/// What became of the applications of an op.
#[derive(Default)]
struct Tally {
    agreed: usize,
    shapes: HashSet<String>,
    refused: BTreeMap<String, usize>,
    worst: Option<(Worst, String)>,
    failures: Vec<String>,
}

impl Check {
    /// Checks and prints.
    pub(crate) fn run(self) -> Outcome {
        let tallies = self.tallies()?;
        console::print(table(&tallies))?;
        let failures: Vec<&String> = tallies.values().flat_map(|t| &t.failures).collect();
        if failures.is_empty() {
            return Ok(());
        }
        let shown: Vec<&str> = failures.iter().take(5).map(|f| f.as_str()).collect();
        Err(Failure::error(format!("{} applications fail:\n{}", failures.len(), shown.join("\n"))))
    }

    fn tallies(&self) -> Outcome<BTreeMap<&'static str, Tally>> {
        let mut tallies: BTreeMap<&'static str, Tally> = BTreeMap::new();
        let schedules = &Schedule::SEVERAL[..usize::from(self.schedules)];
        let mut machines = self.bench.open(schedules)?;
        let mut cpu = agreement::cpu(0)?;
        for case in self.bench.tables()? {
            for float in self.bench.floats() {
                for a in agreement::applications(&case, float, &mut cpu)? {
                    let tally = tallies.entry(a.op.name()).or_default();
                    tally.check(&a, &format!("{case:?}"), &mut machines, &mut cpu)?;
                }
            }
        }
        Ok(tallies)
    }
}

/// Whether there are kernels that disagree; for `bench`, before it times any.
pub(super) fn refuse_wrong_ones(bench: &Workbench, machines: &mut [Machine]) -> Outcome {
    let mut cpu = agreement::cpu(0)?;
    for case in bench.tables()? {
        for float in bench.floats() {
            for a in agreement::applications(&case, float, &mut cpu)? {
                let mut tally = Tally::default();
                tally.check(&a, &format!("{case:?}"), machines, &mut cpu)?;
                if let Some(failure) = tally.failures.pop() {
                    return Err(Failure::error(format!("a kernel is wrong and is not timed:\n{failure}")));
                }
            }
        }
    }
    Ok(())
}

impl Tally {
    fn check(
        &mut self,
        a: &Application,
        case: &str,
        machines: &mut [Machine],
        cpu: &mut CpuDevice,
    ) -> Outcome {
        let mut expected = None;
        for machine in machines {
            let have = match a.run(machine.device()) {
                Ok(have) => have,
                Err(Error::NoKernel { why, .. }) => {
                    *self.refused.entry(why).or_default() += 1;
                    return Ok(());
                }
                Err(e @ (Error::Lost { .. } | Error::NoDevice(_) | Error::Memory { .. })) => {
                    return Err(e.into());
                }
                Err(e) => {
                    self.failures.push(format!("{case}: {a}: {e}"));
                    return Ok(());
                }
            };
            let expected = match &mut expected {
                Some(expected) => expected,
                none => none.insert(a.expected(cpu)?),
            };
            for worst in expected.compare(&have) {
                if self.worst.as_ref().is_none_or(|(w, _)| worst.ratio > w.ratio) {
                    self.worst = Some((worst, case.into()));
                }
                if !worst.holds() {
                    self.failures.push(format!("{case}: {a}: {worst}"));
                    return Ok(());
                }
            }
        }
        self.agreed += 1;
        self.shapes.insert(a.to_string());
        Ok(())
    }
}

fn table(tallies: &BTreeMap<&'static str, Tally>) -> String {
    let mut lines = vec![format!(
        "{:16} {:>6} {:>7} {:>7} {:>6}  nearest to the tolerance",
        "op", "runs", "shapes", "refused", "failed"
    )];
    let (checked, others): (Vec<_>, Vec<_>) =
        tallies.iter().partition(|(_, t)| t.agreed + t.failures.len() > 0);
    for (op, t) in checked {
        let worst = t.worst.as_ref().map_or("-".into(), |(w, case)| format!("{:.2} in {case}", w.ratio));
        let (runs, shapes, refused) = (t.agreed, t.shapes.len(), t.refused.values().sum::<usize>());
        lines.push(format!("{op:16} {runs:6} {shapes:7} {refused:7} {:6}  {worst}", t.failures.len()));
        let reasons = t.refused.iter().map(|(why, n)| format!("{:16} {n} refused: {why}", ""));
        lines.extend(reasons.take(REASONS));
        if t.refused.len() > REASONS {
            lines.push(format!("{:16} and for {} reasons more", "", t.refused.len() - REASONS));
        }
    }
    if !others.is_empty() {
        let names: Vec<&str> = others.iter().map(|(op, _)| **op).collect();
        lines.push(format!("without a kernel: {}", names.join(", ")));
    }
    lines.join("\n")
}
