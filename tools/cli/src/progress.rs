//! Progress of a training or a sampling: a bar on a terminal, plain lines elsewhere.
use crate::console::{self, count, duration, note};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::{IsTerminal, stderr},
    time::{Duration, Instant},
};
use transfusion::{
    run::{Comparison, RunEvent},
    sample::Event,
    train::{Evaluation, StepReport},
};

/// Longest silence of a training that is no terminal's.
const SILENCE: Duration = Duration::from_secs(20);

/// A bar on stderr, where that is a terminal.
fn bar(length: u64) -> Option<ProgressBar> {
    let style = ProgressStyle::with_template("[{bar:30}] {pos}/{len}  {msg}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
    let bar = || ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr()).with_style(style);
    stderr().is_terminal().then(bar)
}

/// What is shown of a training.
pub(crate) struct Training {
    bar: Option<ProgressBar>,
    /// Where it began, and how far it goes.
    first: u64,
    of: u64,
    images: bool,
    started: Instant,
    said: Instant,
    tokens: usize,
}

impl Training {
    /// Nothing has happened yet.
    pub(crate) fn new() -> Training {
        let now = Instant::now();
        Training { bar: None, first: 0, of: 0, images: false, started: now, said: now, tokens: 0 }
    }

    /// Shows what happened.
    pub(crate) fn observe(&mut self, event: &RunEvent) {
        match event {
            RunEvent::Data(found) => self.say(format!("data: {found}")),
            RunEvent::Start { step, of, parameters } => self.start(*step, *of, *parameters),
            RunEvent::Step(report) => self.step(report),
            RunEvent::Validation { step, evaluation } => self.say(validation(*step, evaluation)),
            RunEvent::Comparing => {
                self.say("comparing with the best linear denoiser of the same pictures".into())
            }
            RunEvent::Comparison(errors) => self.say(comparison(errors)),
            RunEvent::Grid(path) => self.say(format!("samples: {}", path.display())),
            RunEvent::Checkpoint(path) => self.say(format!("checkpoint: {}", path.display())),
        }
    }

    /// Another stage begins: what the last one showed is over.
    pub(crate) fn stage(&mut self, stage: &str) {
        self.finish();
        note(stage);
    }

    /// Removes the bar.
    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn say(&self, text: String) {
        match &self.bar {
            Some(bar) => bar.suspend(|| note(text)),
            None => note(text),
        }
    }

    fn start(&mut self, step: u64, of: u64, parameters: usize) {
        let whence = if step == 0 { String::new() } else { format!(", from step {step}") };
        self.say(format!("model: {} parameters; {of} steps{whence}", count(parameters as f64)));
        (self.first, self.of, self.started) = (step, of, Instant::now());
        self.said = self.started;
        self.bar = bar(of);
    }

    fn step(&mut self, r: &StepReport) {
        self.tokens += r.tokens;
        self.images |= r.images > 0;
        if let Some(bar) = &self.bar {
            bar.set_message(self.line(r));
            bar.set_position(r.step);
        } else if r.skipped || r.step == self.first + 1 || self.is_due(r.step) {
            self.said = Instant::now();
            note(format!("step {} of {}: {}", r.step, self.of, self.line(r)));
        }
    }

    fn is_due(&self, step: u64) -> bool {
        step == self.of || step.is_multiple_of((self.of / 20).max(1)) || self.said.elapsed() > SILENCE
    }

    fn line(&self, r: &StepReport) -> String {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-9);
        let done = (r.step - self.first) as f64;
        let left = seconds / done.max(1.0) * self.of.saturating_sub(r.step) as f64;
        let rate = count(self.tokens as f64 / seconds);
        let mut line = format!("loss {:.4}", r.loss);
        if self.images {
            line += &format!(" (text {:.4}, image {:.4})", r.loss_text, r.loss_image);
        }
        let skipped = if r.skipped { ", skipped: its gradient is not finite" } else { "" };
        format!("{line}, {rate} tokens/s, {} left{skipped}", duration(left))
    }
}

/// A validation in a line.
fn validation(step: u64, e: &Evaluation) -> String {
    let text = e.nats_per_token().map(|nats| format!("text {nats:.4} nats per token"));
    let image = e.image_error().map(|error| format!("image {error:.4} mean squared error"));
    let found: Vec<String> = text.into_iter().chain(image).collect();
    let levels: Vec<String> = e.by_level().iter().flatten().map(|e| format!("{e:.4}")).collect();
    let levels =
        if levels.len() > 1 { format!("; by noise level {}", levels.join(" ")) } else { String::new() };
    format!("validation after step {step}: {}{levels}", found.join(", "))
}

/// Two lines of errors, by noise level.
fn comparison(errors: &Comparison) -> String {
    let one = |e: &Option<f64>| e.map_or("     -".to_owned(), |e| format!("{e:.4}"));
    let line = |errors: &[Option<f64>; 10]| errors.iter().map(one).collect::<Vec<_>>().join(" ");
    format!(
        "image error by noise level  {}\n     best linear denoiser  {}",
        line(&errors.model),
        line(&errors.linear)
    )
}

/// What is shown of a sampling: a bar of its denoising steps, on a terminal only.
pub(crate) struct Sampling {
    bar: Option<ProgressBar>,
    tokens: usize,
}

impl Sampling {
    /// Nothing has happened yet.
    pub(crate) fn new() -> Sampling {
        Sampling { bar: bar(0), tokens: 0 }
    }

    /// Shows what happened.
    pub(crate) fn observe(&mut self, event: &Event) {
        let Some(bar) = &self.bar else { return };
        match event {
            Event::Denoised { step, of } => {
                bar.set_length(*of as u64);
                bar.set_position(*step as u64);
            }
            Event::Token { .. } => self.tokens += 1,
            Event::Image { .. } => {}
        }
        bar.set_message(format!("{} tokens", console::count(self.tokens as f64)));
    }

    /// Removes the bar.
    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
