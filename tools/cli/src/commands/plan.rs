//! `transfusion plan`.
use crate::{
    commands::kernels::Model,
    console::{self, bytes, count},
    failure::{Failure, Outcome},
    settings::Settings,
};
use clap::Args;
use serde_json::{Map, Value, json};
use transfusion::{
    config::ModelConfig,
    footprint::{self, Alternative, Footprint, Step},
    model::{self, Capacity},
    programs::{self, Named},
    run::RunConfig,
    train::TrainOptions,
};
use transfusion_core::{launch::Target, op::Kind, plan};

/// Show the bytes and the work of a training step and of sampling, before anything runs; or find the settings
/// whose training step fits.
///
/// The figures are those of the very plans that would run; no memory is taken for them. On a CPU they are for one
/// thread on each of this machine's cores. A batch is one micro-batch of packed rows; FLOPs count every position of
/// it as used. With --fit, every way to recompute and to store gradients and moments is tried with the largest
/// micro-batches that fit; an optimiser step keeps its rows. The one to take is marked: what works least, and of
/// those that work as much what rounds least. Leave room for what a driver keeps for itself, and for the samples
/// that a run draws on the way.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion plan --preset 7b --batch 1
  transfusion plan --preset 7b --fit 141GB --target H200
  transfusion plan --preset tiny --batch 8 --listing | less
  transfusion plan --preset 1.4b --batch 2 --positions 2048 --json")]
pub(crate) struct Plan {
    #[command(flatten)]
    settings: Settings,
    /// Rows of a batch in training, and sequences that are sampled at once.
    #[arg(long, value_name = "B", required_unless_present = "fit", value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: Option<u16>,
    /// Find settings whose training step takes at most so many bytes: 141GB, 80GiB, 500000000.
    #[arg(long, value_name = "BYTES", value_parser = size, conflicts_with_all = ["batch", "listing"])]
    fit: Option<u64>,
    /// Positions of a row, and of a cached sequence [default: what the settings say].
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(3..=1 << 20))]
    positions: Option<u32>,
    /// Plan for this GPU, the working space of its kernels included [default: for the CPU].
    #[arg(long, value_enum)]
    target: Option<Model>,
    /// Print JSON.
    #[arg(long, conflicts_with = "listing")]
    json: bool,
    /// Print every step of the training plans: its outputs and inputs with types and places, the bytes
    /// that it moves, its FLOPs; with a + those that recomputation repeats.
    #[arg(long)]
    listing: bool,
}

/// Bytes with their unit, decimal or binary.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let power = |base: f64, letter| {
        ["", "k", "m", "g", "t"].iter().position(|l| *l == letter).map(|i| base.powi(i as i32))
    };
    let unit = unit.trim().to_ascii_lowercase();
    let unit = unit.strip_suffix('b').unwrap_or(&unit);
    let factor = match unit.strip_suffix('i') {
        Some(letter) => power(1024.0, letter).filter(|_| !letter.is_empty()),
        None => power(1000.0, unit),
    };
    let number = number.parse::<f64>().ok();
    let (number, factor) = number.zip(factor).ok_or("bytes are written 141GB, 80GiB or 500000000")?;
    Ok((number * factor) as u64)
}

/// One of the plans that sampling replays.
struct Sampling {
    name: &'static str,
    positions: usize,
    plan: plan::Plan,
}

/// What there is to print about a batch.
struct Page {
    config: RunConfig,
    capacity: Capacity,
    footprint: Footprint,
    sampling: Vec<Sampling>,
}

impl Plan {
    /// Plans and prints.
    pub(crate) fn run(self) -> Outcome {
        let mut config = self.settings.resolve()?;
        config.train.rows = self.batch.map_or(config.train.rows, usize::from);
        config.train.positions = self.positions.map_or(config.train.positions, |n| n as usize);
        config.model.check()?;
        config.train.check()?;
        let target = self.target.map(|model| model.roofline().target);
        if let Some(budget) = self.fit {
            return self.fit(&config, target.as_ref(), budget);
        }
        let step = Step::new(&config, target.as_ref())?;
        if self.listing {
            console::print(format!("training step\n{}", step.loss))?;
            return console::print(format!("update\n{}", step.update));
        }
        let sampling = sampling(&config, target.as_ref())?;
        let capacity = config.train.capacity(&config.model);
        let page = Page { config, capacity, footprint: Footprint::new(&step, 0), sampling };
        if self.json {
            return console::print(
                serde_json::to_string_pretty(&self.in_json(&page)).map_err(Failure::error)?,
            );
        }
        console::print(self.in_words(&page))
    }

    fn in_words(&self, page: &Page) -> String {
        let Page { config, capacity, footprint, sampling } = page;
        let Capacity { rows, positions, images, .. } = *capacity;
        let mut lines = vec![
            format!("{}: {} parameters, {}", self.settings.preset, parameters(&config.model), stored(config)),
            format!(
                "training step{}, {rows} rows of {positions} positions, room for {images} images",
                self.machine()
            ),
        ];
        for (name, n) in footprint.bytes().into_iter().chain([("total", footprint.total())]) {
            lines.push(format!("  {name:12}{:>12}  {n} bytes", bytes(n)));
        }
        let Footprint { loss, repeated, update, .. } = *footprint;
        let flops = |n: u64| format!("{}FLOP", count(n as f64));
        let repeated = match repeated {
            0 => String::new(),
            n => format!(", of which {} again", flops(n)),
        };
        let parts = format!("(loss {}{repeated}, update {})", flops(loss), flops(update));
        lines.push(format!("  {:12}{:>12}FLOP  {parts}", "work", count((loss + update) as f64)));
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

    fn in_json(&self, page: &Page) -> Value {
        let Page { config, capacity, footprint, sampling } = page;
        let Capacity { rows, positions, images, .. } = *capacity;
        let sampling: Map<String, Value> = sampling
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
            "target": self.target.map(|m| m.roofline().target.name),
            "parameters": parameters(&config.model),
            "dtype": config.model.dtype().name(),
            "batch": rows,
            "positions": positions,
            "images": images,
            "bytes": bytes_in_json(footprint),
            "flops": flops_in_json(footprint),
            "sampling": sampling,
        })
    }

    /// For which machine, unless it is the CPU.
    fn machine(&self) -> String {
        self.target.map_or(String::new(), |m| format!(" on {}", m.roofline().target.name))
    }

    /// Finds settings that fit, and prints all that were tried.
    fn fit(&self, config: &RunConfig, target: Option<&Target>, budget: u64) -> Outcome {
        let all = footprint::fit(config, target, budget)?;
        let chosen = all.iter().position(|a| a.fits);
        if self.json {
            let json = self.choice_in_json(config, budget, &all, chosen);
            console::print(serde_json::to_string_pretty(&json).map_err(Failure::error)?)?;
        } else {
            console::print(self.choice_in_words(config, budget, &all, chosen))?;
        }
        let least = all.iter().min_by_key(|a| a.footprint.total());
        match (chosen, least) {
            (None, Some(least)) => Err(Failure::error(format!(
                "no training step fits into {budget} bytes; the least takes {}, with {}",
                least.footprint.total(),
                settings(least, &config.train)
            ))
            .hint("fewer --positions take less; so does a smaller model")),
            _ => Ok(()),
        }
    }

    fn choice_in_words(
        &self,
        config: &RunConfig,
        budget: u64,
        all: &[Alternative],
        chosen: Option<usize>,
    ) -> String {
        let (train, rows) = (&config.train, config.train.rows * config.train.accumulation);
        let mut lines = vec![
            format!(
                "{}: {} parameters, {}; {rows} rows of {} positions to a step{}, in {} ({budget} bytes)",
                self.settings.preset,
                parameters(&config.model),
                stored(config),
                train.positions,
                self.machine(),
                bytes(budget)
            ),
            format!(
                "  {:10}{:10}{:10}{:>5}{:>15}{:>16}{:>9}{:>14}{:>9}",
                "recompute",
                "gradients",
                "moments",
                "rows",
                "micro-batches",
                "bytes",
                "share",
                "FLOP a row",
                "of model"
            ),
        ];
        for (i, Alternative { train, footprint, fits }) in all.iter().enumerate() {
            let mark = match (chosen == Some(i), fits) {
                (true, _) => '*',
                (false, true) => ' ',
                (false, false) => '-',
            };
            let work = footprint.loss as f64;
            let share = 100.0 * footprint.total() as f64 / budget.max(1) as f64;
            let [recompute, gradients, moments] = words(train, ["recompute", "gradients", "moments"]);
            lines.push(format!(
                "{mark} {recompute:10}{gradients:10}{moments:10}{:>5}{:>15}{:>16}{share:>8.1}%{:>14}{:>9.3}",
                train.rows,
                train.accumulation,
                footprint.total(),
                count(work / train.rows as f64),
                work / footprint.model() as f64,
            ));
        }
        lines.push("* to take, - does not fit".into());
        lines.extend(chosen.map(|i| settings(&all[i], train)));
        lines.join("\n")
    }

    fn choice_in_json(
        &self,
        config: &RunConfig,
        budget: u64,
        all: &[Alternative],
        chosen: Option<usize>,
    ) -> Value {
        let alternatives = all.iter().map(|Alternative { train, footprint, fits }| {
            json!({
                "recompute": train.recompute,
                "gradients": train.gradients,
                "moments": train.moments,
                "rows": train.rows,
                "accumulation": train.accumulation,
                "bytes": bytes_in_json(footprint),
                "flops": flops_in_json(footprint),
                "fits": fits,
            })
        });
        json!({
            "preset": self.settings.preset,
            "target": self.target.map(|m| m.roofline().target.name),
            "budget": budget,
            "positions": config.train.positions,
            "rows_per_step": config.train.rows * config.train.accumulation,
            "alternatives": alternatives.collect::<Vec<_>>(),
            "chosen": chosen,
            "set": chosen.map(|i| all[i].settings(&config.train)),
        })
    }
}

/// How to say that an alternative is wanted.
fn settings(alternative: &Alternative, given: &TrainOptions) -> String {
    match alternative.settings(given) {
        words if words.is_empty() => "the settings as they are".into(),
        words => format!("--set {}", words.join(" ")),
    }
}

/// Settings as they are written.
fn words<const N: usize>(train: &TrainOptions, keys: [&str; N]) -> [String; N] {
    let json = serde_json::to_value(train).unwrap_or_default();
    keys.map(|key| json[key].as_str().unwrap_or_default().to_string())
}

fn bytes_in_json(footprint: &Footprint) -> Value {
    let all = footprint.bytes().into_iter().chain([("total", footprint.total())]);
    all.map(|(name, n)| (name.to_string(), Value::from(n))).collect::<Map<_, _>>().into()
}

/// As executed; `model` leaves out what recomputation repeats.
fn flops_in_json(footprint: &Footprint) -> Value {
    let Footprint { loss, repeated, update, .. } = *footprint;
    json!({
        "loss": loss, "update": update, "total": loss + update, "repeated": repeated, "model": footprint.model(),
    })
}

/// The plans that sampling replays: a prompt, a token, and a guided step of an image.
fn sampling(config: &RunConfig, target: Option<&Target>) -> Outcome<Vec<Sampling>> {
    let programs = programs::sampling(config).into_iter().filter(|p| p.name != "commit");
    let planned = |p: Named| {
        let plan = plan::Plan::on(&p.program.graph(&config.model)?, target)?;
        Ok(Sampling { name: p.name, positions: p.positions, plan })
    };
    programs.map(planned).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let sizes = [
            ("141GB", 141_000_000_000),
            ("80GiB", 80 << 30),
            ("1.5 tb", 1_500_000_000_000),
            ("2kib", 2048),
            ("500", 500),
            ("7B", 7),
        ];
        for (text, want) in sizes {
            assert_eq!(size(text), Ok(want), "{text}");
        }
        for wrong in ["", "GB", "12xB", "-3GB", "1.2.3GB", "5iB", "NaN"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
