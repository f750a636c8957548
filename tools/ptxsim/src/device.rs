//! The simulator as a device: the plans that a GPU would run, launch by launch, with every check.
//!
//! Each operand of a launch is a window of its own. What a step only reads must not be written; a result and
//! a scratch buffer hold nothing when the step begins (their bytes are NaN patterns that count as never
//! written), and every byte of a result must be written when it ends. A finding fails the run.
use crate::{
    Access, Argument, Counters, Finding, Format, MemoryId, Options, Swizzle, TensorMap, Window, simulate,
};
use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};
use transfusion_core::{
    device::{
        Device, Place, PlanId,
        ledger::Ledger,
        resolve::{self, Call, Command, Library, Located, Places, TENSOR_MAP},
    },
    error::{Error, Result},
    launch::{Geometry, Launch, Operand, Target},
    plan::{Plan, Segment, Slot, Step},
    tensor::{Host, View, ViewMut},
};
use transfusion_ptx::{Kind, Module as Text, Param};

/// Findings that an error spells out.
const SPELLED_OUT: usize = 8;

/// How a [`SimDevice`] works.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// The GPU that launches are made for.
    pub target: Target,
    /// Schedule, checks, host threads.
    pub simulation: Options,
    /// Kernels that stand in for shipped ones of the same names.
    pub kernels: Vec<Text>,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self { target: Target::A100, simulation: Options::default(), kernels: Vec::new() }
    }
}

/// A simulated GPU.
pub struct SimDevice {
    options: SimOptions,
    library: Library,
    modules: HashMap<(String, String), crate::Module>,
    ledger: Ledger<crate::Memory>,
    counters: BTreeMap<String, Counters>,
}

impl std::fmt::Debug for SimDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimDevice").field("options", &self.options).finish_non_exhaustive()
    }
}

impl SimDevice {
    /// A simulated GPU without plans.
    ///
    /// # Errors
    /// If a kernel of the options is no PTX.
    pub fn new(options: SimOptions) -> Result<SimDevice> {
        let library = Library::new(options.target.arch, options.kernels.clone())?;
        Ok(SimDevice {
            options,
            library,
            modules: HashMap::new(),
            ledger: Ledger::default(),
            counters: BTreeMap::new(),
        })
    }

    /// What the launches so far did, by kernel.
    pub fn counters(&self) -> &BTreeMap<String, Counters> {
        &self.counters
    }

    /// The same, which then begin anew.
    pub fn take_counters(&mut self) -> BTreeMap<String, Counters> {
        std::mem::take(&mut self.counters)
    }

    /// Decodes the kernels of a plan that are not there yet.
    fn load(&mut self, plan: &Plan) -> Result<()> {
        resolve::check(plan, &self.options.target, &self.library)?;
        for kernel in entries(plan).filter_map(|entry| self.library.find(entry)) {
            let text = &kernel.module;
            let key = (text.arch.to_string(), text.stem.to_string());
            if let Entry::Vacant(room) = self.modules.entry(key) {
                let file = format!("{}/{}.ptx", text.arch, text.stem);
                let module = crate::Module::load(&file, &text.text);
                room.insert(module.map_err(|e| Error::Device(e.to_string()))?);
            }
        }
        Ok(())
    }

    fn step(&mut self, id: PlanId, step: &Step) -> Result<()> {
        let mut held = Held::default();
        for slot in step.ins.iter().chain(&step.outs).chain(&step.scratch) {
            held.take(&mut self.ledger, id, slot.segment)?;
        }
        let result = self.step_on(step, &mut held);
        held.give_back(&mut self.ledger, id)?;
        result
    }

    fn step_on(&mut self, step: &Step, held: &mut Held) -> Result<()> {
        let fresh = fresh(step);
        fresh.iter().for_each(|(_, slot)| held.poison(slot));
        let mut places = Table { segments: &held.segments, maps: Vec::new() };
        let commands = resolve::commands(step, &self.options.target, &self.library, &mut places)?;
        let maps = places.maps;
        if commands.is_empty() {
            return Ok(());
        }
        for command in &commands {
            match command {
                Command::Fill { what, byte } => held.fill(what, *byte),
                Command::Copy { from, to } => held.copy(from, to),
                Command::Kernel(call) => {
                    let outcome =
                        launch(&self.modules, &self.options, step, call, &maps, &mut held.memories)?;
                    let name = &outcome.counters.kernel;
                    let none = || Counters { kernel: name.clone(), ..Counters::default() };
                    self.counters.entry(name.clone()).or_insert_with(none).add(&outcome.counters);
                    if !outcome.findings.is_empty() {
                        return Err(found(step, &outcome.findings));
                    }
                }
            }
        }
        let left = fresh.iter().filter(|(name, _)| name.starts_with("out"));
        for (name, slot) in left {
            if let Some(byte) = held.unwritten(slot) {
                let (op, at) = (step.op.name(), step.at);
                return Err(Error::Device(format!("{at}: {op} leaves byte {byte} of {name} unwritten")));
            }
        }
        Ok(())
    }
}

/// The entry points that a plan launches.
fn entries(plan: &Plan) -> impl Iterator<Item = &str> {
    plan.steps.iter().flat_map(|s| &s.launches).filter_map(|l| match l {
        Launch::Kernel { entry, .. } => Some(entry.as_str()),
        _ => None,
    })
}

/// What holds nothing when a step begins: results that are not updated in place, and scratch buffers.
fn fresh(step: &Step) -> Vec<(String, Slot)> {
    let outs = step.outs.iter().enumerate().filter(|(o, _)| step.is_fresh(*o));
    let outs = outs.map(|(i, slot)| (name(Operand::Out(i)), *slot));
    outs.chain(step.scratch.iter().enumerate().map(|(i, slot)| (name(Operand::Scratch(i)), *slot))).collect()
}

/// How findings call an operand.
fn name(operand: Operand) -> String {
    match operand {
        Operand::In(i) => format!("in {i}"),
        Operand::Out(i) => format!("out {i}"),
        Operand::Scratch(i) => format!("scratch {i}"),
    }
}

fn found(step: &Step, findings: &[Finding]) -> Error {
    let mut text = format!("{}: {} has faults:", step.at, step.op.name());
    findings.iter().take(SPELLED_OUT).for_each(|f| text.push_str(&format!("\n  {f}")));
    if findings.len() > SPELLED_OUT {
        text.push_str(&format!("\n  and {} more", findings.len() - SPELLED_OUT));
    }
    Error::Device(text)
}

/// Runs one kernel.
fn launch(
    modules: &HashMap<(String, String), crate::Module>,
    options: &SimOptions,
    step: &Step,
    call: &Call<'_>,
    maps: &[Geometry],
    memories: &mut [crate::Memory],
) -> Result<crate::Outcome> {
    let (text, entry) = (&call.kernel.module, &call.kernel.entry);
    let refused =
        |why: String| Error::Launch { op: step.op.name(), at: step.at, entry: entry.name.clone(), why };
    let module = modules.get(&(text.arch.to_string(), text.stem.to_string()));
    let module = module.ok_or_else(|| refused("its module is not loaded".into()))?;
    let names: Vec<String> = call.operands.iter().map(|(_, at)| name(at.operand)).collect();
    let mut args = Vec::with_capacity(entry.params.len());
    for (i, param) in entry.params.iter().enumerate() {
        let range = param.offset as usize..(param.offset + param.size) as usize;
        let bytes = &call.params[range.clone()];
        let mut windows = call.operands.iter().zip(&names).filter(|((byte, _), _)| range.contains(byte));
        args.push(match windows.next() {
            None => Argument::Bytes(bytes),
            Some(((_, at), name)) if is_map(param) => {
                let map = usize::try_from(word(bytes)).ok().and_then(|i| maps.get(i));
                let map = map.ok_or_else(|| refused(format!("argument {i} is no tensor map")))?;
                Argument::TensorMap(tensor_map(window(at, name, map.offset), map))
            }
            Some(first) if param.kind == Kind::Bytes => {
                let all = std::iter::once(first).chain(windows);
                let windows = all.map(|((byte, at), name)| pointer(bytes, byte - range.start, at, name));
                Argument::Table { bytes, windows: windows.collect() }
            }
            Some(((_, at), name)) => Argument::Window(pointer(bytes, 0, at, name).1),
        });
    }
    let kernel = module.kernel(&entry.name).map_err(|e| refused(e.to_string()))?;
    let launch = crate::Launch {
        kernel,
        grid: call.grid,
        block: call.block,
        cluster: call.cluster,
        shared: call.shared,
        cooperative: false,
        args: &args,
    };
    simulate(memories, &launch, &options.simulation).map_err(|e| refused(e.to_string()))
}

/// Whether a parameter is a tensor map; a table is aligned to less.
fn is_map(param: &Param) -> bool {
    param.kind == Kind::Bytes && param.align >= 64
}

/// The pointer at byte `byte` of a parameter.
fn pointer<'a>(bytes: &[u8], byte: usize, at: &Located, name: &'a str) -> (usize, Window<'a>) {
    (byte, window(at, name, word(&bytes[byte..]) - at.address))
}

/// The first eight bytes of a parameter.
fn word(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
}

fn window<'a>(at: &Located, name: &'a str, offset: u64) -> Window<'a> {
    let (memory, start) = place(at.address);
    let access = match at.operand {
        Operand::In(_) => Access::Read,
        Operand::Out(_) | Operand::Scratch(_) => Access::ReadWrite,
    };
    Window { name, memory, start, len: at.bytes as usize, offset: offset as usize, access }
}

fn tensor_map<'a>(window: Window<'a>, g: &Geometry) -> TensorMap<'a> {
    TensorMap {
        window,
        element: g.element,
        format: if g.element == 2 { Format::Bf16 } else { Format::Float },
        extents: g.extents.clone(),
        strides: g.strides.clone(),
        tile: g.tile.clone(),
        swizzle: match g.swizzle {
            32 => Swizzle::Bytes32,
            64 => Swizzle::Bytes64,
            128 => Swizzle::Bytes128,
            _ => Swizzle::None,
        },
    }
}

/// Bits of an address that count bytes; those above count memories, from 1.
const OFFSET: u32 = 44;

fn place(address: u64) -> (MemoryId, usize) {
    (MemoryId((address >> OFFSET) as usize - 1), (address & ((1 << OFFSET) - 1)) as usize)
}

/// Addresses of the segments that a step touches.
struct Table<'a> {
    segments: &'a [Segment],
    maps: Vec<Geometry>,
}

impl Places for Table<'_> {
    fn address(&mut self, _: Operand, slot: &Slot) -> Result<u64> {
        let i = self.segments.iter().position(|s| *s == slot.segment);
        let i = i.ok_or_else(|| Error::Device(format!("{:?} is not at hand", slot.segment)))?;
        Ok(((i + 1) as u64) << OFFSET | slot.offset as u64)
    }

    /// The position of the geometry in a table: the simulator reads tensor maps as they are said.
    fn tensor_map(&mut self, _: u64, geometry: &Geometry) -> Result<[u8; TENSOR_MAP]> {
        let mut map = [0; TENSOR_MAP];
        map[..8].copy_from_slice(&(self.maps.len() as u64).to_le_bytes());
        self.maps.push(geometry.clone());
        Ok(map)
    }
}

/// The memory that a step touches, lent by the ledger.
#[derive(Default)]
struct Held {
    segments: Vec<Segment>,
    memories: Vec<crate::Memory>,
}

impl Held {
    fn take(&mut self, ledger: &mut Ledger<crate::Memory>, id: PlanId, segment: Segment) -> Result<()> {
        if !self.segments.contains(&segment) {
            let block = ledger.block_mut(id, segment)?;
            self.memories.push(std::mem::replace(block, crate::Memory::new(0)));
            self.segments.push(segment);
        }
        Ok(())
    }

    fn give_back(self, ledger: &mut Ledger<crate::Memory>, id: PlanId) -> Result<()> {
        for (segment, memory) in self.segments.into_iter().zip(self.memories) {
            *ledger.block_mut(id, segment)? = memory;
        }
        Ok(())
    }

    fn of(&mut self, slot: &Slot) -> Option<(&mut crate::Memory, Range<usize>)> {
        let i = self.segments.iter().position(|s| *s == slot.segment)?;
        Some((&mut self.memories[i], slot.offset..slot.offset + slot.spec.bytes()))
    }

    /// NaN patterns that count as never written.
    fn poison(&mut self, slot: &Slot) {
        if let Some((memory, range)) = self.of(slot) {
            memory.bytes_mut()[range.clone()].fill(0xff);
            memory.forget(range);
        }
    }

    /// The first byte of a slot that nothing wrote.
    fn unwritten(&mut self, slot: &Slot) -> Option<usize> {
        let (memory, range) = self.of(slot)?;
        if memory.is_initialised(range.clone()) {
            return None;
        }
        range.clone().position(|byte| !memory.is_initialised(byte..byte + 1))
    }

    fn fill(&mut self, what: &Located, byte: u8) {
        let (memory, start) = place(what.address);
        self.memories[memory.0].write(start, &vec![byte; what.bytes as usize]);
    }

    fn copy(&mut self, from: &Located, to: &Located) {
        let (memory, start) = place(from.address);
        let bytes = self.memories[memory.0].bytes()[start..start + from.bytes as usize].to_vec();
        let (memory, start) = place(to.address);
        self.memories[memory.0].write(start, &bytes);
    }
}

impl Device for SimDevice {
    fn target(&self) -> Option<Target> {
        Some(self.options.target)
    }

    fn open(&mut self, plan: Arc<Plan>) -> Result<PlanId> {
        self.ledger.missing(&plan)?;
        self.load(&plan)?;
        self.ledger.open(plan, |bytes, _| {
            let mut memory = crate::Memory::new(bytes);
            memory.mark(0..bytes);
            Ok(memory)
        })
    }

    fn close(&mut self, plan: PlanId) {
        self.ledger.close(plan);
    }

    fn write(&mut self, at: Place<'_>, data: View<'_>) -> Result<()> {
        let (memory, offset) = self.ledger.target(at, data.dtype(), data.len())?;
        memory.write(offset, data.bytes());
        Ok(())
    }

    fn read(&mut self, at: Place<'_>, mut into: ViewMut<'_>) -> Result<()> {
        let (memory, offset) = self.ledger.source(at, into.dtype(), into.len())?;
        let bytes = into.bytes();
        bytes.copy_from_slice(&memory.bytes()[offset..offset + bytes.len()]);
        Ok(())
    }

    fn fetch(&mut self, at: Place<'_>) -> Result<Host> {
        let mut host = Host::zeros(self.ledger.find(at)?.2);
        self.read(at, host.view_mut())?;
        Ok(host)
    }

    fn run(&mut self, plan: PlanId) -> Result<()> {
        self.profile(plan).map(drop)
    }

    /// Times the simulation, which says nothing about a GPU.
    fn profile(&mut self, id: PlanId) -> Result<Vec<Duration>> {
        let plan = self.ledger.plan(id)?.clone();
        let each = plan.steps.iter().map(|step| {
            let start = Instant::now();
            self.step(id, step).map(|()| start.elapsed())
        });
        each.collect()
    }
}
