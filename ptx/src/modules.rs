//! Every file under `ptx/`. Written by `ptxc build`.
use crate::Module;

#[rustfmt::skip]
pub(crate) const MODULES: &[Module] = &[
    Module::from_static("sm_80", "adamw", include_str!("../sm_80/adamw.ptx")),
    Module::from_static("sm_80", "attention", include_str!("../sm_80/attention.ptx")),
    Module::from_static("sm_80", "cache_append", include_str!("../sm_80/cache_append.ptx")),
    Module::from_static("sm_80", "clip", include_str!("../sm_80/clip.ptx")),
    Module::from_static("sm_80", "cross_entropy", include_str!("../sm_80/cross_entropy.ptx")),
    Module::from_static("sm_80", "ema", include_str!("../sm_80/ema.ptx")),
    Module::from_static("sm_80", "linear", include_str!("../sm_80/linear.ptx")),
    Module::from_static("sm_80", "rmsnorm", include_str!("../sm_80/rmsnorm.ptx")),
    Module::from_static("sm_80", "sampler_update", include_str!("../sm_80/sampler_update.ptx")),
    Module::from_static("sm_80", "sum_squares", include_str!("../sm_80/sum_squares.ptx")),
];
