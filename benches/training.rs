//! Whole training steps of the presets that train on a CPU, and every distinct op of their plans of training and
//! sampling, alone: `cargo bench -p transfusion-benches --bench training`.
use criterion::{Criterion, criterion_group, criterion_main};
use std::time::Duration;
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
        let Ok(mut step) = training(preset, 0) else { continue };
        group.bench_function(preset, |b| b.iter(|| step.take()));
    }
    group.finish();
}

fn ops(c: &mut Criterion) {
    for preset in PRESETS {
        if let Err(e) = ops_of(c, preset) {
            eprintln!("{preset}: {e}");
        }
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
    for Distinct { program, application, .. } in distinct(&config, step::packing(&config))? {
        let alone = Alone::open(device.as_mut(), &application)?;
        group.bench_function(format!("{program}/{application}"), |b| {
            b.iter_custom(|n| times(&alone, device.as_mut(), n));
        });
        alone.close(device.as_mut());
    }
    group.finish();
    Ok(())
}

/// The time of `n` runs.
fn times(alone: &Alone, device: &mut dyn Device, n: u64) -> Duration {
    let _ = alone.rewind(device);
    let one = |_| alone.run(device).map_or(Duration::ZERO, |times| times.iter().sum());
    (0..n).map(one).sum()
}

criterion_group!(benches, steps, ops);
criterion_main!(benches);
