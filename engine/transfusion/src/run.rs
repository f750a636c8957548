//! A training run in a directory: data, steps, validation, sample grids, checkpoints, metrics, report.
use crate::{
    baseline::LinearDenoiser,
    batch::{Batch, Geometry, PackOptions, Packer, PairOrder, Prefetcher},
    config::ModelConfig,
    data::{self, Holdout, OpenOptions, Part, Shared},
    diffusion,
    engine::Engine,
    error::{Error, Result},
    hf,
    metrics::{self, Metrics, Record},
    model::Capacity,
    picture::Picture,
    report,
    run_dir::{RunDir, write_atomic},
    sample::{self, Cancel, Goal, SampleOptions},
    train::{Evaluation, Progress, StepReport, TrainOptions, Trainer, evaluate, read_config},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    time::Instant,
};
use transfusion_core::{
    checkpoint::{self, Checkpoint},
    device::Device,
    op::Kind,
};

/// Everything that decides a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// What is trained.
    pub model: ModelConfig,
    /// How.
    #[serde(default)]
    pub train: TrainOptions,
    /// On what.
    #[serde(default)]
    pub data: DataOptions,
    /// What it leaves behind.
    #[serde(default)]
    pub output: OutputOptions,
}

/// What a run is trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataOptions {
    /// Folders, files, or `shapes`.
    pub paths: Vec<PathBuf>,
    /// Share of the documents (of a text: of its end) that is kept for validation.
    pub val_fraction: f64,
    /// As many bytes from the end of the text instead; 0 is by share.
    pub val_bytes: u64,
    /// Share of caption pairs whose image comes first.
    pub image_first: f32,
    /// Share of documents that lose their condition.
    pub condition_drop: f32,
    /// Highest noise level of an image before its caption.
    pub noise_limit: u32,
    /// Memory that decoded pictures and texts may take, GiB.
    pub memory_gib: f64,
}

impl Default for DataOptions {
    fn default() -> DataOptions {
        DataOptions {
            paths: vec![],
            val_fraction: 0.05,
            val_bytes: 0,
            image_first: 0.2,
            condition_drop: 0.1,
            noise_limit: 500,
            memory_gib: 8.0,
        }
    }
}

/// What a run leaves behind, and how often; 0 is never.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutputOptions {
    /// Steps between lines of metrics.
    pub log_every: u64,
    /// Steps between validations.
    pub validate_every: u64,
    /// Documents that a validation looks at.
    pub validate_documents: u64,
    /// Steps between sample grids.
    pub sample_every: u64,
    /// Steps between checkpoints; the last step always leaves one.
    pub checkpoint_every: u64,
    /// Checkpoints that are kept; 0 is all.
    pub keep_checkpoints: usize,
    /// Whether the finished model is compared with the best linear denoiser of the same pictures, where
    /// they have an end.
    pub linear_baseline: bool,
    /// How grids are sampled.
    pub sample: SampleOptions,
}

impl Default for OutputOptions {
    fn default() -> OutputOptions {
        OutputOptions {
            log_every: 10,
            validate_every: 500,
            validate_documents: 200,
            sample_every: 1000,
            checkpoint_every: 1000,
            keep_checkpoints: 3,
            linear_baseline: true,
            sample: SampleOptions { goal: Goal::Image, steps: 30, ..SampleOptions::default() },
        }
    }
}

impl RunConfig {
    /// A preset of model and training.
    ///
    /// # Errors
    /// If there is no such preset.
    pub fn preset(name: &str) -> Result<RunConfig> {
        let model = ModelConfig::preset(name)?;
        let paper = TrainOptions {
            positions: model.max_position_embeddings,
            rows: 1,
            warmup: 4000,
            steps: 250_000,
            accumulation: 512,
            ..TrainOptions::default()
        };
        let train = match name {
            "tiny" => TrainOptions {
                steps: 4000,
                rows: 2,
                positions: 512,
                lr: 3e-3,
                lr_min: 2e-5,
                warmup: 60,
                ema: 0.995,
                ..TrainOptions::default()
            },
            "text-tiny" => TrainOptions {
                steps: 2000,
                rows: 12,
                positions: 64,
                lr: 1e-3,
                lr_min: 1e-4,
                warmup: 100,
                beta2: 0.99,
                ..TrainOptions::default()
            },
            _ => paper,
        };
        let data = match name {
            // Little noise before a caption: what the picture shows must weigh more than which
            // captions are common.
            "tiny" => DataOptions { image_first: 0.4, noise_limit: 250, ..DataOptions::default() },
            _ => DataOptions::default(),
        };
        Ok(RunConfig { model, train, data, output: OutputOptions::default() })
    }

    /// Sets `key` (dotted, as in `train.lr`) to `value` (JSON, or a bare word).
    ///
    /// # Errors
    /// If there is no such key, with the nearest one, or the value is of another type.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let mut root = serde_json::to_value(&*self).map_err(|e| Error::Config(e.to_string()))?;
        let mut at = &mut root;
        for part in key.split('.') {
            let Some(map) = at.as_object_mut() else {
                return Err(Error::Config(format!("{key}: {part} is below a plain value")));
            };
            let unknown = unknown_key(key, part, map.keys());
            at = map.get_mut(part).ok_or(Error::Config(unknown))?;
        }
        *at = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.into()));
        *self = serde_json::from_value(root).map_err(|e| Error::Config(format!("{key}={value}: {e}")))?;
        Ok(())
    }

    /// Reads a file of settings over this configuration: an object with any of its keys.
    ///
    /// # Errors
    /// Names the file and the key.
    pub fn merge(&mut self, path: &Path) -> Result<()> {
        let text =
            std::fs::read_to_string(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
        let over: Value =
            serde_json::from_str(&text).map_err(|e| Error::file(path, format!("is no JSON: {e}")))?;
        let mut root = serde_json::to_value(&*self).map_err(|e| Error::file(path, e))?;
        overlay("", &mut root, over).map_err(|why| Error::file(path, why))?;
        *self = serde_json::from_value(root).map_err(|e| Error::file(path, e))?;
        Ok(())
    }

    /// Refuses what cannot be trained.
    ///
    /// # Errors
    /// Names the key, its value and what is allowed.
    pub fn check(&self) -> Result<()> {
        self.model.check()?;
        self.train.check()?;
        self.output.sample.check(self.model.image().map(|i| i.objective))?;
        if self.data.paths.is_empty() {
            return Err(Error::Config(
                "there is nothing to train on; name a folder, a file, or shapes".into(),
            ));
        }
        if let Some(image) = self.model.image()
            && image.channels != 3
        {
            return Err(Error::Config(format!(
                "this model takes latents of {} channels; to train on pictures set \
                 model.transfusion.image.channels=3",
                image.channels
            )));
        }
        Ok(())
    }
}

/// The key most like `word`, by common letters in order.
fn nearest<'a>(word: &str, keys: impl Iterator<Item = &'a String>) -> String {
    let distance = |key: &str| {
        let (a, b): (Vec<char>, Vec<char>) = (word.chars().collect(), key.chars().collect());
        let mut row: Vec<usize> = (0..=b.len()).collect();
        for (i, x) in a.iter().enumerate() {
            let mut corner = row[0];
            row[0] = i + 1;
            for (j, y) in b.iter().enumerate() {
                let cost = corner + usize::from(x != y);
                corner = row[j + 1];
                row[j + 1] = cost.min(row[j] + 1).min(corner + 1);
            }
        }
        row[b.len()]
    };
    keys.min_by_key(|k| distance(k)).cloned().unwrap_or_default()
}

/// What to say of a key `full` whose last part nothing has, where there are `keys`.
fn unknown_key<'a>(full: &str, part: &str, keys: impl Iterator<Item = &'a String>) -> String {
    format!("there is no setting {full}: no {part}; did you mean {}?", nearest(part, keys))
}

/// Lays settings over others; `at` is their dotted place. A key that is not there is an error.
fn overlay(at: &str, onto: &mut Value, over: Value) -> std::result::Result<(), String> {
    match (onto, over) {
        (Value::Object(onto), Value::Object(over)) => {
            for (key, value) in over {
                let full = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                let unknown = unknown_key(&full, &key, onto.keys());
                overlay(&full, onto.get_mut(&key).ok_or(unknown)?, value)?;
            }
        }
        (onto, over) => *onto = over,
    }
    Ok(())
}

/// What happens during a run.
#[derive(Clone, Debug)]
pub enum RunEvent {
    /// Data were opened: what was found.
    Data(String),
    /// Training starts at a step (not 0 after a resumption), of so many.
    Start {
        /// Steps done.
        step: u64,
        /// Steps in all.
        of: u64,
        /// Parameters of the model.
        parameters: usize,
    },
    /// A step was taken.
    Step(StepReport),
    /// A validation.
    Validation {
        /// After how many steps.
        step: u64,
        /// What it found.
        evaluation: Evaluation,
    },
    /// The finished model is about to be compared with the best linear denoiser.
    Comparing,
    /// The errors of the finished model and of the best linear denoiser at ten noise levels, on the same
    /// pictures.
    Comparison(Box<Comparison>),
    /// A grid of pictures was written.
    Grid(PathBuf),
    /// A checkpoint was written.
    Checkpoint(PathBuf),
}

/// Errors at ten noise levels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// The model's.
    pub model: [Option<f64>; 10],
    /// The best linear denoiser's; `None` where its equations were not solved in time.
    pub linear: [Option<f64>; 10],
}

/// A training run that is open.
pub struct Run {
    config: RunConfig,
    dir: RunDir,
    metrics: Metrics,
    trainer: Trainer,
    data: Prefetcher,
    training: Shared,
    validation: Option<Shared>,
    grid: Option<report::Picture>,
    tally: Tally,
}

/// Sums since the last line of metrics.
#[derive(Default)]
struct Tally {
    since: Option<Instant>,
    tokens: usize,
    waited: f64,
}

impl Run {
    /// Starts a run in a new directory, from `init` (a folder of weights) or from scratch.
    ///
    /// # Errors
    /// If the directory holds something, the configuration makes no sense, or the data are unusable.
    pub fn create(
        config: RunConfig,
        dir: &Path,
        init: Option<&Path>,
        device: Box<dyn Device>,
        observe: &mut dyn FnMut(RunEvent),
    ) -> Result<Run> {
        config.check()?;
        let data = open_data(&config, observe)?;
        let engine = match init {
            Some(folder) => load(folder, device)?,
            None => Engine::initialised(config.model.clone(), device, config.train.seed)?,
        };
        let mut config = config;
        config.model = engine.config().clone();
        let trainer = Trainer::new(engine, config.train.clone())?;
        let dir = RunDir::create(dir)?;
        let text = serde_json::to_string_pretty(&config).map_err(|e| Error::Config(e.to_string()))?;
        write_atomic(&dir.config(), text.as_bytes())?;
        let metrics = Metrics::create(dir.metrics())?;
        Run::assemble(config, dir, metrics, trainer, data)
    }

    /// Goes on from the newest checkpoint of a run, with the configuration that it was started with.
    ///
    /// # Errors
    /// If there is no checkpoint that can be loaded, or another process writes to the directory.
    pub fn resume(dir: &Path, device: Box<dyn Device>, observe: &mut dyn FnMut(RunEvent)) -> Result<Run> {
        let dir = RunDir::resume(dir)?;
        let config = read_run_config(&dir.config())?;
        checkpoint::remove_strays(&dir.checkpoints())?;
        let (step, newest) = newest_checkpoint(&dir)?;
        checkpoint::set_aside(&dir.checkpoints(), step)?;
        prune(&dir, &config)?;
        let data = open_data(&config, observe)?;
        let trainer = Trainer::resume(device, config.train.clone(), &newest)?;
        let metrics = Metrics::resume(dir.metrics(), trainer.progress().step)?;
        Run::assemble(config, dir, metrics, trainer, data)
    }

    fn assemble(
        config: RunConfig,
        dir: RunDir,
        metrics: Metrics,
        trainer: Trainer,
        data: data::Opened,
    ) -> Result<Run> {
        let geometry = geometry(&config.model, trainer.capacity());
        let options = PackOptions {
            image_first: config.data.image_first,
            condition_drop: config.data.condition_drop,
            image_first_limit: config.data.noise_limit,
            continuous_time: config
                .model
                .image()
                .is_some_and(|i| i.objective == crate::config::Objective::Flow),
            ..PackOptions::default()
        };
        let tokens = config.model.tokens();
        let training = data.source.clone();
        let mut packer = Packer::new(data.source, tokens, geometry, options, config.train.seed)?;
        packer.seek(trainer.progress().cursor);
        let objective = config.model.image().map(|i| i.objective);
        let coefficients = move |t: f32| objective.map_or([0.0; 4], |o| diffusion::coefficients(o, t));
        let validation = data.validation;
        let data = Prefetcher::start(packer, config.train.accumulation, coefficients)?;
        let (tally, grid) = (Tally::default(), None);
        Ok(Run { config, dir, metrics, trainer, data, training, validation, grid, tally })
    }

    /// The model in training.
    pub fn engine(&mut self) -> &mut Engine {
        self.trainer.engine()
    }

    /// The model, when the run is over.
    pub fn into_engine(self) -> Engine {
        self.trainer.into_engine()
    }

    /// What decides it.
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    /// Where it stands.
    pub fn progress(&self) -> &Progress {
        self.trainer.progress()
    }

    /// Its directory.
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }

    /// Trains to the last step. A set `cancel` flag leaves a checkpoint and returns
    /// [`Error::Cancelled`].
    ///
    /// # Errors
    /// As [`Trainer::step`], and whatever the disk refuses.
    pub fn train(&mut self, observe: &mut dyn FnMut(RunEvent), cancel: Cancel<'_>) -> Result<()> {
        self.train_until(&mut |_| false, observe, cancel)
    }

    /// Trains to the last step or until `enough` says so after a step.
    ///
    /// # Errors
    /// As [`Run::train`].
    pub fn train_until(
        &mut self,
        enough: &mut dyn FnMut(&Progress) -> bool,
        observe: &mut dyn FnMut(RunEvent),
        cancel: Cancel<'_>,
    ) -> Result<()> {
        let of = self.config.train.steps;
        let step = self.trainer.progress().step;
        observe(RunEvent::Start { step, of, parameters: self.engine().parameters() });
        self.tally.since = Some(Instant::now());
        while self.trainer.progress().step < of && !enough(self.trainer.progress()) {
            if let Err(stop) = cancel.check() {
                self.checkpoint(observe)?;
                self.report()?;
                return Err(stop);
            }
            let report = self.step()?;
            observe(RunEvent::Step(report));
            self.after_step(&report, observe, cancel)?;
        }
        self.checkpoint(observe)?;
        if self.trainer.progress().step == of {
            self.compare(observe, cancel)?;
        }
        self.report()
    }

    fn step(&mut self) -> Result<StepReport> {
        let waiting = Instant::now();
        let (batches, cursor) = self.data.advance()?;
        self.tally.waited += waiting.elapsed().as_secs_f64();
        let report = self.trainer.step(batches)?;
        self.trainer.set_cursor(cursor);
        self.tally.tokens += report.tokens;
        Ok(report)
    }

    /// What is due after a step: a line of metrics, a validation, a grid, a checkpoint.
    fn after_step(
        &mut self,
        report: &StepReport,
        observe: &mut dyn FnMut(RunEvent),
        cancel: Cancel<'_>,
    ) -> Result<()> {
        let due = |every: u64| every > 0 && report.step.is_multiple_of(every);
        let &OutputOptions { log_every, validate_every, sample_every, checkpoint_every, .. } =
            &self.config.output;
        if due(log_every) || report.step == 1 || report.skipped {
            let record = self.record(report);
            self.metrics.write(&record)?;
        }
        if due(validate_every) {
            let evaluation = self.validate()?;
            if let Some(evaluation) = evaluation {
                self.metrics.write(&validation_record(report.step, &evaluation))?;
                observe(RunEvent::Validation { step: report.step, evaluation });
            }
        }
        // First what must not be lost.
        if due(checkpoint_every) {
            self.checkpoint(observe)?;
        }
        if due(sample_every) && self.config.model.image().is_some() {
            match self.sample_grid(report.step, cancel) {
                Ok(Some(path)) => observe(RunEvent::Grid(path)),
                Ok(None) | Err(Error::Cancelled) => {}
                Err(e) => return Err(e),
            }
        }
        if due(checkpoint_every) {
            self.report()?;
        }
        Ok(())
    }

    fn record(&mut self, r: &StepReport) -> Record {
        let seconds = self.tally.since.map_or(0.0, |s| s.elapsed().as_secs_f64());
        let p = self.trainer.progress();
        let mut record = Record::new(r.step)
            .with("tokens", p.tokens as f64)
            .with("images", p.images as f64)
            .with("loss", r.loss)
            .with("loss/text", r.loss_text);
        if self.config.model.image().is_some() {
            record = record.with("loss/image", r.loss_image);
        }
        let record = record
            .with("grad_norm", r.grad_norm)
            .with("lr", r.lr)
            .with("skipped", p.skipped as f64)
            .with("tokens_per_s", self.tally.tokens as f64 / seconds.max(1e-9))
            .with("data_wait_ms", self.tally.waited * 1e3);
        self.tally = Tally { since: Some(Instant::now()), ..Tally::default() };
        record
    }

    /// A tenth of the documents at each of ten noise levels; every text whole.
    fn validate(&mut self) -> Result<Option<Evaluation>> {
        let Some(source) = self.validation.clone() else { return Ok(None) };
        let limit = self.config.output.validate_documents;
        let levels = if self.config.model.image().is_some() { 10 } else { 1 };
        let n = source.len().unwrap_or(limit);
        let n = if levels == 1 { n } else { n.min(limit) };
        let capacity = self.trainer.capacity();
        let mut sum = Evaluation::default();
        for level in 0..levels {
            let range = n * level / levels..n * (level + 1) / levels;
            let t = 100.0 * level as f32 + 50.0;
            evaluate_documents(self.trainer.engine(), capacity, &source, range, t, &mut sum)?;
        }
        Ok(Some(sum))
    }

    /// The finished model beside the best linear denoiser: the same validation pictures at ten noise
    /// levels.
    fn compare(&mut self, observe: &mut dyn FnMut(RunEvent), cancel: Cancel<'_>) -> Result<()> {
        let (Some(image), Some(source)) = (self.config.model.image().cloned(), self.validation.clone())
        else {
            return Ok(());
        };
        let step = self.trainer.progress().step;
        let told = |r: &Record| r.step == step && r.get("linear/image/t0").is_some();
        if !self.config.output.linear_baseline || metrics::read(&self.dir.metrics())?.iter().any(told) {
            return Ok(());
        }
        let values = image.channels * image.size * image.size;
        let Some(linear) = LinearDenoiser::fit(self.training.as_ref(), values) else { return Ok(()) };
        observe(RunEvent::Comparing);
        let limit = self.config.output.validate_documents;
        let documents = 0..source.len().unwrap_or(limit).min(limit);
        let capacity = self.trainer.capacity();
        let mut evaluation = Evaluation::default();
        let mut errors = [None; 10];
        for (level, error) in errors.iter_mut().enumerate() {
            let t = 100.0 * level as f32 + 50.0;
            let engine = self.trainer.engine();
            evaluate_documents(engine, capacity, &source, documents.clone(), t, &mut evaluation)?;
            *error = linear.error(
                source.as_ref(),
                documents.clone(),
                image.objective,
                t,
                EVALUATION_SEED,
                cancel,
            )?;
        }
        let model = evaluation.by_level();
        let mut record = Record::new(step);
        for (name, errors) in [("final", &model), ("linear", &errors)] {
            for (i, error) in errors.iter().enumerate() {
                if let Some(error) = error {
                    record = record.with(format!("{name}/image/t{i}"), *error);
                }
            }
        }
        self.metrics.write(&record)?;
        observe(RunEvent::Comparison(Box::new(Comparison { model, linear: errors })));
        Ok(())
    }

    /// Draws pictures for the first captions that were kept for validation.
    fn sample_grid(&mut self, step: u64, cancel: Cancel<'_>) -> Result<Option<PathBuf>> {
        let Some(source) = self.validation.clone() else { return Ok(None) };
        // A prompt takes BOS and BOI besides.
        let room = self.config.model.max_position_embeddings.saturating_sub(2);
        let captions: Vec<Vec<u8>> = (0..source.len().unwrap_or(64).min(64))
            .filter_map(|i| caption(&source.document(i)))
            .map(|mut caption| {
                caption.truncate(room);
                caption
            })
            .take(16)
            .collect();
        if captions.is_empty() {
            return Ok(None);
        }
        let prompts: Vec<Vec<Part>> = captions.iter().map(|c| vec![Part::Text(c.clone())]).collect();
        let options = SampleOptions { goal: Goal::Image, ..self.config.output.sample.clone() };
        let drawn = sample::sample(self.trainer.engine(), &prompts, &options, &mut |_| (), cancel)?;
        let pictures: Vec<Picture> = drawn.iter().flatten().filter_map(picture).collect();
        let grid = Picture::grid(&pictures, 4, 2);
        let path = self.dir.sample(step);
        grid.save(&path)?;
        let captions = captions.iter().map(|c| String::from_utf8_lossy(c).into_owned()).collect();
        self.grid = Some(report::Picture { png: grid.encode_png()?, captions });
        Ok(Some(path))
    }

    fn checkpoint(&mut self, observe: &mut dyn FnMut(RunEvent)) -> Result<()> {
        let path = self.dir.checkpoint(self.trainer.progress().step);
        if !path.exists() {
            self.metrics.sync()?;
            self.trainer.save(&path)?;
            prune(&self.dir, &self.config)?;
            observe(RunEvent::Checkpoint(path));
        }
        Ok(())
    }

    /// Writes `report.html` from the metrics so far.
    fn report(&mut self) -> Result<()> {
        crate::run_report::write(&self.config, &self.dir, self.grid.as_ref(), self.trainer.progress())
    }
}

/// The batches that a model of these capacities takes.
pub fn geometry(c: &ModelConfig, capacity: Capacity) -> Geometry {
    let (resolution, patch, channels) = c.image().map_or((8, 8, 3), |i| (i.size, i.patch_size, i.channels));
    Geometry {
        rows: capacity.rows,
        positions: capacity.positions,
        text_rows: capacity.text_rows,
        images: capacity.images,
        resolution,
        patch,
        channels,
    }
}

/// The noise of every evaluation, so that figures of two models can be compared.
const EVALUATION_SEED: u64 = 0x7261_6e64;

/// Evaluates documents `range` of a source, images at noise level `t`, captions before images.
///
/// # Errors
/// If the device fails.
pub fn evaluate_documents(
    engine: &mut Engine,
    capacity: Capacity,
    source: &Shared,
    range: std::ops::Range<u64>,
    t: f32,
    into: &mut Evaluation,
) -> Result<()> {
    let geometry = geometry(engine.config(), capacity);
    let objective = engine.config().image().map(|i| i.objective);
    let coefficients = |t: f32| objective.map_or([0.0; 4], |o| diffusion::coefficients(o, t));
    let options = PackOptions::evaluation(PairOrder::CaptionFirst, t);
    let tokens = engine.config().tokens();
    let mut packer =
        Packer::new(source.clone(), tokens, geometry, options, EVALUATION_SEED)?.until(range.end);
    packer.seek(range.start);
    let mut batch = Batch::new(geometry);
    while packer.cursor() < range.end {
        let before = packer.cursor();
        packer.fill(&mut batch, &coefficients);
        if packer.cursor() == before {
            return Err(Error::Data(format!("document {before} does not fit into an empty batch")));
        }
        evaluate(engine, capacity, &batch, EVALUATION_SEED, into)?;
    }
    Ok(())
}

/// The text before the first picture of a document.
fn caption(document: &data::Document) -> Option<Vec<u8>> {
    let has_picture = document.parts.iter().any(|p| matches!(p, Part::Image(_)));
    let text = document.parts.iter().find_map(|p| match p {
        Part::Text(t) => Some(t.clone()),
        Part::Image(_) => None,
    });
    text.filter(|_| has_picture)
}

fn picture(part: &Part) -> Option<Picture> {
    match part {
        Part::Image(p) => Some(p.as_ref().clone()),
        Part::Text(_) => None,
    }
}

fn validation_record(step: u64, e: &Evaluation) -> Record {
    let mut record = Record::new(step);
    if let Some(nats) = e.nats_per_token() {
        record = record.with("val/text", nats);
    }
    if let Some(error) = e.image_error() {
        record = record.with("val/image", error);
    }
    for (i, error) in e.by_level().iter().enumerate() {
        if let Some(error) = error {
            record = record.with(format!("val/image/t{i}"), *error);
        }
    }
    record
}

fn open_data(config: &RunConfig, observe: &mut dyn FnMut(RunEvent)) -> Result<data::Opened> {
    let d = &config.data;
    let holdout = match (d.val_bytes, d.val_fraction) {
        (0, 0.0) => Holdout::Nothing,
        (0, share) => Holdout::Fraction(share),
        (bytes, _) => Holdout::Last(bytes),
    };
    let options = OpenOptions {
        resolution: config.model.image().map_or(8, |i| i.size),
        window: config.train.positions + 1,
        seed: config.train.seed,
        holdout,
        budget: (d.memory_gib * f64::from(1 << 30)) as u64,
        ..OpenOptions::default()
    };
    let opened = data::open(&d.paths, &options)?;
    if opened.report.pictures > 0 && config.model.image().is_none() {
        return Err(Error::Config(
            "the data hold pictures, but the model has no images; choose another preset".into(),
        ));
    }
    observe(RunEvent::Data(opened.report.to_string()));
    Ok(opened)
}

/// The configuration that a run was started with.
///
/// # Errors
/// Names the file.
pub fn read_run_config(path: &Path) -> Result<RunConfig> {
    let text =
        std::fs::read_to_string(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    serde_json::from_str(&text).map_err(|e| Error::file(path, format!("is no run configuration: {e}")))
}

/// Removes the oldest checkpoints beyond those that are kept.
fn prune(dir: &RunDir, config: &RunConfig) -> Result<()> {
    match config.output.keep_checkpoints {
        0 => Ok(()),
        keep => Ok(checkpoint::prune(&dir.checkpoints(), keep)?),
    }
}

/// The newest checkpoint that can be loaded, and its step.
fn newest_checkpoint(dir: &RunDir) -> Result<(u64, Checkpoint)> {
    let newest = checkpoint::newest(&dir.checkpoints())?;
    newest.found.ok_or_else(|| {
        let skipped: Vec<String> = newest.skipped.iter().map(ToString::to_string).collect();
        let skipped = if skipped.is_empty() { "there is none yet".into() } else { skipped.join("; ") };
        Error::file(dir.checkpoints(), format!("holds no checkpoint that can be loaded: {skipped}"))
    })
}

/// Loads a model: a run directory (its newest checkpoint), a checkpoint, or a folder of `config.json`
/// and `model.safetensors` under Hugging Face names.
///
/// # Errors
/// Names what is missing or damaged.
pub fn load(path: &Path, device: Box<dyn Device>) -> Result<Engine> {
    match Source::find(path)? {
        Source::Checkpoint(checkpoint) => load_checkpoint(&checkpoint, device),
        Source::Folder => hf::import(path, device),
    }
}

/// What a model is, without its weights; for what [`load`] takes.
///
/// # Errors
/// As [`load`].
pub fn model_config(path: &Path) -> Result<ModelConfig> {
    match Source::find(path)? {
        Source::Checkpoint(checkpoint) => read_config(&checkpoint),
        Source::Folder => hf::read_config(&path.join("config.json")),
    }
}

/// Where a model lies.
enum Source {
    Checkpoint(Checkpoint),
    /// A folder under Hugging Face names.
    Folder,
}

impl Source {
    fn find(path: &Path) -> Result<Source> {
        if path.join("metrics.jsonl").is_file() || path.join("checkpoints").is_dir() {
            return Ok(Source::Checkpoint(newest_checkpoint(&RunDir::open(path)?)?.1));
        }
        if path.join("state.json").is_file() {
            return Ok(Source::Checkpoint(Checkpoint::open(path)?));
        }
        if path.join("config.json").is_file() {
            return Ok(Source::Folder);
        }
        let why = if path.exists() {
            "is no model: give a run directory, a checkpoint, or a folder with config.json and model.safetensors"
        } else {
            "does not exist; give a run directory, a checkpoint, or an exported folder"
        };
        Err(Error::file(path, why))
    }
}

fn load_checkpoint(checkpoint: &Checkpoint, device: Box<dyn Device>) -> Result<Engine> {
    let mut engine = Engine::new(read_config(checkpoint)?, device)?;
    let weights = engine.states(Kind::Param);
    engine.load_states(checkpoint, "model.safetensors", Kind::Param, &weights)?;
    if checkpoint.specs("ema.safetensors").is_ok() {
        engine.declare_ema()?;
        let means = engine.states(Kind::Ema);
        engine.load_states(checkpoint, "ema.safetensors", Kind::Ema, &means)?;
    }
    Ok(engine)
}
