//! Options that several commands share: what decides a training, and the device.
use crate::{
    console,
    failure::{Failure, Outcome},
};
use clap::{Args, builder::PossibleValuesParser};
use std::{path::PathBuf, str::FromStr};
use transfusion::{
    Error,
    config::{ModelConfig, PRESETS},
    hardware::{self, Hardware},
    run::RunConfig,
};
use transfusion_core::device::Device;
use transfusion_ptxsim::{SimDevice, SimOptions};

/// A preset, and what is laid over it.
#[derive(Args, Debug)]
pub(crate) struct Settings {
    /// Model and training to begin with.
    #[arg(long, value_name = "NAME", default_value = "tiny", value_parser = PossibleValuesParser::new(PRESETS))]
    pub(crate) preset: String,
    /// JSON file of settings laid over the preset: an object with any of the keys that --print-config
    /// of `train` shows.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Settings laid over both, by their dotted keys, as in `train.lr=1e-3` or
    /// `model.num_hidden_layers=2`. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", num_args = 1.., value_parser = assignment)]
    set: Vec<(String, String)>,
}

impl Settings {
    /// The preset, then the file, then the single settings.
    pub(crate) fn resolve(&self) -> Outcome<RunConfig> {
        let mut config = RunConfig::preset(&self.preset)?;
        if let Some(path) = &self.config {
            config.merge(path)?;
        }
        for (key, value) in &self.set {
            let keys = "`transfusion train --print-config` shows every setting";
            config.set(key, value).map_err(|e| Failure::from(e).hint(keys))?;
        }
        Ok(config)
    }
}

fn assignment(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a setting is written KEY=VALUE")?;
    Ok((key.trim().into(), value.trim().into()))
}

/// Where a model runs.
#[derive(Args, Debug)]
pub(crate) struct Machine {
    /// What it runs on: cpu, cuda, cuda:N, or auto, which is a GPU if one is there that has a kernel for
    /// everything the model does, else the CPU; or sim, which runs the kernels in the simulator with every
    /// check.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Chosen,
    /// Threads of the CPU; 0 is one for each core. Results do not depend on it.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=1024))]
    threads: u16,
}

/// A machine by name.
#[derive(Clone, Copy, Debug)]
enum Chosen {
    Hardware(Hardware),
    Simulator,
}

impl FromStr for Chosen {
    type Err = String;

    fn from_str(name: &str) -> Result<Chosen, String> {
        match name {
            "sim" => Ok(Chosen::Simulator),
            _ => match name.parse() {
                Ok(hardware) => Ok(Chosen::Hardware(hardware)),
                Err(_) => Err("devices are auto, cpu, cuda, cuda:N and sim, N counted from 0".into()),
            },
        }
    }
}

impl Machine {
    /// Opens it for a model.
    pub(crate) fn open(
        &self,
        model: impl FnOnce() -> Result<ModelConfig, Error>,
    ) -> Outcome<Box<dyn Device>> {
        let hardware = match self.device {
            Chosen::Hardware(hardware) => hardware,
            Chosen::Simulator => {
                let simulator = SimDevice::new(SimOptions::default())?;
                simulator.target().map_or(Ok(()), |target| hardware::lowers(&model()?, &target))?;
                return Ok(Box::new(simulator));
            }
        };
        let opened = hardware.open(usize::from(self.threads), model)?;
        opened.notices.iter().for_each(console::note);
        Ok(opened.device)
    }
}
