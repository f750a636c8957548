//! A whole training step, beside PyTorch's on the same weights and the same batch.
use crate::{
    error::{Error, Result},
    machine::Machine,
    peer::{Peer, numbers, words},
    row::Row,
    statistics::{Schedule, alternate, median},
};
use serde_json::json;
use std::time::{Duration, Instant};
use transfusion::{
    batch::Batch,
    engine::{Engine, Program},
    hf,
    model::{self, LossOptions},
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
        let loss = Program::Loss(self.trainer.capacity(), LossOptions::TRAIN);
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

/// The other side of a step.
struct Theirs<'a> {
    peer: &'a mut Peer,
    /// The fastest variant, which is prepared.
    variant: String,
    others: std::collections::BTreeMap<String, f64>,
    /// How far its losses and norms are from ours at most.
    apart: f64,
}

impl<'a> Theirs<'a> {
    /// Hands weights and batch over, checks every variant against our first steps, and keeps the fastest. `wanted`
    /// leaves only one.
    fn new(
        peer: &'a mut Peer,
        step: &mut Step,
        wanted: Option<&str>,
        note: &mut dyn FnMut(String),
        cancel: Cancel<'_>,
    ) -> Result<Theirs<'a>> {
        let config = step.config.clone();
        let folder = peer.folder();
        let exported = folder.path().join("weights");
        let _ = std::fs::remove_dir_all(&exported);
        hf::export(step.trainer.engine(), &exported)?;
        let batch = folder.batch("batch.safetensors", &step.batch, &config.train)?;
        let dtype = config.model.dtype().name();
        let asked = json!({
            "do": "step.prepare", "config": &config.model, "train": &config.train, "dtype": dtype,
            "weights": exported.join("model.safetensors"), "batch": batch, "device": peer.device,
        });
        let mut variants = words(&peer.ask(asked)?, "variants")?;
        if let Some(wanted) = wanted {
            if !variants.iter().any(|v| v == wanted) {
                let known = variants.join("; ");
                return Err(Error::peer(format!("PyTorch has no variant {wanted:?} here"))
                    .with_remedy(format!("the variants are: {known}")));
            }
            variants = vec![wanted.into()];
        }
        let rates: Vec<f64> = (0..CHECKED as u64).map(|i| config.train.learning_rate(i)).collect();
        let ours: Vec<(f64, f64)> = (0..CHECKED).map(|_| step.take()).collect::<Result<_>>()?;
        let mut theirs = Theirs { peer, variant: String::new(), others: Default::default(), apart: 0.0 };
        let mut refusals = Vec::new();
        for variant in &variants {
            cancel.check()?;
            note(format!("PyTorch: {variant} (checked against ours first; compiling takes a while)"));
            match theirs.trial(variant, &rates, &ours, tolerance(dtype)) {
                Ok(ms) => {
                    theirs.others.insert(variant.clone(), ms);
                }
                Err(Error::Peer { what, .. }) => {
                    note(format!("left out: {what}"));
                    refusals.push(what);
                }
                Err(e) => return Err(e),
            }
        }
        let fastest = theirs.others.iter().min_by(|a, b| a.1.total_cmp(b.1)).map(|(v, _)| v.clone());
        let Some(fastest) = fastest else {
            let why = refusals.first().cloned().unwrap_or_default();
            return Err(Error::peer(format!("no variant of PyTorch can be measured; the first: {why}")));
        };
        theirs.apart = theirs.check(&fastest, &rates, &ours, tolerance(dtype))?;
        theirs.peer.ask(json!({ "do": "step.time", "seconds": TRIAL }))?;
        theirs.others.remove(&fastest);
        theirs.variant = fastest;
        Ok(theirs)
    }

    /// Checks a variant, and times it for a moment.
    fn trial(&mut self, variant: &str, rates: &[f64], ours: &[(f64, f64)], tolerance: f64) -> Result<f64> {
        self.check(variant, rates, ours, tolerance)?;
        // What is compiled at the first step, or at the second, is not timed.
        self.peer.ask(json!({ "do": "step.time", "seconds": 0.0 }))?;
        Ok(median(&self.block(TRIAL)?))
    }

    /// How far the first steps of a variant are from ours.
    fn check(&mut self, variant: &str, rates: &[f64], ours: &[(f64, f64)], tolerance: f64) -> Result<f64> {
        let told = self.peer.ask(json!({ "do": "step.check", "variant": variant, "rates": rates }))?;
        let (losses, norms) = (numbers(&told, "losses")?, numbers(&told, "norms")?);
        let apart = |a: f64, b: f64| (a - b).abs() / a.abs().max(1e-12);
        let each = ours.iter().zip(losses.iter().zip(&norms));
        let worst = each.map(|((l, n), (tl, tn))| apart(*l, *tl).max(apart(*n, *tn) / 10.0));
        let worst = worst.fold(0.0, |a: f64, b| if b > a || b.is_nan() { b } else { a });
        if losses.len() != ours.len() || norms.len() != ours.len() || !(worst <= tolerance) {
            let said: Vec<String> =
                losses.iter().zip(&norms).map(|(l, n)| format!("{l:.6} ({n:.4})")).collect();
            let have: Vec<String> = ours.iter().map(|(l, n)| format!("{l:.6} ({n:.4})")).collect();
            let (said, have) = (said.join(", "), have.join(", "));
            return Err(Error::peer(format!("{variant}: losses (and gradient norms) {said}, ours {have}")));
        }
        Ok(worst)
    }

    fn block(&mut self, seconds: f64) -> Result<Vec<f64>> {
        numbers(&self.peer.ask(json!({ "do": "step.time", "seconds": seconds }))?, "ms")
    }
}

/// How far losses may be apart, relative; gradient norms ten times that.
fn tolerance(dtype: &str) -> f64 {
    if dtype == "bf16" { 1e-2 } else { 1e-4 }
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
    let mut theirs = match peer {
        Some((peer, variant)) => Some(Theirs::new(peer, &mut step, variant, note, cancel)?),
        None => None,
    };
    // The first steps take memory and raise clocks.
    (0..3).try_for_each(|_| step.take().map(drop))?;
    note(format!("{preset}: {} rounds of {} s a side", schedule.rounds, schedule.seconds));
    let pair = match &mut theirs {
        Some(theirs) => alternate(schedule, &mut |s| step.block(s), Some(&mut |s| theirs.block(s)), cancel)?,
        None => alternate(schedule, &mut |s| step.block(s), None, cancel)?,
    };
    let mut row = Row {
        preset: preset.into(),
        dtype: step.config.model.dtype().name().into(),
        shape: step.shape(),
        ..Row::new(machine, "step", "training step").timed(&pair)
    };
    let (work, least) = (step.work()?, step.least(machine)?);
    row = row.rated(work, least, machine);
    row.rate = row.ms.map(|ms| step.batch.used() as f64 / ms * 1e3);
    row.unit = Some("tokens/s".into());
    if let Some(theirs) = theirs {
        row.torch = Some(theirs.peer.version.clone());
        row.torch_variant = Some(theirs.variant);
        row.others = theirs.others;
        row.apart = Some(theirs.apart);
    }
    Ok(row)
}
