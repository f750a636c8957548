//! What a launch did: instructions, tensor-core work, memory traffic, bank conflicts, divergence.

use crate::{kernel::Kernel, touched::Sectors};
use std::collections::BTreeMap;
use std::fmt;

/// Classes of instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Integer arithmetic, logic, comparisons, moves.
    Integer,
    /// Floating-point arithmetic and conversions.
    Float,
    /// The special-function unit: `ex2`, `rcp`, `sin`.
    Special,
    /// Tensor cores.
    Tensor,
    /// Loads, stores and atomics of global memory.
    Global,
    /// Loads, stores and atomics of shared memory, with `ldmatrix` and `stmatrix`.
    Shared,
    /// Local and parameter memory.
    Local,
    /// Asynchronous copies and their groups.
    Copy,
    /// Barriers, mbarriers, fences.
    Sync,
    /// Shuffles, votes and other exchanges within a warp.
    Exchange,
    /// Branches and exits.
    Control,
    /// Steps of the simulator that are no instruction of their own.
    Internal,
}

/// Counts of one position of the code.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Site {
    pub(crate) warps: u64,
    pub(crate) threads: u64,
    pub(crate) bytes: u64,
    pub(crate) sectors: u64,
    pub(crate) wavefronts: u64,
    pub(crate) ideal: u64,
    pub(crate) splits: u64,
}

/// The counts of one host thread.
pub(crate) struct Tally {
    pub(crate) sites: Vec<Site>,
    /// What was read of global memory, and written.
    pub(crate) read: Sectors,
    pub(crate) written: Sectors,
}

impl Tally {
    pub(crate) fn new(kernel: &Kernel) -> Self {
        let sites = vec![Site::default(); kernel.code.len()];
        Self { sites, read: Sectors::default(), written: Sectors::default() }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (a, b) in self.sites.iter_mut().zip(&other.sites) {
            a.warps += b.warps;
            a.threads += b.threads;
            a.bytes += b.bytes;
            a.sectors += b.sectors;
            a.wavefronts += b.wavefronts;
            a.ideal += b.ideal;
            a.splits += b.splits;
        }
        self.read.add(&other.read);
        self.written.add(&other.written);
    }
}

/// What one line of the PTX did, or a whole kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Instructions, per warp.
    pub warp_instructions: u64,
    /// Instructions, per active thread.
    pub thread_instructions: u64,
    /// Floating-point operations of the tensor cores, a multiply-add as two.
    pub tensor_flops: u64,
    /// Bytes of global memory that threads asked for.
    pub global_bytes: u64,
    /// Sectors of 32 bytes that the requests touch, each request on its own.
    pub global_sectors: u64,
    /// Bytes of shared memory that threads asked for.
    pub shared_bytes: u64,
    /// Passes over the banks of shared memory.
    pub shared_wavefronts: u64,
    /// Passes beyond the fewest possible: bank conflicts.
    pub bank_conflicts: u64,
    /// Branches at which a warp split.
    pub splits: u64,
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.warp_instructions += other.warp_instructions;
        self.thread_instructions += other.thread_instructions;
        self.tensor_flops += other.tensor_flops;
        self.global_bytes += other.global_bytes;
        self.global_sectors += other.global_sectors;
        self.shared_bytes += other.shared_bytes;
        self.shared_wavefronts += other.shared_wavefronts;
        self.bank_conflicts += other.bank_conflicts;
        self.splits += other.splits;
    }

    /// Active threads per warp instruction, out of 32.
    pub fn average_lanes(&self) -> f64 {
        self.thread_instructions as f64 / self.warp_instructions.max(1) as f64
    }
}

/// Counts of a launch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counters {
    /// The kernel.
    pub kernel: String,
    /// All of it.
    pub total: Counts,
    /// Sectors of 32 bytes of global memory that a launch reads at all: what moves to a cache that holds all of it.
    pub read_sectors: u64,
    /// Those that it writes.
    pub written_sectors: u64,
    /// By class of instruction.
    pub classes: BTreeMap<Class, Counts>,
    /// By line of the PTX.
    pub lines: BTreeMap<u32, Counts>,
    /// By file and line of the source, where the PTX has `.loc` lines.
    pub source_lines: BTreeMap<(String, u32), Counts>,
}

impl Counters {
    pub(crate) fn new(kernel: &Kernel, tally: &Tally) -> Self {
        let mut counters = Self {
            kernel: kernel.name.clone(),
            read_sectors: tally.read.count(),
            written_sectors: tally.written.count(),
            ..Self::default()
        };
        for (pc, (inst, site)) in kernel.code.iter().zip(&tally.sites).enumerate() {
            if site.warps == 0 || inst.class == Class::Internal {
                continue;
            }
            let shared = inst.class == Class::Shared;
            let counts = Counts {
                warp_instructions: site.warps,
                thread_instructions: site.threads,
                tensor_flops: site.warps * u64::from(inst.flops),
                global_bytes: if shared { 0 } else { site.bytes },
                global_sectors: site.sectors,
                shared_bytes: if shared { site.bytes } else { 0 },
                shared_wavefronts: site.wavefronts,
                bank_conflicts: site.wavefronts - site.ideal,
                splits: site.splits,
            };
            counters.total.add(&counts);
            counters.classes.entry(inst.class).or_default().add(&counts);
            counters.lines.entry(inst.line).or_default().add(&counts);
            if let Some(source) = kernel.source(pc as u32) {
                counters.source_lines.entry(source).or_default().add(&counts);
            }
        }
        counters
    }

    /// Adds the counts of another launch of the same kernel.
    pub fn add(&mut self, other: &Self) {
        self.total.add(&other.total);
        self.read_sectors += other.read_sectors;
        self.written_sectors += other.written_sectors;
        for (class, counts) in &other.classes {
            self.classes.entry(*class).or_default().add(counts);
        }
        for (line, counts) in &other.lines {
            self.lines.entry(*line).or_default().add(counts);
        }
        for (line, counts) in &other.source_lines {
            self.source_lines.entry(line.clone()).or_default().add(counts);
        }
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let t = &self.total;
        writeln!(f, "{}", self.kernel)?;
        writeln!(f, "{:12} {:>14} {:>16} {:>6}", "class", "warp instr.", "thread instr.", "lanes")?;
        for (class, c) in &self.classes {
            let name = format!("{class:?}");
            let (w, n) = (c.warp_instructions, c.thread_instructions);
            writeln!(f, "{name:12} {w:>14} {n:>16} {:>6.1}", c.average_lanes())?;
        }
        let (w, n) = (t.warp_instructions, t.thread_instructions);
        writeln!(f, "{:12} {w:>14} {n:>16} {:>6.1}", "all", t.average_lanes())?;
        writeln!(f, "branches that split a warp  {:>14}", t.splits)?;
        writeln!(f, "tensor-core flops           {:>14}", t.tensor_flops)?;
        writeln!(f, "global bytes requested      {:>14}", t.global_bytes)?;
        writeln!(f, "global bytes in sectors     {:>14}", t.global_sectors * 32)?;
        writeln!(f, "of these not read before    {:>14}", self.read_sectors * 32)?;
        writeln!(f, "and not written before      {:>14}", self.written_sectors * 32)?;
        writeln!(f, "shared bytes requested      {:>14}", t.shared_bytes)?;
        writeln!(f, "shared wavefronts           {:>14}", t.shared_wavefronts)?;
        writeln!(f, "of these bank conflicts     {:>14}", t.bank_conflicts)?;
        let mut worst: Vec<_> = self.lines.iter().filter(|(_, c)| c.bank_conflicts > 0).collect();
        worst.sort_by_key(|(_, c)| std::cmp::Reverse(c.bank_conflicts));
        for (line, c) in worst.iter().take(5) {
            writeln!(f, "  line {line}: {} of {} wavefronts", c.bank_conflicts, c.shared_wavefronts)?;
        }
        Ok(())
    }
}
