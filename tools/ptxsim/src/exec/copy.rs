//! `cp.async`: copies from global to shared memory, done as late as a wait allows.

use super::access::{Kind, all_written};
use super::lane::lanes;
use super::memory::narrow_addresses;
use super::{Flow, Inst, Instruction, Machine};
use crate::finding::FindingKind;

/// A copy that was issued.
struct Pending {
    shared: u32,
    /// Where to read; windows do not move while a launch runs.
    from: *const u8,
    /// Bytes to read; the rest of `size` is filled with zeros.
    source: u8,
    size: u8,
    lane: u8,
}

/// The copies of a warp that are under way, and where its groups end among them.
#[derive(Default)]
pub(crate) struct Copies {
    pending: Vec<Pending>,
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
        let offset = i64::from(i.d as i32) as u64;
        let size = u32::from(i.size);
        let ignored = if i.mode == 1 { x.warp.registers.predicate(x.listed(i, 0)) } else { 0 };
        let mut globals = [0; 32];
        let mut reading = 0;
        for l in lanes(x.active) {
            let global = x.warp.registers.lane::<u64>(i.b, l).wrapping_add(offset);
            let wanted = x.warp.registers.lane::<u32>(i.c, l);
            let source = if ignored >> l & 1 != 0 { 0 } else { wanted.min(size) };
            let rank = x.rank;
            if wanted > size {
                let why = format!("{wanted} source bytes for a copy of {size}");
                x.report(FindingKind::Operand, l, crate::finding::Place::None, why);
            }
            if !x.shared_in_bounds(rank, shared[l], size, l, true) {
                continue;
            }
            let Some(from) = admit_source(x, global, source, size, l) else { continue };
            if x.run.shadowed {
                x.shadow_access(rank, shared[l], size, l, Kind::Write);
                if let Some(shadow) = &mut x.cta().shadow {
                    shadow.set_pending(shared[l], size, true);
                }
            }
            globals[l] = global;
            reading |= u32::from(source > 0) << l;
            let (source, size, lane) = (source as u8, size as u8, l as u8);
            x.warp.copies.pending.push(Pending { shared: shared[l], from, source, size, lane });
        }
        if x.run.options.traffic {
            x.count_copy(&globals, reading, size);
        }
        Flow::Next
    }
}

/// The source of a copy, if it may be read; a copy of no bytes reads nothing.
#[inline(always)]
fn admit_source(x: &Machine<'_>, global: u64, source: u32, size: u32, lane: usize) -> Option<*const u8> {
    if source == 0 {
        return Some(std::ptr::null());
    }
    let bytes = x.global_bytes(global, source.into(), size.into(), false, lane)?;
    x.check_conflict(bytes, source, Kind::Read, lane, global);
    // SAFETY: `source` bytes were admitted, each with its mark.
    if x.run.uninitialised && !unsafe { all_written(bytes.written, source) } {
        let why = "copy of bytes that nothing wrote";
        x.report(FindingKind::Uninitialised, lane, x.run.place(global), why);
    }
    Some(bytes.data)
}

impl Machine<'_> {
    fn count_copy(&mut self, addresses: &[u64; 32], reading: u32, size: u32) {
        let sectors = super::access::count_sectors(addresses, reading, size);
        let site = &mut self.tally.sites[self.pc as usize];
        site.bytes += u64::from(reading.count_ones() * size);
        site.sectors += u64::from(sectors);
    }

    /// Performs the first `count` copies under way.
    fn complete_copies(&mut self, count: usize) {
        let serial = self.warp.serial;
        let cta = &mut self.ctas[self.rank];
        for copy in self.warp.copies.pending.drain(..count) {
            let to = cta.shared(copy.shared);
            // SAFETY: both sides were admitted when the copy was issued.
            unsafe {
                if copy.source == 16 {
                    copy_16(copy.from, to);
                } else {
                    std::ptr::write_bytes(to, 0, copy.size.into());
                    if copy.source > 0 {
                        std::ptr::copy_nonoverlapping(copy.from, to, copy.source.into());
                    }
                }
            }
            if let Some(shadow) = &mut cta.shadow {
                shadow.set_pending(copy.shared, copy.size.into(), false);
                shadow.arrived(copy.shared, copy.size.into(), self.warp.column, copy.lane, serial);
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
