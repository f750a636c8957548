//! Nothing of ours is allocated by a step, once a training or a sampling is under way: on the CPU, on the simulator
//! as far as the host is concerned, and on a GPU's driver, a pretended one.
//!
//! An allocator sees every allocation of the process between two points, with the functions that led to it. Not ours
//! are the blocks of rayon's queue of jobs from outside its threads, one for many runs of plans; what a source of
//! documents makes of a document, on the thread that packs; and what the simulator simulates with.
use rayon::prelude::*;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    backtrace::Backtrace,
    cell::Cell,
    fs,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};
use transfusion::{
    batch::Batch,
    config::ModelConfig,
    data::Part,
    engine::{Engine, cpu},
    run::{DataOptions, OutputOptions, Run, RunConfig, RunEvent},
    sample::{Cancel, Event, Goal, SampleOptions, sample},
    train::{TrainOptions, Trainer},
};
use transfusion_core::{
    device::{CudaDevice, CudaOptions, Device, Place},
    graph::Graph,
    op::Kind,
    plan::Plan,
    tensor::{DType, View, ViewMut},
};
use transfusion_ptxsim::{SimDevice, SimOptions};
use transfusion_tests::{
    Scratch, document,
    fake_cuda::{driver, enter},
    mixed, pack, picture,
};

/// The system's allocator, watched.
struct Watched;

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// Whether allocations are counted, and those that were, with what led to them.
static COUNTING: AtomicBool = AtomicBool::new(false);
static SEEN: Mutex<Vec<String>> = Mutex::new(Vec::new());

thread_local! {
    /// Whether this thread is about to note an allocation, which takes some itself.
    static NOTING: Cell<bool> = const { Cell::new(false) };
}

#[expect(unsafe_code, reason = "what an allocator is")]
// SAFETY: everything is handed to the system's allocator as it comes.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        unsafe { System.realloc(at, layout, size) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        unsafe { System.dealloc(at, layout) }
    }
}

fn note(bytes: usize) {
    if !COUNTING.load(SeqCst) || NOTING.try_with(|n| n.replace(true)).unwrap_or(true) {
        return;
    }
    let led = format!("{bytes} bytes\n{}", Backtrace::force_capture());
    seen().push(led);
    NOTING.set(false);
}

fn seen() -> std::sync::MutexGuard<'static, Vec<String>> {
    SEEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The functions that led to an allocation, the innermost first.
fn functions(led: &str) -> impl Iterator<Item = &str> {
    led.lines().filter_map(|line| {
        let (number, name) = line.trim().split_once(": ")?;
        number.parse::<usize>().ok().map(|_| name)
    })
}

/// Whether rayon's queue asked for it: no other function is nearer than one of it, but for those of the language. What
/// rayon runs for us can look like its own, where the compiler has put one into the other; its queue does not.
fn is_rayons(led: &str) -> bool {
    const LANGUAGE: [&str; 10] = [
        "std::",
        "core::",
        "alloc::",
        "<std",
        "<core",
        "<alloc",
        "__rust",
        "__rdl",
        "steady::note",
        "<steady::Watched",
    ];
    let own = functions(led).find(|name| !LANGUAGE.iter().any(|prefix| name.starts_with(prefix)));
    own.is_some_and(|name| name.contains("crossbeam") || name.starts_with("rayon_core::registry::"))
}

/// What is allocated between two points, but for rayon's queue and what functions named with `others` lead to.
struct Watch {
    others: &'static [&'static str],
    /// What was found in every span between two points.
    found: Vec<Vec<String>>,
}

impl Watch {
    fn new(others: &'static [&'static str]) -> Watch {
        Watch { others, found: vec![] }
    }

    fn begin(&mut self) {
        seen().clear();
        COUNTING.store(true, SeqCst);
    }

    fn end(&mut self) {
        COUNTING.store(false, SeqCst);
        let other = |led: &str| functions(led).any(|name| self.others.iter().any(|o| name.contains(o)));
        self.found.push(seen().drain(..).filter(|led| !is_rayons(led) && !other(led)).collect());
    }

    /// No span had an allocation of ours.
    fn found_nothing(&self, what: &str) {
        assert!(!self.found.is_empty(), "{what}: nothing was watched");
        if let Some(first) = self.found.iter().flatten().next() {
            let all: usize = self.found.iter().map(Vec::len).sum();
            panic!("{what}: {all} allocations, the first of {first}");
        }
    }
}

/// Steps that a training and a sampling take before they are watched, and while they are.
const WARM: u64 = 24;
const WATCHED: u64 = 60;

/// A training run, with all that is on a step's way: data, the step, its report.
fn training(config: RunConfig, dir: &Path, threads: usize) -> Watch {
    let mut watch = Watch::new(&["::document"]);
    let mut run = Run::create(config, dir, None, cpu(threads).unwrap(), &mut |_| ()).unwrap();
    let mut observe = |event| match event {
        RunEvent::Step(report) if report.step == WARM => watch.begin(),
        RunEvent::Step(report) if report.step == WARM + WATCHED => watch.end(),
        _ => (),
    };
    run.train(&mut observe, Cancel(None)).unwrap();
    watch
}

fn on_the_cpu(scratch: &Path) {
    let text = scratch.join("book.txt");
    fs::write(&text, "To be, or not to be, that is the question.\n".repeat(200)).unwrap();
    let quiet = OutputOptions {
        log_every: 0,
        validate_every: 0,
        sample_every: 0,
        checkpoint_every: 0,
        ..OutputOptions::default()
    };
    let train = TrainOptions {
        steps: WARM + WATCHED + 1,
        rows: 2,
        positions: 64,
        accumulation: 2,
        ema: 0.9,
        ..TrainOptions::default()
    };
    for (name, data) in [("text", text), ("shapes", "shapes".into())] {
        for dtype in ["float32", "bfloat16"] {
            let mut model = ModelConfig { torch_dtype: dtype.into(), ..mixed() };
            // Pictures as large as they are drawn: to resize them is a matter of reading data.
            let image = model.transfusion.as_mut().and_then(|t| t.image.as_mut()).unwrap();
            (image.size, image.patch_size) = (32, 8);
            let data = DataOptions { paths: vec![data.clone()], ..DataOptions::default() };
            let config = RunConfig { model, train: train.clone(), data, output: quiet.clone() };
            let dir = |threads: usize| scratch.join(format!("{name}-{dtype}-{threads}"));
            for threads in [1, 2, 3] {
                let watch = training(config.clone(), &dir(threads), threads);
                watch.found_nothing(&format!("training on {name} in {dtype} with {threads} threads"));
            }
        }
    }
}

/// A model that is asked for a text, then for a picture.
fn sampling(config: &ModelConfig, threads: usize) {
    let mut engine = Engine::initialised(config.clone(), cpu(threads).unwrap(), 1).unwrap();
    let words = |text: &str| vec![Part::Text(text.into())];
    let image = Part::Image(picture(config.image().unwrap().size, 1));
    let prompts = [words("a cat"), vec![image], words("two")];
    let mut watch = Watch::new(&[]);
    let mut tokens = 0;
    // Whatever the first sequence says counts; the watch begins when all prompts are read.
    let mut observe = |event| {
        if let Event::Token { sequence: 0, .. } = event {
            tokens += 1;
            match tokens {
                WARM => watch.begin(),
                64 => watch.end(),
                _ => (),
            }
        }
    };
    let options = SampleOptions { goal: Goal::Text, max_text: 90, seed: 4, ..SampleOptions::default() };
    sample(&mut engine, &prompts, &options, &mut observe, Cancel(None)).unwrap();
    watch.found_nothing("tokens");
    for guidance in [1.0, 3.0] {
        let mut watch = Watch::new(&[]);
        let mut observe = |event| match event {
            Event::Denoised { step: 8, .. } => watch.begin(),
            Event::Denoised { step: 40, .. } => watch.end(),
            _ => (),
        };
        let options = SampleOptions { goal: Goal::Image, steps: 41, guidance, ..SampleOptions::default() };
        sample(&mut engine, &prompts, &options, &mut observe, Cancel(None)).unwrap();
        watch.found_nothing("denoising");
    }
}

/// Steps of a trainer on a device.
fn stepping(
    mut trainer: Trainer,
    batches: &[Batch],
    warm: usize,
    others: &'static [&'static str],
    what: &str,
) {
    let mut watch = Watch::new(others);
    for step in 0..warm + 2 {
        if step == warm {
            watch.begin();
        }
        trainer.step(batches).unwrap();
    }
    watch.end();
    watch.found_nothing(what);
}

fn on_the_simulator() {
    let config = ModelConfig {
        hidden_size: 64,
        head_dim: Some(32),
        num_key_value_heads: Some(1),
        num_attention_heads: 2,
        num_hidden_layers: 1,
        torch_dtype: "bfloat16".into(),
        ..mixed()
    };
    let device = Box::new(SimDevice::new(SimOptions::default()).unwrap());
    let options = TrainOptions { rows: 1, positions: 48, images: 1, ..TrainOptions::default() };
    let trainer = Trainer::new(Engine::initialised(config.clone(), device, 1).unwrap(), options).unwrap();
    let batch = pack(&config, trainer.capacity(), vec![document(&["a cat", "#"], 1)]);
    stepping(trainer, &[batch], 2, &["transfusion_ptxsim"], "training on the simulator");
}

/// A plan that fills, on a pretended driver: written to, run and read again and again.
fn on_a_driver() {
    let mut g = Graph::new();
    let x = g.input("x", [1000], DType::F32);
    let kept = g.state(Kind::Param, "kept", [10], DType::F32);
    let zeros = g.fill(0.0, [1000], DType::F32);
    [("x", x), ("kept", kept), ("zeros", zeros)].into_iter().for_each(|(name, t)| g.output(name, t));
    let mut device = CudaDevice::new(CudaOptions::default()).unwrap();
    let plan = Arc::new(Plan::on(&g, device.target().as_ref()).unwrap());
    let id = device.open(plan).unwrap();
    let (ones, mut read) = (vec![1.0; 1000], vec![0.0; 1000]);
    let mut watch = Watch::new(&[]);
    for round in 0..20 {
        if round == 4 {
            watch.begin();
        }
        device.write(Place::Input(id, "x"), View::F32(&ones)).unwrap();
        device.write(Place::State(Kind::Param, "kept"), View::F32(&ones[..10])).unwrap();
        device.run(id).unwrap();
        for (name, want) in [("x", 1.0), ("zeros", 0.0)] {
            device.read(Place::Output(id, name), ViewMut::F32(&mut read)).unwrap();
            assert!(read.iter().all(|x| *x == want), "{name}");
        }
        device.read(Place::State(Kind::Param, "kept"), ViewMut::F32(&mut read[..10])).unwrap();
    }
    watch.end();
    watch.found_nothing("plans on a driver");
}

/// That the watch sees what is there, and whose it is.
fn what_is_allocated_is_seen() {
    #[inline(never)]
    fn on_the_side() -> Vec<u8> {
        std::hint::black_box(vec![1; 101])
    }
    let mut watch = Watch::new(&["on_the_side"]);
    watch.begin();
    let ours = std::hint::black_box(vec![1u8; 71]);
    let side = on_the_side();
    let threads = std::thread::scope(|s| s.spawn(|| std::hint::black_box(vec![2u8; 97])).join().unwrap());
    [0u8; 3].par_iter().for_each(|_| drop(std::hint::black_box(vec![3u8; 89])));
    watch.end();
    let of = |bytes: &str| watch.found[0].iter().filter(|led| led.starts_with(bytes)).count();
    let all = ["71 bytes", "97 bytes", "89 bytes", "101 bytes"].map(of);
    assert_eq!(all, [1, 1, 3, 0], "{:#?}", watch.found);
    drop((ours, side, threads));

    let mut g = Graph::new();
    let zeros = g.fill(0.0, [10], DType::F32);
    g.output("zeros", zeros);
    let mut device = cpu(2).unwrap();
    let id = device.open(Arc::new(Plan::new(&g).unwrap())).unwrap();
    // Its threads begin with the first run.
    device.run(id).unwrap();
    let mut watch = Watch::new(&[]);
    watch.begin();
    (0..200).for_each(|_| device.run(id).unwrap());
    let rayons = seen().iter().filter(|led| is_rayons(led)).count();
    watch.end();
    watch.found_nothing("200 runs of a plan");
    assert!((1..50).contains(&rayons), "rayon's queue took {rayons} blocks for 200 jobs");
}

#[test]
fn a_step_allocates_nothing() {
    let driver = driver(Path::new(env!("CARGO_TARGET_TMPDIR")), "");
    let healthy: [(&str, &str); 0] = [];
    if enter("a_step_allocates_nothing", &driver, &healthy) {
        return on_a_driver();
    }
    let scratch = Scratch::new("steady");
    what_is_allocated_is_seen();
    on_the_cpu(&scratch.0);
    [1, 2].into_iter().for_each(|threads| sampling(&mixed(), threads));
    on_the_simulator();
}
