//! A kernel source with everything it includes, read before it is compiled.
//!
//! NVRTC gets the headers from memory under the names that the directives say, and no search path: what is
//! not part of the stamp cannot enter the PTX.
use crate::{Arch, Error, Result};
use sha2::{Digest, Sha256};
use std::{
    collections::VecDeque,
    fs,
    path::{Path, PathBuf},
};

/// Version of the compiler that the committed PTX comes from.
pub const COMPILER: (i32, i32) = (12, 4);

/// The options of every compilation, beside the architecture. Contraction into `fma` is wanted and said: the
/// CPU's results are compared under a tolerance, never bit by bit. The rest keeps IEEE: no flushing of
/// denormals, exact division and square root. No line information: it holds absolute paths.
pub const OPTIONS: [&str; 6] = [
    "--std=c++17",
    "--device-as-default-execution-space",
    "--fmad=true",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
];

/// A file that a kernel includes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// As the directive names it.
    pub name: String,
    /// Where it was found.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
}

/// A kernel source and all that it includes.
#[derive(Clone, Debug)]
pub struct Source {
    /// Path below `kernels-cu/` with forward slashes, without `.cu`: `rmsnorm`.
    pub stem: String,
    /// Where it was found.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
    /// What it includes, in the order of finding.
    pub headers: Vec<Header>,
    /// What it is compiled for: `sm_80`, unless a line `// Target  sm_90a` says otherwise.
    pub targets: Vec<Arch>,
}

impl Source {
    /// Reads `path` and what it includes: beside the including file first, then in `include`, in order.
    ///
    /// # Errors
    /// [`Error::File`] for files that cannot be read; [`Error::Source`] with the line for an include that is
    /// not found, stands in `<>`, or names a file under a second name, and for an unknown target.
    pub fn read(path: &Path, stem: &str, include: &[PathBuf]) -> Result<Source> {
        let text = read(path)?;
        let targets = targets(path, &text)?;
        let headers = headers(path, &text, include)?;
        Ok(Source { stem: stem.into(), path: path.into(), text, headers, targets })
    }

    /// The name NVRTC knows it by; it enters the names of file-scope symbols, so it must not depend on where
    /// the tree lies.
    pub(crate) fn unit(&self) -> String {
        format!("{}.cu", self.stem)
    }

    /// SHA-256, in hexadecimal, of the source, its includes, compiler, options and architecture.
    pub fn stamp(&self, arch: Arch, compiler: (i32, i32)) -> String {
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        field(format!("nvrtc {}.{}", compiler.0, compiler.1).as_bytes());
        field(arch.compute().as_bytes());
        OPTIONS.iter().for_each(|o| field(o.as_bytes()));
        field(self.unit().as_bytes());
        field(self.text.as_bytes());
        let mut headers: Vec<&Header> = self.headers.iter().collect();
        headers.sort_by(|a, b| a.name.cmp(&b.name));
        for h in headers {
            field(h.name.as_bytes());
            field(h.text.as_bytes());
        }
        hex(&hash.finalize())
    }
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn read(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    match text.bytes().position(|b| b == 0) {
        Some(at) => Err(Error::source(path, text[..at].lines().count().max(1), "a NUL byte")),
        None => Ok(text),
    }
}

fn targets(path: &Path, text: &str) -> Result<Vec<Arch>> {
    let mut found = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let Some(rest) = line.strip_prefix("// Target ") else { continue };
        for word in rest.split_whitespace() {
            let unknown = || {
                let known = Arch::ALL.map(Arch::name).join(", ");
                Error::source(path, i + 1, format!("unknown target {word}; known are {known}"))
            };
            let arch = Arch::parse(word).ok_or_else(unknown)?;
            if !found.contains(&arch) {
                found.push(arch);
            }
        }
    }
    Ok(if found.is_empty() { vec![Arch::Sm80] } else { found })
}

fn headers(path: &Path, text: &str, include: &[PathBuf]) -> Result<Vec<Header>> {
    let mut headers: Vec<Header> = Vec::new();
    let mut open = VecDeque::from([(path.to_path_buf(), text.to_string())]);
    while let Some((from, text)) = open.pop_front() {
        for (line, name) in directives(&from, &text)? {
            let at = locate(&from, &name, include).ok_or_else(|| {
                let dirs: Vec<String> = include.iter().map(|d| d.display().to_string()).collect();
                Error::source(
                    &from,
                    line,
                    format!("{name} is neither beside this file nor in {}", dirs.join(", ")),
                )
            })?;
            match headers.iter().find(|h| h.name == name || h.path == at) {
                Some(h) if h.name == name && h.path == at => {}
                Some(h) if h.path == at => {
                    let why = format!("{name} is already included as {}; use one name", h.name);
                    return Err(Error::source(&from, line, why));
                }
                Some(h) => {
                    let why =
                        format!("{name} means {} elsewhere and {} here", h.path.display(), at.display());
                    return Err(Error::source(&from, line, why));
                }
                None => {
                    let text = read(&at)?;
                    open.push_back((at.clone(), text.clone()));
                    headers.push(Header { name, path: at, text });
                }
            }
        }
    }
    Ok(headers)
}

/// The include directives of a file: line from 1, and name.
fn directives(path: &Path, text: &str) -> Result<Vec<(usize, String)>> {
    let mut found = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let Some(rest) = line.trim_start().strip_prefix('#') else { continue };
        let Some(rest) = rest.trim_start().strip_prefix("include") else { continue };
        match rest.trim_start().strip_prefix('"').and_then(|r| r.split_once('"')) {
            Some((name, _)) => found.push((i + 1, name.to_string())),
            None => {
                let why = "only #include \"...\" is possible: kernels use no header from outside the tree";
                return Err(Error::source(path, i + 1, why));
            }
        }
    }
    Ok(found)
}

fn locate(from: &Path, name: &str, include: &[PathBuf]) -> Option<PathBuf> {
    let beside = from.parent().unwrap_or(Path::new(""));
    let mut dirs = std::iter::once(beside).chain(include.iter().map(PathBuf::as_path));
    dirs.find_map(|d| fs::canonicalize(d.join(name)).ok())
}
