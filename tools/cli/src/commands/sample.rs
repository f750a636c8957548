//! `transfusion sample`.
use crate::{
    console,
    failure::{Failure, Outcome},
    progress,
    settings::Machine,
};
use clap::{Args, ValueEnum, builder::PossibleValuesParser};
use serde_json::json;
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};
use transfusion::{
    config::{ModelConfig, Objective},
    data::Part,
    diffusion::Sampler,
    picture::{Limits, Picture},
    run,
    sample::{self, Cancel, Goal, SampleOptions},
};

/// Draw pictures from captions, write captions for pictures, or go on with a document.
///
/// A document begins with --image, then --prompt, as far as they are given; what follows is drawn by
/// the model. Texts are printed as well. A file that exists is never overwritten.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion sample runs/shapes --prompt \"a big circle in red\" --out circle.png
  transfusion sample runs/shapes --prompt \"a small square in blue\" --num 16 --cfg 5 --out grid.png
  transfusion sample runs/shapes --image photo.jpg --temperature 0 --out caption.txt
  transfusion sample runs/shapes --to any --num 4 --out documents/
  transfusion sample runs/book --prompt \"ROMEO:\" --max-text 500")]
pub(crate) struct Sample {
    /// Run directory, checkpoint, or exported folder.
    model: PathBuf,
    /// Text that the document begins with, after the --image.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    prompt: String,
    /// Picture (PNG or JPEG) that the document begins with; cropped and resized to the model's size.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// What to draw: one image, text, or what the model chooses [default: image, but text with --image
    /// or where the model has no images].
    #[arg(long, value_enum)]
    to: Option<To>,
    /// How many.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    num: u16,
    /// Denoising steps of an image.
    #[arg(long, value_name = "K", default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    steps: u16,
    /// Scale of classifier-free guidance; 1 is none.
    #[arg(long, value_name = "S", default_value_t = 3.0, value_parser = number)]
    cfg: f32,
    /// How images are denoised [default: ddim; euler for a model of flows].
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(Sampler::ALL.map(|(name, _)| name)))]
    sampler: Option<String>,
    /// Softens (above 1) or sharpens (below 1) the choice of tokens; 0 always takes the likeliest.
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = number)]
    temperature: f32,
    /// Only the likeliest K tokens; 0 is all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Only the likeliest tokens that together have probability P.
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = number)]
    top_p: f32,
    /// Most bytes of text after the prompt [default: as far as the model's positions reach].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    max_text: Option<u32>,
    /// Most images after the prompt, with --to any.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(0..=1024))]
    max_images: u16,
    /// Seed: the same one gives the same samples.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// A .png (a grid of them with --num), a .txt, or a folder, which gets sample-000.png,
    /// sample-000.txt, or with --to any documents.jsonl as `train` reads it. May be left out for text.
    #[arg(long, value_name = "PATH")]
    out: Option<PathBuf>,
    #[command(flatten)]
    machine: Machine,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum To {
    Image,
    Text,
    Any,
}

/// Where samples go.
enum Target {
    Nowhere,
    Png(PathBuf),
    Txt(PathBuf),
    Folder(PathBuf),
}

impl Sample {
    /// Samples and writes.
    pub(crate) fn run(self) -> Outcome {
        let known = self.to.or(self.image.as_ref().map(|_| To::Text));
        let early = known.map(|to| self.target(to)).transpose()?;
        let stop = console::interruption("stopping")?;
        let mut engine = run::load(&self.model, self.machine.open(|| run::model_config(&self.model))?)?;
        let to = known.unwrap_or(if engine.config().image().is_some() { To::Image } else { To::Text });
        let target = early.map_or_else(|| self.target(to), Ok)?;
        let prompt = self.document(engine.config())?;
        let options = self.options(engine.config(), to, &prompt)?;
        let mut progress = progress::Sampling::new();
        let prompts = vec![prompt.clone(); usize::from(self.num)];
        let mut observe = |event| progress.observe(&event);
        let drawn = sample::sample(&mut engine, &prompts, &options, &mut observe, Cancel(Some(&stop)));
        progress.finish();
        self.write(&target, to, &prompt, &drawn?)
    }

    /// Where samples go; refuses what exists, before any work is done.
    fn target(&self, to: To) -> Outcome<Target> {
        let Some(out) = self.out.clone() else {
            return match to {
                To::Text => Ok(Target::Nowhere),
                _ => {
                    Err(Failure::usage("--out is missing").hint("name a .png file or a folder for pictures"))
                }
            };
        };
        if out.is_dir() {
            let names = (0..self.num).flat_map(|i| [numbered(i, "png"), numbered(i, "txt")]);
            for name in names.chain([DOCUMENTS.to_string()]) {
                refuse_existing(&out.join(name))?;
            }
            return Ok(Target::Folder(out));
        }
        refuse_existing(&out)?;
        let extension = out.extension().map(|e| e.to_string_lossy().to_lowercase());
        match (extension.as_deref(), to) {
            (None, _) => Ok(Target::Folder(out)),
            (Some("png"), To::Image) => Ok(Target::Png(out)),
            (Some("txt"), To::Text) => Ok(Target::Txt(out)),
            _ => {
                let fit = match to {
                    To::Image => "a .png file or a folder",
                    To::Text => "a .txt file or a folder",
                    To::Any => "a folder",
                };
                let to = format!("{to:?}").to_lowercase();
                let why = format!("--out {} does not suit --to {to}", out.display());
                Err(Failure::usage(why).hint(format!("name {fit}")))
            }
        }
    }

    /// What every document begins with.
    fn document(&self, config: &ModelConfig) -> Outcome<Vec<Part>> {
        let mut parts = Vec::new();
        if let Some(path) = &self.image {
            let Some(image) = config.image() else {
                return Err(Failure::error(format!("{}: this model has no images", self.model.display()))
                    .hint("leave out --image, or choose a model that was trained on pictures"));
            };
            let picture = Picture::load(path, &Limits::default())?;
            parts.push(Part::Image(Arc::new(picture.square(image.size))));
        }
        if !self.prompt.is_empty() {
            parts.push(Part::Text(self.prompt.clone().into_bytes()));
        }
        Ok(parts)
    }

    fn options(&self, config: &ModelConfig, to: To, prompt: &[Part]) -> Outcome<SampleOptions> {
        let objective = config.image().map(|image| image.objective);
        let usual = if objective == Some(Objective::Flow) { Sampler::Euler } else { Sampler::Ddim };
        let named = |name: &String| Sampler::ALL.iter().find(|(known, _)| known == name).map(|(_, s)| *s);
        let left = config.max_position_embeddings.saturating_sub(length(prompt, config)).max(1);
        let options = SampleOptions {
            goal: match to {
                To::Image => Goal::Image,
                To::Text => Goal::Text,
                To::Any => Goal::Any,
            },
            steps: usize::from(self.steps),
            guidance: self.cfg,
            sampler: self.sampler.as_ref().and_then(named).unwrap_or(usual),
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            max_text: self.max_text.map_or(left, |n| n as usize),
            max_images: usize::from(self.max_images),
            seed: self.seed,
            ..SampleOptions::default()
        };
        options.check(objective)?;
        Ok(options)
    }

    fn write(&self, target: &Target, to: To, prompt: &[Part], drawn: &[Vec<Part>]) -> Outcome {
        if to != To::Image {
            texts(drawn).iter().try_for_each(|text| console::print(console::harmless(text)))?;
        }
        match target {
            Target::Nowhere => Ok(()),
            Target::Png(path) => write_png(path, &pictures(drawn)),
            Target::Txt(path) => create(path, (texts(drawn).join("\n") + "\n").as_bytes()),
            Target::Folder(path) => write_folder(path, to, prompt, drawn),
        }
    }
}

/// The file of interleaved documents.
const DOCUMENTS: &str = "documents.jsonl";

fn numbered(i: impl std::fmt::Display, extension: &str) -> String {
    format!("sample-{i:0>3}.{extension}")
}

/// Positions that a prompt takes, BOS included.
fn length(prompt: &[Part], config: &ModelConfig) -> usize {
    let patches = config.image().map_or(0, |image| image.patches());
    let of = |part: &Part| match part {
        Part::Text(text) => text.len(),
        Part::Image(_) => patches + 2,
    };
    1 + prompt.iter().map(of).sum::<usize>()
}

fn pictures(drawn: &[Vec<Part>]) -> Vec<Picture> {
    let picture = |part: &Part| match part {
        Part::Image(picture) => Some(picture.as_ref().clone()),
        Part::Text(_) => None,
    };
    drawn.iter().flatten().filter_map(picture).collect()
}

/// The text of every sample; its images leave a gap.
fn texts(drawn: &[Vec<Part>]) -> Vec<String> {
    let text = |part: &Part| match part {
        Part::Text(text) => String::from_utf8_lossy(text).into_owned(),
        Part::Image(_) => " [image] ".into(),
    };
    drawn.iter().map(|parts| parts.iter().map(text).collect()).collect()
}

fn write_png(path: &Path, pictures: &[Picture]) -> Outcome {
    let columns = (pictures.len() as f64).sqrt().ceil() as usize;
    let picture = match pictures {
        [one] => one.clone(),
        many => Picture::grid(many, columns, 2),
    };
    create(path, &picture.encode_png()?)
}

fn write_folder(folder: &Path, to: To, prompt: &[Part], drawn: &[Vec<Part>]) -> Outcome {
    fs::create_dir_all(folder)
        .map_err(|e| Failure::error(format!("{}: cannot be made: {e}", folder.display())))?;
    if to == To::Any {
        return write_documents(folder, prompt, drawn);
    }
    for (i, (text, parts)) in texts(drawn).iter().zip(drawn).enumerate() {
        match &pictures(std::slice::from_ref(parts))[..] {
            [picture] => create(&folder.join(numbered(i, "png")), &picture.encode_png()?)?,
            _ => create(&folder.join(numbered(i, "txt")), text.as_bytes())?,
        }
    }
    Ok(())
}

/// Whole documents, prompts included, in the format that training reads.
fn write_documents(folder: &Path, prompt: &[Part], drawn: &[Vec<Part>]) -> Outcome {
    let mut lines = String::new();
    for (i, parts) in drawn.iter().enumerate() {
        let mut listed = Vec::new();
        for (j, part) in prompt.iter().chain(parts).enumerate() {
            listed.push(match part {
                Part::Text(text) => json!({ "text": String::from_utf8_lossy(text) }),
                Part::Image(picture) => {
                    let name = numbered(format!("{i:03}-{j}"), "png");
                    create(&folder.join(&name), &picture.encode_png()?)?;
                    json!({ "image": name })
                }
            });
        }
        lines += &format!("{}\n", json!({ "parts": listed }));
    }
    create(&folder.join(DOCUMENTS), lines.as_bytes())
}

fn refuse_existing(path: &Path) -> Outcome {
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    let why = format!("{} exists and is never overwritten", path.display());
    Err(Failure::error(why).hint("choose another --out, or move it away"))
}

/// Writes a new file.
fn create(path: &Path, bytes: &[u8]) -> Outcome {
    let written = File::create_new(path).and_then(|mut file| file.write_all(bytes));
    written.map_err(|e| Failure::error(format!("{}: cannot be written: {e}", path.display())))
}

/// A number that is one.
fn number(text: &str) -> Result<f32, String> {
    let number: f32 = text.parse().map_err(|e| format!("{e}"))?;
    if number.is_finite() { Ok(number) } else { Err("it must be a finite number".into()) }
}
