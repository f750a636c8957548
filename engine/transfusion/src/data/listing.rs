//! What a folder or a `.jsonl` file says there is, before any picture is decoded.
use super::open::Skipped;
use crate::{
    error::{Error, Result},
    picture::read_at_most,
};
use serde::Deserialize;
use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    path::{Component, Path, PathBuf},
};

/// Bytes of a line or of a caption file; longer ones are skipped.
const LONGEST: u64 = 16 << 20;

/// A list of captioned pictures, at the top of a folder.
const METADATA: &str = "metadata.jsonl";

/// A document whose pictures are still files.
pub(super) struct Listed {
    /// Where it is described.
    pub(super) at: String,
    pub(super) parts: Vec<ListedPart>,
}

pub(super) enum ListedPart {
    Text(String),
    Image(PathBuf),
}

/// Documents found so far, and what had to be left out.
#[derive(Default)]
pub(super) struct Listing {
    pub(super) documents: Vec<Listed>,
    pub(super) skipped: Vec<Skipped>,
}

/// The files of a folder, each list sorted by name as bytes.
#[derive(Default)]
struct Files {
    pictures: Vec<PathBuf>,
    texts: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Captioned {
    file_name: String,
    text: String,
}

#[derive(Deserialize)]
struct Interleaved {
    parts: Vec<InterleavedPart>,
}

#[derive(Deserialize)]
struct InterleavedPart {
    text: Option<String>,
    image: Option<String>,
}

impl Listing {
    /// Lists a folder: the captioned pictures of its `metadata.jsonl`, or else its pictures with a
    /// `.txt` of the same name beside them. Where there is no picture but text, returns the text files.
    pub(super) fn folder(&mut self, folder: &Path) -> Result<Vec<PathBuf>> {
        let metadata = folder.join(METADATA);
        if metadata.symlink_metadata().is_ok() {
            self.metadata(folder, &metadata)?;
            return Ok(Vec::new());
        }
        let files = self.walk(folder)?;
        if files.pictures.is_empty() && files.texts.is_empty() {
            let why = format!("holds neither {METADATA}, nor .png or .jpg pictures, nor .txt files");
            return Err(Error::file(folder, why));
        }
        if files.pictures.is_empty() {
            return Ok(files.texts);
        }
        for picture in files.pictures {
            let sidecar = picture.with_extension("txt");
            let caption = read_at_most(&sidecar, LONGEST).and_then(|bytes| caption(&bytes));
            match caption {
                Ok(text) => self.documents.push(Listed {
                    at: picture.display().to_string(),
                    parts: vec![ListedPart::Text(text), ListedPart::Image(picture)],
                }),
                Err(why) => self.skip(&picture, format!("no caption in {}: {why}", sidecar.display())),
            }
        }
        Ok(Vec::new())
    }

    /// Lists the lines `{"file_name": ..., "text": ...}` of a folder's `metadata.jsonl`.
    fn metadata(&mut self, folder: &Path, file: &Path) -> Result<()> {
        let mut first = HashMap::new();
        self.each_line(file, |number, line| {
            let Captioned { file_name, text } = serde_json::from_str(line).map_err(plain)?;
            let picture = within(folder, &file_name)?;
            let text = caption(text.as_bytes())?;
            match first.insert(picture.clone(), number) {
                None => Ok(vec![ListedPart::Text(text), ListedPart::Image(picture)]),
                Some(earlier) => Err(format!(
                    "{file_name:?} is on line {earlier} too; for several captions use a .jsonl of documents"
                )),
            }
        })
    }

    /// Lists the lines `{"parts": [{"text": ...}, {"image": ...}, ...]}` of a `.jsonl` file; the
    /// pictures' paths begin at the file's folder.
    pub(super) fn interleaved(&mut self, file: &Path) -> Result<()> {
        let folder = file.parent().unwrap_or(Path::new(""));
        self.each_line(file, |_, line| {
            let Interleaved { parts } = serde_json::from_str(line).map_err(|e| {
                let captioned = line.contains("\"file_name\"");
                plain(e) + if captioned { "; of captioned pictures name the folder" } else { "" }
            })?;
            let listed = parts.into_iter().map(|part| match (part.text, part.image) {
                (Some(text), None) => Ok(ListedPart::Text(text)),
                (None, Some(image)) => within(folder, &image).map(ListedPart::Image),
                _ => Err("a part has either \"text\" or \"image\"".into()),
            });
            let mut listed = listed.collect::<std::result::Result<Vec<_>, String>>()?;
            listed.retain(|part| !matches!(part, ListedPart::Text(text) if text.is_empty()));
            if listed.is_empty() { Err("the document is empty".into()) } else { Ok(listed) }
        })
    }

    /// Turns every line that is not blank, given with its number from 1, into a document or a skip.
    fn each_line(
        &mut self,
        file: &Path,
        mut parse: impl FnMut(u64, &str) -> std::result::Result<Vec<ListedPart>, String>,
    ) -> Result<()> {
        let refuse = |e: std::io::Error| Error::file(file, e);
        let mut reader = BufReader::new(File::open(file).map_err(refuse)?);
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            if reader.by_ref().take(LONGEST + 1).read_until(b'\n', &mut line).map_err(refuse)? == 0 {
                break;
            }
            let cut = line.len() as u64 > LONGEST && !line.ends_with(b"\n");
            if cut {
                reader.skip_until(b'\n').map_err(refuse)?;
            }
            let bytes = line.strip_prefix(b"\xef\xbb\xbf").filter(|_| number == 1).unwrap_or(&line);
            let parts = match std::str::from_utf8(bytes).map(str::trim) {
                _ if cut => Err(format!("longer than {} MiB", LONGEST >> 20)),
                Ok("") => continue,
                Ok(text) => parse(number, text),
                Err(_) => Err("not UTF-8".into()),
            };
            let at = format!("{}:{number}", file.display());
            match parts {
                Ok(parts) => self.documents.push(Listed { at, parts }),
                Err(why) => self.skipped.push(Skipped { at, why }),
            }
        }
        Ok(())
    }

    pub(super) fn skip(&mut self, path: &Path, why: impl Into<String>) {
        self.skipped.push(Skipped { at: path.display().to_string(), why: why.into() });
    }

    /// The files below a folder. A folder that links lead to twice is entered once, hidden ones never.
    fn walk(&mut self, folder: &Path) -> Result<Files> {
        let mut entered = HashSet::new();
        let mut files = Files::default();
        let mut open = vec![folder.to_path_buf()];
        while let Some(folder) = open.pop() {
            match entries(&folder, &mut entered) {
                Ok(entries) => {
                    for path in entries {
                        match fs::metadata(&path) {
                            Ok(meta) if meta.is_dir() => open.push(path),
                            Ok(_) => files.add(path),
                            Err(e) => self.skip(&path, e.to_string()),
                        }
                    }
                }
                Err(e) if entered.is_empty() => return Err(Error::file(folder, e)),
                Err(e) => self.skip(&folder, e.to_string()),
            }
        }
        files.pictures.sort_by(|a, b| bytes(a).cmp(bytes(b)));
        files.texts.sort_by(|a, b| bytes(a).cmp(bytes(b)));
        Ok(files)
    }
}

/// What a folder holds in the order of names; nothing where it was entered before.
fn entries(folder: &Path, entered: &mut HashSet<PathBuf>) -> std::io::Result<Vec<PathBuf>> {
    let home = folder.canonicalize()?;
    let entries = fs::read_dir(folder)?;
    if !entered.insert(home) {
        return Ok(Vec::new());
    }
    let mut paths: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    paths.retain(|path| path.file_name().is_some_and(|name| !name.as_encoded_bytes().starts_with(b".")));
    // The last pushed is entered first.
    paths.sort_by(|a, b| bytes(b).cmp(bytes(a)));
    Ok(paths)
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_encoded_bytes()
}

impl Files {
    fn add(&mut self, path: PathBuf) {
        match extension(&path).as_str() {
            "png" | "jpg" | "jpeg" => self.pictures.push(path),
            "txt" => self.texts.push(path),
            _ => {}
        }
    }
}

/// The end of a file's name in small letters, without the dot.
pub(super) fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// A path inside of `folder`, as data may name it.
fn within(folder: &Path, name: &str) -> std::result::Result<PathBuf, String> {
    let inside = |c| matches!(c, Component::Normal(_) | Component::CurDir);
    if name.is_empty() || name.contains('\0') || !Path::new(name).components().all(inside) {
        return Err(format!("{name:?} does not name a file inside of the data's folder"));
    }
    Ok(folder.join(name))
}

fn caption(bytes: &[u8]) -> std::result::Result<String, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "the caption is not UTF-8")?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text).trim();
    if text.is_empty() { Err("the caption is empty".into()) } else { Ok(text.to_owned()) }
}

fn plain(e: serde_json::Error) -> String {
    let why = e.to_string();
    let place = format!(" at line {} column {}", e.line(), e.column());
    format!("not as expected: {}", why.strip_suffix(&place).unwrap_or(&why))
}
