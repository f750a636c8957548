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
    /// There is no GPU to work on.
    NoDevice(NoDevice),
    /// A launch that the kernel's own declaration contradicts, or that the driver refused.
    Launch {
        /// The op.
        op: &'static str,
        /// The line that applied it.
        at: &'static Location<'static>,
        /// The kernel's entry point, or what is done instead of a kernel.
        entry: String,
        /// What is wrong.
        why: String,
    },
    /// The driver could not compile a kernel.
    Compile {
        /// The entry point that was asked for.
        entry: String,
        /// Architecture and file of the kernel, as in `sm_80/rmsnorm`.
        module: String,
        /// The driver's code, by name.
        code: String,
        /// The compiler's log.
        log: String,
    },
    /// The driver refused a call.
    Driver {
        /// The function of the driver.
        call: &'static str,
        /// Its code.
        code: u32,
        /// The code's name.
        name: String,
    },
    /// The GPU faulted: until the process ends, nothing on it can be used.
    Lost {
        /// The driver's code, by name.
        code: String,
        /// What was done when it was noticed.
        during: String,
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

/// Why there is no GPU to work on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoDevice {
    /// No driver is installed: its library was not found.
    NoLibrary,
    /// The driver's library is a stub, as toolkits have it for linking.
    Stub,
    /// The driver's library lacks a function.
    NoFunction {
        /// The function.
        name: &'static str,
        /// The CUDA version that brought it.
        since: (u32, u32),
    },
    /// The driver is there and does not start.
    NoStart {
        /// Its code, by name.
        code: String,
    },
    /// The driver sees no GPU.
    NoGpu,
    /// There are fewer GPUs.
    Ordinal {
        /// The one asked for, counted from 0.
        asked: usize,
        /// How many there are.
        have: usize,
    },
    /// The GPU is older than what the kernels are compiled for.
    Capability {
        /// The GPU.
        name: String,
        /// Its compute capability.
        have: (u32, u32),
    },
    /// The driver cannot read the PTX of the kernels.
    DriverTooOld {
        /// The CUDA version of the driver.
        have: (u32, u32),
        /// The CUDA version that can.
        need: (u32, u32),
    },
}

impl NoDevice {
    /// Whether there simply is no GPU, and nothing is amiss.
    pub fn is_absence(&self) -> bool {
        matches!(self, NoDevice::NoLibrary | NoDevice::NoGpu)
    }

    /// What the user can do about it.
    pub fn remedy(&self) -> String {
        match self {
            NoDevice::NoLibrary => {
                "install the NVIDIA driver (libcuda.so.1 comes with it; in a container, pass the GPU through)"
            }
            NoDevice::Stub => {
                "take the folder of stubs out of LD_LIBRARY_PATH, so that the driver's own library is found"
            }
            NoDevice::NoFunction { since: (major, minor), .. } => {
                return format!("install a driver for CUDA {major}.{minor} or newer");
            }
            NoDevice::NoStart { .. } => {
                "see whether `nvidia-smi` works; after an update of the driver, restart the machine"
            }
            NoDevice::NoGpu => {
                "see whether `nvidia-smi` lists a GPU and CUDA_VISIBLE_DEVICES does not hide it"
            }
            NoDevice::Ordinal { .. } => "GPUs are counted from 0, as in cuda:0",
            NoDevice::Capability { .. } => "a GPU of compute capability 8.0 (Ampere) or newer is needed",
            NoDevice::DriverTooOld { need: (major, minor), .. } => {
                return format!("install a driver for CUDA {major}.{minor} or newer; no toolkit is needed");
            }
        }
        .into()
    }
}

impl fmt::Display for NoDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoDevice::NoLibrary => f.write_str("no CUDA device: the NVIDIA driver's library was not found"),
            NoDevice::Stub => f.write_str("no CUDA device: the library found is a stub, not a driver"),
            NoDevice::NoFunction { name, since: (major, minor) } => {
                write!(f, "no CUDA device: the driver lacks {name}, which CUDA {major}.{minor} brought")
            }
            NoDevice::NoStart { code } => write!(f, "no CUDA device: the driver does not start ({code})"),
            NoDevice::NoGpu => f.write_str("no CUDA device: the driver sees no GPU"),
            NoDevice::Ordinal { asked, have: 1 } => write!(f, "no CUDA device {asked}: there is 1"),
            NoDevice::Ordinal { asked, have } => write!(f, "no CUDA device {asked}: there are {have}"),
            NoDevice::Capability { name, have: (major, minor) } => {
                write!(f, "{name} has compute capability {major}.{minor}, the kernels need 8.0")
            }
            NoDevice::DriverTooOld { have, need } => write!(
                f,
                "the driver is for CUDA {}.{}, the kernels need {}.{}",
                have.0, have.1, need.0, need.1
            ),
        }
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
            Error::NoDevice(why) => why.fmt(f),
            Error::Launch { op, at, entry, why } => {
                write!(f, "{at}: {op}: {entry} cannot be launched: {why}")
            }
            Error::Compile { entry, module, code, log } => {
                write!(f, "the driver cannot compile {entry} of {module}: {code}\n{}", log.trim_end())
            }
            Error::Driver { call, code, name } => {
                write!(f, "the CUDA driver refused {call}: {name} ({code})")
            }
            Error::Lost { code, during } => {
                write!(f, "the GPU faulted ({code}) during {during}; it cannot be used again in this process")
            }
            Error::File { path, why } => write!(f, "{}: {why}", path.display()),
        }
    }
}

impl std::error::Error for Error {}
