//! Transfusion.

pub mod error;
pub mod metrics;
pub mod report;
pub mod run_dir;
