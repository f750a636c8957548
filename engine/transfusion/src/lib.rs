//! Transfusion.

pub mod error;
pub mod metrics;
pub mod run_dir;
