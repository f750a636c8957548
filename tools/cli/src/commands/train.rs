//! `transfusion train`.
use crate::{
    console,
    failure::{Failure, Outcome},
    progress,
    settings::{Machine, Settings},
};
use clap::Args;
use std::path::{Path, PathBuf};
use transfusion::{
    run::{self, Run, RunConfig, RunEvent},
    sample::Cancel,
};

/// Train a model in a new run directory, or go on with one.
///
/// The run directory gets config.json, metrics.jsonl, report.html, samples/ and checkpoints/. One that
/// exists is never overwritten. What counts is, in this order: the preset, --config, --set, and the
/// other options.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion train --data shapes --out runs/shapes
  transfusion train --data pictures/ --out runs/pictures --set model.transfusion.image.patch_size=4
  transfusion train --data book.txt --out runs/book --preset text-tiny --set data.val_bytes=100000
  transfusion train --out runs/book --resume")]
pub(crate) struct Train {
    /// What to train on: folders of pictures with metadata.jsonl or .txt captions, folders of texts,
    /// .txt files, .jsonl files of {"parts": [{"text": ...}, {"image": "a.png"}]}, or the built-in
    /// `shapes`.
    #[arg(long, value_name = "PATH", num_args = 1..,
          required_unless_present_any = ["resume", "config", "set", "print_config"])]
    data: Vec<PathBuf>,
    /// The run directory.
    #[arg(long, value_name = "RUN", required_unless_present = "print_config")]
    out: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    /// Begin with the weights of this MODEL; it replaces the model of the preset.
    #[arg(long, value_name = "MODEL")]
    init: Option<PathBuf>,
    /// Optimiser steps [default: what the preset says].
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Seed of weights, order and noise: the same seed gives the same bits [default: 0].
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    #[command(flatten)]
    machine: Machine,
    /// Go on from the newest checkpoint of --out, with the settings that the run was started with.
    #[arg(long, conflicts_with_all =
          ["data", "preset", "config", "set", "init", "steps", "seed", "print_config"])]
    resume: bool,
    /// Print all settings as JSON, and train nothing.
    #[arg(long)]
    print_config: bool,
}

impl Train {
    /// Trains to the end.
    pub(crate) fn run(self) -> Outcome {
        if self.print_config {
            let json = serde_json::to_string_pretty(&self.config()?).map_err(Failure::error)?;
            return console::print(json);
        }
        let Some(out) = &self.out else { return Err(Failure::usage("--out is missing")) };
        let stop = console::interruption("finishing the step and writing a checkpoint")?;
        let mut progress = progress::Training::new();
        let mut observe = |event: RunEvent| progress.observe(&event);
        let mut run = self.open(out, &mut observe)?;
        let trained = run.train(&mut observe, Cancel(Some(&stop)));
        progress.finish();
        match trained.map_err(Failure::from) {
            Err(Failure::Interrupted) => {
                let out = out.display();
                console::note(format!("interrupted; `transfusion train --resume --out {out}` goes on"));
                Err(Failure::Interrupted)
            }
            Err(failure) => Err(failure),
            Ok(()) => console::print(format!("{}", run.dir().report().display())),
        }
    }

    fn open(&self, out: &Path, observe: &mut dyn FnMut(RunEvent)) -> Outcome<Run> {
        if self.resume {
            let device = self.machine.open(|| run::model_config(out))?;
            return Ok(Run::resume(out, device, observe)?);
        }
        let config = self.config()?;
        let init = self.init.as_deref();
        let device = self.machine.open(|| init.map_or(Ok(config.model.clone()), run::model_config))?;
        Ok(Run::create(config, out, init, device, observe)?)
    }

    fn config(&self) -> Outcome<RunConfig> {
        let mut config = self.settings.resolve()?;
        if !self.data.is_empty() {
            config.data.paths = self.data.clone();
        }
        config.train.steps = self.steps.unwrap_or(config.train.steps);
        config.train.seed = self.seed.unwrap_or(config.train.seed);
        Ok(config)
    }
}
