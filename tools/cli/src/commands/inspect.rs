//! `transfusion inspect`.
use crate::{
    console::{self, bytes, count},
    failure::{Failure, Outcome},
};
use clap::Args;
use std::{
    fs,
    path::{Path, PathBuf},
};
use transfusion::{
    config::ModelConfig,
    hf,
    metrics::{self, Record},
    model,
    run::{self, RunConfig},
    run_dir::RunDir,
    train::Progress,
};
use transfusion_core::{
    checkpoint::{Checkpoint, weights::Weights},
    tensor::Spec,
};

/// Say what a path is: its model, its tensors, how far its training got, and whether it is whole.
///
/// Every byte of a checkpoint is read and held against its CRC32; where one is damaged, the exit code
/// is 1.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion inspect runs/shapes
  transfusion inspect runs/shapes/checkpoints/step-00000500
  transfusion inspect exported/model.safetensors
  transfusion inspect runs/shapes/metrics.jsonl")]
pub(crate) struct Inspect {
    /// Run directory, checkpoint, exported or Hugging Face folder, .safetensors file, or metrics.jsonl.
    path: PathBuf,
}

impl Inspect {
    /// Looks and prints.
    pub(crate) fn run(self) -> Outcome {
        let path = &self.path;
        let has = |name: &str| path.join(name).exists();
        let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase());
        match extension.as_deref() {
            _ if !path.exists() => Err(unknown(path, "does not exist")),
            Some("jsonl") if path.is_file() => metrics_file(path),
            Some("safetensors" | "json") if path.is_file() => weights_file(path),
            _ if has("metrics.jsonl") || has("checkpoints") => run_directory(path),
            _ if has("manifest.json") => checkpoint(path),
            _ if has("config.json") => model_folder(path),
            _ => Err(unknown(path, "is nothing that this program writes or reads as a model")),
        }
    }
}

fn unknown(path: &Path, why: &str) -> Failure {
    let what = "name a run directory, a checkpoint, a model folder, a .safetensors file or a metrics.jsonl";
    Failure::error(format!("{}: {why}", path.display())).hint(what)
}

fn run_directory(path: &Path) -> Outcome {
    let dir = RunDir::open(path)?;
    let config = run::read_run_config(&dir.config())?;
    console::print(format!("run {}", path.display()))?;
    describe_model(&config.model)?;
    describe_training(&config)?;
    if dir.metrics().exists() {
        newest_metrics(&metrics::read(&dir.metrics())?)?;
    }
    let mut damaged = Vec::new();
    for step in checkpoints(&dir.checkpoints())? {
        match Checkpoint::open(&step) {
            Ok(_) => console::print(format!("  checkpoint  {}, {}, whole", step.display(), size(&step)))?,
            Err(why) => {
                console::print(format!("  checkpoint  {}, damaged", step.display()))?;
                damaged.push(why.to_string());
            }
        }
    }
    match damaged.is_empty() {
        true => Ok(()),
        false => Err(Failure::error(damaged.join("; "))),
    }
}

fn describe_training(config: &RunConfig) -> Outcome {
    let (train, paths) = (&config.train, &config.data.paths);
    let paths: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
    console::print(format!("  data        {}", paths.join(", ")))?;
    console::print(format!(
        "  training    {} steps of {} x {} rows of {} positions, seed {}",
        train.steps, train.accumulation, train.rows, train.positions, train.seed
    ))
}

/// The checkpoints of a run, oldest first.
fn checkpoints(folder: &Path) -> Outcome<Vec<PathBuf>> {
    if !folder.exists() {
        return Ok(vec![]);
    }
    let failed = |e| Failure::error(format!("{}: cannot be listed: {e}", folder.display()));
    let entries: Result<Vec<_>, _> = fs::read_dir(folder).map_err(failed)?.collect();
    let mut paths: Vec<PathBuf> = entries.map_err(failed)?.iter().map(fs::DirEntry::path).collect();
    paths.retain(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("step-")));
    paths.retain(|p| p.extension().is_none());
    paths.sort();
    Ok(paths)
}

/// The bytes of a folder's files.
fn size(folder: &Path) -> String {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    bytes(entries.filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum())
}

/// A checkpoint, or a folder that was exported: both have a manifest.
fn checkpoint(path: &Path) -> Outcome {
    let checkpoint = Checkpoint::open(path)?;
    let state = path.join("state.json").exists().then(|| checkpoint.text("state.json")).transpose()?;
    let what = if state.is_some() { "checkpoint" } else { "exported model" };
    console::print(format!("{what} {}, {}, whole", path.display(), size(path)))?;
    describe_model(&hf::read_config(&path.join("config.json"))?)?;
    if let Some(state) = state {
        let p: Progress = serde_json::from_str(&state)
            .map_err(|e| Failure::error(format!("{}: {e}", path.join("state.json").display())))?;
        console::print(format!(
            "  trained     {} steps, {} of them skipped, {} tokens, {} images, seed {}",
            p.step, p.skipped, p.tokens, p.images, p.seed
        ))?;
    }
    for file in ["model.safetensors", "ema.safetensors", "optimizer.safetensors"] {
        if let Ok(specs) = checkpoint.specs(file) {
            describe_tensors(file, &specs)?;
        }
    }
    Ok(())
}

fn model_folder(path: &Path) -> Outcome {
    console::print(format!("model folder {}", path.display()))?;
    describe_model(&hf::read_config(&path.join("config.json"))?)?;
    tensors(path)
}

fn weights_file(path: &Path) -> Outcome {
    console::print(format!("tensors {}", path.display()))?;
    tensors(path)
}

fn tensors(path: &Path) -> Outcome {
    let weights = Weights::open(path)?;
    let named = |name| weights.spec(name).map(|spec| (name, spec));
    let specs: Vec<(&str, Spec)> = weights.names().map(named).collect::<Result<_, _>>()?;
    describe_tensors("tensors", &specs)
}

fn metrics_file(path: &Path) -> Outcome {
    let records = metrics::read(path)?;
    console::print(format!("metrics {}, {} lines", path.display(), records.len()))?;
    newest_metrics(&records)
}

/// The last value of every number.
fn newest_metrics(records: &[Record]) -> Outcome {
    let mut newest: Vec<(&str, u64, f64)> = Vec::new();
    for record in records {
        for (name, value) in &record.values {
            match newest.iter_mut().find(|(known, ..)| known == name) {
                Some(known) => (known.1, known.2) = (record.step, *value),
                None => newest.push((name, record.step, *value)),
            }
        }
    }
    let line = |(name, step, value): &(&str, u64, f64)| {
        console::print(format!("  step {step:<7}{name:16} {}", number(*value)))
    };
    newest.iter().try_for_each(line)
}

/// Whole numbers as such, small ones with an exponent.
fn number(value: f64) -> String {
    match value {
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        _ if value.abs() < 1e-3 => format!("{value:.4e}"),
        _ => format!("{value:.5}"),
    }
}

fn describe_model(c: &ModelConfig) -> Outcome {
    let heads = c.heads();
    let parameters: usize = model::weights(c).iter().map(model::Weight::elements).sum();
    console::print(format!(
        "  model       {} parameters, {}: {} layers, width {}, feed-forward {}, {} heads of {} ({} of keys)",
        count(parameters as f64),
        c.torch_dtype,
        c.num_hidden_layers,
        c.hidden_size,
        c.intermediate_size,
        heads.heads,
        heads.width,
        heads.kv_heads,
    ))?;
    console::print(format!(
        "  text        vocabulary {}, {} positions{}",
        c.vocab_size,
        c.max_position_embeddings,
        if c.tie_word_embeddings { ", tied embeddings" } else { "" }
    ))?;
    match c.image() {
        None => console::print("  images      none"),
        Some(i) => console::print(format!(
            "  images      {0}x{0}x{1} in {2} patches of {3}x{3}, predicts {4:?}, lambda {5}",
            i.size,
            i.channels,
            i.patches(),
            i.patch_size,
            i.objective,
            i.lambda
        )),
    }
}

fn describe_tensors(title: &str, specs: &[(&str, Spec)]) -> Outcome {
    let total: u64 = specs.iter().map(|(_, spec)| spec.bytes() as u64).sum();
    console::print(format!("  {title}: {} tensors, {}", specs.len(), bytes(total)))?;
    let wide = specs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let line = |(name, spec): &(&str, Spec)| {
        console::print(format!("    {name:wide$}  {spec:?}  {} bytes", spec.bytes()))
    };
    specs.iter().try_for_each(line)
}
