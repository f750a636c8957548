//! The programs of a model by name, at the sizes that its settings say.
use crate::{console, failure::Outcome, settings::Settings};
use clap::{Args, ValueEnum};
use transfusion::{
    engine::Program,
    model::{Extend, ImagePass, LossOptions},
    run::RunConfig,
};

/// Positions of a prompt that sampling takes at once.
const PREFILL: usize = 128;

/// A program by name.
pub(crate) struct Named {
    pub(crate) name: &'static str,
    /// Positions of each of its rows.
    pub(crate) positions: usize,
    pub(crate) program: Program,
}

/// Which programs are meant.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum Which {
    /// A training step: loss and update.
    Train,
    /// The loss of a micro-batch, and its gradient.
    Loss,
    /// The optimiser's step.
    Update,
    /// The loss alone.
    Eval,
    /// A prompt into the cache.
    Prefill,
    /// One token of each sequence.
    Decode,
    /// A given image into the cache.
    Commit,
    /// A guided step of the sampler.
    Denoise,
}

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
}

impl Sizing {
    /// The settings, in bf16: what the kernels of the large ops take.
    pub(crate) fn resolve(&self) -> Outcome<RunConfig> {
        let mut config = self.settings.resolve()?;
        config.train.rows = self.batch.map_or(config.train.rows, usize::from);
        config.train.positions = self.positions.map_or(config.train.positions, |n| n as usize);
        if config.model.torch_dtype != "bfloat16" {
            let stored = std::mem::replace(&mut config.model.torch_dtype, "bfloat16".into());
            console::note(format!("in bf16, which kernels take, in place of the settings' {stored}"));
        }
        config.model.check()?;
        config.train.check()?;
        Ok(config)
    }
}

impl Which {
    /// Those of a model; none where it has no images and they are about images.
    pub(crate) fn of(self, config: &RunConfig) -> Vec<Named> {
        let name = match self {
            Which::Train => return training(config),
            Which::Loss => "loss",
            Which::Update => "update",
            Which::Eval => "eval",
            Which::Prefill => "prefill",
            Which::Decode => "decode",
            Which::Commit => "commit",
            Which::Denoise => "denoise",
        };
        let evaluation = Named { name: "eval", ..loss(config, LossOptions::EVAL) };
        let all = training(config).into_iter().chain([evaluation]).chain(sampling(config));
        all.filter(|p| p.name == name).collect()
    }
}

fn loss(config: &RunConfig, options: LossOptions) -> Named {
    let capacity = config.train.capacity(&config.model);
    Named { name: "loss", positions: config.train.positions, program: Program::Loss(capacity, options) }
}

/// Those of a training step.
pub(crate) fn training(config: &RunConfig) -> Vec<Named> {
    let update = Program::Update(config.train.update());
    vec![loss(config, config.train.loss()), Named { name: "update", positions: 0, program: update }]
}

/// Those that sampling replays: a prompt, a token, and, with images, a given image and a guided step of one.
pub(crate) fn sampling(config: &RunConfig) -> Vec<Named> {
    let train = &config.train;
    let extend = |rows: usize, positions| Extend {
        rows,
        positions,
        slots: train.rows,
        capacity: train.positions,
        ema: train.ema > 0.0,
    };
    let prefill = PREFILL.min(train.positions);
    let text = |name, positions| {
        let program = Program::Text(extend(train.rows, positions));
        Named { name, positions, program }
    };
    let mut programs = vec![text("prefill", prefill), text("decode", 1)];
    if let Some(image) = config.model.image() {
        let positions = image.patches();
        let image = |name, rows: usize, pass| {
            let extend = Extend { slots: rows, ..extend(rows, positions) };
            Named { name, positions, program: Program::Image(extend, pass) }
        };
        programs.push(image("commit", train.rows, ImagePass::Commit));
        programs.push(image("denoise", 2 * train.rows, ImagePass::Denoise { guided: true }));
    }
    programs
}
