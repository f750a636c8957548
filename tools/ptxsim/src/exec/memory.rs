//! Loads and stores: checks of addresses, then the movement of bytes.

use super::lane::{FULL, LANES, Lane, Row, lanes};
use super::shadow::{Agent, Faults};
use super::warp::Warp;
use super::{Flow, Inst, Instruction, Machine};
use crate::finding::{FindingKind, Place};
use crate::run::{LOCAL_SLOT, SHARED_BASE, SHARED_SLOT};
use std::marker::PhantomData;

/// What an access does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    /// Reads and writes in one step.
    Atomic,
}

/// Where the bytes of each lane lie; only lanes of the mask that came with it have a pointer.
pub(crate) type Pointers = [*mut u8; LANES];

const NO_POINTERS: Pointers = [std::ptr::null_mut(); LANES];

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
        if inside && address & (size.min(16) - 1) == 0 && rank < self.ctas.len() {
            return true;
        }
        let verb = if write { "write" } else { "read" };
        let (kind, why) = if inside && rank < self.ctas.len() {
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
            Kind::Read => shadow.read(&who, address, size),
            _ => shadow.write(&who, address, size),
        };
        if faults.any() {
            self.report_shared(faults, rank, address, lane, kind);
        }
    }

    /// Reports what the shadow found.
    #[cold]
    #[inline(never)]
    pub(crate) fn report_shared(&self, faults: Faults, rank: usize, address: u32, lane: usize, kind: Kind) {
        let place = || shared_place(address);
        let verb = if kind == Kind::Read { "read" } else { "write" };
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

    /// Checks an access to global memory, lane by lane. Returns the lanes that may go on.
    pub(crate) fn admit_global(
        &mut self,
        addresses: &Row<u64>,
        active: u32,
        size: u32,
        kind: Kind,
        pointers: &mut Pointers,
    ) -> u32 {
        let mut admitted = 0;
        let write = kind != Kind::Read;
        for l in lanes(active) {
            let Some(bytes) = self.global_bytes(addresses[l], size.into(), size.into(), write, l) else {
                continue;
            };
            if self.run.uninitialised {
                // SAFETY: `global_bytes` admitted `size` bytes, each with its mark.
                unsafe {
                    if kind != Kind::Write && !all_written(bytes.written, size) {
                        let why = "read of bytes that nothing wrote";
                        self.report(FindingKind::Uninitialised, l, self.run.place(addresses[l]), why);
                    }
                }
            }
            if write {
                // SAFETY: as above.
                unsafe { std::ptr::write_bytes(bytes.written, 1, size as usize) };
            }
            self.check_conflict(bytes, size, kind, l, addresses[l]);
            pointers[l] = bytes.data;
            admitted |= 1 << l;
        }
        if self.run.options.traffic {
            let sectors = count_sectors(addresses, active, size);
            self.count_global(active, size, sectors);
        }
        admitted
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
    ) -> Option<crate::run::Bytes> {
        let found = self.run.find(address, size, align, write);
        if found.is_none() {
            let (kind, why) = self.run.refusal(address, size, align, write);
            self.report(kind, lane, self.run.place(address), why);
        }
        found
    }

    /// Looks for a write of another cluster to the same bytes, unless this block may have waited for it.
    #[inline(always)]
    pub(crate) fn check_conflict(
        &self,
        bytes: crate::run::Bytes,
        size: u32,
        kind: Kind,
        lane: usize,
        address: u64,
    ) {
        let cta = &self.ctas[self.rank];
        let met = bytes.meets_other(size, cta.cluster, kind != Kind::Read, kind == Kind::Atomic);
        if met && !cta.acquired {
            let verb = if kind == Kind::Read { "read" } else { "write" };
            let why = format!("{verb} of bytes that another block wrote in this launch");
            self.report(FindingKind::Conflict, lane, self.run.place(address), why);
        }
    }

    #[inline(always)]
    fn count_global(&mut self, active: u32, size: u32, sectors: u32) {
        let site = &mut self.tally.sites[self.pc as usize];
        site.bytes += u64::from(active.count_ones() * size);
        site.sectors += u64::from(sectors);
    }

    /// Checks an access to shared memory, lane by lane. Returns the lanes that may go on.
    pub(crate) fn admit_shared(
        &mut self,
        addresses: &Row<u32>,
        active: u32,
        size: u32,
        kind: Kind,
        pointers: &mut Pointers,
    ) -> u32 {
        let mut admitted = 0;
        let write = kind != Kind::Read;
        for l in lanes(active) {
            let (rank, address) = self.shared_target(addresses[l]);
            if !self.shared_in_bounds(rank, address, size, l, write) {
                continue;
            }
            if self.run.shadowed {
                self.shadow_access(rank, address, size, l, kind);
            }
            pointers[l] = self.ctas[rank].shared(address);
            admitted |= 1 << l;
        }
        if self.run.options.traffic {
            let (wavefronts, ideal) = count_wavefronts(addresses, active, size);
            self.count_shared(active.count_ones() * size, wavefronts, ideal);
        }
        admitted
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
            if kind == Kind::Read {
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

/// Sectors of 32 bytes that a request touches, each pass of the warp (128 bytes at most) on its own.
pub(crate) fn count_sectors(addresses: &Row<u64>, active: u32, size: u32) -> u32 {
    let per_pass = (128 / size).min(32) as usize;
    let mut total = 0;
    for first in (0..LANES).step_by(per_pass) {
        let mut seen = [u64::MAX; LANES];
        let mut n = 0;
        for l in first..first + per_pass {
            let sector = addresses[l] / 32;
            if active >> l & 1 != 0 && !seen[..n].iter().rev().any(|s| *s == sector) {
                seen[n] = sector;
                n += 1;
            }
        }
        total += n as u32;
    }
    total
}

/// Passes over the 32 banks that an access takes, and the fewest that so many bytes could take.
///
/// Accesses of 8 bytes go by half warps, of 16 bytes by quarters. Lanes that want the same word share it.
pub(crate) fn count_wavefronts(addresses: &Row<u32>, active: u32, size: u32) -> (u32, u32) {
    let per_pass = (128 / size).min(32) as usize;
    let (mut wavefronts, mut ideal) = (0, 0);
    for first in (0..LANES).step_by(per_pass) {
        if active >> first & (((1u64 << per_pass) - 1) as u32) == 0 {
            continue;
        }
        let mut words = [[0u32; LANES]; 32];
        let mut depth = [0usize; 32];
        for l in first..first + per_pass {
            if active >> l & 1 == 0 {
                continue;
            }
            for word in addresses[l] / 4..=(addresses[l].wrapping_add(size - 1)) / 4 {
                let bank = word as usize % 32;
                if !words[bank][..depth[bank]].contains(&word) && depth[bank] < LANES {
                    words[bank][depth[bank]] = word;
                    depth[bank] += 1;
                }
            }
        }
        wavefronts += depth.iter().copied().max().unwrap_or(0) as u32;
        ideal += 1;
    }
    (wavefronts, ideal)
}

/// Copies the elements of the admitted lanes into registers.
#[inline(always)]
fn move_in(x: &mut Machine<'_>, i: &Inst, admitted: u32, pointers: &Pointers) {
    let signed = i.mode & 1 != 0;
    for n in 0..usize::from(i.count) {
        let row = x.listed(i, n);
        let registers = &mut x.warp.registers;
        // SAFETY: `pointers` are admitted for `count` elements of `size` bytes.
        unsafe {
            if i.size == 8 {
                let words = registers.words_mut::<u64>(row);
                for l in lanes(admitted) {
                    words[l] = pointers[l].cast::<u64>().add(n).read_unaligned();
                }
            } else {
                let words = registers.words_mut::<u32>(row);
                for l in lanes(admitted) {
                    words[l] = load_word(pointers[l], n, i.size, signed);
                }
            }
        }
    }
}

/// Element `n` behind a pointer, extended to 32 bits.
///
/// # Safety
///
/// The pointer must be good for it.
#[inline(always)]
unsafe fn load_word(p: *const u8, n: usize, size: u8, signed: bool) -> u32 {
    // SAFETY: by the caller's promise.
    unsafe {
        match (size, signed) {
            (4, _) => p.cast::<u32>().add(n).read_unaligned(),
            (2, false) => p.cast::<u16>().add(n).read_unaligned().into(),
            (2, true) => i32::from(p.cast::<i16>().add(n).read_unaligned()) as u32,
            (_, false) => (*p.add(n)).into(),
            (_, true) => i32::from(*p.cast::<i8>().add(n)) as u32,
        }
    }
}

/// Copies registers to the elements of the admitted lanes.
#[inline(always)]
fn move_out(x: &mut Machine<'_>, i: &Inst, admitted: u32, pointers: &Pointers) {
    for n in 0..usize::from(i.count) {
        let row = x.listed(i, n);
        let registers = &x.warp.registers;
        // SAFETY: `pointers` are admitted for `count` elements of `size` bytes.
        unsafe {
            if i.size == 8 {
                let words = registers.words::<u64>(row);
                for l in lanes(admitted) {
                    pointers[l].cast::<u64>().add(n).write_unaligned(words[l]);
                }
            } else {
                let words = registers.words::<u32>(row);
                for l in lanes(admitted) {
                    match i.size {
                        4 => pointers[l].cast::<u32>().add(n).write_unaligned(words[l]),
                        2 => pointers[l].cast::<u16>().add(n).write_unaligned(words[l] as u16),
                        _ => *pointers[l].add(n) = words[l] as u8,
                    }
                }
            }
        }
    }
}

/// A state space: how an address register is read and an access is checked.
pub(crate) trait Space {
    fn admit(x: &mut Machine<'_>, i: &Inst, kind: Kind, pointers: &mut Pointers) -> u32;
}

/// `row + imm` in each lane.
#[inline(always)]
pub(crate) fn wide_addresses(x: &Machine<'_>, i: &Inst) -> Row<u64> {
    let mut a = x.warp.registers.get::<u64>(i.a);
    a.iter_mut().for_each(|a| *a = a.wrapping_add(i.imm as u64));
    a
}

/// `row + imm` in each lane, for shared memory.
#[inline(always)]
pub(crate) fn narrow_addresses(x: &Machine<'_>, i: &Inst) -> Row<u32> {
    let mut a = x.warp.registers.get::<u32>(i.a);
    a.iter_mut().for_each(|a| *a = a.wrapping_add(i.imm as u32));
    a
}

pub(crate) struct Global;
pub(crate) struct Shared;
pub(crate) struct Local;
pub(crate) struct Generic;

impl Space for Global {
    #[inline(always)]
    fn admit(x: &mut Machine<'_>, i: &Inst, kind: Kind, pointers: &mut Pointers) -> u32 {
        let addresses = wide_addresses(x, i);
        x.admit_global(&addresses, x.active, u32::from(i.size) * u32::from(i.count), kind, pointers)
    }
}

impl Space for Shared {
    #[inline(always)]
    fn admit(x: &mut Machine<'_>, i: &Inst, kind: Kind, pointers: &mut Pointers) -> u32 {
        let addresses = narrow_addresses(x, i);
        x.admit_shared(&addresses, x.active, u32::from(i.size) * u32::from(i.count), kind, pointers)
    }
}

impl Space for Local {
    #[inline(always)]
    fn admit(x: &mut Machine<'_>, i: &Inst, kind: Kind, pointers: &mut Pointers) -> u32 {
        let mut addresses = wide_addresses(x, i);
        addresses.iter_mut().for_each(|a| *a &= 0xffff_ffff);
        x.admit_local(&addresses, x.active, u32::from(i.size) * u32::from(i.count), kind, pointers)
    }
}

impl Space for Generic {
    fn admit(x: &mut Machine<'_>, i: &Inst, kind: Kind, pointers: &mut Pointers) -> u32 {
        let addresses = wide_addresses(x, i);
        let size = u32::from(i.size) * u32::from(i.count);
        let (mut shared, mut local) = (0u32, 0u32);
        let (mut narrow, mut within) = ([0; LANES], [0; LANES]);
        for l in lanes(x.active) {
            narrow[l] = addresses[l] as u32;
            within[l] = addresses[l] & 0xffff_ffff;
            shared |= u32::from(addresses[l] >> 32 == SHARED_SLOT) << l;
            local |= u32::from(addresses[l] >> 32 == LOCAL_SLOT) << l;
        }
        let global = x.active & !shared & !local;
        let mut admitted = 0;
        if shared != 0 {
            admitted |= x.admit_shared(&narrow, shared, size, kind, pointers);
        }
        if local != 0 {
            admitted |= x.admit_local(&within, local, size, kind, pointers);
        }
        if global != 0 {
            admitted |= x.admit_global(&addresses, global, size, kind, pointers);
        }
        admitted
    }
}

/// Bit of `mode`: a load that may see what another block released.
pub(crate) const ACQUIRE: u8 = 2;

/// `ld`: rows in the list, address `a + imm`; bit 0 of `mode` extends the sign, [`ACQUIRE`] is the other.
pub(crate) struct Load<S>(PhantomData<S>);

impl<S: Space> Instruction for Load<S> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let mut pointers = NO_POINTERS;
        let admitted = S::admit(x, i, Kind::Read, &mut pointers);
        if i.mode & ACQUIRE != 0 {
            x.cta().acquired = true;
        }
        move_in(x, i, admitted, &pointers);
        Flow::Next
    }
}

/// `st`: rows in the list, address `a + imm`.
pub(crate) struct Store<S>(PhantomData<S>);

impl<S: Space> Instruction for Store<S> {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let mut pointers = NO_POINTERS;
        let admitted = S::admit(x, i, Kind::Write, &mut pointers);
        move_out(x, i, admitted, &pointers);
        *x.progress += 1;
        Flow::Next
    }
}

/// A global access whose lanes follow one another without a gap, checked as one.
#[inline(always)]
fn contiguous(x: &mut Machine<'_>, i: &Inst, kind: Kind) -> Option<*mut u8> {
    if x.active != FULL {
        return None;
    }
    let size = u64::from(i.size) * u64::from(i.count);
    let words = x.warp.registers.words::<u64>(i.a);
    let first = words[0];
    let mut straight = true;
    for l in 0..LANES {
        straight &= words[l] == first.wrapping_add(l as u64 * size);
    }
    let address = first.wrapping_add(i.imm as u64);
    if !straight {
        return None;
    }
    let bytes = x.run.find(address, 32 * size, size, kind == Kind::Write)?;
    // SAFETY: `find` admitted these bytes, each with its mark.
    unsafe {
        if kind == Kind::Write {
            std::ptr::write_bytes(bytes.written, 1, 32 * size as usize);
        } else if x.run.uninitialised {
            let marks = std::slice::from_raw_parts(bytes.written, 32 * size as usize);
            if marks.iter().fold(1, |all, w| all & w) != 1 {
                return None;
            }
        }
    }
    x.check_conflict(bytes, 32 * size as u32, kind, 0, address);
    let sectors = (address % 32 + 32 * size).div_ceil(32) as u32;
    x.count_global(FULL, size as u32, sectors);
    Some(bytes.data)
}

/// `ld.global`, with a short way for contiguous lanes.
pub(crate) struct LoadGlobal;

impl Instruction for LoadGlobal {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if i.mode & ACQUIRE == 0
            && let Some(data) = contiguous(x, i, Kind::Read)
        {
            let size = usize::from(i.size) * usize::from(i.count);
            if i.size == 4 && i.count == 1 {
                let row = x.listed(i, 0);
                // SAFETY: 32 words were admitted.
                *x.warp.registers.words_mut::<u32>(row) = unsafe { data.cast::<Row<u32>>().read_unaligned() };
                return Flow::Next;
            }
            let mut pointers = NO_POINTERS;
            for (l, p) in pointers.iter_mut().enumerate() {
                *p = data.wrapping_add(l * size);
            }
            move_in(x, i, FULL, &pointers);
            return Flow::Next;
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { Load::<Global>::execute(x, i) }
    }
}

/// `st.global`, with a short way for contiguous lanes.
pub(crate) struct StoreGlobal;

impl Instruction for StoreGlobal {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        if let Some(data) = contiguous(x, i, Kind::Write) {
            let size = usize::from(i.size) * usize::from(i.count);
            let mut pointers = NO_POINTERS;
            for (l, p) in pointers.iter_mut().enumerate() {
                *p = data.wrapping_add(l * size);
            }
            move_out(x, i, FULL, &pointers);
            *x.progress += 1;
            return Flow::Next;
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { Store::<Global>::execute(x, i) }
    }
}

/// `ld.param`: byte `imm` of the parameter block plus row `a`, the same in all lanes.
pub(crate) struct LoadParam;

impl Instruction for LoadParam {
    #[inline(always)]
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let size = usize::from(i.size);
        let base = super::warp::uniform::<u64>(x, i.a).wrapping_add(i.imm as u64);
        for n in 0..usize::from(i.count) {
            let first = (base as usize).wrapping_add(n * size);
            let Some(bytes) = x.run.params.get(first..first.saturating_add(size)) else {
                x.report(FindingKind::OutOfBounds, 0, Place::None, "read beyond the parameters");
                return Flow::Next;
            };
            let row = x.listed(i, n);
            let mut value = [0; 8];
            value[..size].copy_from_slice(bytes);
            if size == 8 {
                x.warp.registers.put(row, [u64::from_le_bytes(value); LANES], x.active);
            } else {
                // SAFETY: the array has eight bytes.
                let word = unsafe { load_word(value.as_ptr(), 0, i.size, i.mode & 1 != 0) };
                x.warp.registers.put(row, [word; LANES], x.active);
            }
        }
        Flow::Next
    }
}

/// One lane's value of a listed row as 64 bits, for operations on either width.
#[inline(always)]
pub(crate) fn wide_lane(x: &Machine<'_>, row: u32, lane: usize, size: u8) -> u64 {
    if size == 8 {
        x.warp.registers.lane::<u64>(row, lane)
    } else {
        x.warp.registers.lane::<u32>(row, lane).into()
    }
}

/// Writes one lane of a row of either width.
#[inline(always)]
pub(crate) fn put_wide_lane(x: &mut Machine<'_>, row: u32, lane: usize, size: u8, value: u64) {
    if size == 8 {
        x.warp.registers.words_mut::<u64>(row)[lane] = value.pack();
    } else {
        x.warp.registers.words_mut::<u32>(row)[lane] = (value as u32).pack();
    }
}
