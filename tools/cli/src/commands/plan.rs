//! `transfusion plan`.
use crate::{
    console::{self, bytes, count},
    failure::{Failure, Outcome},
    settings::Settings,
};
use clap::Args;
use serde_json::{Value, json};
use transfusion::{
    config::ModelConfig,
    engine::Program,
    model::{self, Capacity},
    programs::{self, Named},
    run::RunConfig,
};
use transfusion_core::{op::Kind, plan};

/// Show the bytes and the work of a training step and of sampling, before anything runs.
///
/// The figures are those of the very plans that would run; no memory is taken for them. On a CPU, working
/// space inside an op, and bf16 operands while they are decoded, come on top. A batch is one
/// micro-batch of packed rows; FLOPs count every position of it as used.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion plan --preset 7b --batch 1
  transfusion plan --preset tiny --batch 8 --listing | less
  transfusion plan --preset 1.4b --batch 2 --positions 2048 --json")]
pub(crate) struct Plan {
    #[command(flatten)]
    settings: Settings,
    /// Rows of a batch in training, and sequences that are sampled at once.
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: u16,
    /// Positions of a row, and of a cached sequence [default: what the settings say].
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(3..=1 << 20))]
    positions: Option<u32>,
    /// Print JSON.
    #[arg(long, conflicts_with = "listing")]
    json: bool,
    /// Print every step of the training plans: its outputs and inputs with types and places, the bytes
    /// that it moves, its FLOPs.
    #[arg(long)]
    listing: bool,
}

/// The plans of a training step.
struct Training {
    capacity: Capacity,
    loss: plan::Plan,
    update: plan::Plan,
}

/// One of the plans that sampling replays.
struct Sampling {
    name: &'static str,
    positions: usize,
    plan: plan::Plan,
}

impl Plan {
    /// Plans and prints.
    pub(crate) fn run(self) -> Outcome {
        let mut config = self.settings.resolve()?;
        config.train.rows = usize::from(self.batch);
        config.train.positions = self.positions.map_or(config.train.positions, |n| n as usize);
        config.model.check()?;
        config.train.check()?;
        let training = Training::new(&config)?;
        if self.listing {
            console::print(format!("training step\n{}", training.loss))?;
            return console::print(format!("update\n{}", training.update));
        }
        let sampling = sampling(&config)?;
        if self.json {
            let json = self.in_json(&config, &training, &sampling);
            return console::print(serde_json::to_string_pretty(&json).map_err(Failure::error)?);
        }
        console::print(self.in_words(&config, &training, &sampling))
    }

    fn in_words(&self, config: &RunConfig, training: &Training, sampling: &[Sampling]) -> String {
        let Capacity { rows, positions, images, .. } = training.capacity;
        let mut lines = vec![
            format!("{}: {} parameters, {}", self.settings.preset, parameters(&config.model), stored(config)),
            format!("training step, {rows} rows of {positions} positions, room for {images} images"),
        ];
        for (name, n) in training.bytes() {
            lines.push(format!("  {name:12}{:>12}  {n} bytes", bytes(n)));
        }
        let [loss, update] = training.flops().map(|n| n as f64);
        lines.push(format!(
            "  {:12}{:>12}FLOP  (loss {}FLOP, update {}FLOP)",
            "work",
            count(loss + update),
            count(loss),
            count(update)
        ));
        lines.push(format!("sampling, {rows} sequences, weights of {}", stored(config)));
        lines.push(format!(
            "  {:12}{:>9}{:>14}{:>14}{:>16}",
            "", "positions", "cache each", "scratch", "work"
        ));
        for s in sampling {
            let (each, scratch) = (bytes(cache(&s.plan, rows)), bytes(s.plan.scratch_bytes as u64));
            let work = count(s.plan.cost().flops as f64);
            lines.push(format!("  {:12}{:>9}{each:>14}{scratch:>14}{work:>12}FLOP", s.name, s.positions));
        }
        lines.join("\n")
    }

    fn in_json(&self, config: &RunConfig, training: &Training, sampling: &[Sampling]) -> Value {
        let Capacity { rows, positions, images, .. } = training.capacity;
        let bytes: serde_json::Map<String, Value> =
            training.bytes().into_iter().map(|(name, n)| (name.into(), n.into())).collect();
        let [loss, update] = training.flops();
        let sampling: serde_json::Map<String, Value> = sampling
            .iter()
            .map(|s| {
                let plan = json!({
                    "positions": s.positions,
                    "cache_bytes_per_sequence": cache(&s.plan, rows),
                    "input_bytes": s.plan.input_bytes,
                    "scratch_bytes": s.plan.scratch_bytes,
                    "flops": s.plan.cost().flops,
                });
                (s.name.into(), plan)
            })
            .collect();
        json!({
            "preset": self.settings.preset,
            "parameters": parameters(&config.model),
            "dtype": config.model.dtype().name(),
            "batch": rows,
            "positions": positions,
            "images": images,
            "bytes": bytes,
            "flops": { "loss": loss, "update": update, "total": loss + update },
            "sampling": sampling,
        })
    }
}

impl Training {
    fn new(config: &RunConfig) -> Outcome<Training> {
        let capacity = config.train.capacity(&config.model);
        Ok(Training {
            capacity,
            loss: planned(&config.model, Program::Loss(capacity, config.train.loss()))?,
            update: planned(&config.model, Program::Update(config.train.update()))?,
        })
    }

    /// Bytes by what they are for; scratch is shared, so that the hungrier plan counts.
    fn bytes(&self) -> Vec<(&'static str, u64)> {
        let state = |kind| self.update.state_bytes(kind);
        let mut all = vec![
            ("parameters", state(Kind::Param)),
            ("gradients", state(Kind::Grad)),
            ("optimizer", state(Kind::Optim)),
            ("ema", state(Kind::Ema)),
            ("inputs", (self.loss.input_bytes + self.update.input_bytes) as u64),
            ("scratch", self.loss.scratch_bytes.max(self.update.scratch_bytes) as u64),
        ];
        all.push(("total", all.iter().map(|(_, n)| n).sum()));
        all
    }

    fn flops(&self) -> [u64; 2] {
        [self.loss.cost().flops, self.update.cost().flops]
    }
}

/// The plans that sampling replays: a prompt, a token, and a guided step of an image.
fn sampling(config: &RunConfig) -> Outcome<Vec<Sampling>> {
    let programs = programs::sampling(config).into_iter().filter(|p| p.name != "commit");
    let planned = |p: Named| {
        Ok(Sampling { name: p.name, positions: p.positions, plan: planned(&config.model, p.program)? })
    };
    programs.map(planned).collect()
}

fn planned(c: &ModelConfig, program: Program) -> Outcome<plan::Plan> {
    Ok(plan::Plan::new(&program.graph(c)?)?)
}

fn parameters(c: &ModelConfig) -> u64 {
    model::weights(c).iter().map(|w| w.elements() as u64).sum()
}

fn stored(config: &RunConfig) -> String {
    let of = if config.train.ema > 0.0 { ", with running means" } else { "" };
    format!("{}{of}", config.model.dtype().name())
}

/// Cache bytes of a sequence, its twin for guidance and its picture included.
fn cache(plan: &plan::Plan, sequences: usize) -> u64 {
    plan.state_bytes(Kind::Cache) / sequences.max(1) as u64
}
