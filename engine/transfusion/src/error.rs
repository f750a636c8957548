//! Everything that can go wrong, by whose hand can mend it.
use std::{fmt, path::PathBuf};
use transfusion_core as core;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong, by whose hand can mend it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written, or holds something else than it should.
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and the remedy.
        why: String,
    },
    /// A setting that has no meaning, or that contradicts another.
    Config(String),
    /// Training data that cannot be used as it is.
    Data(String),
    /// The executor refused or failed.
    Core(core::Error),
    /// Training cannot go on.
    Training(String),
    /// The caller asked to stop.
    Cancelled,
}

impl Error {
    /// A file error.
    pub fn file(path: impl Into<PathBuf>, why: impl fmt::Display) -> Error {
        Error::File { path: path.into(), why: why.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::File { path, why } => write!(f, "{}: {why}", path.display()),
            Error::Config(why) | Error::Data(why) | Error::Training(why) => f.write_str(why),
            Error::Core(e) => e.fmt(f),
            Error::Cancelled => f.write_str("cancelled"),
        }
    }
}

impl std::error::Error for Error {}

impl From<core::Error> for Error {
    fn from(e: core::Error) -> Error {
        match e {
            core::Error::File { path, why } => Error::File { path, why },
            e => Error::Core(e),
        }
    }
}
