//! What a check found, and which checks run.

use std::fmt;

/// The kinds of faults that the simulator names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FindingKind {
    /// An access outside of every window, of shared memory or of a local array.
    OutOfBounds,
    /// An address that is no multiple of the access size.
    Misaligned,
    /// A write to a window that the launch declares read-only, or a read of one declared write-only.
    Access,
    /// A read of bytes that nothing wrote.
    Uninitialised,
    /// Two accesses to shared memory, one of them a write, that no synchronisation orders.
    Race,
    /// A touch of bytes that an asynchronous copy is still reading or writing.
    InFlight,
    /// An asynchronous-proxy read of bytes written by ordinary stores without `fence.proxy.async` between.
    Proxy,
    /// An instruction that needs the whole warp, executed by a part of it.
    Divergence,
    /// A warp-wide exchange that involves a lane that does not take part.
    InactiveLane,
    /// Warps that wait for what no warp will do.
    Deadlock,
    /// A register of a `wgmma` in flight, touched before its `wait_group`.
    WgmmaRegister,
    /// A `wgmma` whose registers were written without a `wgmma.fence` since.
    WgmmaFence,
    /// Misuse of an mbarrier: not initialised, too many arrivals, overwritten.
    Mbarrier,
    /// Blocks of one launch that write the same global bytes, or read what another wrote, and have not learnt of it.
    Conflict,
    /// An operand that the hardware defines no result for: a bad descriptor, barrier or box.
    Operand,
}

impl FindingKind {
    /// All kinds.
    pub const ALL: [Self; 15] = [
        Self::OutOfBounds,
        Self::Misaligned,
        Self::Access,
        Self::Uninitialised,
        Self::Race,
        Self::InFlight,
        Self::Proxy,
        Self::Divergence,
        Self::InactiveLane,
        Self::Deadlock,
        Self::WgmmaRegister,
        Self::WgmmaFence,
        Self::Mbarrier,
        Self::Conflict,
        Self::Operand,
    ];

    fn bit(self) -> u32 {
        1 << self as u32
    }
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfBounds => "out of bounds",
            Self::Misaligned => "misaligned",
            Self::Access => "access denied",
            Self::Uninitialised => "uninitialised",
            Self::Race => "race",
            Self::InFlight => "in flight",
            Self::Proxy => "missing proxy fence",
            Self::Divergence => "divergence",
            Self::InactiveLane => "inactive lane",
            Self::Deadlock => "deadlock",
            Self::WgmmaRegister => "wgmma register in flight",
            Self::WgmmaFence => "missing wgmma.fence",
            Self::Mbarrier => "mbarrier",
            Self::Conflict => "conflict between blocks",
            Self::Operand => "bad operand",
        })
    }
}

/// The set of checks of a simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checks(u32);

impl Checks {
    /// Every check.
    pub const fn all() -> Self {
        Self(u32::MAX)
    }

    /// Only what costs nothing: bounds, alignment, access rights, divergence, deadlock, operands.
    pub fn cheap() -> Self {
        use FindingKind::*;
        [OutOfBounds, Misaligned, Access, Divergence, InactiveLane, Deadlock, Mbarrier, Operand]
            .iter()
            .fold(Self(0), |set, kind| set.with(*kind))
    }

    /// This set and one more.
    pub fn with(self, kind: FindingKind) -> Self {
        Self(self.0 | kind.bit())
    }

    /// This set without one.
    pub fn without(self, kind: FindingKind) -> Self {
        Self(self.0 & !kind.bit())
    }

    /// Whether the set has `kind`.
    pub fn has(self, kind: FindingKind) -> bool {
        self.0 & kind.bit() != 0
    }

    /// Whether shared memory needs its shadow.
    pub(crate) fn shared_shadow(self) -> bool {
        use FindingKind::*;
        [Uninitialised, Race, InFlight, Proxy].iter().any(|k| self.has(*k))
    }
}

impl Default for Checks {
    fn default() -> Self {
        Self::all()
    }
}

/// Where a finding points.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A byte of a window.
    Operand {
        /// Name of the operand.
        name: String,
        /// Byte within the operand; negative or beyond its length where out of bounds.
        offset: i64,
    },
    /// A global address that belongs to no operand.
    Global(u64),
    /// A byte of shared memory, from the start of the block's allocation.
    Shared(i64),
    /// A byte of the thread's local memory.
    Local(u64),
    /// No address.
    None,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operand { name, offset } => write!(f, " `{name}` byte {offset}:"),
            Self::Global(address) => write!(f, " global address {address:#x}:"),
            Self::Shared(offset) => write!(f, " shared byte {offset}:"),
            Self::Local(offset) => write!(f, " local byte {offset}:"),
            Self::None => Ok(()),
        }
    }
}

/// A fault, at its first occurrence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What kind of fault.
    pub kind: FindingKind,
    /// The kernel.
    pub kernel: String,
    /// The name given to [`Module::load`](crate::Module::load).
    pub file: String,
    /// Line of the PTX.
    pub line: u32,
    /// File and line of the source, where the PTX has `.loc` lines.
    pub source: Option<(String, u32)>,
    /// The block.
    pub cta: [u32; 3],
    /// The thread, linear within the block.
    pub thread: u32,
    /// The memory concerned.
    pub place: Place,
    /// What happened.
    pub message: String,
    /// How often this fault came up at this line.
    pub count: u64,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, kernel, file, line, cta: [x, y, z], thread, place, message, .. } = self;
        write!(
            f,
            "{file}:{line}: {kind} in {kernel}, block ({x},{y},{z}) thread {thread}:{place} {message}"
        )?;
        if let Some((file, line)) = &self.source {
            write!(f, " [{file}:{line}]")?;
        }
        if self.count > 1 {
            write!(f, " ({} times)", self.count)?;
        }
        Ok(())
    }
}
