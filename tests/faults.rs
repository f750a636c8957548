//! What goes wrong is counted, refused or survived.
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};
use transfusion::{
    Error,
    batch::Batch,
    config::ModelConfig,
    engine::{Engine, cpu},
    model::{self, Capacity, LossOptions},
    run::{DataOptions, OutputOptions, Run, RunConfig},
    sample::Cancel,
    train::{MAX_SKIPPED, TrainOptions, Trainer},
};
use transfusion_core::{
    Error as CoreError,
    device::{CpuDevice, CpuOptions, Device, Place},
    graph::Graph,
    launch::Target,
    op::Kind,
    ops::{Activation, Epilogue, Repeat},
    plan::{Plan, Segment, Slot},
    random::{Purpose, Stream},
    tensor::{DType, Host, Tensor},
};
use transfusion_tests::{Scratch, document, file_bits, mixed, pack};

const CAPACITY: Capacity = Capacity { rows: 1, positions: 48, text_rows: 48, images: 1 };

fn trainer() -> Trainer {
    let engine = Engine::initialised(mixed(), cpu(1).unwrap(), 1).unwrap();
    let (lr, rows) = (1e-3, CAPACITY.rows);
    let options = TrainOptions {
        rows,
        positions: CAPACITY.positions,
        images: CAPACITY.images,
        warmup: 0,
        lr,
        lr_min: lr,
        ema: 0.9,
        ..TrainOptions::default()
    };
    Trainer::new(engine, options).unwrap()
}

fn batch(seed: u64) -> Batch {
    pack(&mixed(), CAPACITY, vec![document(&["a cat", "#", "on a mat"], seed)])
}

/// Every tensor of a trainer - weights, moments, running means - as bits.
fn all_bits(trainer: &mut Trainer, dir: PathBuf) -> Vec<(String, Vec<u64>)> {
    trainer.save(&dir).unwrap();
    let files = ["model.safetensors", "optimizer.safetensors", "ema.safetensors"];
    files.iter().flat_map(|f| file_bits(&dir.join(f))).collect()
}

#[test]
fn a_step_that_is_not_finite_changes_nothing_and_is_counted() {
    let scratch = Scratch::new("skip");
    let (mut hurt, mut well) = (trainer(), trainer());
    for t in [&mut hurt, &mut well] {
        t.step(&[batch(1)]).unwrap();
    }
    let before = all_bits(&mut hurt, scratch.0.join("before"));
    for (n, poison) in [f32::NAN, f32::INFINITY, 1e30].into_iter().enumerate() {
        let mut bad = batch(2);
        bad.images[7] = poison;
        let report = hurt.step(&[bad]).unwrap();
        assert!(report.skipped && !report.grad_norm.is_finite(), "{poison}");
        assert_eq!((hurt.progress().skipped, hurt.progress().skipped_in_a_row), (n as u64 + 1, n as u64 + 1));
        assert!(all_bits(&mut hurt, scratch.0.join(format!("after-{n}"))) == before, "{poison}");
    }
    // Nothing of it stays: the next step is that of a trainer which never saw it.
    for t in [&mut hurt, &mut well] {
        assert!(!t.step(&[batch(3)]).unwrap().skipped);
    }
    assert_eq!((hurt.progress().skipped, hurt.progress().skipped_in_a_row), (3, 0));
    assert_eq!((hurt.progress().step, hurt.progress().updates), (5, 2));
    assert!(all_bits(&mut hurt, scratch.0.join("a")) == all_bits(&mut well, scratch.0.join("b")));
}

fn config(lr: f64) -> RunConfig {
    let train = TrainOptions { steps: 16, rows: 1, positions: 64, warmup: 0, lr, ..TrainOptions::default() };
    let output = OutputOptions {
        log_every: 1,
        validate_every: 0,
        sample_every: 0,
        checkpoint_every: 4,
        keep_checkpoints: 0,
        ..OutputOptions::default()
    };
    let data = DataOptions { paths: vec!["shapes".into()], ..DataOptions::default() };
    RunConfig { model: mixed(), train, data, output }
}

fn create(dir: &Path, lr: f64) -> transfusion::Result<Run> {
    Run::create(config(lr), dir, None, cpu(1).unwrap(), &mut |_| ())
}

fn resume(dir: &Path) -> transfusion::Result<Run> {
    Run::resume(dir, cpu(1).unwrap(), &mut |_| ())
}

fn train(run: &mut Run) -> transfusion::Result<()> {
    run.train(&mut |_| (), Cancel(None))
}

#[test]
fn ten_steps_in_a_row_that_are_not_finite_stop_a_run_which_can_be_resumed() {
    let scratch = Scratch::new("ten");
    let dir = scratch.0.join("run");
    let mut run = create(&dir, 1e30).unwrap();
    let Err(Error::Training(why)) = train(&mut run) else { panic!("a learning rate of 1e30 trained") };
    assert!(why.contains(&format!("{MAX_SKIPPED} steps in a row")) && why.contains("train.lr"), "{why}");
    drop(run);
    let mut run = resume(&dir).unwrap();
    assert!(matches!(train(&mut run), Err(Error::Training(_))));
    let lines = transfusion::metrics::read(&dir.join("metrics.jsonl")).unwrap();
    assert_eq!(lines.iter().filter_map(|r| r.get("skipped")).fold(0.0, f64::max), 9.0);
}

#[test]
fn a_run_directory_is_never_overwritten_and_written_by_one() {
    let scratch = Scratch::new("occupied");
    let dir = scratch.0.join("run");
    let mut run = create(&dir, 1e-3).unwrap();
    let refused = |e: transfusion::Result<Run>, words: &str| {
        let why = e.err().unwrap().to_string();
        assert!(why.contains(words) && why.contains(&*dir.display().to_string()), "{why}");
    };
    refused(create(&dir, 1e-3), "--resume");
    refused(resume(&dir), "is writing to it");
    train(&mut run).unwrap();
    refused(resume(&dir), "is writing to it");
    drop(run);
    let read = || {
        ["config.json", "metrics.jsonl", "checkpoints/step-00000016/model.safetensors"]
            .map(|name| fs::read(dir.join(name)).unwrap())
    };
    let before = read();
    refused(create(&dir, 1e-2), "--resume");
    assert!(read() == before);
    train(&mut resume(&dir).unwrap()).unwrap();
    assert!(read() == before);
}

#[test]
fn a_damaged_checkpoint_falls_back_to_an_older_one() {
    let scratch = Scratch::new("damaged");
    let (whole, dir) = (scratch.0.join("whole"), scratch.0.join("run"));
    for dir in [&whole, &dir] {
        train(&mut create(dir, 1e-3).unwrap()).unwrap();
    }
    let last = |dir: &Path| dir.join("checkpoints/step-00000016");
    let flip = |path: PathBuf| {
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 16;
        fs::write(&path, bytes).unwrap();
    };
    flip(last(&dir).join("optimizer.safetensors"));
    fs::remove_file(dir.join("checkpoints/step-00000012/state.json")).unwrap();
    let mut run = resume(&dir).unwrap();
    train(&mut run).unwrap();
    drop(run);
    for file in ["model.safetensors", "optimizer.safetensors", "state.json"] {
        let [a, b] = [&whole, &dir].map(|d| fs::read(last(d).join(file)).unwrap());
        assert!(a == b, "{file}");
    }
    assert!(last(&dir).with_extension("damaged").is_dir());
    // Nothing whole is left: the error names every one.
    for step in [4, 8, 12, 16] {
        flip(dir.join(format!("checkpoints/step-{step:08}/model.safetensors")));
    }
    let why = resume(&dir).err().unwrap().to_string();
    assert!(why.contains("step-00000004") && why.contains("step-00000016"), "{why}");
}

#[test]
fn plans_refuse_what_has_no_meaning() {
    let mut g = Graph::new();
    let x = g.input("x", [4], DType::F32);
    let s = g.state(Kind::Cache, "s", [4], DType::F32);
    g.add_into(s, x);
    let late = g.add(s, x);
    g.output("late", late);
    match Plan::new(&g) {
        Err(CoreError::Overwritten { reader: "add", by: "add", at }) => {
            assert!(at.file().ends_with("faults.rs"))
        }
        other => panic!("{other:?}"),
    }
    let mut g = Graph::new();
    let [used, unused] = ["used", "unused"].map(|name| g.state(Kind::Param, name, [1], DType::F32));
    let loss = g.add(used, used);
    let why = g.backward(loss, &[used, unused]).unwrap_err().to_string();
    assert!(why.contains("does not reach parameter unused"), "{why}");
}

fn programs(config: &ModelConfig) -> Vec<(&'static str, Graph)> {
    let extend = model::Extend { rows: 2, positions: 4, slots: 2, capacity: 64, ema: false };
    let denoise = model::ImagePass::Denoise { guided: true };
    vec![
        ("loss", model::loss_graph(config, CAPACITY, LossOptions::TRAIN).unwrap()),
        (
            "update",
            model::update_graph(config, TrainOptions { ema: 0.9, ..TrainOptions::default() }.update()),
        ),
        ("text", model::text_graph(config, extend)),
        ("image", model::image_graph(config, extend, denoise)),
    ]
}

#[test]
fn plans_list_every_step_and_name_what_has_no_kernel() {
    for (name, g) in programs(&mixed()) {
        let plan = Plan::new(&g).unwrap();
        let text = plan.to_string();
        let lines: Vec<&str> = text.lines().skip(1).collect();
        assert_eq!(lines.len(), plan.steps.len(), "{name}");
        for (line, step) in lines.iter().zip(&plan.steps) {
            assert!(line.contains(step.op.name()) && line.contains('@'), "{line}");
            assert!(line.ends_with(&format!("{} B  {} FLOP", step.cost.bytes, step.cost.flops)), "{line}");
            for slot in step.ins.iter().chain(&step.outs) {
                assert!(line.contains(&plan.describe(slot)), "{line}");
            }
        }
        assert!(text.contains("scratch+") && plan.cost().bytes > 0);
        let first = plan.steps.iter().map(|s| s.op.name()).collect::<Vec<_>>();
        match Plan::lowered(&g, &Target::H200) {
            Err(CoreError::NoKernel { op, why, at }) => {
                assert!(first.contains(&op) && why.contains("use the CPU device"), "{op}: {why}");
                assert!(at.file().ends_with(".rs"));
            }
            Ok(plan) => assert!(plan.steps.iter().all(|s| s.is_view() || !s.launches.is_empty()), "{name}"),
            Err(other) => panic!("{name}: {other}"),
        }
    }
}

/// The steps at which each piece of scratch memory is written or read overlap only where it is the
/// same value: a later writer never takes what an earlier value's reader still needs.
fn assert_no_two_live_values_overlap(plan: &Plan) {
    // Who wrote each byte range last: (start, end, identity).
    let mut written: Vec<(usize, usize, usize)> = Vec::new();
    let range = |s: &Slot| (s.offset, s.offset + s.spec.bytes());
    let mut readers: Vec<(usize, Slot)> = Vec::new();
    for (i, step) in plan.steps.iter().enumerate() {
        let scratch = |s: &&Slot| s.segment == Segment::Scratch && s.spec.bytes() > 0;
        for slot in step.ins.iter().filter(scratch) {
            let (start, end) = range(slot);
            let covered: usize = written.iter().map(|w| w.1.min(end).saturating_sub(w.0.max(start))).sum();
            assert_eq!(covered, end - start, "step {i} reads what nothing wrote");
            readers.push((i, *slot));
        }
        for (o, slot) in step.outs.iter().enumerate().filter(|(_, s)| scratch(s)) {
            let (start, end) = range(slot);
            if step.is_fresh(o) {
                for other in step.ins.iter().filter(scratch) {
                    let (a, b) = range(other);
                    assert!(b <= start || end <= a, "step {i} writes over what it reads");
                }
            }
            // Cut the range out of what was written before, then note it.
            written = written
                .iter()
                .flat_map(|&(a, b, by)| [(a, b.min(start), by), (a.max(end), b, by)])
                .filter(|(a, b, _)| a < b)
                .collect();
            written.push((start, end, i));
        }
    }
    assert!(readers.len() > 1);
}

/// A random program of adds, products, views, copies and in-place sums over a few inputs. With `keep`,
/// every value is an output too, so that no memory is used twice.
fn random_graph(seed: u64, keep: bool) -> Graph {
    let s = Stream::new(seed, Purpose::Test, 0);
    let mut at = 0;
    let mut below = |n: usize| {
        at += 1;
        s.below(at, n as u32) as usize
    };
    let mut g = Graph::new();
    let x = g.input("x", [6, 8], DType::F32);
    let w = g.state(Kind::Param, "w", [8, 8], DType::F32);
    let mut live: Vec<Tensor> = vec![x, g.fill(0.5, [6, 8], DType::F32)];
    for n in 0..4 + below(24) {
        let (a, b) = (live[below(live.len())], live[below(live.len())]);
        let new = match below(6) {
            0 => g.add_scaled(a, b, 0.5, Repeat::None),
            1 => g.linear(a, w, Epilogue { activation: Activation::Silu, ..Epilogue::default() }),
            2 => g.cast(a, DType::F32),
            3 => {
                let flat = g.reshape(a, [48]);
                g.reshape(flat, [6, 8])
            }
            4 => {
                // In place over a copy, so that nobody reads what is overwritten.
                let copy = g.add_scaled(a, b, 0.25, Repeat::None);
                g.add_into(copy, b)
            }
            _ => {
                let bf = g.cast(a, DType::Bf16);
                g.cast(bf, DType::F32)
            }
        };
        if keep {
            g.output(&format!("kept{n}"), new);
        }
        live.push(new);
        if live.len() > 6 {
            live.remove(below(live.len()));
        }
    }
    for (i, t) in live.iter().skip(1).enumerate() {
        let kept = g.add(*t, x);
        g.output(&format!("out{i}"), kept);
    }
    g
}

#[test]
fn no_two_live_values_share_memory_and_poison_changes_nothing() {
    for (_, g) in programs(&mixed()) {
        assert_no_two_live_values_overlap(&Plan::new(&g).unwrap());
    }
    for seed in 0..300 {
        let [plan, roomy] = [false, true].map(|keep| Plan::new(&random_graph(seed, keep)).unwrap());
        assert_no_two_live_values_overlap(&plan);
        let want = random_outputs(&roomy, seed, false);
        for poison in [false, true] {
            assert_eq!(random_outputs(&plan, seed, poison), want, "random graph {seed}, poison {poison}");
        }
    }
}

/// The outputs `out0`, `out1`, ... of a random program.
fn random_outputs(plan: &Plan, seed: u64, poison: bool) -> Vec<Vec<u8>> {
    let mut device = CpuDevice::new(CpuOptions { threads: 1, poison }).unwrap();
    let id = device.open(Arc::new(plan.clone())).unwrap();
    let numbers = |n: u64, len| {
        let s = Stream::new(n, Purpose::Test, seed);
        Host::from_f64(DType::F32, (0..len).map(|i| f64::from(s.normal(i))))
    };
    device.write(Place::Input(id, "x"), numbers(1, 48).view()).unwrap();
    if plan.states.iter().any(|s| s.name == "w") {
        device.write(Place::State(Kind::Param, "w"), numbers(2, 64).view()).unwrap();
    }
    device.run(id).unwrap();
    let names = plan.outputs.iter().map(|(name, _)| name).filter(|name| name.starts_with("out"));
    names.map(|name| device.fetch(Place::Output(id, name)).unwrap().view().bytes().to_vec()).collect()
}
