//! Sampling beside PyTorch's on the same weights: text, a token of every sequence at a time; guided denoising of
//! images; and how long a process takes from nothing to its first token.
use crate::{
    contest::{self, Class, Opponent, apart},
    error::{Error, Result},
    floats::{Floats, Tolerance},
    machine::Machine,
    peer::{COLD, Peer, numbers},
    row::Row,
    statistics::{Schedule, alternate},
};
use serde_json::{Value, json};
use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use transfusion::{
    config::ModelConfig,
    data::Part,
    engine::{Engine, Program},
    hf,
    model::{Extend, ImagePass, weights},
    programs::Named,
    rehearsal::Sampling,
    run::RunConfig,
    sample::{Cancel, Event, Goal, SampleOptions, sample},
};
use transfusion_core::{
    device::{Device, Place},
    launch::Cost,
    op::Kind,
    tensor::{Host, Spec},
};

/// Denoising steps of a picture.
const STEPS: usize = 10;
/// Most tokens of a text.
const TOKENS: usize = 128;
/// Bytes of the prompt of a text.
const PROMPT: usize = 16;
/// What a cold start goes on from.
const COLD_PROMPT: &str = "ROMEO: what";
/// Seconds that a variant of the other side is timed for, to find the fastest.
const TRIAL: f64 = 0.5;
/// How far logits and pictures may be apart, relative to the largest.
const TOLERANCE: Tolerance = Tolerance { f32: 1e-4, rounded: 3e-2, bf16: 5e-2 };

/// What sampling is measured with.
pub struct Sampler<'a> {
    /// Name of the preset, for the rows.
    pub preset: &'a str,
    /// The model; `train.rows` sequences of at most `train.positions` positions.
    pub config: &'a RunConfig,
    /// The machine.
    pub machine: &'a Machine,
    /// How long.
    pub schedule: Schedule,
    /// Ends it.
    pub cancel: Cancel<'a>,
}

/// A denoising program on a device.
struct Denoiser<'a, 'c> {
    stage: &'a Sampling<'c>,
    engine: Engine,
    extend: Extend,
    pass: ImagePass,
}

impl Sampler<'_> {
    /// Measures text and, where the model has images, denoising; weights are fresh ones.
    ///
    /// # Errors
    /// What either side refuses; results that do not agree.
    pub fn measure(
        &self,
        device: Box<dyn Device>,
        mut peer: Option<&mut Peer>,
        note: &mut dyn FnMut(String),
    ) -> Result<Vec<Row>> {
        let seed = self.config.train.seed;
        let mut engine = Engine::initialised(self.config.model.clone(), device, seed)?;
        let classes = match &mut peer {
            Some(peer) => prepare(peer, &mut engine, self.floats())?,
            None => vec![],
        };
        let stage = Sampling::new(self.config, seed)?;
        let mut rows = vec![self.text(&stage, &mut engine, peer.as_deref_mut(), &classes, note)?];
        if self.config.model.image().is_some() {
            rows.push(self.denoising(&stage, engine, peer, &classes, note)?);
        }
        Ok(rows)
    }

    /// How the model stores, and what its products are done in.
    fn floats(&self) -> Floats {
        Floats::of(&self.config.model, self.machine.is_cpu())
    }

    fn row(&self, what: &str, unit: &str) -> Row {
        Row {
            preset: self.preset.into(),
            unit: Some(unit.into()),
            ..Row::new(self.machine, "sample", what).of(self.floats())
        }
    }

    /// Greedy text of every sequence at once.
    fn text(
        &self,
        stage: &Sampling<'_>,
        engine: &mut Engine,
        peer: Option<&mut Peer>,
        classes: &[Class],
        note: &mut dyn FnMut(String),
    ) -> Result<Row> {
        let (sequences, length) = (self.config.train.rows, self.config.train.positions);
        let ours = logits(stage, engine)?;
        engine.close_sampling();
        let prompts: Vec<Vec<i32>> = (0..sequences).map(|i| stage.prompt(i)).collect();
        let judge = |told: &Value| Ok(apart(&ours, &numbers(told, "logits")?));
        let prompt = PROMPT.min(length / 4).max(1);
        let count = TOKENS.min(length.saturating_sub(prompt + 2)).max(2);
        let room = length.max(prompt + count + 2);
        let opponent = peer.map(|peer| Opponent {
            peer,
            classes: classes.to_vec(),
            bounds: vec![],
            build: json!({ "do": "sample.decode", "prompts": prompts, "token": stage.token(), "length": room }),
            judge: &judge,
            time: json!({ "do": "sample.time_decode", "prompt": prompt + 1, "count": count }),
            trial: TRIAL,
        });
        let floats = Floats::of_rows(&self.config.model, sequences, self.machine.is_cpu());
        let row = Row {
            shape: format!("{sequences} x {count} tokens behind {prompt}"),
            ..self.row("decode", "tokens/s").of(floats)
        };
        note(format!("{}: decoding", self.preset));
        let mut block = |seconds| decode(engine, sequences, prompt, count, seconds);
        let row = contest::measure(row, &mut block, opponent, self.schedule, note, self.cancel)?;
        let work = decode_work(&self.config.model, sequences, prompt + count / 2);
        let mut row = row.rated(work, self.least(work, floats), self.machine);
        row.rate = row.ms.map(|ms| sequences as f64 / ms * 1e3);
        Ok(row)
    }

    /// Guided denoising of an image of every sequence at once.
    fn denoising(
        &self,
        stage: &Sampling<'_>,
        engine: Engine,
        peer: Option<&mut Peer>,
        classes: &[Class],
        note: &mut dyn FnMut(String),
    ) -> Result<Row> {
        let sequences = self.config.train.rows;
        let mut denoiser = Denoiser::new(stage, engine)?;
        let ours = denoiser.first()?;
        let judge = |told: &Value| Ok(apart(&ours, &numbers(told, "x")?));
        let mut build =
            json!({ "do": "sample.denoise", "contexts": contexts(stage, &self.config.model, sequences) });
        let all = stage.steps(STEPS);
        build["steps"] = all.iter().map(|s| json!([s.t, s.step.row()])).collect();
        if let Some(last) = stage.steps(2).last() {
            (build["t"], build["row"]) = (last.t.into(), json!(last.step.row()));
        }
        let opponent = match peer {
            Some(peer) => {
                let noise = Host::F32(stage.noise());
                let spec = Spec::new([noise.view().len()], noise.view().dtype());
                build["noise"] =
                    json!(peer.folder().tensors("noise.safetensors", &[("noise".into(), spec, noise)])?);
                Some(Opponent {
                    peer,
                    classes: classes.to_vec(),
                    bounds: vec![],
                    build,
                    judge: &judge,
                    time: json!({ "do": "sample.time_denoise" }),
                    trial: TRIAL,
                })
            }
            None => None,
        };
        let row = Row {
            shape: format!("{sequences} x {} patches, guided", denoiser.extend.positions),
            ..self.row("denoise", "steps/s")
        };
        note(format!("{}: denoising", self.preset));
        let row =
            contest::measure(row, &mut |s| denoiser.block(s), opponent, self.schedule, note, self.cancel)?;
        let work = denoiser.work(&self.config.model)?;
        let mut row = row.rated(work, self.least(work, self.floats()), self.machine);
        row.rate = row.ms.map(|ms| 1e3 / ms);
        Ok(row)
    }

    fn least(&self, work: Cost, floats: Floats) -> Option<f64> {
        self.machine.ceilings.seconds(work, floats.narrow)
    }

    /// Seconds from the start of a process to its end with one token, of `program sample` and of PyTorch: the whole
    /// life of a process, so that its first token came sooner.
    ///
    /// # Errors
    /// If a process fails.
    pub fn cold(&self, program: &Path, device: &str, peer: Option<&Peer>, folder: &Path) -> Result<Row> {
        let exported = folder.join("cold");
        let seed = self.config.train.seed;
        let mut engine = Engine::initialised(self.config.model.clone(), transfusion::engine::cpu(0)?, seed)?;
        hf::export(&mut engine, &exported)?;
        let threads = self.machine.threads.to_string();
        let mut ours = Command::new(program);
        ours.arg("sample").arg(&exported).args(["--to", "text", "--max-text", "1", "--prompt", COLD_PROMPT]);
        ours.args(["--device", device, "--threads", &threads]);
        let mut theirs = peer.map(|peer| {
            let mut command = Command::new(&peer.python);
            command.arg(peer.folder().path().join(COLD)).arg(&exported).args([&threads, COLD_PROMPT]);
            command
        });
        let mut ours = |_| life(&mut ours);
        let mut their_life = theirs.as_mut().map(|command| move |_| life(command));
        let side = their_life.as_mut().map(|life| life as &mut dyn FnMut(f64) -> Result<Vec<f64>>);
        let pair = alternate(self.schedule, &mut ours, side, self.cancel)?;
        Ok(Row {
            shape: "a process, to its first token and end".into(),
            torch: peer.map(|peer| peer.version.clone()),
            unit: None,
            ..self.row("cold start", "").timed(&pair)
        })
    }
}

/// Hands the weights to the other side; its variants.
fn prepare(peer: &mut Peer, engine: &mut Engine, floats: Floats) -> Result<Vec<Class>> {
    let exported = peer.folder().path().join("sampled");
    let _ = std::fs::remove_dir_all(&exported);
    hf::export(engine, &exported)?;
    let asked = json!({
        "do": "sample.prepare", "config": engine.config(), "device": peer.device, "rounded": floats.rounded(),
        "weights": exported.join("model.safetensors"), "dtype": engine.config().dtype().name(),
    });
    let told = peer.ask(asked)?;
    Class::told(&told, peer, floats, TOLERANCE)
}

/// Our logits behind the prompts and one token.
fn logits(stage: &Sampling<'_>, engine: &mut Engine) -> Result<Vec<f64>> {
    let mut yielded = vec![];
    for named in stage.programs(engine.has_ema()).into_iter().take(2) {
        stage.set(engine, named)?;
        let plan = engine.open(named.program)?;
        engine.run(plan)?;
        yielded = engine.device().fetch(Place::Output(plan, "logits"))?.to_f64();
    }
    Ok(yielded)
}

/// What precedes the images: those of the sequences, then those of their twins without a condition.
fn contexts(stage: &Sampling<'_>, config: &ModelConfig, sequences: usize) -> Vec<Vec<i32>> {
    let tokens = config.tokens();
    let conditional = |i| [stage.prompt(i), vec![stage.token()]].concat();
    (0..sequences).map(conditional).chain((0..sequences).map(|_| vec![tokens.bos, tokens.boi])).collect()
}

/// Milliseconds of a token of every sequence, one number for each text of `count` tokens.
fn decode(
    engine: &mut Engine,
    sequences: usize,
    prompt: usize,
    count: usize,
    seconds: f64,
) -> Result<Vec<f64>> {
    let text = Part::Text(b"the quick brown fox jumps over the lazy dog"[..prompt].to_vec());
    let prompts = vec![vec![text]; sequences];
    let options = SampleOptions {
        goal: Goal::Text,
        temperature: 0.0,
        max_text: count,
        guidance: 1.0,
        ..SampleOptions::default()
    };
    let (begin, mut times) = (Instant::now(), Vec::new());
    while times.is_empty() || begin.elapsed() < Duration::from_secs_f64(seconds) {
        let mut arrived = Vec::with_capacity(count);
        let mut observe = |event| {
            if let Event::Token { sequence: 0, .. } = event {
                arrived.push(Instant::now());
            }
        };
        sample(engine, &prompts, &options, &mut observe, Cancel(None))?;
        let [first, .., last] = arrived[..] else {
            return Err(Error::peer("the text ended with its first token; another --set train.seed may do"));
        };
        times.push(1e3 * (last - first).as_secs_f64() / (arrived.len() - 1) as f64);
    }
    Ok(times)
}

/// Products with every weight that a token meets, and attention over `context` positions; the weights and the cached
/// keys and values, read once.
fn decode_work(c: &ModelConfig, sequences: usize, context: usize) -> Cost {
    let head = if c.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
    let met = weights(c)
        .into_iter()
        .filter(|w| w.decays() && (w.name.starts_with("model.layers.") || w.name == head));
    let (heads, size) = (c.heads(), c.dtype().size() as u64);
    let weights: u64 = met.map(|w| w.elements() as u64).sum();
    let pairs = (sequences * context * c.num_hidden_layers) as u64;
    Cost {
        flops: 2 * weights * sequences as u64 + 4 * pairs * (heads.heads * heads.width) as u64,
        bytes: size * (weights + 2 * pairs * (heads.kv_heads * heads.width) as u64),
    }
}

impl<'a, 'c> Denoiser<'a, 'c> {
    fn new(stage: &'a Sampling<'c>, mut engine: Engine) -> Result<Denoiser<'a, 'c>> {
        let mut found = None;
        for named in stage.programs(engine.has_ema()) {
            stage.set(&mut engine, named)?;
            let plan = engine.open(named.program)?;
            engine.run(plan)?;
            if let Named { program: Program::Image(extend, pass), .. } = named {
                found = Some((extend, pass));
            }
        }
        let (extend, pass) = found.ok_or_else(|| Error::peer("this model draws no images"))?;
        Ok(Denoiser { stage, engine, extend, pass })
    }

    /// The images after one step from noise, half way.
    fn first(&mut self) -> Result<Vec<f64>> {
        self.stage.write(&mut self.engine, "picture", &self.stage.noise())?;
        if let Some(step) = self.stage.steps(2).last() {
            self.step(step)?;
        }
        Ok(self.images()?.to_f64())
    }

    fn step(&mut self, step: &transfusion::diffusion::Evaluation) -> Result<()> {
        self.stage.set_step(&mut self.engine, self.extend, self.pass, step)?;
        let plan = self.engine.open(Program::Image(self.extend, self.pass))?;
        Ok(self.engine.run(plan)?)
    }

    fn images(&mut self) -> Result<Host> {
        let sequences = self.extend.rows / 2;
        Ok(self.engine.device().fetch(Place::State(Kind::Cache, &format!("picture.{sequences}")))?)
    }

    /// Milliseconds of a step, one number for each picture.
    fn block(&mut self, seconds: f64) -> Result<Vec<f64>> {
        let (all, noise) = (self.stage.steps(STEPS), self.stage.noise());
        let (begin, mut times) = (Instant::now(), Vec::new());
        while times.is_empty() || begin.elapsed() < Duration::from_secs_f64(seconds) {
            let start = Instant::now();
            self.stage.write(&mut self.engine, "picture", &noise)?;
            all.iter().try_for_each(|step| self.step(step))?;
            self.images()?;
            times.push(1e3 * start.elapsed().as_secs_f64() / all.len() as f64);
        }
        Ok(times)
    }

    /// Products and traffic of the plan; attention counts the keys that are there.
    fn work(&self, c: &ModelConfig) -> Result<Cost> {
        let (e, heads) = (self.extend, c.heads());
        let plan = self.engine.plan(Program::Image(e, self.pass))?;
        let seen = |context: usize| (context + e.positions) * e.positions * e.rows / 2;
        let pairs = seen(self.stage.prompt(0).len() + 1) + seen(2);
        let attended = (4 * pairs * heads.heads * heads.width * c.num_hidden_layers) as u64;
        let others = plan.steps.iter().filter(|s| s.op.name() != "attention").map(|s| s.cost);
        Ok(others.fold(Cost { flops: attended, bytes: 0 }, |sum, c| Cost {
            flops: sum.flops + c.flops,
            bytes: sum.bytes + c.bytes,
        }))
    }
}

/// Milliseconds that a process lives.
fn life(command: &mut Command) -> Result<Vec<f64>> {
    let start = Instant::now();
    let out = command.stdin(Stdio::null()).output();
    let ms = 1e3 * start.elapsed().as_secs_f64();
    let program = command.get_program().to_string_lossy().into_owned();
    let out = out.map_err(|e| Error::peer(format!("{program} cannot be started: {e}")))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        let last = said.lines().last().unwrap_or("it said nothing").to_string();
        return Err(Error::peer(format!("{program} ended with {}: {last}", out.status)));
    }
    Ok(vec![ms])
}
