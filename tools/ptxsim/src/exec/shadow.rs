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

/// The last write and the last read of some bytes.
#[derive(Clone, Copy, Default)]
pub(crate) struct Cell {
    pub(crate) write_serial: u32,
    pub(crate) write_pc: u32,
    pub(crate) read_serial: u32,
    pub(crate) read_pc: u32,
    read_lanes: u32,
    pub(crate) write_column: u16,
    pub(crate) read_column: u16,
    write_lane: u8,
    flags: u8,
}

impl Cell {
    /// Whether `who` comes after the last write.
    #[inline(always)]
    fn write_known(&self, who: &Agent<'_>) -> bool {
        let seen = self.write_serial <= who.clock[self.write_column as usize];
        seen || self.write_column == who.column && self.write_lane == who.lane
    }

    /// `recorded` is when the agent's column last read these bytes.
    #[inline(always)]
    fn read(&mut self, who: &Agent<'_>, recorded: &mut u32) -> Faults {
        let mut faults = Faults::NONE;
        faults.add(Faults::AFTER_WRITE, !self.write_known(who));
        if who.asynchronous && self.flags & GENERIC != 0 {
            faults.add(Faults::UNFENCED, self.write_serial > who.fenced[self.write_column as usize]);
        }
        let (column, serial) = who.record;
        *recorded = serial;
        let lane = 1u32.checked_shl(who.lane.into()).unwrap_or(0);
        if self.read_column == column && self.read_serial == serial {
            self.read_lanes |= lane;
        } else {
            // Reads of the warp since its lanes last synchronised add up; older ones are of no interest.
            let current = self.read_column == column && self.read_serial > who.clock[who.column as usize];
            self.read_lanes = if current { self.read_lanes | lane } else { lane };
            self.read_column = column;
            self.read_serial = serial;
            self.read_pc = who.pc;
        }
        faults
    }

    /// `reads` is when each column last read these bytes.
    #[inline(always)]
    fn write(&mut self, who: &Agent<'_>, reads: &[u32]) -> Faults {
        let mut faults = Faults::NONE;
        let both_atomic = who.atomic && self.flags & ATOMIC != 0;
        let same_instruction = self.write_column == who.column && self.write_serial == who.serial;
        faults.add(Faults::AFTER_WRITE, !both_atomic && !same_instruction && !self.write_known(who));
        let unknown = any_later(reads, who.clock) && {
            let later = |column: usize| reads[column] > who.clock[column] && column != who.column as usize;
            (0..reads.len()).any(later)
        };
        let own = self.read_column == who.column
            && self.read_serial > who.clock[who.column as usize]
            && self.read_serial != who.serial
            && self.read_lanes & !1u32.checked_shl(who.lane.into()).unwrap_or(0) != 0;
        faults.add(Faults::AFTER_READ, unknown || own);
        (self.write_column, self.write_serial) = who.record;
        self.write_lane = who.lane;
        self.write_pc = who.pc;
        self.flags = if who.asynchronous { 0 } else { GENERIC } | if who.atomic { ATOMIC } else { 0 };
        faults
    }
}

/// Whether any of `reads` is later than its column of `clock`.
#[inline(always)]
fn any_later(reads: &[u32], clock: &[u32]) -> bool {
    let (reads, clock) = (reads.as_chunks::<COLUMNS>().0, clock.as_chunks::<COLUMNS>().0);
    let mut later = 0;
    for (reads, clock) in reads.iter().zip(clock) {
        for (read, known) in reads.iter().zip(clock) {
            later |= u32::from(read > known);
        }
    }
    later != 0
}

/// Clocks have a multiple of so many columns, to be compared as vectors.
pub(crate) const COLUMNS: usize = 8;

const CHUNK: usize = 16;
/// Bytes of the smallest cell, as a power of two, and of the largest.
const FINEST: u8 = 1;
const COARSEST: u8 = 4;

/// What is known of 16 bytes besides their cells.
#[derive(Clone, Copy)]
struct Chunk {
    /// Bits 0 to 15: bytes that were written; 16 to 23: 2-byte granules with a copy in flight; 24 to 31: granules that
    /// belong to an mbarrier.
    state: u32,
    /// Bytes of each of its cells, as a power of two.
    grain: u8,
}

impl Chunk {
    const FRESH: Self = Self { state: 0, grain: COARSEST };
}

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
        let byte = address & 15;
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
    columns: usize,
    chunks: Vec<Chunk>,
    /// First the first cell of each chunk, then the second of each, as far as any chunk has so many.
    cells: Vec<Cell>,
    /// In the order of the cells, when each column last read.
    reads: Vec<u32>,
}

impl Shadow {
    /// The shadow of `bytes` of shared memory, with `columns` agents: a multiple of [`COLUMNS`].
    pub(crate) fn new(bytes: u32, columns: usize) -> Self {
        let chunks = (bytes as usize).div_ceil(CHUNK);
        Self {
            columns,
            chunks: vec![Chunk::FRESH; chunks],
            cells: vec![Cell::default(); chunks],
            reads: vec![0; chunks * columns],
        }
    }

    /// Forgets a block. Serial numbers grow from block to block, so that cells may stay: what is in them counts as
    /// known.
    pub(crate) fn reset(&mut self) {
        self.chunks.fill(Chunk::FRESH);
    }

    /// Checks a read of `size` (a power of two up to 16) aligned bytes.
    #[inline(always)]
    pub(crate) fn read(&mut self, who: &Agent<'_>, address: u32, size: u32) -> Faults {
        let bits = Bits::of(address, size);
        let mut faults = bits.faults(self.chunks[address as usize / CHUNK].state, bits.written);
        if size > 1 {
            for at in self.cells_of(address, size) {
                let recorded = &mut self.reads[at * self.columns + who.record.0 as usize];
                faults.join(self.cells[at].read(who, recorded));
            }
        }
        faults
    }

    /// Checks a write of `size` (a power of two up to 16) aligned bytes, and marks them as initialised.
    #[inline(always)]
    pub(crate) fn write(&mut self, who: &Agent<'_>, address: u32, size: u32) -> Faults {
        let index = address as usize / CHUNK;
        let bits = Bits::of(address, size);
        let chunk = &mut self.chunks[index];
        let mut faults = bits.faults(chunk.state, if who.atomic { bits.written } else { 0 });
        chunk.state |= bits.written;
        if size > 1 {
            for at in self.cells_of(address, size) {
                let reads = &self.reads[at * self.columns..][..self.columns];
                faults.join(self.cells[at].write(who, reads));
            }
            if size == CHUNK as u32 && self.chunks[index].grain != COARSEST {
                self.merge(index);
            }
        }
        faults
    }

    /// The positions of the cells of aligned bytes, after larger cells were split.
    #[inline(always)]
    fn cells_of(&mut self, address: u32, size: u32) -> impl Iterator<Item = usize> + use<> {
        let (index, chunks) = (address as usize / CHUNK, self.chunks.len());
        if size < 1 << self.chunks[index].grain {
            self.split(index, size);
        }
        let grain = self.chunks[index].grain;
        let first = (address % 16) >> grain;
        (first..first + (size >> grain)).map(move |slot| slot as usize * chunks + index)
    }

    /// Gives a chunk cells of `size` bytes.
    #[cold]
    #[inline(never)]
    fn split(&mut self, index: usize, size: u32) {
        let chunks = self.chunks.len();
        let old = self.chunks[index].grain;
        let new = (size.trailing_zeros() as u8).max(FINEST);
        self.chunks[index].grain = new;
        let slots = CHUNK >> new;
        if self.cells.len() < slots * chunks {
            self.cells.resize(slots * chunks, Cell::default());
            self.reads.resize(slots * chunks * self.columns, 0);
        }
        // From behind, so that none is overwritten before it was copied.
        for slot in (1..slots).rev() {
            let (from, to) = ((slot >> (old - new)) * chunks + index, slot * chunks + index);
            self.cells[to] = self.cells[from];
            self.reads.copy_within(from * self.columns..(from + 1) * self.columns, to * self.columns);
        }
    }

    /// One cell again, after one access wrote them all.
    fn merge(&mut self, index: usize) {
        let chunks = self.chunks.len();
        for slot in 1..CHUNK >> self.chunks[index].grain {
            for column in 0..self.columns {
                let other = self.reads[(slot * chunks + index) * self.columns + column];
                let first = &mut self.reads[index * self.columns + column];
                *first = (*first).max(other);
            }
        }
        self.chunks[index].grain = COARSEST;
    }

    /// Marks aligned bytes as being copied to, or as arrived.
    #[inline(always)]
    pub(crate) fn set_pending(&mut self, address: u32, size: u32, pending: bool) {
        let bits = Bits::of(address, size).pending;
        let state = &mut self.chunks[address as usize / CHUNK].state;
        *state = if pending { *state | bits } else { *state & !bits };
    }

    /// A copy into aligned bytes is complete: from now on they count as written at `serial`.
    #[inline(always)]
    pub(crate) fn arrived(&mut self, address: u32, size: u32, column: u16, lane: u8, serial: u32) {
        let (index, chunks) = (address as usize / CHUNK, self.chunks.len());
        let grain = self.chunks[index].grain;
        for slot in (address % 16) >> grain..=(address % 16 + size - 1) >> grain {
            let cell = &mut self.cells[slot as usize * chunks + index];
            (cell.write_column, cell.write_lane, cell.write_serial) = (column, lane, serial);
        }
    }

    /// Marks the eight bytes of an mbarrier, which nothing else may touch.
    pub(crate) fn set_mbarrier(&mut self, address: u32, present: bool) {
        let bits = Bits::of(address, 8);
        let state = &mut self.chunks[address as usize / CHUNK].state;
        *state = if present { *state | bits.mbarrier } else { *state & !bits.mbarrier } | bits.written;
    }

    /// The state of the bytes at an address, for messages.
    pub(crate) fn cell(&self, address: u32) -> Cell {
        let index = address as usize / CHUNK;
        let slot = (address % 16) >> self.chunks[index].grain;
        self.cells[slot as usize * self.chunks.len() + index]
    }
}
