//! What a training step takes of the machine, beside the bytes that its plan says.
#![cfg(target_os = "linux")]
use std::fs;
use transfusion::{
    engine::{Engine, cpu},
    footprint::{Footprint, Step},
    run::RunConfig,
    train::Trainer,
};
use transfusion_tests::{document, pack};

/// A line of /proc/self/status, in bytes.
fn status(line: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix(line)).unwrap();
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<u64>().unwrap() * 1024
}

/// Two layers of the preset of 0.16b parameters, in bf16: weights, masters, moments, arena, decoded operands and
/// packed factors each take a part that would be missed. The only test of its process, whose peak it reads.
#[test]
fn a_step_of_a_gigabyte_takes_what_its_plan_says() {
    let mut config = RunConfig::preset("0.16b").unwrap();
    let settings = [
        ("model.num_hidden_layers", "2"),
        ("train.rows", "2"),
        ("train.positions", "512"),
        ("train.images", "1"),
        // As the test pictures have.
        ("model.transfusion.image.channels", "3"),
    ];
    settings.into_iter().for_each(|(key, value)| config.set(key, value).unwrap());
    let planned = Footprint::new(&Step::new(&config, None).unwrap(), 2).total();
    assert!(planned > 1 << 30, "{planned} bytes");
    let before = status("VmRSS");
    let engine = Engine::initialised(config.model.clone(), cpu(2).unwrap(), 1).unwrap();
    let mut trainer = Trainer::new(engine, config.train.clone()).unwrap();
    let text = "What a training step takes. ".repeat(17);
    let documents = vec![document(&[&text], 1), document(&[&text], 2)];
    let batch = pack(&config.model, trainer.capacity(), documents);
    for _ in 0..2 {
        trainer.step(std::slice::from_ref(&batch)).unwrap();
    }
    let ratio = (status("VmHWM") - before) as f64 / planned as f64;
    assert!((0.95..1.05).contains(&ratio), "{ratio} of {planned} bytes");
}
