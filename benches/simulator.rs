//! The simulator on what `text-tiny` launches in bf16: of every op of its plans of training and sampling the largest
//! application, with all checks and with those that cost nothing, on one thread:
//! `cargo bench -p transfusion-benches --bench simulator`. Elements are thread instructions.
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::{collections::BTreeMap, time::Duration};
use transfusion::run::RunConfig;
use transfusion_benches::{Error, Result, ops::distinct, step};
use transfusion_core::{agreement::Application, launch::Target};
use transfusion_ptxsim::{Checks, Options, SimDevice, SimOptions};

/// Rows of the batch: what takes the simulator tenths of a second.
const ROWS: usize = 2;

/// The largest application of every op.
fn largest() -> Result<BTreeMap<&'static str, Application>> {
    let mut config = RunConfig::preset("text-tiny")?;
    config.model.torch_dtype = "bfloat16".into();
    config.train.rows = ROWS;
    let mut all: BTreeMap<&str, Application> = BTreeMap::new();
    for one in distinct(&config, step::packing(&config))? {
        let (a, size) = (one.application, |a: &Application| a.cost().flops.max(a.cost().bytes));
        let larger = all.get(a.op.name()).is_none_or(|other| size(other) < size(&a));
        if larger {
            all.insert(a.op.name(), a);
        }
    }
    Ok(all)
}

fn device(checks: Checks) -> Result<SimDevice> {
    let simulation = Options { checks, threads: 1, ..Options::default() };
    SimDevice::new(SimOptions { target: Target::A100, simulation, ..SimOptions::default() })
        .map_err(Error::from)
}

fn simulator(c: &mut Criterion) {
    let all = largest().expect("a preset that trains");
    for (name, checks) in [("all checks", Checks::all()), ("bounds only", Checks::cheap())] {
        let mut group = c.benchmark_group(format!("simulator, {name}"));
        group
            .sample_size(10)
            .warm_up_time(Duration::from_millis(50))
            .measurement_time(Duration::from_millis(500));
        for (op, application) in &all {
            let mut device = device(checks).expect("a simulator");
            application.run(&mut device).expect("an op that has kernels");
            let counters = device.take_counters();
            let instructions = counters.values().map(|c| c.total.thread_instructions).sum();
            // What a launch does without a kernel.
            if instructions == 0 {
                continue;
            }
            group.throughput(Throughput::Elements(instructions));
            group.bench_function(*op, |b| {
                b.iter(|| application.run(&mut device).expect("an op that ran"));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, simulator);
criterion_main!(benches);
