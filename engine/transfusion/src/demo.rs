//! The demonstration: a small model learns to draw the built-in shapes from captions and to caption
//! them, and is then examined on combinations of size, colour and shape that it never saw.
use crate::{
    config::ModelConfig,
    data::{
        Part,
        shapes::{self, Scene, Score, Split},
    },
    engine::Engine,
    error::{Error, Result},
    picture::Picture,
    report,
    run::{Run, RunConfig, RunEvent},
    run_dir::write_atomic,
    run_report,
    sample::{Cancel, Goal, SampleOptions, sample},
};
use serde::Serialize;
use std::{fmt, path::PathBuf, sync::Arc, time::Instant};
use transfusion_core::device::Device;

/// Captions, and pictures, of the examination.
const EXAMINED: u64 = 128;

/// The list from which the examination takes its scenes.
const EXAMINATION_SEED: u64 = 0x0065_7861_6d00;

/// The model of the demonstration.
const PRESET: &str = "tiny";

/// The model of the demonstration.
///
/// # Errors
/// None that a user can cause.
pub fn model() -> Result<ModelConfig> {
    ModelConfig::preset(PRESET)
}

/// What to demonstrate.
#[derive(Clone, Debug)]
pub struct DemoOptions {
    /// A new run directory.
    pub out: PathBuf,
    /// Seed of everything but the examination's scenes.
    pub seed: u64,
}

/// What happens during the demonstration.
#[derive(Clone, Debug)]
pub enum DemoEvent {
    /// Something happened in the training run.
    Run(RunEvent),
    /// Another stage begins.
    Stage(String),
}

/// What the examination found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Share of the objects whose drawn colour is right.
    pub colour: f64,
    /// Share of the objects whose drawn shape is right.
    pub shape: f64,
    /// Share of the pictures whose caption is right to the letter.
    pub caption: f64,
    /// The same pictures held against the captions of others: what chance gives.
    pub colour_shuffled: f64,
    /// As `colour_shuffled`.
    pub shape_shuffled: f64,
    /// Share of true pictures that the reader of the pictures reads right.
    pub reader: f64,
    /// Captions and pictures examined, of combinations never trained on.
    pub examined: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Seed.
    pub seed: u64,
    /// Wall-clock time of all, seconds.
    pub seconds: f64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |x: f64| format!("{:5.1} %", 100.0 * x);
        writeln!(f, "{} combinations that were never trained on:", self.examined)?;
        writeln!(f, "                       right     shuffled captions")?;
        writeln!(f, "colours drawn        {}     {}", percent(self.colour), percent(self.colour_shuffled))?;
        writeln!(f, "shapes drawn         {}     {}", percent(self.shape), percent(self.shape_shuffled))?;
        writeln!(f, "captions written     {}", percent(self.caption))?;
        writeln!(f, "(the reader of the pictures reads {} of true ones right)", percent(self.reader).trim())?;
        write!(f, "{} steps, {:.0} seconds in all", self.steps, self.seconds)
    }
}

/// Trains, examines, and leaves a run directory with `report.html`, `drawn.png`, `captioned.png` and
/// `summary.json`.
///
/// # Errors
/// If the directory holds something already, or as training and sampling.
pub fn run(
    options: &DemoOptions,
    device: Box<dyn Device>,
    observe: &mut dyn FnMut(DemoEvent),
    cancel: Cancel<'_>,
) -> Result<Summary> {
    let start = Instant::now();
    let mut config = RunConfig::preset(PRESET)?;
    config.data.paths = vec!["shapes".into()];
    config.train.seed = options.seed;
    observe(DemoEvent::Stage("training".into()));
    let mut each = |event| observe(DemoEvent::Run(event));
    let mut run = Run::create(config.clone(), &options.out, None, device, &mut each)?;
    run.train(&mut each, cancel)?;

    observe(DemoEvent::Stage(format!("drawing and captioning {EXAMINED} combinations never seen")));
    let seen = examine(run.engine(), options.seed, cancel)?;
    let summary = Summary {
        steps: config.train.steps,
        seed: options.seed,
        seconds: start.elapsed().as_secs_f64(),
        ..judge(&seen)
    };
    publish(&run, &seen, &summary)?;
    Ok(summary)
}

/// What a model drew and wrote.
#[derive(Clone, Debug)]
pub struct Examination {
    /// A picture for each caption.
    pub drawn: Vec<Picture>,
    /// A caption for each picture.
    pub captions: Vec<String>,
}

/// Lets a model draw from captions, and caption pictures, of combinations that it never saw.
///
/// # Errors
/// As [`sample`].
pub fn examine(engine: &mut Engine, seed: u64, cancel: Cancel<'_>) -> Result<Examination> {
    Ok(Examination { drawn: draw(engine, seed, cancel)?, captions: describe(engine, seed, cancel)? })
}

/// The scenes of the examination.
fn scenes() -> impl Iterator<Item = (Scene, Picture)> {
    (0..EXAMINED).map(|i| shapes::example(EXAMINATION_SEED, Split::HeldOut, i))
}

/// One picture for each caption.
fn draw(engine: &mut Engine, seed: u64, cancel: Cancel<'_>) -> Result<Vec<Picture>> {
    let prompts: Vec<Vec<Part>> = scenes().map(|(s, _)| vec![Part::Text(s.caption().into_bytes())]).collect();
    let options = SampleOptions { goal: Goal::Image, steps: 30, seed, ..SampleOptions::default() };
    let drawn = sample(engine, &prompts, &options, &mut |_| (), cancel)?;
    let picture = |parts: Vec<Part>| match parts.into_iter().next() {
        Some(Part::Image(picture)) => Ok(picture.as_ref().clone()),
        _ => Err(Error::Training("the model drew nothing".into())),
    };
    drawn.into_iter().map(picture).collect()
}

/// One caption for each picture.
fn describe(engine: &mut Engine, seed: u64, cancel: Cancel<'_>) -> Result<Vec<String>> {
    let prompts: Vec<Vec<Part>> = scenes().map(|(_, p)| vec![Part::Image(Arc::new(p))]).collect();
    let options =
        SampleOptions { goal: Goal::Text, temperature: 0.0, max_text: 64, seed, ..SampleOptions::default() };
    let written = sample(engine, &prompts, &options, &mut |_| (), cancel)?;
    let text = |parts: Vec<Part>| match parts.into_iter().next() {
        Some(Part::Text(text)) => String::from_utf8_lossy(&text).into_owned(),
        _ => String::new(),
    };
    Ok(written.into_iter().map(text).collect())
}

/// Scores drawings and captions; steps, seed and seconds are the caller's.
pub fn judge(seen: &Examination) -> Summary {
    let Examination { drawn, captions } = seen;
    let truth: Vec<(Scene, Picture)> = scenes().collect();
    let read: Vec<Option<Scene>> = drawn.iter().map(Scene::read).collect();
    let score = |shift: usize| {
        let mut sum = Score::default();
        for (i, (scene, _)) in truth.iter().enumerate() {
            sum += Score::of(scene, read[(i + shift) % read.len()].as_ref());
        }
        let share = |right: usize| right as f64 / sum.objects.max(1) as f64;
        (share(sum.colours_right), share(sum.shapes_right))
    };
    let share = |right: usize| right as f64 / truth.len().max(1) as f64;
    let ((colour, shape), shuffled) = (score(0), score(2));
    Summary {
        colour,
        shape,
        caption: share(truth.iter().zip(captions).filter(|((s, _), c)| s.caption() == **c).count()),
        colour_shuffled: shuffled.0,
        shape_shuffled: shuffled.1,
        reader: share(truth.iter().filter(|(s, p)| Scene::read(p).as_ref() == Some(s)).count()),
        examined: truth.len() as u64,
        steps: 0,
        seed: 0,
        seconds: 0.0,
    }
}

/// Writes pictures, report and summary.
fn publish(run: &Run, seen: &Examination, summary: &Summary) -> Result<()> {
    let Examination { drawn, captions } = seen;
    const SHOWN: usize = 32;
    let path = run.dir().path();
    let truth: Vec<(Scene, Picture)> = scenes().collect();
    let asked: Vec<String> = truth.iter().map(|(s, _)| s.caption()).take(SHOWN).collect();
    let shown: Vec<Picture> = truth.iter().map(|(_, p)| p.clone()).take(SHOWN).collect();
    let drawings = Picture::grid(&drawn[..SHOWN.min(drawn.len())], 8, 2);
    let originals = Picture::grid(&shown, 8, 2);
    drawings.save(&path.join("drawn.png"))?;
    originals.save(&path.join("captioned.png"))?;
    let json = serde_json::to_string_pretty(summary).map_err(|e| Error::file(run.dir().summary(), e))?;
    write_atomic(&run.dir().summary(), json.as_bytes())?;

    let mut page = run_report::page(run.config(), run.dir(), None, run.progress())?;
    let percent = |x: f64| format!("{:.1} %", 100.0 * x);
    page.heading("Examination on combinations never trained on");
    page.figures(&[
        ("colours drawn right".into(), percent(summary.colour)),
        ("shapes drawn right".into(), percent(summary.shape)),
        ("captions right to the letter".into(), percent(summary.caption)),
        ("seconds in all".into(), format!("{:.0}", summary.seconds)),
    ]);
    page.table(
        "Beside chance",
        &["", "right", "with shuffled captions"],
        &[
            vec!["colours".into(), percent(summary.colour), percent(summary.colour_shuffled)],
            vec!["shapes".into(), percent(summary.shape), percent(summary.shape_shuffled)],
        ],
    );
    let picture = |grid: &Picture, captions: Vec<String>| -> Result<report::Picture> {
        Ok(report::Picture { png: grid.encode_png()?, captions })
    };
    page.pictures("Drawn from these captions", &[picture(&drawings, asked)?]);
    let written = captions.iter().take(SHOWN).cloned().collect();
    page.pictures("True pictures, captioned by the model", &[picture(&originals, written)?]);
    page.write(&run.dir().report())
}
