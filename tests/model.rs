//! The whole model: gradients against differences, and what a position must not see.
use std::collections::BTreeMap;
use transfusion::{
    batch::Batch,
    model::{self, Capacity, LossOptions, NoiseSource},
};
use transfusion_core::{
    op::Kind,
    random::{Purpose, Stream},
    tensor::DType,
};
use transfusion_tests::{
    Machine, Program, bits, document, documents, mixed, one_row, pack, random_weights, relative,
};

const CAPACITY: Capacity = Capacity { rows: 2, positions: 96, text_rows: 80, images: 7 };

fn wide(backward: bool) -> LossOptions {
    LossOptions { backward, dtype: Some(DType::F64), ..LossOptions::TRAIN }
}

#[test]
fn the_gradient_agrees_with_differences_along_twenty_directions() {
    let config = mixed();
    let batch = pack(&config, CAPACITY, documents());
    let weights = random_weights(&config, 1);
    let mut machine = Machine::new();
    let whole = machine.open(&model::loss_graph(&config, CAPACITY, wide(true)).unwrap());
    let loss = machine.open(&model::loss_graph(&config, CAPACITY, wide(false)).unwrap());
    machine.put_weights(&whole, &weights);
    machine.feed(&whole, &batch);
    machine.feed(&loss, &batch);
    machine.run(&whole);
    let gradients: BTreeMap<&str, Vec<f64>> =
        weights.iter().map(|(name, _)| (name.as_str(), machine.state(Kind::Grad, name))).collect();
    for (name, gradient) in &gradients {
        assert!(gradient.iter().any(|x| *x != 0.0) && gradient.iter().all(|x| x.is_finite()), "{name}");
    }
    let mut worst: f64 = 0.0;
    for direction in 0..20 {
        let along: Vec<Vec<f32>> = (0..weights.len() as u64)
            .map(|i| {
                let mut z = vec![0.0; weights[i as usize].1.len()];
                Stream::new(direction + 1, Purpose::Test, 1000 + i).fill_normal(0, &mut z);
                z
            })
            .collect();
        let mut at = |h: f64| {
            for ((name, values), along) in weights.iter().zip(&along) {
                let moved = values.iter().zip(along).map(|(w, d)| f64::from(*w) + h * f64::from(*d));
                machine.put(&loss, Kind::Param, name, moved);
            }
            machine.run(&loss);
            machine.output(&loss, "loss")[0]
        };
        // Richardson's extrapolation of two central differences.
        let h = 2e-5;
        let (far, near) = ((at(h) - at(-h)) / (2.0 * h), (at(h / 2.0) - at(-h / 2.0)) / h);
        let numeric = (4.0 * near - far) / 3.0;
        let products = weights.iter().zip(&along).flat_map(|((name, _), along)| {
            gradients[name.as_str()].iter().zip(along).map(|(g, d)| g * f64::from(*d))
        });
        let analytic: f64 = products.sum();
        let error = (numeric - analytic).abs() / analytic.abs();
        assert!(error <= 1e-6, "direction {direction}: {numeric} {analytic}");
        worst = worst.max(error);
    }
    println!("the loss along twenty directions: at most {worst:.2e} relative");
}

#[test]
fn four_micro_batches_of_one_row_equal_one_batch_of_four() {
    let config = mixed();
    let documents: Vec<_> = (0..4).map(|i| document(&["seen alone", "#", "or together"], 10 + i)).collect();
    let small = Capacity { rows: 1, positions: 48, text_rows: 40, images: 1 };
    let large = Capacity { rows: 4, text_rows: 160, images: 4, ..small };
    let together = pack(&config, large, documents.clone());
    let counts = [together.text_count, together.image_count];
    let weights = random_weights(&config, 2);
    let gradients = |capacity: Capacity, batches: &[Batch]| {
        let mut machine = Machine::new();
        let programs = [true, false].map(|begins| {
            let options = LossOptions { begins, ..LossOptions::TRAIN };
            machine.open(&model::loss_graph(&config, capacity, options).unwrap())
        });
        machine.put_weights(&programs[0], &weights);
        let mut loss = 0.0;
        for (i, batch) in batches.iter().enumerate() {
            let program = &programs[i.min(1)];
            machine.feed_counting(program, batch, counts);
            machine.run(program);
            loss += machine.output(program, "loss")[0];
        }
        (loss, weights.iter().map(|(name, _)| machine.state(Kind::Grad, name)).collect::<Vec<_>>())
    };
    // Each micro-batch holds the rows of the large one: same documents, same noise levels.
    let apart: Vec<Batch> = (0..4).map(|row| one_row(&config, &together, small, row)).collect();
    let (one, all) = (gradients(large, &[together]), gradients(small, &apart));
    let mut worst = (one.0 - all.0).abs() / one.0.abs();
    assert!(worst <= 1e-6, "loss {} {}", one.0, all.0);
    for ((name, _), (a, b)) in weights.iter().zip(all.1.iter().zip(&one.1)) {
        // Sums of f32 in another order.
        let error = relative(a, b);
        assert!(error <= 2e-6, "{name}: {error:.2e}");
        worst = worst.max(error);
    }
    println!("four micro-batches: at most {worst:.2e} relative from one batch");
}

/// A packed batch on a machine, whose inputs can be poisoned.
struct Watched {
    machine: Machine,
    program: Program,
    batch: Batch,
    width: usize,
    patch: usize,
}

/// What a run showed: rows of hidden states, and predicted pixels of patches, as bits.
struct Seen {
    hidden: Vec<Vec<u64>>,
    /// By row of the batch.
    patches: BTreeMap<usize, Vec<u64>>,
}

impl Watched {
    fn new() -> Watched {
        let config = mixed();
        let batch = pack(&config, CAPACITY, documents());
        let mut machine = Machine::new();
        let options = LossOptions { inspect: true, noise: NoiseSource::Given, ..LossOptions::EVAL };
        let program = machine.open(&model::loss_graph(&config, CAPACITY, options).unwrap());
        machine.put_weights(&program, &random_weights(&config, 4));
        let patch = config.image().unwrap().patch_size;
        Watched { machine, program, batch, width: config.hidden_size, patch }
    }

    /// Runs with the embeddings of `poisoned` rows - token or patch - replaced by `poison`.
    fn see(&mut self, poisoned: &[usize], poison: f32) -> Seen {
        let g = self.batch.geometry;
        let mut tokens = self.batch.tokens.clone();
        let mut images = self.batch.images.clone();
        for &row in poisoned {
            match self.batch.image_rows.iter().position(|&r| r == row as i32) {
                // The last word of the vocabulary, which no document uses, is the poison.
                None => tokens[row] = POISON,
                Some(at) => {
                    for pixel in self.pixels(at) {
                        images[pixel] = poison;
                    }
                }
            }
        }
        self.machine.feed(&self.program, &self.batch);
        self.machine.set(&self.program, "tokens", tokens);
        self.machine.set(&self.program, "images", images);
        self.machine.set(&self.program, "noise", vec![0.25; g.images * g.values()]);
        let embeddings = self.machine.state(Kind::Param, "model.embed_tokens.weight");
        let last = embeddings.len() - self.width;
        let table = embeddings[..last].iter().copied().chain(vec![f64::from(poison); self.width]);
        self.machine.put(&self.program, Kind::Param, "model.embed_tokens.weight", table);
        self.machine.run(&self.program);
        let hidden = bits(&self.machine.output(&self.program, "hidden"));
        let prediction = self.machine.output(&self.program, "prediction");
        let rows = self.batch.image_rows.iter().enumerate().filter(|(_, r)| **r >= 0);
        let patch = |at| bits(&self.pixels(at).iter().map(|&i| prediction[i]).collect::<Vec<_>>());
        Seen {
            hidden: hidden.chunks(self.width).map(<[u64]>::to_vec).collect(),
            patches: rows.map(|(at, &row)| (row as usize, patch(at))).collect(),
        }
    }

    /// Where the pixels of patch `at` of all patches lie.
    fn pixels(&self, at: usize) -> Vec<usize> {
        let g = self.batch.geometry;
        let (across, k) = (g.resolution / self.patch, self.patch);
        let (image, p) = (at / g.patches(), at % g.patches());
        let (y, x) = (p / across * k, p % across * k);
        let pixel = |dy, dx, c| ((image * g.resolution + y + dy) * g.resolution + x + dx) * 3 + c;
        (0..k).flat_map(|dy| (0..k).flat_map(move |dx| (0..3).map(move |c| pixel(dy, dx, c)))).collect()
    }

    /// Whether a row holds part of a document.
    fn used(&self, row: usize) -> bool {
        self.batch.row_start[row] < self.batch.row_end[row]
    }

    /// Whether row `i` sees row `j`, from what the documents are: the same document, and either `j`
    /// is no later, or both are patches of one picture.
    fn may_see(&self, i: usize, j: usize) -> bool {
        let t = self.batch.geometry.positions;
        let p = self.batch.geometry.patches();
        let picture =
            |row: usize| self.batch.image_rows.iter().position(|&r| r == row as i32).map(|at| at / p);
        let document = |row: usize| self.used(row).then(|| row - self.batch.positions[row] as usize);
        i / t == j / t
            && document(i).is_some()
            && document(i) == document(j)
            && (j <= i || (picture(i).is_some() && picture(i) == picture(j)))
    }
}

const POISON: i32 = 263;

#[test]
fn what_a_position_must_not_see_changes_none_of_its_bits() {
    let mut watched = Watched::new();
    let clean = watched.see(&[], 0.0);
    let rows = clean.hidden.len();
    let used: Vec<usize> = (0..rows).filter(|&r| watched.used(r)).collect();
    let mut pairs = 0;
    for i in used {
        let hidden: Vec<usize> = (0..rows).filter(|&j| !watched.may_see(i, j)).collect();
        pairs += hidden.len();
        for poison in [f32::NAN, 1e30] {
            let seen = watched.see(&hidden, poison);
            assert_eq!(seen.hidden[i], clean.hidden[i], "row {i} with {poison}");
            assert_eq!(seen.patches.get(&i), clean.patches.get(&i), "row {i} with {poison}");
        }
    }
    println!("no leak: {pairs} pairs of positions, NaN and 1e30");
    assert!(pairs > 3000);
}

#[test]
fn what_a_position_may_see_reaches_it() {
    let mut watched = Watched::new();
    let clean = watched.see(&[], 0.0);
    let rows = clean.hidden.len();
    let p = watched.batch.geometry.patches();
    let mut within = 0;
    for j in 0..rows {
        if !watched.used(j) {
            continue;
        }
        let seen = watched.see(&[j], 0.5);
        for i in 0..rows {
            let changed = seen.hidden[i] != clean.hidden[i];
            assert_eq!(changed, watched.may_see(i, j), "row {j} changed, row {i} looks");
            if let (Some(a), Some(b)) = (seen.patches.get(&i), clean.patches.get(&i)) {
                assert_eq!(a != b, watched.may_see(i, j), "patch {j} changed, patch {i} predicts");
                let patch = |row: usize| watched.batch.image_rows.contains(&(row as i32));
                within += usize::from(patch(j) && watched.may_see(i, j) && i.abs_diff(j) < p);
            }
        }
    }
    println!("inside images: {within} pairs of patches, each sees the other");
}
