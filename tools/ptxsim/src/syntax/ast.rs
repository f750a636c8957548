//! The syntax tree of a PTX module.

use std::collections::HashMap;

/// A fundamental type. Signedness and bit patterns are kept apart, since instructions tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Type {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    F32,
    F64,
}

impl Type {
    /// The type that a suffix such as `u32` names.
    pub(crate) fn from_suffix(s: &str) -> Option<Self> {
        use Type::*;
        Some(match s {
            "pred" => Pred,
            "b8" => B8,
            "b16" => B16,
            "b32" => B32,
            "b64" => B64,
            "b128" => B128,
            "u8" => U8,
            "u16" => U16,
            "u32" => U32,
            "u64" => U64,
            "s8" => S8,
            "s16" => S16,
            "s32" => S32,
            "s64" => S64,
            "f16" => F16,
            "f16x2" => F16x2,
            "bf16" => Bf16,
            "bf16x2" => Bf16x2,
            "f32" => F32,
            "f64" => F64,
            _ => return None,
        })
    }

    /// Size in memory; a predicate has none.
    pub(crate) fn bytes(self) -> u32 {
        use Type::*;
        match self {
            Pred => 0,
            B8 | U8 | S8 => 1,
            B16 | U16 | S16 | F16 | Bf16 => 2,
            B32 | U32 | S32 | F16x2 | Bf16x2 | F32 => 4,
            B64 | U64 | S64 | F64 => 8,
            B128 => 16,
        }
    }

    /// Whether widening extends the sign.
    pub(crate) fn is_signed(self) -> bool {
        matches!(self, Type::S8 | Type::S16 | Type::S32 | Type::S64)
    }
}

/// Index of a register in [`Function::registers`].
pub(crate) type RegisterId = u32;

/// An operand as written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    Register(RegisterId),
    Integer(i64),
    Single(u32),
    Double(u64),
    /// A label, a variable, a parameter or a special register (`%tid.x`).
    Symbol(String),
    Vector(Vec<Operand>),
    /// `[base + offset]`
    Address(Box<Operand>, i64),
    /// `[map, {coordinates}]`, with an optional third element (im2col offsets are not implemented).
    Tensor(Box<Operand>, Vec<Operand>),
    /// `d|p`
    Pair(Box<Operand>, Box<Operand>),
    /// `!p`
    Not(Box<Operand>),
    /// `-x` of something that is not a number
    Sink,
}

/// A place in a source file, from a `.loc` directive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Location {
    pub(crate) file: u32,
    pub(crate) line: u32,
}

/// An instruction as written.
#[derive(Clone, Debug)]
pub(crate) struct Statement {
    pub(crate) guard: Option<(RegisterId, bool)>,
    pub(crate) opcode: String,
    pub(crate) operands: Vec<Operand>,
    pub(crate) line: u32,
    pub(crate) location: Option<Location>,
    pub(crate) scope: usize,
}

/// A variable in some state space.
#[derive(Clone, Debug)]
pub(crate) struct Variable {
    pub(crate) name: String,
    pub(crate) align: u32,
    pub(crate) size: u32,
    pub(crate) init: Vec<u8>,
}

/// A kernel parameter with its place in the parameter block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Name in the PTX.
    pub name: String,
    /// Offset in the parameter block, in bytes.
    pub offset: u32,
    /// Size in bytes.
    pub size: u32,
    /// Alignment in bytes.
    pub align: u32,
}

/// An entry point.
#[derive(Debug, Default)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) body: Vec<Statement>,
    /// Labels, by scope and name, as indices into `body`.
    pub(crate) labels: HashMap<(usize, String), usize>,
    /// The enclosing scope of every scope; the outermost encloses itself.
    pub(crate) scopes: Vec<usize>,
    pub(crate) registers: Vec<Type>,
    pub(crate) shared: Vec<Variable>,
    pub(crate) local: Vec<Variable>,
    pub(crate) max_threads: Option<[u32; 3]>,
    /// `.reqntid`: the block must have exactly `max_threads`.
    pub(crate) exact_threads: bool,
    pub(crate) cluster: Option<[u32; 3]>,
}

/// A module.
#[derive(Debug, Default)]
pub(crate) struct Unit {
    pub(crate) version: String,
    pub(crate) target: String,
    pub(crate) files: HashMap<u32, String>,
    /// `.global` and `.const` variables; the flag says that they are constant.
    pub(crate) globals: Vec<(Variable, bool)>,
    pub(crate) shared: Vec<Variable>,
    pub(crate) extern_shared: Vec<Variable>,
    pub(crate) functions: Vec<Function>,
}
