//! The whole training step of the presets that train on a CPU, and its distinct ops, each summed over a
//! step: `cargo bench -p transfusion-benches`.
use criterion::{Criterion, criterion_group, criterion_main};
use std::{collections::BTreeMap, time::Duration};
use transfusion::{engine::Program, model::LossOptions};
use transfusion_benches::training;

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("step");
    group.sample_size(20);
    for preset in ["tiny", "text-tiny"] {
        let Ok(mut step) = training(preset, 0) else { continue };
        group.bench_function(preset, |b| b.iter(|| step.take()));
    }
    group.finish();
}

fn ops(c: &mut Criterion) {
    for preset in ["tiny", "text-tiny"] {
        let Ok((mut trainer, batch)) = training(preset, 0) else { continue };
        // One step feeds the program's inputs.
        if trainer.step(std::slice::from_ref(&batch)).is_err() {
            continue;
        }
        let program = Program::Loss(trainer.capacity(), LossOptions::TRAIN);
        let engine = trainer.engine();
        let (Ok(plan), Ok(id)) = (engine.plan(program), engine.open(program)) else { continue };
        let mut group = c.benchmark_group(format!("ops of {preset}"));
        group.sample_size(10);
        let names: BTreeMap<&str, ()> = plan.steps.iter().map(|s| (s.op.name(), ())).collect();
        for name in names.keys() {
            group.bench_function(*name, |b| {
                b.iter_custom(|n| {
                    let mut sum = Duration::ZERO;
                    for _ in 0..n {
                        let times = engine.device().profile(id).unwrap_or_default();
                        let of = plan.steps.iter().zip(times).filter(|(s, _)| s.op.name() == *name);
                        sum += of.map(|(_, t)| t).sum::<Duration>();
                    }
                    sum
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, steps, ops);
criterion_main!(benches);
