//! `transfusion kernels traffic`.
use super::{rows::Row, workbench::Simulated};
use crate::{
    commands::programs::{Sizing, Which},
    console,
    failure::{Failure, Outcome},
};
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use transfusion::rehearsal::Scene;
use transfusion_core::{
    agreement::Walk,
    device::{Device, resolve::Library},
    plan::{self, Plan},
};
use transfusion_ptxsim::{Class, Counters, Schedule, SimDevice};

/// Bytes of a sector.
const SECTOR: u64 = 32;

/// Count what the kernels of a program move, in the simulator.
///
/// A training step of a fresh model on the built-in shapes, or what sampling replays behind a prompt, runs op by op.
/// For each op: bytes of global memory in sectors of 32 bytes that its kernels touch at all, each sector that a launch
/// reads and each that it writes once, and those of every request on its own as if there were no cache, both over the
/// least possible, each operand once (less than that where rows are unused); bank conflicts, passes over
/// shared memory beyond the fewest possible; the share of warp instructions that are tensor-core products;
/// instructions of threads. Steps that launch the same are one row, and a row says what all of them do. Few rows
/// for each SM make what blocks read once weigh more than in a real step: --sms makes the machine small.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion kernels traffic --batch 4 --positions 512 --sms 4 --set model.num_hidden_layers=1
  transfusion kernels traffic --batch 8 --positions 512 --sms 4 --program denoise
  transfusion kernels traffic --batch 1 --positions 128 --cu my_rmsnorm.cu --json")]
pub(crate) struct Traffic {
    #[command(flatten)]
    sizing: Sizing,
    #[command(flatten)]
    simulated: Simulated,
    /// What runs.
    #[arg(long, value_enum, default_value_t = Which::Train)]
    program: Which,
    /// Seed of weights and data.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Print JSON: [{"op", "steps", "least", "kernels": {name: {"touched", "moved", "conflicts", "tensor_share",
    /// "thread_instructions"}}}].
    #[arg(long)]
    json: bool,
}

/// Steps that launch the same, and what they did by kernel.
struct Counted {
    row: Row,
    kernels: BTreeMap<String, Counters>,
}

impl Traffic {
    /// Runs and prints.
    pub(crate) fn run(self) -> Outcome {
        let config = self.sizing.resolve()?;
        let mut sim = self.simulated.open(Schedule::default())?;
        let mut all = Vec::new();
        for scene in self.sizing.scenes(self.program, &config, self.seed)? {
            count(scene, &mut sim, &mut all)?;
        }
        if self.json {
            let rows: Vec<Value> = all.iter().map(Counted::json).collect();
            return console::print(serde_json::to_string_pretty(&rows).map_err(Failure::error)?);
        }
        console::print(table(&all))
    }
}

/// Runs a program, and adds what each step did.
fn count(Scene { graph, given, .. }: Scene, sim: &mut SimDevice, all: &mut Vec<Counted>) -> Outcome {
    let plan = Plan::on(&graph, sim.target().as_ref())?;
    let library = Library::new(sim.target().map_or("sm_80", |t| t.arch), vec![])?;
    let mut walk = Walk::new(&graph, plan::steps(&graph)?, given);
    for step in &plan.steps {
        sim.take_counters();
        walk.step(sim)?;
        let kernels = sim.take_counters();
        if kernels.is_empty() {
            continue;
        }
        let row = Row::of(step, &library);
        match all.iter_mut().find(|c| c.row.is_like(&row)) {
            Some(like) => like.add(&kernels),
            None => all.push(Counted { row, kernels }),
        }
    }
    Ok(())
}

/// Warp instructions that are tensor-core products, percent of all.
fn tensor_share(c: &Counters) -> f64 {
    let tensor = c.classes.get(&Class::Tensor).map_or(0, |c| c.warp_instructions);
    100.0 * tensor as f64 / c.total.warp_instructions.max(1) as f64
}

fn moved(c: &Counters) -> u64 {
    SECTOR * c.total.global_sectors
}

fn touched(c: &Counters) -> u64 {
    SECTOR * (c.read_sectors + c.written_sectors)
}

impl Counted {
    fn add(&mut self, kernels: &BTreeMap<String, Counters>) {
        self.row.count += 1;
        for (name, counters) in kernels {
            let none = || Counters { kernel: name.clone(), ..Counters::default() };
            self.kernels.entry(name.clone()).or_insert_with(none).add(counters);
        }
    }

    /// What all kernels did.
    fn all(&self, of: fn(&Counters) -> u64) -> u64 {
        self.kernels.values().map(of).sum()
    }

    fn json(&self) -> Value {
        let kernel = |(name, c): (&String, &Counters)| {
            let counts = json!({
                "touched": touched(c), "moved": moved(c), "conflicts": c.total.bank_conflicts, "tensor_share": tensor_share(c),
                "thread_instructions": c.total.thread_instructions,
            });
            (name.clone(), counts)
        };
        let kernels: serde_json::Map<String, Value> = self.kernels.iter().map(kernel).collect();
        json!({
            "op": self.row.op, "steps": self.row.count, "least": self.row.total().bytes, "kernels": kernels,
        })
    }
}

fn table(all: &[Counted]) -> String {
    let kernel = all.iter().flat_map(|c| c.kernels.keys()).map(String::len).max().unwrap_or(0);
    let op = all.iter().map(|c| c.row.op.len()).max().unwrap_or(0);
    let mut lines = vec![format!(
        "{:>5}  {:op$}  {:>11} {:>11} {:>6} {:>11} {:>6}  {:kernel$} {:>11} {:>9} {:>7} {:>14}",
        "steps",
        "op",
        "least bytes",
        "touched",
        "ratio",
        "moved",
        "ratio",
        "kernel",
        "moved",
        "conflicts",
        "tensor",
        "thread instr."
    )];
    for c in all {
        let least = c.row.total().bytes;
        let over = |bytes: u64| format!("{bytes:>11} {:>6.2}", bytes as f64 / least.max(1) as f64);
        let (once, always) = (over(c.all(touched)), over(c.all(moved)));
        for (i, (name, counters)) in c.kernels.iter().enumerate() {
            let step = match i {
                0 => {
                    format!("{:>5}  {:op$}  {least:>11} {once} {always}", c.row.count, c.row.op)
                }
                _ => format!("{:5}  {:op$}  {:11} {:18} {:18}", "", "", "", "", ""),
            };
            let (t, own, share) = (&counters.total, moved(counters), tensor_share(counters));
            lines.push(format!(
                "{step}  {name:kernel$} {own:>11} {:>9} {share:>6.1}% {:>14}",
                t.bank_conflicts, t.thread_instructions
            ));
        }
    }
    lines.join("\n")
}
