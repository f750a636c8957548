//! Training gives the same bits whatever the number of threads, and however often it is interrupted.
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};
use transfusion::{
    data::shapes,
    engine::{Engine, cpu},
    footprint::Step,
    metrics,
    model::Capacity,
    run::{DataOptions, OutputOptions, Run, RunConfig, RunEvent},
    sample::{Cancel, Goal, SampleOptions},
    train::{Progress, TrainOptions, Trainer},
};
use transfusion_core::{
    launch::{Arg, Launch, Target},
    op::Kind,
};
use transfusion_tests::{Scratch, document, mixed, one_row, pack, relative};

/// A run of a small model on the built-in pictures, with everything that a run may do.
fn config(steps: u64) -> RunConfig {
    let train = TrainOptions {
        steps,
        rows: 2,
        positions: 64,
        accumulation: 2,
        warmup: 3,
        lr: 3e-3,
        ema: 0.99,
        seed: 21,
        ..TrainOptions::default()
    };
    let output = OutputOptions {
        log_every: 1,
        validate_every: 5,
        validate_documents: 20,
        sample_every: 6,
        checkpoint_every: 4,
        keep_checkpoints: 0,
        linear_baseline: true,
        sample: SampleOptions { goal: Goal::Image, steps: 3, ..SampleOptions::default() },
    };
    let data = DataOptions { paths: vec!["shapes".into()], ..DataOptions::default() };
    RunConfig { model: mixed(), train, data, output }
}

fn start(dir: &Path, steps: u64, threads: usize) -> Run {
    Run::create(config(steps), dir, None, cpu(threads).unwrap(), &mut |_| ()).unwrap()
}

/// What a run leaves that must not depend on anything but its configuration: the files of its last
/// checkpoint, its metrics but for timings, its pictures.
fn remains(dir: &Path, step: u64) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for folder in [dir.join("checkpoints").join(format!("step-{step:08}")), dir.join("samples")] {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            all.push((path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()));
        }
    }
    all.sort();
    for line in fs::read_to_string(dir.join("metrics.jsonl")).unwrap().lines() {
        let mut line: Value = serde_json::from_str(line).unwrap();
        let map = line.as_object_mut().unwrap();
        map.remove("tokens_per_s");
        map.remove("data_wait_ms");
        all.push(("metrics".into(), line.to_string().into_bytes()));
    }
    all
}

fn assert_same(what: &str, have: &[(String, Vec<u8>)], want: &[(String, Vec<u8>)]) {
    let names = |all: &[(String, Vec<u8>)]| all.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(have), names(want), "{what}");
    for ((name, a), (_, b)) in have.iter().zip(want) {
        assert!(a == b, "{what}: {name} differs");
    }
}

#[test]
fn one_two_and_seven_threads_train_to_the_same_bits() {
    let scratch = Scratch::new("threads");
    let left = [1, 2, 7].map(|threads| {
        let dir = scratch.0.join(threads.to_string());
        start(&dir, 12, threads).train(&mut |_| (), Cancel(None)).unwrap();
        remains(&dir, 12)
    });
    assert!(left[0].iter().filter(|(name, _)| name == "metrics").count() >= 12);
    assert!(left[0].iter().any(|(name, _)| name == "ema.safetensors"));
    assert_same("2 threads", &left[1], &left[0]);
    assert_same("7 threads", &left[2], &left[0]);
}

/// Copies a run directory as a power failure would leave it.
fn snapshot(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() { snapshot(&path, &to) } else { fs::copy(&path, &to).map(|_| ()).unwrap() }
    }
}

#[test]
fn resumption_at_five_points_three_times_in_a_row_equals_the_uninterrupted_run() {
    const STEPS: u64 = 24;
    let scratch = Scratch::new("resume");
    let whole = scratch.0.join("whole");
    let copy = |step: u64| -> PathBuf { scratch.0.join(format!("dies-at-{step}")) };
    // The run dies at five points: between checkpoints, and right after steps 8 and 20 left one.
    let points = [5, 9, 14, 19, 21];
    start(&whole, STEPS, 2)
        .train(
            &mut |event| match event {
                RunEvent::Step(report) if points.contains(&report.step) => {
                    snapshot(&whole, &copy(report.step))
                }
                _ => {}
            },
            Cancel(None),
        )
        .unwrap();
    let want = remains(&whole, STEPS);
    for point in points {
        let dir = copy(point);
        // Three times in a row: two interruptions after a step or two, then to the end.
        for more in [1, 2, STEPS] {
            let mut run = Run::resume(&dir, cpu(2).unwrap(), &mut |_| ()).unwrap();
            let mut end = None;
            let mut enough = |p: &Progress| p.step >= *end.get_or_insert(p.step + more);
            run.train_until(&mut enough, &mut |_| (), Cancel(None)).unwrap();
        }
        assert_same(&format!("killed at {point}"), &remains(&dir, STEPS), &want);
    }
}

/// The weights after a step do not depend on how its rows are split into micro-batches.
#[test]
fn a_step_of_four_micro_batches_equals_a_step_of_one() {
    let model = mixed();
    let documents: Vec<_> = (0..4).map(|i| document(&["seen alone", "#", "or together"], 10 + i)).collect();
    let small = Capacity { rows: 1, positions: 48, text_rows: 48, images: 1 };
    let large = Capacity { rows: 4, text_rows: 192, images: 4, ..small };
    let together = pack(&model, large, documents);
    let apart: Vec<_> = (0..4).map(|row| one_row(&model, &together, small, row)).collect();
    let weights = |capacity: Capacity, batches: &[transfusion::batch::Batch]| {
        let engine = Engine::initialised(model.clone(), cpu(2).unwrap(), 1).unwrap();
        let options = TrainOptions {
            rows: capacity.rows,
            positions: capacity.positions,
            images: capacity.images,
            warmup: 0,
            // A gradient of 1e-9 would else be divided by itself.
            eps: 1e-4,
            ..TrainOptions::default()
        };
        let mut trainer = Trainer::new(engine, options).unwrap();
        assert_eq!(trainer.capacity(), capacity);
        let report = trainer.step(batches).unwrap();
        let engine = trainer.engine();
        let all: Vec<f64> = engine
            .weights()
            .to_vec()
            .iter()
            .flat_map(|w| engine.read_weight(Kind::Param, &w.name).unwrap())
            .map(f64::from)
            .collect();
        (report, all)
    };
    let (one, four) = (weights(large, &[together]), weights(small, &apart));
    let apart = relative(&four.1, &one.1);
    println!("weights after a step: {apart:.2e} relative apart");
    assert!(apart <= 1e-6, "{apart:.2e}");
    assert!((one.0.loss - four.0.loss).abs() <= 1e-6 * one.0.loss);
    assert!((one.0.grad_norm - four.0.grad_norm).abs() <= 1e-6 * one.0.grad_norm);
    assert_eq!((one.0.text_targets, one.0.images), (four.0.text_targets, four.0.images));
}

/// The noise of an image is a function of the seed and its document: not of chance, not of its place.
#[test]
fn noise_follows_seed_and_document() {
    let model = mixed();
    let capacity = Capacity { rows: 1, positions: 48, text_rows: 48, images: 1 };
    let loss = |seed: u64, visit: i32| {
        let engine = Engine::initialised(model.clone(), cpu(1).unwrap(), 1).unwrap();
        let options = TrainOptions { rows: 1, positions: 48, images: 1, seed, ..TrainOptions::default() };
        let mut batch = pack(&model, capacity, vec![document(&["a", "#"], 1)]);
        batch.noise_keys[0] = visit;
        Trainer::new(engine, options).unwrap().step(&[batch]).unwrap().loss_image
    };
    assert_eq!(loss(1, 0), loss(1, 0));
    assert_ne!(loss(1, 0), loss(2, 0));
    assert_ne!(loss(1, 0), loss(1, 1));
}

/// A finished run is held against the best linear denoiser of its pictures: once, however often it was
/// interrupted, and not before it is finished.
#[test]
fn a_finished_run_is_compared_once() {
    let scratch = Scratch::new("compared");
    let pictures = scratch.0.join("pictures");
    fs::create_dir_all(&pictures).unwrap();
    for i in 0..24 {
        let (scene, picture) = shapes::example(3, shapes::Split::Train, i);
        picture.save(&pictures.join(format!("{i}.png"))).unwrap();
        fs::write(pictures.join(format!("{i}.txt")), scene.caption()).unwrap();
    }
    let mut config = config(4);
    config.train.rows = 4;
    config.data = DataOptions { paths: vec![pictures], val_fraction: 0.2, ..DataOptions::default() };
    let compared = |run: &Run| {
        let records = metrics::read(&run.dir().metrics()).unwrap();
        let of = |name: &str| {
            let with = records.iter().filter(|r| r.get(&format!("{name}/image/t0")).is_some());
            with.map(|r| (0..10).map(|i| r.get(&format!("{name}/image/t{i}")).unwrap()).collect()).collect()
        };
        [of("final"), of("linear")] as [Vec<Vec<f64>>; 2]
    };
    let path = scratch.0.join("run");
    let mut run = Run::create(config.clone(), &path, None, cpu(1).unwrap(), &mut |_| ()).unwrap();
    run.train_until(&mut |p| p.step == 2, &mut |_| (), Cancel(None)).unwrap();
    assert_eq!(compared(&run), <[Vec<Vec<f64>>; 2]>::default());
    drop(run);
    let mut seen = Vec::new();
    for _ in 0..2 {
        let mut run = Run::resume(&path, cpu(1).unwrap(), &mut |_| ()).unwrap();
        run.train(&mut |_| (), Cancel(None)).unwrap();
        seen.push(compared(&run));
        drop(run);
    }
    assert_eq!(seen[0], seen[1]);
    let [of_model, of_linear] = &seen[0];
    assert!(of_model.len() == 1 && of_linear.len() == 1, "{seen:?}");
    assert!(of_linear[0].iter().all(|e| *e > 0.0 && e.is_finite()), "{of_linear:?}");
    let mut whole =
        Run::create(config, &scratch.0.join("whole"), None, cpu(2).unwrap(), &mut |_| ()).unwrap();
    whole.train(&mut |_| (), Cancel(None)).unwrap();
    assert_eq!(compared(&whole), seen[0]);
}

/// On Hopper attention's gradient is added up by turns, unless a step need not be deterministic; and it leaves with its
/// heads turned back.
#[test]
fn attention_adds_its_gradient_as_training_asks() {
    for deterministic in [true, false] {
        let mut config = RunConfig::preset("0.16b").unwrap();
        config.model.num_hidden_layers = 3;
        config.train.deterministic = deterministic;
        let loss = Step::new(&config, Some(&Target::H200)).unwrap().loss;
        assert!(loss.steps.iter().all(|step| step.op.name() != "rope_bwd"));
        let ordered = loss.steps.iter().flat_map(|step| &step.launches).filter_map(|l| match l {
            // Behind it stand whether heads turned, by which ratio, and the scale.
            Launch::Kernel { entry, args, .. } if entry.starts_with("attention_bwd_wgmma") => {
                args.iter().nth_back(3)
            }
            _ => None,
        });
        assert_eq!(ordered.collect::<Vec<_>>(), [&Arg::U32(deterministic.into()); 3]);
    }
}
