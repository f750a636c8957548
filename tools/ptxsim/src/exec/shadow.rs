//! The shadow of shared memory: who wrote and read what, and whether it may.
//!
//! Race detection follows FastTrack. Time is a vector of serial numbers, one *column* per agent: each warp of the
//! cluster, and per block one agent per warpgroup for `wgmma`, one for bulk loads and one for bulk stores. A
//! warp's serial number counts its instructions. Its clock says up to which serial of every agent it knows all
//! accesses to be complete; in its own column, up to which serial its lanes are synchronised with one another.
//! Barriers and mbarriers join clocks.
//!
//! The state is kept per 16 bytes as long as accesses cover all of them, and per 8, 4 or 2 bytes after smaller ones.

/// What an access found; several bits may be set.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Faults(u8);

impl Faults {
    pub(crate) const NONE: Self = Self(0);
    pub(crate) const UNINITIALISED: Self = Self(1);
    pub(crate) const IN_FLIGHT: Self = Self(2);
    pub(crate) const AFTER_WRITE: Self = Self(4);
    pub(crate) const AFTER_READ: Self = Self(8);
    pub(crate) const UNFENCED: Self = Self(16);
    pub(crate) const MBARRIER: Self = Self(32);

    #[inline(always)]
    pub(crate) fn any(self) -> bool {
        self.0 != 0
    }

    pub(crate) fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    #[inline(always)]
    fn add(&mut self, other: Self, when: bool) {
        self.0 |= if when { other.0 } else { 0 };
    }

    #[inline(always)]
    pub(crate) fn join(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

/// Who accesses.
#[derive(Clone, Copy)]
pub(crate) struct Agent<'a> {
    /// The warp in whose program order the access stands.
    pub(crate) column: u16,
    /// The lane, for order within the warp.
    pub(crate) lane: u8,
    /// Serial number of the instruction in that warp.
    pub(crate) serial: u32,
    /// What the warp knows.
    pub(crate) clock: &'a [u32],
    /// Up to which serial its lanes are synchronised with one another: its own column of the clock.
    pub(crate) together: u32,
    /// What the warp knows to be fenced for the asynchronous proxy.
    pub(crate) fenced: &'a [u32],
    /// The column and serial under which the access is recorded: the warp's own, or an asynchronous agent's.
    pub(crate) record: (u16, u32),
    /// Reads and writes through the asynchronous proxy.
    pub(crate) asynchronous: bool,
    /// An atomic; atomics do not race with one another.
    pub(crate) atomic: bool,
    pub(crate) pc: u32,
}

const GENERIC: u8 = 1;
const ATOMIC: u8 = 2;

/// What is known of some bytes: a line of the host's cache, since most accesses look at one cell.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Cell {
    /// When each of the first columns last read.
    reads: [u32; COLUMNS],
    /// Of all 16 bytes, in the first of their cells. Bits 0 to 15: bytes that were written; 16 to 23: 2-byte granules
    /// with a copy in flight; 24 to 31: granules that belong to an mbarrier.
    state: u32,
    pub(crate) write_serial: u32,
    pub(crate) write_pc: u32,
    pub(crate) read_serial: u32,
    pub(crate) read_pc: u32,
    read_lanes: u32,
    pub(crate) write_column: u16,
    pub(crate) read_column: u16,
    write_lane: u8,
    flags: u8,
    /// Bytes of each cell of these 16, as a power of two; in the first.
    grain: u8,
}

impl Cell {
    const FRESH: Self = Self {
        reads: [0; COLUMNS],
        state: 0,
        write_serial: 0,
        write_pc: 0,
        read_serial: 0,
        read_pc: 0,
        read_lanes: 0,
        write_column: 0,
        read_column: 0,
        write_lane: 0,
        flags: 0,
        grain: COARSEST,
    };

    /// Whether `who` comes after the last write.
    #[inline(always)]
    fn write_known(&self, who: &Agent<'_>) -> bool {
        let seen = self.write_serial <= who.clock[self.write_column as usize];
        seen || self.write_column == who.column && self.write_lane == who.lane
    }

    #[inline(always)]
    fn read(&mut self, who: &Agent<'_>) -> Faults {
        let mut faults = Faults::NONE;
        faults.add(Faults::AFTER_WRITE, !self.write_known(who));
        if who.asynchronous && self.flags & GENERIC != 0 {
            faults.add(Faults::UNFENCED, self.write_serial > who.fenced[self.write_column as usize]);
        }
        // Reads of the warp since its lanes last synchronised add up; older ones are of no interest.
        let (column, serial) = who.record;
        let current = self.read_serial == serial || self.read_serial > who.together;
        let others = if self.read_column == column && current { self.read_lanes } else { 0 };
        self.read_lanes = others | 1u32.checked_shl(who.lane.into()).unwrap_or(0);
        (self.read_column, self.read_serial, self.read_pc) = (column, serial, who.pc);
        faults
    }

    /// `later`: another warp's read that `who` does not know of.
    #[inline(always)]
    fn write(&mut self, who: &Agent<'_>, later: bool) -> Faults {
        let mut faults = Faults::NONE;
        let both_atomic = who.atomic && self.flags & ATOMIC != 0;
        let same_instruction = self.write_column == who.column && self.write_serial == who.serial;
        faults.add(Faults::AFTER_WRITE, !both_atomic && !same_instruction && !self.write_known(who));
        let own = self.read_column == who.column
            && self.read_serial > who.together
            && self.read_serial != who.serial
            && self.read_lanes & !1u32.checked_shl(who.lane.into()).unwrap_or(0) != 0;
        faults.add(Faults::AFTER_READ, later || own);
        (self.write_column, self.write_serial) = who.record;
        self.write_lane = who.lane;
        self.write_pc = who.pc;
        self.flags = if who.asynchronous { 0 } else { GENERIC } | if who.atomic { ATOMIC } else { 0 };
        faults
    }
}

/// Whether another column than the agent's own has one of `reads` later than its clock, both from column `first`.
#[inline(always)]
fn later(reads: &[u32; COLUMNS], who: &Agent<'_>, first: usize) -> bool {
    let Some(clock) = who.clock[first..].first_chunk::<COLUMNS>() else { return false };
    let mut any = 0;
    for (read, known) in reads.iter().zip(clock) {
        any |= u32::from(read > known);
    }
    any != 0 && (0..COLUMNS).any(|n| reads[n] > clock[n] && first + n != who.column as usize)
}

/// Clocks have a multiple of so many columns, to be compared as vectors.
pub(crate) const COLUMNS: usize = 8;

const CHUNK: usize = 16;
/// Bytes of the smallest cell, as a power of two, and of the largest.
const FINEST: u8 = 1;
const COARSEST: u8 = 4;

/// The bits of an access within the state of its 16 bytes.
#[derive(Clone, Copy)]
struct Bits {
    written: u32,
    pending: u32,
    mbarrier: u32,
}

impl Bits {
    #[inline(always)]
    fn of(address: u32, size: u32) -> Self {
        let byte = address & 15 & !(size - 1);
        let granules = ((1u32 << size.div_ceil(2)) - 1) << (byte / 2);
        Self {
            written: ((1u32 << size) - 1) << byte & 0xffff,
            pending: granules << 16 & 0xff_0000,
            mbarrier: granules << 24,
        }
    }

    /// The faults of an access; one that needs no written bytes passes zero for them.
    #[inline(always)]
    fn faults(self, state: u32, needed: u32) -> Faults {
        let mut faults = Faults::NONE;
        if state & (needed | self.pending | self.mbarrier) != needed {
            faults.add(Faults::UNINITIALISED, state & needed != needed);
            faults.add(Faults::IN_FLIGHT, state & self.pending != 0);
            faults.add(Faults::MBARRIER, state & self.mbarrier != 0);
        }
        faults
    }
}

/// The shadow of one block's shared memory.
pub(crate) struct Shadow {
    chunks: usize,
    /// First the first cell of each chunk, then the second of each, as far as any chunk has so many.
    cells: Vec<Cell>,
    /// Groups of columns that a cell has no room for, and in the order of the cells when those last read.
    groups: usize,
    more_reads: Vec<[u32; COLUMNS]>,
}

impl Shadow {
    /// The shadow of `bytes` of shared memory, with `columns` agents: a multiple of [`COLUMNS`].
    pub(crate) fn new(bytes: u32, columns: usize) -> Self {
        let chunks = (bytes as usize).div_ceil(CHUNK);
        let groups = columns / COLUMNS - 1;
        Self {
            chunks,
            cells: vec![Cell::FRESH; chunks],
            groups,
            more_reads: vec![[0; COLUMNS]; chunks * groups],
        }
    }

    /// Forgets a block. Serial numbers grow from block to block, so that accesses may stay: those that cells have
    /// count as known.
    pub(crate) fn reset(&mut self) {
        for cell in &mut self.cells[..self.chunks] {
            (cell.state, cell.grain) = (0, COARSEST);
        }
    }

    /// Checks a read of `size` (a power of two up to 16) aligned bytes.
    #[inline(always)]
    pub(crate) fn read(&mut self, who: &Agent<'_>, address: u32, size: u32) -> Faults {
        let index = address as usize / CHUNK;
        let bits = Bits::of(address, size);
        let mut faults = bits.faults(self.cells[index].state, bits.written);
        if size.trailing_zeros() == u32::from(self.cells[index].grain) {
            faults.join(self.read_cell(who, self.position(address)));
        } else if size > 1 {
            faults.join(self.read_cells(*who, address, size));
        }
        faults
    }

    #[inline(always)]
    fn read_cell(&mut self, who: &Agent<'_>, at: usize) -> Faults {
        let (column, serial) = who.record;
        match self.cells[at].reads.get_mut(column as usize) {
            Some(read) => *read = serial,
            None => {
                self.more_reads[at * self.groups..].as_flattened_mut()[column as usize - COLUMNS] = serial
            }
        }
        self.cells[at].read(who)
    }

    /// [`read`](Self::read) of bytes that are not exactly a cell.
    #[inline(never)]
    fn read_cells(&mut self, who: Agent<'_>, address: u32, size: u32) -> Faults {
        let mut faults = Faults::NONE;
        for at in self.cells_of(address, size) {
            faults.join(self.read_cell(&who, at));
        }
        faults
    }

    /// Checks a write of `size` (a power of two up to 16) aligned bytes, and marks them as initialised.
    #[inline(always)]
    pub(crate) fn write(&mut self, who: &Agent<'_>, address: u32, size: u32) -> Faults {
        let cell = &mut self.cells[address as usize / CHUNK];
        let bits = Bits::of(address, size);
        let mut faults = bits.faults(cell.state, if who.atomic { bits.written } else { 0 });
        cell.state |= bits.written;
        if size.trailing_zeros() == u32::from(cell.grain) {
            faults.join(self.write_cell(who, self.position(address)));
        } else if size > 1 {
            faults.join(self.write_cells(*who, address, size));
        }
        faults
    }

    #[inline(always)]
    fn write_cell(&mut self, who: &Agent<'_>, at: usize) -> Faults {
        let mut unknown = later(&self.cells[at].reads, who, 0);
        for (n, reads) in self.more_reads[at * self.groups..][..self.groups].iter().enumerate() {
            unknown |= later(reads, who, (n + 1) * COLUMNS);
        }
        self.cells[at].write(who, unknown)
    }

    /// [`write`](Self::write) of bytes that are not exactly a cell.
    #[inline(never)]
    fn write_cells(&mut self, who: Agent<'_>, address: u32, size: u32) -> Faults {
        let mut faults = Faults::NONE;
        for at in self.cells_of(address, size) {
            faults.join(self.write_cell(&who, at));
        }
        if size == CHUNK as u32 {
            self.merge(address as usize / CHUNK);
        }
        faults
    }

    /// The position of the cell at an address.
    #[inline(always)]
    fn position(&self, address: u32) -> usize {
        let index = address as usize / CHUNK;
        ((address % 16) >> self.cells[index].grain) as usize * self.chunks + index
    }

    /// The positions of the cells of aligned bytes, after larger cells were split.
    #[inline(always)]
    fn cells_of(&mut self, address: u32, size: u32) -> impl Iterator<Item = usize> + use<> {
        let (index, chunks) = (address as usize / CHUNK, self.chunks);
        if size < 1 << self.cells[index].grain {
            self.split(index, size);
        }
        let grain = self.cells[index].grain;
        let first = (address % 16) >> grain;
        (first..first + (size >> grain)).map(move |slot| slot as usize * chunks + index)
    }

    /// Gives a chunk cells of `size` bytes.
    #[cold]
    #[inline(never)]
    fn split(&mut self, index: usize, size: u32) {
        let old = self.cells[index].grain;
        let new = (size.trailing_zeros() as u8).max(FINEST);
        self.cells[index].grain = new;
        let slots = CHUNK >> new;
        if self.cells.len() < slots * self.chunks {
            self.cells.resize(slots * self.chunks, Cell::FRESH);
            self.more_reads.resize(slots * self.chunks * self.groups, [0; COLUMNS]);
        }
        // From behind, so that none is overwritten before it was copied.
        for slot in (1..slots).rev() {
            let (from, to) = ((slot >> (old - new)) * self.chunks + index, slot * self.chunks + index);
            self.cells[to] = self.cells[from];
            self.more_reads.copy_within(from * self.groups..(from + 1) * self.groups, to * self.groups);
        }
    }

    /// One cell again, after one access wrote them all.
    fn merge(&mut self, index: usize) {
        for slot in 1..CHUNK >> self.cells[index].grain {
            let other = slot * self.chunks + index;
            self.cells[index].reads = latest(self.cells[index].reads, self.cells[other].reads);
            for n in 0..self.groups {
                let (first, other) = (index * self.groups + n, other * self.groups + n);
                self.more_reads[first] = latest(self.more_reads[first], self.more_reads[other]);
            }
        }
        self.cells[index].grain = COARSEST;
    }

    /// Marks aligned bytes as being copied to, or as arrived.
    #[inline(always)]
    pub(crate) fn set_pending(&mut self, address: u32, size: u32, pending: bool) {
        let bits = Bits::of(address, size).pending;
        let state = &mut self.cells[address as usize / CHUNK].state;
        *state = if pending { *state | bits } else { *state & !bits };
    }

    /// A copy into aligned bytes is complete: from now on they count as written at `serial`.
    #[inline(always)]
    pub(crate) fn arrived(&mut self, address: u32, size: u32, column: u16, lane: u8, serial: u32) {
        self.set_pending(address, size, false);
        let index = address as usize / CHUNK;
        let grain = self.cells[index].grain;
        for slot in (address % 16) >> grain..=(address % 16 + size - 1) >> grain {
            let cell = &mut self.cells[slot as usize * self.chunks + index];
            (cell.write_column, cell.write_lane, cell.write_serial) = (column, lane, serial);
        }
    }

    /// Marks the eight bytes of an mbarrier, which nothing else may touch.
    pub(crate) fn set_mbarrier(&mut self, address: u32, present: bool) {
        let bits = Bits::of(address, 8);
        let state = &mut self.cells[address as usize / CHUNK].state;
        *state = if present { *state | bits.mbarrier } else { *state & !bits.mbarrier } | bits.written;
    }

    /// The state of the bytes at an address, for messages.
    pub(crate) fn cell(&self, address: u32) -> Cell {
        self.cells[self.position(address)]
    }
}

fn latest(a: [u32; COLUMNS], b: [u32; COLUMNS]) -> [u32; COLUMNS] {
    std::array::from_fn(|n| a[n].max(b[n]))
}
