//! `transfusion kernels bisect`.
use super::{
    rows::entry,
    workbench::{Machine, Machines},
};
use crate::{
    commands::programs::{Sizing, Which},
    console,
    failure::{Failure, Outcome},
};
use clap::Args;
use transfusion::rehearsal::Scene;
use transfusion_core::{
    Error,
    agreement::{self, Application, Walk, Worst},
    cases::{self, Case},
    device::CpuDevice,
    ops::NAMES,
    plan::{self, Plan, Step},
    tensor::DType,
};
use transfusion_ptxsim::Schedule;

/// Find the first step of a program at which a device leaves the CPU.
///
/// A training step of a fresh model on the built-in shapes, or what sampling replays behind a prompt, runs op by
/// op: each step alone, with the inputs that the CPU has there, so that no step is blamed for what an earlier one
/// did. A result agrees if no row is further from the op in f64 than twice what an unfused implementation in the
/// same storage type is, plus one unit in the last place. In the simulator every check is on.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion kernels bisect --batch 1 --positions 128 --set model.num_hidden_layers=2
  transfusion kernels bisect --batch 1 --positions 128 --cu my_attention.cu
  transfusion kernels bisect --batch 2 --positions 128 --program sample
  transfusion kernels bisect --case rmsnorm/301x1024 --cu my_rmsnorm.cu
  transfusion kernels bisect --preset tiny --device cuda")]
pub(crate) struct Bisect {
    #[command(flatten)]
    sizing: Sizing,
    #[command(flatten)]
    machines: Machines,
    /// What runs.
    #[arg(long, value_enum, default_value_t = Which::Train)]
    program: Which,
    /// One case of the ops' tables instead, as `rmsnorm/301x1024`: its ops, forward and backward.
    #[arg(
        long,
        value_name = "OP/NAME",
        conflicts_with_all = ["preset", "config", "set", "batch", "positions", "program", "seed"]
    )]
    case: Option<String>,
    /// Seed of weights and data.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
}

/// A machine in an examination, the CPU that it is held against, and the steps that agreed so far.
struct Examined {
    machine: Machine,
    cpu: CpuDevice,
    agreed: usize,
}

impl Bisect {
    /// Runs and prints.
    pub(crate) fn run(self) -> Outcome {
        let machine = self.machines.open(&Schedule::SEVERAL[..1])?.remove(0);
        let mut examined = Examined { machine, cpu: agreement::cpu(0)?, agreed: 0 };
        match &self.case {
            Some(name) => examined.case(&find(name)?)?,
            None => {
                let config = self.sizing.resolve()?;
                for scene in self.sizing.scenes(self.program, &config, self.seed)? {
                    examined.scene(scene)?;
                }
            }
        }
        match examined.agreed {
            0 => Err(Failure::error("no step has a kernel that takes its shapes in bf16")),
            agreed => console::print(format!("all {agreed} steps agree")),
        }
    }
}

/// The case of a name.
fn find(name: &str) -> Outcome<Case> {
    let op = name.split('/').next().unwrap_or(name);
    let mut of_op = cases::all().into_iter().filter(|case| case.op == op).peekable();
    if of_op.peek().is_none() {
        let why = format!("{name} is no case: there is no op {op}");
        return Err(Failure::usage(why).hint(format!("the ops are {}", NAMES.join(", "))));
    }
    let mut names = Vec::new();
    for case in of_op {
        match format!("{case:?}") {
            same if same == name => return Ok(case),
            other => names.push(other),
        }
    }
    let why = format!("there is no case {name}");
    Err(Failure::usage(why).hint(format!("the cases of {op} are {}", names.join(", "))))
}

impl Examined {
    /// Goes through a program; its first step that does not agree is the failure.
    fn scene(&mut self, Scene { name, graph, given }: Scene) -> Outcome {
        let target = self.machine.device().target();
        let plan = Plan::on(&graph, target.as_ref())?;
        let mut walk = Walk::new(&graph, plan::steps(&graph)?, given);
        for (i, step) in plan.steps.iter().enumerate() {
            let application = walk.step(&mut self.cpu)?;
            let application = application.ok_or_else(|| Failure::error(format!("step {i} has no node")))?;
            if !step.is_view() {
                self.step(&application, &plan, step, &format!("step {i} of {name}"))?;
            }
        }
        Ok(())
    }

    /// Goes through the ops of a case that have kernels.
    fn case(&mut self, case: &Case) -> Outcome {
        let target = self.machine.device().target();
        let all = agreement::applications(case, DType::Bf16, &mut self.cpu)?;
        for (i, application) in all.iter().enumerate() {
            let plan = match application.plan(target.as_ref()) {
                Err(Error::NoKernel { .. }) => continue,
                other => other?,
            };
            for step in &plan.steps {
                self.step(application, &plan, step, &format!("step {i} of {case:?}"))?;
            }
        }
        Ok(())
    }

    fn step(&mut self, a: &Application, plan: &Plan, step: &Step, name: &str) -> Outcome {
        let Some(why) = self.disagreement(a, plan, step)? else {
            self.agreed += 1;
            return Ok(());
        };
        let kernels: Vec<&str> = step.launches.iter().filter_map(entry).collect();
        let (op, kernels, at) = (step.op.name(), kernels.join(", "), step.at);
        let agreed = self.agreed;
        Err(Failure::error(format!("{agreed} steps agree; {name} ({at}) does not: {op} by {kernels}\n{why}")))
    }

    /// What is wrong with a step on the machine.
    fn disagreement(&mut self, a: &Application, plan: &Plan, step: &Step) -> Outcome<Option<String>> {
        let have = match a.run(self.machine.device()) {
            Ok(have) => have,
            Err(e @ (Error::Lost { .. } | Error::NoDevice(_) | Error::Memory { .. })) => return Err(e.into()),
            Err(e) => return Ok(Some(e.to_string())),
        };
        let broken = a.expected(&mut self.cpu)?.compare(&have).into_iter().find(|w| !w.holds());
        Ok(broken.map(|w| {
            let Worst { result, row, column, have, want, bound, ratio } = w;
            let tensor = step.outs.get(result).map_or_else(String::new, |slot| plan.describe(slot));
            format!(
                "result {result}, {tensor}, at [{row}, {column}]: {have} for {want}, \
                 {ratio:.2} of the tolerance {bound:.3e}"
            )
        }))
    }
}
