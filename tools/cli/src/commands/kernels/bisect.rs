//! `transfusion kernels bisect`.
use super::{
    rows::entry,
    workbench::{Machine, Machines},
};
use crate::{
    commands::programs::Sizing,
    console,
    failure::{Failure, Outcome},
};
use clap::Args;
use transfusion::rehearsal::{self, Scene};
use transfusion_core::{
    Error,
    agreement::{self, Application, Walk, Worst},
    plan::{self, Plan, Step},
};
use transfusion_ptxsim::Schedule;

/// Find the first step of a training step at which a device leaves the CPU.
///
/// One training step of a fresh model on the built-in shapes runs op by op: each step alone, with the inputs
/// that the CPU has there, so that no step is blamed for what an earlier one did. A result agrees if no row is
/// further from the op in f64 than twice what an unfused implementation in the same storage type is, plus one
/// unit in the last place. In the simulator every check is on.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion kernels bisect --batch 1 --positions 128 --set model.num_hidden_layers=2
  transfusion kernels bisect --batch 1 --positions 128 --cu my_attention.cu
  transfusion kernels bisect --preset tiny --device cuda")]
pub(crate) struct Bisect {
    #[command(flatten)]
    sizing: Sizing,
    #[command(flatten)]
    machines: Machines,
    /// Seed of weights and data.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
}

impl Bisect {
    /// Runs and prints.
    pub(crate) fn run(self) -> Outcome {
        let config = self.sizing.resolve()?;
        let mut machine = self.machines.open(&Schedule::SEVERAL[..1])?.remove(0);
        let mut agreed = 0;
        for scene in rehearsal::training_step(&config, self.seed)? {
            agreed += follow(&scene, &mut machine)?;
        }
        console::print(format!("all {agreed} steps agree"))
    }
}

/// How many steps of a program agree: all that launch something, or the first that does not is the failure.
fn follow(scene: &Scene, machine: &mut Machine) -> Outcome<usize> {
    let target = machine.device().target();
    let plan = Plan::on(&scene.graph, target.as_ref())?;
    let nodes = plan::steps(&scene.graph)?;
    let mut walk = Walk::new(&scene.graph, nodes, scene.given.clone());
    let (mut cpu, mut agreed) = (agreement::cpu()?, 0);
    for (i, step) in plan.steps.iter().enumerate() {
        let Some(application) = walk.step(&mut cpu)? else { break };
        if step.is_view() {
            continue;
        }
        if let Some(why) = disagreement(&application, &plan, step, machine)? {
            let kernels: Vec<&str> = step.launches.iter().filter_map(entry).collect();
            let (op, kernels) = (step.op.name(), kernels.join(", "));
            let at = format!("step {i} of {} ({})", scene.name, step.at);
            return Err(Failure::error(format!(
                "{agreed} steps agree; {at} does not: {op} by {kernels}\n{why}"
            )));
        }
        agreed += 1;
    }
    Ok(agreed)
}

/// What is wrong with a step on a machine.
fn disagreement(a: &Application, plan: &Plan, step: &Step, machine: &mut Machine) -> Outcome<Option<String>> {
    let have = match a.run(machine.device()) {
        Ok(have) => have,
        Err(e @ (Error::Lost { .. } | Error::NoDevice(_) | Error::Memory { .. })) => return Err(e.into()),
        Err(e) => return Ok(Some(e.to_string())),
    };
    let broken = a.expected()?.compare(&have).into_iter().find(|w| !w.holds());
    Ok(broken.map(|w| {
        let Worst { result, row, column, have, want, bound, ratio } = w;
        let tensor = step.outs.get(result).map_or_else(String::new, |slot| plan.describe(slot));
        format!(
            "result {result}, {tensor}, at [{row}, {column}]: {have} for {want}, \
             {ratio:.2} of the tolerance {bound:.3e}"
        )
    }))
}
