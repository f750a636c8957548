//! The model as graphs: a Llama trunk over mixed rows of text and patches, the linear patch codec,
//! the loss, the optimiser step, and the two programs that sampling replays.
//!
//! Weights that are used together live together, in the layout that the kernels want: `qkv` with
//! rotary pairs adjacent, `gate_up` interleaved. Hugging Face names and layouts exist at import and
//! export only.
use crate::{
    batch::Batch,
    config::{Float, ModelConfig, PatchPositions},
};
use serde::{Deserialize, Serialize};
use transfusion_core::{
    Result,
    graph::Graph,
    op::Kind,
    ops::{
        Activation, AdamW, AdamWStates, Epilogue, Factor, Noise, Qkv, Repeat, Rotary, SamplerInputs,
        SamplerStep,
    },
    tensor::{DType, Shape, Tensor},
};

/// Width of the sinusoidal time embedding.
pub const TIME_WIDTH: usize = 256;

/// How a weight begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal numbers of this deviation.
    Normal(f64),
    /// Ones.
    Ones,
    /// Zeros.
    Zeros,
}

/// One weight of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight {
    /// Its name, also of its gradient, moments and mean.
    pub name: String,
    /// `[out, in]` of a matrix, `[width]` of a scale or bias.
    pub shape: Vec<usize>,
    /// How it begins.
    pub init: Init,
}

impl Weight {
    /// Its extents.
    pub fn shape(&self) -> Shape {
        match *self.shape {
            [rows, columns] => [rows, columns].into(),
            _ => [self.elements()].into(),
        }
    }

    /// How many numbers it holds.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether weight decay applies: to matrices, not to scales and biases.
    pub fn decays(&self) -> bool {
        self.shape.len() > 1
    }
}

/// Every weight of a model, in a fixed order: the one list that initialisation, optimiser,
/// checkpoints and export share. Normal 0.02, the two projections that feed the residual scaled by
/// `1 / sqrt(2 L)`.
pub fn weights(c: &ModelConfig) -> Vec<Weight> {
    let heads = c.heads();
    let (width, packed) = (c.hidden_size, (heads.heads + 2 * heads.kv_heads) * heads.width);
    let mut all = Vec::new();
    let mut add =
        |name: String, shape: &[usize], init| all.push(Weight { name, shape: shape.to_vec(), init });
    let normal = Init::Normal(0.02);
    let residual = Init::Normal(0.02 / (2.0 * c.num_hidden_layers as f64).sqrt());
    add("model.embed_tokens.weight".into(), &[c.vocab_size, width], normal);
    for i in 0..c.num_hidden_layers {
        let name = |s: &str| layer(i, s);
        add(name("input_layernorm.weight"), &[width], Init::Ones);
        add(name("self_attn.qkv.weight"), &[packed, width], normal);
        if c.qk_norm() {
            add(name("self_attn.q_norm.weight"), &[heads.width], Init::Ones);
            add(name("self_attn.k_norm.weight"), &[heads.width], Init::Ones);
        }
        add(name("self_attn.o_proj.weight"), &[width, heads.heads * heads.width], residual);
        add(name("post_attention_layernorm.weight"), &[width], Init::Ones);
        add(name("mlp.gate_up.weight"), &[2 * c.intermediate_size, width], normal);
        add(name("mlp.down_proj.weight"), &[width, c.intermediate_size], residual);
    }
    add("model.norm.weight".into(), &[width], Init::Ones);
    if !c.tie_word_embeddings {
        add("lm_head.weight".into(), &[c.vocab_size, width], normal);
    }
    if let Some(image) = c.image() {
        let z = image.patch_width();
        for (name, out, inner) in
            [("time_in", z, TIME_WIDTH), ("time_out", z, z), ("patch_in", width, z), ("patch_out", z, width)]
        {
            add(format!("transfusion.{name}.weight"), &[out, inner], normal);
            add(format!("transfusion.{name}.bias"), &[out], Init::Zeros);
        }
    }
    all
}

/// The name of a weight of layer `i`.
pub fn layer(i: usize, what: &str) -> String {
    format!("model.layers.{i}.{what}")
}

/// Model FLOPs of a training step over a micro-batch: forward, and twice that for the gradient. What counts is
/// what the batch holds: positions with a document, targets, images, and pairs of a query and a key that it
/// sees; neither recomputation nor the optimiser does.
pub fn step_flops(c: &ModelConfig, batch: &Batch) -> u64 {
    let heads = c.heads();
    let pairs: u64 = batch.row_start.iter().zip(&batch.row_end).map(|(s, e)| (e - s).max(0) as u64).sum();
    let attended = 4 * (c.num_hidden_layers * heads.heads * heads.width) as u64 * pairs;
    let images = batch.image_count as u64;
    let met = |w: &Weight| match w.name.as_str() {
        name if name.starts_with("model.layers.") => batch.used() as u64,
        "model.embed_tokens.weight" if !c.tie_word_embeddings => 0,
        "model.embed_tokens.weight" | "lm_head.weight" => batch.text_count as u64,
        name if name.starts_with("transfusion.time") => images,
        _ => images * batch.geometry.patches() as u64,
    };
    let matrices = weights(c).into_iter().filter(Weight::decays);
    let products: u64 = matrices.map(|w| 2 * w.elements() as u64 * met(&w)).sum();
    3 * (attended + products)
}

/// The capacities of a training batch: static, as plans are; contents are data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Packed rows B.
    pub rows: usize,
    /// Positions T of a row.
    pub positions: usize,
    /// Positions that carry a text loss.
    pub text_rows: usize,
    /// Images.
    pub images: usize,
}

/// Where the noise of training images comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoiseSource {
    /// Philox, keyed by inputs `seed` and `noise_keys`: training.
    Counter,
    /// The input `noise`: comparison with other implementations.
    Given,
}

/// What of the forward pass is computed again in the backward pass instead of being kept until then. The
/// results have the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// What passes over rows without a product: norms, RoPE behind them, SwiGLU, picked rows.
    Cheap,
    /// Layers: only the input of each is kept.
    Blocks,
}

/// What a loss program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LossOptions {
    /// Sums the gradient of every weight in its `Grad` state.
    pub backward: bool,
    /// Begins those sums, as the first micro-batch of a step does: what was there does not count.
    pub begins: bool,
    /// Reads the running means in place of the weights.
    pub ema: bool,
    /// Where the noise comes from.
    pub noise: NoiseSource,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// What gradients are summed in.
    pub gradients: Float,
    /// Lets kernels sum gradients in an order that is free ([`Graph::unordered`]).
    pub unordered: bool,
    /// F64 for gradient checks, else `None`: what the configuration says.
    pub dtype: Option<DType>,
    /// Adds what a proof looks at: outputs `hidden [N, C]` (the rows that heads read), `qkv.L`
    /// `[N, (H + 2 Hkv) D]` (what layer L attends over, rotated) and, with images, `prediction`.
    pub inspect: bool,
}

impl LossOptions {
    /// The first micro-batch of a training step.
    pub const TRAIN: LossOptions = LossOptions {
        backward: true,
        begins: true,
        ema: false,
        noise: NoiseSource::Counter,
        recompute: Recompute::None,
        gradients: Float::Float32,
        unordered: false,
        dtype: None,
        inspect: false,
    };
    /// Evaluation.
    pub const EVAL: LossOptions = LossOptions { backward: false, begins: false, ..LossOptions::TRAIN };
}

/// The program of one micro-batch: outputs `loss`, and where the model has them `loss_text`,
/// `loss_image` and `image_errors` (mean squared error of each image).
///
/// # Errors
/// If the configuration makes no sense; [`ModelConfig::check`] refuses those with better words.
pub fn loss_graph(c: &ModelConfig, capacity: Capacity, options: LossOptions) -> Result<Graph> {
    let dtype = options.dtype.unwrap_or(c.dtype());
    let mut b = Builder::new(c, if options.ema { Kind::Ema } else { Kind::Param }, dtype);
    b.inspect = options.inspect;
    b.recompute = if options.backward { options.recompute } else { Recompute::None };
    b.g.unordered = options.unordered;
    let Capacity { rows, positions, .. } = capacity;
    let n = rows * positions;
    let tokens = b.g.input("tokens", [n], DType::I32);
    let mut x = b.embed(tokens);
    let image = c.image().map(|_| b.noised_images(capacity, options.noise));
    if let Some(image) = &image {
        let embedded = b.patch_embedding(image.patches, image.times, capacity.images);
        x = b.g.scatter_rows(x, embedded, image.rows);
    }
    let place = Place::Packed {
        rows,
        positions: b.g.input("positions", [n], DType::I32),
        row_start: b.g.input("row_start", [rows, positions], DType::I32),
        row_end: b.g.input("row_end", [rows, positions], DType::I32),
    };
    let h = b.trunk(x, &place);
    b.show("hidden", h);
    let text = b.text_loss(h, capacity.text_rows);
    b.g.output("loss_text", text);
    let loss = match image {
        Some(image) => {
            let [error, each] = b.image_loss(h, &image, capacity.images);
            b.g.output("loss_image", error);
            b.g.output("image_errors", each);
            let lambda = c.image().map_or(0.0, |i| i.lambda);
            b.g.add_scaled(text, error, lambda, Repeat::None)
        }
        None => text,
    };
    b.g.output("loss", loss);
    if options.backward {
        b.g.gradients = Some(options.gradients.dtype());
        b.g.begins = options.begins;
        let params: Vec<Tensor> = weights(c).iter().map(|w| b.weight(&w.name)).collect();
        b.g.backward(loss, &params)?;
    }
    Ok(b.g)
}

/// What stays the same over a training: the optimiser's numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateOptions {
    /// Decay applies to matrices only.
    pub adamw: AdamW,
    /// Largest gradient norm.
    pub max_norm: f64,
    /// Whether running means of the weights are kept.
    pub ema: bool,
    /// What gradients are stored as.
    pub gradients: Float,
    /// What the moments are stored as.
    pub moments: Float,
}

/// The program of one optimiser step over all `Grad` states: inputs `schedule` (see
/// [`Graph::adamw`]) and `ema_decay`; output `grad_norm`.
pub fn update_graph(c: &ModelConfig, options: UpdateOptions) -> Graph {
    let mut g = Graph::new();
    let dtype = c.dtype();
    let schedule = g.input("schedule", [3], DType::F32);
    let all = weights(c);
    let none = g.fill(0.0, [1], DType::F32);
    let gradients = options.gradients.dtype();
    let grads: Vec<Tensor> = all.iter().map(|w| g.state(Kind::Grad, &w.name, w.shape(), gradients)).collect();
    let sum = g.sum_squares_into(none, &grads);
    let [norm, scale] = g.clip(sum, options.max_norm);
    g.output("grad_norm", norm);
    let decay = options.ema.then(|| g.input("ema_decay", [1], DType::F32));
    for decays in [true, false] {
        let group: Vec<&Weight> = all.iter().filter(|w| w.decays() == decays).collect();
        let states: Vec<AdamWStates> = group.iter().map(|w| states(&mut g, w, dtype, options)).collect();
        let weight_decay = if decays { options.adamw.weight_decay } else { 0.0 };
        let new = g.adamw(AdamW { weight_decay, ..options.adamw }, &states, schedule, scale);
        if let Some(decay) = decay {
            let mean = |w: &Weight| g.state(Kind::Ema, &w.name, w.shape(), DType::F32);
            let means: Vec<Tensor> = group.into_iter().map(mean).collect();
            let pairs: Vec<[Tensor; 2]> = means.into_iter().zip(new).map(|(mean, x)| [mean, x]).collect();
            g.ema_into(&pairs, decay, scale);
        }
    }
    g
}

/// What the optimiser updates of a weight that is stored as `dtype`.
fn states(g: &mut Graph, w: &Weight, dtype: DType, options: UpdateOptions) -> AdamWStates {
    let mut optim = |what: &str, dtype| g.state(Kind::Optim, &format!("{}.{what}", w.name), w.shape(), dtype);
    let [m, v] = ["m", "v"].map(|what| optim(what, options.moments.dtype()));
    let master = (dtype == DType::Bf16).then(|| optim("master", DType::F32));
    let param = g.state(Kind::Param, &w.name, w.shape(), dtype);
    let grad = g.state(Kind::Grad, &w.name, w.shape(), options.gradients.dtype());
    AdamWStates { param, master, m, v, grad }
}

/// The shape of a program that extends cached sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extend {
    /// Sequences that it extends at once.
    pub rows: usize,
    /// Positions that it adds to each (the patches of an image, where it adds images).
    pub positions: usize,
    /// Slots of the cache.
    pub slots: usize,
    /// Positions of a slot.
    pub capacity: usize,
    /// Reads the running means in place of the weights.
    pub ema: bool,
}

/// Adds text to cached sequences: inputs `tokens`, `positions` (where in its slot each token goes;
/// -1 is idle) and `row_end` `[rows, positions]`, `slots [rows]`, and `last [rows]`, the row among
/// `rows * positions` whose next token is wanted; output `logits [rows, V]`.
pub fn text_graph(c: &ModelConfig, e: Extend) -> Graph {
    let mut b = Builder::new(c, if e.ema { Kind::Ema } else { Kind::Param }, c.dtype());
    let tokens = b.g.input("tokens", [e.rows * e.positions], DType::I32);
    let x = b.embed(tokens);
    let place = b.cached(e);
    let h = b.trunk(x, &place);
    let last = b.g.input("last", [e.rows], DType::I32);
    let h = b.g.gather_rows(h, last);
    let head = b.head();
    let logits = b.g.linear(h, head, Epilogue::default());
    let logits = b.g.cast(logits, DType::F32);
    b.g.output("logits", logits);
    b.g
}

/// What a program does with the images in state `Cache picture [images, S, S, channels]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImagePass {
    /// Embeds them at the given noise levels and leaves their keys and values in the cache.
    Commit,
    /// Besides, predicts and takes one sampler step, which replaces them. With guidance the second
    /// half of the rows are the same images without their condition.
    Denoise {
        /// Two rows for every image.
        guided: bool,
    },
}

/// Adds images to cached sequences, or denoises them there. Inputs: `times [rows]`, `slots [rows]`,
/// `positions` and `row_end` `[rows, P]`, `copies [rows * P]` (the patch among `images * P` that each
/// row shows); to denoise also `steps [images, 14]` (rows of [`SamplerStep`]), `seed [2]` and
/// `keys [images, 3]`.
pub fn image_graph(c: &ModelConfig, e: Extend, pass: ImagePass) -> Graph {
    let mut b = Builder::new(c, if e.ema { Kind::Ema } else { Kind::Param }, c.dtype());
    let Some(image) = c.image().cloned() else { return b.g };
    let guided = matches!(pass, ImagePass::Denoise { guided: true });
    let images = if guided { e.rows / 2 } else { e.rows };
    let shape = [images, image.size, image.size, image.channels];
    let x = b.g.state(Kind::Cache, &format!("picture.{images}"), shape, DType::F32);
    let narrow = b.g.cast(x, b.dtype);
    let patches = b.g.patchify(narrow, image.patch_size);
    let copies = b.g.input("copies", [e.rows * image.patches()], DType::I32);
    let patches = b.g.gather_rows(patches, copies);
    let times = b.g.input("times", [e.rows], DType::F32);
    let embedded = b.patch_embedding(patches, times, e.rows);
    let place = b.cached(Extend { positions: image.patches(), ..e });
    let h = b.trunk(embedded, &place);
    if pass == ImagePass::Commit {
        return b.g;
    }
    let prediction = b.patch_prediction(h, e.rows);
    let prediction = b.g.cast(prediction, DType::F32);
    b.g.output("prediction", prediction);
    let memory = b.g.state(Kind::Cache, &format!("memory.{images}"), shape, DType::F32);
    let steps = b.g.input("steps", [images, SamplerStep::WIDTH], DType::F32);
    let seed = b.g.input("seed", [2], DType::I32);
    let keys = b.g.input("keys", [images, 3], DType::I32);
    b.g.sampler_update(SamplerInputs { x, memory, prediction, steps, seed, keys });
    b.g
}

/// Where rows lie and what they see.
enum Place {
    /// Packed rows of whole documents.
    Packed { rows: usize, positions: Tensor, row_start: Tensor, row_end: Tensor },
    /// New positions of sequences whose keys and values are cached.
    Cached { extend: Extend, positions: Tensor, slots: Tensor, row_start: Tensor, row_end: Tensor },
}

impl Place {
    /// Of every row, within its sequence.
    fn positions(&self) -> Tensor {
        match *self {
            Place::Packed { positions, .. } | Place::Cached { positions, .. } => positions,
        }
    }
}

/// The images of a training batch.
struct Images {
    patches: Tensor,
    target: Tensor,
    times: Tensor,
    rows: Tensor,
}

struct Builder<'c> {
    g: Graph,
    config: &'c ModelConfig,
    all: Vec<Weight>,
    kind: Kind,
    dtype: DType,
    inspect: bool,
    recompute: Recompute,
}

impl<'c> Builder<'c> {
    fn new(config: &'c ModelConfig, kind: Kind, dtype: DType) -> Builder<'c> {
        let mut g = Graph::new();
        g.precision = config.precision(dtype);
        let (inspect, recompute) = (false, Recompute::None);
        Builder { g, config, all: weights(config), kind, dtype, inspect, recompute }
    }

    /// Makes a value an output, where those are wanted.
    fn show(&mut self, name: &str, t: Tensor) {
        if self.inspect {
            self.g.output(name, t);
        }
    }

    /// What `build` adds is computed again in the backward pass, if at least `from` is.
    fn again<R>(&mut self, from: Recompute, build: impl FnOnce(&mut Self) -> R) -> R {
        let before = self.g.recompute;
        self.g.recompute |= self.recompute >= from;
        let built = build(self);
        self.g.recompute = before;
        built
    }

    /// The same of what passes over rows without a product.
    fn cheap<R>(&mut self, build: impl FnOnce(&mut Self) -> R) -> R {
        self.again(Recompute::Cheap, build)
    }

    /// A weight, or its running mean.
    #[track_caller]
    fn weight(&mut self, name: &str) -> Tensor {
        let Some(w) = self.all.iter().find(|w| w.name == name) else { return Tensor::VOID };
        let kept = if self.kind == Kind::Ema { DType::F32 } else { self.dtype };
        let t = self.g.state(self.kind, name, w.shape(), kept);
        if kept == self.dtype { t } else { self.g.cast(t, self.dtype) }
    }

    fn embed(&mut self, tokens: Tensor) -> Tensor {
        let table = self.weight("model.embed_tokens.weight");
        self.g.embedding(table, tokens)
    }

    /// The output projection.
    fn head(&mut self) -> Tensor {
        let tied = self.config.tie_word_embeddings;
        self.weight(if tied { "model.embed_tokens.weight" } else { "lm_head.weight" })
    }

    /// Inputs that place new positions in the cache.
    fn cached(&mut self, extend: Extend) -> Place {
        let shape = [extend.rows, extend.positions];
        Place::Cached {
            extend,
            positions: self.g.input("positions", shape, DType::I32),
            slots: self.g.input("slots", [extend.rows], DType::I32),
            row_start: self.g.fill(0.0, shape, DType::I32),
            row_end: self.g.input("row_end", shape, DType::I32),
        }
    }

    /// The transformer, from embedded rows `[N, C]` to normalised ones.
    fn trunk(&mut self, mut x: Tensor, place: &Place) -> Tensor {
        for i in 0..self.config.num_hidden_layers {
            let (gated, residual) = self.again(Recompute::Blocks, |b| {
                let x = b.attention_block(i, x, place);
                (b.gated(i, x), x)
            });
            let w = self.weight(&layer(i, "mlp.down_proj.weight"));
            x = self.g.linear(gated, w, Epilogue { residual: Some(residual), ..Default::default() });
        }
        self.norm(x, "model.norm.weight")
    }

    fn norm(&mut self, x: Tensor, name: &str) -> Tensor {
        let w = self.weight(name);
        let eps = self.config.rms_norm_eps;
        self.cheap(|b| b.g.rmsnorm(x, w, eps))
    }

    fn attention_block(&mut self, i: usize, x: Tensor, place: &Place) -> Tensor {
        let c = self.config;
        let h = self.norm(x, &layer(i, "input_layernorm.weight"));
        let w = self.weight(&layer(i, "self_attn.qkv.weight"));
        let rows = self.g.spec(x).shape.rows();
        let positions = self.g.reshape(place.positions(), [rows]);
        let heads = c.heads();
        let rotary = Rotary { positions, heads, theta: c.rope_theta };
        let qkv = if c.qk_norm() {
            let wq = self.weight(&layer(i, "self_attn.q_norm.weight"));
            let wk = self.weight(&layer(i, "self_attn.k_norm.weight"));
            let qkv = self.g.linear(h, w, Epilogue::default());
            let qkv = self.cheap(|b| b.g.qk_norm(qkv, wq, wk, heads, c.rms_norm_eps));
            self.cheap(|b| b.g.rotary(qkv, rotary))
        } else {
            self.g.rotary_linear(h, w, rotary)
        };
        let o = self.attend(i, qkv, place);
        let w = self.weight(&layer(i, "self_attn.o_proj.weight"));
        self.g.linear(o, w, Epilogue { residual: Some(x), ..Default::default() })
    }

    /// Caches where there is a cache, and attends: `[N, (H + 2 Hkv) D]` to `[N, H D]`.
    fn attend(&mut self, i: usize, qkv: Qkv, place: &Place) -> Tensor {
        let heads = self.config.heads();
        let shape = self.g.spec(qkv.tensor()).shape;
        let (n, packed) = (shape.rows(), shape.last());
        let o = match *place {
            Place::Packed { rows, row_start, row_end, .. } => {
                self.show(&format!("qkv.{i}"), qkv.tensor());
                let qkv = self.cheap(|b| qkv.reshape(&mut b.g, [rows, n / rows.max(1), packed]));
                self.g.attention(qkv, row_start, row_end, heads)
            }
            Place::Cached { extend: e, positions, slots, row_start, row_end } => {
                let qkv = self.g.reshape(qkv.tensor(), [e.rows, e.positions, packed]);
                let (q, kv) = (heads.heads * heads.width, heads.kv_heads * heads.width);
                let shape = [e.slots, e.capacity, kv];
                let caches =
                    ["k", "v"].map(|what| self.g.state(Kind::Cache, &layer(i, what), shape, self.dtype));
                let [k, v] = self.g.cache_append(caches, qkv, slots, positions, q);
                self.g.attention_cached(qkv, k, v, slots, row_start, row_end, heads)
            }
        };
        self.g.reshape(o, [n, heads.heads * heads.width])
    }

    /// The feed-forward network up to what its last product reads: `[N, C]` to `[N, F]`.
    fn gated(&mut self, i: usize, x: Tensor) -> Factor {
        let h = self.norm(x, &layer(i, "post_attention_layernorm.weight"));
        let w = self.weight(&layer(i, "mlp.gate_up.weight"));
        if self.recompute == Recompute::Cheap {
            // An op of its own can be computed again without the product.
            let gate_up = self.g.linear(h, w, Epilogue::default());
            return self.cheap(|b| b.g.gated(gate_up));
        }
        self.g.gated_linear(h, w)
    }

    /// Mean cross entropy of the positions that carry one.
    fn text_loss(&mut self, h: Tensor, text_rows: usize) -> Tensor {
        let rows = self.g.input("text_rows", [text_rows], DType::I32);
        let targets = self.g.input("targets", [text_rows], DType::I32);
        let count = self.g.input("text_count", [1], self.dtype.accumulator());
        let h = self.cheap(|b| b.g.gather_rows(h, rows));
        let head = self.head();
        self.g.cross_entropy(h, head, targets, count)
    }

    /// Inputs of a training batch's images, noised and cut into patches.
    fn noised_images(&mut self, capacity: Capacity, noise: NoiseSource) -> Images {
        let images = capacity.images;
        let Some(image) = self.config.image().cloned() else { unreachable!("asked for with images only") };
        let shape = [images, image.size, image.size, image.channels];
        let float = self.dtype.accumulator();
        let clean = self.g.input("images", shape, float);
        let coefficients = self.g.input("coefficients", [images, 4], float);
        let noise = match noise {
            NoiseSource::Given => Noise::Given(self.g.input("noise", shape, float)),
            NoiseSource::Counter => Noise::Counter {
                seed: self.g.input("seed", [2], DType::I32),
                keys: self.g.input("noise_keys", [images, 3], DType::I32),
            },
        };
        let [noised, target] = self.g.q_sample(clean, coefficients, noise, self.dtype);
        Images {
            patches: self.g.patchify(noised, image.patch_size),
            target,
            times: self.g.input("times", [images], float),
            rows: self.g.input("image_rows", [images * image.patches()], DType::I32),
        }
    }

    /// Patch vectors `[I P, Z]` plus the embedding of their images' noise levels, through the input
    /// projection: `[I P, C]`.
    fn patch_embedding(&mut self, patches: Tensor, times: Tensor, images: usize) -> Tensor {
        let c = self.config;
        let Some(image) = c.image() else { return Tensor::VOID };
        let time = self.g.time_embedding(times, TIME_WIDTH, self.dtype);
        let time = self.projection("time_in", time, Activation::Silu);
        let time = self.projection("time_out", time, Activation::None);
        debug_assert_eq!(self.g.spec(time).shape.rows(), images);
        let x = self.g.add_scaled(patches, time, 1.0, Repeat::Each(image.patches()));
        let x = self.projection("patch_in", x, Activation::None);
        match image.positions {
            PatchPositions::None => x,
            PatchPositions::Sine2d => {
                let sines = self.g.sine_positions(image.grid(), c.hidden_size, self.dtype);
                self.g.add_scaled(x, sines, 1.0, Repeat::Tile)
            }
        }
    }

    fn projection(&mut self, name: &str, x: Tensor, activation: Activation) -> Tensor {
        let w = self.weight(&format!("transfusion.{name}.weight"));
        let bias = Some(self.weight(&format!("transfusion.{name}.bias")));
        self.g.linear(x, w, Epilogue { bias, activation, ..Default::default() })
    }

    /// From rows `[I P, C]` of patches to predictions `[I, S, S, channels]`.
    fn patch_prediction(&mut self, h: Tensor, images: usize) -> Tensor {
        let Some(image) = self.config.image() else { return Tensor::VOID };
        let patches = self.projection("patch_out", h, Activation::None);
        self.g.unpatchify(patches, images, image.size, image.channels, image.patch_size)
    }

    /// Mean over the step's images of the mean squared error per element, and each image's.
    fn image_loss(&mut self, h: Tensor, batch: &Images, images: usize) -> [Tensor; 2] {
        let h = self.cheap(|b| b.g.gather_rows(h, batch.rows));
        let prediction = self.patch_prediction(h, images);
        self.show("prediction", prediction);
        let float = self.dtype.accumulator();
        let weights = self.g.input("image_weights", [images], float);
        let count = self.g.input("image_count", [1], float);
        let (loss, each) = self.g.mse(prediction, batch.target, weights, count);
        [loss, each]
    }
}
