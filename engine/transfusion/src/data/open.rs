//! Opening what a user names: folders, files, and the built-in shapes.
use super::{
    listing::{Listed, ListedPart, Listing, extension},
    order::Holdout,
    shapes::{Shapes, Split},
    source::{Document, Documents, Mixture, Part, Shared},
    text::{Text, TextWindows, Windows},
};
use crate::{
    error::{Error, Result},
    picture::{Limits, Picture, read_at_most},
};
use std::{
    collections::HashMap,
    fmt,
    num::NonZero,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

/// The name of the built-in generator, where there is no file of that name.
const SHAPES: &str = "shapes";

/// Validation pictures of the built-in generator, where a fraction of its endless list is asked for.
const VALIDATION_SHAPES: u64 = 256;

/// How to open data.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Side to which pictures are cropped and resized.
    pub resolution: usize,
    /// Bytes of a window of text: one more than the positions of a row.
    pub window: usize,
    /// Seed of random windows, of the built-in pictures, and of mixing.
    pub seed: u64,
    /// Whether texts are seen through consecutive windows instead of random ones.
    pub consecutive: bool,
    /// What is kept for validation.
    pub holdout: Holdout,
    /// What one picture may cost.
    pub limits: Limits,
    /// Bytes that all pictures and texts may take in memory.
    pub budget: u64,
    /// Threads that decode pictures; 0 for as many as the machine has.
    pub threads: usize,
}

impl Default for OpenOptions {
    /// 32 pixels, windows of 257 bytes at random places, nothing held out, a budget of 8 GiB.
    fn default() -> Self {
        OpenOptions {
            resolution: 32,
            window: 257,
            seed: 0,
            consecutive: false,
            holdout: Holdout::Nothing,
            limits: Limits::default(),
            budget: 8 << 30,
            threads: 0,
        }
    }
}

/// Opened data.
pub struct Opened {
    /// What to train on, or all there is where nothing is held out.
    pub source: Shared,
    /// What to validate on; it always has an end.
    pub validation: Option<Shared>,
    /// What was found.
    pub report: Report,
}

/// Something that was left out, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Skipped {
    /// File, or file and line.
    pub at: String,
    /// The reason.
    pub why: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at, self.why)
    }
}

/// What was found when data was opened.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Report {
    /// Whether the built-in shapes are among the data.
    pub shapes: bool,
    /// Documents of folders and `.jsonl` files.
    pub documents: u64,
    /// Different pictures in them.
    pub pictures: u64,
    /// Text files.
    pub text_files: u64,
    /// Bytes in those.
    pub text_bytes: u64,
    /// Documents and files that could not be used.
    pub skipped: Vec<Skipped>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { shapes, documents, pictures, text_files, text_bytes, skipped } = self;
        let mut found = Vec::new();
        found.extend(shapes.then(|| "the built-in shapes".to_string()));
        found.extend((*documents > 0).then(|| format!("{documents} documents with {pictures} pictures")));
        found.extend((*text_files > 0).then(|| format!("{text_files} text files of {text_bytes} bytes")));
        found.extend((!skipped.is_empty()).then(|| format!("{} skipped", skipped.len())));
        f.write_str(&found.join(", "))?;
        let first = skipped.iter().take(10);
        first.enumerate().try_for_each(|(i, s)| write!(f, "{}{s}", if i == 0 { ": " } else { "; " }))
    }
}

impl Report {
    /// Refuses data of which more than one in a hundred had to be left out.
    fn judge(self) -> Result<Report> {
        let used = self.documents + self.text_files;
        let skipped = self.skipped.len() as u64;
        if skipped.saturating_mul(100) <= used + skipped {
            return Ok(self);
        }
        let first: Vec<String> = self.skipped.iter().take(10).map(Skipped::to_string).collect();
        Err(Error::Data(format!(
            "{skipped} of {} documents cannot be used, more than 1 %; mend or remove them: {}",
            used + skipped,
            first.join("; ")
        )))
    }
}

/// Opens each path - a folder of captioned pictures, a folder of `.txt` files, a `.txt`, a `.jsonl` of
/// documents, or the word `shapes` - decodes its pictures, and mixes the documents of all.
///
/// # Errors
/// [`Error::File`] for a path that cannot be opened, [`Error::Data`] where more than 1 % of the documents
/// cannot be used, where they do not fit into the budget, or where there is nothing to train on.
pub fn open<P: AsRef<Path>>(paths: &[P], options: &OpenOptions) -> Result<Opened> {
    let mut report = Report::default();
    let mut listing = Listing::default();
    let mut gathered = Gathered { options, train: Vec::new(), validation: Vec::new(), taken: 0 };
    let mut names = Vec::new();
    for path in paths.iter().map(AsRef::as_ref) {
        match Kind::of(path)? {
            Kind::Shapes => {
                report.shapes = true;
                gathered.shapes();
            }
            Kind::Text => gathered.text(path, &[path.to_path_buf()], &mut listing, &mut report)?,
            Kind::Interleaved => {
                listing.interleaved(path)?;
                names.push(path.display().to_string());
            }
            Kind::Folder => match listing.folder(path)? {
                texts if texts.is_empty() => names.push(path.display().to_string()),
                texts => gathered.text(path, &texts, &mut listing, &mut report)?,
            },
        }
    }
    let documents = gathered.documents(listing, &mut report)?;
    let report = report.judge()?;
    if !documents.is_empty() {
        let source = Arc::new(Documents::new(documents, names.join(", ")));
        let (train, validation) = options.holdout.split(source)?;
        gathered.train.push(train);
        gathered.validation.extend(validation);
    }
    if gathered.train.is_empty() {
        return Err(Error::Data("there is no document in the data; name a folder, a file, or shapes".into()));
    }
    let mix = |sources| -> Shared { Arc::new(Mixture::new(sources, options.seed)) };
    let validation = (!gathered.validation.is_empty()).then(|| mix(gathered.validation));
    Ok(Opened { source: mix(gathered.train), validation, report })
}

enum Kind {
    Shapes,
    Text,
    Interleaved,
    Folder,
}

impl Kind {
    fn of(path: &Path) -> Result<Kind> {
        let meta = match path.metadata() {
            Ok(meta) => meta,
            Err(_) if path == Path::new(SHAPES) => return Ok(Kind::Shapes),
            Err(e) => return Err(Error::file(path, e)),
        };
        if meta.is_dir() {
            return Ok(Kind::Folder);
        }
        match extension(path).as_str() {
            "txt" => Ok(Kind::Text),
            "jsonl" => Ok(Kind::Interleaved),
            "png" | "jpg" | "jpeg" => Err(Error::file(path, "one picture; name the folder that holds it")),
            _ => Err(Error::file(path, "data is a folder, a .txt file or a .jsonl file")),
        }
    }
}

/// Sources found so far.
struct Gathered<'a> {
    options: &'a OpenOptions,
    train: Vec<Shared>,
    validation: Vec<Shared>,
    /// Bytes of the budget that are used.
    taken: u64,
}

impl Gathered<'_> {
    fn shapes(&mut self) {
        let shapes = |split, count| Arc::new(Shapes { seed: self.options.seed, split, count });
        let count = match self.options.holdout {
            Holdout::Nothing => None,
            Holdout::Fraction(_) => Some(VALIDATION_SHAPES),
            Holdout::Last(n) => Some(n),
        };
        if count.is_some() {
            self.validation.push(shapes(Split::HeldOut, count));
        }
        self.train.push(shapes(Split::Train, None));
    }

    fn text(
        &mut self,
        path: &Path,
        files: &[PathBuf],
        listing: &mut Listing,
        report: &mut Report,
    ) -> Result<()> {
        let mut texts = Vec::new();
        for file in files {
            self.take(file.metadata().map_or(0, |meta| meta.len()), "texts")?;
            match read_at_most(file, self.options.budget) {
                Ok(text) if text.is_empty() => listing.skip(file, "the file is empty"),
                Ok(text) => texts.push(text),
                Err(why) => listing.skip(file, why),
            }
        }
        if texts.is_empty() {
            return Ok(());
        }
        report.text_files += texts.len() as u64;
        report.text_bytes += texts.iter().map(|t| t.len() as u64).sum::<u64>();
        let OpenOptions { window, seed, consecutive, holdout, .. } = *self.options;
        let (train, validation) = Text::new(path.display().to_string(), &texts).split(holdout)?;
        let windows = if consecutive { Windows::Consecutive } else { Windows::Random { seed } };
        self.train.push(Arc::new(TextWindows::new(train, window, windows)?));
        if let Some(text) = validation {
            self.validation.push(Arc::new(TextWindows::new(text, window, Windows::Consecutive)?));
        }
        Ok(())
    }

    /// Decodes the pictures of a listing; a document that lacks one is skipped.
    fn documents(&mut self, listing: Listing, report: &mut Report) -> Result<Vec<Document>> {
        let Listing { documents: listed, mut skipped } = listing;
        let mut pictures = Vec::new();
        let mut numbers = HashMap::new();
        for part in listed.iter().flat_map(|listed| &listed.parts) {
            if let ListedPart::Image(path) = part {
                numbers.entry(path.clone()).or_insert_with(|| {
                    pictures.push(path.clone());
                    pictures.len() - 1
                });
            }
        }
        let side = self.options.resolution as u64;
        self.take(side.saturating_mul(side).saturating_mul(3 * pictures.len() as u64), "pictures")?;
        let decoded = decode_all(&pictures, self.options);
        let mut documents = Vec::new();
        for Listed { at, parts } in listed {
            let part = |part| match part {
                ListedPart::Text(text) => Ok(Part::Text(text.into_bytes())),
                ListedPart::Image(path) => decoded[numbers[&path]].clone().map(Part::Image),
            };
            match parts.into_iter().map(part).collect() {
                Ok(parts) => documents.push(Document { parts, stream: false }),
                Err(why) => skipped.push(Skipped { at, why }),
            }
        }
        report.documents = documents.len() as u64;
        report.pictures = decoded.iter().filter(|picture| picture.is_ok()).count() as u64;
        report.skipped = skipped;
        Ok(documents)
    }

    fn take(&mut self, bytes: u64, what: &str) -> Result<()> {
        self.taken = self.taken.saturating_add(bytes);
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        let (taken, budget) = (self.taken, self.options.budget);
        if taken <= budget {
            return Ok(());
        }
        Err(Error::Data(format!(
            "with its {what} the data takes {:.2} GiB of memory, over the budget of {:.2} GiB; \
             lower the resolution, use less data, or raise the budget",
            gib(taken),
            gib(budget)
        )))
    }
}

type Decoded = std::result::Result<Arc<Picture>, String>;

/// The pictures as squares of the training resolution, or why not, in the order of their paths.
fn decode_all(paths: &[PathBuf], options: &OpenOptions) -> Vec<Decoded> {
    let threads = match options.threads {
        0 => thread::available_parallelism().map_or(1, NonZero::get),
        threads => threads,
    };
    let slots: Vec<OnceLock<Decoded>> = paths.iter().map(|_| OnceLock::new()).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((path, slot)) = {
            let i = next.fetch_add(1, Ordering::Relaxed);
            paths.get(i).zip(slots.get(i))
        } {
            let picture = Picture::load(path, &options.limits);
            let square = picture.map(|p| Arc::new(p.square(options.resolution))).map_err(|e| e.to_string());
            slot.get_or_init(|| square);
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.min(paths.len()) {
            scope.spawn(work);
        }
        work();
    });
    let lost = || Err("the picture was not decoded".into());
    slots.into_iter().map(|slot| slot.into_inner().unwrap_or_else(lost)).collect()
}

#[cfg(test)]
mod tests;
