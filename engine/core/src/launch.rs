//! What a GPU runs, as data: computed once when a graph is planned, replayed every step.

/// What one node costs: the two axes of the roofline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations; a multiply-add counts two.
    pub flops: u64,
    /// Bytes read and written, each operand once.
    pub bytes: u64,
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::default(), |a, b| Cost { flops: a.flops + b.flops, bytes: a.bytes + b.bytes })
    }
}

/// The machine a plan is lowered for. A constant, so that every launch can be computed, printed and
/// checked without that machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Name for listings.
    pub name: &'static str,
    /// Architecture directory of the kernels: `sm_80`, `sm_90a`.
    pub arch: &'static str,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Shared memory that one block may use, bytes.
    pub shared: u32,
    /// Level-2 cache, bytes.
    pub l2: u64,
    /// Peak dense bf16 rate, FLOP/s.
    pub peak: f64,
}

impl Target {
    /// NVIDIA A100 SXM, 80 GB.
    pub const A100: Target = Target {
        name: "A100",
        arch: "sm_80",
        sms: 108,
        shared: 163 * 1024,
        l2: 40 * 1024 * 1024,
        peak: 312e12,
    };

    /// NVIDIA H100 SXM.
    pub const H100: Target = Target { name: "H100", l2: 50 * 1024 * 1024, ..Target::H200 };

    /// NVIDIA H200 SXM.
    pub const H200: Target = Target {
        name: "H200",
        arch: "sm_90a",
        sms: 132,
        shared: 227 * 1024,
        l2: 60 * 1024 * 1024,
        peak: 989e12,
    };
}

/// The ceilings of a machine: no program takes less time on it than they say (Williams et al. 2009).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roofline {
    /// The machine; its tensor cores do [`Target::peak`] in bf16.
    pub target: Target,
    /// Rate outside of the tensor cores in f32, FLOP/s.
    pub f32: f64,
    /// Of its memory, bytes/s.
    pub bandwidth: f64,
}

/// What a roofline holds a program back by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// The tensor cores.
    Tensor,
    /// Arithmetic in f32.
    F32,
    /// Memory.
    Memory,
}

impl Roofline {
    /// NVIDIA's data sheets, SXM, dense: "A100 80GB" (2021), "H100" (2023), "H200" (2024).
    pub const ALL: [Roofline; 3] = [
        Roofline { target: Target::A100, f32: 19.5e12, bandwidth: 2.039e12 },
        Roofline { target: Target::H100, f32: 67e12, bandwidth: 3.35e12 },
        Roofline { target: Target::H200, f32: 67e12, bandwidth: 4.8e12 },
    ];

    /// The least seconds that something takes, and what bounds it; `tensor` where tensor cores do its work.
    pub fn seconds(&self, cost: Cost, tensor: bool) -> (f64, Bound) {
        let (rate, work) = if tensor { (self.target.peak, Bound::Tensor) } else { (self.f32, Bound::F32) };
        let (compute, memory) = (cost.flops as f64 / rate, cost.bytes as f64 / self.bandwidth);
        if compute > memory { (compute, work) } else { (memory, Bound::Memory) }
    }
}

/// Which operand of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// Input, by position.
    In(usize),
    /// Output, by position.
    Out(usize),
    /// Scratch buffer of this node, by position.
    Scratch(usize),
}

/// The geometry of a tensor map (a TMA descriptor), which the device encodes when it knows the address.
#[derive(Clone, Debug, PartialEq)]
pub struct Geometry {
    /// Where the first element lies in the operand, bytes.
    pub offset: u64,
    /// Bytes of one element: 2 for bf16, 4 for f32.
    pub element: u32,
    /// Extents, innermost first.
    pub extents: Vec<u64>,
    /// Byte strides of every dimension but the innermost.
    pub strides: Vec<u64>,
    /// The box that one copy moves, innermost first.
    pub tile: Vec<u32>,
    /// Shared-memory swizzle in bytes: 0, 32, 64 or 128.
    pub swizzle: u32,
}

/// One argument of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// Address of an operand plus a byte offset.
    Address(Operand, u64),
    /// A 32-bit size.
    U32(u32),
    /// A 64-bit size.
    U64(u64),
    /// A scalar.
    F32(f32),
    /// A tensor map over an operand.
    Map(Operand, Geometry),
    /// A table by value: addresses and 64-bit sizes, one behind the other. The rest of it is zero.
    Table(Vec<Arg>),
}

impl Arg {
    /// Address of an input.
    pub fn input(i: usize) -> Arg {
        Arg::Address(Operand::In(i), 0)
    }

    /// Address of an output.
    pub fn output(i: usize) -> Arg {
        Arg::Address(Operand::Out(i), 0)
    }

    /// Address of a scratch buffer.
    pub fn scratch(i: usize) -> Arg {
        Arg::Address(Operand::Scratch(i), 0)
    }

    /// A 32-bit size.
    ///
    /// # Errors
    /// If it takes more bits.
    pub fn size(n: usize) -> Result<Arg, String> {
        Ok(Arg::U32(size(n)?))
    }
}

/// A size as kernels receive it.
///
/// # Errors
/// If it does not fit into 31 bits.
pub fn size(n: usize) -> Result<u32, String> {
    match u32::try_from(n) {
        Ok(n) if n < 1 << 31 => Ok(n),
        _ => Err(format!("a size of {n} is too large for the kernels, which count with 31 bits; split it")),
    }
}

/// One thing that a GPU does.
#[derive(Clone, Debug, PartialEq)]
pub enum Launch {
    /// Runs a kernel.
    Kernel {
        /// Entry point, `op_pass[_variant]_dtype`.
        entry: String,
        /// Blocks.
        grid: [u32; 3],
        /// Threads of a block.
        block: [u32; 3],
        /// Blocks of a cluster.
        cluster: [u32; 3],
        /// Dynamic shared memory, bytes.
        shared: u32,
        /// Outputs, inputs, sizes, scalars.
        args: Vec<Arg>,
    },
    /// Sets every byte of an operand.
    Fill {
        /// What is filled.
        what: Operand,
        /// The byte.
        byte: u8,
    },
    /// Copies one operand over another of the same size.
    Copy {
        /// Source.
        from: Operand,
        /// Destination.
        to: Operand,
    },
}

impl Launch {
    /// Runs `entry` on blocks of `threads`, without clusters.
    pub fn kernel(
        entry: impl Into<String>,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        args: Vec<Arg>,
    ) -> Launch {
        let (block, cluster) = ([threads, 1, 1], [1; 3]);
        Launch::Kernel { entry: entry.into(), grid, block, cluster, shared, args }
    }

    /// The same in clusters of so many neighbouring blocks.
    pub fn clustered(mut self, blocks: u32) -> Launch {
        if let Launch::Kernel { cluster, .. } = &mut self {
            *cluster = [blocks, 1, 1];
        }
        self
    }
}

/// A node, lowered: the scratch buffers it wants and what it launches.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Kernels {
    /// Bytes of each scratch buffer.
    pub scratch: Vec<usize>,
    /// In order.
    pub launches: Vec<Launch>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_roofline_is_the_lower_of_two_ceilings() {
        let h200 = Roofline::ALL[2];
        let cost = |flops, bytes| Cost { flops, bytes };
        assert_eq!(h200.seconds(cost(989_000_000, 4800), true), (1e-6, Bound::Tensor));
        assert_eq!(h200.seconds(cost(67_000_000, 4800), false), (1e-6, Bound::F32));
        assert_eq!(h200.seconds(cost(67_000_000, 4_800_000), true), (1e-6, Bound::Memory));
        assert_eq!(h200.seconds(Cost::default(), false).0, 0.0);
    }
}
