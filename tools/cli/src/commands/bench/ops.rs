//! `transfusion bench ops`.
use super::common::{Bout, Format, Sizing, failure};
use crate::{
    console,
    failure::{Failure, Outcome},
};
use clap::{Args, ValueEnum};
use transfusion::sample::Cancel;
use transfusion_benches::ops::{self, Ops as Measured};

/// Time every distinct op of the plans of training and sampling, alone.
///
/// Which those are, and the numbers that they meet, follows from the plans of the settings; nothing is listed
/// by hand. PyTorch does what each does in the layout that it likes best, on the same numbers, and has to agree.
/// FLOPs of attention count pairs of a query and a key that it sees. On a GPU: events, inputs in several places
/// in turn, and a second-level cache that is overwritten before every run.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion bench ops --preset tiny --device cpu --against torch
  transfusion bench ops linear attention --preset text-tiny --device cpu --json
  transfusion bench ops --preset 0.16b --device cuda --group attention --against torch
  transfusion bench ops --group squares --device cpu --against torch")]
pub(crate) struct Ops {
    /// Ops, as `linear attention` [default: all of the groups].
    #[arg(value_name = "OP")]
    ops: Vec<String>,
    /// Which kinds of ops; each takes a few minutes. May be repeated.
    #[arg(long, value_enum, default_values_t = [Group::Products, Group::Attention, Group::Rows, Group::Optimiser])]
    group: Vec<Group>,
    #[command(flatten)]
    sizing: Sizing,
    #[command(flatten)]
    bout: Bout,
    /// Leave out the check of our results against the CPU's.
    #[arg(long)]
    unchecked: bool,
    #[command(flatten)]
    format: Format,
}

/// Ops that belong together.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Group {
    /// Matrix products, forward and both ways back.
    Products,
    /// Attention, forward and back.
    Attention,
    /// Row by row, element by element, and cross entropy.
    Rows,
    /// The optimiser, op by op and as a whole.
    Optimiser,
    /// Square products: what the machine does at best.
    Squares,
    /// 3x3 convolutions, of PyTorch alone.
    Convolutions,
}

impl Ops {
    /// Measures and prints.
    pub(crate) fn run(self) -> Outcome {
        let config = self.sizing.resolve()?;
        let stop = console::interruption("stopping after this block")?;
        let opened = self.bout.open(&config)?;
        let mut peer = self.bout.peer(&opened)?;
        let measured = Measured {
            preset: &self.sizing.settings.preset,
            config: &config,
            packing: self.sizing.packing(&config),
            machine: &opened.machine,
            schedule: self.bout.schedule(0.05),
            checked: !self.unchecked,
            cancel: Cancel(Some(&stop)),
        };
        let groups: Vec<ops::Group> = self.group.iter().map(|g| g.of()).collect();
        let mut note = |text| console::note(text);
        let rows = measured.measure(opened.device, peer.as_mut(), &groups, &self.ops, &mut note);
        let rows = rows.map_err(failure)?;
        if rows.is_empty() {
            let why = format!("{} has none of these ops", self.sizing.settings.preset);
            return Err(Failure::usage(why).hint("`transfusion plan --listing` shows which it has"));
        }
        self.format.print(&rows)
    }
}

impl Group {
    fn of(self) -> ops::Group {
        match self {
            Group::Products => ops::Group::Products,
            Group::Attention => ops::Group::Attention,
            Group::Rows => ops::Group::Rows,
            Group::Optimiser => ops::Group::Optimiser,
            Group::Squares => ops::Group::Squares,
            Group::Convolutions => ops::Group::Convolutions,
        }
    }
}
