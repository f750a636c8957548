//! Every op, one file each: formula and paper, builder, forward op, backward op, cases. To add one:
//! its file, and its two lines here.

mod add;
mod attention;
mod cast;
mod fill;
mod linear;
mod rmsnorm;
mod swiglu;

pub use add::Repeat;
pub use attention::Heads;
pub use linear::{Activation, Epilogue};

use crate::cases::Case;

/// The names of the ops that have case tables.
pub const NAMES: &[&str] = &["add", "attention", "cast", "fill", "linear", "rmsnorm", "swiglu"];

/// The case tables of all ops.
pub(crate) fn cases() -> Vec<Case> {
    [
        add::cases(),
        attention::cases(),
        cast::cases(),
        fill::cases(),
        linear::cases(),
        rmsnorm::cases(),
        swiglu::cases(),
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
    pub(super) use super::{floats, operands, real};
    pub(super) use crate::{
        cases::Case,
        cpu::*,
        graph::{Graph, Node},
        launch::Cost,
        op::{Grad, Memory, Op, traffic},
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
