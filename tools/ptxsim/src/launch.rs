//! What a caller says about a launch.

use crate::finding::Checks;
use crate::kernel::Kernel;

/// Which of the memories given to [`simulate`](crate::simulate), by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MemoryId(pub usize);

/// What a kernel may do with an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read.
    Read,
    /// Only write.
    Write,
    /// Both.
    ReadWrite,
}

/// The bytes that one argument may touch.
///
/// Every window has addresses of its own, far from all others, also where several share bytes of a memory: an
/// access that leaves its window is out of bounds although the memory goes on.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    /// How findings call it.
    pub name: &'a str,
    /// The memory.
    pub memory: MemoryId,
    /// First byte in the memory.
    pub start: usize,
    /// Bytes.
    pub len: usize,
    /// Where the pointer argument points, in bytes from `start`; it may be `len`.
    pub offset: usize,
    /// What the kernel may do.
    pub access: Access,
}

/// How TMA permutes the 16-byte units of a tile in shared memory, to keep banks apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Not at all.
    None,
    /// Within 32 bytes.
    Bytes32,
    /// Within 64 bytes.
    Bytes64,
    /// Within 128 bytes.
    Bytes128,
}

impl Swizzle {
    /// Bytes of the span, or 0 for none.
    pub(crate) fn span(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Bytes32 => 32,
            Self::Bytes64 => 64,
            Self::Bytes128 => 128,
        }
    }

    /// Where a byte address of shared memory really lies.
    pub(crate) fn apply(self, address: u32) -> u32 {
        match self {
            Self::None => address,
            Self::Bytes32 => address ^ (address >> 7 & 1) << 4,
            Self::Bytes64 => address ^ (address >> 7 & 3) << 4,
            Self::Bytes128 => address ^ (address >> 7 & 7) << 4,
        }
    }
}

/// A tiled tensor map, as `cuTensorMapEncodeTiled` takes it, without interleaving and with zeros out of bounds.
#[derive(Clone, Debug)]
pub struct TensorMap<'a> {
    /// The tensor's bytes; its first element is at the window's offset.
    pub window: Window<'a>,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub element: u32,
    /// How `cp.reduce` adds.
    pub format: Format,
    /// Elements along each dimension, the innermost first; 1 to 5 of them.
    pub extents: Vec<u64>,
    /// Bytes from one element to the next along each dimension but the innermost.
    pub strides: Vec<u64>,
    /// Elements of the tile along each dimension.
    pub tile: Vec<u32>,
    /// Permutation in shared memory.
    pub swizzle: Swizzle,
}

/// Elements of a tensor map, as far as arithmetic on them differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Signed or unsigned integers of the element size.
    Integer,
    /// IEEE floats: `f16`, `f32` or `f64` by size.
    Float,
    /// `bf16`.
    Bf16,
}

/// An argument of a kernel, in the order of its parameters.
#[derive(Clone, Debug)]
pub enum Argument<'a> {
    /// A pointer to global memory.
    Window(Window<'a>),
    /// A null pointer.
    Null,
    /// A 32-bit integer, signed or not.
    U32(u32),
    /// A 64-bit integer.
    U64(u64),
    /// A float.
    F32(f32),
    /// A parameter of any size by its bytes.
    Bytes(&'a [u8]),
    /// The same with pointers in it, each by the byte where it stands.
    Table {
        /// All bytes.
        bytes: &'a [u8],
        /// What each pointer points to.
        windows: Vec<(usize, Window<'a>)>,
    },
    /// A tensor map, for a `__grid_constant__` parameter of 128 bytes.
    TensorMap(TensorMap<'a>),
}

/// A launch.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Blocks of a cluster along x, y, z; `[1, 1, 1]` for none.
    pub cluster: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// All blocks run at the same time and may wait for each other.
    pub cooperative: bool,
    /// The arguments.
    pub args: &'a [Argument<'a>],
}

/// The order in which warps and blocks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// By index.
    InOrder,
    /// By falling index.
    Reversed,
    /// Drawn anew each round, by a seed; completions of bulk copies are drawn as well.
    Shuffled(u64),
}

/// How warps take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Who comes next.
    pub order: Order,
    /// Instructions that a warp executes before another has its turn, unless it waits earlier.
    pub quantum: u32,
}

impl Schedule {
    /// Four schedules that together bring out most faults: long and short turns, both directions and a mix.
    pub const SEVERAL: [Self; 4] = [
        Self { order: Order::InOrder, quantum: 20_000 },
        Self { order: Order::Reversed, quantum: 20_000 },
        Self { order: Order::Shuffled(1), quantum: 17 },
        Self { order: Order::Reversed, quantum: 7 },
    ];
}

impl Default for Schedule {
    fn default() -> Self {
        Self::SEVERAL[0]
    }
}

/// How to simulate.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The order of execution.
    pub schedule: Schedule,
    /// Which faults to look for.
    pub checks: Checks,
    /// Whether to count memory traffic and bank conflicts; instructions are always counted.
    pub traffic: bool,
    /// Host threads that share the blocks of a launch. With more than one, the order of float atomics varies.
    pub threads: usize,
    /// Clusters that run at the same time on each host thread and take turns: from the first ones in the order of the
    /// schedule, so many until all are done, then the next.
    pub together: usize,
    /// Findings to keep, counted by kind and line; further ones only count.
    pub max_findings: usize,
    /// Shared memory that a block may have, in bytes.
    pub shared_limit: u32,
    /// Warp instructions of clusters that run together without any store, arrival or exit, there or on other host
    /// threads, after which they count as stuck.
    pub patience: u64,
    /// Warp instructions of clusters that run together after which they are given up, whatever they do.
    pub limit: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            schedule: Schedule::default(),
            checks: Checks::all(),
            traffic: true,
            threads: 1,
            together: 1,
            max_findings: 100,
            shared_limit: 227 * 1024,
            patience: 20_000_000,
            limit: u64::MAX,
        }
    }
}
