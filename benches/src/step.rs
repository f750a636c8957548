//! A whole training step, beside PyTorch's on the same weights and the same batch.
use crate::{
    contest::{self, Opponent, apart},
    error::{Error, Result},
    machine::Machine,
    peer::{Peer, numbers, words},
    row::Row,
    statistics::Schedule,
};
use serde_json::json;
use std::time::{Duration, Instant};
use transfusion::{
    batch::Batch,
    engine::{Engine, Program},
    hf, model,
    rehearsal::{self, Packing},
    run::RunConfig,
    sample::Cancel,
    train::Trainer,
};
use transfusion_core::{device::Device, launch::Cost};

/// Steps whose losses and gradient norms both sides must agree on.
const CHECKED: usize = 4;
/// Seconds that a variant of the other side is timed for, to find the fastest.
const TRIAL: f64 = 1.0;

/// A training step to be measured.
pub struct Step {
    trainer: Trainer,
    batch: Batch,
    config: RunConfig,
}

/// How documents are packed where nobody says: shapes as in the demonstration; text in one window; latents in one
/// long document, as the paper's.
pub fn packing(config: &RunConfig) -> Packing {
    match config.model.image() {
        Some(image) if image.channels == 3 => Packing::Shapes,
        _ => Packing::Equal(1),
    }
}

impl Step {
    /// A model with fresh weights on a device, and a batch.
    ///
    /// # Errors
    /// If the configuration makes no sense, or memory is short.
    pub fn new(config: &RunConfig, packing: Packing, device: Box<dyn Device>) -> Result<Step> {
        let seed = config.train.seed;
        let engine = Engine::initialised(config.model.clone(), device, seed)?;
        let trainer = Trainer::new(engine, config.train.clone())?;
        let batch = rehearsal::batch(config, packing, seed)?;
        Ok(Step { trainer, batch, config: config.clone() })
    }

    /// The batch.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// The model in training.
    pub fn trainer(&mut self) -> &mut Trainer {
        &mut self.trainer
    }

    /// Takes one step; its loss and gradient norm.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn take(&mut self) -> Result<(f64, f64)> {
        let report = self.trainer.step(std::slice::from_ref(&self.batch))?;
        Ok((report.loss, report.grad_norm))
    }

    /// Milliseconds of every step in about so many seconds.
    ///
    /// # Errors
    /// As [`Step::take`].
    pub fn block(&mut self, seconds: f64) -> Result<Vec<f64>> {
        let (begin, mut times) = (Instant::now(), Vec::new());
        while times.len() < 3 || begin.elapsed() < Duration::from_secs_f64(seconds) {
            let start = Instant::now();
            self.take()?;
            times.push(1e3 * start.elapsed().as_secs_f64());
        }
        Ok(times)
    }

    /// Model FLOPs, and the bytes of all operands.
    ///
    /// # Errors
    /// If a plan cannot be made.
    pub fn work(&mut self) -> Result<Cost> {
        let bytes = self.plans()?.iter().map(|p| p.cost().bytes).sum();
        Ok(Cost { flops: model::step_flops(&self.config.model, &self.batch), bytes })
    }

    fn plans(&mut self) -> Result<[transfusion_core::plan::Plan; 2]> {
        let loss = Program::Loss(self.trainer.capacity(), self.trainer.options().loss());
        let update = Program::Update(self.trainer.options().update());
        let engine = self.trainer.engine();
        Ok([engine.plan(loss)?, engine.plan(update)?])
    }

    /// The least seconds of a step: those of each of its ops, added up.
    ///
    /// # Errors
    /// If a plan cannot be made.
    pub fn least(&mut self, machine: &Machine) -> Result<Option<f64>> {
        let bf16 = self.config.model.torch_dtype == "bfloat16";
        let plans = self.plans()?;
        let steps = plans.iter().flat_map(|p| &p.steps);
        Ok(steps.map(|s| machine.ceilings.seconds(s.cost, bf16)).sum())
    }

    fn shape(&self) -> String {
        let (g, b) = (self.batch.geometry, &self.batch);
        format!("{} x {}, {} tokens, {} images", g.rows, g.positions, b.used(), b.image_count)
    }
}

/// Hands weights and batch to the other side; its variants.
fn prepare(peer: &mut Peer, step: &mut Step) -> Result<Vec<String>> {
    let config = &step.config;
    let folder = peer.folder();
    let exported = folder.path().join("weights");
    let _ = std::fs::remove_dir_all(&exported);
    hf::export(step.trainer.engine(), &exported)?;
    let batch = folder.batch("batch.safetensors", &step.batch, &config.train)?;
    let asked = json!({
        "do": "step.prepare", "config": &config.model, "train": &config.train, "batch": batch,
        "weights": exported.join("model.safetensors"), "dtype": config.model.dtype().name(),
        "device": peer.device,
    });
    words(&peer.ask(asked)?, "variants")
}

/// The variant that was asked for alone, where there is one.
fn only(variants: Vec<String>, wanted: Option<&str>) -> Result<Vec<String>> {
    match wanted {
        None => Ok(variants),
        Some(wanted) if variants.iter().any(|v| v == wanted) => Ok(vec![wanted.into()]),
        Some(wanted) => Err(Error::peer(format!("PyTorch has no variant {wanted:?} here"))
            .with_remedy(format!("the variants are: {}", variants.join("; ")))),
    }
}

/// How far losses are from ours, and gradient norms, which count a tenth.
fn judge(ours: &[(f64, f64)], told: &serde_json::Value) -> Result<f64> {
    let (losses, norms) = (numbers(told, "losses")?, numbers(told, "norms")?);
    let (our_losses, our_norms): (Vec<f64>, Vec<f64>) = ours.iter().copied().unzip();
    Ok(apart(&our_losses, &losses).max(apart(&our_norms, &norms) / 10.0))
}

/// Measures a step, beside PyTorch's where there is one. `variant` is the other side's only one.
///
/// # Errors
/// What either side refuses; results that do not agree.
pub fn measure(
    preset: &str,
    mut step: Step,
    machine: &Machine,
    peer: Option<(&mut Peer, Option<&str>)>,
    schedule: Schedule,
    note: &mut dyn FnMut(String),
    cancel: Cancel<'_>,
) -> Result<Row> {
    let (dtype, train) = (step.config.model.dtype().name(), step.config.train.clone());
    let asked = match peer {
        Some((peer, variant)) => {
            note("PyTorch's variants are compiled, and checked against ours: that takes a while".into());
            let variants = only(prepare(peer, &mut step)?, variant)?;
            Some((peer, variants))
        }
        None => None,
    };
    // The first steps also take memory and raise clocks.
    let ours: Vec<(f64, f64)> = (0..CHECKED).map(|_| step.take()).collect::<Result<_>>()?;
    let rates: Vec<f64> = (0..CHECKED as u64).map(|i| train.learning_rate(i)).collect();
    let judge = |told: &serde_json::Value| judge(&ours, told);
    let opponent = asked.map(|(peer, variants)| Opponent {
        peer,
        variants,
        bounds: vec![],
        build: json!({ "do": "step.build", "rates": rates }),
        judge: &judge,
        tolerance: if dtype == "bf16" { 1e-2 } else { 1e-4 },
        time: json!({ "do": "step.time" }),
        trial: TRIAL,
    });
    let row = Row {
        preset: preset.into(),
        dtype: dtype.into(),
        shape: step.shape(),
        unit: Some("tokens/s".into()),
        ..Row::new(machine, "step", "training step")
    };
    let row = contest::measure(row, &mut |s| step.block(s), opponent, schedule, note, cancel)?;
    let mut row = row.rated(step.work()?, step.least(machine)?, machine);
    row.rate = row.ms.map(|ms| step.batch.used() as f64 / ms * 1e3);
    Ok(row)
}
