//! The graph executor of transfusion. It knows no transformer.
//!
//! A model builds a [`graph::Graph`]; [`adjoint`] extends it with its gradient; [`plan::Plan`] gives
//! every value a place; a [`device::Device`] replays plans.

pub mod tensor;
pub mod error;
pub mod random;
pub mod launch;
pub mod cpu;
pub mod op;
pub mod graph;
pub mod adjoint;
pub mod ops;
pub mod cases;
pub mod plan;
pub mod device;
pub mod agreement;
pub mod checkpoint;

pub use error::{Error, Result};
