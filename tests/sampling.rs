//! The cache against passes over the whole sequence.
use transfusion::{
    batch::Batch,
    config::ModelConfig,
    data::Part,
    diffusion::{Sampler, evaluations},
    engine::{Engine, cpu},
    model::{self, Capacity, Extend, ImagePass, LossOptions, NoiseSource},
    run,
    sample::{Cancel, Goal, SampleOptions, sample},
};
use transfusion_core::op::Kind;
use transfusion_tests::{
    Machine, Program, bits, furthest, mixed, picture, project, random_weights, relative,
};

const T: usize = 96;
const SLOTS: usize = 2;

/// What a sequence is made of.
#[derive(Clone)]
enum Item {
    Token(i32),
    /// An image as the model sees it, and its noise level.
    Image(Vec<f64>, f32),
}

fn tokens(text: &str) -> Vec<Item> {
    text.bytes().map(|b| Item::Token(i32::from(b))).collect()
}

/// What the whole sequence in one packed pass shows.
struct Packed {
    hidden: Vec<Vec<f64>>,
    predictions: Vec<Vec<f64>>,
    /// Of every layer: rows of queries, keys and values.
    qkv: Vec<Vec<Vec<f64>>>,
}

/// A model on one machine: packed programs, and programs over a cache.
struct Both {
    machine: Machine,
    config: ModelConfig,
    packed: Program,
}

impl Both {
    fn new() -> Both {
        let config = mixed();
        let mut machine = Machine::new();
        let capacity = Capacity { rows: 1, positions: T, text_rows: 2, images: 3 };
        let options = LossOptions { noise: NoiseSource::Given, inspect: true, ..LossOptions::EVAL };
        let packed = machine.open(&model::loss_graph(&config, capacity, options).unwrap());
        machine.put_weights(&packed, &random_weights(&config, 8));
        Both { machine, config, packed }
    }

    fn patches(&self) -> usize {
        self.config.image().unwrap().patches()
    }

    fn packed(&mut self, items: &[Item]) -> Packed {
        let capacity = Capacity { rows: 1, positions: T, text_rows: 2, images: 3 };
        let mut b = Batch::new(run::geometry(&self.config, capacity));
        let (p, numel) = (self.patches(), b.geometry.values());
        let mut at = 0;
        for item in items {
            let span = if let Item::Token(_) = item { 1 } else { p };
            for i in at..at + span {
                (b.positions[i], b.row_end[i]) = (i as i32, (at + span) as i32);
            }
            match item {
                Item::Token(t) => b.tokens[at] = *t,
                Item::Image(pixels, t) => {
                    let n = b.image_count;
                    b.images[n * numel..][..numel].iter_mut().zip(pixels).for_each(|(to, x)| *to = *x as f32);
                    b.image_rows[n * p..][..p].copy_from_slice(&b.positions[at..at + p]);
                    (b.times[n], b.image_weights[n], b.coefficients[4 * n]) = (*t, 1.0, 1.0);
                    b.image_count += 1;
                }
            }
            at += span;
        }
        let images = b.image_count;
        let noise = vec![0.0; b.images.len()];
        self.machine.feed(&self.packed, &b);
        self.machine.set(&self.packed, "noise", noise);
        self.machine.run(&self.packed);
        let mut rows = |name: &str| -> Vec<Vec<f64>> {
            let all = self.machine.output(&self.packed, name);
            all.chunks(all.len() / T).take(at).map(<[f64]>::to_vec).collect()
        };
        let hidden = rows("hidden");
        let qkv = (0..self.config.num_hidden_layers).map(|i| rows(&format!("qkv.{i}"))).collect();
        let prediction = self.machine.output(&self.packed, "prediction");
        Packed {
            hidden,
            qkv,
            predictions: prediction.chunks(numel).take(images).map(<[f64]>::to_vec).collect(),
        }
    }

    /// Logits of the last position of a packed pass.
    fn packed_logits(&mut self, items: &[Item]) -> Vec<f64> {
        let hidden = self.packed(items).hidden;
        project(hidden.last().unwrap(), &self.machine.state(Kind::Param, "lm_head.weight"))
    }

    fn extend(&self, rows: usize, positions: usize) -> Extend {
        Extend { rows, positions, slots: SLOTS, capacity: T, ema: false }
    }

    /// Appends tokens to a slot; logits after the last.
    fn append(&mut self, slot: usize, at: usize, ids: &[i32]) -> Vec<f64> {
        let program = self.machine.open(&model::text_graph(&self.config, self.extend(1, ids.len())));
        let places = at as i32..(at + ids.len()) as i32;
        self.machine.set(&program, "tokens", ids.iter().copied());
        self.machine.set(&program, "positions", places.clone());
        self.machine.set(&program, "row_end", places.map(|i| i + 1));
        self.machine.set(&program, "slots", [slot as i32]);
        self.machine.set(&program, "last", [ids.len() as i32 - 1]);
        self.machine.run(&program);
        self.machine.output(&program, "logits")
    }

    /// An image program with one image, in slots and places.
    fn image_program(&mut self, pass: ImagePass, rows: &[(usize, usize)]) -> Program {
        let p = self.patches();
        let program = self.machine.open(&model::image_graph(&self.config, self.extend(rows.len(), p), pass));
        let each = |f: &dyn Fn(usize, usize) -> usize| -> Vec<i32> {
            rows.iter()
                .flat_map(|&(_, at)| (0..p).map(move |j| (at, j)))
                .map(|(at, j)| f(at, j) as i32)
                .collect()
        };
        self.machine.set(&program, "positions", each(&|at, j| at + j));
        self.machine.set(&program, "row_end", each(&|at, _| at + p));
        self.machine.set(&program, "copies", each(&|_, j| j));
        self.machine.set(&program, "slots", rows.iter().map(|r| r.0 as i32));
        program
    }

    /// Leaves a clean image in the cache.
    fn commit(&mut self, slot: usize, at: usize, pixels: &[f64]) {
        let program = self.image_program(ImagePass::Commit, &[(slot, at)]);
        self.machine.put(&program, Kind::Cache, "picture.1", pixels.iter().copied());
        self.machine.set(&program, "times", [0.0]);
        self.machine.run(&program);
    }

    /// The first `n` positions of a slot: keys, then values, of every layer.
    fn cache(&mut self, slot: usize, n: usize) -> Vec<Vec<f64>> {
        let heads = self.config.heads();
        let width = heads.kv_heads * heads.width;
        let mut all = Vec::new();
        for i in 0..self.config.num_hidden_layers {
            for what in ["k", "v"] {
                let state = self.machine.state(Kind::Cache, &model::layer(i, what));
                all.push(state[slot * T * width..][..n * width].to_vec());
            }
        }
        all
    }

    /// What [`Both::cache`] should hold, from a packed pass.
    fn cache_of(&self, packed: &Packed) -> Vec<Vec<f64>> {
        let heads = self.config.heads();
        let (q, kv) = (heads.heads * heads.width, heads.kv_heads * heads.width);
        let part =
            |rows: &Vec<Vec<f64>>, at: usize| rows.iter().flat_map(|r| r[at..at + kv].to_vec()).collect();
        packed.qkv.iter().flat_map(|rows| [part(rows, q), part(rows, q + kv)]).collect()
    }
}

fn unit(side: usize, seed: u64) -> Vec<f64> {
    let mut values = vec![0.0; 3 * side * side];
    picture(side, seed).to_unit(&mut values);
    values.into_iter().map(f64::from).collect()
}

fn argmax(logits: &[f64], allowed: impl Fn(usize) -> bool) -> usize {
    (0..logits.len()).filter(|&i| allowed(i)).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap()
}

#[test]
fn greedy_text_is_the_same_with_and_without_the_cache() {
    let mut both = Both::new();
    let t = both.config.tokens();
    let side = both.config.image().unwrap().size;
    let image = unit(side, 1);
    let mut items = [vec![Item::Token(t.bos)], tokens("a cat "), vec![Item::Token(t.boi)]].concat();
    let text: Vec<i32> =
        items.iter().filter_map(|i| if let Item::Token(t) = i { Some(*t) } else { None }).collect();
    both.append(0, 0, &text);
    both.commit(0, text.len(), &image);
    let mut at = text.len() + both.patches();
    items.extend([Item::Image(image, 0.0), Item::Token(t.eoi)]);
    let mut cached = both.append(0, at, &[t.eoi]);
    at += 1;
    let allowed = |id: usize| id < 256 || id == t.eos as usize;
    let (mut worst, mut chosen): (f64, Vec<u8>) = (0.0, vec![]);
    loop {
        let whole = both.packed_logits(&items);
        let apart = furthest(&cached, &whole);
        assert!(apart <= 1e-4, "after {at} positions: {apart:.2e}");
        worst = worst.max(apart);
        let next = argmax(&whole, allowed);
        assert_eq!(next, argmax(&cached, allowed), "after {at} positions");
        if next == t.eos as usize || chosen.len() == 40 {
            break;
        }
        chosen.push(next as u8);
        items.push(Item::Token(next as i32));
        cached = both.append(0, at, &[next as i32]);
        at += 1;
    }
    println!("greedy text: {} tokens, logits at most {worst:.2e} apart", chosen.len());
    assert!(chosen.len() > 10);
}

/// The sampler itself, over many pictures: the clean pass must be at noise level 0, and every token
/// must see what a packed pass shows it.
#[test]
fn the_sampler_chooses_what_packed_passes_choose() {
    const TOKENS: usize = 10;
    let mut both = Both::new();
    let (t, side) = (both.config.tokens(), both.config.image().unwrap().size);
    let prompts: Vec<Vec<Part>> =
        (0..12).map(|n| vec![Part::Text(b"a cat ".to_vec()), Part::Image(picture(side, n))]).collect();
    let options =
        SampleOptions { goal: Goal::Text, temperature: 0.0, max_text: TOKENS, ..SampleOptions::default() };
    let mut engine = engine(&both.config, 8);
    let drawn = sample(&mut engine, &prompts, &options, &mut |_| (), Cancel(None)).unwrap();
    for (n, drawn) in drawn.iter().enumerate() {
        let mut items = [vec![Item::Token(t.bos)], tokens("a cat "), vec![Item::Token(t.boi)]].concat();
        items.extend([Item::Image(unit(side, n as u64), 0.0), Item::Token(t.eoi)]);
        let mut want = vec![];
        while want.len() < TOKENS {
            let next = argmax(&both.packed_logits(&items), |id| id < 256 || id == t.eos as usize);
            if next == t.eos as usize {
                break;
            }
            want.push(next as u8);
            items.push(Item::Token(next as i32));
        }
        let want: Vec<Part> = (!want.is_empty()).then_some(Part::Text(want)).into_iter().collect();
        assert_eq!(*drawn, want, "picture {n}");
    }
}

fn engine(config: &ModelConfig, seed: u64) -> Engine {
    let mut engine = Engine::new(config.clone(), cpu(2).unwrap()).unwrap();
    for (name, values) in random_weights(config, seed) {
        engine.write_weight(Kind::Param, &name, &values).unwrap();
    }
    engine
}

#[test]
fn denoising_over_the_cache_agrees_with_packed_passes_and_leaves_the_clean_image() {
    let mut both = Both::new();
    let t = both.config.tokens();
    let image = both.config.image().unwrap().clone();
    let caption: Vec<i32> = [vec![t.bos], b"a dog".map(i32::from).to_vec(), vec![t.boi]].concat();
    let none = [t.bos, t.boi];
    both.append(0, 0, &caption);
    both.append(1, 0, &none);
    let rows = [(0, caption.len()), (1, none.len())];
    let program = both.image_program(ImagePass::Denoise { guided: true }, &rows);
    both.machine.put(&program, Kind::Cache, "picture.1", unit(image.size, 5).iter().map(|x| 1.5 * x));
    both.machine.set(&program, "seed", [1, 0]);
    let as_items = |ids: &[i32]| ids.iter().map(|&id| Item::Token(id)).collect::<Vec<_>>();
    let mut worst: f64 = 0.0;
    let steps = evaluations(Sampler::Ddpm, image.objective, 7, 3.0, 1.0, 1000.0);
    for (n, step) in steps.iter().enumerate() {
        let noisy = both.machine.state(Kind::Cache, "picture.1");
        let wanted: Vec<Vec<f64>> = [&caption[..], &none]
            .iter()
            .map(|ids| [as_items(ids), vec![Item::Image(noisy.clone(), step.t)]].concat())
            .map(|items| both.packed(&items).predictions.remove(0))
            .collect();
        both.machine.set(&program, "times", [step.t; 2]);
        both.machine.set(&program, "steps", step.step.row());
        both.machine.set(&program, "keys", [0, 0, n as i32]);
        both.machine.run(&program);
        let apart = furthest(&both.machine.output(&program, "prediction"), &wanted.concat());
        assert!(apart <= 1e-5, "step {n}: {apart:.2e}");
        worst = worst.max(apart);
    }
    println!("denoising: {} steps, predictions at most {worst:.2e} apart", steps.len());
    // What the clean pass leaves is what a packed pass over the clean image computes ...
    let clean = both.machine.state(Kind::Cache, "picture.1");
    let positions = caption.len() + both.patches();
    both.commit(0, caption.len(), &clean);
    let left = both.cache(0, positions);
    let packed = both.packed(&[as_items(&caption), vec![Item::Image(clean.clone(), 0.0)]].concat());
    let wanted = both.cache_of(&packed);
    let apart = relative(&left.concat(), &wanted.concat());
    println!("committed keys and values: {apart:.2e} relative from a packed pass");
    assert!(apart <= 1e-6, "{apart:.2e}");
    // ... and, to the bit, what it leaves where nothing was ever denoised.
    let mut fresh = Both::new();
    fresh.append(0, 0, &caption);
    fresh.commit(0, caption.len(), &clean);
    let fresh = fresh.cache(0, positions);
    assert!(left.iter().zip(&fresh).all(|(a, b)| bits(a) == bits(b)));
}

#[test]
fn what_is_sampled_does_not_depend_on_company() {
    let mut engine = engine(&mixed(), 8);
    let text = |s: &str| vec![Part::Text(s.as_bytes().to_vec())];
    let company = vec![
        text("a red cat"),
        vec![Part::Image(picture(8, 3)), Part::Text(b"and then more of it".to_vec())],
        vec![],
    ];
    let (any, image, text_alone) = (Goal::Any, Goal::Image, Goal::Text);
    for (goal, sampler) in
        [(any, Sampler::Ddpm), (image, Sampler::Ddpm), (image, Sampler::Ddim), (text_alone, Sampler::Ddim)]
    {
        for guidance in [1.0, 3.0] {
            let options = SampleOptions {
                goal,
                guidance,
                steps: 5,
                sampler,
                max_text: 24,
                max_images: 2,
                seed: 9,
                ..SampleOptions::default()
            };
            let mut draw = |prompts: &[Vec<Part>]| {
                sample(&mut engine, prompts, &options, &mut |_| (), Cancel(None)).unwrap()
            };
            let together = draw(&company);
            assert_eq!(draw(&company), together, "{goal:?} {guidance}");
            assert_eq!(draw(&company[..1])[0], together[0], "{goal:?} {guidance}");
            // The third is drawn beside others, at other times.
            let others = [text("quite other words, and more of them"), text("x"), company[2].clone()];
            assert_eq!(draw(&others)[2], together[2], "{goal:?} {guidance}");
            assert_ne!(together[0], draw(&vec![company[0].clone(); 2])[1], "sequences share random numbers");
        }
    }
}
