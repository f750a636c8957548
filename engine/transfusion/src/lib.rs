//! Transfusion.
