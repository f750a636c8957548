//! The graph executor of transfusion. It knows no transformer.

pub mod random;
