//! What there is of CUDA on a machine: the driver, its GPUs, and which kernels they can run.
use super::driver::{self, Driver, Failure, Gpu};
use crate::{device::resolve, error::NoDevice, launch::Target};
use std::path::PathBuf;

/// What the plans of a GPU are lowered for. The peak follows from its clock.
pub(super) fn target(gpu: &Gpu, arch: &'static str) -> Target {
    /// Dense bf16 operations of a multiprocessor in a clock, by compute capability.
    fn rate(capability: (u32, u32)) -> f64 {
        match capability {
            (8, 0) => 2048.0,
            (9, _) => 4096.0,
            (10, _) => 8192.0,
            _ => 1024.0,
        }
    }
    Target {
        name: arch,
        arch,
        sms: gpu.sms,
        shared: gpu.shared,
        l2: gpu.l2,
        peak: rate(gpu.capability) * f64::from(gpu.sms) * gpu.clock as f64,
    }
}

/// Which kernels a GPU runs under a driver of this CUDA version, and what to tell if there are better.
pub(super) fn architecture(
    gpu: &Gpu,
    version: (u32, u32),
) -> Result<(&'static str, Option<String>), NoDevice> {
    let shipped = shipped();
    let needs = |arch| shipped.iter().find(|s| s.arch == arch).map_or((11, 0), |s| cuda_for(s.ptx));
    if gpu.capability < (8, 0) {
        return Err(NoDevice::Capability { name: gpu.name.clone(), have: gpu.capability });
    }
    if version < needs("sm_80") {
        return Err(NoDevice::DriverTooOld { have: version, need: needs("sm_80") });
    }
    let name = &gpu.name;
    if gpu.capability == (9, 0) && version >= needs("sm_90a") {
        return Ok(("sm_90a", None));
    }
    let notice = if gpu.capability == (9, 0) {
        let (major, minor) = needs("sm_90a");
        Some(format!("{name}: sm_80 kernels are used; its own need a driver for CUDA {major}.{minor}"))
    } else if gpu.capability > (9, 0) {
        Some(format!("{name}: sm_80 kernels are used; there are none of its own yet"))
    } else {
        None
    };
    Ok(("sm_80", notice))
}

/// The CUDA version whose drivers first read a PTX version.
pub fn cuda_for(ptx: (u32, u32)) -> (u32, u32) {
    match ptx {
        (0..=6, _) => (10, 2),
        (7, minor) => (11, minor),
        (8, minor @ 0..=5) => (12, minor),
        (8, minor) => (12, minor + 1),
        (9, minor) => (13, minor),
        (major, minor) => (major + 4, minor),
    }
}

/// The highest PTX version that the drivers of a CUDA version read.
pub fn ptx_for(cuda: (u32, u32)) -> (u32, u32) {
    match cuda {
        (0..=10, _) => (6, 5),
        (11, minor) => (7, minor),
        (12, minor @ 0..=5) => (8, minor),
        (12, minor) => (8, minor - 1),
        (13, minor) => (9, minor),
        (major, minor) => (major - 4, minor),
    }
}

/// The shipped kernels of an architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shipped {
    /// The architecture.
    pub arch: String,
    /// How many entry points.
    pub kernels: usize,
    /// The highest version of their PTX.
    pub ptx: (u32, u32),
}

/// The shipped kernels by architecture.
pub fn shipped() -> Vec<Shipped> {
    let mut all: Vec<Shipped> = Vec::new();
    for m in transfusion_ptx::modules() {
        let kernels = m.entries().map_or(0, |entries| entries.len());
        let ptx = resolve::version(&m.text).unwrap_or_default();
        match all.iter_mut().find(|s| s.arch == m.arch) {
            Some(s) => (s.kernels, s.ptx) = (s.kernels + kernels, s.ptx.max(ptx)),
            None => all.push(Shipped { arch: m.arch.to_string(), kernels, ptx }),
        }
    }
    all
}

/// What there is of CUDA on this machine, for `transfusion doctor`.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// The file of the driver's library, where the system tells.
    pub library: Option<PathBuf>,
    /// The CUDA version that the driver serves.
    pub version: Option<(u32, u32)>,
    /// The GPUs, each with the architecture of the kernels that would be used, or why it cannot be.
    pub gpus: Vec<(Gpu, Result<&'static str, NoDevice>)>,
    /// Why no GPU can be used.
    pub problem: Option<NoDevice>,
    /// Whether NVRTC, which only compiles changed kernels, was found.
    pub nvrtc: bool,
}

/// Looks what there is of CUDA on this machine; it takes no memory of a GPU.
pub fn survey() -> Survey {
    let mut survey = Survey { nvrtc: driver::has_nvrtc(), ..Survey::default() };
    let started = Driver::start();
    survey.library = driver::library();
    let found = started.and_then(|driver| {
        let unwell = |f: Failure| NoDevice::NoStart { code: f.name() };
        let version = driver.version().map_err(unwell)?;
        survey.version = Some(version);
        for ordinal in 0..driver.count().map_err(unwell)? {
            let gpu = driver.gpu(ordinal).map_err(unwell)?;
            let arch = architecture(&gpu, version).map(|(arch, _)| arch);
            survey.gpus.push((gpu, arch));
        }
        match survey.gpus.iter().find_map(|(_, arch)| arch.as_ref().err()) {
            _ if survey.gpus.is_empty() => Err(NoDevice::NoGpu),
            Some(why) if survey.gpus.iter().all(|(_, arch)| arch.is_err()) => Err(why.clone()),
            _ => Ok(()),
        }
    });
    survey.problem = found.err();
    survey
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(capability: (u32, u32)) -> Gpu {
        let (memory, sms, shared, l2, clock) = (80 << 30, 132, 227 << 10, 50 << 20, 1_830_000_000);
        Gpu { name: "GPU".into(), capability, memory, sms, shared, l2, clock }
    }

    #[test]
    fn kernels_suit_the_gpu_and_the_driver() {
        assert_eq!(architecture(&gpu((8, 6)), (13, 0)), Ok(("sm_80", None)));
        assert_eq!(architecture(&gpu((9, 0)), (13, 0)), Ok(("sm_90a", None)));
        let (arch, notice) = architecture(&gpu((12, 0)), (13, 0)).unwrap();
        assert!(arch == "sm_80" && notice.is_some_and(|n| n.contains("none of its own")));
        assert!(matches!(architecture(&gpu((7, 5)), (13, 0)), Err(NoDevice::Capability { .. })));
        let old = architecture(&gpu((8, 0)), (10, 2));
        assert!(matches!(old, Err(NoDevice::DriverTooOld { have: (10, 2), .. })), "{old:?}");
    }

    #[test]
    fn a_peak_follows_from_the_clock() {
        let peak = target(&gpu((9, 0)), "sm_90a").peak;
        assert!((peak / Target::H200.peak - 1.0).abs() < 0.01, "{peak}");
        let a100 = Gpu { sms: 108, clock: 1_410_000_000, ..gpu((8, 0)) };
        assert!((target(&a100, "sm_80").peak / Target::A100.peak - 1.0).abs() < 0.01);
    }

    #[test]
    fn ptx_and_cuda_versions_name_each_other() {
        for (ptx, cuda) in [((7, 0), (11, 0)), ((7, 8), (11, 8)), ((8, 0), (12, 0)), ((8, 5), (12, 5))] {
            assert_eq!((cuda_for(ptx), ptx_for(cuda)), (cuda, ptx));
        }
        // CUDA 12.6 stayed at 8.5.
        assert_eq!([(12, 6), (12, 8), (12, 9), (13, 0)].map(ptx_for), [(8, 5), (8, 7), (8, 8), (9, 0)]);
        assert_eq!([(8, 6), (8, 7), (8, 8), (9, 0)].map(cuda_for), [(12, 7), (12, 8), (12, 9), (13, 0)]);
    }
}
