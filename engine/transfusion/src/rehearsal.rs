//! The programs of a model laid open: each as it stands before it runs, with every number that it reads. For those
//! who run a program op by op, to see where a device leaves the CPU or what its kernels move.
use crate::{
    batch::{Batch, PackOptions, Packer},
    config::Objective,
    data::{
        Document, Documents, Part, Shared,
        shapes::{self, Shapes, Split},
    },
    diffusion::{self, Sampler},
    engine::{Engine, Program, cpu, no_images},
    error::{Error, Result},
    model::{Capacity, Extend, ImagePass, LossOptions, UpdateOptions},
    run::{DataOptions, RunConfig, geometry},
    sample::{
        SampleOptions,
        prepare::{self, Drawing, TextRow},
    },
    train::{feed, seed_words},
};
use std::{iter, sync::Arc};
use transfusion_core::{
    Error as CoreError,
    device::{Place, PlanId},
    graph::{Graph, Role, Value},
    tensor::Host,
};

/// Captions that a model of text alone is fed with.
const CAPTIONS: u64 = 256;

/// Positions of a prompt that go into the cache at once.
const CHUNK: usize = 128;

/// A fresh model on the CPU, with all its memory, whose programs are about to run: a training step on a micro-batch of
/// the built-in shapes (of their captions, where it has no images) at the full learning rate; text and images behind
/// caches that captions nearly fill.
#[derive(Debug)]
pub struct Rehearsal {
    config: RunConfig,
    engine: Engine,
    seed: u64,
}

/// A program about to run.
#[derive(Debug)]
pub struct Scene<'a> {
    /// The program.
    pub graph: Graph,
    /// What its inputs and states hold.
    pub held: Held<'a>,
}

/// The inputs and states of a program about to run.
#[derive(Debug)]
pub struct Held<'a> {
    engine: &'a mut Engine,
    plan: PlanId,
}

impl Held<'_> {
    /// What one of them holds.
    ///
    /// # Errors
    /// If the program has no such input or state.
    pub fn fetch(&mut self, value: &Value) -> transfusion_core::Result<Host> {
        let at = match value.role {
            Role::Input => Place::Input(self.plan, &value.name),
            Role::State(kind) => Place::State(kind, &value.name),
            Role::Temp => {
                return Err(CoreError::Graph(format!("{} is made while the program runs", value.name)));
            }
        };
        self.engine.device().fetch(at)
    }
}

impl Rehearsal {
    /// A model with weights drawn under `seed`.
    ///
    /// # Errors
    /// If the configuration makes no sense, or memory is short.
    pub fn new(config: &RunConfig, seed: u64) -> Result<Rehearsal> {
        let data = DataOptions { paths: vec!["shapes".into()], ..config.data.clone() };
        let config = RunConfig { data, ..config.clone() };
        config.check()?;
        let engine = Engine::initialised(config.model.clone(), cpu(0)?, seed)?;
        Ok(Rehearsal { config, engine, seed })
    }

    /// A program as it stands before it runs: an update behind a gradient, a denoising step behind the first one.
    ///
    /// # Errors
    /// If the program cannot be built, its capacities have no room for a picture, or memory is short.
    pub fn scene(&mut self, program: Program) -> Result<Scene<'_>> {
        let graph = program.graph(&self.config.model)?;
        let ema = match program {
            Program::Loss(_, LossOptions { ema, .. }) | Program::Update(UpdateOptions { ema, .. }) => ema,
            Program::Text(Extend { ema, .. }) | Program::Image(Extend { ema, .. }, _) => ema,
        };
        if ema && !self.engine.has_ema() {
            self.engine.start_ema()?;
        }
        let plan = match program {
            Program::Loss(capacity, _) => self.loss(program, capacity)?,
            Program::Update(_) => self.update(program)?,
            Program::Text(e) => self.text(e)?,
            Program::Image(e, pass) => self.image(e, pass)?,
        };
        Ok(Scene { graph, held: Held { engine: &mut self.engine, plan } })
    }

    fn loss(&mut self, program: Program, capacity: Capacity) -> Result<PlanId> {
        let batch = batch(&self.config, capacity, self.seed)?;
        let plan = self.engine.open(program)?;
        feed(&mut self.engine, plan, &batch, [batch.text_count, batch.image_count])?;
        if self.config.model.image().is_some() {
            self.engine.ints(plan, "seed", &seed_words(self.seed))?;
        }
        Ok(plan)
    }

    fn update(&mut self, program: Program) -> Result<PlanId> {
        let train = self.config.train.clone();
        let capacity = train.capacity(&self.config.model);
        let loss = self.loss(Program::Loss(capacity, LossOptions::TRAIN), capacity)?;
        self.engine.run(loss)?;
        let plan = self.engine.open(program)?;
        self.engine.start_masters()?;
        self.engine.floats(plan, "schedule", &train.schedule(train.lr, 1.0))?;
        if train.ema > 0.0 {
            self.engine.floats(plan, "ema_decay", &[train.ema as f32])?;
        }
        Ok(plan)
    }

    /// Each row goes on where its cache is nearly full; some rows have fewer tokens than there is room for.
    fn text(&mut self, e: Extend) -> Result<PlanId> {
        let at: Vec<usize> = (0..e.rows).map(|r| (e.capacity - e.positions).saturating_sub(r % 7)).collect();
        let prompts: Vec<Vec<i32>> = (0..e.rows).map(|r| self.tokens(r, at[r] + e.positions)).collect();
        self.fill(e, prompts.iter().zip(&at).map(|(ids, at)| &ids[..*at]).collect())?;
        let ids = |r: usize| prompts[r][at[r]..].iter().take((e.positions - r % 3).max(1)).copied().collect();
        let rows: Vec<TextRow> = (0..e.rows).map(|r| TextRow { slot: r, at: at[r], ids: ids(r) }).collect();
        prepare::text(&mut self.engine, e, &rows)
    }

    /// Each image goes where its cache is nearly full, or behind nothing where its condition is left out.
    fn image(&mut self, e: Extend, pass: ImagePass) -> Result<PlanId> {
        let image = self.config.model.image().ok_or_else(no_images)?.clone();
        let (tokens, patches) = (self.config.model.tokens(), image.patches());
        let Some(room) = e.capacity.checked_sub(patches).filter(|room| *room >= 2) else {
            let (have, need) = (e.capacity, patches + 2);
            return Err(Error::Config(format!(
                "a cached sequence of {have} positions has no room for a picture; it takes {need}"
            )));
        };
        let guided = pass == ImagePass::Denoise { guided: true };
        let images = if guided { e.rows / 2 } else { e.rows };
        let prompt = |i: usize| {
            let mut ids = self.tokens(i, room.saturating_sub(i % 7).max(2));
            ids.pop();
            ids.push(tokens.boi);
            ids
        };
        let mut prompts: Vec<Vec<i32>> = (0..images).map(prompt).collect();
        prompts.resize(e.rows, vec![tokens.bos, tokens.boi]);
        self.fill(e, prompts.iter().map(Vec::as_slice).collect())?;
        let rows: Vec<(usize, usize)> = prompts.iter().map(Vec::len).enumerate().collect();
        if pass == ImagePass::Commit {
            let numel = image.size * image.size * image.channels;
            let mut pictures = vec![0.0; images * numel];
            for (i, picture) in pictures.chunks_mut(numel).enumerate() {
                shapes::example(self.seed, Split::Train, i as u64).1.square(image.size).to_unit(picture);
            }
            return prepare::commit(&mut self.engine, e, &rows, &pictures);
        }
        let options = sampling(&self.config.output.sample, image.objective, guided);
        let named = (0..images).map(|i| (i, 0)).collect();
        let drawing = Drawing::begin(&mut self.engine, e, named, &rows, &options)?;
        drawing.prepare(&mut self.engine, 0)?;
        self.engine.run(drawing.plan)?;
        drawing.prepare(&mut self.engine, 1)?;
        Ok(drawing.plan)
    }

    /// Puts a prompt into each of the first slots of caches that are empty otherwise.
    fn fill(&mut self, e: Extend, prompts: Vec<&[i32]>) -> Result<()> {
        self.engine.close_sampling();
        let longest = prompts.iter().map(|ids| ids.len()).max().unwrap_or(0);
        for at in (0..longest).step_by(CHUNK) {
            let chunk = |ids: &[i32]| ids[at..].iter().take(CHUNK).copied().collect();
            let some = prompts.iter().enumerate().filter(|(_, ids)| ids.len() > at);
            let rows: Vec<TextRow> = some.map(|(slot, ids)| TextRow { slot, at, ids: chunk(ids) }).collect();
            let e = Extend { rows: prompts.len(), positions: CHUNK.min(longest), ..e };
            let plan = prepare::text(&mut self.engine, e, &rows)?;
            self.engine.run(plan)?;
        }
        Ok(())
    }

    /// The first tokens of a document of captions, without an end.
    fn tokens(&self, document: usize, count: usize) -> Vec<i32> {
        let caption =
            |i: u64| shapes::scene(self.seed, Split::Train, document as u64 + i).caption().into_bytes();
        let bytes = (0..).flat_map(caption).map(i32::from);
        iter::once(self.config.model.tokens().bos).chain(bytes).take(count).collect()
    }
}

/// The sampler of a model that has most to do: noise of its own, or a memory.
fn sampling(options: &SampleOptions, objective: Objective, guided: bool) -> SampleOptions {
    let guidance = match guided {
        true if options.guidance == 1.0 => SampleOptions::default().guidance,
        true => options.guidance,
        false => 1.0,
    };
    let sampler = if objective == Objective::Flow { Sampler::Heun } else { Sampler::Ddpm };
    SampleOptions { guidance, sampler, steps: options.steps.max(2), ..options.clone() }
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

    fn rehearsal(preset: &str) -> (Rehearsal, RunConfig) {
        let mut config = RunConfig::preset(preset).unwrap();
        for (key, value) in [("train.rows", "2"), ("train.positions", "64"), ("model.num_hidden_layers", "1")]
        {
            config.set(key, value).unwrap();
        }
        (Rehearsal::new(&config, 3).unwrap(), config)
    }

    /// What the scene's sources hold, by role and name.
    fn held(mut scene: Scene<'_>) -> impl Fn(Role, &str) -> Vec<f64> + use<> {
        let fetch = |(_, value): (_, &Value)| {
            let host = scene.held.fetch(value).unwrap();
            assert_eq!(host.view().len(), value.spec.shape.numel());
            (value.role, value.name.clone(), host.to_f64())
        };
        let all: Vec<_> = scene.graph.sources().map(fetch).collect();
        move |role, name| all.iter().find(|(r, n, _)| *r == role && n == name).unwrap().2.clone()
    }

    fn largest(values: Vec<f64>) -> f64 {
        values.into_iter().map(f64::abs).fold(0.0, f64::max)
    }

    #[test]
    fn every_number_that_a_training_step_reads_is_there() {
        for preset in ["tiny", "text-tiny"] {
            let (mut rehearsal, config) = rehearsal(preset);
            let (embedding, gradient) = ("model.embed_tokens.weight", Role::State(Kind::Grad));
            let loss = Program::Loss(config.train.capacity(&config.model), LossOptions::TRAIN);
            let loss = held(rehearsal.scene(loss).unwrap());
            assert!(largest(loss(Role::Input, "tokens")) > 100.0);
            assert_eq!(largest(loss(gradient, embedding)), 0.0);
            let update = held(rehearsal.scene(Program::Update(config.train.update())).unwrap());
            assert!(largest(update(gradient, embedding)) > 0.0);
            assert!(largest(update(Role::Input, "schedule")) > 0.0);
        }
    }

    /// How many of the 64 positions of each slot of a cache hold a key.
    fn cached(keys: &[f64], slots: usize) -> Vec<usize> {
        let is_there = |key: &&[f64]| key.iter().any(|x| *x != 0.0);
        let of = |slot: &[f64]| slot.chunks(slot.len() / 64).filter(is_there).count();
        keys.chunks(keys.len() / slots).map(of).collect()
    }

    #[test]
    fn text_goes_on_behind_what_is_cached() {
        let (mut rehearsal, _) = rehearsal("text-tiny");
        let e = Extend { rows: 2, positions: 1, slots: 2, capacity: 64, ema: false };
        for positions in [1, 16, 64] {
            let scene = held(rehearsal.scene(Program::Text(Extend { positions, ..e })).unwrap());
            let keys = scene(Role::State(Kind::Cache), "model.layers.0.k");
            let first: Vec<f64> = scene(Role::Input, "positions").into_iter().step_by(positions).collect();
            let want = [64 - positions, (64 - positions).saturating_sub(1)];
            assert_eq!((first, cached(&keys, 2)), (want.map(|n| n as f64).to_vec(), want.to_vec()));
        }
    }

    #[test]
    fn images_are_denoised_behind_what_is_cached_and_behind_nothing() {
        let (mut rehearsal, _) = rehearsal("tiny");
        let e = Extend { rows: 4, positions: 16, slots: 4, capacity: 64, ema: true };
        let pass = ImagePass::Denoise { guided: true };
        let scene = held(rehearsal.scene(Program::Image(e, pass)).unwrap());
        let ends: Vec<f64> = scene(Role::Input, "row_end").into_iter().step_by(16).collect();
        assert_eq!(ends, [64.0, 63.0, 18.0, 18.0]);
        let keys = scene(Role::State(Kind::Cache), "model.layers.0.k");
        assert_eq!(cached(&keys, 4), [64, 63, 18, 18]);
        assert!(largest(scene(Role::State(Kind::Cache), "picture.2")) > 1.0);
        // The second step: another level than the first, which begins at noise.
        let times = scene(Role::Input, "times");
        assert!(times.iter().all(|t| *t == times[0] && (900.0..1000.0).contains(t)), "{times:?}");
        let commit = Extend { rows: 2, slots: 2, ..e };
        let scene = held(rehearsal.scene(Program::Image(commit, ImagePass::Commit)).unwrap());
        assert!(largest(scene(Role::State(Kind::Cache), "picture.2")) <= 1.0);
        assert_eq!(largest(scene(Role::Input, "times")), 0.0);
        let short = Program::Image(Extend { capacity: 17, ..e }, pass);
        let refused = rehearsal.scene(short).unwrap_err().to_string();
        assert!(refused.contains("17 positions") && refused.contains("takes 18"), "{refused}");
    }
}
