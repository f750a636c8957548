//! The shadow of shared memory: who wrote and read what, and whether it may.
//!
//! Race detection follows FastTrack. Time is a vector of serial numbers, one *column* per agent: each warp of the
//! cluster, and per block one agent per warpgroup for `wgmma`, one for bulk loads and one for bulk stores. A
//! warp's serial number counts its instructions. Its clock says up to which serial of every agent it knows all
//! accesses to be complete; in its own column, up to which serial its lanes are synchronised with one another.
//! Barriers and mbarriers join clocks.
//!
//! The state is kept per 16 bytes as long as accesses cover all of them, and per 2 bytes after a smaller one.

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

    #[inline(always)]
    fn read(&mut self, who: &Agent<'_>, reads: &mut [u32]) -> Faults {
        let mut faults = Faults::NONE;
        faults.add(Faults::AFTER_WRITE, !self.write_known(who));
        if who.asynchronous && self.flags & GENERIC != 0 {
            faults.add(Faults::UNFENCED, self.write_serial > who.fenced[self.write_column as usize]);
        }
        let (column, serial) = who.record;
        reads[column as usize] = serial;
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

    #[inline(always)]
    fn write(&mut self, who: &Agent<'_>, reads: &[u32]) -> Faults {
        let mut faults = Faults::NONE;
        let both_atomic = who.atomic && self.flags & ATOMIC != 0;
        let same_instruction = self.write_column == who.column && self.write_serial == who.serial;
        faults.add(Faults::AFTER_WRITE, !both_atomic && !same_instruction && !self.write_known(who));
        let mut unknown = false;
        for (column, serial) in reads.iter().enumerate() {
            unknown |= *serial > who.clock[column] && column != who.column as usize;
        }
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

/// State of 16 bytes.
#[derive(Clone, Copy, Default)]
struct Chunk {
    /// Bytes that were written.
    init: u16,
    /// 2-byte granules with a copy in flight.
    pending: u8,
    /// 2-byte granules that belong to an mbarrier.
    mbarrier: u8,
    /// Whether the granules have states of their own.
    split: bool,
    cell: Cell,
}

const CHUNK: usize = 16;
const GRANULES: usize = 8;

/// The shadow of one block's shared memory.
pub(crate) struct Shadow {
    columns: usize,
    chunks: Vec<Chunk>,
    granules: Vec<Cell>,
    chunk_reads: Vec<u32>,
    granule_reads: Vec<u32>,
}

/// The bits of an access within its 16 bytes: bytes and granules.
#[inline(always)]
fn bits(address: u32, size: u32) -> (u16, u8) {
    let byte = address & 15;
    let bytes = ((1u32 << size) - 1) << byte;
    let (first, last) = (byte / 2, (byte + size - 1) / 2);
    let granules = ((1u32 << (last - first + 1)) - 1) << first;
    (bytes as u16, granules as u8)
}

impl Shadow {
    /// The shadow of `bytes` of shared memory, with `columns` agents.
    pub(crate) fn new(bytes: u32, columns: usize) -> Self {
        let chunks = (bytes as usize).div_ceil(CHUNK);
        Self {
            columns,
            chunks: vec![Chunk::default(); chunks],
            granules: vec![Cell::default(); chunks * GRANULES],
            chunk_reads: vec![0; chunks * columns],
            granule_reads: vec![0; chunks * GRANULES * columns],
        }
    }

    /// Forgets a block. Serial numbers grow from block to block, so that old ones count as known.
    pub(crate) fn reset(&mut self) {
        for chunk in &mut self.chunks {
            *chunk = Chunk::default();
        }
    }

    /// Checks a read of `size` (a power of two up to 16) aligned bytes.
    #[inline(always)]
    pub(crate) fn read(&mut self, who: &Agent<'_>, address: u32, size: u32) -> Faults {
        let index = address as usize / CHUNK;
        let chunk = &mut self.chunks[index];
        let (bytes, granules) = bits(address, size);
        let mut faults = Faults::NONE;
        faults.add(Faults::UNINITIALISED, chunk.init & bytes != bytes);
        faults.add(Faults::IN_FLIGHT, chunk.pending & granules != 0);
        faults.add(Faults::MBARRIER, chunk.mbarrier & granules != 0);
        if size == CHUNK as u32 && !chunk.split {
            let reads = &mut self.chunk_reads[index * self.columns..][..self.columns];
            faults.join(chunk.cell.read(who, reads));
        } else if size > 1 {
            self.split(index);
            for g in (address as usize / 2)..((address + size) as usize / 2) {
                let reads = &mut self.granule_reads[g * self.columns..][..self.columns];
                faults.join(self.granules[g].read(who, reads));
            }
        }
        faults
    }

    /// Checks a write of `size` (a power of two up to 16) aligned bytes, and marks them as initialised.
    #[inline(always)]
    pub(crate) fn write(&mut self, who: &Agent<'_>, address: u32, size: u32) -> Faults {
        let index = address as usize / CHUNK;
        let chunk = &mut self.chunks[index];
        let (bytes, granules) = bits(address, size);
        let mut faults = Faults::NONE;
        faults.add(Faults::UNINITIALISED, who.atomic && chunk.init & bytes != bytes);
        faults.add(Faults::IN_FLIGHT, chunk.pending & granules != 0);
        faults.add(Faults::MBARRIER, chunk.mbarrier & granules != 0);
        chunk.init |= bytes;
        if size == CHUNK as u32 && !chunk.split {
            let reads = &self.chunk_reads[index * self.columns..][..self.columns];
            faults.join(chunk.cell.write(who, reads));
        } else if size > 1 {
            self.split(index);
            for g in (address as usize / 2)..((address + size) as usize / 2) {
                let reads = &self.granule_reads[g * self.columns..][..self.columns];
                faults.join(self.granules[g].write(who, reads));
            }
            if size == CHUNK as u32 {
                self.merge(index);
            }
        }
        faults
    }

    /// Gives the granules of a chunk states of their own.
    #[inline(always)]
    fn split(&mut self, index: usize) {
        if !self.chunks[index].split {
            self.split_now(index);
        }
    }

    #[inline(never)]
    fn split_now(&mut self, index: usize) {
        let chunk = &mut self.chunks[index];
        chunk.split = true;
        let first = index * GRANULES;
        self.granules[first..first + GRANULES].fill(chunk.cell);
        let (from, columns) = (index * self.columns, self.columns);
        for g in first..first + GRANULES {
            self.granule_reads[g * columns..][..columns]
                .copy_from_slice(&self.chunk_reads[from..from + columns]);
        }
    }

    /// One state again, after one access wrote all granules.
    fn merge(&mut self, index: usize) {
        let (first, columns) = (index * GRANULES, self.columns);
        self.chunks[index].split = false;
        self.chunks[index].cell = self.granules[first];
        for c in 0..columns {
            let latest = (first..first + GRANULES).map(|g| self.granule_reads[g * columns + c]).max();
            self.chunk_reads[index * columns + c] = latest.unwrap_or(0);
        }
    }

    /// Marks aligned bytes as being copied to, or as arrived.
    pub(crate) fn set_pending(&mut self, address: u32, size: u32, pending: bool) {
        let (_, granules) = bits(address, size);
        let chunk = &mut self.chunks[address as usize / CHUNK];
        chunk.pending = if pending { chunk.pending | granules } else { chunk.pending & !granules };
    }

    /// A copy into aligned bytes is complete: from now on they count as written at `serial`.
    pub(crate) fn arrived(&mut self, address: u32, size: u32, column: u16, lane: u8, serial: u32) {
        let index = address as usize / CHUNK;
        let mark = |cell: &mut Cell| {
            (cell.write_column, cell.write_lane, cell.write_serial) = (column, lane, serial);
        };
        if self.chunks[index].split {
            self.granules[address as usize / 2..(address + size) as usize / 2].iter_mut().for_each(mark);
        } else {
            mark(&mut self.chunks[index].cell);
        }
    }

    /// Marks the eight bytes of an mbarrier, which nothing else may touch.
    pub(crate) fn set_mbarrier(&mut self, address: u32, present: bool) {
        let (bytes, granules) = bits(address, 8);
        let chunk = &mut self.chunks[address as usize / CHUNK];
        chunk.mbarrier = if present { chunk.mbarrier | granules } else { chunk.mbarrier & !granules };
        chunk.init |= bytes;
    }

    /// The state of a granule, for messages.
    pub(crate) fn cell(&self, address: u32) -> Cell {
        let chunk = &self.chunks[address as usize / CHUNK];
        if chunk.split { self.granules[address as usize / 2] } else { chunk.cell }
    }
}
