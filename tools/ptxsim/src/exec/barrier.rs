//! Barriers of a block and of a cluster.

use super::warp::{Knowledge, State, Warp, uniform};
use super::{Flow, Inst, Instruction, Machine};
use crate::finding::{FindingKind, Place};

/// A barrier: who has arrived, and what the released know.
pub(crate) struct Barrier {
    arrived: u32,
    /// Threads of the current generation; zero for all that have not exited.
    needed: u32,
    joined: Knowledge,
    released: Knowledge,
    generation: u64,
}

impl Barrier {
    pub(crate) fn new(columns: usize) -> Self {
        let joined = Knowledge::new(columns, 0);
        Self { arrived: 0, needed: 0, released: joined.clone(), joined, generation: 0 }
    }

    pub(crate) fn reset(&mut self) {
        self.arrived = 0;
        self.needed = 0;
        self.joined.reset(0);
        self.generation = 0;
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// What those know that the last generation released.
    pub(crate) fn released(&self) -> &Knowledge {
        &self.released
    }

    /// `threads` arrive; once `needed` are there (of `all`, if zero), a new generation begins. An error names
    /// another count that someone else gave.
    fn arrive(&mut self, threads: u32, needed: u32, all: u32, warp: &Warp) -> Result<(), u32> {
        let disagreed = self.arrived > 0 && self.needed != needed;
        let before = self.needed;
        self.needed = needed;
        self.arrived += threads;
        self.joined.join_warp(warp);
        self.release(if needed == 0 { all } else { needed });
        if disagreed { Err(before) } else { Ok(()) }
    }

    fn release(&mut self, needed: u32) {
        if self.arrived >= needed && self.arrived > 0 {
            self.arrived = 0;
            std::mem::swap(&mut self.joined, &mut self.released);
            self.joined.reset(0);
            self.generation += 1;
        }
    }

    /// A warp exited; `left` threads of all remain.
    pub(crate) fn exited(&mut self, left: u32) {
        if self.needed == 0 {
            self.release(left);
        }
    }
}

/// Joins the barrier `id` of the block and blocks the warp unless it was the last.
pub(crate) fn join(x: &mut Machine<'_>, id: usize, needed: u32) {
    let generation = arrive(x, id, needed);
    x.warp.state = State::Barrier(id, generation);
}

/// Arrives at the barrier; returns the generation before.
fn arrive(x: &mut Machine<'_>, id: usize, needed: u32) -> u64 {
    let cta = &mut x.ctas[x.rank];
    let all = cta.expected();
    let barrier = &mut cta.barriers[id];
    let generation = barrier.generation;
    let agreed = barrier.arrive(32, needed, all, x.warp);
    *x.progress += 1;
    if let Err(other) = agreed {
        let say = |n: u32| if n == 0 { "all".to_string() } else { n.to_string() };
        let why = format!("barrier {id} for {} threads, others wait for {}", say(needed), say(other));
        x.report(FindingKind::Operand, 0, Place::None, why);
    }
    generation
}

/// `bar.sync` (`mode` 0), `bar.arrive` (1) and `bar.red` (2, 3, 4 for and, or, popc).
///
/// Row `a` is the barrier; row `b`, if `count` is 1, the number of threads.
pub(crate) struct Sync;

impl Instruction for Sync {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if !x.converged() {
            // The lanes of a split warp would wait for each other: go on as if the warp were whole.
            return Flow::Next;
        }
        let id = uniform::<u32>(x, i.a) as usize;
        let needed = if i.count == 1 { uniform::<u32>(x, i.b) } else { 0 };
        if id >= super::team::BARRIERS || needed % 32 != 0 {
            let why = format!("barrier {id} for {needed} threads; there are 16, for multiples of 32 threads");
            x.report(FindingKind::Operand, 0, Place::None, why);
            return Flow::Next;
        }
        if i.mode == 1 {
            arrive(x, id, needed);
            return Flow::Next;
        }
        join(x, id, needed);
        Flow::Stop
    }
}

/// `bar.warp.sync`: the lanes of the mask in row `a` see each other's accesses.
pub(crate) struct WarpSync;

impl Instruction for WarpSync {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let mask = uniform::<u32>(x, i.a) & x.warp.live;
        super::collective::check_mask(x, mask);
        if let Some(own) = x.warp.knows.clock.get_mut(x.warp.column as usize) {
            *own = x.warp.serial;
        }
        Flow::Next
    }
}

/// `barrier.cluster.arrive`
pub(crate) struct ClusterArrive;

impl Instruction for ClusterArrive {
    unsafe fn execute(x: &mut Machine<'_>, _: &Inst) -> Flow {
        if !x.converged() {
            return Flow::Next;
        }
        let all = x.ctas.iter().map(|c| c.expected()).sum();
        let barrier = &mut x.ctas[0].cluster_barrier;
        x.warp.cluster_generation = barrier.generation;
        // All blocks count alike, so that this barrier cannot disagree.
        let _ = barrier.arrive(32, 0, all, x.warp);
        *x.progress += 1;
        Flow::Next
    }
}

/// `barrier.cluster.wait`
pub(crate) struct ClusterWait;

impl Instruction for ClusterWait {
    unsafe fn execute(x: &mut Machine<'_>, _: &Inst) -> Flow {
        if !x.converged() {
            return Flow::Next;
        }
        x.warp.state = State::Cluster(x.warp.cluster_generation);
        Flow::Stop
    }
}

/// `fence.proxy.async`: what the warp knows becomes visible to the asynchronous proxy.
pub(crate) struct ProxyFence;

impl Instruction for ProxyFence {
    unsafe fn execute(x: &mut Machine<'_>, _: &Inst) -> Flow {
        let w = &mut *x.warp;
        for (fenced, known) in w.knows.fenced.iter_mut().zip(&w.knows.clock) {
            *fenced = (*fenced).max(*known);
        }
        if let Some(own) = w.knows.fenced.get_mut(w.column as usize) {
            *own = w.serial;
        }
        Flow::Next
    }
}

/// `fence` and `membar` of the device.
pub(crate) struct Fence;

impl Instruction for Fence {
    unsafe fn execute(x: &mut Machine<'_>, _: &Inst) -> Flow {
        x.fence();
        Flow::Next
    }
}

/// `setmaxnreg`: only that the whole warp takes part.
pub(crate) struct Converged;

impl Instruction for Converged {
    unsafe fn execute(x: &mut Machine<'_>, _: &Inst) -> Flow {
        x.converged();
        Flow::Next
    }
}
