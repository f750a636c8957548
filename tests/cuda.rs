//! The CUDA device against a pretended driver: what it queues is what the plan says, and whatever is wrong
//! with a driver is an error. Needs no GPU.
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};
use transfusion_core::{
    Error, Result,
    cpu::Cpu,
    device::{CpuDevice, CpuOptions, CudaDevice, CudaOptions, Device, Place, PlanId},
    error::NoDevice,
    graph::Graph,
    launch::{Arg, Geometry, Kernels, Launch, Operand, Target},
    op::{Kind, Memory, Op},
    plan::Plan,
    tensor::{DType, Host, In, Out, Spec, Tensor, View, ViewMut},
};
use transfusion_ptx::Module;
use transfusion_tests::fake_cuda::{driver, enter, inside, install, no_driver, said};

const PTX: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry double_f32(
	.param .u64 double_f32_param_0,
	.param .u64 double_f32_param_1,
	.param .u32 double_f32_param_2
)
.maxntid 128, 1, 1
{
	ret;
}
.visible .entry mapped_f32(
	.param .u32 mapped_f32_param_0,
	.param .align 64 .b8 mapped_f32_param_1[128],
	.param .f32 mapped_f32_param_2
)
.maxntid 64, 1, 1
{
	ret;
}
";

/// `y = 2 x`, with these launches.
#[derive(Debug)]
struct Double {
    launches: Vec<Launch>,
    scratch: Vec<usize>,
    in_place: bool,
}

impl Op for Double {
    fn name(&self) -> &'static str {
        "double"
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        Ok(vec![ins[0]])
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], _: &Cpu) {
        if let (View::F32(x), ViewMut::F32(y)) = (ins[0].data, &mut outs[0].data) {
            y.iter_mut().enumerate().for_each(|(i, y)| *y = 2.0 * if self.in_place { *y } else { x[i] });
        }
    }

    fn kernels(&self, _: &[Spec], _: &[Spec], _: &Target) -> Result<Kernels, String> {
        Ok(Kernels { scratch: self.scratch.clone(), launches: self.launches.clone() })
    }

    fn memory(&self, _: usize) -> Memory {
        if self.in_place { Memory::InPlace { input: 0 } } else { Memory::Own }
    }
}

fn kernel(from: Operand, to: Operand, n: usize) -> Launch {
    let args = vec![Arg::Address(to, 0), Arg::Address(from, 0), Arg::U32(n as u32)];
    let grid = [n.div_ceil(128) as u32, 1, 1];
    Launch::Kernel {
        entry: "double_f32".into(),
        grid,
        block: [128, 1, 1],
        cluster: [1, 1, 1],
        shared: 64 << 10,
        args,
    }
}

fn apply(g: &mut Graph, x: Tensor, launches: Vec<Launch>, scratch: Vec<usize>) -> Tensor {
    g.push::<1>(Double { launches, scratch, in_place: false }, &[x])[0]
}

/// `y = 16 x`, by a kernel, by a kernel into a scratch buffer that is copied, by one that works in place on
/// a copy, and by one with an empty grid before it; `state` becomes twice what it was.
fn graph(n: usize) -> Graph {
    let mut g = Graph::new();
    let x = g.input("x", [n], DType::F32);
    let state = g.state(Kind::Param, "state", [n], DType::F32);
    let (x0, y0, s0) = (Operand::In(0), Operand::Out(0), Operand::Scratch(0));
    let a = apply(&mut g, x, vec![kernel(x0, y0, n)], vec![]);
    let detour =
        vec![Launch::Fill { what: s0, byte: 0x7f }, kernel(x0, s0, n), Launch::Copy { from: s0, to: y0 }];
    let b = apply(&mut g, a, detour, vec![4 * n]);
    let c = apply(&mut g, b, vec![Launch::Copy { from: x0, to: y0 }, kernel(y0, y0, n)], vec![]);
    let d = apply(&mut g, c, vec![kernel(x0, y0, 0), kernel(x0, y0, n)], vec![]);
    let in_place = Double { launches: vec![kernel(y0, y0, n)], scratch: vec![], in_place: true };
    g.push::<1>(in_place, &[state]);
    g.output("a", a);
    g.output("y", d);
    g
}

fn options() -> CudaOptions {
    CudaOptions { kernels: vec![Module::new("sm_80", "double", PTX)], ..CudaOptions::default() }
}

fn open(device: &mut dyn Device, g: &Graph) -> Result<PlanId> {
    let plan = Plan::on(g, device.target().as_ref())?;
    device.open(Arc::new(plan))
}

fn numbers(device: &mut dyn Device, at: Place<'_>) -> Vec<f32> {
    match device.fetch(at).unwrap() {
        Host::F32(x) => x,
        other => panic!("{other:?}"),
    }
}

fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// Runs a test with a healthy driver, and returns what that did.
fn on_healthy(test: &str, more: &[(&str, &str)]) -> Option<Vec<String>> {
    let log = target().join(format!("{test}.log"));
    if !inside() {
        let _ = fs::remove_file(&log);
    }
    let mut condition = vec![("_LOG", log.to_str().unwrap())];
    condition.extend_from_slice(more);
    if enter(test, &driver(target(), ""), &condition) {
        return None;
    }
    let log = fs::read_to_string(log).unwrap();
    Some(log.lines().map(str::to_owned).collect())
}

fn count(log: &[String], start: &str) -> usize {
    log.iter().filter(|line| line.starts_with(start)).count()
}

/// Runs the plan on a device: everything that can be read of it after each of three runs.
fn three_runs(device: &mut dyn Device, n: usize) -> Vec<Vec<f32>> {
    let id = open(device, &graph(n)).unwrap();
    let state = Place::State(Kind::Param, "state");
    let mut seen = vec![numbers(device, state)];
    device.write(state, View::F32(&vec![1.5; n])).unwrap();
    for run in 0..3 {
        let x: Vec<f32> = (0..n).map(|i| (i * (run + 1)) as f32).collect();
        device.write(Place::Input(id, "x"), View::F32(&x)).unwrap();
        // The host's copy may go at once.
        drop(x);
        device.run(id).unwrap();
        seen.extend([Place::Output(id, "a"), Place::Output(id, "y"), state].map(|p| numbers(device, p)));
    }
    let times = device.profile(id).unwrap();
    assert_eq!(times.len(), 5);
    assert!(times.iter().all(|t| *t < Duration::from_secs(1)));
    seen.push(numbers(device, state));
    seen
}

#[test]
fn a_plan_runs_as_on_the_cpu() {
    const N: usize = 1000;
    let Some(log) = on_healthy("a_plan_runs_as_on_the_cpu", &[]) else {
        let mut cpu = CpuDevice::new(CpuOptions { threads: 1, poison: true }).unwrap();
        let mut cuda = CudaDevice::new(options()).unwrap();
        assert_eq!(three_runs(&mut cuda, N), three_runs(&mut cpu, N));
        let report = cuda.kernels();
        assert_eq!((report.len(), report[0].registers, report[0].local_bytes), (1, 40, 0));
        return;
    };
    // Once recorded, three times replayed; the profile runs the steps one by one.
    assert_eq!((count(&log, "recorded 8"), count(&log, "recorded"), count(&log, "replay")), (1, 1, 3));
    assert_eq!((count(&log, "load double_f32 mapped_f32"), count(&log, "load")), (1, 1), "compiled once");
    assert_eq!((count(&log, "kernel"), count(&log, "copy")), (4 * 5, 4 * 2));
    assert_eq!(count(&log, "fill 127 4000"), 4);
    let shape = "kernel double_f32 [8, 1, 1] [128, 1, 1] [1, 1, 1] 65536 ";
    assert_eq!(count(&log, shape), 4 * 5);
    // y, x, n: the last four bytes of twenty.
    let first = log.iter().find_map(|line| line.strip_prefix(shape)).unwrap();
    assert!(first.len() == 40 && first.ends_with("e8030000"), "{first}");
    assert_eq!(log.last().unwrap(), "left: memory 0 streams 0 graphs 0 modules 0 events 0");
}

#[test]
fn an_output_without_bytes_is_read() {
    if on_healthy("an_output_without_bytes_is_read", &[]).is_none() {
        let seen = three_runs(&mut CudaDevice::new(options()).unwrap(), 0);
        assert!(seen.iter().all(Vec::is_empty), "{seen:?}");
    }
}

#[test]
fn plans_are_recorded_again_when_the_arena_moves() {
    let Some(log) = on_healthy("plans_are_recorded_again_when_the_arena_moves", &[]) else {
        let mut device = CudaDevice::new(options()).unwrap();
        let small = open(&mut device, &graph(100)).unwrap();
        let run = |device: &mut CudaDevice, id, n: usize| {
            device.write(Place::Input(id, "x"), View::F32(&vec![3.0; n])).unwrap();
            device.run(id).unwrap();
            assert_eq!(numbers(device, Place::Output(id, "y")), vec![48.0; n]);
        };
        run(&mut device, small, 100);
        let larger = open(&mut device, &doublings(5000)).unwrap();
        run(&mut device, larger, 5000);
        run(&mut device, small, 100);
        run(&mut device, larger, 5000);
        device.close(larger);
        run(&mut device, small, 100);
        let closed = device.run(larger).unwrap_err();
        assert!(closed.to_string().contains("not open"), "{closed}");
        return;
    };
    assert_eq!((count(&log, "recorded"), count(&log, "replay")), (3, 5));
    // The first recording of the smaller plan, the larger plan when it is closed, the rest at the end.
    let until = |event: &str| log.iter().rposition(|line| line == event).unwrap();
    assert_eq!(count(&log[..until("replay")], "forget"), 2);
    assert_eq!(log.last().unwrap(), "left: memory 0 streams 0 graphs 0 modules 0 events 0");
}

/// `y = 16 x` by kernels alone, without a state.
fn doublings(n: usize) -> Graph {
    let mut g = Graph::new();
    let mut y = g.input("x", [n], DType::F32);
    for _ in 0..4 {
        y = apply(&mut g, y, vec![kernel(Operand::In(0), Operand::Out(0), n)], vec![]);
    }
    g.output("y", y);
    g
}

#[test]
fn large_and_many_copies_go_through_the_ring() {
    const LARGE: usize = (40 << 20) / 4 + 3;
    if on_healthy("large_and_many_copies_go_through_the_ring", &[]).is_some() {
        return;
    }
    let mut device = CudaDevice::new(options()).unwrap();
    let mut g = Graph::new();
    g.state(Kind::Param, "large", [LARGE], DType::F32);
    for i in 0..64 {
        g.state(Kind::Param, &format!("small.{i}"), [1001], DType::F32);
    }
    open(&mut device, &g).unwrap();
    let large: Vec<f32> = (0..LARGE).map(|i| i as f32).collect();
    device.write(Place::State(Kind::Param, "large"), View::F32(&large)).unwrap();
    // More than the ring holds, before anybody waits.
    for round in 0..100 {
        for i in 0..64 {
            let name = format!("small.{i}");
            let at = Place::State(Kind::Param, &name);
            device.write(at, View::F32(&[(64 * round + i) as f32; 1001])).unwrap();
        }
    }
    for i in 0..64 {
        let name = format!("small.{i}");
        assert_eq!(numbers(&mut device, Place::State(Kind::Param, &name)), [(64 * 99 + i) as f32; 1001]);
    }
    assert!(numbers(&mut device, Place::State(Kind::Param, "large")) == large);
}

/// A kernel with a tensor map, in clusters.
fn clustered() -> Graph {
    let mut g = Graph::new();
    let x = g.input("x", [6, 64], DType::F32);
    let geometry = Geometry {
        offset: 0,
        element: 4,
        extents: vec![64, 6],
        strides: vec![256],
        tile: vec![32, 2],
        swizzle: 128,
    };
    let launch = Launch::Kernel {
        entry: "mapped_f32".into(),
        grid: [4, 2, 1],
        block: [64, 1, 1],
        cluster: [2, 1, 1],
        shared: 0,
        args: vec![Arg::U32(7), Arg::Map(Operand::In(0), geometry), Arg::F32(1.0)],
    };
    let y = apply(&mut g, x, vec![launch], vec![]);
    g.output("y", y);
    g
}

#[test]
fn an_older_driver_runs_what_needs_neither_clusters_nor_tensor_maps() {
    let test = "an_older_driver_runs_what_needs_neither_clusters_nor_tensor_maps";
    let condition = [("_CAPABILITY", "9.0")];
    if !enter(test, &driver(target(), "plain"), &condition) {
        return;
    }
    let mut device = CudaDevice::new(options()).unwrap();
    let mut cpu = CpuDevice::new(CpuOptions { threads: 1, poison: true }).unwrap();
    assert_eq!(three_runs(&mut device, 500), three_runs(&mut cpu, 500));
    let id = open(&mut device, &clustered()).unwrap();
    let e = device.run(id).unwrap_err().to_string();
    assert!(e.contains("lacks cuTensorMapEncodeTiled") && e.contains("CUDA 12.0"), "{e}");
}

#[test]
fn own_kernels_stand_in_for_some_of_a_file() {
    let Some(log) = on_healthy("own_kernels_stand_in_for_some_of_a_file", &[]) else {
        // Two texts of one name: the second has another `double_f32` and nothing else.
        let edited =
            PTX.split(".visible .entry mapped_f32").next().unwrap().replace("128, 1, 1", "256, 1, 1");
        let mut options = options();
        options.kernels.push(Module::new("sm_80", "double", edited));
        let mut device = CudaDevice::new(options).unwrap();
        let id = open(&mut device, &graph(300)).unwrap();
        device.run(id).unwrap();
        let other = device.open(Arc::new(unmapped())).unwrap();
        device.run(other).unwrap();
        return;
    };
    assert_eq!((count(&log, "load double_f32 mapped_f32"), count(&log, "load")), (1, 2));
}

/// A plan that names `mapped_f32` and launches no block of it.
fn unmapped() -> Plan {
    let mut g = Graph::new();
    let x = g.input("x", [8], DType::F32);
    let launch = Launch::Kernel {
        entry: "mapped_f32".into(),
        grid: [0, 1, 1],
        block: [64, 1, 1],
        cluster: [1, 1, 1],
        shared: 0,
        args: vec![],
    };
    let y = apply(&mut g, x, vec![launch], vec![]);
    g.output("y", y);
    Plan::lowered(&g, &Target::A100).unwrap()
}

#[test]
fn clusters_and_tensor_maps_reach_the_driver() {
    let test = "clusters_and_tensor_maps_reach_the_driver";
    let Some(log) = on_healthy(test, &[("_CAPABILITY", "9.0")]) else {
        let mut device = CudaDevice::new(options()).unwrap();
        assert_eq!(device.target().unwrap().arch, "sm_90a");
        open(&mut device, &doublings(10)).unwrap();
        let id = open(&mut device, &clustered()).unwrap();
        device.run(id).unwrap();
        device.fetch(Place::Output(id, "y")).unwrap();
        return;
    };
    assert_eq!(count(&log, "load"), 1, "one text is compiled once, whatever is taken of it");
    let start = "kernel mapped_f32 [4, 2, 1] [64, 1, 1] [2, 1, 1] 0 ";
    let params = log.iter().find_map(|line| line.strip_prefix(start)).unwrap();
    assert_eq!(params.len(), 2 * (64 + 128 + 4));
    let word = |i: usize| {
        let bytes = &params[2 * 64 + 16 * i..][..16];
        u64::from_str_radix(bytes, 16).unwrap().swap_bytes()
    };
    assert_eq!(&params[..8], "07000000");
    assert_eq!(&params[2 * 192..], "0000803f");
    // FLOAT32 is 7, a swizzle of 128 bytes is 3; two dimensions.
    assert_eq!(word(1), 7 << 32 | 3 << 16 | 2);
    assert_eq!([word(2), word(3), word(6), word(10), word(11)], [64, 6, 256, 32, 2]);
}

#[test]
fn devices_are_independent_and_may_move_between_threads() {
    let test = "devices_are_independent_and_may_move_between_threads";
    let Some(log) = on_healthy(test, &[("_DEVICES", "2")]) else {
        let work = |ordinal| {
            let mut device = CudaDevice::new(CudaOptions { ordinal, ..options() }).unwrap();
            std::thread::spawn(move || {
                three_runs(&mut device, 77 + ordinal);
                device
            })
        };
        let threads = [0, 1, 0].map(work);
        let devices = threads.map(|t| t.join().unwrap());
        std::thread::spawn(|| drop(devices)).join().unwrap();
        return;
    };
    assert_eq!(log.last().unwrap(), "left: memory 0 streams 0 graphs 0 modules 0 events 0");
}

#[test]
fn launches_are_made_for_as_many_multiprocessors_as_asked_for() {
    if on_healthy("launches_are_made_for_as_many_multiprocessors_as_asked_for", &[]).is_some() {
        return;
    }
    let made_for = |sms| CudaDevice::new(CudaOptions { sms, ..options() }).unwrap().target().unwrap().sms;
    let own = made_for(None);
    assert_eq!([Some(2), Some(100_000), Some(0)].map(made_for), [2, own, 1]);
}

#[test]
fn a_plan_for_the_cpu_is_refused() {
    if on_healthy("a_plan_for_the_cpu_is_refused", &[]).is_some() {
        return;
    }
    let mut device = CudaDevice::new(options()).unwrap();
    let e = device.open(Arc::new(Plan::new(&graph(10)).unwrap())).unwrap_err();
    assert!(matches!(e, Error::NoKernel { op: "double", .. }), "{e}");
    assert!(e.to_string().contains("Plan::lowered"), "{e}");
    let mut unknown = options();
    unknown.kernels.clear();
    let e = open(&mut CudaDevice::new(unknown).unwrap(), &graph(10)).unwrap_err();
    assert!(matches!(&e, Error::Launch { entry, .. } if entry == "double_f32"), "{e}");
}

/// What opens a device, a plan, runs it and reads its output.
fn attempt(ordinal: usize) -> Result<Vec<f32>> {
    let mut device = CudaDevice::new(CudaOptions { ordinal, ..options() })?;
    let id = open(&mut device, &graph(1 << 20))?;
    device.run(id)?;
    let mut y = vec![0.0; 1 << 20];
    let first = device.read(Place::Output(id, "y"), ViewMut::F32(&mut y));
    if let Err(first) = first {
        // Whatever is asked of a lost GPU, it answers the same.
        let again = device.run(id).unwrap_err().to_string();
        assert_eq!(again, first.to_string());
        assert_eq!(open(&mut device, &graph(3)).unwrap_err().to_string(), again);
        assert_eq!(device.write(Place::Input(id, "x"), View::F32(&y)).unwrap_err().to_string(), again);
        return Err(first);
    }
    Ok(y)
}

/// A condition of the driver, and the words of the error.
type Wrong =
    (&'static str, &'static [(&'static str, &'static str)], fn(&Error) -> bool, &'static [&'static str]);

/// Wrong before a device is open.
const EARLY: [Wrong; 10] = [
    ("none", &[], |e| matches!(e, Error::NoDevice(NoDevice::NoLibrary)), &["not found"]),
    ("", &[("", "stub")], |e| matches!(e, Error::NoDevice(NoDevice::Stub)), &["stub"]),
    ("", &[("", "no device")], |e| matches!(e, Error::NoDevice(NoDevice::NoGpu)), &["no GPU"]),
    ("", &[("_DEVICES", "0")], |e| matches!(e, Error::NoDevice(NoDevice::NoGpu)), &["no GPU"]),
    ("", &[("", "mismatch")], |e| matches!(e, Error::NoDevice(NoDevice::NoStart { .. })), &["MISMATCH 803"]),
    ("", &[("", "novelty")], |e| matches!(e, Error::NoDevice(NoDevice::NoStart { .. })), &["7777"]),
    ("", &[("_VERSION", "10020")], is_old, &["CUDA 10.2"]),
    ("", &[("_CAPABILITY", "7.5")], |e| matches!(e, Error::NoDevice(NoDevice::Capability { .. })), &["7.5"]),
    ("bare", &[], |e| matches!(e, Error::NoDevice(NoDevice::NoFunction { .. })), &["cuDriverGetVersion"]),
    (
        "old",
        &[],
        |e| matches!(e, Error::NoDevice(NoDevice::NoFunction { .. })),
        &["cuGraphInst", "CUDA 11.4"],
    ),
];

/// Wrong with a device, a plan or a run.
const LATE: [Wrong; 7] = [
    ("", &[("_ASK", "5"), ("_DEVICES", "2")], is_ordinal, &["no CUDA device 5", "there are 2"]),
    ("", &[("", "old ptx")], is_old, &["CUDA 12.4", "need 11.0"]),
    ("", &[("_FREE", "1000000")], is_memory, &["a plan needs 0.02 GiB, 0.00 GiB are free"]),
    ("", &[("", "no memory")], is_memory, &["not enough memory: state needs", "1.00 GiB are free"]),
    (
        "",
        &[("", "jit")],
        |e| matches!(e, Error::Compile { .. }),
        &["double_f32 of sm_80/double", "INVALID_PTX 218", "too much shared data"],
    ),
    (
        "",
        &[("", "launch")],
        |e| matches!(e, Error::Launch { .. }),
        &["double_f32", "OUT_OF_RESOURCES 701", "cuda.rs:"],
    ),
    (
        "",
        &[("", "fault")],
        |e| matches!(e, Error::Lost { .. }),
        &["ILLEGAL_ADDRESS 700", "a read, or what ran before it"],
    ),
];

fn is_ordinal(e: &Error) -> bool {
    matches!(e, Error::NoDevice(NoDevice::Ordinal { asked: 5, have: 2 }))
}

fn is_old(e: &Error) -> bool {
    matches!(e, Error::NoDevice(NoDevice::DriverTooOld { .. }))
}

fn is_memory(e: &Error) -> bool {
    matches!(e, Error::Memory { .. })
}

#[test]
fn whatever_is_wrong_with_a_driver_is_an_error() {
    let all: Vec<&Wrong> = EARLY.iter().chain(&LATE).collect();
    if inside() {
        enter("", Path::new(""), &[("", "")]);
        let i: usize = std::env::var("FAKE_CUDA_CASE").unwrap().parse().unwrap();
        let ordinal = std::env::var("FAKE_CUDA_ASK").map_or(0, |n| n.parse().unwrap());
        let (_, condition, is_it, words) = all[i];
        let e = attempt(ordinal).unwrap_err();
        assert!(is_it(&e), "{condition:?}: {e:?}");
        for word in *words {
            assert!(e.to_string().contains(word), "{condition:?}: no {word:?} in {e}");
        }
        return;
    }
    for (i, (variant, condition, ..)) in all.into_iter().enumerate() {
        let folder = folder(variant);
        let log = target().join(format!("wrong-{i}.log"));
        let _ = fs::remove_file(&log);
        let number = i.to_string();
        let mut condition = condition.to_vec();
        condition.extend([("_CASE", number.as_str()), ("_LOG", log.to_str().unwrap())]);
        enter("whatever_is_wrong_with_a_driver_is_an_error", &folder, &condition);
        if condition.contains(&("_FREE", "1000000")) {
            let log = fs::read_to_string(&log).unwrap();
            assert!(!log.contains("alloc") && !log.contains("load"), "nothing is begun: {log}");
        }
    }
}

fn folder(variant: &str) -> PathBuf {
    if variant == "none" { no_driver(target()) } else { driver(target(), variant) }
}

#[test]
fn a_stepwise_run_names_the_step_that_faults() {
    let test = "a_stepwise_run_names_the_step_that_faults";
    if on_healthy(test, &[("", "fault")]).is_some() {
        return;
    }
    let mut device = CudaDevice::new(options()).unwrap();
    let id = open(&mut device, &graph(10)).unwrap();
    let e = device.run_stepwise(id).unwrap_err();
    assert!(matches!(e, Error::Lost { .. }), "{e}");
    assert!(e.to_string().contains("double (double_f32), applied at "), "{e}");
}

/// A program of `engine/core/examples` that ends the process at any panic, caught or not, compiled against
/// the library that this test is linked with.
fn aborting(name: &str, source: &Path) -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let deps = exe.parent().unwrap();
    let is_core = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with("libtransfusion_core-") && name.ends_with(".rlib")
    };
    let libraries = fs::read_dir(deps).unwrap().map(|entry| entry.unwrap().path()).filter(is_core);
    let newest = libraries.max_by_key(|path| path.metadata().unwrap().modified().unwrap()).unwrap();
    let program = target().join(name);
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()));
    rustc.args(["--edition", "2024", "-C", "panic=abort"]).arg("-L").arg(deps).arg(source);
    rustc.arg("--extern").arg(format!("transfusion_core={}", newest.display())).arg("-o").arg(&program);
    let out = rustc.output().unwrap();
    assert!(out.status.success(), "{}", said(&out));
    program
}

#[test]
fn a_program_that_aborts_on_panic_ends_with_a_message() {
    let core = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/core");
    let program = aborting("gpu", &core.join("examples/gpu.rs"));
    for (variant, condition, _, words) in EARLY {
        let out = install(&mut Command::new(&program), &folder(variant), condition).output().unwrap();
        let said = said(&out);
        assert_eq!(out.status.code(), Some(1), "{condition:?}: {} {said}", out.status);
        let parts = ["error: ", "hint: "].iter().chain(words.iter());
        parts.for_each(|word| assert!(said.contains(word), "{condition:?}: no {word:?} in {said}"));
        assert!(!said.contains("panicked"), "{condition:?}: {said}");
    }
    let found = install(&mut Command::new(&program), &folder(""), &[("_DEVICES", "2")]).output().unwrap();
    assert!(found.status.success() && said(&found).contains("cuda:1 Pretended GPU"), "{}", said(&found));

    // That a panic would show: one that is caught still ends the process.
    let source = target().join("panics.rs");
    fs::write(&source, "fn main() { let _ = std::panic::catch_unwind(|| panic!()); }").unwrap();
    let out = Command::new(aborting("panics", &source)).output().unwrap();
    assert_eq!(out.status.code(), None, "it ends by a signal: {}", out.status);
}
