//! Runs each op's `eval` over the planned memory: the same places and the same rounding points as a
//! GPU has.
use super::{
    Device, Place, PlanId,
    ledger::{Ledger, replaced},
};
use crate::{
    cpu::{Cpu, most},
    error::{Error, Result},
    plan::{Plan, Segment, Slot, Step},
    tensor::{DType, Host, In, Out, View, ViewMut},
};
use half::bf16;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Most operands that an op may have: those of AdamW, whose steps are few, and of any other.
const OPERANDS: [usize; 2] = [168, 16];

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
    ledger: Ledger<Block>,
    staging: Block,
    /// Of the plan that runs.
    bases: Bases,
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
        lines.try_reserve_exact(n).map_err(|_| Error::Memory {
            need: bytes as u64,
            free: None,
            what: what.into(),
        })?;
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
            ledger: Ledger::default(),
            staging: Block::default(),
            bases: Bases::default(),
        })
    }

    /// Bytes that a device with so many threads takes for the steps of `plans` beside what every device does: what
    /// it decodes bf16 operands into, and what ops work in. Steps take turns, so that the hungriest ones count; those
    /// that have kernels do not.
    pub fn extra_bytes(plans: &[&Plan], threads: usize) -> [usize; 2] {
        let decoded = plans.iter().map(|plan| decoded_bytes(plan)).max();
        let workspace = most(plans.iter().map(|plan| workspace(plan, threads)));
        [decoded.unwrap_or(0), workspace.iter().sum()]
    }

    /// Bytes that ops work in.
    #[cfg(test)]
    pub(crate) fn workspace_bytes(&self) -> usize {
        self.cpu.spare_bytes()
    }

    /// How many threads it uses.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    fn execute(&mut self, id: PlanId, mut time: Option<&mut Vec<Duration>>) -> Result<()> {
        let plan = self.ledger.plan(id)?.clone();
        self.find_bases(id, &plan)?;
        let CpuDevice { cpu, pool, poison, staging, bases, .. } = self;
        let staging = bytemuck::cast_slice_mut::<Line, f32>(&mut staging.0);
        pool.install(|| {
            awake(|| {
                for step in &plan.steps {
                    let start = Instant::now();
                    match operands(step) > OPERANDS[1] {
                        true => run_step::<{ OPERANDS[0] }>(step, bases, staging, cpu, *poison),
                        false => run_step::<{ OPERANDS[1] }>(step, bases, staging, cpu, *poison),
                    }
                    if let Some(time) = time.as_deref_mut() {
                        time.push(start.elapsed());
                    }
                }
            });
        });
        Ok(())
    }

    /// Notes where the segments of a plan begin.
    fn find_bases(&mut self, id: PlanId, plan: &Plan) -> Result<()> {
        let poison = self.poison;
        let mut at = |segment| {
            let bytes = self.ledger.block_mut(id, segment)?.bytes_mut();
            if poison && segment == Segment::Scratch {
                bytes.fill(0xff);
            }
            Ok::<_, Error>(bytes.as_mut_ptr())
        };
        let Bases { states, inputs, scratch } = &mut self.bases;
        states.clear();
        for i in 0..plan.states.len() {
            states.push(at(Segment::State(i))?);
        }
        (*inputs, *scratch) = (at(Segment::Input)?, at(Segment::Scratch)?);
        Ok(())
    }
}

impl Device for CpuDevice {
    fn open(&mut self, plan: Arc<Plan>) -> Result<PlanId> {
        if let Some(s) = plan.steps.iter().find(|s| operands(s) > OPERANDS[0]) {
            return Err(Error::Device(format!("{} has more than {} operands", s.op.name(), OPERANDS[0])));
        }
        self.ledger.missing(&plan)?;
        // A smaller one goes before the plan takes its memory.
        if let Some(larger) = self.staging.grown(decoded_bytes(&plan), "the bf16 staging buffer")? {
            self.staging = larger;
        }
        self.cpu.reserve(&workspace(&plan, self.threads()))?;
        self.ledger.open(plan, Block::new)
    }

    fn close(&mut self, plan: PlanId) {
        self.ledger.close(plan);
    }

    fn write(&mut self, at: Place<'_>, data: View<'_>) -> Result<()> {
        let (block, offset) = self.ledger.target(at, data.dtype(), data.len())?;
        let data = data.bytes();
        block.bytes_mut()[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn read(&mut self, at: Place<'_>, mut into: ViewMut<'_>) -> Result<()> {
        let (block, offset) = self.ledger.source(at, into.dtype(), into.len())?;
        let into = into.bytes();
        into.copy_from_slice(&block.bytes()[offset..offset + into.len()]);
        Ok(())
    }

    fn fetch(&mut self, at: Place<'_>) -> Result<Host> {
        let (_, _, spec) = self.ledger.find(at)?;
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
    beside(others, &watch, || {
        wait();
        let _done = Done(&done);
        f()
    })
}

/// Runs `f`, and `other` on so many more threads; unlike `rayon::scope`, it takes no memory for that.
fn beside<R: Send, F: FnOnce() -> R + Send>(others: usize, other: &(impl Fn() + Sync), f: F) -> R {
    match others {
        0 => f(),
        _ => rayon::join(|| beside(others - 1, other, f), other).0,
    }
}

/// The steps that run here.
fn evaluated(plan: &Plan) -> impl Iterator<Item = &Step> {
    plan.steps.iter().filter(|s| s.launches.is_empty() && !s.is_view())
}

/// Bytes of f32 that the bf16 operands of any step take when decoded.
fn decoded_bytes(plan: &Plan) -> usize {
    evaluated(plan).map(staged_bytes).max().unwrap_or(0)
}

/// Bytes of the buffers that any step borrows at the same time.
fn workspace(plan: &Plan, threads: usize) -> Vec<usize> {
    let specs = |slots: &[Slot]| slots.iter().map(|s| s.spec).collect::<Vec<_>>();
    let all = most(evaluated(plan).map(|s| s.op.workspace(&specs(&s.ins), &specs(&s.outs), threads)));
    all.into_iter().map(|bytes| bytes.next_multiple_of(8)).collect()
}

/// Bytes of f32 that the bf16 operands of a step take when decoded.
fn staged_bytes(step: &Step) -> usize {
    let of = |s: &Slot| {
        if s.spec.dtype == DType::Bf16 { (s.spec.shape.numel() * 4).next_multiple_of(64) } else { 0 }
    };
    let ins = step.ins.iter().enumerate().filter(|(i, _)| !is_replaced(step, *i)).map(|(_, slot)| slot);
    ins.chain(&step.outs).map(of).sum()
}

/// How many operands a step has, of inputs or of outputs.
fn operands(step: &Step) -> usize {
    step.ins.len().max(step.outs.len())
}

/// Whether an output stands in the place of input `i`.
fn is_replaced(step: &Step, i: usize) -> bool {
    (0..step.outs.len()).any(|o| replaced(step, o) == Some(i))
}

/// Where the segments begin.
#[derive(Debug)]
struct Bases {
    states: Vec<*mut u8>,
    inputs: *mut u8,
    scratch: *mut u8,
}

impl Default for Bases {
    fn default() -> Self {
        Bases { states: Vec::new(), inputs: std::ptr::null_mut(), scratch: std::ptr::null_mut() }
    }
}

// SAFETY: the pointers are followed only during a run, at whose begin they are derived from exclusive borrows
// that outlive it, and one thread at a time walks the steps.
#[expect(unsafe_code, reason = "the disjoint borrows of the arena")]
unsafe impl Sync for Bases {}

// SAFETY: as above; between runs they are numbers.
#[expect(unsafe_code, reason = "the disjoint borrows of the arena")]
unsafe impl Send for Bases {}

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

/// Runs a step of up to `N` operands.
fn run_step<const N: usize>(step: &Step, base: &Bases, staging: &mut [f32], cpu: &Cpu, poison: bool) {
    if step.is_view() {
        return;
    }
    let mut free = staging;
    let mut ins = [In { shape: [0].into(), data: View::U8(&[]) }; N];
    let mut outs: [Out<'_>; N] =
        std::array::from_fn(|_| Out { shape: [0].into(), stored: DType::U8, data: ViewMut::U8(&mut []) });
    let mut replaced_ins = [false; N];
    (0..step.outs.len()).filter_map(|o| replaced(step, o)).for_each(|i| replaced_ins[i] = true);
    for (i, slot) in step.ins.iter().enumerate() {
        ins[i].shape = slot.spec.shape;
        ins[i].data = match if replaced_ins[i] { empty(slot.spec.dtype) } else { borrow(base, slot) } {
            View::Bf16(v) => View::F32(stage(v, &mut free)),
            view => view,
        };
    }
    for (o, slot) in step.outs.iter().enumerate() {
        let mut view = borrow_mut(base, slot);
        if poison && step.is_fresh(o) {
            view.bytes().fill(0xff);
        }
        (outs[o].shape, outs[o].stored) = (slot.spec.shape, slot.spec.dtype);
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
    // SAFETY: `ledger::check` proved the slot inside its segment and aligned (segments start 64-byte
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
    // SAFETY: as in `borrow`; besides, `ledger::check` proved that no other operand of the step overlaps it,
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
    use crate::{graph::Graph, op::Kind};

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
