//! Checks of accesses: bounds, alignment, rights, initialisation, races; and the counts of their traffic.

use super::Machine;
use super::lane::{FULL, LANES, Row, lanes};
use super::shadow::{Agent, Faults};
use super::team::Visit;
use super::traffic::{count_sectors, count_wavefronts};
use super::warp::Warp;
use crate::finding::{FindingKind, Place};
use crate::run::{Bytes, SHARED_BASE};

/// What an access does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    /// Reads and writes in one step.
    Atomic,
    /// Reads or writes in one step what others may touch so at the same time.
    Look,
    Tell,
}

impl Kind {
    #[inline(always)]
    pub(crate) fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::Look)
    }

    #[inline(always)]
    fn reads(self) -> bool {
        !matches!(self, Self::Write | Self::Tell)
    }

    /// Whether others may touch the bytes in one step at the same time.
    #[inline(always)]
    fn together(self) -> bool {
        !matches!(self, Self::Read | Self::Write)
    }
}

/// Where the bytes of each lane lie; only lanes of the mask that came with it have a pointer.
pub(crate) type Pointers = [*mut u8; LANES];

/// No lane has any.
pub(crate) const NO_POINTERS: Pointers = [std::ptr::null_mut(); LANES];

/// Bits that tell the block of a cluster from an address of shared memory: its rank plus one, or zero for the own.
const RANK_SHIFT: u32 = 24;

/// The address of another block's shared memory, as `mapa` computes it.
pub(crate) fn cluster_address(address: u32, rank: u32) -> u32 {
    address & ((1 << RANK_SHIFT) - 1) | (rank + 1) << RANK_SHIFT
}

/// The agent of an ordinary access by `lane` of the current instruction.
#[inline(always)]
pub(crate) fn agent(warp: &Warp, lane: usize, atomic: bool, pc: u32) -> Agent<'_> {
    Agent {
        column: warp.column,
        lane: lane as u8,
        serial: warp.serial,
        clock: &warp.knows.clock,
        together: warp.knows.clock[warp.column as usize],
        fenced: &warp.knows.fenced,
        record: (warp.column, warp.serial),
        asynchronous: false,
        atomic,
        pc,
    }
}

impl Machine<'_> {
    /// The block and the address within it; reports a rank outside of the cluster.
    #[inline(always)]
    pub(crate) fn shared_target(&self, address: u32) -> (usize, u32) {
        match address >> RANK_SHIFT {
            0 => (self.rank, address),
            rank => ((rank - 1) as usize, address & ((1 << RANK_SHIFT) - 1)),
        }
    }

    /// Whether `size` bytes of shared memory may be accessed at an address; reports if not.
    #[inline(always)]
    pub(crate) fn shared_in_bounds(
        &self,
        rank: usize,
        address: u32,
        size: u32,
        lane: usize,
        write: bool,
    ) -> bool {
        let end = self.run.shared_end;
        let inside = address >= SHARED_BASE && address <= end && size <= end - address;
        let there = rank == self.rank || self.ctas.get(rank).is_some_and(|cta| !cta.has_exited());
        if inside && address & (size.min(16) - 1) == 0 && there {
            return true;
        }
        let verb = if write { "write" } else { "read" };
        let (kind, why) = if inside && !there && rank < self.ctas.len() {
            (
                FindingKind::OutOfBounds,
                format!("{verb} of {size} bytes of a block of the cluster that has exited"),
            )
        } else if inside && there {
            (FindingKind::Misaligned, format!("{verb} of {size} bytes at no multiple of {size}"))
        } else {
            let why = format!("{verb} of {size} bytes, the block has {}", end - SHARED_BASE);
            (FindingKind::OutOfBounds, why)
        };
        self.report(kind, lane, shared_place(address), why);
        false
    }

    /// Checks and records an ordinary access to shared memory that is within bounds.
    #[inline(always)]
    pub(crate) fn shadow_access(&mut self, rank: usize, address: u32, size: u32, lane: usize, kind: Kind) {
        let who = agent(self.warp, lane, kind == Kind::Atomic, self.pc);
        let Some(shadow) = &mut self.ctas[rank].shadow else { return };
        let faults = match kind {
            Kind::Read | Kind::Look => shadow.read(&who, address, size),
            _ => shadow.write(&who, address, size),
        };
        if faults.any() {
            self.report_shared(faults, rank, address, lane, kind);
        }
    }

    /// [`shadow_access`](Self::shadow_access) for several lanes, in the block's own shared memory.
    #[inline(always)]
    pub(crate) fn shadow_accesses(&mut self, addresses: &Row<u32>, active: u32, size: u32, kind: Kind) {
        let mut rest = active;
        while let Some((lane, faults)) = self.shadow_until_fault(addresses, &mut rest, size, kind) {
            self.report_shared(faults, self.rank, addresses[lane], lane, kind);
        }
    }

    /// Goes through the lanes of `rest` up to the first that meets a fault.
    #[inline(always)]
    fn shadow_until_fault(
        &mut self,
        addresses: &Row<u32>,
        rest: &mut u32,
        size: u32,
        kind: Kind,
    ) -> Option<(usize, Faults)> {
        let mut who = agent(self.warp, 0, kind == Kind::Atomic, self.pc);
        let shadow = self.ctas[self.rank].shadow.as_mut()?;
        while *rest != 0 {
            let lane = rest.trailing_zeros() as usize;
            *rest &= *rest - 1;
            who.lane = lane as u8;
            let faults = match kind {
                Kind::Read | Kind::Look => shadow.read(&who, addresses[lane], size),
                _ => shadow.write(&who, addresses[lane], size),
            };
            if faults.any() {
                return Some((lane, faults));
            }
        }
        None
    }

    /// Reports what the shadow found.
    #[cold]
    #[inline(never)]
    pub(crate) fn report_shared(&self, faults: Faults, rank: usize, address: u32, lane: usize, kind: Kind) {
        let place = || shared_place(address);
        let verb = if !kind.writes() { "read" } else { "write" };
        if faults.has(Faults::UNINITIALISED) {
            self.report(FindingKind::Uninitialised, lane, place(), "read of bytes that nothing wrote");
        }
        if faults.has(Faults::IN_FLIGHT) {
            let why = format!("{verb} of bytes that an asynchronous copy has not delivered yet");
            self.report(FindingKind::InFlight, lane, place(), why);
        }
        if faults.has(Faults::MBARRIER) {
            let why = format!("{verb} of the bytes of an mbarrier by an ordinary access");
            self.report(FindingKind::Mbarrier, lane, place(), why);
        }
        if faults.has(Faults::UNFENCED) {
            let why = "the asynchronous proxy reads what ordinary stores wrote, without `fence.proxy.async` \
                       after them and a barrier after the fence";
            self.report(FindingKind::Proxy, lane, place(), why);
        }
        if faults.has(Faults::AFTER_WRITE) {
            let why = format!("{verb} not ordered after {}", self.last_write(rank, address));
            self.report(FindingKind::Race, lane, place(), why);
        }
        if faults.has(Faults::AFTER_READ) {
            let why = format!("{verb} not ordered after {}", self.last_read(rank, address));
            self.report(FindingKind::Race, lane, place(), why);
        }
    }

    /// The latest write before the current one. After a racing write its own record stands in the cell, so the
    /// message names the line only where it is another's.
    fn last_write(&self, rank: usize, address: u32) -> String {
        let Some(shadow) = &self.ctas[rank].shadow else { return String::new() };
        let cell = shadow.cell(address);
        if cell.write_pc == self.pc {
            return "an earlier write".to_string();
        }
        format!("the write at line {}", self.run.kernel.code[cell.write_pc as usize].line)
    }

    fn last_read(&self, rank: usize, address: u32) -> String {
        let Some(shadow) = &self.ctas[rank].shadow else { return String::new() };
        let cell = shadow.cell(address);
        format!("the read at line {}", self.run.kernel.code[cell.read_pc as usize].line)
    }

    /// Checks an access to global memory. Returns the lanes that may go on.
    #[inline(always)]
    pub(crate) fn admit_global(
        &mut self,
        addresses: &Row<u64>,
        active: u32,
        size: u32,
        kind: Kind,
        pointers: &mut Pointers,
    ) -> u32 {
        let admitted = match self.run.find_lanes(addresses, active, &[size; LANES], size, kind.writes()) {
            Some((window, offsets)) => {
                for l in lanes(active) {
                    let bytes = window.at(offsets[l]);
                    self.visit_global(bytes, addresses[l], size, l, kind);
                    pointers[l] = bytes.data;
                }
                active
            }
            None => self.admit_global_lanes(addresses, active, size, kind, pointers),
        };
        if self.run.options.traffic {
            let sectors = count_sectors(addresses, active, size);
            self.count_global(active, size, sectors);
            lanes(admitted).for_each(|l| self.touch(addresses[l], size.into(), kind));
        }
        admitted
    }

    /// [`admit_global`](Self::admit_global) lane by lane, with a report for those that may not go on.
    #[cold]
    #[inline(never)]
    fn admit_global_lanes(
        &mut self,
        addresses: &Row<u64>,
        active: u32,
        size: u32,
        kind: Kind,
        pointers: &mut Pointers,
    ) -> u32 {
        let mut admitted = 0;
        for l in lanes(active) {
            let bytes = self.global_bytes(addresses[l], size.into(), size.into(), kind.writes(), l);
            let Some(bytes) = bytes else { continue };
            self.visit_global(bytes, addresses[l], size, l, kind);
            pointers[l] = bytes.data;
            admitted |= 1 << l;
        }
        admitted
    }

    /// Looks at the marks and owners of admitted bytes, and writes them.
    #[inline(always)]
    fn visit_global(&self, bytes: Bytes, address: u64, size: u32, lane: usize, kind: Kind) {
        // SAFETY: `size` bytes were admitted, each with its mark.
        unsafe {
            if self.run.uninitialised && kind.reads() && !all_written(bytes.written, size) {
                let why = "read of bytes that nothing wrote";
                self.report(FindingKind::Uninitialised, lane, self.run.place(address), why);
            }
            if kind.writes() {
                mark_written(bytes.written, size);
            }
        }
        self.check_conflict(bytes, size, kind, lane, address);
    }

    /// The bytes of one global access, or a report.
    #[inline(always)]
    pub(crate) fn global_bytes(
        &self,
        address: u64,
        size: u64,
        align: u64,
        write: bool,
        lane: usize,
    ) -> Option<Bytes> {
        let found = self.run.find(address, size, align, write);
        if found.is_none() {
            let (kind, why) = self.run.refusal(address, size, align, write);
            self.report(kind, lane, self.run.place(address), why);
        }
        found
    }

    /// Looks for a write of another cluster to the same bytes that this one does not know of.
    #[inline(always)]
    pub(crate) fn check_conflict(&self, bytes: Bytes, size: u32, kind: Kind, lane: usize, address: u64) {
        self.check_order(bytes, size, kind, lane, address, self.ctas[0].standing.epoch);
    }

    /// [`check_conflict`](Self::check_conflict) of what is written in this epoch.
    #[inline(always)]
    pub(crate) fn check_order(
        &self,
        bytes: Bytes,
        size: u32,
        kind: Kind,
        lane: usize,
        address: u64,
        epoch: u32,
    ) {
        if !bytes.is_owned() {
            return;
        }
        let cluster = self.ctas[self.rank].cluster;
        let met = bytes.meets_other(size, cluster, kind.together());
        let unknown = met && bytes.meets_unknown(size, cluster, kind.together(), &self.ctas[0].standing.seen);
        if kind.writes() {
            bytes.claim(size, cluster, kind.together(), epoch);
        }
        if unknown {
            let verb = if !kind.writes() { "read" } else { "write" };
            let why = format!("{verb} of bytes that another block wrote in this launch");
            self.report(FindingKind::Conflict, lane, self.run.place(address), why);
        }
    }

    #[inline(always)]
    pub(crate) fn count_global(&mut self, active: u32, size: u32, sectors: u32) {
        let site = &mut self.tally.sites[self.pc as usize];
        site.bytes += u64::from(active.count_ones() * size);
        site.sectors += u64::from(sectors);
    }

    /// Counts bytes of global memory among those that were touched.
    #[inline(always)]
    pub(crate) fn touch(&mut self, address: u64, bytes: u64, kind: Kind) {
        if kind.reads() {
            self.tally.read.mark(address, bytes);
        }
        if kind.writes() {
            self.tally.written.mark(address, bytes);
        }
    }

    /// The lanes whose access to shared memory leaves the own block or its bounds, or is misaligned.
    #[inline(always)]
    pub(crate) fn refused_shared(&self, addresses: &Row<u32>, size: u32) -> u32 {
        let Some(last) = (self.run.shared_end - SHARED_BASE).checked_sub(size) else { return FULL };
        let mut refused = 0;
        for l in 0..LANES {
            let outside = addresses[l].wrapping_sub(SHARED_BASE) > last;
            refused |= u32::from(outside | (addresses[l] & (size.min(16) - 1) != 0)) << l;
        }
        refused
    }

    /// Where each lane's bytes of the own shared memory lie.
    #[inline(always)]
    pub(crate) fn shared_pointers(&mut self, addresses: &Row<u32>, pointers: &mut Pointers) {
        let base = self.cta().shared(0);
        for l in 0..LANES {
            pointers[l] = base.wrapping_add(addresses[l] as usize);
        }
    }

    /// Checks an access to shared memory. Returns the lanes that may go on.
    #[inline(always)]
    pub(crate) fn admit_shared(
        &mut self,
        addresses: &Row<u32>,
        active: u32,
        size: u32,
        kind: Kind,
        pointers: &mut Pointers,
    ) -> u32 {
        let admitted = if self.refused_shared(addresses, size) & active == 0 {
            if self.run.shadowed {
                self.shadow_accesses(addresses, active, size, kind);
            }
            self.shared_pointers(addresses, pointers);
            active
        } else {
            self.admit_shared_lanes(addresses, active, size, kind, pointers)
        };
        if self.run.options.traffic {
            let (wavefronts, ideal) = count_wavefronts(addresses, active, size);
            self.count_shared(active.count_ones() * size, wavefronts, ideal);
        }
        admitted
    }

    /// [`admit_shared`](Self::admit_shared) lane by lane: into other blocks, and with reports.
    #[cold]
    #[inline(never)]
    fn admit_shared_lanes(
        &mut self,
        addresses: &Row<u32>,
        active: u32,
        size: u32,
        kind: Kind,
        pointers: &mut Pointers,
    ) -> u32 {
        let mut admitted = 0;
        for l in lanes(active) {
            let (rank, address) = self.shared_target(addresses[l]);
            if !self.shared_in_bounds(rank, address, size, l, kind.writes()) {
                continue;
            }
            if self.run.shadowed {
                self.shadow_access(rank, address, size, l, kind);
            }
            self.visit(rank, l);
            pointers[l] = self.ctas[rank].shared(address);
            admitted |= 1 << l;
        }
        admitted
    }

    /// Remembers that a lane touches shared memory, where it is that of another block.
    pub(crate) fn visit(&mut self, rank: usize, lane: usize) {
        if rank != self.rank && self.run.shadowed {
            let thread = self.warp.index as u32 * 32 + lane as u32;
            let visit = Visit { serial: self.warp.serial, cta: self.ctas[self.rank].id, thread, pc: self.pc };
            self.ctas[rank].visits.insert(self.warp.column, visit);
        }
    }

    #[inline(always)]
    pub(crate) fn count_shared(&mut self, bytes: u32, wavefronts: u32, ideal: u32) {
        let site = &mut self.tally.sites[self.pc as usize];
        site.bytes += u64::from(bytes);
        site.wavefronts += u64::from(wavefronts);
        site.ideal += u64::from(ideal);
    }

    /// Checks an access to local memory, lane by lane.
    pub(crate) fn admit_local(
        &mut self,
        addresses: &Row<u64>,
        active: u32,
        size: u32,
        kind: Kind,
        pointers: &mut Pointers,
    ) -> u32 {
        let bytes = u64::from(self.run.kernel.local_bytes);
        let mut admitted = 0;
        for l in lanes(active) {
            let a = addresses[l];
            if a >= bytes || u64::from(size) > bytes - a || !a.is_multiple_of(size.into()) {
                let kind = if a < bytes && u64::from(size) <= bytes - a {
                    FindingKind::Misaligned
                } else {
                    FindingKind::OutOfBounds
                };
                let why = format!("access of {size} bytes, the thread has {bytes}");
                self.report(kind, l, Place::Local(a), why);
                continue;
            }
            let first = l * bytes as usize + a as usize;
            let marks = &mut self.warp.local_written[first..first + size as usize];
            if !kind.writes() {
                if !marks.iter().all(|w| *w) {
                    let why = "read of bytes that nothing wrote";
                    self.report(FindingKind::Uninitialised, l, Place::Local(a), why);
                }
            } else {
                marks.fill(true);
            }
            pointers[l] = &mut self.warp.local[first];
            admitted |= 1 << l;
        }
        admitted
    }
}

/// A shared address as a byte of the block's allocation.
pub(crate) fn shared_place(address: u32) -> Place {
    Place::Shared(i64::from(address & ((1 << RANK_SHIFT) - 1)) - i64::from(SHARED_BASE))
}

/// Whether `size` marks are all set.
///
/// # Safety
///
/// There must be that many marks.
#[inline(always)]
pub(crate) unsafe fn all_written(marks: *const u8, size: u32) -> bool {
    // SAFETY: by the caller's promise.
    unsafe {
        match size {
            1 => *marks == 1,
            2 => marks.cast::<u16>().read_unaligned() == 0x0101,
            4 => marks.cast::<u32>().read_unaligned() == 0x0101_0101,
            8 => marks.cast::<u64>().read_unaligned() == 0x0101_0101_0101_0101,
            16 => marks.cast::<u128>().read_unaligned() == u128::from_le_bytes([1; 16]),
            _ => std::slice::from_raw_parts(marks, size as usize).iter().all(|w| *w == 1),
        }
    }
}

/// Sets `size` marks.
///
/// # Safety
///
/// There must be that many marks.
#[inline(always)]
pub(crate) unsafe fn mark_written(marks: *mut u8, size: u32) {
    // SAFETY: by the caller's promise.
    unsafe {
        match size {
            1 => *marks = 1,
            2 => marks.cast::<[u8; 2]>().write([1; 2]),
            4 => marks.cast::<[u8; 4]>().write([1; 4]),
            8 => marks.cast::<[u8; 8]>().write([1; 8]),
            16 => marks.cast::<[u8; 16]>().write([1; 16]),
            _ => std::ptr::write_bytes(marks, 1, size as usize),
        }
    }
}
