//! `ptxc`: kernels to PTX.
use clap::{Parser, Subcommand};
use std::{
    ffi::OsString,
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};
use transfusion_ptxc::{Arch, Error, Nvrtc, Result, Source, Tree, nvrtc::Choice, ptxas::Ptxas, wheel::Cache};

/// Compiles the kernels under kernels-cu/ to the PTX under ptx/, and checks that they belong together.
#[derive(Debug, Parser)]
#[command(name = "ptxc", version, max_term_width = 100)]
struct Cli {
    /// The tree: where kernels-cu/ and ptx/ lie.
    #[arg(long, global = true, value_name = "DIR", default_value = ".")]
    root: PathBuf,
    /// Where the pinned tools are kept [default: ROOT/.cache/ptxc].
    #[arg(long, global = true, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// A libnvrtc.so to compile with, or `system`; TRANSFUSION_NVRTC says the same [default: the pinned one].
    #[arg(long, global = true, value_name = "LIB")]
    nvrtc: Option<OsString>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compiles the kernels, all or those named, and writes what has changed under ptx/.
    Build {
        /// Kernels, as paths below kernels-cu/ without .cu.
        stems: Vec<String>,
    },
    /// Whether ptx/ is, byte for byte, what kernels-cu/ compiles to.
    Check,
    /// What `check` finds without a compiler: stamps, contracts, and the list of modules.
    Verify,
    /// Assembles every module with ptxas and writes registers, shared memory and stack to ptx/REPORT.md.
    Report {
        /// Compare with the committed table instead.
        #[arg(long)]
        check: bool,
    },
    /// Prints the machine code of a committed module.
    Sass {
        /// The PTX: ptx/sm_80/NAME.ptx.
        file: PathBuf,
    },
    /// Compiles one file and prints the PTX.
    Compile {
        /// The kernel.
        file: PathBuf,
        /// Compile for this architecture instead of what the file says.
        #[arg(long)]
        arch: Option<String>,
        /// Write here instead of to the standard output.
        #[arg(long, short)]
        out: Option<PathBuf>,
        /// Also look for headers here.
        #[arg(short = 'I', value_name = "DIR")]
        include: Vec<PathBuf>,
    },
}

impl Cli {
    fn cache(&self) -> Cache {
        Cache::new(self.cache.clone().unwrap_or_else(|| self.root.join(".cache/ptxc")))
    }

    fn compiler(&self) -> Result<Nvrtc> {
        let user = self.nvrtc.clone().or_else(|| std::env::var_os("TRANSFUSION_NVRTC"));
        Nvrtc::open(&Choice::from_user(user.as_deref()), &self.cache())
    }

    fn tree(&self) -> Tree {
        Tree::new(&self.root)
    }

    fn run(&self) -> Result<()> {
        match &self.command {
            Command::Build { stems } => self.build(stems),
            Command::Check => {
                let count = self.tree().check(&self.compiler()?)?;
                println!("ptx/ is what kernels-cu/ compiles to: {count} files");
                Ok(())
            }
            Command::Verify => {
                let count = self.tree().verify()?;
                println!("ptx/ has the stamps of kernels-cu/ and keeps its contracts: {count} files");
                Ok(())
            }
            Command::Report { check } => self.report(*check),
            Command::Sass { file } => self.sass(file),
            Command::Compile { file, arch, out, include } => {
                self.compile(file, arch.as_deref(), out.as_deref(), include)
            }
        }
    }

    fn build(&self, stems: &[String]) -> Result<()> {
        let built = self.tree().build(&self.compiler()?, stems)?;
        built.warnings.iter().for_each(|w| eprintln!("{w}"));
        built.written.iter().for_each(|p| println!("wrote {}", p.display()));
        built.removed.iter().for_each(|p| println!("removed {}", p.display()));
        if built.written.is_empty() && built.removed.is_empty() {
            println!("nothing has changed");
        }
        Ok(())
    }

    fn report(&self, check: bool) -> Result<()> {
        let (tree, ptxas) = (self.tree(), Ptxas::open(&self.cache())?);
        let path = tree.report_path();
        if check {
            tree.check_report(&ptxas)?;
            println!("{} is what ptxas says", path.display());
        } else if tree.write_report(&ptxas)? {
            println!("wrote {}", path.display());
        } else {
            println!("nothing has changed");
        }
        Ok(())
    }

    fn sass(&self, file: &Path) -> Result<()> {
        let text = std::fs::read_to_string(file).map_err(|e| file_error(file, e))?;
        let target = text.lines().find_map(|l| l.strip_prefix(".target ")).unwrap_or_default();
        let arch = parse_arch(file, target.split(',').next().unwrap_or_default().trim())?;
        print(&Ptxas::open(&self.cache())?.sass(&self.cache(), file, arch)?)
    }

    fn compile(
        &self,
        file: &Path,
        arch: Option<&str>,
        out: Option<&Path>,
        include: &[PathBuf],
    ) -> Result<()> {
        let mut dirs = include.to_vec();
        dirs.extend(self.tree().include());
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let source = Source::read(file, &stem, &dirs)?;
        let arch = arch.map_or(Ok(source.targets[0]), |name| parse_arch(file, name))?;
        let compiled = self.compiler()?.compile(&source, arch)?;
        if !compiled.warnings.is_empty() {
            eprintln!("{}", compiled.warnings);
        }
        match out {
            Some(path) => std::fs::write(path, compiled.ptx).map_err(|e| file_error(path, e)),
            None => print(&compiled.ptx),
        }
    }
}

fn parse_arch(file: &Path, name: &str) -> Result<Arch> {
    let known = Arch::ALL.map(Arch::name).join(", ");
    let why = format!("unknown architecture {name:?}; known are {known}");
    Arch::parse(name).ok_or(Error::Source { path: file.into(), line: 0, why })
}

/// Writes to the standard output, as long as someone reads it.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(file_error(Path::new("standard output"), e)),
        _ => Ok(()),
    }
}

fn file_error(path: &Path, e: std::io::Error) -> Error {
    Error::File { path: path.into(), why: e.to_string() }
}

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            if let Some(hint) = e.hint() {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}
