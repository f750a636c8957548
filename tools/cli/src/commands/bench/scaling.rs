//! `transfusion bench scaling`.
use super::common::{Format, Sizing, Timing, failure};
use crate::{console, failure::Outcome};
use clap::{Args, ValueEnum};
use transfusion::sample::Cancel;
use transfusion_benches::{machine::Machine, scaling};

/// Tabulate what a training step on the CPU costs with more threads, positions, width, layers and documents.
///
/// One size is varied at a time. Threads: a model of width 512, with one thread and with all in turn, beside
/// multiply-adds in registers with one and with all: the share of their gain that a step has. Positions: as many
/// in all, in longer rows of one document each.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion bench scaling --preset tiny
  transfusion bench scaling --axis threads --rounds 7 --json")]
pub(crate) struct Scaling {
    /// What is varied. May be repeated.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Axis::value_variants().iter().copied())]
    axis: Vec<Axis>,
    #[command(flatten)]
    sizing: Sizing,
    #[command(flatten)]
    timing: Timing,
    #[command(flatten)]
    format: Format,
}

/// What is varied.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Axis {
    Threads,
    Positions,
    Width,
    Layers,
    Documents,
}

impl Scaling {
    /// Measures and prints.
    pub(crate) fn run(self) -> Outcome {
        let config = self.sizing.resolve()?;
        let stop = console::interruption("stopping after this block")?;
        let machine = Machine::cpu(self.timing.threads());
        let measured = scaling::Scaling {
            preset: &self.sizing.settings.preset,
            config: &config,
            machine: &machine,
            schedule: self.timing.schedule(1.0),
            cancel: Cancel(Some(&stop)),
        };
        let axes: Vec<scaling::Axis> = self.axis.iter().map(|a| a.of()).collect();
        let rows = measured.measure(&axes, &mut |text| console::note(text));
        self.format.print(&rows.map_err(failure)?)
    }
}

impl Axis {
    fn of(self) -> scaling::Axis {
        match self {
            Axis::Threads => scaling::Axis::Threads,
            Axis::Positions => scaling::Axis::Positions,
            Axis::Width => scaling::Axis::Width,
            Axis::Layers => scaling::Axis::Layers,
            Axis::Documents => scaling::Axis::Documents,
        }
    }
}
