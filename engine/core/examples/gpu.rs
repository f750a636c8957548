//! Opens every NVIDIA GPU of this machine, or says why there is none and what to do.
//!
//! `cargo run --release -p transfusion-core --example gpu`
use std::process::ExitCode;
use transfusion_core::{
    Error,
    device::{CudaDevice, CudaOptions, Device},
};

fn main() -> ExitCode {
    for ordinal in 0.. {
        match CudaDevice::new(CudaOptions { ordinal, ..CudaOptions::default() }) {
            Ok(device) => println!("cuda:{ordinal} {} {:?}", device.gpu().name, device.target()),
            Err(Error::NoDevice(_)) if ordinal > 0 => break,
            Err(Error::NoDevice(why)) => {
                eprintln!("error: {why}\nhint: {}", why.remedy());
                return ExitCode::FAILURE;
            }
            Err(e) => {
                eprintln!("error: {e}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
