//! The one trait an operation implements: everything known about it, on one page.
use crate::{
    cpu::{Cpu, Precision},
    error::Result,
    graph::{Graph, Node},
    launch::{Cost, Kernels, Target},
    tensor::{Host, In, Out, Spec, Tensor},
};
use std::fmt::Debug;

/// What a state is for: which checkpoint file it goes to, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A weight of the model.
    Param,
    /// The gradient of a weight, summed over the micro-batches of an optimiser step.
    Grad,
    /// Moments and master weights of the optimiser.
    Optim,
    /// Running mean of a weight.
    Ema,
    /// Keys, values and pictures being sampled: never saved.
    Cache,
}

/// Where an output lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// In memory of its own.
    Own,
    /// In an input's memory, `offset` bytes in; nothing is moved.
    View {
        /// Which input.
        input: usize,
        /// Bytes from its start.
        offset: usize,
    },
    /// It replaces an input.
    InPlace {
        /// Which input.
        input: usize,
    },
    /// It takes the place of an input, which is not read.
    Over {
        /// Which input.
        input: usize,
    },
}

impl Memory {
    /// The input whose place it takes, read before or not.
    pub fn replaced(self) -> Option<usize> {
        match self {
            Memory::InPlace { input } | Memory::Over { input } => Some(input),
            Memory::Own | Memory::View { .. } => None,
        }
    }

    /// Whether nothing of before is read there.
    pub fn is_fresh(self) -> bool {
        matches!(self, Memory::Own | Memory::Over { .. })
    }
}

/// What an op does with the gradient of one of its inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulation {
    /// It is a tensor of its own.
    Apart,
    /// The input has an accumulator, and this is the first gradient there: it is stored over what was before.
    Begun,
    /// It is added to the accumulator.
    Added,
}

impl Accumulation {
    /// Whether it is added to what is there.
    pub fn is_added(self) -> bool {
        self == Accumulation::Added
    }

    /// Where it lives, if `input` is the accumulator.
    pub fn memory(self, input: usize) -> Memory {
        match self {
            Accumulation::Apart => Memory::Own,
            Accumulation::Begun => Memory::Over { input },
            Accumulation::Added => Memory::InPlace { input },
        }
    }

    /// The operands that are read, if the last `sums` are accumulators.
    pub fn read(self, ins: &[Spec], sums: usize) -> &[Spec] {
        if self == Accumulation::Begun { &ins[..ins.len().saturating_sub(sums)] } else { ins }
    }

    /// What the adjoint says of the input.
    pub fn grad(self, t: Tensor) -> Grad {
        if self == Accumulation::Apart { Grad::To(t) } else { Grad::Into(t) }
    }
}

/// What the adjoint says about one input.
#[derive(Clone, Copy, Debug)]
pub enum Grad {
    /// Its gradient, to be added to what has arrived.
    To(Tensor),
    /// Its gradient was added to its accumulator; this is the accumulator's new version.
    Into(Tensor),
    /// It holds integers.
    Integer,
    /// No gradient flows, for this reason.
    Stop(&'static str),
}

/// An operation: its shape rule, its meaning, its kernels, its cost and its adjoint.
pub trait Op: Debug + Send + Sync {
    /// Name: the stem of its kernel file.
    fn name(&self) -> &'static str;

    /// Shape rule: the outputs' specs, or why the inputs are refused.
    ///
    /// # Errors
    /// The reason, in words for whoever wrote the model.
    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String>;

    /// Meaning, on the CPU, at f32 or f64: the device decodes bf16 before and rounds after, so
    /// every float operand arrives as `F32` (or `F64` in an f64 graph). An operand that is replaced
    /// appears among `outs` only; its input is empty. What is not updated in place arrives uninitialised.
    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu);

    /// Bytes of the buffers that [`Op::eval`] borrows of [`Cpu`] at the same time, at most, with so many threads.
    fn workspace(&self, ins: &[Spec], outs: &[Spec], threads: usize) -> Vec<usize> {
        let _ = (ins, outs, threads);
        vec![]
    }

    /// What a GPU runs for these shapes.
    ///
    /// # Errors
    /// Why there is no kernel for them, with the remedy.
    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        let _ = (ins, outs);
        Err(format!("no {} kernel is written yet; use the CPU device", on.arch))
    }

    /// The outputs as an implementation would leave them that stores every intermediate result in the
    /// storage type: what the tolerance law measures a kernel by. `None`: as the CPU device stores them,
    /// rounded once; right for an op whose kernels keep everything between in f32.
    fn plain(&self, specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
        let _ = (specs, ins);
        None
    }

    /// Work and traffic. The default counts each operand's bytes once and no operations.
    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        Cost { flops: 0, bytes: traffic(ins, outs) }
    }

    /// What the CPU may round the factors of its products to, for operands of these types.
    fn precision(&self, ins: &[Spec]) -> Precision {
        let _ = ins;
        Precision::F32
    }

    /// Where output `out` lives.
    fn memory(&self, out: usize) -> Memory {
        let _ = out;
        Memory::Own
    }

    /// Chain rule: from the gradients of the outputs (`None` where none arrived), one [`Grad`] for
    /// every input. The default refuses.
    ///
    /// # Errors
    /// If the op has no derivative.
    fn adjoint(&self, g: &mut Graph, node: &Node, d: &[Option<Tensor>]) -> Result<Vec<Grad>> {
        let _ = (g, d);
        Err(node.no_adjoint("second derivatives are refused"))
    }
}

/// Bytes of all operands.
pub fn traffic(ins: &[Spec], outs: &[Spec]) -> u64 {
    ins.iter().chain(outs).map(|s| s.bytes() as u64).sum()
}
