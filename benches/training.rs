//! Whole training steps of the presets that train on a CPU, and every distinct op of their plans of training and
//! sampling, alone: `cargo bench -p transfusion-benches --bench training`.
use criterion::{Criterion, criterion_group, criterion_main};
use std::{collections::HashMap, time::Duration};
use transfusion::{engine::cpu, run::RunConfig};
use transfusion_benches::{
    Result,
    ops::{Alone, Distinct, distinct},
    step, training,
};
use transfusion_core::device::Device;

const PRESETS: [&str; 2] = ["tiny", "text-tiny"];

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("step");
    group.sample_size(20);
    for preset in PRESETS {
        let mut step = training(preset, 0).expect("a preset that trains");
        group.bench_function(preset, |b| b.iter(|| step.take().expect("a step")));
    }
    group.finish();
}

fn ops(c: &mut Criterion) {
    for preset in PRESETS {
        ops_of(c, preset).expect("ops that a CPU has");
    }
}

fn ops_of(c: &mut Criterion, preset: &str) -> Result<()> {
    let config = RunConfig::preset(preset)?;
    let mut device = cpu(0)?;
    let mut group = c.benchmark_group(preset);
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(200));
    let mut named: HashMap<String, usize> = HashMap::new();
    for Distinct { program, application, .. } in distinct(&config, step::packing(&config))? {
        let alone = Alone::open(device.as_mut(), &application)?;
        // Ops that differ in settings alone, as where keys and values go, are numbered.
        let name = format!("{program}/{application}");
        let nth = named.entry(name.clone()).or_default();
        *nth += 1;
        let name = if *nth == 1 { name } else { format!("{name} ({nth})") };
        group.bench_function(name, |b| {
            b.iter_custom(|n| times(&alone, device.as_mut(), n).expect("an op that runs"));
        });
        alone.close(device.as_mut());
    }
    group.finish();
    Ok(())
}

/// The time of `n` runs.
fn times(alone: &Alone, device: &mut dyn Device, n: u64) -> Result<Duration> {
    alone.rewind(device)?;
    (0..n).map(|_| Ok(alone.run(device)?.iter().sum::<Duration>())).sum()
}

criterion_group!(benches, steps, ops);
criterion_main!(benches);
