//! Runs the launches of plans on an NVIDIA GPU through the driver alone: no toolkit, at build time or at
//! run time.
//!
//! Each plan is recorded once as a CUDA graph, at its first run, and replayed. Everything runs in one
//! stream, in order; [`Device::run`] returns when the work is queued, and [`Device::read`] waits for it. So
//! a fault inside a kernel shows in a later call, as [`Error::Lost`]; [`CudaDevice::run_stepwise`] finds the
//! step.
mod driver;
mod survey;

pub use driver::Gpu;
pub use survey::{Shipped, Survey, cuda_for, ptx_for, shipped, survey};

use super::{
    Device, Place, PlanId,
    ledger::Ledger,
    resolve::{self, Call, Command, Library, Places, TENSOR_MAP},
};
use crate::{
    error::{Error, NoDevice, Result},
    launch::{Geometry, Launch, Operand, Target},
    plan::{Plan, Slot, Step},
    tensor::{Host, View, ViewMut},
};
use driver::{Buffer, Context, Driver, Event, Failure, Function, Graph, Module, Shape, Staging, Stream};
use std::{borrow::Cow, collections::HashMap, fmt, sync::Arc, time::Duration};
use survey::{architecture, target};

/// Bytes of page-locked memory for copies from and to the host.
const STAGING: usize = 16 << 20;

/// How a [`CudaDevice`] works.
#[derive(Clone, Debug, Default)]
pub struct CudaOptions {
    /// Which GPU, counted from 0 as the driver lists them.
    pub ordinal: usize,
    /// Kernels that stand in for shipped ones of the same names.
    pub kernels: Vec<transfusion_ptx::Module>,
    /// For how many multiprocessors launches are made, if for fewer than the GPU has: other tiles and other splits.
    pub sms: Option<u32>,
}

/// An NVIDIA GPU as a device.
pub struct CudaDevice {
    // Fields are dropped in this order.
    graphs: HashMap<PlanId, Recorded>,
    kernels: HashMap<String, Loaded>,
    /// What was compiled, by its text.
    modules: HashMap<Cow<'static, str>, Arc<Module>>,
    ledger: Ledger<Buffer>,
    staging: Staging,
    stream: Stream,
    context: Arc<Context>,
    gpu: Gpu,
    target: Target,
    library: Library,
    notices: Vec<String>,
    lost: Option<Error>,
}

/// A plan as a graph; `None` where it executes nothing.
struct Recorded {
    graph: Option<Graph>,
    /// How often the arena had moved when it was recorded.
    moves: u64,
}

struct Loaded {
    function: Function,
    /// Dynamic shared memory that launches may ask for.
    shared: u32,
    report: KernelReport,
}

/// What the driver's compiler made of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelReport {
    /// The entry point.
    pub entry: String,
    /// Architecture and file, as in `sm_80/rmsnorm`.
    pub module: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of local memory of a thread: more than 0 means that registers were spilled.
    pub local_bytes: u32,
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice").field("gpu", &self.gpu).field("target", &self.target).finish()
    }
}

impl CudaDevice {
    /// Opens a GPU.
    ///
    /// # Errors
    /// [`Error::NoDevice`] where there is none that the kernels can run on.
    pub fn new(options: CudaOptions) -> Result<CudaDevice> {
        let driver = Driver::start().map_err(Error::NoDevice)?;
        let (asked, have) = (options.ordinal, driver.count()?);
        if asked >= have {
            let why = if have == 0 { NoDevice::NoGpu } else { NoDevice::Ordinal { asked, have } };
            return Err(Error::NoDevice(why));
        }
        let (gpu, version) = (driver.gpu(asked)?, driver.version()?);
        let (arch, notice) = architecture(&gpu, version).map_err(Error::NoDevice)?;
        let mut target = target(&gpu, arch);
        target.sms = options.sms.map_or(gpu.sms, |sms| sms.min(gpu.sms).max(1));
        let context = Context::new(driver, asked)?;
        let stream = Stream::new(context.clone())?;
        Ok(CudaDevice {
            graphs: HashMap::new(),
            kernels: HashMap::new(),
            modules: HashMap::new(),
            ledger: Ledger::default(),
            staging: Staging::new(&context, STAGING)?,
            stream,
            context,
            gpu,
            target,
            library: Library::new(arch, options.kernels)?,
            notices: notice.into_iter().collect(),
            lost: None,
        })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// What a user should know: that slower kernels are used than the GPU could run, and why.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// The kernels that open plans brought in, by name.
    pub fn kernels(&self) -> Vec<KernelReport> {
        let mut all: Vec<KernelReport> = self.kernels.values().map(|k| k.report.clone()).collect();
        all.sort_by(|a, b| a.entry.cmp(&b.entry));
        all
    }

    /// An error of the driver, remembered if it is the last that this GPU answers.
    fn failed(&mut self, f: Failure, during: &str) -> Error {
        if !f.is_lasting() {
            return f.into();
        }
        let lost = Error::Lost { code: f.name(), during: during.into() };
        self.lost.get_or_insert(lost).clone()
    }

    fn usable(&self) -> Result<()> {
        self.lost.clone().map_or(Ok(()), Err)
    }

    /// Refuses a plan that is larger than what is free, before anything is loaded or allocated.
    fn has_room(&mut self, plan: &Plan) -> Result<()> {
        let need = self.ledger.missing(plan)?.total();
        let free = self.context.free().map_err(|f| self.failed(f, "opening a plan"))?;
        if need > free {
            return Err(Error::Memory { need, free: Some(free), what: "a plan".into() });
        }
        Ok(())
    }

    /// Compiles the kernels of a plan that are not there yet.
    fn load(&mut self, plan: &Plan) -> Result<()> {
        for step in &plan.steps {
            for launch in &step.launches {
                if let Launch::Kernel { entry, shared, .. } = launch {
                    self.load_kernel(step, entry, *shared)?;
                }
            }
        }
        Ok(())
    }

    fn load_kernel(&mut self, step: &Step, entry: &str, shared: u32) -> Result<()> {
        if !self.kernels.contains_key(entry) {
            let loaded = self.compile(entry)?;
            self.kernels.insert(entry.into(), loaded);
        }
        let Some(kernel) = self.kernels.get_mut(entry) else { return Ok(()) };
        if shared > kernel.shared {
            kernel.function.allow_shared(shared).map_err(|f| refused(step, entry, &f))?;
            kernel.shared = shared;
        }
        Ok(())
    }

    fn compile(&mut self, entry: &str) -> Result<Loaded> {
        let Some(kernel) = self.library.find(entry) else {
            return Err(Error::Device(format!("{} has no kernel {entry}", self.target.arch)));
        };
        let resolve::Kernel { module: source, .. } = kernel;
        let name = format!("{}/{}", source.arch, source.stem);
        let refuse = |f: Failure, log: String| {
            if f.is_unsupported_ptx() {
                let need = resolve::version(&source.text).map_or((0, 0), cuda_for);
                let have = self.context.version().unwrap_or((0, 0));
                return Error::NoDevice(NoDevice::DriverTooOld { have, need });
            }
            Error::Compile { entry: entry.into(), module: name.clone(), code: f.name(), log }
        };
        let module = match self.modules.get(&source.text) {
            Some(module) => module.clone(),
            None => {
                let loaded = Module::load(&self.context, &source.text);
                Arc::new(loaded.map_err(|(f, log)| refuse(f, log))?)
            }
        };
        let function = module.function(entry).map_err(|f| refuse(f, String::new()))?;
        let (registers, local_bytes) = function.registers_and_local()?;
        let report = KernelReport { entry: entry.into(), module: name, registers, local_bytes };
        self.modules.insert(source.text.clone(), module);
        Ok(Loaded { function, shared: 0, report })
    }

    /// What a step executes.
    fn resolve(&self, id: PlanId, step: &Step) -> Result<Vec<Command<'_>>> {
        let mut places = Addresses { ledger: &self.ledger, id, context: &self.context };
        resolve::commands(step, &self.target, &self.library, &mut places)
    }

    /// Queues it.
    fn queue(&self, step: &Step, commands: &[Command<'_>]) -> Result<(), Stop> {
        for command in commands {
            let (entry, queued) = match command {
                Command::Kernel(call) => {
                    (call.kernel.entry.name.as_str(), self.launch(self.loaded(call)?, call))
                }
                Command::Fill { what, byte } => {
                    ("a fill", self.stream.fill(what.address, *byte, what.bytes as usize))
                }
                Command::Copy { from, to } => {
                    ("a copy", self.stream.copy(from.address, to.address, to.bytes as usize))
                }
            };
            queued.map_err(
                |f| if f.is_lasting() { Stop::Driver(f) } else { refused(step, entry, &f).into() },
            )?;
        }
        Ok(())
    }

    fn loaded(&self, call: &Call<'_>) -> Result<&Loaded> {
        let name = &call.kernel.entry.name;
        self.kernels.get(name).ok_or_else(|| Error::Device(format!("kernel {name} is not loaded")))
    }

    fn launch(&self, kernel: &Loaded, call: &Call<'_>) -> Result<(), Failure> {
        let shape = Shape { grid: call.grid, block: call.block, cluster: call.cluster, shared: call.shared };
        let offsets: Vec<u32> = call.kernel.entry.params.iter().map(|p| p.offset).collect();
        self.stream.launch(&kernel.function, &shape, &mut call.params.clone(), &offsets)
    }

    /// The graph of a plan, recorded anew where the arena has moved since.
    fn record(&mut self, id: PlanId) -> Result<()> {
        let (moves, plan) = (self.ledger.moves(), self.ledger.plan(id)?.clone());
        if self.graphs.get(&id).is_some_and(|r| r.moves == moves) {
            return Ok(());
        }
        let is_idle = |s: &Step| s.is_view() || s.outs.iter().all(|o| o.spec.bytes() == 0);
        let graph = if plan.steps.iter().all(is_idle) {
            None
        } else {
            let queue = |step: &Step| self.queue(step, &self.resolve(id, step)?);
            let recorded = self.stream.capture(|| plan.steps.iter().try_for_each(queue));
            Some(recorded.map_err(|stop| self.stopped(stop, "the recording of a plan"))?)
        };
        self.graphs.insert(id, Recorded { graph, moves });
        Ok(())
    }

    fn stopped(&mut self, stop: Stop, during: &str) -> Error {
        match stop {
            Stop::Driver(f) => self.failed(f, during),
            Stop::Error(e) => e,
        }
    }

    /// Runs a plan and waits after every step, so that a fault names the step.
    ///
    /// # Errors
    /// As [`Device::run`].
    pub fn run_stepwise(&mut self, id: PlanId) -> Result<()> {
        self.usable()?;
        let plan = self.ledger.plan(id)?.clone();
        for step in &plan.steps {
            let queued = self.resolve(id, step).map_err(Stop::from).and_then(|c| self.queue(step, &c));
            let done = queued.and_then(|()| Ok(self.stream.wait()?));
            done.map_err(|stop| self.stopped(stop, &describe(step)))?;
        }
        Ok(())
    }

    /// The time of every step, back to back, as the GPU measures it.
    fn time(&self, id: PlanId) -> Result<Vec<Duration>, Stop> {
        let plan = self.ledger.plan(id)?;
        let commands = plan.steps.iter().map(|s| self.resolve(id, s)).collect::<Result<Vec<_>>>()?;
        let events = (0..=commands.len()).map(|_| Event::new(&self.context));
        let events = events.collect::<Result<Vec<_>, _>>()?;
        // What was queued before is no part of the first step.
        self.stream.wait()?;
        events[0].record(&self.stream)?;
        for ((step, commands), event) in plan.steps.iter().zip(&commands).zip(&events[1..]) {
            self.queue(step, commands)?;
            event.record(&self.stream)?;
        }
        self.stream.wait()?;
        events.windows(2).map(|pair| Ok(pair[1].since(&pair[0])?)).collect()
    }
}

impl Drop for CudaDevice {
    /// Nothing may go while the stream uses it.
    fn drop(&mut self) {
        let _ = self.stream.wait();
    }
}

/// A step and its kernels, for an error.
fn describe(step: &Step) -> String {
    let entry = |l: &Launch| match l {
        Launch::Kernel { entry, .. } => Some(entry.clone()),
        _ => None,
    };
    let entries: Vec<String> = step.launches.iter().filter_map(entry).collect();
    format!("{} ({}), applied at {}", step.op.name(), entries.join(", "), step.at)
}

/// What ends the queueing of a plan.
enum Stop {
    Driver(Failure),
    Error(Error),
}

impl From<Failure> for Stop {
    fn from(f: Failure) -> Stop {
        Stop::Driver(f)
    }
}

impl From<Error> for Stop {
    fn from(e: Error) -> Stop {
        Stop::Error(e)
    }
}

fn refused(step: &Step, entry: &str, f: &Failure) -> Error {
    let why = format!("the driver says {}", f.name());
    Error::Launch { op: step.op.name(), at: step.at, entry: entry.into(), why }
}

impl Device for CudaDevice {
    fn target(&self) -> Option<Target> {
        Some(self.target)
    }

    fn open(&mut self, plan: Arc<Plan>) -> Result<PlanId> {
        self.usable()?;
        self.has_room(&plan)?;
        resolve::check(&plan, &self.target, &self.library)?;
        self.load(&plan)?;
        let (stream, context) = (&self.stream, &self.context);
        let mut lasting = None;
        let opened = self.ledger.open(plan, |bytes, what| {
            Buffer::zeroed(stream, bytes).map_err(|f| {
                if f.is_lasting() {
                    lasting = Some(f.clone());
                }
                match f.is_out_of_memory() {
                    true => {
                        let free = context.free().ok();
                        Error::Memory { need: bytes as u64, free, what: what.into() }
                    }
                    false => f.into(),
                }
            })
        });
        lasting.map_or(opened, |f| Err(self.failed(f, "opening a plan")))
    }

    fn close(&mut self, plan: PlanId) {
        self.graphs.remove(&plan);
        self.ledger.close(plan);
    }

    fn write(&mut self, at: Place<'_>, data: View<'_>) -> Result<()> {
        self.usable()?;
        let (block, offset) = self.ledger.target(at, data.dtype(), data.len())?;
        let to = block.at() + offset as u64;
        let written = self.staging.write(&self.stream, data.bytes(), to);
        written.map_err(|f| self.failed(f, "a write, or what ran before it"))
    }

    fn read(&mut self, at: Place<'_>, mut into: ViewMut<'_>) -> Result<()> {
        self.usable()?;
        let (block, offset) = self.ledger.source(at, into.dtype(), into.len())?;
        let from = block.at() + offset as u64;
        let read = self.staging.read(&self.stream, from, into.bytes());
        read.map_err(|f| self.failed(f, "a read, or what ran before it"))
    }

    fn fetch(&mut self, at: Place<'_>) -> Result<Host> {
        let (_, _, spec) = self.ledger.find(at)?;
        let mut host = Host::zeros(spec);
        self.read(at, host.view_mut())?;
        Ok(host)
    }

    fn run(&mut self, plan: PlanId) -> Result<()> {
        self.usable()?;
        self.record(plan)?;
        let Some(graph) = self.graphs.get_mut(&plan).and_then(|r| r.graph.as_mut()) else { return Ok(()) };
        let replayed = self.stream.replay(graph);
        replayed.map_err(|f| self.failed(f, "a run, or what ran before it"))
    }

    fn profile(&mut self, plan: PlanId) -> Result<Vec<Duration>> {
        self.usable()?;
        self.time(plan).map_err(|stop| self.stopped(stop, "a profile, or what ran before it"))
    }
}

/// Where a plan's operands lie.
struct Addresses<'a> {
    ledger: &'a Ledger<Buffer>,
    id: PlanId,
    context: &'a Context,
}

impl Places for Addresses<'_> {
    fn address(&mut self, _: Operand, slot: &Slot) -> Result<u64> {
        if slot.spec.bytes() == 0 {
            return Ok(0);
        }
        Ok(self.ledger.block(self.id, slot.segment)?.at() + slot.offset as u64)
    }

    fn tensor_map(&mut self, address: u64, geometry: &Geometry) -> Result<[u8; TENSOR_MAP]> {
        Ok(self.context.tensor_map(address, geometry)?)
    }
}
