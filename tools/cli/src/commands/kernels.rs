//! `transfusion kernels`.
mod bench;
mod bisect;
mod check;
mod explain;
mod list;
mod rows;
mod sim;
mod traffic;
mod workbench;

pub(crate) use workbench::Model;

use crate::failure::Outcome;
use clap::{Args, Subcommand};

/// Look at, check, time and replace the GPU kernels.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion kernels list
  transfusion kernels check rmsnorm
  transfusion kernels check rmsnorm --cu my_rmsnorm.cu
  transfusion kernels bench linear --device cuda --cu my_linear.cu
  transfusion kernels explain --preset 7b --batch 1 --target H200
  transfusion kernels bisect --batch 1 --positions 128 --cu my_rmsnorm.cu
  transfusion kernels traffic --batch 1 --positions 128
  transfusion kernels sim scale.ptx scale --grid 4 --block 256 out:y.bin:4096 in:x.bin f32:2 u32:1024")]
pub(crate) struct Kernels {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    List(list::List),
    Check(check::Check),
    Bench(bench::Bench),
    Explain(explain::Explain),
    Bisect(bisect::Bisect),
    Traffic(traffic::Traffic),
    Sim(sim::Sim),
}

impl Kernels {
    /// Does it.
    pub(crate) fn run(self) -> Outcome {
        match self.what {
            What::List(c) => c.run(),
            What::Check(c) => c.run(),
            What::Bench(c) => c.run(),
            What::Explain(c) => c.run(),
            What::Bisect(c) => c.run(),
            What::Traffic(c) => c.run(),
            What::Sim(c) => c.run(),
        }
    }
}
