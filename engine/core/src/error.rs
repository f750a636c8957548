//! Everything that can go wrong, by the stage that notices.
use crate::{op::Kind, tensor::Spec};
use std::{fmt, panic::Location, path::PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, by the stage that notices.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Error {
    /// An op refused its inputs; `at` is the line of model code that built it.
    Refused {
        /// The op.
        op: &'static str,
        /// Its reason.
        why: String,
        /// The inputs it was given.
        ins: Vec<Spec>,
        /// The line that applied it.
        at: &'static Location<'static>,
    },
    /// A graph is used in a way that has no meaning: a name taken twice, a gradient that vanishes.
    Graph(String),
    /// A gradient was asked through an op that has none.
    NoAdjoint {
        /// The op.
        op: &'static str,
        /// Why it has none.
        why: &'static str,
        /// The line that applied it.
        at: &'static Location<'static>,
    },
    /// A tensor is read after an in-place op overwrote its memory.
    Overwritten {
        /// The op that reads.
        reader: &'static str,
        /// Where the reader was applied.
        at: &'static Location<'static>,
        /// The op that overwrote.
        by: &'static str,
    },
    /// An op has no kernel for the target.
    NoKernel {
        /// The op.
        op: &'static str,
        /// Why.
        why: String,
        /// The line that applied it.
        at: &'static Location<'static>,
    },
    /// A named state, input or output that is not there, or not of this type.
    Place {
        /// What was asked for.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// Two plans disagree about a state.
    StateClash {
        /// Kind of the state.
        kind: Kind,
        /// Name of the state.
        name: String,
        /// As the device holds it.
        have: Box<Spec>,
        /// As the new plan wants it.
        want: Box<Spec>,
    },
    /// Not enough memory.
    Memory {
        /// Bytes wanted.
        need: u64,
        /// Bytes that are free, where the device knows.
        free: Option<u64>,
        /// What they are for.
        what: String,
    },
    /// The device failed.
    Device(String),
    /// A file could not be read or written, or holds something else than it should.
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and the remedy.
        why: String,
    },
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
            Error::Refused { op, why, ins, at } => write!(f, "{at}: {op}: {why}; inputs {ins:?}"),
            Error::Graph(why) | Error::Device(why) => f.write_str(why),
            Error::NoAdjoint { op, why, at } => write!(f, "{at}: {op} has no gradient: {why}"),
            Error::Overwritten { reader, at, by } => {
                write!(f, "{at}: {reader} reads memory that {by} has overwritten")
            }
            Error::NoKernel { op, why, at } => write!(f, "{at}: {op} has no kernel: {why}"),
            Error::Place { what, why } => write!(f, "{what}: {why}"),
            Error::StateClash { kind, name, have, want } => {
                write!(f, "{kind:?} state {name} is {have:?} on the device, the plan wants {want:?}")
            }
            Error::Memory { need, free, what } => {
                let gib = |n: u64| n as f64 / (1u64 << 30) as f64;
                write!(f, "not enough memory: {what} needs {:.2} GiB", gib(*need))?;
                free.map_or(Ok(()), |free| write!(f, ", {:.2} GiB are free", gib(free)))
            }
            Error::File { path, why } => write!(f, "{}: {why}", path.display()),
        }
    }
}

impl std::error::Error for Error {}
