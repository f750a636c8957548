//! What transfusion is measured with: whole training steps, sampling and every distinct op of a plan, beside
//! PyTorch on the same machine in the same run (`benches/torch`), in turn, with results that agree before they are
//! timed. `transfusion bench` is its command; criterion benches are in this folder.
//!
//! In reading order: `statistics` (what may be concluded from times), `machine` (what ran) and `peak` (the most it
//! does), `floats` (what is computed in), `peer` (the process on the other side) and `folder` (what it is handed),
//! `row` (what is told), `contest` (both sides in turn), then what is measured.
pub mod error;
pub mod statistics;
pub mod peak;
pub mod machine;
pub mod floats;
pub mod folder;
pub mod peer;
pub mod row;
pub mod contest;
pub mod step;
pub mod sample;
pub mod ops;
pub mod scaling;

pub use error::{Error, Result};

use transfusion::run::RunConfig;

/// A preset in training on this CPU.
///
/// # Errors
/// If there is no such preset.
pub fn training(preset: &str, threads: usize) -> Result<step::Step> {
    let config = RunConfig::preset(preset)?;
    step::Step::new(&config, step::packing(&config), transfusion::engine::cpu(threads)?)
}
