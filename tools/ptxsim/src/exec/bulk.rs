//! Bulk copies of the asynchronous proxy: TMA tiles and plain ranges, loads, stores and reductions.
//!
//! A load is performed when someone looks at its mbarrier, a store when its group is waited for: as late as the
//! kernel allows.

use super::access::{Kind, all_written, shared_place};
use super::lane::lanes;
use super::order::UNDER_WAY;
use super::shadow::Agent;
use super::team::Cta;
use super::warp::{Knowledge, Warp};
use super::{Flow, Inst, Instruction, Machine};
use crate::finding::{FindingKind, Place};
use crate::launch::Format;
use crate::math::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::run::{Map, PARAM_SLOT, Run};

/// Bytes that move together: up to 16, at one shared address.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    shared: u32,
    global: u64,
    /// Bytes within the tensor; a load fills the rest with zeros, a store leaves it out.
    valid: u32,
}

const PIECE: u32 = 16;

/// A load under way into a block.
pub(crate) struct Transfer {
    mbarrier: u32,
    pieces: Vec<Piece>,
    knows: Knowledge,
    pub(crate) pc: u32,
    pub(crate) thread: u32,
}

impl Transfer {
    /// The first shared address.
    pub(crate) fn first(&self) -> u32 {
        self.pieces.first().map_or(0, |p| p.shared)
    }
}

/// How a bulk store combines with what is there.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Reduction {
    None,
    Add,
    Min,
    Max,
}

/// A store under way from a block.
pub(crate) struct BulkStore {
    lane: u8,
    pieces: Vec<Piece>,
    reduction: Reduction,
    element: u32,
    format: Format,
    serial: u32,
    /// The group of its lane that `commit_group` closed over it.
    group: Option<u64>,
    /// What `wait_group.read` found in shared memory, if that has happened.
    read: Option<Vec<u8>>,
    pc: u32,
}

/// Performs the loads that the mbarrier at `address` waits for.
pub(crate) fn deliver_loads(x: &mut Machine<'_>, address: u32) {
    let (rank, local) = x.shared_target(address);
    if rank >= x.ctas.len() {
        return;
    }
    let mut at = 0;
    while let Some(found) = x.ctas[rank].loads[at..].iter().position(|t| t.mbarrier == local) {
        at += found;
        // A shuffled schedule leaves some for the next look.
        let delay = x.run.seed().is_some_and(|seed| {
            (seed ^ u64::from(x.warp.serial)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63 == 1
        });
        if delay {
            return;
        }
        let load = x.ctas[rank].loads.remove(at);
        perform_load(x.run, &mut x.ctas[rank], &load);
        *x.progress += 1;
    }
}

fn perform_load(run: &Run<'_>, cta: &mut Cta, load: &Transfer) {
    for p in &load.pieces {
        let to = cta.shared(p.shared);
        // SAFETY: both sides were admitted when the copy was issued, and windows do not move.
        unsafe {
            match run.find(p.global, p.valid.into(), 1, false) {
                Some(from) if p.valid == PIECE => super::copy::copy_16(from.data, to),
                from => {
                    std::ptr::write_bytes(to, 0, PIECE as usize);
                    if let Some(from) = from.filter(|_| p.valid > 0) {
                        std::ptr::copy_nonoverlapping(from.data, to, p.valid as usize);
                    }
                }
            }
        }
        if let Some(shadow) = &mut cta.shadow {
            shadow.set_pending(p.shared, PIECE, false);
        }
    }
    super::mbarrier::deliver(cta, load.mbarrier, load.pieces.len() as u32 * PIECE, &load.knows);
}

impl Machine<'_> {
    /// The tensor map that a generic address of a parameter names.
    fn map(&self, address: u64, lane: usize) -> Option<&Map> {
        let here = |m: &&Map| u64::from(m.parameter) == address & 0xffff_ffff;
        let found =
            self.run.maps.iter().find(here).filter(|_| address >> 32 == PARAM_SLOT || address >> 32 == 0);
        if found.is_none() {
            let why = "the address is no parameter that the launch filled with a tensor map";
            self.report(FindingKind::Operand, lane, Place::None, why);
        }
        found
    }

    /// The pieces of a tile.
    fn tile(&self, map: &Map, shared: u32, start: &[i64], lane: usize) -> Option<Vec<Piece>> {
        let period = (map.swizzle.span() * 8).max(128);
        if start.len() != map.tile.len() {
            let why = format!("{} coordinates for a tensor of {} dimensions", start.len(), map.tile.len());
            self.report(FindingKind::Operand, lane, Place::None, why);
            return None;
        }
        if !shared.is_multiple_of(period) {
            let why = format!("a tile with this swizzle starts at a multiple of {period} bytes");
            self.report(FindingKind::Misaligned, lane, shared_place(shared), why);
            return None;
        }
        let row_bytes = map.tile[0] * map.element;
        let rows: u32 = map.tile[1..].iter().product();
        let mut pieces = Vec::with_capacity((rows * row_bytes / PIECE) as usize);
        for row in 0..rows {
            let (mut rest, mut offset, mut inside) = (row, 0u64, true);
            for d in 1..map.tile.len() {
                let at = start[d] + i64::from(rest % map.tile[d]);
                rest /= map.tile[d];
                inside &= at >= 0 && (at as u64) < map.extents[d];
                offset = offset.wrapping_add((at as u64).wrapping_mul(map.strides[d - 1]));
            }
            for unit in (0..row_bytes).step_by(PIECE as usize) {
                let first = start[0] * i64::from(map.element) + i64::from(unit);
                let end = (map.extents[0] * u64::from(map.element)) as i64;
                // Elements before the tensor would leave a gap at the front of a piece; hardware asks for starts
                // at multiples of 16 bytes as far as this matters.
                let valid =
                    if inside && first >= 0 { (end - first).clamp(0, PIECE.into()) as u32 } else { 0 };
                pieces.push(Piece {
                    shared: map.swizzle.apply(shared + row * row_bytes + unit),
                    global: map.origin.wrapping_add(offset).wrapping_add(first as u64),
                    valid,
                });
            }
        }
        if start[0] < 0 && start[0] * i64::from(map.element) % i64::from(PIECE) != 0 {
            let why = "a start before the tensor at no multiple of 16 bytes is not simulated";
            self.report(FindingKind::Operand, lane, Place::None, why);
        }
        Some(pieces)
    }

    /// The pieces of a plain range.
    fn range(&self, shared: u32, global: u64, bytes: u32, lane: usize) -> Option<Vec<Piece>> {
        if !bytes.is_multiple_of(PIECE) || !shared.is_multiple_of(PIECE) || !global.is_multiple_of(16) {
            let why = "a bulk copy needs addresses and sizes that are multiples of 16";
            self.report(FindingKind::Misaligned, lane, shared_place(shared), why);
            return None;
        }
        let piece =
            |n: u32| Piece { shared: shared + n, global: global.wrapping_add(n.into()), valid: PIECE };
        Some((0..bytes).step_by(PIECE as usize).map(piece).collect())
    }

    /// Checks the global side of a copy; returns whether all of it may be touched.
    fn pieces_in_bounds(&mut self, pieces: &[Piece], write: bool, reads: bool, lane: usize) -> bool {
        let mut sectors = 0;
        for p in pieces.iter().filter(|p| p.valid > 0) {
            let Some(bytes) = self.global_bytes(p.global, p.valid.into(), 1, write, lane) else {
                return false;
            };
            // SAFETY: `valid` bytes were admitted, each with its mark.
            let written = || unsafe { all_written(bytes.written, p.valid) };
            if reads && self.run.uninitialised && !written() {
                let why = "bulk copy of bytes that nothing wrote";
                self.report(FindingKind::Uninitialised, lane, self.run.place(p.global), why);
            }
            let kind = match (write, reads) {
                (true, true) => Kind::Atomic,
                (true, false) => Kind::Write,
                (false, _) => Kind::Read,
            };
            self.check_order(bytes, p.valid, kind, lane, p.global, UNDER_WAY);
            if self.run.options.traffic {
                self.touch(p.global, p.valid.into(), kind);
            }
            sectors += (p.global % 32 + u64::from(p.valid)).div_ceil(32);
        }
        let site = &mut self.tally.sites[self.pc as usize];
        site.bytes += pieces.iter().map(|p| u64::from(p.valid)).sum::<u64>();
        // Two pieces of 16 bytes share a sector where they follow one another.
        site.sectors += sectors.div_ceil(2);
        true
    }

    /// Checks the shared side of a load into a block, and marks it as under way.
    fn begin_load(&mut self, rank: usize, pieces: &[Piece], lane: usize) -> bool {
        for p in pieces {
            if !self.shared_in_bounds(rank, p.shared, PIECE, lane, true) {
                return false;
            }
        }
        if !self.run.shadowed {
            return true;
        }
        let column = self.ctas[rank].columns.loads;
        self.ctas[rank].load_serial += 1;
        let serial = self.ctas[rank].load_serial;
        for p in pieces {
            let who = bulk_agent(self.warp, lane, (column, serial), self.pc);
            let Some(shadow) = &mut self.ctas[rank].shadow else { break };
            let faults = shadow.write(&who, p.shared, PIECE);
            shadow.set_pending(p.shared, PIECE, true);
            if faults.any() {
                self.report_shared(faults, rank, p.shared, lane, Kind::Write);
            }
        }
        true
    }

    /// Issues a load into the blocks of `targets`, each with its own mbarrier at the same address.
    fn load(&mut self, pieces: Vec<Piece>, mbarrier: u32, targets: impl Iterator<Item = usize>, lane: usize) {
        if !self.pieces_in_bounds(&pieces, false, true, lane) {
            return;
        }
        for rank in targets {
            if rank >= self.ctas.len() {
                let why = format!("multicast to block {rank} of a cluster of {}", self.ctas.len());
                self.report(FindingKind::Operand, lane, Place::None, why);
                continue;
            }
            let Some(barrier) = self.ctas[rank].mbarriers.get(&mbarrier) else {
                let why = "there is no mbarrier here: `mbarrier.init` has not been executed";
                self.report(FindingKind::Mbarrier, lane, shared_place(mbarrier), why);
                continue;
            };
            if !barrier.is_known_to(self.warp) {
                self.report(FindingKind::Mbarrier, lane, shared_place(mbarrier), super::mbarrier::UNKNOWN);
            }
            if self.run.shadowed && !super::mbarrier::is_fenced(&self.ctas[rank], mbarrier, self.warp) {
                let why = "the asynchronous proxy may not see this mbarrier yet: no `fence.mbarrier_init` or \
                           `fence.proxy.async` after its initialisation";
                self.report(FindingKind::Proxy, lane, shared_place(mbarrier), why);
            }
            if !self.begin_load(rank, &pieces, lane) {
                continue;
            }
            let mut knows = self.warp.knows.clone();
            if let Some(own) = knows.clock.get_mut(self.ctas[rank].columns.loads as usize) {
                *own = self.ctas[rank].load_serial;
            }
            let thread = self.warp.index as u32 * 32 + lane as u32;
            let load = Transfer { mbarrier, pieces: pieces.clone(), knows, pc: self.pc, thread };
            self.ctas[rank].loads.push(load);
        }
        *self.progress += 1;
    }

    /// Issues a store from this block.
    fn store(&mut self, pieces: Vec<Piece>, combine: (Reduction, u32, Format), lane: usize) {
        let (reduction, element, format) = combine;
        let rank = self.rank;
        if !pieces.iter().all(|p| self.shared_in_bounds(rank, p.shared, PIECE, lane, false))
            || !self.pieces_in_bounds(&pieces, true, reduction != Reduction::None, lane)
        {
            return;
        }
        self.ctas[rank].store_serial += 1;
        let serial = self.ctas[rank].store_serial;
        if self.run.shadowed {
            let column = self.ctas[rank].columns.stores;
            for p in pieces.iter().filter(|p| p.valid > 0) {
                let who = bulk_agent(self.warp, lane, (column, serial), self.pc);
                let Some(shadow) = &mut self.ctas[rank].shadow else { break };
                let faults = shadow.read(&who, p.shared, PIECE);
                if faults.any() {
                    self.report_shared(faults, rank, p.shared, lane, Kind::Read);
                }
            }
        }
        let (lane, pc) = (lane as u8, self.pc);
        let store =
            BulkStore { lane, pieces, reduction, element, format, serial, group: None, read: None, pc };
        self.warp.bulk_stores.push(store);
    }
}

fn bulk_agent(warp: &Warp, lane: usize, record: (u16, u32), pc: u32) -> Agent<'_> {
    let mut who = super::access::agent(warp, lane, false, pc);
    who.record = record;
    who.asynchronous = true;
    who
}

/// Performs the stores of the lanes of a warp but for the `keep` latest groups of each; or their reads alone.
fn perform_stores(
    run: &Run<'_>,
    cta: &mut Cta,
    warp: &mut Warp,
    (waiting, keep, reads): (u32, u64, bool),
    epoch: u32,
) {
    let groups = warp.bulk_groups;
    let done = |s: &BulkStore| {
        let lane = usize::from(s.lane);
        waiting >> lane & 1 != 0 && s.group.is_some_and(|g| g + keep < groups[lane])
    };
    for store in warp.bulk_stores.iter_mut().filter(|s| done(s)) {
        read_store(cta, store);
        if !reads {
            perform_store(run, store, (cta.cluster, epoch));
        }
        if let Some(known) = warp.knows.clock.get_mut(cta.columns.stores as usize) {
            *known = (*known).max(store.serial);
        }
    }
    if !reads {
        warp.bulk_stores.retain(|s| !done(s));
    }
}

/// Reads what a store writes, unless that has happened.
fn read_store(cta: &mut Cta, store: &mut BulkStore) {
    if store.read.is_some() {
        return;
    }
    let mut bytes = Vec::with_capacity(store.pieces.len() * PIECE as usize);
    for p in &store.pieces {
        // SAFETY: the piece was admitted when the store was issued.
        bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(cta.shared(p.shared), PIECE as usize) });
    }
    store.read = Some(bytes);
}

/// A warp ends: what it stored in bulk and did not wait for is a fault, and performed.
pub(crate) fn finish_stores(run: &Run<'_>, ctas: &mut [Cta], rank: usize, warp: &mut Warp) {
    for mut store in std::mem::take(&mut warp.bulk_stores) {
        if store.read.is_none() {
            let message = "the thread exits without `cp.async.bulk.wait_group` for this store, which may still \
                           read the block's shared memory";
            let thread = warp.index as u32 * 32 + u32::from(store.lane);
            run.report(FindingKind::InFlight, store.pc, ctas[rank].id, thread, Place::None, message.into());
        }
        read_store(&mut ctas[rank], &mut store);
        perform_store(run, &store, (ctas[rank].cluster, ctas[0].standing.epoch));
    }
}

/// Writes what a store has read.
fn perform_store(run: &Run<'_>, store: &BulkStore, (cluster, epoch): (u32, u32)) {
    let read = store.read.as_deref().unwrap_or_default();
    for (p, bytes) in store.pieces.iter().zip(read.chunks(PIECE as usize)).filter(|(p, _)| p.valid > 0) {
        let from = bytes.as_ptr();
        let Some(to) = run.find(p.global, p.valid.into(), 1, true) else { continue };
        // SAFETY: `valid` bytes were read, and admitted to be written when the store was issued; windows do not move.
        unsafe {
            if store.reduction == Reduction::None {
                std::ptr::copy_nonoverlapping(from, to.data, p.valid as usize);
            } else {
                for n in (0..p.valid).step_by(store.element as usize) {
                    let (from, to) = (from.add(n as usize), to.data.add(n as usize));
                    combine(from, to, store);
                }
            }
            std::ptr::write_bytes(to.written, 1, p.valid as usize);
        }
        to.date(p.valid, cluster, epoch);
    }
}

/// One element of a reducing store.
///
/// # Safety
///
/// Both pointers must be good for an element.
unsafe fn combine(from: *const u8, to: *mut u8, store: &BulkStore) {
    let float = |a: f64, b: f64| match store.reduction {
        Reduction::Min => a.min(b),
        Reduction::Max => a.max(b),
        _ => a + b,
    };
    let integer = |a: u64, b: u64| match store.reduction {
        Reduction::Min => a.min(b),
        Reduction::Max => a.max(b),
        _ => a.wrapping_add(b),
    };
    // SAFETY: by the caller's promise.
    unsafe {
        match (store.format, store.element) {
            (Format::Float, 4) => {
                let (a, b) = (from.cast::<f32>().read_unaligned(), to.cast::<f32>().read_unaligned());
                let sum =
                    if store.reduction == Reduction::Add { a + b } else { float(a.into(), b.into()) as f32 };
                to.cast::<f32>().write_unaligned(sum);
            }
            (Format::Float, 8) => {
                let (a, b) = (from.cast::<f64>().read_unaligned(), to.cast::<f64>().read_unaligned());
                to.cast::<f64>().write_unaligned(float(a, b));
            }
            (Format::Float, _) => {
                let (a, b) = (from.cast::<u16>().read_unaligned(), to.cast::<u16>().read_unaligned());
                let sum = float(f16_to_f32(a).into(), f16_to_f32(b).into()) as f32;
                to.cast::<u16>().write_unaligned(f32_to_f16(sum));
            }
            (Format::Bf16, _) => {
                let (a, b) = (from.cast::<u16>().read_unaligned(), to.cast::<u16>().read_unaligned());
                let sum = float(bf16_to_f32(a).into(), bf16_to_f32(b).into()) as f32;
                to.cast::<u16>().write_unaligned(f32_to_bf16(sum));
            }
            (Format::Integer, size) => {
                let (mut a, mut b) = ([0; 8], [0; 8]);
                std::ptr::copy_nonoverlapping(from, a.as_mut_ptr(), size as usize);
                std::ptr::copy_nonoverlapping(to, b.as_mut_ptr(), size as usize);
                let sum = integer(u64::from_le_bytes(a), u64::from_le_bytes(b)).to_le_bytes();
                std::ptr::copy_nonoverlapping(sum.as_ptr(), to, size as usize);
            }
        }
    }
}

/// The coordinates in the list, from `first`.
fn coordinates(x: &Machine<'_>, i: &Inst, lane: usize) -> Vec<i64> {
    (0..usize::from(i.count)).map(|n| i64::from(x.warp.registers.lane::<i32>(x.listed(i, n), lane))).collect()
}

/// `cp.async.bulk.tensor` from global to shared memory: shared address in row `d`, map in wide row `a`, mbarrier in
/// row `b`, `count` coordinates in the list; `mode` 1 multicasts to the blocks of the mask in row `c`.
pub(crate) struct LoadTile;

impl Instruction for LoadTile {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        for l in lanes(x.active) {
            let start = coordinates(x, i, l);
            let map = x.warp.registers.lane::<u64>(i.a, l);
            let (target, shared) = x.shared_target(x.warp.registers.lane::<u32>(i.d, l));
            let (_, mbarrier) = x.shared_target(x.warp.registers.lane::<u32>(i.b, l));
            let Some(pieces) = x.map(map, l).and_then(|m| x.tile(m, shared, &start, l)) else { continue };
            if i.mode == 1 {
                let mask = x.warp.registers.lane::<u16>(i.c, l);
                x.load(pieces, mbarrier, lanes(mask.into()), l);
            } else {
                x.load(pieces, mbarrier, std::iter::once(target), l);
            }
        }
        Flow::Next
    }
}

/// `cp.async.bulk.tensor` and `cp.reduce.async.bulk.tensor` from shared to global memory: shared address in row
/// `d`, map in wide row `a`, coordinates in the list; `mode` is the [`Reduction`].
pub(crate) struct StoreTile;

impl Instruction for StoreTile {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        for l in lanes(x.active) {
            let start = coordinates(x, i, l);
            let address = x.warp.registers.lane::<u64>(i.a, l);
            let shared = x.warp.registers.lane::<u32>(i.d, l);
            let Some(map) = x.map(address, l) else { continue };
            let combine = (reduction(i.mode), map.element, map.format);
            let Some(pieces) = x.tile(map, shared, &start, l) else { continue };
            x.store(pieces, combine, l);
        }
        Flow::Next
    }
}

fn reduction(mode: u8) -> Reduction {
    match mode {
        1 => Reduction::Add,
        2 => Reduction::Min,
        3 => Reduction::Max,
        _ => Reduction::None,
    }
}

/// `cp.async.bulk` from global to shared memory: shared address in row `d`, global in wide row `a`, bytes in row
/// `b`, mbarrier in the list; `mode` 1 multicasts to the blocks of the mask in row `c`.
pub(crate) struct LoadRange;

impl Instruction for LoadRange {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        for l in lanes(x.active) {
            let r = &x.warp.registers;
            let (target, shared) = x.shared_target(r.lane::<u32>(i.d, l));
            let (global, bytes) = (r.lane::<u64>(i.a, l), r.lane::<u32>(i.b, l));
            let (_, mbarrier) = x.shared_target(r.lane::<u32>(x.listed(i, 0), l));
            let mask = if i.mode == 1 { r.lane::<u16>(i.c, l) } else { 0 };
            let Some(pieces) = x.range(shared, global, bytes, l) else { continue };
            if i.mode == 1 {
                x.load(pieces, mbarrier, lanes(mask.into()), l);
            } else {
                x.load(pieces, mbarrier, std::iter::once(target), l);
            }
        }
        Flow::Next
    }
}

/// `cp.async.bulk` and `cp.reduce.async.bulk` from shared to global memory: global address in wide row `a`, shared
/// in row `d`, bytes in row `b`; `mode` is the [`Reduction`], `size` the element, `count` its format (0 integer,
/// 1 float, 2 bf16).
pub(crate) struct StoreRange;

impl Instruction for StoreRange {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let format = match i.count {
            1 => Format::Float,
            2 => Format::Bf16,
            _ => Format::Integer,
        };
        for l in lanes(x.active) {
            let r = &x.warp.registers;
            let (shared, global) = (r.lane::<u32>(i.d, l), r.lane::<u64>(i.a, l));
            let Some(pieces) = x.range(shared, global, r.lane::<u32>(i.b, l), l) else { continue };
            x.store(pieces, (reduction(i.mode), i.size.into(), format), l);
        }
        Flow::Next
    }
}

/// `cp.async.bulk.commit_group`
pub(crate) struct CommitBulk;

impl Instruction for CommitBulk {
    unsafe fn execute(x: &mut Machine<'_>, _: &Inst) -> Flow {
        let (active, groups) = (x.active, &mut x.warp.bulk_groups);
        for store in x.warp.bulk_stores.iter_mut().filter(|s| active >> s.lane & 1 != 0) {
            store.group.get_or_insert(groups[usize::from(store.lane)]);
        }
        for l in lanes(active) {
            groups[l] += 1;
        }
        Flow::Next
    }
}

/// `cp.async.bulk.wait_group imm`; with `.read` (`mode` 1) the copies are not performed, only read.
pub(crate) struct WaitBulk;

impl Instruction for WaitBulk {
    unsafe fn execute(x: &mut Machine<'_>, i: &Inst) -> Flow {
        let (which, epoch) = ((x.active, i.imm as u64, i.mode == 1), x.ctas[0].standing.epoch);
        perform_stores(x.run, &mut x.ctas[x.rank], x.warp, which, epoch);
        *x.progress += 1;
        Flow::Next
    }
}
