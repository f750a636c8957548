//! Training step by step, in the application's own loop.
use crate::{
    batch::Batch,
    config::{Float, ModelConfig},
    engine::{Engine, Program},
    error::{Error, Result},
    model::{Capacity, LossOptions, Recompute, UpdateOptions},
};
use serde::{Deserialize, Serialize};
use std::path::Path;
use transfusion_core::{
    checkpoint::{Checkpoint, Writer},
    device::{Device, Place},
    op::Kind,
    ops::AdamW,
    random,
    tensor::{DType, Spec},
};

/// How a model is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainOptions {
    /// Optimiser steps.
    pub steps: u64,
    /// Packed rows of a micro-batch.
    pub rows: usize,
    /// Positions of a row.
    pub positions: usize,
    /// Images that a micro-batch has room for; 0 is computed from the rows.
    pub images: usize,
    /// Micro-batches of an optimiser step.
    pub accumulation: usize,
    /// Learning rate after warm-up.
    pub lr: f64,
    /// Learning rate at the end of the cosine.
    pub lr_min: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Largest gradient norm.
    pub max_norm: f64,
    /// Limit of the decay of the running means of the weights; 0 keeps none.
    pub ema: f64,
    /// What the backward pass computes again instead of keeping it: `none`, `cheap` (passes over rows), or
    /// `blocks` (whole layers). Changes memory and time, and no bit.
    pub recompute: Recompute,
    /// What gradients are summed in over the micro-batches of a step: `float32` or `bfloat16`, which rounds once
    /// for each micro-batch.
    pub gradients: Float,
    /// What AdamW's moments are stored as: `float32` or `bfloat16`.
    pub moments: Float,
    /// Whether a step has the same bits every time, as it has on other devices in any case. Without, kernels for Hopper add
    /// up attention's gradient as their blocks come, which spares them to wait for turns: two runs differ in their last
    /// digits, and so does one that is resumed.
    pub deterministic: bool,
    /// Seed of weights, order, noise levels and noise.
    pub seed: u64,
}

impl Default for TrainOptions {
    /// The paper's optimiser.
    fn default() -> TrainOptions {
        TrainOptions {
            steps: 1000,
            rows: 8,
            positions: 256,
            images: 0,
            accumulation: 1,
            lr: 3e-4,
            lr_min: 1.5e-5,
            warmup: 100,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            max_norm: 1.0,
            ema: 0.0,
            recompute: Recompute::None,
            gradients: Float::Float32,
            moments: Float::Float32,
            deterministic: true,
            seed: 0,
        }
    }
}

impl TrainOptions {
    /// Refuses what cannot be trained with.
    ///
    /// # Errors
    /// Names the key, its value and what is allowed.
    pub fn check(&self) -> Result<()> {
        let refuse = |key: &str, value: String, want: &str| {
            Err(Error::Config(format!("train.{key} is {value}; it must be {want}")))
        };
        let counts =
            [("rows", self.rows), ("positions", self.positions), ("accumulation", self.accumulation)];
        for (key, value) in counts {
            if value == 0 || value > 1 << 20 {
                return refuse(key, value.to_string(), "between 1 and 2^20");
            }
        }
        for (key, value) in [("beta1", self.beta1), ("beta2", self.beta2), ("ema", self.ema)] {
            if !(0.0..1.0).contains(&value) {
                return refuse(key, value.to_string(), "at least 0 and below 1");
            }
        }
        let positive = [("lr", self.lr), ("eps", self.eps), ("max_norm", self.max_norm)];
        for (key, value) in positive {
            if !(value > 0.0 && value.is_finite()) {
                return refuse(key, value.to_string(), "above 0");
            }
        }
        for (key, value) in [("lr_min", self.lr_min), ("weight_decay", self.weight_decay)] {
            if !(value >= 0.0 && value.is_finite()) {
                return refuse(key, value.to_string(), "0 or more");
            }
        }
        self.check_narrow()
    }

    /// Refuses sums in bf16 that would stop growing, or shrinking, unnoticed: one of its numbers swallows what is
    /// below a 256th of it.
    fn check_narrow(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::Config(why));
        if self.gradients == Float::Bfloat16 && self.accumulation > BF16_TERMS {
            return refuse(format!(
                "train.gradients bfloat16 cannot sum {} micro-batches; set train.accumulation to {BF16_TERMS} or less, \
                 with larger train.rows, or train.gradients=float32",
                self.accumulation
            ));
        }
        let least = 1.0 / BF16_TERMS as f64;
        let slow = [("beta1", self.beta1), ("beta2", self.beta2)].into_iter().find(|(_, b)| 1.0 - b < least);
        if let (Float::Bfloat16, Some((key, beta))) = (self.moments, slow) {
            return refuse(format!(
                "train.moments bfloat16 cannot decay by {beta}; set train.{key} to {} or less, or train.moments=float32",
                1.0 - least
            ));
        }
        Ok(())
    }

    /// The learning rate of step `step`, counted from 0: linear warm-up, then half a cosine.
    pub fn learning_rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1);
        let done = ((step - self.warmup) as f64 / span as f64).min(1.0);
        self.lr_min + 0.5 * (self.lr - self.lr_min) * (1.0 + (std::f64::consts::PI * done).cos())
    }

    /// What update `t`, counted from 1, reads as `schedule` (see `Graph::adamw`).
    pub(crate) fn schedule(&self, lr: f64, t: f64) -> [f32; 3] {
        let correction = |beta: f64| (1.0 - beta.powf(t)) as f32;
        [lr as f32, correction(self.beta1), correction(self.beta2)]
    }

    /// The capacities of a micro-batch for a model.
    pub fn capacity(&self, c: &ModelConfig) -> Capacity {
        let positions = self.rows * self.positions;
        let images = match c.image() {
            None => 0,
            Some(_) if self.images > 0 => self.images,
            // An image with its BOI, EOI, BOS and EOS and a caption of sixteen tokens.
            Some(image) => positions.div_ceil(image.patches() + 20).max(1),
        };
        Capacity { rows: self.rows, positions: self.positions, text_rows: positions, images }
    }

    /// What the program of a step's first micro-batch is built from.
    pub fn loss(&self) -> LossOptions {
        LossOptions {
            recompute: self.recompute,
            gradients: self.gradients,
            unordered: !self.deterministic,
            ..LossOptions::TRAIN
        }
    }

    /// And those of its other micro-batches, which add to the gradients that the first begins.
    pub fn loss_accumulating(&self) -> LossOptions {
        LossOptions { begins: false, ..self.loss() }
    }

    /// Of all programs of the loss that a step takes.
    pub fn losses(&self) -> Vec<LossOptions> {
        let more = (self.accumulation > 1).then(|| self.loss_accumulating());
        [self.loss()].into_iter().chain(more).collect()
    }

    /// What the optimiser's program is built from.
    pub fn update(&self) -> UpdateOptions {
        UpdateOptions {
            adamw: AdamW {
                beta1: self.beta1,
                beta2: self.beta2,
                eps: self.eps,
                weight_decay: self.weight_decay,
            },
            max_norm: self.max_norm,
            ema: self.ema > 0.0,
            gradients: self.gradients,
            moments: self.moments,
        }
    }
}

/// How many numbers of one size a sum in bf16 can hold before it swallows the next: its significand has 8 bits.
pub(crate) const BF16_TERMS: usize = 256;

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// Total loss.
    pub loss: f64,
    /// Cross entropy per text target, nats.
    pub loss_text: f64,
    /// Mean squared error per image.
    pub loss_image: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Whether the gradient was not finite, so that nothing changed.
    pub skipped: bool,
    /// Text targets.
    pub text_targets: usize,
    /// Images.
    pub images: usize,
    /// Positions of the rows that hold a document.
    pub tokens: usize,
}

/// The trainer's few numbers that a checkpoint holds beside its tensors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Steps that changed the weights.
    pub updates: u64,
    /// Steps skipped because a gradient was not finite.
    pub skipped: u64,
    /// Skipped steps in a row.
    pub skipped_in_a_row: u64,
    /// Documents visited.
    pub cursor: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Images seen.
    pub images: u64,
    /// Seed of the run.
    pub seed: u64,
}

/// Steps with a gradient that is not finite, in a row, that stop a training.
pub const MAX_SKIPPED: u64 = 10;

/// A model in training.
#[derive(Debug)]
pub struct Trainer {
    engine: Engine,
    options: TrainOptions,
    capacity: Capacity,
    progress: Progress,
}

/// Files of a checkpoint, and the states each holds.
const FILES: [(&str, Kind); 3] = [
    ("model.safetensors", Kind::Param),
    ("optimizer.safetensors", Kind::Optim),
    ("ema.safetensors", Kind::Ema),
];

impl Trainer {
    /// Trains the engine's weights.
    ///
    /// # Errors
    /// If an option makes no sense, or the device has no room.
    pub fn new(mut engine: Engine, options: TrainOptions) -> Result<Trainer> {
        options.check()?;
        let capacity = options.capacity(engine.config());
        if options.ema > 0.0 && !engine.has_ema() {
            engine.start_ema()?;
        }
        let progress = Progress { seed: options.seed, ..Default::default() };
        let mut trainer = Trainer { engine, capacity, progress, options };
        // What copies weights goes before the largest plan takes its memory.
        trainer.engine.open(Program::Update(trainer.options.update()))?;
        trainer.start_masters()?;
        for options in trainer.options.losses() {
            trainer.engine.open(Program::Loss(capacity, options))?;
        }
        Ok(trainer)
    }

    /// Goes on from a checkpoint of the same model and options.
    ///
    /// # Errors
    /// If the checkpoint is damaged or of another model.
    pub fn resume(
        device: Box<dyn Device>,
        options: TrainOptions,
        checkpoint: &Checkpoint,
    ) -> Result<Trainer> {
        let config = read_config(checkpoint)?;
        let mut trainer = Trainer::new(Engine::new(config, device)?, options)?;
        let text = checkpoint.text("state.json")?;
        trainer.progress = serde_json::from_str(&text).map_err(|e| {
            Error::file(checkpoint.dir().join("state.json"), format!("is no trainer state: {e}"))
        })?;
        for (file, kind) in FILES {
            let states = trainer.states(kind);
            trainer.engine.load_states(checkpoint, file, kind, &states)?;
        }
        Ok(trainer)
    }

    /// Writes a checkpoint directory; it appears whole or not at all.
    ///
    /// # Errors
    /// If it exists, or the disk refuses.
    pub fn save(&mut self, dir: &Path) -> Result<()> {
        let mut writer = Writer::create(dir)?;
        for (file, kind) in FILES {
            let states = self.states(kind);
            if states.is_empty() {
                continue;
            }
            let listed: Vec<(&str, Spec)> = states.iter().map(|(n, s)| (n.as_str(), *s)).collect();
            let device = self.engine.device();
            writer.tensors(file, &listed, |name, into| device.read(Place::State(kind, name), into))?;
        }
        let text = |value: serde_json::Result<String>| value.map_err(|e| Error::file(dir, e));
        writer.text("config.json", &text(serde_json::to_string_pretty(self.engine.config()))?)?;
        writer.text("state.json", &text(serde_json::to_string_pretty(&self.progress))?)?;
        Ok(writer.commit()?)
    }

    /// The states of a kind that a checkpoint holds.
    fn states(&self, kind: Kind) -> Vec<(String, Spec)> {
        let weights = self.engine.states(kind);
        match kind {
            Kind::Ema if self.options.ema == 0.0 => vec![],
            Kind::Optim => {
                let masters = self.engine.config().dtype() == DType::Bf16;
                let moments = self.options.moments.dtype();
                let parts = [("m", moments), ("v", moments), ("master", DType::F32)];
                let parts = if masters { &parts[..] } else { &parts[..2] };
                let of = |(name, spec): &(String, Spec)| {
                    let part = |&(part, dtype)| (format!("{name}.{part}"), Spec { dtype, ..*spec });
                    parts.iter().map(part).collect::<Vec<_>>()
                };
                weights.iter().flat_map(of).collect()
            }
            _ => weights,
        }
    }

    /// Master copies start at the weights.
    fn start_masters(&mut self) -> Result<()> {
        if self.engine.config().dtype() != DType::Bf16 {
            return Ok(());
        }
        for w in self.engine.weights().to_vec() {
            let values = self.engine.read_weight(Kind::Param, &w.name)?;
            self.engine.write_weight(Kind::Optim, &format!("{}.master", w.name), &values)?;
        }
        Ok(())
    }

    /// The model.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// The model, when training is over.
    pub fn into_engine(self) -> Engine {
        self.engine
    }

    /// How it is trained.
    pub fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// The capacities of a micro-batch.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Where it stands.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Notes how many documents were visited, for the checkpoint.
    pub fn set_cursor(&mut self, cursor: u64) {
        self.progress.cursor = cursor;
    }

    /// One optimiser step over micro-batches: losses and gradients are means over all of them.
    ///
    /// # Errors
    /// If there is no batch, one has another geometry than the model takes, the device fails, or ten steps in a row had a
    /// gradient that is not finite.
    pub fn step(&mut self, batches: &[Batch]) -> Result<StepReport> {
        let geometry = crate::run::geometry(self.engine.config(), self.capacity);
        if batches.is_empty() {
            return Err(Error::Data("a step without a batch has no gradient".into()));
        }
        if let Some(batch) = batches.iter().find(|b| b.geometry != geometry) {
            return Err(Error::Data(format!(
                "a batch of {:?} where {geometry:?} is trained",
                batch.geometry
            )));
        }
        let has_images = self.engine.config().image().is_some();
        let mut report = StepReport {
            step: self.progress.step + 1,
            lr: self.options.learning_rate(self.progress.step),
            text_targets: batches.iter().map(|b| b.text_count).sum(),
            images: batches.iter().map(|b| b.image_count).sum(),
            tokens: batches.iter().map(Batch::used).sum(),
            ..Default::default()
        };
        for (i, batch) in batches.iter().enumerate() {
            let options = if i == 0 { self.options.loss() } else { self.options.loss_accumulating() };
            let plan = self.engine.open(Program::Loss(self.capacity, options))?;
            feed(&mut self.engine, plan, batch, [report.text_targets, report.images])?;
            if has_images {
                self.engine.ints(plan, "seed", &seed_words(self.options.seed))?;
            }
            self.engine.run(plan)?;
            report.loss += f64::from(self.engine.number(plan, "loss")?);
            report.loss_text += f64::from(self.engine.number(plan, "loss_text")?);
            if has_images {
                report.loss_image += f64::from(self.engine.number(plan, "loss_image")?);
            }
        }
        self.update(&mut report)?;
        Ok(report)
    }

    fn update(&mut self, report: &mut StepReport) -> Result<()> {
        let plan = self.engine.open(Program::Update(self.options.update()))?;
        let t = (self.progress.updates + 1) as f64;
        self.engine.floats(plan, "schedule", &self.options.schedule(report.lr, t))?;
        if self.options.ema > 0.0 {
            let decay = self.options.ema.min((1.0 + t) / (10.0 + t));
            self.engine.floats(plan, "ema_decay", &[decay as f32])?;
        }
        self.engine.run(plan)?;
        report.grad_norm = f64::from(self.engine.number(plan, "grad_norm")?);
        report.skipped = !report.grad_norm.is_finite();
        let p = &mut self.progress;
        p.step += 1;
        p.tokens += report.tokens as u64;
        p.images += report.images as u64;
        if !report.skipped {
            p.updates += 1;
            p.skipped_in_a_row = 0;
            return Ok(());
        }
        p.skipped += 1;
        p.skipped_in_a_row += 1;
        if p.skipped_in_a_row >= MAX_SKIPPED {
            return Err(Error::Training(format!(
                "the gradient was not finite for {MAX_SKIPPED} steps in a row, the last at step {}; lower \
                 train.lr (it is {}) or look for broken data",
                p.step, self.options.lr
            )));
        }
        Ok(())
    }
}

/// The model's configuration in a checkpoint.
pub(crate) fn read_config(checkpoint: &Checkpoint) -> Result<ModelConfig> {
    let text = checkpoint.text("config.json")?;
    serde_json::from_str(&text).map_err(|e| Error::file(checkpoint.dir().join("config.json"), e))
}

/// A seed as two i32 words.
pub(crate) fn seed_words(seed: u64) -> [i32; 2] {
    random::halves(seed).map(u32::cast_signed)
}

/// Writes a batch into the inputs of a loss program; `counts` are what the losses are averaged over:
/// text targets and images.
pub(crate) fn feed(
    engine: &mut Engine,
    plan: transfusion_core::device::PlanId,
    batch: &Batch,
    counts: [usize; 2],
) -> Result<()> {
    for (name, values) in [
        ("tokens", &batch.tokens),
        ("positions", &batch.positions),
        ("row_start", &batch.row_start),
        ("row_end", &batch.row_end),
        ("text_rows", &batch.text_rows),
        ("targets", &batch.targets),
    ] {
        engine.ints(plan, name, values)?;
    }
    engine.floats(plan, "text_count", &[counts[0] as f32])?;
    if engine.config().image().is_some() {
        engine.ints(plan, "image_rows", &batch.image_rows)?;
        engine.ints(plan, "noise_keys", &batch.noise_keys)?;
        for (name, values) in [
            ("images", &batch.images),
            ("times", &batch.times),
            ("coefficients", &batch.coefficients),
            ("image_weights", &batch.image_weights),
        ] {
            engine.floats(plan, name, values)?;
        }
        engine.floats(plan, "image_count", &[counts[1] as f32])?;
    }
    Ok(())
}

/// What a model makes of documents that it is not trained on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// Sum of the cross entropy over text targets, nats.
    pub text_nats: f64,
    /// Text targets.
    pub text_targets: usize,
    /// Text targets that are bytes: all but the ends of documents and the beginnings of images.
    pub text_bytes: usize,
    /// Noise level and mean squared error of each image.
    pub images: Vec<(f32, f64)>,
}

impl Evaluation {
    /// Nats per text target.
    pub fn nats_per_token(&self) -> Option<f64> {
        (self.text_targets > 0).then(|| self.text_nats / self.text_targets as f64)
    }

    /// Bits per byte of text: what the ends of documents cost is spread over the bytes.
    pub fn bits_per_byte(&self) -> Option<f64> {
        (self.text_bytes > 0).then(|| self.text_nats / std::f64::consts::LN_2 / self.text_bytes as f64)
    }

    /// Mean squared error over all images.
    pub fn image_error(&self) -> Option<f64> {
        mean(self.images.iter().map(|(_, e)| *e))
    }

    /// Mean squared error of the images in each of ten equal ranges of noise levels.
    pub fn by_level(&self) -> [Option<f64>; 10] {
        std::array::from_fn(|bucket| {
            let inside = |t: f32| (((t / 100.0).ceil() as usize).saturating_sub(1)).min(9) == bucket;
            mean(self.images.iter().filter(|(t, _)| inside(*t)).map(|(_, e)| *e))
        })
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.fold((0.0, 0), |(s, n), v| (s + v, n + 1));
    (n > 0).then(|| sum / f64::from(n))
}

/// Adds what a batch yields; the noise is that of `seed`.
///
/// # Errors
/// If the device fails.
pub fn evaluate(
    engine: &mut Engine,
    capacity: Capacity,
    batch: &Batch,
    seed: u64,
    into: &mut Evaluation,
) -> Result<()> {
    let options = LossOptions { ema: engine.has_ema(), ..LossOptions::EVAL };
    let plan = engine.open(Program::Loss(capacity, options))?;
    feed(engine, plan, batch, [batch.text_count, batch.image_count])?;
    let has_images = engine.config().image().is_some();
    if has_images {
        engine.ints(plan, "seed", &seed_words(seed))?;
    }
    engine.run(plan)?;
    into.text_nats += f64::from(engine.number(plan, "loss_text")?) * batch.text_count as f64;
    into.text_targets += batch.text_count;
    into.text_bytes += batch.targets.iter().filter(|target| (0..256).contains(*target)).count();
    if has_images {
        let mut errors = vec![0.0; capacity.images];
        engine.output(plan, "image_errors", &mut errors)?;
        let used = batch.image_weights.iter().zip(&batch.times).zip(&errors).filter(|((w, _), _)| **w > 0.0);
        into.images.extend(used.map(|((_, t), e)| (*t, f64::from(*e))));
    }
    Ok(())
}
