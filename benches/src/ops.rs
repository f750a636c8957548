//! Every distinct op of the plans of training and sampling, alone, on the numbers that it meets there; the optimiser's
//! whole step; and, to compare machines and baselines by, square products and convolutions.
//!
//! On a GPU an op is timed by events, on inputs in several places in turn, and its second-level cache is overwritten
//! before every run. On a CPU its operands stay in the caches, on both sides.
use crate::{
    contest::{self, Class, Opponent, apart},
    error::{Error, Result},
    floats::{Floats, Tolerance},
    machine::Machine,
    peer::{Peer, words},
    row::Row,
    statistics::Schedule,
};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};
use transfusion::{
    engine::{Engine, Program},
    programs,
    rehearsal::{self, Packing, Sampling, Scene},
    run::RunConfig,
    sample::Cancel,
    train::Trainer,
};
use transfusion_core::{
    agreement::{self, Application, Walk},
    cases::Case,
    device::{Device, Place, PlanId},
    graph::{self, Graph, Node, Role},
    launch::Cost,
    op::{Kind, Memory, Op},
    ops::Epilogue,
    plan::{self, Plan},
    tensor::{DType, Host, Spec, Tensor, View},
};

/// Layers of the model that numbers are taken from: a first one and a last one, between which all others are like
/// these.
const LAYERS: usize = 2;
/// How far the results of an op may be apart, relative to the largest.
const TOLERANCE: Tolerance = Tolerance { f32: 2e-4, rounded: 2e-2, bf16: 3e-2 };

/// An op on operands, and where it occurs.
#[derive(Clone, Debug)]
pub struct Distinct {
    /// The program: `loss`, `update`, `prefill`, `decode`, `commit`, `denoise`.
    pub program: &'static str,
    /// How often a run of the program applies it.
    pub count: u64,
    /// The op and the numbers that it meets where it occurs first.
    pub application: Application,
}

/// Ops that are the same to a machine: settings and types of operands.
fn key(op: &dyn Op, specs: &[Spec]) -> String {
    format!("{op:?} {specs:?}")
}

/// Every distinct op of a program, where it occurs first, and how often it does, in order of first occurrence.
fn counts(g: &Graph) -> Result<Vec<(String, &Node, u64)>> {
    let mut all: Vec<(String, &Node, u64)> = Vec::new();
    for node in plan::steps(g)?.into_iter().filter(|n| !is_view(n)) {
        let specs: Vec<Spec> = node.ins.iter().map(|&t| g.spec(t)).collect();
        let key = key(node.op.as_ref(), &specs);
        match all.iter_mut().find(|(k, ..)| *k == key) {
            Some((.., n)) => *n += 1,
            None => all.push((key, node, 1)),
        }
    }
    Ok(all)
}

fn is_view(n: &Node) -> bool {
    (0..n.outs.len()).all(|o| matches!(n.op.memory(o), Memory::View { .. }))
}

/// Every distinct op of the programs of training and sampling, by program. The numbers are those of a model of two
/// such layers.
///
/// # Errors
/// If the configuration makes no sense, or memory is short.
pub fn distinct(config: &RunConfig, packing: Packing) -> Result<Vec<Distinct>> {
    let mut small = config.clone();
    small.model.num_hidden_layers = small.model.num_hidden_layers.min(LAYERS);
    let (seed, ema) = (config.train.seed, config.train.ema > 0.0);
    let training = rehearsal::training_step(&small, packing, seed)?.into_iter();
    let scenes: Vec<Scene> = training.chain(rehearsal::sampling(&small, seed)?).collect();
    let sampled = Sampling::new(config, seed)?.programs(ema);
    let named = programs::training(config).into_iter().chain(sampled);
    let mut all = Vec::new();
    for (named, scene) in named.zip(scenes) {
        all.extend(met(named.name, scene, &named.program.graph(&config.model)?)?);
    }
    Ok(all)
}

/// The ops of a program `g`, with the numbers that they meet in a scene of it, which has fewer layers.
fn met(program: &'static str, scene: Scene, g: &Graph) -> Result<Vec<Distinct>> {
    let mut cpu = agreement::cpu(1)?;
    let (wanted, there) = (counts(g)?, counts(&scene.graph)?);
    let mut across = HashMap::new();
    for (key, node, _) in wanted.iter().filter(|(key, ..)| there.iter().all(|(k, ..)| k != key)) {
        let none = || Error::peer(format!("{program}: a model of {LAYERS} layers has no {key}"));
        across.insert(key.clone(), over_layers(g, node, &scene).ok_or_else(none)?);
    }
    let mut walk = Walk::new(&scene.graph, plan::steps(&scene.graph)?, scene.given);
    let mut found: HashMap<String, Application> = HashMap::new();
    while let Some(application) = walk.step(&mut cpu)? {
        found.entry(key(application.op.as_ref(), &application.specs)).or_insert(application);
    }
    let each = wanted.into_iter().filter_map(|(key, _, count)| {
        let application = found.remove(&key).or_else(|| across.remove(&key))?;
        Some(Distinct { program, count, application })
    });
    Ok(each.collect())
}

/// An op over states of more layers than a scene has: those of another layer stand in for them, and ones for numbers
/// that are computed. `None` if it reads anything else.
fn over_layers(g: &Graph, node: &Node, scene: &Scene) -> Option<Application> {
    let sources: HashMap<Tensor, &graph::Value> = g.sources().collect();
    let given: HashMap<(Role, &str), &Host> = scene
        .graph
        .sources()
        .filter_map(|(t, v)| Some(((v.role, v.name.as_str()), scene.given.get(&t)?)))
        .collect();
    let number = |t: Tensor| {
        let spec = g.spec(t);
        match sources.get(&state_of(g, t)) {
            Some(v) => given.get(&(v.role, in_scene(&v.name).as_str())).map(|host| (*host).clone()),
            None => (spec.shape.numel() == 1).then(|| Host::from_f64(spec.dtype, [1.0])),
        }
    };
    let ins = node.ins.iter().map(|&t| number(t)).collect::<Option<Vec<Host>>>()?;
    let specs = node.ins.iter().map(|&t| g.spec(t)).collect();
    Some(Application { op: node.op.clone(), specs, ins })
}

/// The state of which a tensor is a version.
fn state_of(g: &Graph, t: Tensor) -> Tensor {
    let made = |n: &&Node| n.outs.contains(&t);
    let replaced = g.nodes().iter().find(made).and_then(|n| {
        let o = n.outs.iter().position(|out| *out == t)?;
        n.op.memory(o).replaced().map(|i| n.ins[i])
    });
    replaced.map_or(t, |before| state_of(g, before))
}

/// What a weight's name, or that of its states, is in a model of [`LAYERS`] layers.
fn in_scene(name: &str) -> String {
    let layer = |rest: &str| rest.split('.').next().and_then(|i| i.parse::<usize>().ok());
    match name.split_once("layers.").and_then(|(head, rest)| Some((head, rest, layer(rest)?))) {
        Some((head, rest, i)) => {
            format!("{head}layers.{}{}", i % LAYERS, rest.trim_start_matches(char::is_numeric))
        }
        None => name.into(),
    }
}

/// Ops that belong together, measured in a few minutes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Matrix products, forward and both ways back.
    Products,
    /// Attention, forward and back.
    Attention,
    /// Everything that goes row by row or element by element, and cross entropy.
    Rows,
    /// The optimiser.
    Optimiser,
    /// Square products, which tell what a machine does at best.
    Squares,
    /// Convolutions of the other side: the engine has none.
    Convolutions,
}

impl Group {
    /// The group of an op.
    pub fn of(op: &str) -> Group {
        match op {
            "linear" | "linear_dx" | "linear_dw" => Group::Products,
            "attention" | "attention_bwd" => Group::Attention,
            "adamw" | "ema" | "sum_squares" | "clip" => Group::Optimiser,
            _ => Group::Rows,
        }
    }
}

/// What ops are measured with.
pub struct Ops<'a> {
    /// Name of the preset, for the rows.
    pub preset: &'a str,
    /// The model, its batch, and the sequences that are sampled.
    pub config: &'a RunConfig,
    /// How rows are filled.
    pub packing: Packing,
    /// The machine.
    pub machine: &'a Machine,
    /// How long each.
    pub schedule: Schedule,
    /// Whether our results are held against the CPU's before they are timed, on another device than that.
    pub checked: bool,
    /// Ends it.
    pub cancel: Cancel<'a>,
}

/// An op alone on a device: on a GPU in several places in turn.
pub struct Alone {
    id: PlanId,
    /// Which steps of the plan are it.
    steps: Vec<usize>,
    /// Operands that it replaces.
    replaced: Vec<(String, Host)>,
}

/// Bytes that copies of the operands of an op may take on a GPU, and how many there are at most.
const COPIES: (usize, usize) = (4 << 30, 8);

impl Alone {
    /// Opens it on its operands.
    ///
    /// # Errors
    /// If the device has no kernel for it, or no room.
    pub fn open(device: &mut dyn Device, a: &Application) -> Result<Alone> {
        let target = device.target();
        let bytes: usize = a.specs.iter().map(Spec::bytes).sum();
        let copies = target.map_or(1, |_| (COPIES.0 / bytes.max(1)).clamp(1, COPIES.1));
        let mut g = Graph::new();
        let mut over = target.map(|t| {
            let n = flush(t.l2) / 8;
            (g.input("over", [n], DType::F32), g.input("none", [n], DType::F32))
        });
        let mut steps = Vec::new();
        for copy in 0..copies {
            if let Some((sum, none)) = &mut over {
                *sum = g.add_into(*sum, *none);
            }
            let input = |(i, s): (usize, &Spec)| g.input(&name(i, copy), s.shape, s.dtype);
            let ins: Vec<_> = a.specs.iter().enumerate().map(input).collect();
            steps.push(g.nodes().len());
            let outs = g.apply(a.op.clone(), &ins);
            outs.iter().enumerate().for_each(|(o, &t)| g.output(&format!("out{o}.{copy}"), t));
        }
        if let Some((sum, _)) = over {
            g.output("over", sum);
        }
        let id = device.open(Arc::new(Plan::on(&g, target.as_ref())?))?;
        let mut replaced = Vec::new();
        for (i, host) in a.ins.iter().enumerate() {
            for copy in 0..copies {
                device.write(Place::Input(id, &name(i, copy)), host.view())?;
                if replaces(a, i) {
                    replaced.push((name(i, copy), host.clone()));
                }
            }
        }
        Ok(Alone { id, steps, replaced })
    }

    /// Writes the operands that it replaced as they were.
    ///
    /// # Errors
    /// If the device fails.
    pub fn rewind(&self, device: &mut dyn Device) -> Result<()> {
        let mut all = self.replaced.iter();
        Ok(all.try_for_each(|(name, host)| device.write(Place::Input(self.id, name), host.view()))?)
    }

    /// Runs it in every place; the times.
    ///
    /// # Errors
    /// If the device fails.
    pub fn run(&self, device: &mut dyn Device) -> Result<Vec<Duration>> {
        let all = device.profile(self.id)?;
        Ok(self.steps.iter().filter_map(|&s| all.get(s).copied()).collect())
    }

    /// Makes room.
    pub fn close(self, device: &mut dyn Device) {
        device.close(self.id);
    }

    /// Milliseconds of every run in about so many seconds.
    fn block(&self, device: &mut dyn Device, seconds: f64) -> Result<Vec<f64>> {
        self.rewind(device)?;
        let (begin, mut times) = (Instant::now(), Vec::new());
        while times.len() < 3 || begin.elapsed() < Duration::from_secs_f64(seconds) {
            times.extend(self.run(device)?.iter().map(|t| 1e3 * t.as_secs_f64()));
        }
        Ok(times)
    }
}

/// Whether an application replaces an operand.
fn replaces(a: &Application, input: usize) -> bool {
    let outs = a.op.infer(&a.specs).map_or(0, |outs| outs.len());
    (0..outs).any(|o| a.op.memory(o) == Memory::InPlace { input })
}

/// Bytes that leave nothing of before in a second-level cache, when they are read and written.
fn flush(l2: u64) -> usize {
    (l2 + l2 / 2) as usize
}

fn name(input: usize, copy: usize) -> String {
    format!("in{input}.{copy}")
}

/// What an application costs; attention counts the pairs that see each other.
fn work(a: &Application) -> Cost {
    let cost = a.cost();
    if Group::of(a.op.name()) != Group::Attention {
        return cost;
    }
    let cached = a.specs[1].dtype != DType::I32;
    let (first, keys) =
        if cached { (4, a.specs[1].shape.dims()[1]) } else { (1, a.specs[0].shape.dims()[1]) };
    let (Host::I32(start), Host::I32(end)) = (&a.ins[first], &a.ins[first + 1]) else { return cost };
    let pairs: u64 = start.iter().zip(end).map(|(s, e)| (e - s).max(0) as u64).sum();
    let all = (start.len() * keys).max(1) as u64;
    Cost { flops: (u128::from(cost.flops) * u128::from(pairs) / u128::from(all)) as u64, ..cost }
}

/// Square products of this many rows and columns, forward and back.
fn squares(n: usize, dtype: DType, device: &mut dyn Device) -> Result<Vec<Application>> {
    let case = Case::new("linear", format!("{n}^3"), |g, x| vec![g.linear(x[0], x[1], Epilogue::default())]);
    Ok(agreement::applications(&case.normal([n, n]).normal([n, n]), dtype, device)?)
}

impl Ops<'_> {
    /// Measures the ops of these groups whose names are in `only`, or all of them if that is empty.
    ///
    /// # Errors
    /// What either side refuses; results that do not agree.
    pub fn measure(
        &self,
        device: Box<dyn Device>,
        mut peer: Option<&mut Peer>,
        groups: &[Group],
        only: &[String],
        note: &mut dyn FnMut(String),
    ) -> Result<Vec<Row>> {
        let mut device = device;
        let wanted =
            |op: &str| groups.contains(&Group::of(op)) && (only.is_empty() || only.iter().any(|o| o == op));
        let mut rows = Vec::new();
        let alone = [Group::Squares, Group::Convolutions];
        let mut all = match groups.iter().all(|g| alone.contains(g)) {
            true => vec![],
            false => distinct(self.config, self.packing)?,
        };
        all.retain(|d| wanted(d.application.op.name()));
        for (i, d) in all.iter().enumerate() {
            note(format!("{} of {}: {} of {}", i + 1, all.len(), d.application, d.program));
            rows.extend(self.one(d, device.as_mut(), peer.as_deref_mut(), note)?);
        }
        if groups.contains(&Group::Squares) {
            rows.extend(self.squares(device.as_mut(), peer.as_deref_mut(), note)?);
        }
        if groups.contains(&Group::Convolutions)
            && let Some(peer) = peer.as_deref_mut()
        {
            rows.extend(self.convolutions(peer, note)?);
        }
        if groups.contains(&Group::Optimiser) && only.is_empty() {
            rows.push(self.update(device, peer, note)?);
        }
        Ok(rows)
    }

    fn dtype(&self) -> DType {
        self.config.model.dtype()
    }

    /// How an op stores, and what its products are done in.
    fn floats(&self, a: &Application) -> Floats {
        self.stored().of_op(a.op.as_ref(), &a.specs, self.machine.is_cpu())
    }

    /// Without products.
    fn stored(&self) -> Floats {
        Floats { stored: self.dtype(), narrow: self.dtype() == DType::Bf16 }
    }

    fn row(&self, what: &str, floats: Floats) -> Row {
        Row { preset: self.preset.into(), ..Row::new(self.machine, "ops", what).of(floats) }
    }

    fn least(&self, work: Cost, floats: Floats) -> Option<f64> {
        self.machine.ceilings.seconds(work, floats.narrow)
    }

    /// A row of an op; none where the device has no kernel for it.
    fn one(
        &self,
        d: &Distinct,
        device: &mut dyn Device,
        peer: Option<&mut Peer>,
        note: &mut dyn FnMut(String),
    ) -> Result<Option<Row>> {
        let a = &d.application;
        let bench = match Alone::open(device, a) {
            Err(Error::Engine(transfusion::Error::Core(e @ transfusion_core::Error::NoKernel { .. }))) => {
                note(format!("left out: {e}"));
                return Ok(None);
            }
            other => other?,
        };
        let measured = self.opened(d, &bench, device, peer, note);
        bench.close(device);
        measured.map(Some)
    }

    fn opened(
        &self,
        d: &Distinct,
        bench: &Alone,
        device: &mut dyn Device,
        peer: Option<&mut Peer>,
        note: &mut dyn FnMut(String),
    ) -> Result<Row> {
        let (a, name) = (&d.application, d.application.op.name());
        let floats = self.floats(a);
        let foreign = self.checked && device.target().is_some();
        let results = if foreign || peer.is_some() { a.run(&mut agreement::cpu(1)?)? } else { vec![] };
        if foreign {
            self.check(a, &results, device)?;
        }
        let specs: Vec<String> = a.specs.iter().map(|s| format!("{s:?}")).collect();
        let row = Row {
            program: d.program.into(),
            shape: specs.join(" "),
            count: d.count,
            ..self.row(name, floats)
        };
        let over = device.target().map_or(0, |t| flush(t.l2));
        let judge = |told: &Value| Ok(told["apart"].as_f64().unwrap_or(0.0));
        let opponent = match peer {
            Some(peer) => self.opponent(a, &results, peer, &judge, over)?,
            None => None,
        };
        let mut block = |seconds| bench.block(device, seconds);
        let row = contest::measure(row, &mut block, opponent, self.schedule, note, self.cancel)?;
        let work = work(a);
        Ok(row.rated(work, self.least(work, floats), self.machine))
    }

    /// Holds our results against those of the CPU.
    fn check(&self, a: &Application, results: &[Host], device: &mut dyn Device) -> Result<()> {
        let (have, most) = (a.run(device)?, TOLERANCE.of([self.floats(a); 2]));
        for (i, (have, want)) in have.iter().zip(results).enumerate() {
            let far = apart(&want.to_f64(), &have.to_f64());
            if far.is_nan() || far > most {
                return Err(Error::peer(format!(
                    "{a}: result {i} is {far:.1e} from the CPU's, and {most:.0e} is allowed"
                ))
                .with_remedy(format!("`transfusion kernels check {}` tells more", a.op.name())));
            }
        }
        Ok(())
    }

    /// The other side of an op, where it has one.
    fn opponent<'p>(
        &self,
        a: &Application,
        results: &[Host],
        peer: &'p mut Peer,
        judge: &'p dyn Fn(&Value) -> Result<f64>,
        over: usize,
    ) -> Result<Option<Opponent<'p>>> {
        let (op, device) = (a.op.name(), peer.device.clone());
        let dims: Vec<&[usize]> = a.specs.iter().map(|s| s.shape.dims()).collect();
        let floats = self.floats(a);
        let told = peer.ask(json!({
            "do": "ops.variants", "op": op, "specs": dims, "device": device, "dtype": self.dtype().name(),
            "rounded": floats.rounded(),
        }))?;
        let (classes, bounds) = (Class::told(&told, peer, floats, TOLERANCE)?, words(&told, "bounds")?);
        if classes.is_empty() {
            return Ok(None);
        }
        let outs = a.op.infer(&a.specs).map_err(Error::peer)?;
        let operands =
            a.specs.iter().zip(&a.ins).enumerate().map(|(i, (s, h))| (format!("in{i}"), *s, h.clone()));
        let yielded =
            outs.iter().zip(results).enumerate().map(|(i, (s, h))| (format!("out{i}"), *s, h.clone()));
        let file = peer.folder().tensors("op.safetensors", &operands.chain(yielded).collect::<Vec<_>>())?;
        Ok(Some(Opponent {
            peer,
            classes,
            bounds,
            build: json!({
                "do": "ops.build", "op": op, "told": format!("{:?}", a.op), "device": device,
                "dtype": self.dtype().name(), "tensors_at": file,
            }),
            judge,
            time: json!({ "do": "ops.time", "flush": over }),
            trial: self.schedule.seconds,
        }))
    }

    /// What a machine does at best: square products.
    fn squares(
        &self,
        device: &mut dyn Device,
        mut peer: Option<&mut Peer>,
        note: &mut dyn FnMut(String),
    ) -> Result<Vec<Row>> {
        let sizes: &[usize] = if device.target().is_some() { &[4096, 8192] } else { &[512, 1024, 2048] };
        let mut rows = Vec::new();
        for &n in sizes {
            for application in squares(n, self.dtype(), device)? {
                note(format!("square: {application}"));
                let d = Distinct { program: "", count: 0, application };
                let row = self.one(&d, device, peer.as_deref_mut(), note)?;
                rows.extend(row.map(|row| Row { preset: String::new(), ..row }));
            }
        }
        Ok(rows)
    }

    /// The class of the only variant.
    fn class(&self, variant: &str, tolerance: f64) -> Class {
        Class { name: self.dtype().name().into(), variants: vec![variant.into()], tolerance }
    }

    /// 3x3 convolutions of the sizes that an image encoder would have, on the other side alone.
    fn convolutions(&self, peer: &mut Peer, note: &mut dyn FnMut(String)) -> Result<Vec<Row>> {
        let over = if peer.device == "cpu" { 0 } else { flush(60 << 20) };
        let mut rows = Vec::new();
        for (channels, side) in [(256, 16), (256, 32), (512, 16), (512, 32)] {
            let images = 64;
            note(format!("convolution: {images} x {side} x {side} x {channels}"));
            let told = format!("Convolution {{ images: {images}, side: {side}, channels: {channels} }}");
            let build = json!({
                "do": "ops.build", "op": "convolution", "told": told, "device": peer.device, "dtype": self.dtype().name(),
            });
            let judge = |told: &Value| Ok(told["apart"].as_f64().unwrap_or(f64::INFINITY));
            let opponent = Opponent {
                peer,
                classes: vec![self.class("channels last", TOLERANCE.of([self.stored(); 2]))],
                bounds: vec![],
                build,
                judge: &judge,
                time: json!({ "do": "ops.time", "flush": over }),
                trial: self.schedule.seconds,
            };
            let shape = format!("{images} x {side} x {side} x {channels}, 3x3");
            let row = Row { shape, preset: String::new(), ..self.row("convolution", self.stored()) };
            rows.push(contest::alone(row, opponent, self.schedule, note, self.cancel)?);
        }
        Ok(rows)
    }

    /// The optimiser's whole step: norm, clipping, AdamW, running means.
    fn update(
        &self,
        device: Box<dyn Device>,
        peer: Option<&mut Peer>,
        note: &mut dyn FnMut(String),
    ) -> Result<Row> {
        const GRADIENT: f32 = 1e-3;
        let train = &self.config.train;
        let engine = Engine::initialised(self.config.model.clone(), device, train.seed)?;
        let mut trainer = Trainer::new(engine, train.clone())?;
        let program = Program::Update(train.update());
        let engine = trainer.engine();
        let id = engine.open(program)?;
        let sizes: Vec<usize> = engine.weights().iter().map(|w| w.elements()).collect();
        let norm = f64::from(GRADIENT) * (sizes.iter().sum::<usize>() as f64).sqrt();
        let work = engine.plan(program)?.cost();
        engine.floats(
            id,
            "schedule",
            &[train.lr as f32, (1.0 - train.beta1) as f32, (1.0 - train.beta2) as f32],
        )?;
        if train.ema > 0.0 {
            engine.floats(id, "ema_decay", &[train.ema as f32])?;
        }
        let mut block = |seconds: f64| {
            for w in engine.weights().to_vec() {
                let gradient = vec![GRADIENT; w.elements()];
                engine.device().write(Place::State(Kind::Grad, &w.name), View::F32(&gradient))?;
            }
            let (begin, mut times) = (Instant::now(), Vec::new());
            while times.len() < 3 || begin.elapsed() < Duration::from_secs_f64(seconds) {
                let start = Instant::now();
                engine.run(id)?;
                let have = f64::from(engine.number(id, "grad_norm")?);
                if times.is_empty() && (have / norm - 1.0).abs() > 1e-4 && self.checked {
                    return Err(Error::peer(format!("the gradient norm is {have}, not {norm}")));
                }
                times.push(1e3 * start.elapsed().as_secs_f64());
            }
            Ok(times)
        };
        let judge = |told: &Value| Ok(told["apart"].as_f64().unwrap_or(f64::INFINITY));
        let opponent = peer.map(|peer| Opponent {
            build: json!({
                "do": "ops.build", "op": "update", "told": "Update", "device": peer.device, "sizes": sizes,
                "dtype": self.dtype().name(), "lr": train.lr, "beta1": train.beta1, "beta2": train.beta2,
                "eps": train.eps, "max_norm": train.max_norm, "ema": train.ema, "gradient": GRADIENT,
                "wants": { "0": [norm] },
            }),
            peer,
            classes: vec![self.class("fused", 1e-4)],
            bounds: vec![],
            judge: &judge,
            time: json!({ "do": "ops.time" }),
            trial: self.schedule.seconds,
        });
        let shape = format!("{} weights, {} numbers", sizes.len(), sizes.iter().sum::<usize>());
        let stored = self.stored();
        let row = Row { program: "update".into(), shape, count: 1, ..self.row("update", stored) };
        let row = contest::measure(row, &mut block, opponent, self.schedule, note, self.cancel)?;
        Ok(row.rated(Cost { flops: 0, ..work }, self.least(work, stored), self.machine))
    }
}
