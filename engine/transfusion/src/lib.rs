//! Train and sample one transformer that predicts the next text token and denoises images
//! ("Transfusion", Zhou et al. 2024).

pub mod error;
pub mod config;
pub mod diffusion;
pub mod model;
pub mod engine;
pub mod picture;
pub mod data;
pub mod batch;
pub mod train;
pub mod programs;
pub mod rehearsal;
pub mod hardware;
pub mod sample;
pub mod hf;
pub mod metrics;
pub mod report;
pub mod run_dir;
pub mod run;
pub mod footprint;
pub mod baseline;
mod run_report;
pub mod demo;

pub use error::{Error, Result};
