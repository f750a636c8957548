//! The programs of a model by name, at the sizes that its settings say.
use crate::{
    engine::Program,
    model::{Extend, ImagePass, LossOptions},
    run::RunConfig,
};

/// Positions of a prompt that sampling takes at once.
pub const PREFILL: usize = 128;

/// A program by name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Named {
    /// `loss`, `update`, `prefill`, `decode`, `commit`, `denoise`.
    pub name: &'static str,
    /// Positions of each of its rows.
    pub positions: usize,
    /// The program.
    pub program: Program,
}

/// The loss of a micro-batch.
pub fn loss(config: &RunConfig, options: LossOptions) -> Named {
    let capacity = config.train.capacity(&config.model);
    Named { name: "loss", positions: config.train.positions, program: Program::Loss(capacity, options) }
}

/// Those of a training step.
pub fn training(config: &RunConfig) -> Vec<Named> {
    let update = Program::Update(config.train.update());
    vec![loss(config, config.train.loss()), Named { name: "update", positions: 0, program: update }]
}

/// Those that sampling replays: a prompt, a token, and, with images, a given image and a guided step of one.
pub fn sampling(config: &RunConfig) -> Vec<Named> {
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
