//! What a training step costs with more threads, positions, width, layers and documents; on a CPU.
use crate::{
    error::Result,
    floats::Floats,
    machine::Machine,
    peak::peak,
    row::Row,
    statistics::{Schedule, alternate, median},
    step::{Step, packing},
};
use std::time::Duration;
use transfusion::{config::ModelConfig, engine::cpu, rehearsal::Packing, run::RunConfig, sample::Cancel};

/// What is varied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Threads, at a width of 512: one, then as many as the machine has.
    Threads,
    /// Positions of a row, of as many positions in all.
    Positions,
    /// Width of the model, its heads as wide as before.
    Width,
    /// Layers.
    Layers,
    /// Documents of equal length in a row.
    Documents,
}

impl Axis {
    /// All of them.
    pub const ALL: [Axis; 5] = [Axis::Threads, Axis::Positions, Axis::Width, Axis::Layers, Axis::Documents];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Axis::Threads => "threads",
            Axis::Positions => "positions",
            Axis::Width => "width",
            Axis::Layers => "layers",
            Axis::Documents => "documents",
        }
    }
}

/// Width at which threads are compared.
const WIDTH: usize = 512;

/// What costs are measured with.
pub struct Scaling<'a> {
    /// Name of the preset, for the rows.
    pub preset: &'a str,
    /// The model and its batch, of which one size is varied at a time.
    pub config: &'a RunConfig,
    /// The machine.
    pub machine: &'a Machine,
    /// How long each.
    pub schedule: Schedule,
    /// Ends it.
    pub cancel: Cancel<'a>,
}

impl Scaling<'_> {
    /// Measures along some axes.
    ///
    /// # Errors
    /// If a size makes no sense, or memory is short.
    pub fn measure(&self, axes: &[Axis], note: &mut dyn FnMut(String)) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for axis in axes {
            match axis {
                Axis::Threads => rows.extend(self.threads(note)?),
                axis => {
                    for (config, packing, shape) in self.sizes(*axis) {
                        note(format!("{}: {shape}", axis.name()));
                        rows.push(self.cost(*axis, &config, packing, shape)?);
                    }
                }
            }
        }
        Ok(rows)
    }

    /// The sizes along an axis: settings, how rows are filled, and what to call them.
    fn sizes(&self, axis: Axis) -> Vec<(RunConfig, Packing, String)> {
        let (c, whole) = (self.config, self.config.train.rows * self.config.train.positions);
        let one = |n: usize| {
            let (mut config, mut packing) = (c.clone(), packing(c));
            match axis {
                Axis::Positions => {
                    (config.train.positions, config.train.rows) = (n, (whole / n).max(1));
                    packing = Packing::Equal(1);
                }
                Axis::Width => config.model = widened(&c.model, n),
                Axis::Layers => config.model.num_hidden_layers = n,
                Axis::Documents | Axis::Threads => packing = Packing::Equal(n),
            }
            let shape = match axis {
                Axis::Positions => format!("{} x {n}", config.train.rows),
                axis => format!("{} {n}", axis.name()),
            };
            (config, packing, shape)
        };
        let sizes: &[usize] = match axis {
            Axis::Positions => &[64, 128, 256, 512, 1024, 2048],
            Axis::Width => &[64, 128, 256, WIDTH],
            Axis::Layers => &[1, 2, 4, 8],
            Axis::Documents => &[1, 2, 4, 8],
            Axis::Threads => &[],
        };
        let least = c.model.image().map_or(8, |image| image.patches() + 8);
        let fits = |n: &&usize| match axis {
            Axis::Positions => **n >= least && **n <= whole.max(least),
            Axis::Documents => c.train.positions / **n >= least,
            _ => true,
        };
        sizes.iter().filter(fits).map(|n| one(*n)).collect()
    }

    fn row(&self, axis: Axis, config: &RunConfig, shape: String) -> Row {
        let row = Row::new(self.machine, "scaling", axis.name()).of(Floats::of(&config.model, true));
        Row { preset: self.preset.into(), shape, ..row }
    }

    /// The cost of a step of one size; the rate is that of positions that hold a document.
    fn cost(&self, axis: Axis, config: &RunConfig, packing: Packing, shape: String) -> Result<Row> {
        let mut step = Step::new(config, packing, cpu(self.machine.threads)?)?;
        (0..3).try_for_each(|_| step.take().map(drop))?;
        let pair = alternate(self.schedule, &mut |s| step.block(s), None, self.cancel)?;
        let row = self.row(axis, config, shape).timed(&pair);
        let row = row.rated(step.work()?, step.least(self.machine)?, self.machine);
        let rate = row.ms.map(|ms| step.batch().used() as f64 / ms * 1e3);
        Ok(Row { rate, unit: Some("tokens/s".into()), ..row })
    }

    /// A step with one thread and with all, in turn with multiply-adds in registers with one and with all, of the kind
    /// that the step's products are: what more threads gain, and the share of that which a step gains.
    fn threads(&self, note: &mut dyn FnMut(String)) -> Result<Vec<Row>> {
        let (config, all) = (wide(self.config), self.machine.threads);
        let mut steps = Vec::new();
        for threads in [1, all] {
            let mut step = Step::new(&config, packing(&config), cpu(threads)?)?;
            (0..2).try_for_each(|_| step.take().map(drop))?;
            steps.push(step);
        }
        let [one, many] = &mut steps[..] else { return Ok(vec![]) };
        note(format!("threads: width {WIDTH}, 1 and {all}"));
        let precision = config.model.precision(config.model.dtype());
        let mut gains = Vec::new();
        let time = Duration::from_secs_f64((self.schedule.seconds / 4.0).max(0.02));
        let pair = alternate(
            self.schedule,
            &mut |s| {
                let [single, several] = [1, all].map(|n| peak(n, precision, time).rate);
                gains.push(several / single);
                one.block(s)
            },
            Some(&mut |s| many.block(s)),
            self.cancel,
        )?;
        let (adds, steps) = (median(&gains), 1.0 / pair.speedup());
        let figure = |what: &str, value: f64| Row {
            rate: Some(value),
            unit: Some("x".into()),
            ..self.row(Axis::Threads, &config, what.into())
        };
        let timed = |threads: usize, ms: f64, spread: f64| Row {
            ms: Some(ms),
            spread: Some(spread),
            threads,
            ..self.row(Axis::Threads, &config, format!("width {WIDTH}, {threads} threads"))
        };
        Ok(vec![
            timed(1, pair.ours.median(), pair.ours.spread()),
            timed(all, pair.theirs.median(), pair.theirs.spread()),
            figure("step: 1 thread over all", steps),
            figure("multiply-adds: all threads over 1", adds),
            figure("share of what multiply-adds gain", steps / adds),
        ])
    }
}

/// The same model of another width: heads of the same width, as many as it takes.
fn widened(c: &ModelConfig, width: usize) -> ModelConfig {
    let heads = (width / c.heads().width.max(1)).max(1);
    ModelConfig {
        hidden_size: width,
        intermediate_size: (c.intermediate_size * width / c.hidden_size.max(1)).next_multiple_of(8),
        num_attention_heads: heads,
        num_key_value_heads: Some(heads),
        head_dim: Some(c.heads().width),
        ..c.clone()
    }
}

fn wide(c: &RunConfig) -> RunConfig {
    RunConfig { model: widened(&c.model, WIDTH), ..c.clone() }
}
