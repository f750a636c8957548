//! `transfusion demo`.
use crate::{console, failure::Outcome, progress, settings::Machine};
use clap::Args;
use std::path::PathBuf;
use transfusion::{
    demo::{self, DemoEvent, DemoOptions},
    sample::Cancel,
};

/// Train a small model on the built-in shapes, and examine it on combinations that it never saw.
///
/// It draws pictures from captions and writes captions for pictures, all of combinations of size,
/// colour and shape that were kept from training, and prints how many are right. The run directory
/// gets drawn.png, captioned.png, report.html and summary.json beside what every run gets.
#[derive(Args, Debug)]
#[command(after_help = "\
Takes minutes on a laptop; the time left is shown.

Examples:
  transfusion demo
  transfusion demo --out runs/demo-1 --seed 1")]
pub(crate) struct Demo {
    /// The new run directory.
    #[arg(long, value_name = "DIR", default_value = "demo")]
    out: PathBuf,
    /// Seed of weights, order and noise: the same seed gives the same bits.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    machine: Machine,
}

impl Demo {
    /// Trains, examines and prints.
    pub(crate) fn run(self) -> Outcome {
        let stop = console::interruption("finishing the step and writing a checkpoint")?;
        let options = DemoOptions { out: self.out, seed: self.seed };
        let mut progress = progress::Training::new();
        let mut observe = |event: DemoEvent| match event {
            DemoEvent::Run(event) => progress.observe(&event),
            DemoEvent::Stage(stage) => progress.stage(&stage),
        };
        let summary = demo::run(&options, self.machine.open(demo::model)?, &mut observe, Cancel(Some(&stop)));
        progress.finish();
        console::print(summary?)?;
        console::print(format!("pictures and curves: {}", options.out.join("report.html").display()))
    }
}
