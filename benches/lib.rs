//! Criterion benches of transfusion, and under `peers` what they are held against.
use std::sync::Arc;
use transfusion::{
    Result,
    batch::{Batch, PackOptions, Packer},
    data::{self, Shared, shapes},
    diffusion,
    engine::{self, Engine},
    run::{RunConfig, geometry},
    train::Trainer,
};

/// A preset in training, and a batch of the built-in shapes or of a text of repeated sentences.
///
/// # Errors
/// If there is no such preset.
pub fn training(preset: &str, threads: usize) -> Result<(Trainer, Batch)> {
    let config = RunConfig::preset(preset)?;
    let engine = Engine::initialised(config.model.clone(), engine::cpu(threads)?, 1)?;
    let trainer = Trainer::new(engine, config.train.clone())?;
    let source: Shared = if config.model.image().is_some() {
        Arc::new(shapes::Shapes { seed: 1, split: shapes::Split::Train, count: None })
    } else {
        let sentence = b"The quick brown fox jumps over the lazy dog. ".repeat(64);
        let parts = vec![data::Part::Text(sentence[..config.train.positions + 1].to_vec())];
        Arc::new(data::Documents::new(vec![data::Document { parts, stream: true }], "sentences"))
    };
    let geometry = geometry(&config.model, trainer.capacity());
    let mut packer = Packer::new(source, config.model.tokens(), geometry, PackOptions::default(), 1)?;
    let mut batch = Batch::new(geometry);
    let objective = config.model.image().map(|i| i.objective);
    packer.fill(&mut batch, &|t| objective.map_or([0.0; 4], |o| diffusion::coefficients(o, t)));
    Ok((trainer, batch))
}
