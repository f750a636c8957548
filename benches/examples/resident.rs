//! What a training step really takes: `cargo run --release -p transfusion-benches --example resident -- PRESET
//! [KEY=VALUE...]` trains two steps on the CPU and prints how far resident memory grew, beside the bytes that
//! the plan says. Linux only: it reads /proc/self/status.
use std::{error::Error, fs};
use transfusion::{
    batch::Batch,
    engine::{Engine, cpu},
    footprint::{Footprint, Step},
    run::{RunConfig, geometry},
    train::Trainer,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let mut config = RunConfig::preset(&args.next().unwrap_or_else(|| "text-tiny".into()))?;
    for setting in args {
        let (key, value) = setting.split_once('=').ok_or("settings are written KEY=VALUE")?;
        config.set(key, value)?;
    }
    let planned = Footprint::new(&Step::new(&config, None)?, 0);
    let before = resident("VmRSS")?;
    let engine = Engine::initialised(config.model.clone(), cpu(0)?, 1)?;
    let mut trainer = Trainer::new(engine, config.train.clone())?;
    let batch = full(&mut trainer);
    let host: usize = 4 * (batch.images.len() + 4 * batch.tokens.len() + 2 * batch.text_rows.len());
    for _ in 0..2 {
        trainer.step(std::slice::from_ref(&batch))?;
    }
    let grown = resident("VmHWM")? - before;
    for (name, bytes) in planned.bytes() {
        println!("{name:12}{bytes:>14}");
    }
    println!("{:12}{:>14}", "planned", planned.total());
    println!("{:12}{grown:>14}  {host} of it the batch on the host", "grown");
    println!("{:12}{:>13.2}%", "apart", 100.0 * (grown as f64 / planned.total() as f64 - 1.0));
    Ok(())
}

/// A batch whose every position predicts the next, in one document to a row, without images.
fn full(trainer: &mut Trainer) -> Batch {
    let capacity = trainer.capacity();
    let mut batch = Batch::new(geometry(trainer.engine().config(), capacity));
    for row in 0..capacity.rows {
        for at in 0..capacity.positions {
            let n = row * capacity.positions + at;
            (batch.tokens[n], batch.positions[n]) = ((n * 31 % 256) as i32, at as i32);
            batch.row_end[n] = at as i32 + 1;
            (batch.text_rows[n], batch.targets[n]) = (n as i32, (n * 17 % 256) as i32);
        }
    }
    batch.text_count = capacity.text_rows;
    batch
}

/// A line of /proc/self/status, in bytes.
fn resident(line: &str) -> Result<u64, Box<dyn Error>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix(line)).ok_or("no such line")?;
    let kib: u64 = line.trim_matches(|c: char| !c.is_ascii_digit()).parse()?;
    Ok(kib * 1024)
}
