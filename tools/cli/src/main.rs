//! The command line of transfusion.
fn main() {}
