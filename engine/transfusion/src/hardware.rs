//! Which machine a model runs on, by name.
use crate::{
    config::ModelConfig,
    engine::{Program, cpu},
    error::{Error, Result},
    model::{Capacity, Extend, ImagePass, LossOptions},
    train::TrainOptions,
};
use std::{fmt, str::FromStr};
use transfusion_core::{
    self as core,
    device::{CudaDevice, CudaOptions, Device},
    launch::Target,
    plan::Plan,
};

/// A machine by name: `auto`, `cpu`, `cuda`, `cuda:1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hardware {
    /// A GPU where there is one that runs every op of the model, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU, counted from 0.
    Cuda(usize),
}

/// A machine, opened.
pub struct Opened {
    /// The machine.
    pub device: Box<dyn Device>,
    /// What a user should know of the choice, a line each.
    pub notices: Vec<String>,
}

impl FromStr for Hardware {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Hardware, String> {
        let ordinal = name.strip_prefix("cuda:").map(str::parse);
        match (name, ordinal) {
            ("auto", _) => Ok(Hardware::Auto),
            ("cpu", _) => Ok(Hardware::Cpu),
            ("cuda", _) => Ok(Hardware::Cuda(0)),
            (_, Some(Ok(ordinal))) => Ok(Hardware::Cuda(ordinal)),
            _ => Err("devices are auto, cpu, cuda and cuda:N, N counted from 0".into()),
        }
    }
}

impl fmt::Display for Hardware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Hardware::Auto => f.write_str("auto"),
            Hardware::Cpu => f.write_str("cpu"),
            Hardware::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl Hardware {
    /// Opens the machine for a model, which is asked for only where the choice depends on it. `threads`
    /// are the CPU's; 0 is one for each core.
    ///
    /// # Errors
    /// If there is no such machine, or it lacks a kernel for an op of the model.
    pub fn open(self, threads: usize, model: impl FnOnce() -> Result<ModelConfig>) -> Result<Opened> {
        let on_cpu = |notices| Ok(Opened { device: cpu(threads)?, notices });
        match self {
            Hardware::Cpu => on_cpu(vec![]),
            Hardware::Cuda(ordinal) => cuda(ordinal, model),
            Hardware::Auto => match cuda(0, model) {
                Ok(opened) => Ok(opened),
                // Most machines have no GPU, and nobody wants to be told.
                Err(Error::Core(core::Error::NoDevice(why))) if why.is_absence() => on_cpu(vec![]),
                Err(Error::Core(why)) => on_cpu(vec![format!("running on the CPU: {why}")]),
                Err(e) => Err(e),
            },
        }
    }
}

fn cuda(ordinal: usize, model: impl FnOnce() -> Result<ModelConfig>) -> Result<Opened> {
    let device = CudaDevice::new(CudaOptions { ordinal, ..CudaOptions::default() })?;
    if let Some(target) = device.target() {
        lowers(&model()?, &target)?;
    }
    let notices = device.notices().to_vec();
    Ok(Opened { device: Box::new(device), notices })
}

/// Whether every op of a model's programs has a kernel for a machine.
///
/// # Errors
/// The first op that has none.
pub fn lowers(config: &ModelConfig, target: &Target) -> Result<()> {
    config.check()?;
    programs(config).into_iter().try_for_each(|p| Ok(Plan::lowered(&p.graph(config)?, target).map(drop)?))
}

/// Every kind of program that a model has, at a small size.
fn programs(config: &ModelConfig) -> Vec<Program> {
    let patches = config.image().map_or(0, |image| image.patches());
    let positions = config.max_position_embeddings.min(patches + 16);
    let images = usize::from(config.image().is_some());
    let capacity = Capacity { rows: 1, positions, text_rows: positions, images };
    let extend = Extend { rows: 2, positions: 1, slots: 2, capacity: positions, ema: false };
    let mut programs = vec![
        Program::Loss(capacity, LossOptions::TRAIN),
        Program::Loss(capacity, LossOptions::EVAL),
        Program::Update(TrainOptions::default().update()),
        Program::Text(extend),
    ];
    if images > 0 {
        let extend = Extend { positions: patches, ..extend };
        let passes = [ImagePass::Commit, ImagePass::Denoise { guided: true }];
        programs.extend(passes.map(|pass| Program::Image(extend, pass)));
    }
    programs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PRESETS;

    #[test]
    fn names_come_back() {
        for hardware in [Hardware::Auto, Hardware::Cpu, Hardware::Cuda(0), Hardware::Cuda(7)] {
            assert_eq!(hardware.to_string().parse(), Ok(hardware));
        }
        assert_eq!("cuda".parse(), Ok(Hardware::Cuda(0)));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            assert!(wrong.parse::<Hardware>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn programs_of_every_preset_can_be_planned() {
        for preset in PRESETS {
            let config = ModelConfig::preset(preset).unwrap();
            for program in programs(&config) {
                Plan::new(&program.graph(&config).unwrap()).unwrap();
            }
        }
    }
}
