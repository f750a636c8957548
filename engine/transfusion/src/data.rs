//! Training data: where documents come from, and in which order they are visited.

pub mod shapes;
