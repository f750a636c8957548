//! A training step, and a round of sampling, laid open: their programs, each with every number that it reads. For
//! those who run them op by op, to see where a device leaves the CPU, what its kernels move, or how long they take.
use crate::{
    batch::{Batch, Geometry, PackOptions, Packer, PairOrder},
    config::Objective,
    data::{
        Document, Documents, Part, Shared,
        shapes::{self, Shapes, Split},
    },
    diffusion::{self, Evaluation, Sampler},
    engine::{Engine, Program, cpu},
    error::{Error, Result},
    model::{Extend, ImagePass, LossOptions},
    programs::{self, Named},
    run::{DataOptions, RunConfig, geometry},
    train::{Trainer, feed, seed_words},
};
use std::{collections::HashMap, sync::Arc};
use transfusion_core::{
    device::Place,
    graph::{Graph, Role},
    op::Kind,
    random::{Purpose, Stream},
    tensor::{Host, Tensor, View},
};

/// What texts are made of.
const SENTENCE: &[u8] = b"The quick brown fox jumps over the lazy dog. ";

/// Guidance of the denoising step.
const GUIDANCE: f32 = 3.0;

/// Captions that a model of text alone is fed with.
const CAPTIONS: u64 = 256;

/// A program with the numbers that it reads.
#[derive(Debug)]
pub struct Scene {
    /// `loss`, `update`, `eval`, `prefill`, `decode`, `commit`, `denoise`.
    pub name: &'static str,
    /// The program.
    pub graph: Graph,
    /// What its inputs and states hold before it runs.
    pub given: HashMap<Tensor, Host>,
}

/// The first training step of a model with weights drawn under `seed`, on one micro-batch, at the full learning
/// rate: the loss with its gradient, and the update. It is run on the CPU, with all its memory.
///
/// # Errors
/// If the configuration makes no sense, no document fits into a row, or memory is short.
pub fn training_step(config: &RunConfig, packing: Packing, seed: u64) -> Result<[Scene; 2]> {
    packing.check(config)?;
    let train = config.train.clone();
    let engine = Engine::initialised(config.model.clone(), cpu(0)?, seed)?;
    let trainer = Trainer::new(engine, train.clone())?;
    let (capacity, mut engine) = (trainer.capacity(), trainer.into_engine());
    let loss = Program::Loss(capacity, train.loss());
    let before = on_batch(&mut engine, "loss", loss, &batch(config, packing, seed)?, seed)?;
    let plan = engine.open(loss)?;
    engine.run(plan)?;
    let update = Program::Update(train.update());
    let plan = engine.open(update)?;
    engine.floats(plan, "schedule", &train.schedule(train.lr, 1.0))?;
    if train.ema > 0.0 {
        engine.floats(plan, "ema_decay", &[train.ema as f32])?;
    }
    Ok([before, scene(&mut engine, "update", update)?])
}

/// The loss alone, of the same model on the same micro-batch.
///
/// # Errors
/// As [`training_step`].
pub fn evaluation(config: &RunConfig, packing: Packing, seed: u64) -> Result<Scene> {
    packing.check(config)?;
    let mut engine = Engine::initialised(config.model.clone(), cpu(0)?, seed)?;
    let loss = Program::Loss(config.train.capacity(&config.model), LossOptions::EVAL);
    on_batch(&mut engine, "eval", loss, &batch(config, packing, seed)?, seed)
}

/// A loss about to run on a micro-batch.
fn on_batch(
    engine: &mut Engine,
    name: &'static str,
    loss: Program,
    batch: &Batch,
    seed: u64,
) -> Result<Scene> {
    let plan = engine.open(loss)?;
    feed(engine, plan, batch, [batch.text_count, batch.image_count])?;
    if engine.config().image().is_some() {
        engine.ints(plan, "seed", &seed_words(seed))?;
    }
    scene(engine, name, loss)
}

/// What sampling replays, on sequences of a fresh model under `seed`. It is run on the CPU, with all its memory.
///
/// # Errors
/// As [`Sampling::new`], or if memory is short.
pub fn sampling(config: &RunConfig, seed: u64) -> Result<Vec<Scene>> {
    let stage = Sampling::new(config, seed)?;
    let mut engine = Engine::initialised(config.model.clone(), cpu(0)?, seed)?;
    if config.train.ema > 0.0 {
        engine.start_ema()?;
    }
    let mut scenes = Vec::new();
    for named in stage.programs(engine.has_ema()) {
        stage.set(&mut engine, named)?;
        scenes.push(scene(&mut engine, named.name, named.program)?);
        let plan = engine.open(named.program)?;
        engine.run(plan)?;
    }
    Ok(scenes)
}

/// A round of sampling on `config.train.rows` sequences of `config.train.positions` positions. Each gets a prompt,
/// then a token (BOI, where the model has images), then an image, which replaces a given one. The twins that
/// guidance compares with hold BOS and BOI.
pub struct Sampling<'c> {
    config: &'c RunConfig,
    seed: u64,
    prompt: usize,
}

impl<'c> Sampling<'c> {
    /// What is drawn under `seed`.
    ///
    /// # Errors
    /// If a sequence has no room for a prompt and an image.
    pub fn new(config: &'c RunConfig, seed: u64) -> Result<Sampling<'c>> {
        let behind = 1 + config.model.image().map_or(0, |image| image.patches());
        let positions = config.train.positions;
        let prompt = programs::PREFILL.min(positions.saturating_sub(behind));
        if prompt < 2 {
            let need = behind + 2;
            let why = format!("train.positions is {positions}; to sample takes {need} at least");
            return Err(Error::Config(why));
        }
        Ok(Sampling { config, seed, prompt })
    }

    /// The programs in the order in which they run, with one cache for all of them; `ema` says whether they read the
    /// running means of the weights.
    pub fn programs(&self, ema: bool) -> Vec<Named> {
        let rows = self.config.train.rows;
        let slots = if self.config.model.image().is_some() { 2 * rows } else { rows };
        let shared = |program| match program {
            Program::Text(e) => Program::Text(Extend { slots, ema, ..e }),
            Program::Image(e, pass) => Program::Image(Extend { slots, ema, ..e }, pass),
            other => other,
        };
        let all = programs::sampling(self.config).into_iter();
        all.map(|named| Named { program: shared(named.program), ..named }).collect()
    }

    /// Opens a program and writes its inputs, and the images that it reads. Those before it have to have run.
    ///
    /// # Errors
    /// If the device has no room, or fails.
    pub fn set(&self, engine: &mut Engine, named: Named) -> Result<()> {
        match named.program {
            Program::Text(e) if e.positions == 1 => {
                self.text(engine, e, 0, self.prompt, |_| vec![self.token()])
            }
            Program::Text(e) => self.text(engine, e, 0, 0, |row| self.prompt(row)),
            Program::Image(e, pass) => {
                if pass != ImagePass::Commit {
                    self.twins(engine, e)?;
                }
                self.images(engine, e, pass)
            }
            _ => Ok(()),
        }
    }

    /// The token behind a prompt.
    pub fn token(&self) -> i32 {
        let boi = self.config.model.tokens().boi;
        if self.config.model.image().is_some() { boi } else { i32::from(b'e') }
    }

    /// The prompt of a sequence: BOS and text.
    pub fn prompt(&self, row: usize) -> Vec<i32> {
        let text = SENTENCE.iter().cycle().skip(row).map(|b| i32::from(*b));
        std::iter::once(self.config.model.tokens().bos).chain(text).take(self.prompt).collect()
    }

    /// Tokens that go to the slots from `first` on, from position `at`.
    fn text(
        &self,
        engine: &mut Engine,
        e: Extend,
        first: usize,
        at: usize,
        of: impl Fn(usize) -> Vec<i32>,
    ) -> Result<()> {
        let n = e.rows * e.positions;
        let (mut ids, mut positions, mut row_end) = (vec![-1; n], vec![-1; n], vec![0; n]);
        let mut last = vec![-1; e.rows];
        for (row, last) in last.iter_mut().enumerate() {
            let base = row * e.positions;
            for (j, id) in of(row).into_iter().take(e.positions).enumerate() {
                (ids[base + j], positions[base + j], row_end[base + j]) =
                    (id, (at + j) as i32, (at + j + 1) as i32);
                *last = (base + j) as i32;
            }
        }
        let slots: Vec<i32> = (first..first + e.rows).map(|slot| slot as i32).collect();
        let plan = engine.open(Program::Text(e))?;
        let inputs = [
            ("tokens", ids),
            ("positions", positions),
            ("row_end", row_end),
            ("slots", slots),
            ("last", last),
        ];
        inputs.iter().try_for_each(|(name, values)| engine.ints(plan, name, values))
    }

    /// Puts BOS and BOI into the slots of the twins.
    fn twins(&self, engine: &mut Engine, e: Extend) -> Result<()> {
        let tokens = self.config.model.tokens();
        let e = Extend { rows: self.config.train.rows, positions: 2, ..e };
        self.text(engine, e, self.config.train.rows, 0, |_| vec![tokens.bos, tokens.boi])?;
        let plan = engine.open(Program::Text(e))?;
        engine.run(plan)
    }

    /// Images behind the token, in the twins behind BOI; normal numbers.
    fn images(&self, engine: &mut Engine, e: Extend, pass: ImagePass) -> Result<()> {
        let (rows, p) = (self.config.train.rows, e.positions);
        let from = |row: usize| if row < rows { self.prompt + 1 } else { 2 };
        let place = |row: usize| (0..p).map(move |j| (from(row) + j) as i32);
        let positions: Vec<i32> = (0..e.rows).flat_map(place).collect();
        let row_end: Vec<i32> = (0..e.rows * p).map(|i| (from(i / p) + p) as i32).collect();
        let copies: Vec<i32> = (0..e.rows * p).map(|i| (i % (rows * p)) as i32).collect();
        let slots: Vec<i32> = (0..e.rows as i32).collect();
        let plan = engine.open(Program::Image(e, pass))?;
        for (name, values) in
            [("slots", slots), ("positions", positions), ("row_end", row_end), ("copies", copies)]
        {
            engine.ints(plan, name, &values)?;
        }
        let pixels = self.noise();
        self.write(engine, "picture", &pixels)?;
        if pass == ImagePass::Commit {
            return engine.floats(plan, "times", &vec![0.0; e.rows]);
        }
        self.write(engine, "memory", &vec![0.0; pixels.len()])?;
        engine.ints(plan, "seed", &seed_words(self.seed))?;
        match self.steps(2).last() {
            Some(step) => self.set_step(engine, e, pass, step),
            None => Ok(()),
        }
    }

    /// The steps from noise to an image, so many of them.
    pub fn steps(&self, n: usize) -> Vec<Evaluation> {
        let Some(image) = self.config.model.image() else { return vec![] };
        let usual = if image.objective == Objective::Flow { Sampler::Euler } else { Sampler::Ddim };
        diffusion::evaluations(usual, image.objective, n, GUIDANCE, 1.0, diffusion::STEPS as f32)
    }

    /// Writes what changes from one denoising step to the next.
    ///
    /// # Errors
    /// If the program is no denoising one, or the device fails.
    pub fn set_step(&self, engine: &mut Engine, e: Extend, pass: ImagePass, step: &Evaluation) -> Result<()> {
        let rows = self.config.train.rows;
        let plan = engine.open(Program::Image(e, pass))?;
        engine.ints(plan, "keys", &vec![0; 3 * rows])?;
        engine.floats(plan, "times", &vec![step.t; e.rows])?;
        engine.floats(plan, "steps", &step.step.row().repeat(rows))
    }

    /// Writes a state that holds images: `picture` or `memory`.
    ///
    /// # Errors
    /// If no program that reads it is open.
    pub fn write(&self, engine: &mut Engine, what: &str, values: &[f32]) -> Result<()> {
        let name = format!("{what}.{}", self.config.train.rows);
        Ok(engine.device().write(Place::State(Kind::Cache, &name), View::F32(values))?)
    }

    /// The noise that images are drawn from, `[rows, S, S, channels]`.
    pub fn noise(&self) -> Vec<f32> {
        let numel = self.config.model.image().map_or(0, |i| i.size * i.size * i.channels);
        let mut pixels = vec![0.0; self.config.train.rows * numel];
        Stream::new(self.seed, Purpose::Noise, 0).fill_normal(0, &mut pixels);
        pixels
    }
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

/// What the rows of a rehearsal hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// The built-in shapes, or for a model without images their captions, packed as in training. Not for models of
    /// latents.
    Shapes,
    /// So many documents of equal length in every row, filled with sentences and, where the model has images,
    /// as many of those as fit between them. A single document of text alone is a window of a longer one.
    /// Latents are normal numbers.
    Equal(usize),
}

impl Packing {
    fn check(self, config: &RunConfig) -> Result<()> {
        let data = DataOptions { paths: vec!["shapes".into()], ..config.data.clone() };
        match self {
            Packing::Shapes => RunConfig { data, ..config.clone() }.check(),
            Packing::Equal(_) => config.model.check(),
        }
    }
}

/// A micro-batch as a step of `config` reads it.
///
/// # Errors
/// If no document fits into a row.
pub fn batch(config: &RunConfig, packing: Packing, seed: u64) -> Result<Batch> {
    let capacity = config.train.capacity(&config.model);
    let geometry = geometry(&config.model, capacity);
    // Pictures have three channels; latents, which have others, take their places afterwards.
    let pictures = match packing {
        Packing::Shapes => geometry,
        Packing::Equal(_) => Geometry { channels: 3, ..geometry },
    };
    let source: Shared = match (packing, config.model.image()) {
        (Packing::Shapes, Some(_)) => Arc::new(Shapes { seed, split: Split::Train, count: None }),
        (Packing::Shapes, None) => Arc::new(captions(seed)),
        (Packing::Equal(n), _) => Arc::new(Documents::new(vec![equal(&pictures, n, seed)], "sentences")),
    };
    let options = match packing {
        Packing::Shapes => PackOptions::default(),
        Packing::Equal(_) => {
            PackOptions { order: PairOrder::AsGiven, condition_drop: 0.0, ..PackOptions::default() }
        }
    };
    let objective = config.model.image().map(|i| i.objective);
    let coefficients = |t: f32| objective.map_or([0.0; 4], |o| diffusion::coefficients(o, t));
    let mut batch = Batch::new(pictures);
    Packer::new(source, config.model.tokens(), pictures, options, seed)?.fill(&mut batch, &coefficients);
    if geometry != pictures {
        batch.geometry = geometry;
        batch.images = vec![0.0; geometry.images * geometry.values()];
        Stream::new(seed, Purpose::Data, 0).fill_normal(0, &mut batch.images);
    }
    Ok(batch)
}

/// A document that takes one `n`th of a row.
fn equal(g: &Geometry, n: usize, seed: u64) -> Document {
    let positions = g.positions / n.max(1);
    let sentences = |bytes: usize| Part::Text(SENTENCE.iter().copied().cycle().take(bytes).collect());
    if g.images == 0 {
        let stream = n <= 1;
        let bytes = if stream { positions + 1 } else { positions.saturating_sub(2) };
        return Document { parts: vec![sentences(bytes)], stream };
    }
    let (mut left, mut parts) = (positions.saturating_sub(2), Vec::new());
    let mut images = g.images / (n.max(1) * g.rows);
    let span = g.patches() + 2;
    while images > 0 && left > span {
        let text = SENTENCE.len().min(left - span);
        let (_, picture) = shapes::example(seed, Split::Train, images as u64);
        parts.extend([sentences(text), Part::Image(Arc::new(picture))]);
        left -= text + span;
        images -= 1;
    }
    parts.push(sentences(left));
    Document { parts, stream: false }
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

    fn step(preset: &str) -> [Scene; 2] {
        let mut config = RunConfig::preset(preset).unwrap();
        for (key, value) in [("train.rows", "1"), ("train.positions", "64"), ("model.num_hidden_layers", "1")]
        {
            config.set(key, value).unwrap();
        }
        training_step(&config, Packing::Shapes, 3).unwrap()
    }

    fn largest(scene: &Scene, role: Role, name: &str) -> f64 {
        let (tensor, _) = scene.graph.sources().find(|(_, v)| v.role == role && v.name == name).unwrap();
        scene.given[&tensor].to_f64().into_iter().map(f64::abs).fold(0.0, f64::max)
    }

    /// What sampling replays reads and writes numbers, on sequences that are far enough.
    #[test]
    fn sampling_is_laid_open() {
        for (preset, names) in
            [("tiny", &["prefill", "decode", "commit", "denoise"][..]), ("text-tiny", &["prefill", "decode"])]
        {
            let mut config = RunConfig::preset(preset).unwrap();
            config.set("train.rows", "2").unwrap();
            config.set("model.num_hidden_layers", "1").unwrap();
            let scenes = sampling(&config, 3).unwrap();
            assert_eq!(scenes.iter().map(|s| s.name).collect::<Vec<_>>(), names);
            let longest = largest(&scenes[1], Role::Input, "row_end");
            let images = names.len() > 2;
            assert_eq!(longest, if images { 129.0 } else { 64.0 }, "the token is the last");
            let cache = "model.layers.0.k";
            let of = |scene: &Scene| largest(scene, Role::State(Kind::Cache), cache);
            assert_eq!(of(&scenes[0]), 0.0);
            assert!(of(&scenes[1]) > 0.0);
            if let Some(denoise) = scenes.get(3) {
                assert!(largest(denoise, Role::State(Kind::Cache), "picture.2") > 2.0);
                assert_eq!(largest(denoise, Role::Input, "row_end"), 129.0 + 16.0);
            }
            config.set("train.positions", "3").unwrap();
            let short = sampling(&config, 3).map(drop);
            assert_eq!(short.is_err(), images, "{short:?}");
        }
    }

    #[test]
    fn rows_hold_as_many_documents_as_asked_for() {
        let mut config = RunConfig::preset("tiny").unwrap();
        for n in [1, 2, 5] {
            let packed = batch(&config, Packing::Equal(n), 1).unwrap();
            assert_eq!((packed.documents, packed.cut), (2 * n, 0));
            assert!(
                packed.used() > 2 * (512 - 2 * n) && packed.image_count >= 2 * n,
                "{n}: {}",
                packed.used()
            );
        }
        config.model.transfusion.as_mut().unwrap().image.as_mut().unwrap().channels = 8;
        assert!(batch(&config, Packing::Shapes, 1).is_err());
        let latents = batch(&config, Packing::Equal(1), 1).unwrap();
        assert_eq!(latents.images.len(), latents.geometry.images * 32 * 32 * 8);
        assert!(latents.images[0] != 0.0);
        let text = RunConfig::preset("text-tiny").unwrap();
        let window = batch(&text, Packing::Equal(1), 1).unwrap();
        assert_eq!((window.documents, window.text_count), (12, 12 * 64));
        assert_eq!(batch(&text, Packing::Equal(4), 1).unwrap().documents, 48);
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
            let mut config = RunConfig::preset(preset).unwrap();
            config.set("train.rows", "1").unwrap();
            config.set("model.num_hidden_layers", "1").unwrap();
            let eval = evaluation(&config, Packing::Shapes, 3).unwrap();
            assert!(largest(&eval, Role::Input, "tokens") > 100.0);
            assert_eq!(eval.graph.states(Kind::Grad).count(), 0);
        }
    }
}
