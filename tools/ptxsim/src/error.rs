//! What can go wrong before a kernel runs: text that cannot be loaded, launches that cannot be started.

use std::fmt;

/// PTX that this crate refuses: a syntax error, an unknown instruction, a form that is not implemented.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadError {
    /// The name that was given to [`Module::load`](crate::Module::load).
    pub file: String,
    /// Line of the text, from 1.
    pub line: u32,
    /// What is wrong there.
    pub why: String,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.why)
    }
}

impl std::error::Error for LoadError {}

/// A launch that a driver would refuse, or whose arguments do not fit the kernel's parameter list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LaunchError {
    /// The module has no such entry point.
    UnknownKernel {
        /// The name asked for.
        name: String,
        /// The entry points that there are.
        known: Vec<String>,
    },
    /// More or fewer arguments than the kernel has parameters.
    ArgumentCount {
        /// The kernel.
        kernel: String,
        /// Parameters that it declares.
        expected: usize,
        /// Arguments given.
        found: usize,
    },
    /// An argument of another size than its parameter.
    ArgumentSize {
        /// The kernel.
        kernel: String,
        /// Position of the parameter, from 0.
        index: usize,
        /// Bytes of the parameter.
        expected: u32,
        /// Bytes of the argument.
        found: u32,
    },
    /// A grid, block or cluster with a zero extent, or a grid that its cluster does not divide.
    Shape {
        /// The kernel.
        kernel: String,
        /// What is wrong.
        why: String,
    },
    /// More threads in a block than `.maxntid` allows, or than any device has (1024).
    BlockTooLarge {
        /// The kernel.
        kernel: String,
        /// Threads asked for.
        threads: u32,
        /// Threads allowed.
        limit: u32,
    },
    /// More static and dynamic shared memory than the limit of the launch.
    SharedTooLarge {
        /// The kernel.
        kernel: String,
        /// Bytes asked for.
        bytes: u32,
        /// Bytes allowed.
        limit: u32,
    },
    /// A window or tensor map that its memory cannot hold or that is not aligned as the hardware asks.
    Window {
        /// The operand.
        name: String,
        /// What is wrong.
        why: String,
    },
}

impl fmt::Display for LaunchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKernel { name, known } => {
                write!(f, "no kernel `{name}`; the module has {}", known.join(", "))
            }
            Self::ArgumentCount { kernel, expected, found } => {
                write!(f, "{kernel} takes {expected} arguments, {found} given")
            }
            Self::ArgumentSize { kernel, index, expected, found } => {
                write!(f, "parameter {index} of {kernel} has {expected} bytes, the argument {found}")
            }
            Self::Shape { kernel, why } => write!(f, "{kernel}: {why}"),
            Self::BlockTooLarge { kernel, threads, limit } => {
                write!(f, "{kernel}: {threads} threads in a block, at most {limit}")
            }
            Self::SharedTooLarge { kernel, bytes, limit } => {
                write!(f, "{kernel}: {bytes} bytes of shared memory, at most {limit}")
            }
            Self::Window { name, why } => write!(f, "operand `{name}`: {why}"),
        }
    }
}

impl std::error::Error for LaunchError {}
