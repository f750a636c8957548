//! A launch while it runs: its windows, its parameters, and the findings so far.
#![allow(unsafe_code)] // the windows of a launch are shared by the host threads that run its blocks

use crate::error::LaunchError;
use crate::exec::lane::{LANES, Row};
use crate::exec::order::{Seen, Words};
use crate::finding::{Checks, Finding, FindingKind, Place};
use crate::kernel::Kernel;
use crate::launch::{Access, Argument, Format, Launch, Options, Order, Swizzle, TensorMap, Window};
use crate::memory::Memory;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Addresses are `slot << 32 | offset`. These slots are fixed; windows follow, each with an empty slot after it,
/// so that an overshoot of up to 4 GiB either way meets no other window.
pub(crate) const PARAM_SLOT: u64 = 1;
pub(crate) const SHARED_SLOT: u64 = 2;
pub(crate) const LOCAL_SLOT: u64 = 3;
const FIRST_SLOT: usize = 8;

/// Shared memory starts here: a multiple of every swizzle period, and null is not in it.
pub(crate) const SHARED_BASE: u32 = 1024;

/// A range of addresses that the kernel may touch.
pub(crate) struct Slot {
    base: *mut u8,
    written: *mut u8,
    /// Offset of the first byte in the slot: the low bits of its place in memory, so that alignment is real.
    low: u64,
    len: u64,
    readable: bool,
    writable: bool,
    /// Which cluster wrote each 2-byte granule in this launch, or null if nobody looks; `parity` is the place of
    /// the window's first byte in its granule.
    owners: *mut u32,
    /// In which epoch of that cluster.
    epochs: *mut u32,
    parity: u32,
    name: String,
}

/// Bytes of global memory that an access was admitted to.
#[derive(Clone, Copy)]
pub(crate) struct Bytes {
    pub(crate) data: *mut u8,
    pub(crate) written: *mut u8,
    owners: *mut u32,
    epochs: *mut u32,
    /// Offset of the first byte in its granule.
    parity: u32,
}

impl Bytes {
    /// Whether somebody looks who writes them.
    #[inline(always)]
    pub(crate) fn is_owned(&self) -> bool {
        !self.owners.is_null()
    }

    fn granules(&self, size: u32) -> usize {
        (self.parity + size).div_ceil(2) as usize
    }

    /// Whether a write of another cluster stands in `size` owned bytes. Atomics do not meet atomics.
    #[inline(always)]
    pub(crate) fn meets_other(&self, size: u32, cluster: u32, atomic: bool) -> bool {
        // SAFETY: there is an owner for each granule of a window, and these bytes were admitted.
        let owners = unsafe { std::slice::from_raw_parts(self.owners, self.granules(size)) };
        let another = |owner: &u32| u32::from(is_another(*owner, cluster, atomic));
        // By a vector's worth, since most accesses have so many.
        let (vectors, rest) = owners.as_chunks::<8>();
        let mut met = rest.iter().fold(0, |met, owner| met | another(owner));
        for vector in vectors {
            met |= vector.iter().fold(0, |met, owner| met | another(owner));
        }
        met != 0
    }

    /// Whether one of these writes is not known.
    #[cold]
    pub(crate) fn meets_unknown(&self, size: u32, cluster: u32, atomic: bool, seen: &Seen) -> bool {
        (0..self.granules(size)).any(|g| {
            // SAFETY: as in `meets_other`; there are as many epochs.
            let (owner, epoch) = unsafe { (*self.owners.add(g), *self.epochs.add(g)) };
            is_another(owner, cluster, atomic) && !seen.knows((owner >> 1) - 1, epoch)
        })
    }

    /// Records a write of `size` owned bytes.
    #[inline(always)]
    pub(crate) fn claim(&self, size: u32, cluster: u32, atomic: bool, epoch: u32) {
        let granules = self.granules(size);
        // SAFETY: as in `meets_unknown`.
        unsafe {
            std::slice::from_raw_parts_mut(self.owners, granules)
                .fill((cluster + 1) << 1 | u32::from(atomic));
            std::slice::from_raw_parts_mut(self.epochs, granules).fill(epoch);
        }
    }

    /// What a cluster wrote of `size` bytes, and nobody else since, is done in this epoch.
    pub(crate) fn date(&self, size: u32, cluster: u32, epoch: u32) {
        for g in (0..self.granules(size)).filter(|_| self.is_owned()) {
            // SAFETY: as in `meets_unknown`.
            unsafe {
                if *self.owners.add(g) >> 1 == cluster + 1 {
                    *self.epochs.add(g) = epoch;
                }
            }
        }
    }
}

/// Whether this is the tag of another cluster's write.
#[inline(always)]
fn is_another(owner: u32, cluster: u32, atomic: bool) -> bool {
    let both_atomic = atomic & (owner & 1 != 0);
    (owner != 0) & (owner >> 1 != cluster + 1) & !both_atomic
}

/// Whether a block that waits may wait for one on another host thread.
#[derive(Default)]
pub(crate) struct Standstill {
    /// Counts what somebody may wait for.
    progress: AtomicU64,
    /// Host threads that have blocks to run.
    working: AtomicUsize,
    /// At which progress host threads are stuck, and how many.
    stuck: Mutex<(u64, usize)>,
}

impl Standstill {
    pub(crate) fn enter(&self, threads: usize) {
        self.working.store(threads, Ordering::Release);
    }

    pub(crate) fn leave(&self) {
        self.progressed();
        self.working.fetch_sub(1, Ordering::AcqRel);
    }

    pub(crate) fn progressed(&self) {
        self.progress.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn progress(&self) -> u64 {
        self.progress.load(Ordering::Acquire)
    }

    /// The calling thread is stuck since `progress`, which `before` says if it has said so already. Returns whether all
    /// are.
    pub(crate) fn is_final(&self, progress: u64, before: &mut Option<u64>) -> bool {
        let mut stuck = self.stuck.lock().unwrap_or_else(|e| e.into_inner());
        if progress < stuck.0 {
            // Others are further: what was said of that progress must stand.
            return false;
        }
        if *before != Some(progress) {
            if stuck.0 != progress {
                *stuck = (progress, 0);
            }
            stuck.1 += 1;
            *before = Some(progress);
        }
        stuck.1 >= self.working.load(Ordering::Acquire)
    }
}

/// A tensor map of the launch.
pub(crate) struct Map {
    pub(crate) parameter: u32,
    /// Address of the first element.
    pub(crate) origin: u64,
    pub(crate) element: u32,
    pub(crate) format: Format,
    pub(crate) extents: Vec<u64>,
    pub(crate) strides: Vec<u64>,
    pub(crate) tile: Vec<u32>,
    pub(crate) swizzle: Swizzle,
}

pub(crate) struct Run<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) cluster: [u32; 3],
    /// End of the block's shared memory, as an address.
    pub(crate) shared_end: u32,
    pub(crate) options: Options,
    pub(crate) checks: Checks,
    /// Whether shared memory has a shadow and warps have clocks.
    pub(crate) shadowed: bool,
    /// Whether the host has the vector features that instructions are compiled for.
    pub(crate) vector_host: bool,
    /// Whether global reads need marked bytes.
    pub(crate) uninitialised: bool,
    pub(crate) params: Vec<u8>,
    pub(crate) maps: Vec<Map>,
    slots: Vec<Slot>,
    /// Who wrote the granules of each memory, see [`Slot::owners`]; empty if nobody looks.
    owners: Vec<Vec<u32>>,
    epochs: Vec<Vec<u32>>,
    pub(crate) words: Words,
    /// Module variables of this launch and the marks of the parameters; they back slots.
    _owned: Vec<Memory>,
    findings: Mutex<Findings>,
    pub(crate) standstill: Standstill,
}

// SAFETY: the pointers in slots are to memories that the launch borrows or owns. Blocks on several host threads may
// touch the same bytes, as the blocks of a GPU do; a kernel without races does so only through atomics, which are
// atomic here as well. Bytes under a data race may come out as either value, which is what the GPU promises.
unsafe impl Sync for Run<'_> {}

#[derive(Default)]
struct Findings {
    index: HashMap<(FindingKind, u32), usize>,
    list: Vec<Finding>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(
        memories: &mut [Memory],
        launch: &Launch<'a>,
        options: &Options,
    ) -> Result<Self, LaunchError> {
        check_shape(launch)?;
        let kernel = launch.kernel;
        let dynamic = kernel.dynamic_shared + launch.shared;
        let shared_end = if launch.shared > 0 { dynamic } else { SHARED_BASE + kernel.shared_bytes };
        let bytes = shared_end - SHARED_BASE;
        if bytes > options.shared_limit {
            let kernel = kernel.name.clone();
            return Err(LaunchError::SharedTooLarge { kernel, bytes, limit: options.shared_limit });
        }
        let mut run = Self {
            kernel,
            grid: launch.grid,
            block: launch.block,
            cluster: launch.cluster,
            shared_end,
            options: *options,
            checks: options.checks,
            shadowed: options.checks.shared_shadow(),
            vector_host: crate::exec::vector_host(),
            uninitialised: options.checks.has(FindingKind::Uninitialised),
            params: vec![0; kernel.parameter_bytes as usize],
            maps: Vec::new(),
            slots: Vec::new(),
            owners: Vec::new(),
            epochs: Vec::new(),
            words: Words::default(),
            _owned: Vec::new(),
            findings: Mutex::default(),
            standstill: Standstill::default(),
        };
        // Blocks of a cooperative launch may well hand data to each other.
        if options.checks.has(FindingKind::Conflict) && !launch.cooperative {
            run.owners = memories.iter().map(|m| vec![0; m.len().div_ceil(2)]).collect();
            run.epochs = run.owners.clone();
        }
        run.add_fixed_slots();
        run.add_arguments(memories, launch.args)?;
        Ok(run)
    }

    fn add_fixed_slots(&mut self) {
        self.slots.extend((0..FIRST_SLOT).map(|_| Slot::empty()));
        for (value, constant) in &self.kernel.globals {
            let mut memory = Memory::from_bytes(value);
            let (base, written) = memory.pointers();
            self.slots.push(Slot {
                base,
                written,
                low: 0,
                len: value.len() as u64,
                readable: true,
                writable: !constant,
                owners: std::ptr::null_mut(),
                epochs: std::ptr::null_mut(),
                parity: 0,
                name: "module variable".into(),
            });
            self.slots.push(Slot::empty());
            self._owned.push(memory);
        }
    }

    fn add_arguments(&mut self, memories: &mut [Memory], args: &[Argument<'_>]) -> Result<(), LaunchError> {
        let kernel = self.kernel;
        let (expected, found) = (kernel.parameters.len(), args.len());
        if expected != found {
            return Err(LaunchError::ArgumentCount { kernel: kernel.name.clone(), expected, found });
        }
        for (index, (parameter, arg)) in kernel.parameters.iter().zip(args).enumerate() {
            let bytes: Vec<u8> = match arg {
                Argument::Window(window) => self.add_window(memories, window)?.to_le_bytes().into(),
                Argument::Null => 0u64.to_le_bytes().into(),
                Argument::U32(v) => v.to_le_bytes().into(),
                Argument::U64(v) => v.to_le_bytes().into(),
                Argument::F32(v) => v.to_le_bytes().into(),
                Argument::Bytes(bytes) => bytes.to_vec(),
                Argument::Table { bytes, windows } => self.table(memories, bytes, windows)?,
                Argument::TensorMap(map) => {
                    self.add_map(memories, map, parameter.offset)?;
                    vec![0; 128]
                }
            };
            if bytes.len() as u32 != parameter.size {
                return Err(LaunchError::ArgumentSize {
                    kernel: kernel.name.clone(),
                    index,
                    expected: parameter.size,
                    found: bytes.len() as u32,
                });
            }
            self.params[parameter.offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        Ok(())
    }

    /// The bytes of a table whose windows have slots.
    fn table(
        &mut self,
        memories: &mut [Memory],
        bytes: &[u8],
        windows: &[(usize, Window<'_>)],
    ) -> Result<Vec<u8>, LaunchError> {
        let mut table = bytes.to_vec();
        for (at, window) in windows {
            let pointer = self.add_window(memories, window)?.to_le_bytes();
            let Some(place) = table.get_mut(*at..at + pointer.len()) else {
                let why = format!("a pointer at byte {at} does not fit a table of {} bytes", bytes.len());
                return Err(LaunchError::Window { name: window.name.to_string(), why });
            };
            place.copy_from_slice(&pointer);
        }
        Ok(table)
    }

    /// Gives a window its slot; returns the pointer.
    fn add_window(&mut self, memories: &mut [Memory], w: &Window<'_>) -> Result<u64, LaunchError> {
        let refuse = |why: String| LaunchError::Window { name: w.name.to_string(), why };
        let Some(memory) = memories.get_mut(w.memory.0) else {
            return Err(refuse(format!("there is no memory {}", w.memory.0)));
        };
        if w.start.checked_add(w.len).is_none_or(|end| end > memory.len()) {
            return Err(refuse(format!(
                "{} bytes from {} do not fit a memory of {} bytes",
                w.len,
                w.start,
                memory.len()
            )));
        }
        if w.len >= u32::MAX as usize - 512 || w.offset > w.len {
            return Err(refuse("windows have less than 4 GiB and point into themselves".to_string()));
        }
        let (base, written) = memory.pointers();
        let of = |all: &mut Vec<Vec<u32>>| match all.get_mut(w.memory.0) {
            // SAFETY: there is one for every two bytes of the memory.
            Some(of_memory) if w.len > 0 => unsafe { of_memory.as_mut_ptr().add(w.start / 2) },
            _ => std::ptr::null_mut(),
        };
        let (owners, epochs) = (of(&mut self.owners), of(&mut self.epochs));
        let low = (w.start % 256) as u64;
        let slot = self.slots.len() as u64;
        self.slots.push(Slot {
            // SAFETY: `start` is within the memory, as just checked.
            base: unsafe { base.add(w.start) },
            // SAFETY: one mark for each byte.
            written: unsafe { written.add(w.start) },
            low,
            len: w.len as u64,
            readable: w.access != Access::Write,
            writable: w.access != Access::Read,
            owners,
            epochs,
            parity: (w.start % 2) as u32,
            name: w.name.to_string(),
        });
        self.slots.push(Slot::empty());
        Ok(slot << 32 | (low + w.offset as u64))
    }

    fn add_map(
        &mut self,
        memories: &mut [Memory],
        map: &TensorMap<'_>,
        parameter: u32,
    ) -> Result<(), LaunchError> {
        check_map(map).map_err(|why| LaunchError::Window { name: map.window.name.to_string(), why })?;
        let origin = self.add_window(memories, &map.window)?;
        if origin % 16 != 0 {
            let why = "a tensor map needs a 16-byte aligned address".to_string();
            return Err(LaunchError::Window { name: map.window.name.to_string(), why });
        }
        self.maps.push(Map {
            parameter,
            origin,
            element: map.element,
            format: map.format,
            extents: map.extents.clone(),
            strides: map.strides.clone(),
            tile: map.tile.clone(),
            swizzle: map.swizzle,
        });
        Ok(())
    }

    /// The bytes at a global address, if `size` of them are within a window and the address is aligned to `align`.
    #[inline(always)]
    pub(crate) fn find(&self, address: u64, size: u64, align: u64, write: bool) -> Option<Bytes> {
        let slot = self.slots.get((address >> 32) as usize)?;
        let offset = (address & 0xffff_ffff).wrapping_sub(slot.low);
        let inside = offset <= slot.len && size <= slot.len - offset;
        if !inside || address & (align - 1) != 0 || !slot.allows(write) {
            return None;
        }
        Some(slot.at(offset as u32))
    }

    /// [`find`](Self::find) for several lanes with a size each: their window and where in it they are, if it is
    /// one that admits all.
    #[inline(always)]
    pub(crate) fn find_lanes(
        &self,
        addresses: &Row<u64>,
        active: u32,
        sizes: &Row<u32>,
        align: u32,
        write: bool,
    ) -> Option<(&Slot, Row<u32>)> {
        let number = addresses[active.trailing_zeros() as usize & 31] >> 32;
        let slot = self.slots.get(number as usize).filter(|slot| slot.allows(write))?;
        let (low, len) = (slot.low as u32, slot.len as u32);
        let (mut offsets, mut refused) = ([0; LANES], 0);
        for l in 0..LANES {
            offsets[l] = (addresses[l] as u32).wrapping_sub(low);
            let outside = offsets[l] > len || sizes[l] > len.wrapping_sub(offsets[l]);
            let elsewhere = addresses[l] >> 32 != number || addresses[l] as u32 & (align - 1) != 0;
            refused |= u32::from(outside | elsewhere) << l;
        }
        (refused & active == 0).then_some((slot, offsets))
    }

    /// Why [`find`](Self::find) refused.
    pub(crate) fn refusal(&self, address: u64, size: u64, align: u64, write: bool) -> (FindingKind, String) {
        let verb = if write { "write" } else { "read" };
        let Some(slot) = self.slots.get((address >> 32) as usize).filter(|s| !s.name.is_empty()) else {
            return (FindingKind::OutOfBounds, format!("{verb} of {size} bytes where no operand lies"));
        };
        let offset = (address & 0xffff_ffff).wrapping_sub(slot.low);
        if offset > slot.len || size > slot.len - offset {
            let why = format!("{verb} of {size} bytes, the operand has {}", slot.len);
            (FindingKind::OutOfBounds, why)
        } else if address & (align - 1) != 0 {
            (FindingKind::Misaligned, format!("{verb} of {size} bytes at no multiple of {align}"))
        } else {
            (FindingKind::Access, format!("{verb}, but the launch declares the operand otherwise"))
        }
    }

    /// The operand and byte of a global address; an address in a guard slot counts from the nearer neighbour.
    pub(crate) fn place(&self, address: u64) -> Place {
        let at = |slot: u64| self.slots.get(slot as usize).filter(|s| !s.name.is_empty());
        let slot = address >> 32;
        let near =
            if address as u32 > u32::MAX / 2 { [slot + 1, slot - 1] } else { [slot.max(1) - 1, slot + 1] };
        for s in [slot, near[0], near[1]] {
            if let Some(found) = at(s) {
                let start = s << 32 | found.low;
                let offset = address.wrapping_sub(start) as i64;
                return Place::Operand { name: found.name.clone(), offset };
            }
        }
        Place::Global(address)
    }

    /// Keeps a finding unless its check is off; repeats at a line only count.
    pub(crate) fn report(
        &self,
        kind: FindingKind,
        pc: u32,
        cta: [u32; 3],
        thread: u32,
        place: Place,
        message: String,
    ) {
        if !self.checks.has(kind) {
            return;
        }
        let line = self.kernel.code[pc as usize].line;
        let mut findings = self.findings.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(&known) = findings.index.get(&(kind, line)) {
            if let Some(f) = findings.list.get_mut(known) {
                f.count += 1;
            }
            return;
        }
        let next = findings.list.len();
        findings.index.insert((kind, line), next);
        if next < self.options.max_findings {
            findings.list.push(Finding {
                kind,
                kernel: self.kernel.name.clone(),
                file: self.kernel.file.clone(),
                line,
                source: self.kernel.source(pc),
                cta,
                thread,
                place,
                message,
                count: 1,
            });
        }
    }

    /// The findings, by line.
    pub(crate) fn into_findings(self) -> Vec<Finding> {
        let mut list = self.findings.into_inner().unwrap_or_else(|e| e.into_inner()).list;
        list.sort_by_key(|f| (f.line, f.kind));
        list
    }

    /// The seed of a shuffled schedule.
    pub(crate) fn seed(&self) -> Option<u64> {
        match self.options.schedule.order {
            Order::Shuffled(seed) => Some(seed),
            _ => None,
        }
    }
}

impl Slot {
    #[inline(always)]
    fn allows(&self, write: bool) -> bool {
        if write { self.writable } else { self.readable }
    }

    /// The bytes from an offset on that was checked against the length.
    #[inline(always)]
    pub(crate) fn at(&self, offset: u32) -> Bytes {
        let granule = (offset as usize + self.parity as usize) / 2;
        Bytes {
            data: self.base.wrapping_add(offset as usize),
            written: self.written.wrapping_add(offset as usize),
            owners: if self.owners.is_null() { self.owners } else { self.owners.wrapping_add(granule) },
            epochs: if self.epochs.is_null() { self.epochs } else { self.epochs.wrapping_add(granule) },
            parity: (offset + self.parity) % 2,
        }
    }

    fn empty() -> Self {
        Self {
            base: std::ptr::null_mut(),
            written: std::ptr::null_mut(),
            low: 0,
            len: 0,
            readable: false,
            writable: false,
            owners: std::ptr::null_mut(),
            epochs: std::ptr::null_mut(),
            parity: 0,
            name: String::new(),
        }
    }
}

/// The address of the module variable of this position.
pub(crate) fn global_address(index: usize) -> u64 {
    ((FIRST_SLOT + 2 * index) as u64) << 32
}

fn check_shape(launch: &Launch<'_>) -> Result<(), LaunchError> {
    let kernel = launch.kernel;
    let refuse = |why: String| Err(LaunchError::Shape { kernel: kernel.name.clone(), why });
    for (name, extents) in [("grid", launch.grid), ("block", launch.block), ("cluster", launch.cluster)] {
        if extents.contains(&0) {
            return refuse(format!("the {name} {extents:?} has an extent of zero"));
        }
    }
    let threads = launch.block.iter().try_fold(1u32, |n, e| n.checked_mul(*e)).unwrap_or(u32::MAX);
    let limit = kernel.max_threads.map_or(1024, |m| m.iter().product::<u32>()).min(1024);
    if threads > limit {
        return Err(LaunchError::BlockTooLarge { kernel: kernel.name.clone(), threads, limit });
    }
    if kernel.exact_threads && Some(launch.block) != kernel.max_threads {
        return refuse(format!(
            "needs a block of exactly {:?} threads",
            kernel.max_threads.unwrap_or_default()
        ));
    }
    if kernel.cluster.is_some_and(|c| c != launch.cluster) {
        return refuse(format!("needs a cluster of exactly {:?} blocks", kernel.cluster.unwrap_or_default()));
    }
    if (0..3).any(|d| !launch.grid[d].is_multiple_of(launch.cluster[d])) {
        return refuse(format!("clusters of {:?} do not divide a grid of {:?}", launch.cluster, launch.grid));
    }
    if launch.cluster.iter().product::<u32>() > 16 {
        return refuse("a cluster has at most 16 blocks".to_string());
    }
    if launch.grid.iter().try_fold(1u32, |n, e| n.checked_mul(*e)).is_none() {
        return refuse("the grid has 2^32 blocks or more".to_string());
    }
    Ok(())
}

/// The rules of `cuTensorMapEncodeTiled`, as far as they concern what is simulated.
fn check_map(map: &TensorMap<'_>) -> Result<(), String> {
    let rank = map.extents.len();
    if !(1..=5).contains(&rank) || map.strides.len() != rank - 1 || map.tile.len() != rank {
        return Err("a tensor map has 1 to 5 extents, as many tile extents and one stride less".to_string());
    }
    if ![1, 2, 4, 8].contains(&map.element) {
        return Err(format!("elements of {} bytes", map.element));
    }
    if let Some(s) = map.strides.iter().find(|s| **s % 16 != 0 || **s >= 1 << 40) {
        return Err(format!("stride {s} is no multiple of 16 below 2^40"));
    }
    if map.tile.iter().any(|t| !(1..=256).contains(t)) {
        return Err(format!("tile {:?} has an extent outside 1 to 256", map.tile));
    }
    if map.extents.iter().any(|e| *e == 0 || *e > 1 << 32) {
        return Err(format!("extents {:?} outside 1 to 2^32", map.extents));
    }
    let inner = map.tile[0] * map.element;
    if !inner.is_multiple_of(16) {
        return Err(format!("the innermost tile extent has {inner} bytes, no multiple of 16"));
    }
    let span = map.swizzle.span();
    if span != 0 && inner > span {
        return Err(format!(
            "the innermost tile extent has {inner} bytes, more than the swizzle span {span}"
        ));
    }
    Ok(())
}
