//! Criterion benches of transfusion.
