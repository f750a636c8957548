//! Where the time of a training step goes: `cargo run --release -p transfusion-benches --example profile
//! -- PRESET [THREADS] [STEPS]` prints the median of whole steps, then every op, fastest of all steps.
use std::{
    collections::BTreeMap,
    error::Error,
    time::{Duration, Instant},
};
use transfusion::{engine::Program, train::Trainer};
use transfusion_benches::training;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let preset = args.next().unwrap_or_else(|| "text-tiny".into());
    let threads = args.next().map_or(Ok(0), |a| a.parse())?;
    let steps: usize = args.next().map_or(Ok(50), |a| a.parse())?;
    let mut step = training(&preset, threads)?;
    let mut times = Vec::new();
    for _ in 0..steps.max(1) {
        let start = Instant::now();
        step.take()?;
        times.push(start.elapsed());
    }
    times.sort();
    println!("{preset}: step {:.2} ms (fastest {:.2})", ms(times[times.len() / 2]), ms(times[0]));
    let trainer = step.trainer();
    let loss = Program::Loss(trainer.capacity(), trainer.options().loss());
    let update = Program::Update(trainer.options().update());
    table(trainer, loss, steps)?;
    table(trainer, update, steps)
}

/// Every op of a program.
fn table(trainer: &mut Trainer, program: Program, steps: usize) -> Result<(), Box<dyn Error>> {
    let engine = trainer.engine();
    let (plan, id) = (engine.plan(program)?, engine.open(program)?);
    let mut fastest = vec![Duration::MAX; plan.steps.len()];
    for _ in 0..steps.max(1) {
        let times = engine.device().profile(id)?;
        fastest.iter_mut().zip(times).for_each(|(f, t)| *f = t.min(*f));
    }
    let mut ops: BTreeMap<&str, (usize, Duration, u64)> = BTreeMap::new();
    for (step, time) in plan.steps.iter().zip(&fastest) {
        let op = ops.entry(step.op.name()).or_default();
        *op = (op.0 + 1, op.1 + *time, op.2 + step.cost.flops);
    }
    let mut ops: Vec<_> = ops.into_iter().collect();
    ops.sort_by_key(|(_, (_, time, _))| std::cmp::Reverse(*time));
    println!("{:20} {:>5} {:>9} {:>8}", "op", "times", "ms", "GFLOP/s");
    for (name, (n, time, flops)) in &ops {
        println!("{name:20} {n:5} {:9.3} {:8.1}", ms(*time), *flops as f64 / time.as_secs_f64() / 1e9);
    }
    println!("{:20} {:5} {:9.3}", "all", plan.steps.len(), ms(fastest.iter().sum()));
    Ok(())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
