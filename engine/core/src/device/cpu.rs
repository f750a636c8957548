//! Runs each op's `eval` over the planned memory: the same places and the same rounding points as a
//! GPU has.
use super::{Device, Place, PlanId};
use crate::{
    cpu::Cpu,
    error::{Error, Result},
    op::Kind,
    plan::{Plan, Segment, Slot, Step},
    tensor::{DType, Host, In, Out, Spec, View, ViewMut},
};
use half::bf16;
use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Most operands that an op may have.
const OPERANDS: usize = 16;

/// How a [`CpuDevice`] works.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Threads; 0 means one for each core.
    pub threads: usize,
    /// Fills every output with NaN patterns before its op runs, and the whole arena before a run,
    /// so that a read of something nothing wrote shows.
    pub poison: bool,
}

/// The CPU as a device.
#[derive(Debug)]
pub struct CpuDevice {
    cpu: Cpu,
    pool: rayon::ThreadPool,
    poison: bool,
    states: HashMap<(Kind, String), usize>,
    blocks: Vec<(Spec, Block)>,
    plans: Vec<Option<Opened>>,
    scratch: Block,
    staging: Block,
}

#[derive(Debug)]
struct Opened {
    plan: Arc<Plan>,
    /// Which block each state of the plan is.
    blocks: Vec<usize>,
    inputs: Block,
}

/// Zeroed memory, 64-byte aligned.
#[derive(Debug, Default)]
struct Block(Vec<Line>);

#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u64; 8]);

impl Block {
    fn new(bytes: usize, what: &str) -> Result<Block> {
        let mut lines = Vec::new();
        let n = bytes.div_ceil(64);
        lines.try_reserve_exact(n).map_err(|_| Error::Memory { need: bytes as u64, what: what.into() })?;
        lines.resize(n, Line([0; 8]));
        Ok(Block(lines))
    }
    /// A larger one, where this one is too small.
    fn grown(&self, bytes: usize, what: &str) -> Result<Option<Block>> {
        (self.0.len() * 64 < bytes).then(|| Block::new(bytes, what)).transpose()
    }
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

impl CpuDevice {
    /// A device with threads of its own.
    ///
    /// # Errors
    /// If the threads cannot be started.
    pub fn new(options: CpuOptions) -> Result<CpuDevice> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|i| format!("transfusion-cpu-{i}"))
            .build()
            .map_err(|e| Error::Device(format!("cannot start CPU threads: {e}")))?;
        Ok(CpuDevice {
            cpu: Cpu::default(),
            pool,
            poison: options.poison,
            states: HashMap::new(),
            blocks: Vec::new(),
            plans: Vec::new(),
            scratch: Block::default(),
            staging: Block::default(),
        })
    }

    /// How many threads it uses.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    fn opened(&self, plan: PlanId) -> Result<&Opened> {
        self.plans.get(plan.0).and_then(Option::as_ref).ok_or_else(|| Error::Place {
            what: format!("plan {}", plan.0),
            why: "it is not open on this device".into(),
        })
    }

    /// The block, byte offset and type of a place.
    fn find(&self, at: Place<'_>) -> Result<(&Block, usize, Spec)> {
        let missing = |why: &str| Error::Place { what: format!("{at:?}"), why: why.into() };
        let slot_of = |opened: &Opened, slot: Option<Slot>| {
            let slot = slot.ok_or_else(|| missing("the plan has no such name"))?;
            Ok::<_, Error>((slot, opened.blocks.clone()))
        };
        let (slot, blocks, inputs) = match at {
            Place::State(kind, name) => {
                let i = self.states.get(&(kind, name.to_string()));
                let (spec, block) = &self.blocks[*i.ok_or_else(|| missing("no plan has named it"))?];
                return Ok((block, 0, *spec));
            }
            Place::Input(id, name) => {
                let o = self.opened(id)?;
                let (slot, blocks) = slot_of(o, o.plan.input(name))?;
                (slot, blocks, &o.inputs)
            }
            Place::Output(id, name) => {
                let o = self.opened(id)?;
                let (slot, blocks) = slot_of(o, o.plan.output(name))?;
                (slot, blocks, &o.inputs)
            }
        };
        let block = match slot.segment {
            Segment::State(i) => &self.blocks[blocks[i]].1,
            Segment::Input => inputs,
            Segment::Scratch => &self.scratch,
        };
        Ok((block, slot.offset, slot.spec))
    }

    fn find_mut(&mut self, at: Place<'_>) -> Result<(&mut Block, usize, Spec)> {
        let (_, offset, spec) = self.find(at)?;
        let block = match at {
            Place::State(kind, name) => {
                let i = self.states[&(kind, name.to_string())];
                &mut self.blocks[i].1
            }
            Place::Input(id, _) => match self.plans[id.0].as_mut() {
                Some(o) => &mut o.inputs,
                None => return Err(Error::Device("the plan is closed".into())),
            },
            Place::Output(..) => {
                return Err(Error::Place { what: format!("{at:?}"), why: "outputs are read-only".into() });
            }
        };
        Ok((block, offset, spec))
    }

    fn execute(&mut self, id: PlanId, mut time: Option<&mut Vec<Duration>>) -> Result<()> {
        self.opened(id)?;
        let CpuDevice { cpu, pool, poison, blocks, plans, scratch, staging, .. } = self;
        let Some(opened) = plans[id.0].as_mut() else { return Ok(()) };
        if *poison {
            scratch.bytes_mut().fill(0xff);
        }
        let mut base = Bases {
            states: Vec::new(),
            inputs: opened.inputs.bytes_mut().as_mut_ptr(),
            scratch: scratch.bytes_mut().as_mut_ptr(),
        };
        base.states.extend(opened.blocks.iter().map(|&b| blocks[b].1.bytes_mut().as_mut_ptr()));
        let staging = bytemuck::cast_slice_mut::<Line, f32>(&mut staging.0);
        pool.install(|| {
            awake(|| {
                for step in &opened.plan.steps {
                    let start = Instant::now();
                    run_step(step, &base, staging, cpu, *poison);
                    if let Some(time) = time.as_deref_mut() {
                        time.push(start.elapsed());
                    }
                }
            });
        });
        Ok(())
    }
}

impl Device for CpuDevice {
    fn open(&mut self, plan: Arc<Plan>) -> Result<PlanId> {
        check(&plan)?;
        // Whatever can fail comes before the first change of the device.
        let mut used = Vec::with_capacity(plan.states.len());
        let mut fresh = Vec::new();
        for s in &plan.states {
            let block = match self.states.get(&(s.kind, s.name.clone())) {
                Some(&i) if self.blocks[i].0 == s.spec => i,
                Some(&i) => {
                    let (kind, name, have) = (s.kind, s.name.clone(), self.blocks[i].0);
                    let (have, want) = (Box::new(have), Box::new(s.spec));
                    return Err(Error::StateClash { kind, name, have, want });
                }
                None => {
                    fresh.push((s, Block::new(s.spec.bytes(), &s.name)?));
                    self.blocks.len() + fresh.len() - 1
                }
            };
            used.push(block);
        }
        let scratch = self.scratch.grown(plan.scratch_bytes, "the scratch arena")?;
        let staging = plan.steps.iter().map(staged_bytes).max().unwrap_or(0);
        let staging = self.staging.grown(staging, "the bf16 staging buffer")?;
        let inputs = Block::new(plan.input_bytes, "the inputs of a plan")?;
        for (s, block) in fresh {
            self.states.insert((s.kind, s.name.clone()), self.blocks.len());
            self.blocks.push((s.spec, block));
        }
        self.scratch = scratch.unwrap_or(std::mem::take(&mut self.scratch));
        self.staging = staging.unwrap_or(std::mem::take(&mut self.staging));
        self.plans.push(Some(Opened { plan, blocks: used, inputs }));
        Ok(PlanId(self.plans.len() - 1))
    }

    fn close(&mut self, plan: PlanId) {
        if let Some(p) = self.plans.get_mut(plan.0) {
            *p = None;
        }
        let named: HashSet<usize> = self.plans.iter().flatten().flat_map(|p| p.blocks.clone()).collect();
        let blocks = &mut self.blocks;
        self.states.retain(|(kind, _), i| {
            let stays = *kind != Kind::Cache || named.contains(i);
            if !stays {
                blocks[*i].1 = Block::default();
            }
            stays
        });
    }

    fn write(&mut self, at: Place<'_>, data: View<'_>) -> Result<()> {
        let (block, offset, spec) = self.find_mut(at)?;
        fits(at, spec, data.dtype(), data.len())?;
        block.bytes_mut()[offset..offset + spec.bytes()].copy_from_slice(data.bytes());
        Ok(())
    }

    fn read(&mut self, at: Place<'_>, mut into: ViewMut<'_>) -> Result<()> {
        let (block, offset, spec) = self.find(at)?;
        fits(at, spec, into.dtype(), into.len())?;
        into.bytes().copy_from_slice(&block.bytes()[offset..offset + spec.bytes()]);
        Ok(())
    }

    fn fetch(&mut self, at: Place<'_>) -> Result<Host> {
        let (_, _, spec) = self.find(at)?;
        let mut host = Host::zeros(spec);
        self.read(at, host.view_mut())?;
        Ok(host)
    }

    fn run(&mut self, plan: PlanId) -> Result<()> {
        self.execute(plan, None)
    }

    fn profile(&mut self, plan: PlanId) -> Result<Vec<Duration>> {
        let mut time = Vec::new();
        self.execute(plan, Some(&mut time))?;
        Ok(time)
    }
}

/// Runs `f` while the other threads of this pool look for work without ever falling asleep: to wake a
/// thread takes as long as a small op.
fn awake<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    /// How often a thread that finds nothing looks again before it offers its processor to others.
    const LOOKS: u32 = 4096;
    struct Done<'a>(&'a AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Relaxed);
        }
    }
    let (started, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    let others = rayon::current_num_threads() - 1;
    // A thread that looked for work before every watch has a thread might take up a second watch; so
    // might the thread of `f` while it waits for a part of its own work, and never return.
    let wait = || {
        while started.load(Relaxed) < others {
            std::thread::yield_now();
        }
    };
    let watch = || {
        started.fetch_add(1, Relaxed);
        wait();
        let mut idle = 0;
        while !done.load(Relaxed) {
            match rayon::yield_now() {
                Some(rayon::Yield::Executed) => idle = 0,
                _ if idle < LOOKS => {
                    idle += 1;
                    std::hint::spin_loop();
                }
                _ => std::thread::yield_now(),
            }
        }
    };
    rayon::scope(|s| {
        (0..others).for_each(|_| s.spawn(|_| watch()));
        wait();
        let _done = Done(&done);
        f()
    })
}

fn fits(at: Place<'_>, spec: Spec, dtype: DType, len: usize) -> Result<()> {
    if spec.dtype == dtype && spec.shape.numel() == len {
        return Ok(());
    }
    let why = format!("it is {spec:?}, the data are {len} elements of {}", dtype.name());
    Err(Error::Place { what: format!("{at:?}"), why })
}

/// Bytes of f32 that the bf16 operands of a step take when decoded.
fn staged_bytes(step: &Step) -> usize {
    let of = |s: &Slot| {
        if s.spec.dtype == DType::Bf16 { (s.spec.shape.numel() * 4).next_multiple_of(64) } else { 0 }
    };
    step.ins.iter().chain(&step.outs).map(of).sum()
}

/// What makes [`run_step`] sound, checked once per plan: every slot lies inside its segment, aligned,
/// and no output overlaps another operand, but for the input that it replaces or renames.
fn check(plan: &Plan) -> Result<()> {
    let size = |segment| match segment {
        Segment::State(i) => plan.states.get(i).map_or(0, |s| s.spec.bytes()),
        Segment::Input => plan.input_bytes,
        Segment::Scratch => plan.scratch_bytes,
    };
    let bytes = |s: &Slot| s.offset..s.offset + s.spec.bytes();
    let overlap = |a: &Slot, b: &Slot| {
        let (x, y) = (bytes(a), bytes(b));
        a.segment == b.segment && x.start < y.end && y.start < x.end
    };
    for (i, step) in plan.steps.iter().enumerate() {
        let fail =
            |why: &str| Err(Error::Device(format!("faulty plan: step {i}, {}: {why}", step.op.name())));
        if step.ins.len() > OPERANDS || step.outs.len() > OPERANDS {
            return fail("too many operands");
        }
        for s in step.ins.iter().chain(&step.outs) {
            if bytes(s).end > size(s.segment) || s.offset % s.spec.dtype.size() != 0 {
                return fail("an operand lies outside its segment or is misaligned");
            }
        }
        if step.is_view() {
            continue;
        }
        for (o, out) in step.outs.iter().enumerate() {
            let source = replaced(step, o);
            let others = step.outs.iter().enumerate().filter(|(p, _)| *p != o).map(|(_, s)| s);
            let ins = step.ins.iter().enumerate().filter(|(p, _)| Some(*p) != source).map(|(_, s)| s);
            if others.chain(ins).any(|s| overlap(out, s)) {
                return fail("an output overlaps another operand");
            }
        }
    }
    Ok(())
}

/// The input that output `o` replaces.
fn replaced(step: &Step, o: usize) -> Option<usize> {
    match step.op.memory(o) {
        crate::op::Memory::InPlace { input } => Some(input),
        _ => None,
    }
}

/// Where the segments begin.
struct Bases {
    states: Vec<*mut u8>,
    inputs: *mut u8,
    scratch: *mut u8,
}

// SAFETY: the pointers are derived from exclusive borrows that outlive the run, and one thread at a
// time walks the steps.
#[expect(unsafe_code, reason = "the disjoint borrows of the arena")]
unsafe impl Sync for Bases {}

impl Bases {
    fn at(&self, slot: &Slot) -> *mut u8 {
        let base = match slot.segment {
            Segment::State(i) => self.states[i],
            Segment::Input => self.inputs,
            Segment::Scratch => self.scratch,
        };
        base.wrapping_add(slot.offset)
    }
}

fn run_step(step: &Step, base: &Bases, staging: &mut [f32], cpu: &Cpu, poison: bool) {
    if step.is_view() {
        return;
    }
    let mut free = staging;
    let mut ins = [In { shape: [0].into(), data: View::U8(&[]) }; OPERANDS];
    let mut outs: [Out<'_>; OPERANDS] =
        std::array::from_fn(|_| Out { shape: [0].into(), data: ViewMut::U8(&mut []) });
    for (i, slot) in step.ins.iter().enumerate() {
        let in_place = (0..step.outs.len()).any(|o| replaced(step, o) == Some(i));
        ins[i].shape = slot.spec.shape;
        ins[i].data = match if in_place { empty(slot.spec.dtype) } else { borrow(base, slot) } {
            View::Bf16(v) => View::F32(stage(v, &mut free)),
            view => view,
        };
    }
    for (o, slot) in step.outs.iter().enumerate() {
        let mut view = borrow_mut(base, slot);
        if poison && !step.aliases(o) {
            view.bytes().fill(0xff);
        }
        outs[o].shape = slot.spec.shape;
        outs[o].data = match view {
            ViewMut::Bf16(v) => ViewMut::F32(stage(v, &mut free)),
            view => view,
        };
    }
    step.op.eval(&ins[..step.ins.len()], &mut outs[..step.outs.len()], cpu);
    for (out, slot) in outs.iter().zip(&step.outs) {
        if let (ViewMut::F32(from), ViewMut::Bf16(to)) = (&out.data, borrow_mut(base, slot)) {
            for (to, from) in to.iter_mut().zip(from.iter()) {
                *to = bf16::from_f32(*from);
            }
        }
    }
}

/// Decodes into the next free piece of the staging buffer.
fn stage<'a>(from: &[bf16], free: &mut &'a mut [f32]) -> &'a mut [f32] {
    let (staged, rest) = std::mem::take(free).split_at_mut(from.len().next_multiple_of(16));
    *free = rest;
    let staged = &mut staged[..from.len()];
    for (to, from) in staged.iter_mut().zip(from) {
        *to = from.to_f32();
    }
    staged
}

fn empty<'a>(dtype: DType) -> View<'a> {
    match dtype {
        DType::F64 => View::F64(&[]),
        DType::F32 | DType::Bf16 => View::F32(&[]),
        DType::I32 => View::I32(&[]),
        DType::U8 => View::U8(&[]),
    }
}

#[expect(unsafe_code, reason = "the disjoint borrows of the arena")]
fn borrow<'a>(base: &'a Bases, slot: &Slot) -> View<'a> {
    let (p, n) = (base.at(slot), slot.spec.shape.numel());
    // SAFETY: `check` proved the slot inside its segment and aligned (segments start 64-byte
    // aligned), and disjoint from everything that the step writes; any bytes are valid elements.
    unsafe {
        match slot.spec.dtype {
            DType::F64 => View::F64(std::slice::from_raw_parts(p.cast(), n)),
            DType::F32 => View::F32(std::slice::from_raw_parts(p.cast(), n)),
            DType::Bf16 => View::Bf16(std::slice::from_raw_parts(p.cast(), n)),
            DType::I32 => View::I32(std::slice::from_raw_parts(p.cast(), n)),
            DType::U8 => View::U8(std::slice::from_raw_parts(p.cast(), n)),
        }
    }
}

#[expect(unsafe_code, reason = "the disjoint borrows of the arena")]
fn borrow_mut<'a>(base: &'a Bases, slot: &Slot) -> ViewMut<'a> {
    let (p, n) = (base.at(slot), slot.spec.shape.numel());
    // SAFETY: as in `borrow`; besides, `check` proved that no other operand of the step overlaps it,
    // and the input that it replaces is handed out empty.
    unsafe {
        match slot.spec.dtype {
            DType::F64 => ViewMut::F64(std::slice::from_raw_parts_mut(p.cast(), n)),
            DType::F32 => ViewMut::F32(std::slice::from_raw_parts_mut(p.cast(), n)),
            DType::Bf16 => ViewMut::Bf16(std::slice::from_raw_parts_mut(p.cast(), n)),
            DType::I32 => ViewMut::I32(std::slice::from_raw_parts_mut(p.cast(), n)),
            DType::U8 => ViewMut::U8(std::slice::from_raw_parts_mut(p.cast(), n)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Graph;

    /// `y = x + x` with `x` of `n` numbers and a cache of `cached`.
    fn doubling(n: usize, cached: usize) -> Arc<Plan> {
        let mut g = Graph::new();
        let x = g.input("x", [n], DType::F32);
        let cache = g.state(Kind::Cache, "kept", [cached], DType::F32);
        let y = g.add(x, x);
        g.output("y", y);
        g.output("kept", cache);
        Arc::new(Plan::new(&g).unwrap())
    }

    #[test]
    fn a_plan_without_room_changes_nothing() {
        let mut device = CpuDevice::new(CpuOptions { threads: 1, poison: false }).unwrap();
        let small = device.open(doubling(3, 1)).unwrap();
        device.close(small);
        let small = device.open(doubling(3, 2)).unwrap();
        let huge = device.open(doubling(1 << 45, 2)).unwrap_err();
        assert!(matches!(huge, Error::Memory { .. }), "{huge}");
        let mut other = CpuDevice::new(CpuOptions { threads: 1, poison: false }).unwrap();
        other.open(doubling(1 << 45, 2)).unwrap_err();
        other.open(doubling(3, 5)).unwrap();
        device.write(Place::Input(small, "x"), View::F32(&[1.0, 2.0, 3.0])).unwrap();
        device.run(small).unwrap();
        assert!(
            matches!(device.fetch(Place::Output(small, "y")).unwrap(), Host::F32(y) if y == [2.0, 4.0, 6.0])
        );
    }

    #[test]
    fn every_thread_stays_awake_and_comes_back() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for _ in 0..20 {
                let sum: u64 = pool.install(|| {
                    awake(|| {
                        rayon::iter::ParallelIterator::sum(rayon::iter::IntoParallelIterator::into_par_iter(
                            0..1000u64,
                        ))
                    })
                });
                assert_eq!(sum, 499_500);
            }
            let fall = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.install(|| awake(|| panic!("a step fell")))
            }));
            assert!(fall.is_err());
            assert_eq!(pool.install(|| awake(|| 7)), 7);
        }
    }
}
