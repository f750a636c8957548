//! What the integration tests share: a device with programs on it, a small model with every feature,
//! documents to pack, and ways to compare.
pub mod fake_cuda;
pub mod judge;
pub mod rungs;

use serde_json::Map;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};
use transfusion::{
    batch::{Batch, PackOptions, Packer},
    config::{Extension, ImageConfig, MatmulPrecision, ModelConfig, Objective, PatchPositions},
    data::{Document, Documents, Part, Shared},
    diffusion, model,
    model::Capacity,
    picture::Picture,
    run,
};
use transfusion_core::{
    checkpoint::weights::Weights,
    device::{CpuDevice, CpuOptions, Device, Place, PlanId},
    graph::Graph,
    op::Kind,
    plan::Plan,
    random::{Purpose, Stream},
    tensor::Host,
};

/// A CPU device that poisons what nothing wrote, and the programs open on it.
pub struct Machine {
    device: CpuDevice,
}

/// A program that is open on a [`Machine`].
#[derive(Clone)]
pub struct Program {
    id: PlanId,
    plan: Arc<Plan>,
}

impl Machine {
    /// A device with two threads.
    pub fn new() -> Machine {
        Machine { device: CpuDevice::new(CpuOptions { threads: 2, poison: true }).unwrap() }
    }

    /// Opens a program.
    pub fn open(&mut self, g: &Graph) -> Program {
        let plan = Arc::new(Plan::new(g).unwrap());
        Program { id: self.device.open(plan.clone()).unwrap(), plan }
    }

    /// Writes an input, converted to its type.
    pub fn set<X: Into<f64>>(&mut self, p: &Program, name: &str, values: impl IntoIterator<Item = X>) {
        let slot = p.plan.input(name).unwrap_or_else(|| panic!("no input {name}"));
        let host = Host::from_f64(slot.spec.dtype, values.into_iter().map(Into::into));
        self.device.write(Place::Input(p.id, name), host.view()).unwrap();
    }

    /// Writes a state of a program, converted to its type.
    pub fn put<X: Into<f64>>(
        &mut self,
        p: &Program,
        kind: Kind,
        name: &str,
        values: impl IntoIterator<Item = X>,
    ) {
        let state = p.plan.states.iter().find(|s| s.kind == kind && s.name == name);
        let dtype = state.unwrap_or_else(|| panic!("no state {name}")).spec.dtype;
        let host = Host::from_f64(dtype, values.into_iter().map(Into::into));
        self.device.write(Place::State(kind, name), host.view()).unwrap();
    }

    /// Reads a state.
    pub fn state(&mut self, kind: Kind, name: &str) -> Vec<f64> {
        self.device.fetch(Place::State(kind, name)).unwrap().to_f64()
    }

    /// Runs a program.
    pub fn run(&mut self, p: &Program) {
        self.device.run(p.id).unwrap();
    }

    /// Reads an output of the program that ran last.
    pub fn output(&mut self, p: &Program, name: &str) -> Vec<f64> {
        self.device.fetch(Place::Output(p.id, name)).unwrap().to_f64()
    }

    /// Writes a batch to a loss program, whose losses are averaged over the batch's own counts.
    pub fn feed(&mut self, p: &Program, b: &Batch) {
        self.feed_counting(p, b, [b.text_count, b.image_count]);
    }

    /// Writes a batch to a loss program, whose losses are averaged over so many targets and images.
    pub fn feed_counting(&mut self, p: &Program, b: &Batch, [text, images]: [usize; 2]) {
        for (name, values) in [
            ("tokens", &b.tokens),
            ("positions", &b.positions),
            ("row_start", &b.row_start),
            ("row_end", &b.row_end),
            ("text_rows", &b.text_rows),
            ("targets", &b.targets),
            ("image_rows", &b.image_rows),
        ] {
            self.set(p, name, values.iter().copied());
        }
        for (name, values) in [
            ("images", &b.images),
            ("times", &b.times),
            ("coefficients", &b.coefficients),
            ("image_weights", &b.image_weights),
        ] {
            self.set(p, name, values.iter().copied());
        }
        self.set(p, "text_count", [text as f64]);
        self.set(p, "image_count", [images as f64]);
        if p.plan.input("noise_keys").is_some() {
            self.set(p, "noise_keys", b.noise_keys.iter().copied());
            self.set(p, "seed", [5, 0]);
        }
    }

    /// Writes every weight that [`random_weights`] makes.
    pub fn put_weights(&mut self, p: &Program, weights: &[(String, Vec<f32>)]) {
        for (name, values) in weights {
            self.put(p, Kind::Param, name, values.iter().copied());
        }
    }
}

impl Default for Machine {
    fn default() -> Machine {
        Machine::new()
    }
}

/// A small model with everything that a model may have: grouped queries, QK-norm, 2-D sine positions,
/// patches that are padded, its own output projection.
pub fn mixed() -> ModelConfig {
    ModelConfig {
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: Some(2),
        head_dim: Some(8),
        vocab_size: 264,
        max_position_embeddings: 128,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        bos_token_id: Some(256),
        eos_token_id: Some(257),
        torch_dtype: "float32".into(),
        transfusion: Some(Extension {
            boi_token_id: 258,
            eoi_token_id: 259,
            pad_token_id: 260,
            qk_norm: true,
            matmul_precision: MatmulPrecision::default(),
            image: Some(ImageConfig {
                size: 8,
                channels: 3,
                patch_size: 2,
                positions: PatchPositions::Sine2d,
                objective: Objective::V,
                lambda: 5.0,
            }),
        }),
        other: Map::new(),
    }
}

/// Weights large enough that attention is far from uniform and no gradient is small by accident.
pub fn random_weights(c: &ModelConfig, seed: u64) -> Vec<(String, Vec<f32>)> {
    let values = |(i, w): (usize, &model::Weight)| {
        let mut z = vec![0.0; w.elements()];
        Stream::new(seed, Purpose::Test, i as u64).fill_normal(0, &mut z);
        let scale = match *w.shape {
            [_, columns] if !w.name.contains("embed") => 1.0 / (columns as f32).sqrt(),
            [_, _] => 0.4,
            _ => 0.1,
        };
        let centre = if w.name.contains("norm") { 1.0 } else { 0.0 };
        z.iter_mut().for_each(|z| *z = centre + scale * *z);
        (w.name.clone(), z)
    };
    model::weights(c).iter().enumerate().map(values).collect()
}

/// A picture of random pixels.
pub fn picture(side: usize, seed: u64) -> Arc<Picture> {
    let s = Stream::new(seed, Purpose::Test, 77);
    let rgb = (0..3 * side * side).map(|i| s.below(i as u32, 256) as u8).collect();
    Arc::new(Picture::new(side, side, rgb).unwrap())
}

/// A document of text and random pictures, as in `["a cat ", "#", " sits"]`, where `#` is a picture.
pub fn document(parts: &[&str], seed: u64) -> Document {
    let part = |(i, p): (usize, &&str)| match *p {
        "#" => Part::Image(picture(8, 100 * seed + i as u64)),
        text => Part::Text(text.as_bytes().to_vec()),
    };
    Document { parts: parts.iter().enumerate().map(part).collect(), stream: false }
}

/// The documents of the proofs, of every kind: caption first, picture first, text alone, interleaved;
/// they fill two rows of 96 positions.
pub fn documents() -> Vec<Document> {
    vec![
        document(&["a cat", "#"], 1),
        document(&["#", "it runs"], 2),
        document(&["only words"], 3),
        document(&["one", "#", "two", "#", "three"], 4),
        document(&["so"], 5),
        document(&["#", "blue"], 6),
    ]
}

/// Packs documents, each in the order given, with every condition kept.
pub fn pack(c: &ModelConfig, capacity: Capacity, documents: Vec<Document>) -> Batch {
    let count = documents.len() as u64;
    let source: Shared = Arc::new(Documents::new(documents, "the proofs"));
    let options = PackOptions {
        order: transfusion::batch::PairOrder::AsGiven,
        condition_drop: 0.0,
        shuffle: false,
        ..PackOptions::default()
    };
    let geometry = run::geometry(c, capacity);
    let mut packer = Packer::new(source, c.tokens(), geometry, options, 11).unwrap().until(count);
    let mut batch = Batch::new(geometry);
    let objective = c.image().unwrap().objective;
    packer.fill(&mut batch, &|t| diffusion::coefficients(objective, t));
    assert_eq!((batch.documents as u64, batch.cut), (count, 0), "the documents do not fit");
    batch
}

/// Row `row` of a batch whose rows hold one document each.
pub fn one_row(config: &ModelConfig, from: &Batch, capacity: Capacity, row: usize) -> Batch {
    let mut one = Batch::new(run::geometry(config, capacity));
    let (t, p, numel) = (capacity.positions, from.geometry.patches(), from.geometry.values());
    let of = |all: &[i32], n: usize| all[row * n..(row + 1) * n].to_vec();
    let shifted = |x: i32| if x < 0 { x } else { x - (row * t) as i32 };
    one.tokens = of(&from.tokens, t);
    one.positions = of(&from.positions, t);
    one.row_start = of(&from.row_start, t);
    one.row_end = of(&from.row_end, t);
    let here = |x: i32| x >= (row * t) as i32 && x < ((row + 1) * t) as i32;
    let targets = from.text_rows.iter().zip(&from.targets).filter(|(r, _)| here(**r));
    for (i, (r, target)) in targets.enumerate() {
        (one.text_rows[i], one.targets[i]) = (shifted(*r), *target);
        one.text_count += 1;
    }
    one.images = from.images[row * numel..(row + 1) * numel].to_vec();
    one.image_rows = of(&from.image_rows, p).into_iter().map(shifted).collect();
    one.times = vec![from.times[row]];
    one.coefficients = from.coefficients[4 * row..4 * row + 4].to_vec();
    one.noise_keys = of(&from.noise_keys, 3);
    (one.image_weights, one.image_count) = (vec![1.0], 1);
    one
}

/// The norm of the difference over the norm of what is wanted.
pub fn relative(have: &[f64], want: &[f64]) -> f64 {
    assert_eq!(have.len(), want.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut have.iter().zip(want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied()).max(1e-30)
}

/// The largest difference.
pub fn furthest(have: &[f64], want: &[f64]) -> f64 {
    assert_eq!(have.len(), want.len());
    have.iter()
        .zip(want)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |m, x| if x > m || x.is_nan() { x } else { m })
}

/// The bits of numbers, so that equal means equal.
pub fn bits(values: &[f64]) -> Vec<u64> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The path of a file that a reference in Python left.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// The tensor of a safetensors file.
pub fn tensor(file: &Weights, name: &str) -> Vec<f64> {
    file.read(name).unwrap().to_f64()
}

/// Every float of a checkpoint's file by tensor name, as bits.
pub fn file_bits(path: &Path) -> Vec<(String, Vec<u64>)> {
    let file = Weights::open(path).unwrap();
    file.names().map(|n| (n.to_string(), bits(&tensor(&file, n)))).collect()
}

/// What `linear` makes of one row: logits from a hidden row and the output projection.
pub fn project(row: &[f64], matrix: &[f64]) -> Vec<f64> {
    matrix.chunks(row.len()).map(|w| w.iter().zip(row).map(|(a, b)| a * b).sum()).collect()
}

/// A folder that goes away with the test.
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// An empty folder.
    pub fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("transfusion-proof-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
