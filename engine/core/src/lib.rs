//! The graph executor of transfusion. It knows no transformer.

pub mod checkpoint;
pub mod random;
