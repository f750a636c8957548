//! Transfusion.

pub mod batch;
pub mod data;
pub mod error;
pub mod picture;
