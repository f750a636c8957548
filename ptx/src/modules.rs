//! Every file under `ptx/` but the ladder. Written by `ptxc build`.
use crate::Module;

#[rustfmt::skip]
pub(crate) const MODULES: &[Module] = &[
    Module::from_static("sm_80", "adamw", include_str!("../sm_80/adamw.ptx")),
    Module::from_static("sm_80", "add", include_str!("../sm_80/add.ptx")),
    Module::from_static("sm_80", "attention", include_str!("../sm_80/attention.ptx")),
    Module::from_static("sm_80", "attention_decode", include_str!("../sm_80/attention_decode.ptx")),
    Module::from_static("sm_80", "cache_append", include_str!("../sm_80/cache_append.ptx")),
    Module::from_static("sm_80", "cast", include_str!("../sm_80/cast.ptx")),
    Module::from_static("sm_80", "clip", include_str!("../sm_80/clip.ptx")),
    Module::from_static("sm_80", "cross_entropy", include_str!("../sm_80/cross_entropy.ptx")),
    Module::from_static("sm_80", "ema", include_str!("../sm_80/ema.ptx")),
    Module::from_static("sm_80", "fill", include_str!("../sm_80/fill.ptx")),
    Module::from_static("sm_80", "gather_rows", include_str!("../sm_80/gather_rows.ptx")),
    Module::from_static("sm_80", "linear", include_str!("../sm_80/linear.ptx")),
    Module::from_static("sm_80", "linear_few", include_str!("../sm_80/linear_few.ptx")),
    Module::from_static("sm_80", "mse", include_str!("../sm_80/mse.ptx")),
    Module::from_static("sm_80", "patchify", include_str!("../sm_80/patchify.ptx")),
    Module::from_static("sm_80", "q_sample", include_str!("../sm_80/q_sample.ptx")),
    Module::from_static("sm_80", "qk_norm", include_str!("../sm_80/qk_norm.ptx")),
    Module::from_static("sm_80", "rmsnorm", include_str!("../sm_80/rmsnorm.ptx")),
    Module::from_static("sm_80", "rope", include_str!("../sm_80/rope.ptx")),
    Module::from_static("sm_80", "sampler_update", include_str!("../sm_80/sampler_update.ptx")),
    Module::from_static("sm_80", "scatter_rows", include_str!("../sm_80/scatter_rows.ptx")),
    Module::from_static("sm_80", "sum_squares", include_str!("../sm_80/sum_squares.ptx")),
    Module::from_static("sm_80", "swiglu", include_str!("../sm_80/swiglu.ptx")),
    Module::from_static("sm_80", "time_embedding", include_str!("../sm_80/time_embedding.ptx")),
    Module::from_static("sm_90a", "attention_wgmma", include_str!("../sm_90a/attention_wgmma.ptx")),
    Module::from_static("sm_90a", "attention_wgmma_bwd", include_str!("../sm_90a/attention_wgmma_bwd.ptx")),
    Module::from_static("sm_90a", "cross_entropy_wgmma", include_str!("../sm_90a/cross_entropy_wgmma.ptx")),
    Module::from_static("sm_90a", "linear_wgmma", include_str!("../sm_90a/linear_wgmma.ptx")),
];
