//! Sampling inside an application: a callback sees every token and step, a flag stops it.
//!
//! `cargo run --release --example sample -- MODEL [PROMPT]`
use std::{path::Path, sync::atomic::AtomicBool};
use transfusion::{
    Error, Result,
    data::Part,
    engine, run,
    sample::{Cancel, Event, Goal, SampleOptions, sample},
};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let usage = || Error::Config("usage: sample MODEL [PROMPT]".into());
    let model = args.next().ok_or_else(usage)?;
    let prompt = args.next().unwrap_or_else(|| "a small square in blue".into());

    let mut engine = run::load(Path::new(&model), engine::cpu(0)?)?;
    let has_images = engine.config().image().is_some();
    let goal = if has_images { Goal::Image } else { Goal::Text };
    let options = SampleOptions { goal, steps: 20, max_text: 100, ..SampleOptions::default() };

    // Another thread may set this flag; sampling then ends with `Error::Cancelled`.
    let stop = AtomicBool::new(false);
    let mut observe = |event: Event| match event {
        Event::Token { token, .. } => eprint!("{token} "),
        Event::Denoised { step, of } => eprint!("\rdenoising {step}/{of}"),
        Event::Image { .. } => eprintln!(),
    };
    let prompts = [vec![Part::Text(prompt.clone().into_bytes())]];
    for part in sample(&mut engine, &prompts, &options, &mut observe, Cancel(Some(&stop)))?.remove(0) {
        match part {
            Part::Text(text) => println!("{prompt}{}", String::from_utf8_lossy(&text)),
            Part::Image(picture) => println!("{prompt}: {}x{} pixels", picture.width(), picture.height()),
        }
    }
    Ok(())
}
