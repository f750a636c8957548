//! Named tensors and texts <-> a directory that is there whole or not at all.
//!
//! A [`Writer`] fills a sibling folder `NAME.tmp-PID`, makes it durable and renames it, so that a crash
//! at any moment leaves the checkpoints that were complete before it. `manifest.json` is written last:
//! the size and CRC32 of every file and of every tensor, and its own CRC32 in its last line.
//! [`Checkpoint::open`] reads all of it back before anything is believed; [`newest`] picks the last one
//! that passes. The tensors are in ordinary safetensors files, which [`weights`] reads and writes.
use crate::{
    error::{Error, Result},
    tensor::{Host, Spec, ViewMut},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};
use weights::{Weights, cannot_write, check_file_name, emit, open_plain, read_text, temporary};

#[cfg(test)]
mod tests;
pub mod weights;

const MANIFEST: &str = "manifest.json";
const VERSION: u32 = 1;
const REMEDY: &str = "use an older checkpoint";
const OVERWRITE: &str = "exists and is never overwritten; choose another name";

/// What a checkpoint should hold.
#[derive(Serialize, Deserialize)]
struct Manifest {
    version: u32,
    files: Vec<Listed>,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Listed {
    name: String,
    bytes: u64,
    crc32: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<ListedTensor>,
}

/// One tensor of a safetensors file.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct ListedTensor {
    name: String,
    crc32: String,
}

fn hex(crc32: u32) -> String {
    format!("{crc32:08x}")
}

/// The last line of a manifest and the brace after it, given all that precedes them.
fn seal(body: &str) -> String {
    format!("  \"crc32\": \"{}\"\n}}\n", hex(crc32fast::hash(body.as_bytes())))
}

impl Manifest {
    fn to_text(&self) -> serde_json::Result<String> {
        let json = serde_json::to_string_pretty(self)?;
        let body = format!("{},\n", json.trim_end_matches('}').trim_end());
        Ok(format!("{body}{}", seal(&body)))
    }

    /// Reads and checks `dir/manifest.json`.
    fn read(dir: &Path) -> Result<Manifest> {
        let path = dir.join(MANIFEST);
        if !path.exists() {
            return Err(Error::file(path, format!("is missing: no complete checkpoint; {REMEDY}")));
        }
        let text = read_text(&path)?;
        let body = text.len().checked_sub(seal("").len()).and_then(|n| text.get(..n));
        if body.is_none_or(|body| text[body.len()..] != seal(body)) {
            return Err(Error::file(path, format!("is damaged: wrong CRC32; {REMEDY}")));
        }
        let manifest: Manifest = serde_json::from_str(&text)
            .map_err(|e| Error::file(&path, format!("{e}; it was not written by this program")))?;
        if manifest.version != VERSION {
            let why = format!("has version {}; use the program that wrote it", manifest.version);
            return Err(Error::file(path, why));
        }
        let mut names = BTreeSet::from([MANIFEST]);
        for file in &manifest.files {
            check_file_name(&file.name).map_err(|why| Error::file(&path, why))?;
            if !names.insert(&file.name) {
                return Err(Error::file(&path, format!("lists {} twice; {REMEDY}", file.name)));
            }
        }
        Ok(manifest)
    }
}

/// A checkpoint that is being written; dropped before [`Writer::commit`] it leaves nothing.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    temporary: PathBuf,
    files: Vec<Listed>,
    /// Held while this process writes, so that [`remove_strays`] of another one spares the folder.
    _lock: Option<File>,
}

impl Writer {
    /// Begins a checkpoint that will be the directory `dir`; makes the folders above it.
    ///
    /// # Errors
    /// `dir` exists, or cannot be made.
    pub fn create(dir: impl Into<PathBuf>) -> Result<Writer> {
        let dir = dir.into();
        if dir.file_name().is_none() || dir.symlink_metadata().is_ok() {
            return Err(Error::file(dir, OVERWRITE));
        }
        let temporary = temporary(&dir);
        if temporary.exists() {
            remove(&temporary)?;
        }
        fs::create_dir_all(&temporary)
            .map_err(|e| Error::file(&temporary, format!("cannot be made: {e}; check the permissions")))?;
        let lock = File::open(&temporary).ok().filter(|folder| folder.try_lock().is_ok());
        Ok(Writer { dir, temporary, files: Vec::new(), _lock: lock })
    }

    /// Adds the safetensors file `name`. `read` fills the elements of one tensor, given its name; one
    /// tensor is in memory at a time.
    ///
    /// # Errors
    /// A file name that is taken, unsafe or does not end in `.safetensors`, a tensor name that is taken, what `read` returns, and
    /// whatever the file system refuses.
    pub fn tensors(
        &mut self,
        name: &str,
        tensors: &[(&str, Spec)],
        read: impl FnMut(&str, ViewMut<'_>) -> Result<()>,
    ) -> Result<()> {
        if !is_weights(name) {
            return Err(Error::file(self.temporary.join(name), "holds tensors; let it end in .safetensors"));
        }
        let (path, mut file) = self.begin(name)?;
        let emitted = emit(&mut file, &path, tensors, read)?;
        file.sync_all().map_err(|e| cannot_write(&path, &e))?;
        let listed = |(name, crc32)| ListedTensor { name, crc32: hex(crc32) };
        self.files.push(Listed {
            name: name.to_owned(),
            bytes: emitted.bytes,
            crc32: hex(emitted.crc32),
            tensors: emitted.tensors.into_iter().map(listed).collect(),
        });
        Ok(())
    }

    /// Adds the text file `name`.
    ///
    /// # Errors
    /// A name that is taken, unsafe or ends in `.safetensors`, and whatever the file system refuses.
    pub fn text(&mut self, name: &str, text: &str) -> Result<()> {
        if is_weights(name) {
            return Err(Error::file(self.temporary.join(name), "holds text; let it end in .json or .txt"));
        }
        self.put(name, text)?;
        let crc32 = hex(crc32fast::hash(text.as_bytes()));
        self.files.push(Listed {
            name: name.to_owned(),
            bytes: text.len() as u64,
            crc32,
            tensors: Vec::new(),
        });
        Ok(())
    }

    /// Makes all of it durable and gives it its name.
    ///
    /// # Errors
    /// Whatever the file system refuses; `dir` has come to exist meanwhile.
    pub fn commit(mut self) -> Result<()> {
        let manifest = Manifest { version: VERSION, files: std::mem::take(&mut self.files) };
        let text = manifest.to_text().map_err(|e| Error::file(&self.dir, e))?;
        self.put(MANIFEST, &text)?;
        sync_folder(&self.temporary)?;
        if self.dir.symlink_metadata().is_ok() {
            return Err(Error::file(&self.dir, OVERWRITE));
        }
        fs::rename(&self.temporary, &self.dir)
            .map_err(|e| Error::file(&self.dir, format!("cannot be made: {e}")))?;
        sync_folder(parent(&self.dir))
    }

    fn put(&self, name: &str, text: &str) -> Result<()> {
        let (path, mut file) = self.begin(name)?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(|e| cannot_write(&path, &e))
    }

    fn begin(&self, name: &str) -> Result<(PathBuf, File)> {
        let path = self.temporary.join(name);
        check_file_name(name).map_err(|why| Error::file(&path, why))?;
        let file = File::create_new(&path).map_err(|e| Error::file(&path, format!("cannot be made: {e}")))?;
        Ok((path, file))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.temporary);
    }
}

/// The folder that holds `path`.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes the names in a folder durable, where a folder can be opened.
fn sync_folder(path: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(path).and_then(|folder| folder.sync_all()).map_err(|e| cannot_write(path, &e))?;
    }
    Ok(())
}

/// A directory whose every byte was read and found to be what was written.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<(Listed, Option<Weights>)>,
}

impl Checkpoint {
    /// Opens and verifies the checkpoint `dir`; memory stays small.
    ///
    /// # Errors
    /// A file that is missing, surplus, of another size or CRC32, named with the damaged tensor where
    /// that can be told; a manifest or header that this program did not write.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Checkpoint> {
        let dir = dir.into();
        let manifest = Manifest::read(&dir)?;
        refuse_surplus(&dir, &manifest)?;
        let verified = |file: Listed| verify(&dir, &file).map(|weights| (file, weights));
        let files = manifest.files.into_iter().map(verified).collect::<Result<_>>()?;
        Ok(Checkpoint { dir, files })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The names and types of the tensors of the safetensors file `file`, in byte order.
    ///
    /// # Errors
    /// No such file.
    pub fn specs(&self, file: &str) -> Result<Vec<(&str, Spec)>> {
        let (_, weights) = self.find(file)?;
        weights.names().map(|name| Ok((name, weights.spec(name)?))).collect()
    }

    /// The elements of a tensor, verified once more.
    ///
    /// # Errors
    /// No such file or tensor, or one that has changed since the checkpoint was opened.
    pub fn tensor(&self, file: &str, name: &str) -> Result<Host> {
        let (listed, weights) = self.find(file)?;
        let host = weights.read(name)?;
        let crc32 = hex(crc32fast::hash(host.view().bytes()));
        match listed.tensors.iter().find(|t| t.name == name) {
            Some(t) if t.crc32 == crc32 => Ok(host),
            _ => Err(Error::file(self.dir.join(file), format!("tensor {name} has changed; {REMEDY}"))),
        }
    }

    /// The text file `file`, verified once more.
    ///
    /// # Errors
    /// No such file, or one that has changed since the checkpoint was opened.
    pub fn text(&self, file: &str) -> Result<String> {
        let path = self.dir.join(file);
        let Some((listed, None)) = self.files.iter().find(|(listed, _)| listed.name == file) else {
            return Err(Error::file(path, "is no text of this checkpoint"));
        };
        let text = read_text(&path)?;
        if hex(crc32fast::hash(text.as_bytes())) != listed.crc32 {
            return Err(Error::file(path, format!("has changed; {REMEDY}")));
        }
        Ok(text)
    }

    fn find(&self, file: &str) -> Result<(&Listed, &Weights)> {
        let found = self.files.iter().find(|(listed, _)| listed.name == file);
        found.and_then(|(listed, weights)| Some((listed, weights.as_ref()?))).ok_or_else(|| {
            Error::file(self.dir.join(file), "is no safetensors file of this checkpoint; is the path right?")
        })
    }
}

fn is_weights(file: &str) -> bool {
    file.ends_with(".safetensors")
}

/// Refuses what the manifest does not list.
fn refuse_surplus(dir: &Path, manifest: &Manifest) -> Result<()> {
    let failed = |e: io::Error| Error::file(dir, format!("cannot be listed: {e}"));
    for entry in fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if name != MANIFEST && !manifest.files.iter().any(|file| name == *file.name) {
            return Err(Error::file(dir.join(name), "does not belong to the checkpoint; move it away"));
        }
    }
    Ok(())
}

/// Holds a file against the manifest, and a safetensors file's header too.
fn verify(dir: &Path, listed: &Listed) -> Result<Option<Weights>> {
    let path = dir.join(&listed.name);
    let mut file = open_plain(&path)?;
    let failed = |e: io::Error| Error::file(&path, format!("cannot be read: {e}"));
    let bytes = file.metadata().map_err(failed)?.len();
    if bytes != listed.bytes {
        let why = format!("has {bytes} bytes instead of {}; {REMEDY}", listed.bytes);
        return Err(Error::file(path, why));
    }
    if crc32(&mut file).map_err(failed)? != listed.crc32 {
        let tensor = if is_weights(&listed.name) { damaged_tensor(&path, listed) } else { None };
        let place = tensor.map_or(String::new(), |name| format!(" in tensor {name}"));
        return Err(Error::file(path, format!("is damaged{place}: wrong CRC32; {REMEDY}")));
    }
    if !is_weights(&listed.name) {
        return Ok(None);
    }
    let weights = Weights::open(&path)?;
    if !weights.names().eq(sorted_names(listed)) {
        return Err(Error::file(
            path,
            "holds other tensors than the manifest lists; use an older checkpoint",
        ));
    }
    weights.names().try_for_each(|name| weights.spec(name).map(|_| ()))?;
    Ok(Some(weights))
}

fn sorted_names(listed: &Listed) -> Vec<&str> {
    let mut names: Vec<&str> = listed.tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    names
}

fn crc32(file: &mut File) -> io::Result<String> {
    let mut crc = crc32fast::Hasher::new();
    let mut block = vec![0; 1 << 16];
    loop {
        match file.read(&mut block) {
            Ok(0) => return Ok(hex(crc.finalize())),
            Ok(n) => crc.update(block.get(..n).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// The first tensor that is not what the manifest says, if the header still tells where tensors are.
fn damaged_tensor<'a>(path: &Path, listed: &'a Listed) -> Option<&'a str> {
    let weights = Weights::open(path).ok().filter(|w| w.names().eq(sorted_names(listed)))?;
    let damaged = |t: &&ListedTensor| {
        weights.read(&t.name).is_ok_and(|host| hex(crc32fast::hash(host.view().bytes())) != t.crc32)
    };
    listed.tensors.iter().find(damaged).map(|t| t.name.as_str())
}

/// The name of the checkpoint after `step` optimiser steps: `step-00000100`.
pub fn step_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// What [`newest`] found.
#[derive(Debug)]
pub struct Newest {
    /// The step and the checkpoint, if one passes.
    pub found: Option<(u64, Checkpoint)>,
    /// Why newer ones were passed over.
    pub skipped: Vec<Error>,
}

/// The newest checkpoint `step-XXXXXXXX` of a folder that passes [`Checkpoint::open`].
///
/// # Errors
/// A folder that cannot be listed; one that does not exist holds no checkpoints.
pub fn newest(folder: &Path) -> Result<Newest> {
    let mut skipped = Vec::new();
    for (step, dir) in steps(folder)?.into_iter().rev() {
        match Checkpoint::open(dir) {
            Ok(found) => return Ok(Newest { found: Some((step, found)), skipped }),
            Err(why) => skipped.push(why),
        }
    }
    Ok(Newest { found: None, skipped })
}

/// Removes the oldest checkpoints of a folder until `keep` are left, but never the last. To be called
/// after each save, and before the first: processes that die between the two would fill the disk.
///
/// # Errors
/// Whatever the file system refuses.
pub fn prune(folder: &Path, keep: usize) -> Result<()> {
    let steps = steps(folder)?;
    let surplus = steps.len().saturating_sub(keep.max(1));
    for (_, dir) in steps.into_iter().take(surplus) {
        // Renamed first, so that half of a checkpoint never bears the name of one.
        let doomed = temporary(&dir);
        if doomed.exists() {
            remove(&doomed)?;
        }
        fs::rename(&dir, &doomed).map_err(|e| cannot_remove(&dir, &e))?;
        remove(&doomed)?;
    }
    Ok(())
}

/// Renames the checkpoints after `step` to `NAME.damaged`: those that [`newest`] passed over, in whose
/// place a run that goes on from `step` will leave its own.
///
/// # Errors
/// Whatever the file system refuses.
pub fn set_aside(folder: &Path, step: u64) -> Result<()> {
    for (_, dir) in steps(folder)?.into_iter().filter(|(later, _)| *later > step) {
        let aside = dir.with_extension("damaged");
        if aside.exists() {
            remove(&aside)?;
        }
        fs::rename(&dir, &aside).map_err(|e| Error::file(&dir, format!("cannot be renamed: {e}")))?;
    }
    Ok(())
}

/// Removes what killed processes left: `*.tmp-PID` that nobody is writing.
///
/// # Errors
/// Whatever the file system refuses.
pub fn remove_strays(folder: &Path) -> Result<()> {
    for (name, path) in entries(folder)? {
        let pid = name.rsplit_once(".tmp-").map_or("", |(_, pid)| pid);
        if pid.is_empty() || !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let lock = File::open(&path).map(|folder| folder.try_lock());
        if !matches!(lock, Ok(Err(TryLockError::WouldBlock))) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Removes a folder or a file.
fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(|e| cannot_remove(path, &e))
}

fn cannot_remove(path: &Path, why: &io::Error) -> Error {
    Error::file(path, format!("cannot be removed: {why}; remove it by hand"))
}

/// The checkpoints of a folder, oldest first.
fn steps(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let step = |name: &str| name.strip_prefix("step-")?.parse().ok().filter(|&step| step_name(step) == name);
    let mut steps: Vec<_> =
        entries(folder)?.into_iter().filter_map(|(name, path)| Some((step(&name)?, path))).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// Names and paths in a folder; none where there is no folder.
fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let failed = |e: io::Error| Error::file(folder, format!("cannot be listed: {e}"));
    if !folder.exists() {
        return Ok(Vec::new());
    }
    fs::read_dir(folder)
        .map_err(failed)?
        .map(|entry| entry.map(|e| (e.file_name().to_string_lossy().into_owned(), e.path())).map_err(failed))
        .collect()
}
