//! Named tensors <-> safetensors files: <https://github.com/huggingface/safetensors>.
//!
//! Tensors stream through memory one at a time in both directions. The format itself has no checksum;
//! [`checkpoint`](super) adds one. What a foreign file claims is held against its size before anything
//! is allocated, so that a broken or hostile file costs an error, never memory.
use crate::{
    error::{Error, Result},
    tensor::{DType, Host, Shape, Spec, ViewMut},
};
use half::f16;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::{
    Deserialize,
    de::{Deserializer, Error as _, MapAccess, Visitor},
};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    marker::PhantomData,
    path::{Path, PathBuf},
};

#[cfg(target_endian = "big")]
compile_error!("safetensors are little-endian, and tensors are written as they lie in memory");

/// The longest header or index that is read: room for the names of [`MAX_TENSORS`] tensors.
pub const MAX_HEADER: u64 = 16 << 20;
/// The most tensors that one file may hold.
pub const MAX_TENSORS: usize = 100_000;

/// Key of the header's free text, which is no tensor.
const NOTES: &str = "__metadata__";

/// Writes `tensors` to `path`, replacing what is there only once the new file is complete.
///
/// `read` fills the elements of one tensor, given its name; it is called once for each, in file order
/// (widest elements first, then by name).
///
/// # Errors
/// A name given twice, what `read` returns, and whatever the file system refuses.
pub fn write(
    path: &Path,
    tensors: &[(&str, Spec)],
    read: impl FnMut(&str, ViewMut<'_>) -> Result<()>,
) -> Result<()> {
    let temporary = temporary(path);
    let written = File::create(&temporary)
        .map_err(|e| Error::file(&temporary, format!("cannot be created: {e}")))
        .and_then(|mut file| {
            emit(&mut file, &temporary, tensors, read)?;
            file.sync_all().map_err(|e| cannot_write(&temporary, &e))?;
            fs::rename(&temporary, path).map_err(|e| Error::file(path, format!("cannot be replaced: {e}")))
        });
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// The name under which this process prepares `path`: `NAME.tmp-PID`.
pub(super) fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".tmp-{}", std::process::id()));
    path.with_file_name(name)
}

/// What [`emit`] wrote.
pub(super) struct Emitted {
    pub(super) bytes: u64,
    pub(super) crc32: u32,
    /// CRC32 of the bytes of each tensor, in file order.
    pub(super) tensors: Vec<(String, u32)>,
}

/// Writes header and tensors to `out`; `path` is what errors call it.
pub(super) fn emit(
    out: &mut impl Write,
    path: &Path,
    tensors: &[(&str, Spec)],
    mut read: impl FnMut(&str, ViewMut<'_>) -> Result<()>,
) -> Result<Emitted> {
    let mut tensors = tensors.to_vec();
    // Widest elements first: every tensor then lies at a multiple of its element size.
    tensors.sort_by_key(|&(name, spec)| (Reverse(spec.dtype.size()), name));
    let header = header(path, &tensors)?;
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header);
    out.write_all(&header).map_err(|e| cannot_write(path, &e))?;
    let mut emitted = Emitted { bytes: header.len() as u64, crc32: 0, tensors: Vec::new() };
    for (name, spec) in tensors {
        let mut host = Host::zeros(spec);
        read(name, host.view_mut())?;
        let bytes = host.view().bytes();
        let mut own = crc32fast::Hasher::new();
        own.update(bytes);
        crc.combine(&own);
        out.write_all(bytes).map_err(|e| cannot_write(path, &e))?;
        emitted.bytes += bytes.len() as u64;
        emitted.tensors.push((name.to_owned(), own.finalize()));
    }
    out.flush().map_err(|e| cannot_write(path, &e))?;
    emitted.crc32 = crc.finalize();
    Ok(emitted)
}

/// The error of a failed write.
pub(super) fn cannot_write(path: &Path, why: &io::Error) -> Error {
    Error::file(path, format!("cannot be written: {why}; check the free space and the permissions"))
}

/// Length, JSON and padding to a multiple of eight bytes.
fn header(path: &Path, tensors: &[(&str, Spec)]) -> Result<Vec<u8>> {
    let mut offset = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    let mut seen = BTreeSet::new();
    for &(name, spec) in tensors {
        if name == NOTES || !seen.insert(name) {
            return Err(Error::file(path, format!("tensor {name}: the name is taken; give it another")));
        }
        let (dtype, shape) = (stored_as(spec.dtype), spec.shape.dims().to_vec());
        let data_offsets = (offset, offset + spec.bytes());
        offset = data_offsets.1;
        infos.push((name.to_owned(), TensorInfo { dtype, shape, data_offsets }));
    }
    let notes = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut json = Metadata::new(Some(notes), infos)
        .map_err(|e| e.to_string())
        .and_then(|metadata| serde_json::to_vec(&metadata).map_err(|e| e.to_string()))
        .map_err(|why| Error::file(path, format!("cannot be described: {why}")))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    if json.len() as u64 > MAX_HEADER || tensors.len() > MAX_TENSORS {
        let n = tensors.len();
        return Err(Error::file(path, format!("{n} tensors are too many; split them over several files")));
    }
    Ok([(json.len() as u64).to_le_bytes().as_slice(), &json].concat())
}

fn stored_as(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::I32 => Dtype::I32,
        DType::U8 => Dtype::U8,
    }
}

/// The tensors of one safetensors file, or of a model folder's shards; read one at a time.
#[derive(Clone, Debug)]
pub struct Weights {
    stored: BTreeMap<String, Stored>,
}

/// Where a tensor lies, and as what.
#[derive(Clone, Debug)]
struct Stored {
    path: PathBuf,
    dtype: Dtype,
    dims: Vec<usize>,
    offset: u64,
}

impl Weights {
    /// Opens a `.safetensors` file, a `.safetensors.index.json` with its shards beside it, or a folder
    /// that holds `model.safetensors` or `model.safetensors.index.json`. Reads headers only.
    ///
    /// # Errors
    /// What is no such file or folder; a header that is longer than [`MAX_HEADER`], names more than
    /// [`MAX_TENSORS`] tensors or one of them twice, or disagrees with the size of its file; an index
    /// that names files elsewhere, or tensors that are not there.
    pub fn open(path: &Path) -> Result<Weights> {
        if !path.is_dir() {
            return if path.extension().is_some_and(|e| e == "json") { shards(path) } else { one(path) };
        }
        let (whole, index) = (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
        if whole.exists() {
            one(&whole)
        } else if index.exists() {
            shards(&index)
        } else {
            Err(Error::file(path, "holds neither model.safetensors nor model.safetensors.index.json"))
        }
    }

    /// The names of all tensors, in byte order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.stored.keys().map(String::as_str)
    }

    /// The type of a tensor as [`Weights::read`] returns it.
    ///
    /// # Errors
    /// A name that is not there; an element type or a number of dimensions that this program lacks.
    pub fn spec(&self, name: &str) -> Result<Spec> {
        let Some(stored) = self.stored.get(name) else {
            let near = self.stored.range(name.to_owned()..).next().or(self.stored.last_key_value());
            let near =
                near.map_or("no tensor at all".to_owned(), |(n, s)| format!("{n} in {}", s.path.display()));
            return Err(Error::Place {
                what: name.to_owned(),
                why: format!("no such tensor; there is {near}"),
            });
        };
        let refused = |why: String| Error::file(&stored.path, format!("tensor {name}: {why}"));
        let dtype = match stored.dtype {
            Dtype::F64 => DType::F64,
            Dtype::F32 | Dtype::F16 => DType::F32,
            Dtype::BF16 => DType::Bf16,
            Dtype::I32 => DType::I32,
            Dtype::U8 => DType::U8,
            other => return Err(refused(format!("elements are {other}; convert to F32 or BF16"))),
        };
        let shape = shape(&stored.dims)
            .ok_or_else(|| refused(format!("shape {:?} has more than four dimensions", stored.dims)))?;
        Ok(Spec { shape, dtype })
    }

    /// The elements of a tensor; half-precision floats are widened to `f32`, which is exact.
    ///
    /// # Errors
    /// As [`Weights::spec`], and whatever the file system refuses.
    pub fn read(&self, name: &str) -> Result<Host> {
        let spec = self.spec(name)?;
        let Some(stored) = self.stored.get(name) else { return Ok(Host::zeros(spec)) };
        let failed = |e: io::Error| Error::file(&stored.path, format!("tensor {name}: cannot be read: {e}"));
        let mut file = File::open(&stored.path).map_err(failed)?;
        file.seek(SeekFrom::Start(stored.offset)).map_err(failed)?;
        if stored.dtype == Dtype::F16 {
            let mut narrow = vec![f16::ZERO; spec.shape.numel()];
            file.read_exact(bytemuck::cast_slice_mut(&mut narrow)).map_err(failed)?;
            return Ok(Host::F32(narrow.into_iter().map(f32::from).collect()));
        }
        let mut host = Host::zeros(spec);
        file.read_exact(host.view_mut().bytes()).map_err(failed)?;
        Ok(host)
    }
}

fn shape(dims: &[usize]) -> Option<Shape> {
    match *dims {
        [] => Some(Shape::from([])),
        [a] => Some(Shape::from([a])),
        [a, b] => Some(Shape::from([a, b])),
        [a, b, c] => Some(Shape::from([a, b, c])),
        [a, b, c, d] => Some(Shape::from([a, b, c, d])),
        _ => None,
    }
}

/// Opens one file.
fn one(path: &Path) -> Result<Weights> {
    let (json, data, length) = read_header(path)?;
    let damaged = |why: &dyn fmt::Display| {
        Error::file(path, format!("header: {why}; this is no whole safetensors file, fetch it again"))
    };
    let Unique(items) = serde_json::from_slice::<Unique<Item>>(&json).map_err(|e| damaged(&e))?;
    let mut infos = Vec::with_capacity(items.len());
    for (name, item) in items {
        match item {
            Item::Tensor(info) if name != NOTES => infos.push((name, info)),
            Item::Notes {} if name == NOTES => {}
            _ => return Err(damaged(&format!("{name} is not described as a tensor"))),
        }
    }
    infos.sort_by_key(|(_, info)| info.data_offsets);
    if let Some((name, _)) = infos.iter().find(|(_, info)| !countable(info)) {
        return Err(damaged(&format!("tensor {name} is larger than any memory")));
    }
    // Holds offsets, shapes and element types against each other.
    let metadata = Metadata::new(None, infos.clone()).map_err(|e| damaged(&e))?;
    let want = data.saturating_add(metadata.data_len() as u64);
    if want != length {
        return Err(damaged(&format!("speaks of {want} bytes, the file has {length}")));
    }
    let place = |(name, info): (String, TensorInfo)| {
        let offset = data + info.data_offsets.0 as u64;
        (name, Stored { path: path.to_owned(), dtype: info.dtype, dims: info.shape, offset })
    };
    Ok(Weights { stored: infos.into_iter().map(place).collect() })
}

/// Whether the size of a tensor can be computed in any order of its dimensions.
fn countable(info: &TensorInfo) -> bool {
    let dims = info.shape.iter().filter(|&&d| d != 0);
    dims.copied().try_fold(8, usize::checked_mul).is_some()
}

/// The JSON of a file's header, where its data begins, and the length of the file.
fn read_header(path: &Path) -> Result<(Vec<u8>, u64, u64)> {
    let mut file = open_plain(path)?;
    let failed = |e: io::Error| Error::file(path, format!("cannot be read: {e}"));
    let length = file.metadata().map_err(failed)?.len();
    let mut prefix = [0; 8];
    if length < 8 {
        let why = format!("{length} bytes are too few for a safetensors file; fetch it again");
        return Err(Error::file(path, why));
    }
    file.read_exact(&mut prefix).map_err(failed)?;
    let size = u64::from_le_bytes(prefix);
    if size > MAX_HEADER || size > length - 8 {
        let why =
            format!("claims a header of {size} bytes; this is no whole safetensors file, fetch it again");
        return Err(Error::file(path, why));
    }
    let mut json = vec![0; size as usize];
    file.read_exact(&mut json).map_err(failed)?;
    Ok((json, 8 + size, length))
}

/// Opens a file that is neither a folder nor a pipe.
pub(super) fn open_plain(path: &Path) -> Result<File> {
    let kind = fs::metadata(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    if !kind.is_file() {
        return Err(Error::file(path, "is not a file; give the path of one"));
    }
    File::open(path).map_err(|e| Error::file(path, format!("cannot be opened: {e}")))
}

#[derive(Deserialize)]
struct Index {
    weight_map: Unique<String>,
}

/// Opens the shards that an index names.
fn shards(path: &Path) -> Result<Weights> {
    let text = read_text(path)?;
    let index: Index = serde_json::from_str(&text)
        .map_err(|e| Error::file(path, format!("{e}; this is no index of safetensors files")))?;
    let mut open = BTreeMap::new();
    let mut stored = BTreeMap::new();
    for (name, shard) in index.weight_map.0 {
        check_file_name(&shard).map_err(|why| Error::file(path, format!("tensor {name}: {why}")))?;
        if !open.contains_key(&shard) {
            open.insert(shard.clone(), one(&path.with_file_name(&shard))?);
        }
        let Some(found) = open.get_mut(&shard).and_then(|w| w.stored.remove(&name)) else {
            return Err(Error::file(path, format!("tensor {name}: not in {shard}; fetch both files again")));
        };
        stored.insert(name, found);
    }
    Ok(Weights { stored })
}

/// A text of at most [`MAX_HEADER`] bytes.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let mut text = String::new();
    let file = open_plain(path)?;
    file.take(MAX_HEADER + 1)
        .read_to_string(&mut text)
        .map_err(|e| Error::file(path, format!("cannot be read as text: {e}")))?;
    if text.len() as u64 > MAX_HEADER {
        return Err(Error::file(path, format!("is longer than {MAX_HEADER} bytes; is it the right file?")));
    }
    Ok(text)
}

/// Names that stay in their folder on every system: letters, digits, `.`, `_` and `-`, no leading dot.
pub(super) fn check_file_name(name: &str) -> std::result::Result<(), String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if name.is_empty() || name.len() > 200 || name.starts_with('.') || !name.bytes().all(plain) {
        return Err(format!("{name:?} is no safe file name; use letters, digits, '.', '_' and '-'"));
    }
    Ok(())
}

/// What a header says about a name.
#[derive(Deserialize)]
#[serde(untagged)]
enum Item {
    Tensor(TensorInfo),
    Notes {},
}

/// A JSON object that names nothing twice and at most [`MAX_TENSORS`] things, in file order.
struct Unique<V>(Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueVisitor(PhantomData))
    }
}

struct UniqueVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueVisitor<V> {
    type Value = Unique<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with distinct names")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<Unique<V>, M::Error> {
        let mut items = Vec::new();
        let mut seen = BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(M::Error::custom(format!("tensor {name} is named twice")));
            }
            if seen.len() > MAX_TENSORS + 1 {
                return Err(M::Error::custom(format!("more than {MAX_TENSORS} tensors")));
            }
            let value = map.next_value().map_err(|e| M::Error::custom(format!("tensor {name}: {e}")))?;
            items.push((name, value));
        }
        Ok(Unique(items))
    }
}
