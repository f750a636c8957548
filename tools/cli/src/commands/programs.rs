//! The programs of a model by name, at the sizes that its settings say.
use crate::{
    console,
    failure::{Failure, Outcome},
    settings::Settings,
};
use clap::{Args, ValueEnum};
use transfusion::{
    model::LossOptions,
    programs::{Named, loss, sampling, training},
    rehearsal::{self, Packing, Scene},
    run::RunConfig,
};

/// Which programs are meant.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum Which {
    /// A training step: loss and update.
    Train,
    /// What sampling replays: prefill, decode and, with images, commit and denoise.
    Sample,
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

    /// The programs that are meant, of a model of these settings.
    pub(crate) fn programs(&self, which: Which, config: &RunConfig) -> Outcome<Vec<Named>> {
        let programs = which.of(config);
        if programs.is_empty() {
            let why = format!("{} has no images to sample", self.settings.preset);
            return Err(Failure::usage(why).hint("--program decode is one of text"));
        }
        Ok(programs)
    }

    /// The same, each with every number that it reads.
    pub(crate) fn scenes(&self, which: Which, config: &RunConfig, seed: u64) -> Outcome<Vec<Scene>> {
        let meant = self.programs(which, config)?;
        let all = match which {
            Which::Train | Which::Loss | Which::Update => {
                rehearsal::training_step(config, Packing::Shapes, seed)?.into()
            }
            Which::Eval => vec![rehearsal::evaluation(config, Packing::Shapes, seed)?],
            _ => rehearsal::sampling(config, seed)?,
        };
        Ok(all.into_iter().filter(|scene| meant.iter().any(|p| p.name == scene.name)).collect())
    }
}

impl Which {
    /// Those of a model; none where it has no images and they are about images.
    fn of(self, config: &RunConfig) -> Vec<Named> {
        let name = match self {
            Which::Train => return training(config),
            Which::Sample => return sampling(config),
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
