//! A warp: its registers, its place in the code, and the loop that runs it.
//!
//! Lanes that part at a branch meet again at its immediate post-dominator. A stack holds the paths that wait: each
//! entry has a code position, the lanes that go on there, and where they in turn meet others.

use super::bulk::BulkStore;
use super::copy::Copies;
use super::lane::{LANES, Lane, Registers, lanes};
use super::{Flow, Inst, Instruction, Machine};
use crate::kernel::{Kernel, LaneMask, Special};
use crate::run::Run;

/// No place to meet: the end of the kernel.
const NOWHERE: u32 = u32::MAX;

/// What a warp knows of others, see [`super::shadow`].
#[derive(Clone, Default)]
pub(crate) struct Knowledge {
    /// Accesses known to be complete, by column.
    pub(crate) clock: Vec<u32>,
    /// Writes known to be fenced for the asynchronous proxy, by column.
    pub(crate) fenced: Vec<u32>,
}

impl Knowledge {
    pub(crate) fn new(columns: usize, base: u32) -> Self {
        Self { clock: vec![base; columns], fenced: vec![base; columns] }
    }

    /// Everything that `other` knows as well.
    pub(crate) fn join(&mut self, other: &Self) {
        for (mine, theirs) in self.clock.iter_mut().zip(&other.clock) {
            *mine = (*mine).max(*theirs);
        }
        for (mine, theirs) in self.fenced.iter_mut().zip(&other.fenced) {
            *mine = (*mine).max(*theirs);
        }
    }

    /// Everything that a warp knows or did itself.
    pub(crate) fn join_warp(&mut self, warp: &Warp) {
        self.join(&warp.knows);
        if let Some(own) = self.clock.get_mut(warp.column as usize) {
            *own = (*own).max(warp.serial);
        }
    }

    pub(crate) fn reset(&mut self, base: u32) {
        self.clock.fill(base);
        self.fenced.fill(base);
    }
}

/// What a warp waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    /// The barrier of this index, in the generation that it joined.
    Barrier(usize, u64),
    /// The barrier of the cluster, in this generation.
    Cluster(u64),
    Done,
}

struct Path {
    pc: u32,
    mask: u32,
    meet: u32,
}

pub(crate) struct Warp {
    pub(crate) registers: Registers,
    pub(crate) pc: u32,
    /// Lanes on the current path.
    pub(crate) mask: u32,
    /// Where the current path meets others.
    meet: u32,
    stack: Vec<Path>,
    /// Lanes that have not exited.
    pub(crate) live: u32,
    pub(crate) state: State,
    /// Position in the block.
    pub(crate) index: usize,
    /// Column of clocks.
    pub(crate) column: u16,
    /// Counts instructions; never falls while the warp's memory is reused for further blocks.
    pub(crate) serial: u32,
    pub(crate) knows: Knowledge,
    /// Local memory, lane after lane, and which bytes were written.
    pub(crate) local: Vec<u8>,
    pub(crate) local_written: Vec<bool>,
    pub(crate) copies: Copies,
    pub(crate) bulk_stores: Vec<BulkStore>,
    /// Groups of bulk stores that each lane closed.
    pub(crate) bulk_groups: [u64; LANES],
    pub(crate) wgmma: super::wgmma::InFlight,
    /// The generation of the cluster barrier that this warp arrived at.
    pub(crate) cluster_generation: u64,
}

impl Warp {
    pub(crate) fn new(kernel: &Kernel, index: usize, column: u16, columns: usize) -> Self {
        let local = kernel.local_bytes as usize * LANES;
        Self {
            registers: Registers::new(kernel.rows, kernel.predicates),
            pc: 0,
            mask: 0,
            meet: NOWHERE,
            stack: Vec::new(),
            live: 0,
            state: State::Done,
            index,
            column,
            serial: 0,
            knows: Knowledge::new(columns, 0),
            local: vec![0; local],
            local_written: vec![false; local],
            copies: Copies::default(),
            bulk_stores: Vec::new(),
            bulk_groups: [0; LANES],
            wgmma: super::wgmma::InFlight::default(),
            cluster_generation: 0,
        }
    }

    /// Puts the warp at the start of the kernel, in a block.
    pub(crate) fn start(&mut self, run: &Run<'_>, block: [u32; 3], base: u32) {
        let threads = run.block.iter().product::<u32>();
        let here = (threads - self.index as u32 * 32).min(32);
        self.live = if here == 32 { u32::MAX } else { (1 << here) - 1 };
        self.mask = self.live;
        self.pc = 0;
        self.meet = NOWHERE;
        self.stack.clear();
        self.state = State::Ready;
        self.serial = base;
        self.knows.reset(base);
        self.local_written.fill(false);
        self.copies.clear();
        self.bulk_stores.clear();
        self.bulk_groups = [0; LANES];
        self.wgmma.start(base);
        self.cluster_generation = 0;
        for &(row, wide, value) in &run.kernel.constants {
            if wide {
                self.registers.put(row, [value; LANES], u32::MAX);
            } else {
                self.registers.put(row, [value as u32; LANES], u32::MAX);
            }
        }
        for &(row, special) in &run.kernel.specials {
            self.registers.put(row, special_values(special, run, block, self.index), u32::MAX);
        }
    }

    /// Ends the lanes that `exits` names.
    fn exit(&mut self, exits: u32) {
        self.live &= !exits;
        self.mask &= !exits;
    }

    /// Takes waiting paths until one has lanes; false if none is left.
    #[inline(always)]
    fn settle(&mut self) -> bool {
        while self.pc == self.meet || self.mask == 0 {
            match self.stack.pop() {
                Some(path) => {
                    self.pc = path.pc;
                    self.mask = path.mask & self.live;
                    self.meet = path.meet;
                }
                None if self.mask == 0 => return false,
                None => self.meet = NOWHERE,
            }
        }
        true
    }
}

fn special_values(special: Special, run: &Run<'_>, block: [u32; 3], warp: usize) -> [u32; LANES] {
    let rank = |d: usize| block[d] % run.cluster[d];
    let mut out = [0; LANES];
    for (lane, value) in out.iter_mut().enumerate() {
        let linear = (warp * LANES + lane) as u32;
        let [bx, by, _] = run.block;
        *value = match special {
            Special::Thread(0) => linear % bx,
            Special::Thread(1) => linear / bx % by,
            Special::Thread(_) => linear / bx / by,
            Special::Threads(d) => run.block[d],
            Special::Block(d) => block[d],
            Special::Blocks(d) => run.grid[d],
            Special::ClusterBlock(d) => rank(d),
            Special::ClusterBlocks(d) => run.cluster[d],
            Special::Cluster(d) => block[d] / run.cluster[d],
            Special::Clusters(d) => run.grid[d] / run.cluster[d],
            Special::ClusterRank => rank(0) + run.cluster[0] * (rank(1) + run.cluster[1] * rank(2)),
            Special::ClusterSize => run.cluster.iter().product(),
            Special::Lane => lane as u32,
            Special::Warp => warp as u32,
            Special::Warps => run.block.iter().product::<u32>().div_ceil(32),
            Special::LaneMask(which) => {
                let at = 1u32 << lane;
                match which {
                    LaneMask::Below => at - 1,
                    LaneMask::UpTo => at | (at - 1),
                    LaneMask::At => at,
                    LaneMask::From => !(at - 1),
                    LaneMask::Above => !(at | (at - 1)),
                }
            }
            Special::DynamicShared => run.shared_end.saturating_sub(run.kernel.dynamic_shared),
            Special::TotalShared => run.shared_end - crate::run::SHARED_BASE,
            Special::Zero => 0,
            Special::One => 1,
        };
    }
    out
}

/// How a turn of a warp ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It used up its turn.
    Spent,
    /// It waits by trying again.
    Yielded,
    /// It is blocked or done.
    Stopped,
}

/// Runs a ready warp for at most `quantum` instructions. Returns how the turn ended and how many were executed.
pub(crate) fn run_warp(x: &mut Machine<'_>, quantum: u32) -> (Turn, u32) {
    #[cfg(target_arch = "x86_64")]
    if x.run.vector_host {
        // SAFETY: the host has these features.
        return unsafe { run_with_avx2(x, quantum) };
    }
    run_instructions(x, quantum)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,popcnt,lzcnt")]
unsafe fn run_with_avx2(x: &mut Machine<'_>, quantum: u32) -> (Turn, u32) {
    run_instructions(x, quantum)
}

#[inline(always)]
fn run_instructions(x: &mut Machine<'_>, quantum: u32) -> (Turn, u32) {
    let code = &x.run.kernel.code[..];
    let mut executed = 0;
    let turn = loop {
        if !x.warp.settle() {
            x.warp.state = State::Done;
            break Turn::Stopped;
        }
        if executed == quantum {
            break Turn::Spent;
        }
        let pc = x.warp.pc;
        let i = &code[pc as usize];
        x.warp.pc = pc + 1;
        x.warp.serial += 1;
        executed += 1;
        let mut active = x.warp.mask;
        if i.guard != 0 {
            let p = x.warp.registers.predicate(u32::from(i.guard) - 1);
            active &= if i.guard_negated { !p } else { p };
            if active == 0 && !i.always {
                continue;
            }
        }
        x.active = active;
        x.pc = pc;
        let site = &mut x.tally.sites[pc as usize];
        site.warps += 1;
        site.threads += u64::from(if i.always { x.warp.mask } else { active }.count_ones());
        if x.warp.wgmma.watched() {
            super::wgmma::check_touches(x);
        }
        // SAFETY: the instruction is one of the kernel that the machine runs.
        match unsafe { (i.run)(x, i) } {
            Flow::Next => {}
            Flow::Yield => break Turn::Yielded,
            Flow::Stop => break Turn::Stopped,
        }
    };
    (turn, executed)
}

/// `bra`: `a` is the target, `b` where the two paths meet again.
pub(crate) struct Branch;

impl Instruction for Branch {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let (target, meet, next) = (i.a, i.b, x.pc + 1);
        let taken = x.active;
        let w = &mut *x.warp;
        let not_taken = w.mask & !taken;
        if not_taken == 0 {
            w.pc = target;
        } else if taken == 0 {
            w.pc = next;
        } else {
            x.tally.sites[x.pc as usize].splits += 1;
            if meet != w.meet {
                w.stack.push(Path { pc: meet, mask: w.mask, meet: w.meet });
                w.meet = meet;
            }
            if target == meet {
                (w.mask, w.pc) = (not_taken, next);
            } else if next == meet {
                (w.mask, w.pc) = (taken, target);
            } else {
                w.stack.push(Path { pc: target, mask: taken, meet });
                (w.mask, w.pc) = (not_taken, next);
            }
        }
        Flow::Next
    }
}

/// `brx.idx`: `list` holds `count` targets for the index in row `a`; `b` is where all paths meet.
pub(crate) struct BranchTable;

impl Instruction for BranchTable {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let index = x.warp.registers.get::<u32>(i.a);
        let meet = i.b;
        let outer = x.warp.meet;
        if x.active == 0 {
            return Flow::Next;
        }
        if x.active != x.warp.mask {
            // Lanes that the guard excludes go on behind the table.
            x.warp.stack.push(Path { pc: meet, mask: x.warp.mask, meet: outer });
            x.warp.stack.push(Path { pc: x.pc + 1, mask: x.warp.mask & !x.active, meet });
        } else if meet != outer {
            x.warp.stack.push(Path { pc: meet, mask: x.warp.mask, meet: outer });
        }
        x.warp.meet = meet;
        let mut paths: Vec<Path> = Vec::new();
        for l in lanes(x.active) {
            let n = (index[l] as usize).min(usize::from(i.count) - 1);
            let pc = x.run.kernel.lists[i.list as usize + n];
            match paths.iter_mut().find(|p| p.pc == pc) {
                Some(p) => p.mask |= 1 << l,
                None => paths.push(Path { pc, mask: 1 << l, meet }),
            }
        }
        x.tally.sites[x.pc as usize].splits += u64::from(paths.len() > 1);
        if let Some(first) = paths.pop() {
            (x.warp.pc, x.warp.mask) = (first.pc, first.mask);
        }
        x.warp.stack.extend(paths);
        Flow::Next
    }
}

/// `ret` and `exit` of a kernel.
pub(crate) struct Exit;

impl Instruction for Exit {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, _: &Inst) -> Flow {
        let exits = x.active;
        x.warp.exit(exits);
        *x.progress += 1;
        Flow::Next
    }
}

/// `trap`: a kernel that stops itself is worth a finding.
pub(crate) struct Trap;

impl Instruction for Trap {
    unsafe fn execute(x: &mut Machine<'_>, _: &Inst) -> Flow {
        let lane = x.active.trailing_zeros() as usize & 31;
        let (kind, place) = (crate::finding::FindingKind::Operand, crate::finding::Place::None);
        x.report(kind, lane, place, "the kernel executed `trap`");
        let exits = x.warp.live;
        x.warp.exit(exits);
        Flow::Next
    }
}

/// `nanosleep`: gives way.
pub(crate) struct Sleep;

impl Instruction for Sleep {
    unsafe fn execute(_: &mut Machine<'_>, _: &Inst) -> Flow {
        Flow::Yield
    }
}

/// A value of the first active lane, for operands that must be the same in all.
#[inline(always)]
pub(crate) fn uniform<T: Lane>(x: &Machine<'_>, row: u32) -> T {
    x.warp.registers.lane(row, x.active.trailing_zeros() as usize & 31)
}
