//! `transfusion kernels sim`.
use crate::{
    console,
    failure::{Failure, Outcome},
};
use clap::{Args, ValueEnum};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    str::FromStr,
};
use transfusion_ptxsim::{
    Access, Argument, Checks, Launch, Memory, MemoryId, Module, Options, Schedule, Window, simulate,
};

/// Run any PTX kernel on arrays given as files, with every check.
///
/// An array is a file of raw bytes, as numpy's `tofile` writes it. Findings go to stderr and end with exit
/// code 1; results are written all the same, but over no file that exists.
#[derive(Args, Debug)]
#[command(after_help = "\
Arguments, in the order of the kernel's parameters:
  in:FILE           an array that the kernel reads
  out:FILE:BYTES    an array of so many bytes that the kernel writes
  inout:FILE:TO     an array that it reads and writes; the result goes to the file TO
  u32:N  i32:N  u64:N  f32:X   a number
  null              no array

Example:
  transfusion kernels sim scale.ptx scale --grid 4 --block 256 out:y.bin:4096 in:x.bin f32:2 u32:1024")]
pub(crate) struct Sim {
    /// The PTX.
    #[arg(value_name = "PTX")]
    file: PathBuf,
    /// The entry point.
    #[arg(value_name = "ENTRY")]
    entry: String,
    /// What it is given.
    #[arg(value_name = "ARGUMENT")]
    arguments: Vec<Given>,
    /// Blocks, as X or X,Y or X,Y,Z.
    #[arg(long, value_name = "X,Y,Z", default_value = "1")]
    grid: Extents,
    /// Threads of a block.
    #[arg(long, value_name = "X,Y,Z", default_value = "32")]
    block: Extents,
    /// Blocks of a cluster.
    #[arg(long, value_name = "X,Y,Z", default_value = "1")]
    cluster: Extents,
    /// Dynamic shared memory, bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    shared: u32,
    /// All blocks run at the same time and may wait for each other.
    #[arg(long)]
    cooperative: bool,
    /// The order in which warps run: 1 to 4.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=4))]
    schedule: u8,
    /// What is looked for: everything, or only what costs no time (bounds, alignment, divergence,
    /// deadlock).
    #[arg(long, value_enum, default_value_t = Looked::All)]
    checks: Looked,
    /// Do not print what the kernel did.
    #[arg(long)]
    quiet: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Looked {
    All,
    Cheap,
}

/// Extents along x, y and z.
#[derive(Clone, Copy, Debug)]
struct Extents([u32; 3]);

impl FromStr for Extents {
    type Err = String;

    fn from_str(text: &str) -> Result<Extents, String> {
        let mut extents = [1; 3];
        let parts: Vec<&str> = text.split(',').collect();
        if parts.len() > 3 {
            return Err("there are three extents at most".into());
        }
        for (extent, part) in extents.iter_mut().zip(parts) {
            *extent = part.trim().parse().map_err(|_| format!("`{part}` is no count"))?;
        }
        Ok(Extents(extents))
    }
}

/// An argument as the user gives it.
#[derive(Clone, Debug)]
enum Given {
    In(PathBuf),
    Out(PathBuf, usize),
    InOut(PathBuf, PathBuf),
    U32(u32),
    U64(u64),
    F32(f32),
    Null,
}

impl FromStr for Given {
    type Err = String;

    fn from_str(text: &str) -> Result<Given, String> {
        let number = |what: &str| format!("`{text}` holds no {what}");
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        let halves = || rest.rsplit_once(':').filter(|(a, b)| !a.is_empty() && !b.is_empty());
        match kind {
            "null" if rest.is_empty() => Ok(Given::Null),
            "in" if !rest.is_empty() => Ok(Given::In(rest.into())),
            "out" => {
                let (file, bytes) = halves().ok_or("an output is written out:FILE:BYTES")?;
                Ok(Given::Out(file.into(), bytes.parse().map_err(|_| number("number of bytes"))?))
            }
            "inout" => {
                let (file, to) = halves().ok_or("an array that is changed is written inout:FILE:TO")?;
                Ok(Given::InOut(file.into(), to.into()))
            }
            "u32" => rest.parse().map(Given::U32).map_err(|_| number("unsigned 32-bit number")),
            "i32" => {
                let signed: i32 = rest.parse().map_err(|_| number("signed 32-bit number"))?;
                Ok(Given::U32(signed as u32))
            }
            "u64" => rest.parse().map(Given::U64).map_err(|_| number("unsigned 64-bit number")),
            "f32" => rest.parse().map(Given::F32).map_err(|_| number("number")),
            _ => Err(format!("`{text}` is no argument: in, out, inout, u32, i32, u64, f32 or null")),
        }
    }
}

impl Given {
    /// The array behind it.
    fn memory(&self) -> Outcome<Option<Memory>> {
        Ok(match self {
            Given::In(file) | Given::InOut(file, _) => Some(Memory::from_bytes(&read(file)?)),
            Given::Out(_, bytes) => Some(Memory::new(*bytes)),
            _ => None,
        })
    }

    /// Where its result goes.
    fn result(&self) -> Option<&Path> {
        match self {
            Given::Out(file, _) | Given::InOut(_, file) => Some(file),
            _ => None,
        }
    }

    fn argument<'a>(&self, name: &'a str, memories: &[Memory], next: &mut usize) -> Argument<'a> {
        let mut window = |access| {
            let memory = MemoryId(*next);
            *next += 1;
            let len = memories[memory.0].len();
            Argument::Window(Window { name, memory, start: 0, len, offset: 0, access })
        };
        match self {
            Given::In(_) => window(Access::Read),
            Given::Out(..) | Given::InOut(..) => window(Access::ReadWrite),
            Given::U32(x) => Argument::U32(*x),
            Given::U64(x) => Argument::U64(*x),
            Given::F32(x) => Argument::F32(*x),
            Given::Null => Argument::Null,
        }
    }
}

impl Sim {
    /// Runs it and writes the results.
    pub(crate) fn run(self) -> Outcome {
        let taken = self.arguments.iter().filter_map(Given::result).find(|p| p.exists());
        if let Some(path) = taken {
            let why = format!("{}: the file exists and is not overwritten", path.display());
            return Err(Failure::error(why).hint("remove it, or name another one"));
        }
        let text = String::from_utf8(read(&self.file)?);
        let text = text.map_err(|_| Failure::error(format!("{}: this is no text", self.file.display())))?;
        let module = Module::load(&self.file.display().to_string(), &text).map_err(Failure::error)?;
        let kernel = module.kernel(&self.entry).map_err(Failure::error)?;
        let mut memories = Vec::new();
        for given in &self.arguments {
            memories.extend(given.memory()?);
        }
        let names: Vec<String> = (0..self.arguments.len()).map(|i| format!("argument {i}")).collect();
        let mut next = 0;
        let with_names = self.arguments.iter().zip(&names);
        let args: Vec<Argument<'_>> =
            with_names.map(|(g, name)| g.argument(name, &memories, &mut next)).collect();
        let launch = Launch {
            kernel,
            grid: self.grid.0,
            block: self.block.0,
            cluster: self.cluster.0,
            shared: self.shared,
            cooperative: self.cooperative,
            args: &args,
        };
        let outcome = simulate(&mut memories, &launch, &self.options()).map_err(Failure::error)?;
        self.write(&memories)?;
        if !self.quiet {
            console::print(&outcome.counters)?;
        }
        outcome.findings.iter().for_each(console::note);
        match outcome.findings.len() {
            0 => Ok(()),
            n => Err(Failure::error(format!("{} has {n} faults", self.entry))),
        }
    }

    fn options(&self) -> Options {
        let checks = match self.checks {
            Looked::All => Checks::all(),
            Looked::Cheap => Checks::cheap(),
        };
        let schedule = Schedule::SEVERAL[usize::from(self.schedule) - 1];
        Options { schedule, checks, ..Options::default() }
    }

    fn write(&self, memories: &[Memory]) -> Outcome {
        let arrays =
            self.arguments.iter().filter(|g| matches!(g, Given::In(_) | Given::Out(..) | Given::InOut(..)));
        for (given, memory) in arrays.zip(memories) {
            if let Some(path) = given.result() {
                let file = fs::File::create_new(path).and_then(|mut f| f.write_all(memory.bytes()));
                file.map_err(|e| Failure::error(format!("{}: {e}", path.display())))?;
            }
        }
        Ok(())
    }
}

fn read(path: &Path) -> Outcome<Vec<u8>> {
    fs::read(path).map_err(|e| Failure::error(format!("{}: {e}", path.display())))
}
