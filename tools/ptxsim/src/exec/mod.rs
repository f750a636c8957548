//! The executor: decoded instructions, and the machine that they act on.
//!
//! An instruction is a function that handles all 32 lanes of a warp. [`Instruction`] types are zero-sized; the
//! decoder picks one and stores a pointer to its `execute`, compiled for the host's vector unit.
//!
//! Reading order: [`lane`] (registers), [`warp`] (control flow), [`team`] (blocks and their schedule), then the
//! instructions by topic.
#![allow(clippy::needless_range_loop)] // lanes are indices into several rows at once
#![allow(unsafe_code)] // register rows and simulated memory are reached through checked-once indices and pointers

pub(crate) mod access;
pub(crate) mod arithmetic;
pub(crate) mod atomic;
pub(crate) mod barrier;
pub(crate) mod bulk;
pub(crate) mod collective;
pub(crate) mod copy;
pub(crate) mod lane;
pub(crate) mod matrix;
pub(crate) mod mbarrier;
pub(crate) mod memory;
pub(crate) mod order;
pub(crate) mod product;
pub(crate) mod shadow;
pub(crate) mod team;
pub(crate) mod traffic;
pub(crate) mod warp;
pub(crate) mod wgmma;
pub(crate) mod wide;

use crate::counters::{Class, Tally};
use crate::finding::{FindingKind, Place};
use crate::run::Run;
use team::Cta;
use warp::Warp;

/// What the warp does after an instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Goes on.
    Next,
    /// Lets others run first, since what it waits for did not happen.
    Yield,
    /// Is blocked or has exited; its state says which.
    Stop,
}

/// The function of an instruction.
pub(crate) type Handler = unsafe fn(&mut Machine<'_>, &Inst) -> Flow;

/// A decoded instruction.
///
/// `d`, `a`, `b`, `c` are rows, predicates or code positions, as the handler defines; further rows lie in
/// [`Kernel::lists`](crate::kernel::Kernel) from `list`.
#[derive(Clone, Copy)]
pub(crate) struct Inst {
    pub(crate) run: Handler,
    pub(crate) d: u32,
    pub(crate) a: u32,
    pub(crate) b: u32,
    pub(crate) c: u32,
    pub(crate) list: u32,
    /// Predicate index plus one, or zero.
    pub(crate) guard: u16,
    pub(crate) guard_negated: bool,
    /// Runs although no lane is active: branches.
    pub(crate) always: bool,
    pub(crate) class: Class,
    /// Bytes per element of a memory access.
    pub(crate) size: u8,
    /// Elements of a memory access, matrices of a matrix access.
    pub(crate) count: u8,
    /// Modifiers, as the handler defines.
    pub(crate) mode: u8,
    pub(crate) imm: i64,
    pub(crate) line: u32,
    /// Floating-point operations of a tensor-core instruction per warp.
    pub(crate) flops: u32,
}

/// An operation on a warp.
pub(crate) trait Instruction {
    /// Acts on the lanes in `x.active`.
    ///
    /// # Safety
    ///
    /// `i` must stem from the kernel that `x` runs, so that its rows and lists exist.
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow;
}

/// The function to run for `I` on this host.
pub(crate) fn handler<I: Instruction>() -> Handler {
    #[cfg(target_arch = "x86_64")]
    if vector_host() {
        return with_avx2::<I>;
    }
    baseline::<I>
}

/// Whether the host has the vector features that instructions are compiled for besides the baseline.
pub(crate) fn vector_host() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt")
            && is_x86_feature_detected!("lzcnt")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether the host has AVX-512, for [`wide`].
#[cfg(target_arch = "x86_64")]
pub(crate) fn wide_host() -> bool {
    vector_host() && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,popcnt,lzcnt")]
unsafe fn with_avx2<I: Instruction>(x: &mut Machine<'_>, i: &Inst) -> Flow {
    // SAFETY: the caller's promise is passed on.
    unsafe { I::execute(x, i) }
}

unsafe fn baseline<I: Instruction>(x: &mut Machine<'_>, i: &Inst) -> Flow {
    // SAFETY: the caller's promise is passed on.
    unsafe { I::execute(x, i) }
}

/// What an instruction may touch: its warp, the blocks of its cluster, and the launch.
pub(crate) struct Machine<'a> {
    pub(crate) run: &'a Run<'a>,
    pub(crate) warp: &'a mut Warp,
    /// The blocks of the cluster.
    pub(crate) ctas: &'a mut [Cta],
    /// This warp's block in `ctas`.
    pub(crate) rank: usize,
    pub(crate) tally: &'a mut Tally,
    /// The lanes that execute the current instruction.
    pub(crate) active: u32,
    /// Position of the current instruction.
    pub(crate) pc: u32,
    /// Counts what others may wait for: stores, arrivals, exits. A standstill shows deadlock.
    pub(crate) progress: &'a mut u64,
}

impl Machine<'_> {
    #[inline(always)]
    pub(crate) fn cta(&mut self) -> &mut Cta {
        &mut self.ctas[self.rank]
    }

    /// A row of the instruction's list.
    #[inline(always)]
    pub(crate) fn listed(&self, i: &Inst, n: usize) -> u32 {
        self.run.kernel.lists[i.list as usize + n]
    }

    /// Records a finding at the current instruction.
    #[cold]
    #[inline(never)]
    pub(crate) fn report(&self, kind: FindingKind, lane: usize, place: Place, message: impl Into<String>) {
        let thread = self.warp.index as u32 * 32 + lane as u32;
        self.run.report(kind, self.pc, self.ctas[self.rank].id, thread, place, message.into());
    }

    /// Whether the whole warp takes part, as `.aligned` instructions need; reports if not.
    #[inline(always)]
    pub(crate) fn converged(&self) -> bool {
        if self.active == self.warp.live {
            return true;
        }
        let missing = self.warp.live & !self.active;
        self.report(
            FindingKind::Divergence,
            self.active.trailing_zeros() as usize & 31,
            Place::None,
            format!("the instruction needs all threads of the warp, lanes {missing:#010x} are elsewhere"),
        );
        false
    }
}
