//! The command line of transfusion.
//!
//! In reading order: `failure` (exit codes), `console` (what is printed, and interruption), `progress`,
//! `settings` (what decides a training), and one file for each command.
mod failure;
mod console;
mod progress;
mod settings;
mod commands {
    pub(crate) mod bench;
    pub(crate) mod demo;
    pub(crate) mod doctor;
    pub(crate) mod eval;
    pub(crate) mod export;
    pub(crate) mod inspect;
    pub(crate) mod kernels;
    pub(crate) mod plan;
    pub(crate) mod programs;
    pub(crate) mod sample;
    pub(crate) mod train;
}

use clap::{Parser, Subcommand};
use failure::Outcome;
use std::process::ExitCode;

/// Train and sample one transformer that predicts the next text token and denoises images.
#[derive(Debug, Parser)]
#[command(
    name = "transfusion",
    version,
    max_term_width = 100,
    after_help = "\
A MODEL is a run directory (its newest checkpoint), a checkpoint, or an exported folder.

Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted. The first Ctrl-C ends a training after
its step with a checkpoint, from which `train --resume` goes on; a second one aborts.

Examples:
  transfusion demo
  transfusion train --data shapes --out runs/shapes --steps 300
  transfusion sample runs/shapes --prompt \"a big circle in red\" --out circle.png
  transfusion eval runs/shapes --data shapes --json"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(commands::demo::Demo),
    Train(commands::train::Train),
    Sample(commands::sample::Sample),
    Eval(commands::eval::Eval),
    Plan(commands::plan::Plan),
    Bench(commands::bench::Bench),
    Inspect(commands::inspect::Inspect),
    Export(commands::export::Export),
    Doctor(commands::doctor::Doctor),
    Kernels(commands::kernels::Kernels),
}

impl Command {
    fn run(self) -> Outcome {
        match self {
            Command::Demo(c) => c.run(),
            Command::Train(c) => c.run(),
            Command::Sample(c) => c.run(),
            Command::Eval(c) => c.run(),
            Command::Plan(c) => c.run(),
            Command::Bench(c) => c.run(),
            Command::Inspect(c) => c.run(),
            Command::Export(c) => c.run(),
            Command::Doctor(c) => c.run(),
            Command::Kernels(c) => c.run(),
        }
    }
}

fn main() -> ExitCode {
    match Cli::parse().command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
