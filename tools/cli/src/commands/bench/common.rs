//! What the measurements share: the model, the machine, the other side, and how figures are printed.
use crate::{
    console,
    failure::{Failure, Outcome},
    settings::Settings,
};
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use transfusion::{hardware::Hardware, rehearsal::Packing, run::RunConfig};
use transfusion_benches::{
    Error,
    machine::Machine,
    peer::Peer,
    row::{self, Row},
    statistics::Schedule,
    step,
};
use transfusion_core::device::Device;

/// A model, and how much of it at once.
#[derive(Args, Debug)]
pub(crate) struct Sizing {
    #[command(flatten)]
    pub(crate) settings: Settings,
    /// Rows of a batch, and sequences that are sampled at once [default: what the settings say].
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: Option<u16>,
    /// Positions of a row, and of a cached sequence [default: what the settings say].
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(3..=1 << 20))]
    positions: Option<u32>,
    /// How floats are stored [default: what the settings say].
    #[arg(long, value_enum)]
    dtype: Option<Float>,
    /// Pack every row with N documents of equal length [default: shapes, as `train` packs them; of text, one
    /// window; of latents, one long document].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    documents: Option<u16>,
}

/// A storage type.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Float {
    F32,
    Bf16,
}

impl Sizing {
    /// The settings.
    pub(crate) fn resolve(&self) -> Outcome<RunConfig> {
        let mut config = self.settings.resolve()?;
        config.train.rows = self.batch.map_or(config.train.rows, usize::from);
        config.train.positions = self.positions.map_or(config.train.positions, |n| n as usize);
        if let Some(float) = self.dtype {
            let name = match float {
                Float::F32 => "float32",
                Float::Bf16 => "bfloat16",
            };
            config.model.torch_dtype = name.into();
        }
        config.model.check()?;
        config.train.check()?;
        Ok(config)
    }

    /// The settings, with one sequence where nobody says how many.
    pub(crate) fn one_sequence(&self) -> Outcome<RunConfig> {
        let mut config = self.resolve()?;
        config.train.rows = self.batch.map_or(1, usize::from);
        Ok(config)
    }

    /// How rows are filled.
    pub(crate) fn packing(&self, config: &RunConfig) -> Packing {
        self.documents.map_or_else(|| step::packing(config), |n| Packing::Equal(n.into()))
    }
}

/// How long, and with how many threads.
#[derive(Args, Debug)]
pub(crate) struct Timing {
    /// Threads of the CPU, on both sides; 0 is one for each core.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=1024))]
    threads: u16,
    /// Blocks of each side, in turn.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(2..))]
    rounds: u16,
    /// Of a block [default: 2, of an op 0.05].
    #[arg(long, value_name = "S", value_parser = seconds)]
    seconds: Option<f64>,
}

impl Timing {
    /// How many threads; 0 is one for each core.
    pub(crate) fn threads(&self) -> usize {
        usize::from(self.threads)
    }

    /// How long, where nobody says otherwise in blocks of so many seconds.
    pub(crate) fn schedule(&self, seconds: f64) -> Schedule {
        Schedule { rounds: usize::from(self.rounds), seconds: self.seconds.unwrap_or(seconds) }
    }
}

/// Where it runs, and against what.
#[derive(Args, Debug)]
pub(crate) struct Bout {
    /// What it runs on: cpu, cuda, cuda:N, or auto, which is a GPU if one is there that has a kernel for
    /// everything the model does, else the CPU.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Hardware,
    /// Who else is measured.
    #[arg(long, value_enum, value_name = "PEER")]
    against: Option<Against>,
    /// The Python interpreter that has PyTorch.
    #[arg(long, value_name = "PATH", default_value = "python3", requires = "against")]
    python: PathBuf,
    /// Measure only this variant of the other side, as "eager medium"; may be repeated [default: all of them].
    #[arg(long, value_name = "WORDS", requires = "against")]
    variant: Vec<String>,
    #[command(flatten)]
    timing: Timing,
}

/// Who else is measured.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Against {
    /// PyTorch, as somebody who knows it would use it.
    Torch,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(s) if (0.0..=600.0).contains(&s) => Ok(s),
        _ => Err("a number of seconds from 0 to 600".into()),
    }
}

/// A machine that is open, and described.
pub(crate) struct Opened {
    pub(crate) device: Box<dyn Device>,
    /// `cpu` or `cuda:N`.
    pub(crate) name: String,
    pub(crate) machine: Machine,
}

impl Bout {
    /// Opens the machine for a model, and measures what it can do.
    pub(crate) fn open(&self, config: &RunConfig) -> Outcome<Opened> {
        let opened = self.device.open(self.timing.threads(), || Ok(config.model.clone()))?;
        opened.notices.iter().for_each(console::note);
        let ordinal = match self.device {
            Hardware::Cuda(ordinal) => ordinal,
            _ => 0,
        };
        let (name, machine) = match opened.device.target() {
            None => ("cpu".into(), Machine::cpu(self.timing.threads())),
            Some(_) => (format!("cuda:{ordinal}"), Machine::gpu(ordinal).map_err(failure)?),
        };
        Ok(Opened { device: opened.device, name, machine })
    }

    /// The other side, where one is wanted, on the same kind of machine.
    pub(crate) fn peer(&self, opened: &Opened) -> Outcome<Option<Peer>> {
        if self.against.is_none() {
            return Ok(None);
        }
        let mut peer = Peer::start(&self.python, &opened.name, opened.machine.threads).map_err(failure)?;
        peer.only.clone_from(&self.variant);
        Ok(Some(peer))
    }

    /// How long, where nobody says otherwise in blocks of so many seconds.
    pub(crate) fn schedule(&self, seconds: f64) -> Schedule {
        self.timing.schedule(seconds)
    }
}

/// How figures are printed.
#[derive(Args, Debug)]
#[group(multiple = false)]
pub(crate) struct Format {
    /// Print a line of JSON for each row, with "ms" and, of a comparison, "torch_ms" and "speedup".
    #[arg(long)]
    json: bool,
    /// Print a table in Markdown [default].
    #[arg(long)]
    md: bool,
    /// Print CSV.
    #[arg(long)]
    csv: bool,
}

impl Format {
    /// Prints rows.
    pub(crate) fn print(&self, rows: &[Row]) -> Outcome {
        let text = match (self.json, self.csv) {
            (true, _) => row::json(rows),
            (_, true) => row::csv(rows),
            _ => format!("{}\n{}", row::provenance(rows), row::markdown(rows)),
        };
        console::print(text.trim_end())
    }
}

/// An error of a measurement, with what may help.
pub(crate) fn failure(e: Error) -> Failure {
    match e {
        Error::Engine(e) => e.into(),
        Error::Peer { what, remedy: Some(remedy) } => Failure::error(what).hint(remedy),
        Error::Peer { what, remedy: None } => Failure::error(what),
    }
}
