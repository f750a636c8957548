//! Everything that can go wrong, by its cause.
use std::{fmt, path::PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong, by its cause.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written, or holds something else than it should.
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and the remedy.
        why: String,
    },
    /// A configuration that has no meaning.
    Config(String),
    /// Data that cannot be trained on.
    Data(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::File { path, why } => write!(f, "{}: {why}", path.display()),
            Error::Config(why) | Error::Data(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Error {}
