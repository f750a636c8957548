//! The graph executor of transfusion. It knows no transformer.
//!
//! A model builds a [`graph::Graph`]; [`adjoint`] extends it with its gradient; [`plan::Plan`] gives
//! every value a place; a [`device::Device`] replays plans.

pub mod adjoint;
pub mod cases;
pub mod checkpoint;
pub mod cpu;
pub mod device;
pub mod error;
pub mod graph;
pub mod launch;
pub mod op;
pub mod ops;
pub mod plan;
pub mod random;
pub mod tensor;

pub use error::{Error, Result};
