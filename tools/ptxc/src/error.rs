//! Everything that can go wrong, by the stage that notices; every error knows its remedy.
use std::{fmt, path::PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong between a kernel's source and its PTX.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The pinned tools exist for Linux on x86-64 only.
    Platform {
        /// What this program was built for.
        here: String,
    },
    /// Python or its pip, which fetch the pinned wheels, are missing.
    Python {
        /// What was tried and what came back.
        why: String,
    },
    /// A wheel could not be fetched.
    Download {
        /// File name of the wheel.
        wheel: String,
        /// Where it may be put by hand.
        at: PathBuf,
        /// The last lines of pip.
        why: String,
    },
    /// A wheel is not the pinned one; it has been removed.
    Hash {
        /// Where it was.
        path: PathBuf,
        /// SHA-256 of the pinned wheel.
        want: String,
        /// SHA-256 found.
        found: String,
    },
    /// A library could not be loaded or is not NVRTC.
    Library {
        /// The library.
        path: PathBuf,
        /// What the loader says.
        why: String,
    },
    /// NVRTC refused a source.
    Compile {
        /// The source.
        path: PathBuf,
        /// NVRTC's log, with the files as they are on disk.
        log: String,
    },
    /// NVRTC failed for another reason than the source.
    Nvrtc {
        /// The function.
        call: &'static str,
        /// What NVRTC says about its status.
        why: String,
    },
    /// A kernel source breaks a rule of the tree.
    Source {
        /// The file.
        path: PathBuf,
        /// The line, from 1; 0 where the whole file is meant.
        line: usize,
        /// The rule.
        why: String,
    },
    /// The committed output is not what the sources give.
    Stale {
        /// One line for each file.
        files: Vec<String>,
    },
    /// ptxas refused a module, or found in it what must not be shipped.
    Ptxas {
        /// The module.
        path: PathBuf,
        /// What it says.
        why: String,
    },
    /// A file could not be read or written.
    File {
        /// The file.
        path: PathBuf,
        /// The reason.
        why: String,
    },
}

impl Error {
    /// A file error.
    pub(crate) fn file(path: impl Into<PathBuf>, why: impl fmt::Display) -> Error {
        Error::File { path: path.into(), why: why.to_string() }
    }

    /// A broken rule.
    pub(crate) fn source(path: impl Into<PathBuf>, line: usize, why: impl fmt::Display) -> Error {
        Error::Source { path: path.into(), line, why: why.to_string() }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::Platform { .. } => {
                "compile on Linux x86-64; the committed PTX under ptx/ works without this tool".into()
            }
            Error::Python { .. } => {
                "install Python 3 with pip (Debian: apt-get install python3-pip), or name a libnvrtc.so \
                 with --nvrtc or TRANSFUSION_NVRTC"
                    .into()
            }
            Error::Download { wheel, at, .. } => {
                format!(
                    "needs pypi.org once; without network fetch {wheel} elsewhere and put it at {}",
                    at.display()
                )
            }
            Error::Hash { .. } => {
                "it has been removed; run the command again, and if it persists look at the package \
                 index that pip is set to"
                    .into()
            }
            Error::Library { .. } => {
                "name the library itself (.../libnvrtc.so.12) with --nvrtc or TRANSFUSION_NVRTC, or \
                 leave both out for the pinned one"
                    .into()
            }
            Error::Stale { .. } => {
                "run `cargo run --release -p transfusion-ptxc -- build` and commit ptx/".into()
            }
            Error::Compile { .. } | Error::Nvrtc { .. } | Error::Source { .. } => return None,
            Error::Ptxas { .. } | Error::File { .. } => return None,
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Platform { here } => write!(f, "the pinned CUDA tools run on Linux x86-64, not on {here}"),
            Error::Python { why } => write!(f, "cannot fetch the pinned CUDA tools: {why}"),
            Error::Download { wheel, why, .. } => write!(f, "cannot fetch {wheel}: {why}"),
            Error::Hash { path, want, found } => {
                write!(f, "{}: sha256 is {found}, the pinned wheel has {want}", path.display())
            }
            Error::Library { path, why } => write!(f, "{}: {why}", path.display()),
            Error::Compile { path, log } => {
                write!(f, "{} does not compile\n{}", path.display(), log.trim_end())
            }
            Error::Nvrtc { call, why } => write!(f, "{call}: {why}"),
            Error::Source { path, line: 0, why } => write!(f, "{}: {why}", path.display()),
            Error::Source { path, line, why } => write!(f, "{}:{line}: {why}", path.display()),
            Error::Stale { files } => {
                write!(f, "ptx/ is not what kernels-cu/ compiles to:\n  {}", files.join("\n  "))
            }
            Error::Ptxas { path, why } => write!(f, "{}: ptxas: {}", path.display(), why.trim_end()),
            Error::File { path, why } => write!(f, "{}: {why}", path.display()),
        }
    }
}

impl std::error::Error for Error {}
