//! What kernels are tried on, and kernels that stand in for the shipped ones.
use crate::failure::{Failure, Outcome};
use clap::{Args, ValueEnum};
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    str::FromStr,
};
use transfusion_core::{
    cases::{self, Case},
    device::{CudaDevice, CudaOptions, Device},
    launch::Roofline,
    tensor::DType,
};
use transfusion_ptx::Module;
use transfusion_ptxc::{self as ptxc, Arch, Contract, Nvrtc, Source, nvrtc::Choice, wheel::Cache};
use transfusion_ptxsim::{Options, Schedule, SimDevice, SimOptions};

/// The ops, the machine, and kernels of one's own.
#[derive(Args, Debug)]
pub(crate) struct Workbench {
    /// Ops, as `linear attention` [default: all that have kernels].
    #[arg(value_name = "OP")]
    ops: Vec<String>,
    #[command(flatten)]
    machines: Machines,
    /// How floats are stored.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Float::Bf16, Float::F32])]
    float: Vec<Float>,
}

/// A machine that kernels are tried on, and kernels of one's own.
#[derive(Args, Debug)]
pub(crate) struct Machines {
    /// sim runs the PTX in the simulator; cuda and cuda:N on a GPU.
    #[arg(long, value_name = "DEVICE", default_value = "sim")]
    device: Bench,
    #[command(flatten)]
    simulated: Simulated,
}

/// A simulated machine, and kernels of one's own.
#[derive(Args, Debug)]
pub(crate) struct Simulated {
    /// The machine that launches are made for in the simulator.
    #[arg(long, value_enum, default_value_t = Model::A100)]
    target: Model,
    /// Multiprocessors that launches are made for, in place of the machine's own number; of a GPU at most that. Fewer make
    /// other tiles and other splits.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    sms: Option<u16>,
    /// Compile this file with NVRTC and use its entries in place of the shipped ones of the same names.
    /// May be repeated.
    #[arg(long, value_name = "FILE")]
    cu: Vec<PathBuf>,
    /// Also look for headers of --cu here [default: beside the file, and kernels-cu/ of this folder].
    #[arg(short = 'I', value_name = "DIR")]
    include: Vec<PathBuf>,
    /// A libnvrtc.so to compile with, or `system`; TRANSFUSION_NVRTC says the same [default: the pinned
    /// one, which pip fetches once].
    #[arg(long, value_name = "LIB")]
    nvrtc: Option<OsString>,
}

/// Where kernels are tried.
#[derive(Clone, Copy, Debug)]
enum Bench {
    Sim,
    Cuda(usize),
}

impl FromStr for Bench {
    type Err = String;

    fn from_str(name: &str) -> Result<Bench, String> {
        match (name, name.strip_prefix("cuda:").map(str::parse)) {
            ("sim", _) => Ok(Bench::Sim),
            ("cuda", _) => Ok(Bench::Cuda(0)),
            (_, Some(Ok(ordinal))) => Ok(Bench::Cuda(ordinal)),
            _ => Err("kernels are tried on sim, cuda or cuda:N, N counted from 0".into()),
        }
    }
}

/// A machine that launches can be made for without it.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "UPPER")]
pub(crate) enum Model {
    #[value(alias = "a100")]
    A100,
    #[value(alias = "h100")]
    H100,
    #[value(alias = "h200")]
    H200,
}

impl Model {
    /// What it can do at most.
    pub(crate) fn roofline(self) -> Roofline {
        let [a100, h100, h200] = Roofline::ALL;
        match self {
            Model::A100 => a100,
            Model::H100 => h100,
            Model::H200 => h200,
        }
    }
}

/// A storage type.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Float {
    Bf16,
    F32,
}

/// A machine that kernels are tried on.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Machine {
    Sim(SimDevice),
    Cuda(CudaDevice),
}

impl Machine {
    pub(crate) fn device(&mut self) -> &mut dyn Device {
        match self {
            Machine::Sim(d) => d,
            Machine::Cuda(d) => d,
        }
    }
}

impl Workbench {
    /// The storage types.
    pub(crate) fn floats(&self) -> impl Iterator<Item = DType> + '_ {
        self.float.iter().map(|f| match f {
            Float::Bf16 => DType::Bf16,
            Float::F32 => DType::F32,
        })
    }

    /// The machine, once for every schedule; a GPU has its own.
    pub(crate) fn open(&self, schedules: &[Schedule]) -> Outcome<Vec<Machine>> {
        self.machines.open(schedules)
    }

    /// The cases of the ops that were asked for.
    pub(crate) fn cases(&self, all: Vec<Case>) -> Outcome<Vec<Case>> {
        let known: Vec<&str> = transfusion_core::ops::NAMES.to_vec();
        if let Some(op) = self.ops.iter().find(|op| !known.contains(&op.as_str())) {
            return Err(Failure::usage(format!("there is no op {op}"))
                .hint(format!("the ops are {}", known.join(", "))));
        }
        let wanted = |case: &Case| self.ops.is_empty() || self.ops.iter().any(|op| op == case.op);
        Ok(all.into_iter().filter(wanted).collect())
    }

    /// The case tables of the ops that were asked for.
    pub(crate) fn tables(&self) -> Outcome<Vec<Case>> {
        self.cases(cases::all())
    }
}

impl Machines {
    /// The machine, once for every schedule; a GPU has its own.
    pub(crate) fn open(&self, schedules: &[Schedule]) -> Outcome<Vec<Machine>> {
        match self.device {
            Bench::Sim => schedules.iter().map(|s| Ok(Machine::Sim(self.simulated.open(*s)?))).collect(),
            Bench::Cuda(ordinal) => {
                // The first opening tells the architecture that the files are to be compiled for.
                let arch = CudaDevice::new(CudaOptions { ordinal, ..CudaOptions::default() })?;
                let arch = arch.target().map_or("sm_80", |t| t.arch);
                let kernels = self.simulated.compiled(arch)?;
                let sms = self.simulated.sms.map(u32::from);
                Ok(vec![Machine::Cuda(CudaDevice::new(CudaOptions { ordinal, kernels, sms })?)])
            }
        }
    }
}

impl Simulated {
    /// The simulator.
    pub(crate) fn open(&self, schedule: Schedule) -> Outcome<SimDevice> {
        let mut target = self.target.roofline().target;
        target.sms = self.sms.map_or(target.sms, u32::from);
        let kernels = self.compiled(target.arch)?;
        let simulation = Options { schedule, ..Options::default() };
        Ok(SimDevice::new(SimOptions { target, simulation, kernels })?)
    }

    /// The files of `--cu` as PTX.
    fn compiled(&self, arch: &'static str) -> Outcome<Vec<Module>> {
        if self.cu.is_empty() {
            return Ok(vec![]);
        }
        let user = self.nvrtc.clone().or_else(|| std::env::var_os("TRANSFUSION_NVRTC"));
        let nvrtc =
            Nvrtc::open(&Choice::from_user(user.as_deref()), &Cache::new(cache())).map_err(failure)?;
        self.cu.iter().map(|path| self.compile(&nvrtc, path, arch)).collect()
    }

    fn compile(&self, nvrtc: &Nvrtc, path: &Path, arch: &'static str) -> Outcome<Module> {
        let stem = path.file_stem().map_or("kernel".into(), |s| s.to_string_lossy());
        let mut include = self.include.clone();
        include.extend(path.parent().map(PathBuf::from));
        include.extend(
            ["kernels-cu", "kernels-cu/common"].map(PathBuf::from).into_iter().filter(|p| p.is_dir()),
        );
        let source = Source::read(path, &stem, &include).map_err(failure)?;
        let exact = Arch::parse(arch).filter(|arch| source.targets.contains(arch));
        let Some(arch) = exact.or(source.targets.first().copied()) else {
            return Err(Failure::error(format!("{}: it is compiled for no architecture", path.display())));
        };
        let compiled = nvrtc.compile(&source, arch).map_err(failure)?;
        compiled.warnings.lines().for_each(crate::console::note);
        let module = Module::new(arch.name(), stem, compiled.ptx);
        let contract = Contract::read(path, &source.text).map_err(failure)?;
        contract.hold(path, &source.text, arch, &module).map_err(failure)?;
        Ok(module)
    }
}

/// Where the pinned compiler is kept.
fn cache() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    base.unwrap_or_else(std::env::temp_dir).join("transfusion/ptxc")
}

fn failure(e: ptxc::Error) -> Failure {
    let failure = Failure::error(&e);
    match e.hint() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}
