//! Transaction barriers in shared memory.

use super::access::shared_place;
use super::lane::lanes;
use super::warp::Knowledge;
use super::{Flow, Inst, Instruction, Machine};
use crate::finding::FindingKind;

/// The state behind the eight opaque bytes.
pub(crate) struct Mbarrier {
    /// Arrivals that a phase needs.
    expected: u32,
    /// Arrivals still missing in this phase.
    pending: u32,
    /// Bytes announced and not delivered.
    bytes: i64,
    /// Completed phases; the lowest bit is the parity of the current one.
    phase: u64,
    /// What those know that a wait lets through; and one that sees no farther than the block.
    knows: Knowledge,
    near: Knowledge,
    /// Column and serial of its initialisation.
    born: (u16, u32),
    /// Whether a `fence.mbarrier_init` followed.
    announced: bool,
}

/// Whether the asynchronous proxy sees the mbarrier at a local address of a block when a warp sends it there.
pub(crate) fn is_fenced(cta: &super::team::Cta, address: u32, warp: &super::warp::Warp) -> bool {
    cta.mbarriers
        .get(&address)
        .is_none_or(|b| b.announced || b.born.1 <= warp.knows.fenced[b.born.0 as usize])
}

/// Largest count of arrivals, and of bytes under way.
const LIMIT: u32 = (1 << 20) - 1;

pub(crate) const UNKNOWN: &str = "not ordered after the `mbarrier.init`, which may not have been executed";

impl Mbarrier {
    /// Whether a warp comes after the initialisation.
    pub(crate) fn is_known_to(&self, warp: &super::warp::Warp) -> bool {
        let (column, serial) = self.born;
        column == warp.column || warp.knows.clock.get(column as usize).is_none_or(|known| *known >= serial)
    }

    /// Ends the phase if nothing is missing.
    fn settle(&mut self) -> bool {
        let done = self.pending == 0 && self.bytes == 0;
        if done {
            self.phase += 1;
            self.pending = self.expected;
        }
        done
    }
}

impl Machine<'_> {
    /// Runs `f` on the mbarrier at an address that may lie in another block; reports if there is none.
    fn with_mbarrier<R>(
        &mut self,
        address: u32,
        lane: usize,
        f: impl FnOnce(&mut Mbarrier, &mut super::warp::Warp) -> R,
    ) -> Option<R> {
        let (rank, local) = self.shared_target(address);
        if !self.shared_in_bounds(rank, local, 8, lane, true) {
            return None;
        }
        if let Some(barrier) = self.ctas[rank].mbarriers.get_mut(&local) {
            let known = barrier.is_known_to(self.warp);
            let outcome = f(barrier, self.warp);
            if !known {
                self.report(FindingKind::Mbarrier, lane, shared_place(local), UNKNOWN);
            }
            self.visit(rank, lane);
            return Some(outcome);
        }
        let why = "there is no mbarrier here: `mbarrier.init` has not been executed";
        self.report(FindingKind::Mbarrier, lane, shared_place(local), why);
        None
    }

    /// `count` arrivals after announcing `bytes`. Returns the phase before.
    pub(crate) fn mbarrier_arrive(&mut self, address: u32, lane: usize, count: u32, bytes: i64) -> u64 {
        let far = self.shared_target(address).0 != self.rank;
        let outcome = self.with_mbarrier(address, lane, |b, warp| {
            let phase = b.phase;
            b.bytes += bytes;
            b.knows.join_warp(warp);
            if !far {
                b.near.join_warp(warp);
            }
            let missing = b.pending;
            b.pending = missing.saturating_sub(count);
            let over = count > missing || b.bytes.unsigned_abs() > LIMIT.into();
            b.settle();
            (phase, over, missing)
        });
        *self.progress += 1;
        let Some((phase, over, missing)) = outcome else { return 0 };
        if over {
            let why = format!("{count} arrivals, but the phase lacks only {missing}");
            self.report(FindingKind::Mbarrier, lane, shared_place(address), why);
        }
        phase
    }
}

/// `delivered` bytes of the mbarrier at a local address of a block arrived, with what the copy knew.
pub(crate) fn deliver(cta: &mut super::team::Cta, address: u32, delivered: u32, knows: &Knowledge) {
    if let Some(barrier) = cta.mbarriers.get_mut(&address) {
        barrier.bytes -= i64::from(delivered);
        barrier.knows.join(knows);
        barrier.near.join(knows);
        barrier.settle();
    }
}

/// `mbarrier.init`: address `a + imm`, count in row `b`.
pub(crate) struct Init;

impl Instruction for Init {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let addresses = super::memory::narrow_addresses(x, i);
        for l in lanes(x.active) {
            let (address, count) = (addresses[l], x.warp.registers.lane::<u32>(i.b, l));
            let rank = x.rank;
            if !x.shared_in_bounds(rank, address, 8, l, true) {
                continue;
            }
            if count == 0 || count > LIMIT {
                let why = format!("a count of {count}; 1 to {LIMIT} are possible");
                x.report(FindingKind::Mbarrier, l, shared_place(address), why);
            }
            if x.run.shadowed {
                x.shadow_access(rank, address, 8, l, super::access::Kind::Write);
            }
            let knows = Knowledge::new(x.warp.knows.clock.len(), 0);
            let near = Knowledge::new(x.warp.knows.clock.len(), 0);
            let born = (x.warp.column, x.warp.serial);
            let barrier = Mbarrier {
                expected: count,
                pending: count,
                bytes: 0,
                phase: 0,
                knows,
                near,
                born,
                announced: false,
            };
            let cta = x.cta();
            cta.mbarriers.insert(address, barrier);
            if let Some(shadow) = &mut cta.shadow {
                shadow.set_mbarrier(address, true);
            }
        }
        *x.progress += 1;
        Flow::Next
    }
}

/// `fence.mbarrier_init`: the mbarriers that this warp initialised become visible to the asynchronous proxy.
pub(crate) struct Announce;

impl Instruction for Announce {
    unsafe fn execute(x: &mut Machine<'_>, _: &Inst) -> Flow {
        let column = x.warp.column;
        for barrier in x.cta().mbarriers.values_mut().filter(|b| b.born.0 == column) {
            barrier.announced = true;
        }
        Flow::Next
    }
}

/// `mbarrier.inval`: address `a + imm`.
pub(crate) struct Invalidate;

impl Instruction for Invalidate {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let addresses = super::memory::narrow_addresses(x, i);
        for l in lanes(x.active) {
            let (rank, local) = x.shared_target(addresses[l]);
            if x.with_mbarrier(addresses[l], l, |_, _| ()).is_some() {
                let cta = &mut x.ctas[rank];
                cta.mbarriers.remove(&local);
                if let Some(shadow) = &mut cta.shadow {
                    shadow.set_mbarrier(local, false);
                }
            }
        }
        Flow::Next
    }
}

/// `mbarrier.arrive`: address `a + imm`, arrivals in row `b`, bytes announced in row `c`; the phase goes to row `d`.
///
/// `mode` 0 arrives; 1 announces and arrives; 2 only announces (`mbarrier.expect_tx`).
pub(crate) struct Arrive;

impl Instruction for Arrive {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let addresses = super::memory::narrow_addresses(x, i);
        for l in lanes(x.active) {
            let count = if i.mode == 2 { 0 } else { x.warp.registers.lane::<u32>(i.b, l) };
            let bytes = if i.mode == 0 { 0 } else { x.warp.registers.lane::<u32>(i.c, l) };
            let phase = x.mbarrier_arrive(addresses[l], l, count, bytes.into());
            x.warp.registers.words_mut::<u64>(i.d)[l] = phase;
        }
        Flow::Next
    }
}

/// `mbarrier.try_wait` and `test_wait`: address `a + imm`; parity in row `b`, or with bit 0 of `mode` a phase in wide row
/// `b`; predicate `d`. Bit 1 of `mode`: arrivals of other blocks are acquired as well. A lane that must wait gives way to other warps.
pub(crate) struct TryWait;

impl Instruction for TryWait {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let addresses = super::memory::narrow_addresses(x, i);
        let mut done = 0;
        for l in lanes(x.active) {
            let parity = if i.mode & 1 != 0 {
                x.warp.registers.lane::<u64>(i.b, l) & 1
            } else {
                u64::from(x.warp.registers.lane::<u32>(i.b, l) & 1)
            };
            super::bulk::deliver_loads(x, addresses[l]);
            let passed = x.with_mbarrier(addresses[l], l, |b, warp| {
                let passed = b.phase & 1 != parity;
                if passed {
                    warp.knows.join(if i.mode & 2 != 0 { &b.knows } else { &b.near });
                }
                passed
            });
            // Without an mbarrier nothing will come: let the kernel go on to further faults.
            if passed != Some(false) {
                done |= 1 << l;
            }
        }
        if done != 0
            && let Some(own) = x.warp.knows.clock.get_mut(x.warp.column as usize)
        {
            // The lanes that pass saw the arrivals of the others of this warp, if any.
            *own = (*own).max(x.warp.serial);
        }
        x.warp.registers.put_predicate(i.d, done, x.active);
        if done == x.active { Flow::Next } else { Flow::Yield }
    }
}
