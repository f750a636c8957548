//! What can go wrong in a measurement.
use std::fmt;

/// The result of everything here that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in a measurement.
#[derive(Clone, Debug)]
pub enum Error {
    /// The engine refused or failed.
    Engine(transfusion::Error),
    /// The other side refused, failed or disagrees.
    Peer {
        /// What happened.
        what: String,
        /// What may help.
        remedy: Option<String>,
    },
}

impl Error {
    /// An error of the other side without a remedy.
    pub fn peer(what: impl fmt::Display) -> Error {
        Error::Peer { what: what.to_string(), remedy: None }
    }

    /// Adds what may help to an error of the other side.
    pub fn with_remedy(self, text: impl fmt::Display) -> Error {
        match self {
            Error::Peer { what, .. } => Error::Peer { what, remedy: Some(text.to_string()) },
            other => other,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Engine(e) => e.fmt(f),
            Error::Peer { what, .. } => f.write_str(what),
        }
    }
}

impl std::error::Error for Error {}

impl From<transfusion::Error> for Error {
    fn from(e: transfusion::Error) -> Error {
        Error::Engine(e)
    }
}

impl From<transfusion_core::Error> for Error {
    fn from(e: transfusion_core::Error) -> Error {
        Error::Engine(e.into())
    }
}
