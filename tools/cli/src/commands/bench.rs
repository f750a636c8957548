//! `transfusion bench`.
mod common;
mod ops;
mod sample;
mod scaling;
mod step;
mod table;

use crate::failure::Outcome;
use clap::{Args, Subcommand};

/// Time training, sampling and ops, alone or beside PyTorch on this machine.
///
/// With --against torch both sides take turns, A B A B, after their results were found to agree; a
/// difference is called one only if it is larger than what a side differs from itself by, from one of its
/// blocks to the next. The other side is the fastest of several variants of our own scripts.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion bench step --preset text-tiny --device cpu
  transfusion bench step --preset tiny --device cpu --against torch --python venv/bin/python --json")]
pub(crate) struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Step(step::Step),
    Sample(sample::Sample),
    Ops(ops::Ops),
    Scaling(scaling::Scaling),
    Table(table::Table),
}

impl Bench {
    /// Measures.
    pub(crate) fn run(self) -> Outcome {
        match self.what {
            What::Step(c) => c.run(),
            What::Sample(c) => c.run(),
            What::Ops(c) => c.run(),
            What::Scaling(c) => c.run(),
            What::Table(c) => c.run(),
        }
    }
}
