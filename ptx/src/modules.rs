//! Every file under `ptx/`. Written by `ptxc build`.
use crate::Module;

#[rustfmt::skip]
pub(crate) const MODULES: &[Module] = &[
];
