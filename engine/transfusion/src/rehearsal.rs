//! One training step laid open: its programs, each with every number that it reads. For those who run a step
//! op by op, to see where a device leaves the CPU or what its kernels move.
use crate::{
    batch::{Batch, PackOptions, Packer},
    data::{
        Document, Documents, Part, Shared,
        shapes::{self, Shapes, Split},
    },
    diffusion,
    engine::{Engine, Program, cpu},
    error::Result,
    model::Capacity,
    run::{DataOptions, RunConfig, geometry},
    train::{Trainer, feed, seed_words},
};
use std::{collections::HashMap, sync::Arc};
use transfusion_core::{
    device::Place,
    graph::{Graph, Role},
    tensor::{Host, Tensor},
};

/// Captions that a model of text alone is fed with.
const CAPTIONS: u64 = 256;

/// A program with the numbers that it reads.
#[derive(Debug)]
pub struct Scene {
    /// `loss` or `update`.
    pub name: &'static str,
    /// The program.
    pub graph: Graph,
    /// What its inputs and states hold before it runs.
    pub given: HashMap<Tensor, Host>,
}

/// The first training step of a model with weights drawn under `seed`, on one micro-batch of the built-in
/// shapes (of their captions, for a model without images), at the full learning rate: the loss with its
/// gradient, and the update. It is run on the CPU, with all its memory.
///
/// # Errors
/// If the configuration makes no sense, or memory is short.
pub fn training_step(config: &RunConfig, seed: u64) -> Result<[Scene; 2]> {
    let data = DataOptions { paths: vec!["shapes".into()], ..config.data.clone() };
    RunConfig { data, ..config.clone() }.check()?;
    let train = config.train.clone();
    let engine = Engine::initialised(config.model.clone(), cpu(0)?, seed)?;
    let trainer = Trainer::new(engine, train.clone())?;
    let (capacity, mut engine) = (trainer.capacity(), trainer.into_engine());
    let batch = batch(config, capacity, seed)?;
    let loss = Program::Loss(capacity, train.loss());
    let plan = engine.open(loss)?;
    feed(&mut engine, plan, &batch, [batch.text_count, batch.image_count])?;
    if config.model.image().is_some() {
        engine.ints(plan, "seed", &seed_words(seed))?;
    }
    let before = scene(&mut engine, "loss", loss)?;
    engine.run(plan)?;
    let update = Program::Update(train.update());
    let plan = engine.open(update)?;
    engine.floats(plan, "schedule", &train.schedule(train.lr, 1.0))?;
    if train.ema > 0.0 {
        engine.floats(plan, "ema_decay", &[train.ema as f32])?;
    }
    Ok([before, scene(&mut engine, "update", update)?])
}

/// A program that is open, with what its inputs and states hold now.
fn scene(engine: &mut Engine, name: &'static str, program: Program) -> Result<Scene> {
    let graph = program.graph(engine.config())?;
    let plan = engine.open(program)?;
    let mut given = HashMap::new();
    for (tensor, value) in graph.sources() {
        let at = match value.role {
            Role::Input => Place::Input(plan, &value.name),
            Role::State(kind) => Place::State(kind, &value.name),
            Role::Temp => continue,
        };
        given.insert(tensor, engine.device().fetch(at)?);
    }
    Ok(Scene { name, graph, given })
}

fn batch(config: &RunConfig, capacity: Capacity, seed: u64) -> Result<Batch> {
    let geometry = geometry(&config.model, capacity);
    let source: Shared = match config.model.image() {
        Some(_) => Arc::new(Shapes { seed, split: Split::Train, count: None }),
        None => Arc::new(captions(seed)),
    };
    let objective = config.model.image().map(|i| i.objective);
    let coefficients = |t: f32| objective.map_or([0.0; 4], |o| diffusion::coefficients(o, t));
    let mut batch = Batch::new(geometry);
    let options = PackOptions::default();
    Packer::new(source, config.model.tokens(), geometry, options, seed)?.fill(&mut batch, &coefficients);
    Ok(batch)
}

fn captions(seed: u64) -> Documents {
    let caption = |i| {
        let (scene, _) = shapes::example(seed, Split::Train, i);
        Document { parts: vec![Part::Text(scene.caption().into_bytes())], stream: false }
    };
    Documents::new((0..CAPTIONS).map(caption).collect(), "captions")
}

#[cfg(test)]
mod tests {
    use super::*;
    use transfusion_core::op::Kind;

    fn step(preset: &str) -> [Scene; 2] {
        let mut config = RunConfig::preset(preset).unwrap();
        for (key, value) in [("train.rows", "1"), ("train.positions", "64"), ("model.num_hidden_layers", "1")]
        {
            config.set(key, value).unwrap();
        }
        training_step(&config, 3).unwrap()
    }

    fn largest(scene: &Scene, role: Role, name: &str) -> f64 {
        let (tensor, _) = scene.graph.sources().find(|(_, v)| v.role == role && v.name == name).unwrap();
        scene.given[&tensor].to_f64().into_iter().map(f64::abs).fold(0.0, f64::max)
    }

    #[test]
    fn every_number_that_a_step_reads_is_there() {
        for preset in ["tiny", "text-tiny"] {
            let scenes = step(preset);
            for scene in &scenes {
                assert!(
                    scene.graph.sources().all(|(t, v)| scene.given[&t].view().len() == v.spec.shape.numel())
                );
            }
            let (embedding, [loss, update]) = ("model.embed_tokens.weight", scenes);
            assert!(largest(&loss, Role::Input, "tokens") > 100.0);
            assert_eq!(largest(&loss, Role::State(Kind::Grad), embedding), 0.0);
            assert!(largest(&update, Role::State(Kind::Grad), embedding) > 0.0);
            assert!(largest(&update, Role::Input, "schedule") > 0.0);
        }
    }
}
