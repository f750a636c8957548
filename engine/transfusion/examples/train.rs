//! An application's own training loop: a small model learns to draw the built-in shapes.
//!
//! `cargo run --release --example train -- [STEPS]`
use std::sync::Arc;
use transfusion::{
    Result,
    batch::{Batch, PackOptions, Packer},
    data::{Part, shapes},
    diffusion,
    engine::{self, Engine},
    run::{RunConfig, geometry},
    sample::{Cancel, Goal, SampleOptions, sample},
    train::Trainer,
};

fn main() -> Result<()> {
    let steps = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(200);
    let mut config = RunConfig::preset("tiny")?;
    config.train.steps = steps;

    let engine = Engine::initialised(config.model.clone(), engine::cpu(0)?, config.train.seed)?;
    let mut trainer = Trainer::new(engine, config.train.clone())?;

    let source =
        Arc::new(shapes::Shapes { seed: config.train.seed, split: shapes::Split::Train, count: None });
    let geometry = geometry(&config.model, trainer.capacity());
    let tokens = config.model.tokens();
    let mut packer = Packer::new(source, tokens, geometry, PackOptions::default(), config.train.seed)?;
    let mut batch = Batch::new(geometry);
    let objective = config.model.image().map(|i| i.objective);
    let coefficients = |t: f32| objective.map_or([0.0; 4], |o| diffusion::coefficients(o, t));

    for _ in 0..steps {
        packer.fill(&mut batch, &coefficients);
        let r = trainer.step(std::slice::from_ref(&batch))?;
        if r.step % 20 == 0 {
            println!("step {:4}  text {:.3} nats  image {:.4}", r.step, r.loss_text, r.loss_image);
        }
    }

    let prompt = vec![Part::Text(b"a big circle in red".to_vec())];
    let options = SampleOptions { goal: Goal::Image, steps: 20, ..SampleOptions::default() };
    let drawn = sample(trainer.engine(), &[prompt], &options, &mut |_| (), Cancel(None))?;
    for part in drawn.iter().flatten() {
        if let Part::Image(picture) = part {
            println!("drew a picture of {}x{}", picture.width(), picture.height());
        }
    }
    Ok(())
}
