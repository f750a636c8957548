//! What a training step takes of a machine, before anything runs, and the settings with which it fits.
use crate::{
    config::Float, engine::Program, error::Result, model::Recompute, run::RunConfig, train::TrainOptions,
};
use transfusion_core::{device::CpuDevice, launch::Target, op::Kind, plan::Plan};

/// The plans of a training step.
#[derive(Debug)]
pub struct Step {
    /// The loss of the first micro-batch, and its gradient.
    pub loss: Plan,
    /// How many of its kind are open: with several micro-batches also one that adds to the gradient.
    pub losses: usize,
    /// The optimiser's step.
    pub update: Plan,
}

impl Step {
    /// The very plans that would run on a machine; `None` is the CPU.
    ///
    /// # Errors
    /// If the configuration makes no sense, or the machine lacks a kernel for an op.
    pub fn new(config: &RunConfig, target: Option<&Target>) -> Result<Step> {
        let losses = config.train.losses().len();
        Ok(Step { loss: loss(config, target)?, losses, update: update(config, target)? })
    }
}

fn loss(config: &RunConfig, target: Option<&Target>) -> Result<Plan> {
    let capacity = config.train.capacity(&config.model);
    Ok(Plan::on(&Program::Loss(capacity, config.train.loss()).graph(&config.model)?, target)?)
}

fn update(config: &RunConfig, target: Option<&Target>) -> Result<Plan> {
    Ok(Plan::on(&Program::Update(config.train.update()).graph(&config.model)?, target)?)
}

/// Bytes and work of a training step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Bytes of the weights.
    pub parameters: u64,
    /// Bytes of their gradients.
    pub gradients: u64,
    /// Bytes of moments and master weights.
    pub optimizer: u64,
    /// Bytes of the running means.
    pub ema: u64,
    /// Bytes of what the host writes.
    pub inputs: u64,
    /// Bytes of the arena that the plans share: the hungrier one's.
    pub scratch: u64,
    /// Bytes that the CPU decodes bf16 operands into; none where kernels run.
    pub decoded: u64,
    /// Bytes that ops on the CPU work in; kernels have theirs in the arena.
    pub workspace: u64,
    /// FLOPs of a micro-batch as they are executed, every position of it used.
    pub loss: u64,
    /// Those among them that recomputation repeats.
    pub repeated: u64,
    /// FLOPs of the optimiser's step.
    pub update: u64,
}

impl Footprint {
    /// Of the plans of a step; on a CPU, with so many threads, 0 for one on each core.
    pub fn new(step: &Step, threads: usize) -> Footprint {
        Footprint::of(&step.loss, step.losses, &step.update, threads)
    }

    fn of(loss: &Plan, losses: usize, update: &Plan, threads: usize) -> Footprint {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { cores() } else { threads };
        let [decoded, workspace] = CpuDevice::extra_bytes(&[loss, update], threads).map(|n| n as u64);
        Footprint {
            parameters: update.state_bytes(Kind::Param),
            gradients: update.state_bytes(Kind::Grad),
            optimizer: update.state_bytes(Kind::Optim),
            ema: update.state_bytes(Kind::Ema),
            inputs: (losses * loss.input_bytes + update.input_bytes) as u64,
            scratch: loss.scratch_bytes.max(update.scratch_bytes) as u64,
            decoded,
            workspace,
            loss: loss.cost().flops,
            repeated: loss.repeated().flops,
            update: update.cost().flops,
        }
    }

    /// Bytes by what they are for.
    pub fn bytes(&self) -> [(&'static str, u64); 8] {
        [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("ema", self.ema),
            ("inputs", self.inputs),
            ("scratch", self.scratch),
            ("decoded", self.decoded),
            ("workspace", self.workspace),
        ]
    }

    /// All bytes.
    pub fn total(&self) -> u64 {
        self.bytes().iter().map(|(_, n)| n).sum()
    }

    /// FLOPs of a micro-batch without those that recomputation repeats.
    pub fn model(&self) -> u64 {
        self.loss - self.repeated
    }
}

/// Settings that decide what a step takes, and what it takes.
#[derive(Clone, Debug)]
pub struct Alternative {
    /// The settings.
    pub train: TrainOptions,
    /// What a step with them takes.
    pub footprint: Footprint,
    /// Whether that is in the budget.
    pub fits: bool,
}

impl Alternative {
    /// Its settings that `given` has otherwise, as `train.rows=4`.
    pub fn settings(&self, given: &TrainOptions) -> Vec<String> {
        let keys = ["rows", "accumulation", "images", "recompute", "gradients", "moments"];
        let of = |train: &TrainOptions| serde_json::to_value(train).unwrap_or_default();
        let (mine, given) = (of(&self.train), of(given));
        let word = |key: &str| match &mine[key] {
            serde_json::Value::String(word) => format!("train.{key}={word}"),
            other => format!("train.{key}={other}"),
        };
        keys.into_iter().filter(|key| mine[key] != given[key]).map(word).collect()
    }
}

/// What gradients and moments are stored as, the least rounded first.
const STORED: [(Float, Float); 4] = [
    (Float::Float32, Float::Float32),
    (Float::Bfloat16, Float::Float32),
    (Float::Float32, Float::Bfloat16),
    (Float::Bfloat16, Float::Bfloat16),
];

/// Every way to hold gradients and moments and to recompute, each with the largest micro-batches whose step takes
/// at most `budget` bytes; with the smallest, where none does. An optimiser step keeps its rows: they are cut into
/// other micro-batches.
///
/// They are ordered by preference, so that the first that fits is the one to take: what works least comes first, and
/// of those that work as much what rounds least. Left out is what [`TrainOptions::check`] refuses.
///
/// # Errors
/// As [`Step::new`].
pub fn fit(config: &RunConfig, target: Option<&Target>, budget: u64) -> Result<Vec<Alternative>> {
    config.model.check()?;
    config.train.check()?;
    let mut found = Vec::new();
    for recompute in [Recompute::None, Recompute::Cheap, Recompute::Blocks] {
        for (gradients, moments) in STORED {
            let train = TrainOptions { recompute, gradients, moments, ..config.train.clone() };
            found.extend(largest(&RunConfig { train, ..config.clone() }, target, budget)?);
        }
    }
    Ok(found)
}

/// The largest micro-batches that fit, or the smallest of all; none where no setting is allowed.
fn largest(config: &RunConfig, target: Option<&Target>, budget: u64) -> Result<Option<Alternative>> {
    let update = update(config, target)?;
    let mut best: Option<Alternative> = None;
    for train in micro_batches(&config.train) {
        let loss = match loss(&RunConfig { train: train.clone(), ..config.clone() }, target) {
            // More rows than a kernel can number.
            Err(_) if best.is_some() => break,
            loss => loss?,
        };
        let footprint = Footprint::of(&loss, train.losses().len(), &update, 0);
        let fits = footprint.total() <= budget;
        if fits || best.is_none() {
            best = Some(Alternative { train, footprint, fits });
        }
        if !fits {
            break;
        }
    }
    Ok(best)
}

/// The same optimiser step in micro-batches of every size that divides it, the smallest first.
fn micro_batches(train: &TrainOptions) -> Vec<TrainOptions> {
    let all = train.rows * train.accumulation;
    let cut = |rows: usize| TrainOptions {
        rows,
        accumulation: all / rows,
        images: (train.images * rows).div_ceil(train.rows),
        ..train.clone()
    };
    let sizes = (1..=all).filter(|rows| all.is_multiple_of(*rows));
    sizes.map(cut).filter(|train| train.check().is_ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_fits_works_least_and_rounds_least() {
        let mut config = RunConfig::preset("text-tiny").unwrap();
        (config.train.rows, config.train.accumulation) = (1, 1);
        let all = fit(&config, None, u64::MAX).unwrap();
        assert!(all.len() == 12 && all.iter().all(|a| a.fits));
        assert!(all.is_sorted_by_key(|a| a.footprint.loss));
        assert_eq!(all[0].train, config.train);
        for a in &all {
            let budget = a.footprint.total();
            let want = all.iter().find(|a| a.footprint.total() <= budget).unwrap();
            let found = fit(&config, None, budget).unwrap();
            assert_eq!(found.iter().find(|a| a.fits).unwrap().train, want.train);
        }
        let least = all.iter().map(|a| a.footprint.total()).min().unwrap();
        assert!(fit(&config, None, least - 1).unwrap().iter().all(|a| !a.fits));
    }

    #[test]
    fn an_optimiser_step_keeps_its_rows() {
        let mut config = RunConfig::preset("tiny").unwrap();
        (config.train.rows, config.train.accumulation) = (4, 3);
        let sizes: Vec<usize> = micro_batches(&config.train).iter().map(|t| t.rows).collect();
        assert_eq!(sizes, [1, 2, 3, 4, 6, 12]);
        let mut before = 0;
        for train in micro_batches(&config.train) {
            assert_eq!(train.rows * train.accumulation, 12);
            let sized = RunConfig { train: train.clone(), ..config.clone() };
            // With just as much memory as it takes, it is the largest that fits.
            let budget = Footprint::new(&Step::new(&sized, None).unwrap(), 0).total();
            assert!(budget > before);
            assert_eq!(fit(&config, None, budget).unwrap()[0].train, train);
            before = budget;
        }
    }
}
