//! The architectures that kernels are compiled for.
use std::fmt;

/// A version of the PTX instruction set, as `.version` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// An architecture that PTX is written for: a folder under `ptx/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arch {
    /// Ampere and everything after it.
    Sm80,
    /// Hopper alone: wgmma, TMA, clusters.
    Sm90a,
}

impl Arch {
    /// Every architecture.
    pub const ALL: [Arch; 2] = [Arch::Sm80, Arch::Sm90a];

    /// Name of the folder under `ptx/`, of `.target`, and of the real architecture: `sm_80`.
    pub fn name(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm90a => "sm_90a",
        }
    }

    /// The virtual architecture that NVRTC compiles for: `compute_80`.
    pub fn compute(self) -> &'static str {
        match self {
            Arch::Sm80 => "compute_80",
            Arch::Sm90a => "compute_90a",
        }
    }

    /// The lowest `.version` in which `.target` is known together with all that makes it worth choosing:
    /// 7.0 (CUDA 11.0, driver 450) has the bf16 `mma` and `cp.async`; 8.0 (CUDA 12.0, driver 525) has `wgmma`.
    pub fn floor(self) -> Version {
        match self {
            Arch::Sm80 => Version(7, 0),
            Arch::Sm90a => Version(8, 0),
        }
    }

    /// The architecture of this name.
    pub fn parse(name: &str) -> Option<Arch> {
        Arch::ALL.into_iter().find(|a| a.name() == name)
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
