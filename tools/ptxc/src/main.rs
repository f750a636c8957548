//! `ptxc`: kernels to PTX.
use clap::{Parser, Subcommand};
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
};
use transfusion_ptxc::{Arch, Error, Nvrtc, Result, Source, nvrtc::Choice, wheel::Cache};

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

    fn run(&self) -> Result<()> {
        match &self.command {
            Command::Compile { file, arch, out, include } => {
                self.compile(file, arch.as_deref(), out.as_deref(), include)
            }
        }
    }

    fn compile(
        &self,
        file: &Path,
        arch: Option<&str>,
        out: Option<&Path>,
        include: &[PathBuf],
    ) -> Result<()> {
        let mut dirs = include.to_vec();
        dirs.extend([self.root.join("kernels-cu"), self.root.join("kernels-cu/common")]);
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let source = Source::read(file, &stem, &dirs)?;
        let arch = match arch {
            None => source.targets[0],
            Some(name) => Arch::parse(name).ok_or_else(|| Error::Source {
                path: file.into(),
                line: 0,
                why: format!(
                    "unknown architecture {name}; known are {}",
                    Arch::ALL.map(Arch::name).join(", ")
                ),
            })?,
        };
        let compiled = self.compiler()?.compile(&source, arch)?;
        if !compiled.warnings.is_empty() {
            eprintln!("{}", compiled.warnings);
        }
        match out {
            Some(path) => std::fs::write(path, compiled.ptx)
                .map_err(|e| Error::File { path: path.into(), why: e.to_string() }),
            None => {
                print!("{}", compiled.ptx);
                Ok(())
            }
        }
    }
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
