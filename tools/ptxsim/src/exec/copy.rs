//! `cp.async`: copies from global to shared memory, done as late as a wait allows.

use super::access::{Kind, all_written};
use super::lane::{LANES, Row, lanes};
use super::memory::narrow_addresses;
use super::{Flow, Inst, Instruction, Machine};
use crate::finding::{FindingKind, Place};
use crate::run::Bytes;
use std::collections::VecDeque;

/// The copies of an instruction, one for each lane.
struct Issued {
    shared: Row<u32>,
    /// Where to read; windows do not move while a launch runs.
    from: [*const u8; LANES],
    /// Bytes to read; the rest of `size` is filled with zeros.
    sources: Row<u32>,
    lanes: u32,
    size: u32,
}

/// The copies of a warp that are under way, by instruction, and where its groups end among them.
#[derive(Default)]
pub(crate) struct Copies {
    pending: VecDeque<Issued>,
    groups: Vec<usize>,
}

impl Copies {
    pub(crate) fn clear(&mut self) {
        self.pending.clear();
        self.groups.clear();
    }
}

/// `cp.async`: shared address `a + imm`, global address in wide row `b` plus `d` (as `i32`), bytes to read in row
/// `c`; `size` bytes in all. `mode` 1: predicate in `count` says to ignore the source.
pub(crate) struct CopyAsync;

impl Instruction for CopyAsync {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let shared = narrow_addresses(x, i);
        let mut globals = x.warp.registers.get::<u64>(i.b);
        let offset = i64::from(i.d as i32) as u64;
        globals.iter_mut().for_each(|g| *g = g.wrapping_add(offset));
        let ignored = if i.mode == 1 { x.warp.registers.predicate(x.listed(i, 0)) } else { 0 };
        let (size, wanted) = (u32::from(i.size), x.warp.registers.words::<u32>(i.c));
        let (mut sources, mut excessive, mut reading) = ([0; LANES], 0, 0);
        for l in 0..LANES {
            sources[l] = if ignored >> l & 1 != 0 { 0 } else { wanted[l].min(size) };
            excessive |= u32::from(wanted[l] > size) << l;
            reading |= u32::from(sources[l] > 0) << l;
        }
        reading &= x.active;
        let mut issued = Issued { shared, from: [std::ptr::null(); LANES], sources, lanes: x.active, size };
        let refused = x.refused_shared(&shared, size) | excessive;
        match x.run.find_lanes(&globals, reading, &sources, size, false) {
            Some((window, offsets)) if refused & x.active == 0 => {
                for l in lanes(reading) {
                    let bytes = window.at(offsets[l]);
                    x.visit_source(bytes, globals[l], sources[l], l);
                    issued.from[l] = bytes.data;
                }
            }
            _ => x.admit_copies(&mut issued, &globals, i),
        }
        if x.run.shadowed {
            x.shadow_accesses(&shared, issued.lanes, size, Kind::Write);
            if let Some(shadow) = &mut x.cta().shadow {
                lanes(issued.lanes).for_each(|l| shadow.set_pending(shared[l], size, true));
            }
        }
        if x.run.options.traffic {
            x.count_copy(&globals, reading & issued.lanes, size);
        }
        x.warp.copies.pending.push_back(issued);
        Flow::Next
    }
}

impl Machine<'_> {
    /// Checks copies lane by lane, with a report for each that may not be; those drop out.
    #[cold]
    #[inline(never)]
    fn admit_copies(&mut self, issued: &mut Issued, globals: &Row<u64>, i: &Inst) {
        let wanted = *self.warp.registers.words::<u32>(i.c);
        let size = issued.size;
        for l in lanes(std::mem::take(&mut issued.lanes)) {
            if wanted[l] > size {
                let why = format!("{} source bytes for a copy of {size}", wanted[l]);
                self.report(FindingKind::Operand, l, Place::None, why);
            }
            if !self.shared_in_bounds(self.rank, issued.shared[l], size, l, true) {
                continue;
            }
            let source = issued.sources[l];
            if source > 0 {
                let bytes = self.global_bytes(globals[l], source.into(), size.into(), false, l);
                let Some(bytes) = bytes else { continue };
                self.visit_source(bytes, globals[l], source, l);
                issued.from[l] = bytes.data;
            }
            issued.lanes |= 1 << l;
        }
    }

    /// Looks at the owners and marks of the bytes that a copy reads.
    #[inline(always)]
    fn visit_source(&self, bytes: Bytes, global: u64, source: u32, lane: usize) {
        self.check_conflict(bytes, source, Kind::Read, lane, global);
        // SAFETY: `source` bytes were admitted, each with its mark.
        if self.run.uninitialised && !unsafe { all_written(bytes.written, source) } {
            let why = "copy of bytes that nothing wrote";
            self.report(FindingKind::Uninitialised, lane, self.run.place(global), why);
        }
    }

    fn count_copy(&mut self, addresses: &[u64; 32], reading: u32, size: u32) {
        let sectors = super::traffic::count_sectors(addresses, reading, size);
        let site = &mut self.tally.sites[self.pc as usize];
        site.bytes += u64::from(reading.count_ones() * size);
        site.sectors += u64::from(sectors);
        lanes(reading).for_each(|l| self.touch(addresses[l], size.into(), Kind::Read));
    }

    /// Performs what the first `count` instructions under way copy.
    fn complete_copies(&mut self, count: usize) {
        let (column, serial) = (self.warp.column, self.warp.serial);
        let cta = &mut self.ctas[self.rank];
        for copy in self.warp.copies.pending.drain(..count) {
            for l in lanes(copy.lanes) {
                let (to, source) = (cta.shared(copy.shared[l]), copy.sources[l] as usize);
                // SAFETY: both sides were admitted when the copy was issued.
                unsafe {
                    if source == 16 {
                        copy_16(copy.from[l], to);
                    } else {
                        std::ptr::write_bytes(to, 0, copy.size as usize);
                        if source > 0 {
                            std::ptr::copy_nonoverlapping(copy.from[l], to, source);
                        }
                    }
                }
            }
            if let Some(shadow) = &mut cta.shadow {
                for l in lanes(copy.lanes) {
                    shadow.arrived(copy.shared[l], copy.size, column, l as u8, serial);
                }
            }
        }
        for group in &mut self.warp.copies.groups {
            *group = group.saturating_sub(count);
        }
    }
}

/// Copies 16 bytes.
///
/// # Safety
///
/// Both sides must be valid.
#[inline(always)]
pub(crate) unsafe fn copy_16(from: *const u8, to: *mut u8) {
    // SAFETY: by the caller's promise.
    unsafe { to.cast::<[u8; 16]>().write_unaligned(from.cast::<[u8; 16]>().read_unaligned()) }
}

/// `cp.async.commit_group`
pub(crate) struct Commit;

impl Instruction for Commit {
    unsafe fn execute(x: &mut Machine<'_>, _: &Inst) -> Flow {
        let end = x.warp.copies.pending.len();
        x.warp.copies.groups.push(end);
        Flow::Next
    }
}

/// `cp.async.wait_group imm`, and `wait_all` with `mode` 1.
pub(crate) struct Wait;

impl Instruction for Wait {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let copies = &x.warp.copies;
        if i.mode == 1 {
            let all = copies.pending.len();
            x.warp.copies.groups.clear();
            x.complete_copies(all);
            return Flow::Next;
        }
        let done = copies.groups.len().saturating_sub(i.imm as usize);
        if done > 0 {
            let count = copies.groups[done - 1];
            x.warp.copies.groups.drain(..done);
            x.complete_copies(count);
        }
        Flow::Next
    }
}

/// `cp.async.mbarrier.arrive`: the copies so far arrive at the mbarrier at `a + imm` once complete; `mode` 1 for
/// `.noinc`.
pub(crate) struct ArriveAfter;

impl Instruction for ArriveAfter {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let all = x.warp.copies.pending.len();
        x.complete_copies(all);
        let addresses = narrow_addresses(x, i);
        for l in lanes(x.active) {
            // Without `.noinc` the pending count goes up by one first, so that nothing changes in the end.
            x.mbarrier_arrive(addresses[l], l, u32::from(i.mode == 1), 0);
        }
        Flow::Next
    }
}
