//! `transfusion eval`.
use crate::{
    console,
    failure::{Failure, Outcome},
    settings::Machine,
};
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};
use transfusion::{
    data::{self, Holdout, OpenOptions, Shared},
    engine::Engine,
    model::Capacity,
    run,
    sample::Cancel,
    train::{Evaluation, TrainOptions},
};

/// Positions that a batch has about.
const BATCH: usize = 2048;

/// Documents taken of a source without end.
const ENDLESS: u64 = 256;

/// Measure what a model makes of data.
///
/// Text: cross entropy in nats per token and in bits per byte; texts are read through consecutive
/// windows. Images, each after its caption: mean squared error of the prediction at evenly spaced
/// levels of noise (t = 50, 150, ... 950 of 1000), with the noise of a fixed seed. Running means of the
/// weights are used where the model has them.
#[derive(Args, Debug)]
#[command(after_help = "\
JSON: {\"text\": {\"nats_per_token\", \"bits_per_byte\"}, \"image\": {\"mse\", \"by_t\"}}; by_t lists the
levels from the least noise to the most, and what there is none of is null.

Examples:
  transfusion eval runs/shapes --data shapes
  transfusion eval exported --data test.txt --json")]
pub(crate) struct Eval {
    /// Run directory, checkpoint, or exported folder.
    model: PathBuf,
    /// What to measure on, as in `train`; of `shapes` the combinations that are never trained on.
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// At most so many documents of each PATH [default: all; 256 of `shapes`].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    documents: Option<u64>,
    /// Levels of noise.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    levels: u16,
    #[command(flatten)]
    machine: Machine,
}

impl Eval {
    /// Measures and prints.
    pub(crate) fn run(self) -> Outcome {
        let stop = console::interruption("stopping")?;
        let mut engine = run::load(&self.model, self.machine.open(|| run::model_config(&self.model))?)?;
        let sources = self.sources(&engine)?;
        let capacity = capacity(&engine);
        let levels = if engine.config().image().is_some() { self.levels } else { 1 };
        let mut by_level = Vec::new();
        for level in 0..levels {
            let t = (f32::from(level) + 0.5) * 1000.0 / f32::from(levels);
            let mut found = Evaluation::default();
            for source in &sources {
                let n = source.len().unwrap_or(0).min(self.documents.unwrap_or(u64::MAX));
                Cancel(Some(&stop)).check()?;
                run::evaluate_documents(&mut engine, capacity, source, 0..n, t, &mut found)?;
            }
            by_level.push((t, found));
        }
        if self.json { console::print(in_json(&by_level)) } else { console::print(in_words(&by_level)) }
    }

    fn sources(&self, engine: &Engine) -> Outcome<Vec<Shared>> {
        let config = engine.config();
        let options = OpenOptions {
            resolution: config.image().map_or(8, |image| image.size),
            window: config.max_position_embeddings + 1,
            consecutive: true,
            ..OpenOptions::default()
        };
        let open = |path: &PathBuf| self.source(path, &options, config.image().is_some());
        self.data.iter().map(open).collect()
    }

    /// The documents of a path; of a source without end those that are kept from training.
    fn source(&self, path: &Path, options: &OpenOptions, images: bool) -> Outcome<Shared> {
        let opened = data::open(&[path], options)?;
        let endless = opened.source.len().is_none();
        if !images && (endless || opened.report.pictures > 0) {
            let why = format!("{}: it holds pictures, but the model has no images", path.display());
            return Err(Failure::error(why).hint("name texts, or a model that has images"));
        }
        if !opened.report.skipped.is_empty() {
            console::note(format!("{}: {}", path.display(), opened.report));
        }
        if !endless {
            return Ok(opened.source);
        }
        let holdout = Holdout::Last(self.documents.unwrap_or(ENDLESS));
        let opened = data::open(&[path], &OpenOptions { holdout, ..options.clone() })?;
        opened.validation.ok_or_else(|| Failure::error(format!("{}: it has no end", path.display())))
    }
}

/// Rows as long as the model can take.
fn capacity(engine: &Engine) -> Capacity {
    let positions = engine.config().max_position_embeddings;
    let rows = (BATCH / positions).max(1);
    TrainOptions { rows, positions, ..TrainOptions::default() }.capacity(engine.config())
}

/// All levels as one.
fn whole(by_level: &[(f32, Evaluation)]) -> Evaluation {
    let mut sum = Evaluation::default();
    for (_, found) in by_level {
        sum.text_nats += found.text_nats;
        sum.text_targets += found.text_targets;
        sum.text_bytes += found.text_bytes;
        sum.images.extend(&found.images);
    }
    sum
}

fn in_json(by_level: &[(f32, Evaluation)]) -> String {
    let sum = whole(by_level);
    let mse = sum.image_error();
    let by_t: Vec<_> = by_level.iter().map(|(_, found)| found.image_error()).collect();
    json!({
        "text": { "nats_per_token": sum.nats_per_token(), "bits_per_byte": sum.bits_per_byte() },
        "image": { "mse": mse, "by_t": mse.map(|_| by_t) },
    })
    .to_string()
}

fn in_words(by_level: &[(f32, Evaluation)]) -> String {
    let sum = whole(by_level);
    let mut lines = Vec::new();
    if let (Some(nats), Some(bits)) = (sum.nats_per_token(), sum.bits_per_byte()) {
        lines.push(format!("text   {nats:.4} nats per token, {bits:.4} bits per byte"));
    }
    if let Some(error) = sum.image_error() {
        lines.push(format!("image  {error:.5} mean squared error"));
        for (t, found) in by_level {
            let error = found.image_error().map_or("-".into(), |error| format!("{error:.5}"));
            lines.push(format!("  t {t:3.0}  {error}"));
        }
    }
    lines.join("\n")
}
