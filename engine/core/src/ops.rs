//! Every op, one file each: formula and paper, builder, forward op, backward op, cases. To add one:
//! its file, and its two lines here.

mod adamw;
mod add;
mod attention;
mod cache_append;
mod cast;
mod cross_entropy;
mod embedding;
mod fill;
mod heads;
mod linear;
mod lots;
mod mse;
mod patchify;
mod q_sample;
mod qk_norm;
mod rmsnorm;
mod rope;
mod rows;
mod sampler;
mod swiglu;
mod time_embedding;

pub use adamw::{AdamW, AdamWStates};
pub use add::Repeat;
pub use heads::Heads;
pub use linear::{Activation, Epilogue, Factor};
pub use patchify::patch_width;
pub use q_sample::Noise;
pub use rope::{Qkv, Rotary};
pub use sampler::{SamplerInputs, SamplerStep};

use crate::cases::Case;

/// The names of the case tables: ops, and `silu`, which follows a product forward and is an op backward.
pub const NAMES: &[&str] = &[
    "adamw",
    "add",
    "attention",
    "cache_append",
    "cast",
    "clip",
    "cross_entropy",
    "ema",
    "embedding",
    "fill",
    "gather_rows",
    "linear",
    "mse",
    "patchify",
    "q_sample",
    "qk_norm",
    "reshape",
    "rmsnorm",
    "rope",
    "sampler_update",
    "scatter_rows",
    "silu",
    "sine_positions",
    "sum_squares",
    "swiglu",
    "time_embedding",
    "unpatchify",
];

/// Sizes of real models, for timing.
pub(crate) fn speed_cases() -> Vec<Case> {
    [
        add::speed_cases(),
        attention::speed_cases(),
        embedding::speed_cases(),
        linear::speed_cases(),
        qk_norm::speed_cases(),
        rmsnorm::speed_cases(),
        rope::speed_cases(),
        swiglu::speed_cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The case tables of all ops.
pub(crate) fn cases() -> Vec<Case> {
    [
        adamw::cases(),
        add::cases(),
        attention::cases(),
        cache_append::cases(),
        cast::cases(),
        cross_entropy::cases(),
        embedding::cases(),
        fill::cases(),
        linear::cases(),
        mse::cases(),
        patchify::cases(),
        q_sample::cases(),
        qk_norm::cases(),
        rmsnorm::cases(),
        rope::cases(),
        rows::cases(),
        sampler::cases(),
        swiglu::cases(),
        time_embedding::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Runs `$body` with `$t` as the real type of `$out`: f64 in an f64 graph, else f32.
macro_rules! real {
    ($out:expr, $t:ident => $body:expr) => {
        match $out.data {
            crate::tensor::ViewMut::F64(_) => {
                type $t = f64;
                $body
            }
            _ => {
                type $t = f32;
                $body
            }
        }
    };
}
pub(crate) use real;

/// What every op file needs.
mod prelude {
    pub(super) use super::{floats, integers, operands, real};
    pub(super) use crate::{
        cases::{Case, Fill},
        cpu::*,
        graph::{Graph, Node},
        launch::{Arg, Cost, Kernels, Launch, Operand, Target, size},
        op::{Accumulation, Grad, Memory, Op, traffic},
        tensor::{DType, In, Out, Shape, Spec, Tensor, View, ViewMut},
    };
    pub(super) use rayon::prelude::*;
}

use crate::tensor::Spec;

/// The specs of exactly `N` inputs.
fn operands<const N: usize>(ins: &[Spec]) -> Result<[Spec; N], String> {
    ins.try_into().map_err(|_| format!("takes {N} inputs, not {}", ins.len()))
}

/// Refuses inputs that are not floats.
fn floats(ins: &[Spec]) -> Result<(), String> {
    match ins.iter().find(|s| !s.dtype.is_float()) {
        Some(s) => Err(format!("{s:?} should hold floats")),
        None => Ok(()),
    }
}

/// Refuses an input that does not hold `i32`.
fn integers(s: Spec) -> Result<(), String> {
    if s.dtype == crate::tensor::DType::I32 { Ok(()) } else { Err(format!("{s:?} should hold i32")) }
}
