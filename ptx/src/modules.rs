//! Every file under `ptx/`. Written by `ptxc build`.
use crate::Module;

#[rustfmt::skip]
pub(crate) const MODULES: &[Module] = &[
    Module::from_static("sm_80", "attention", include_str!("../sm_80/attention.ptx")),
    Module::from_static("sm_80", "linear", include_str!("../sm_80/linear.ptx")),
    Module::from_static("sm_80", "rmsnorm", include_str!("../sm_80/rmsnorm.ptx")),
];
