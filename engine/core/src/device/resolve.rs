//! From the launches of a step to what a machine executes: kernels looked up, addresses known, parameters
//! packed.
//!
//! Shared by every device that runs launches, so that what one of them proves (the entry, the grid, shared
//! bytes, order and packing of the arguments) is what the others run. Each argument is held against the
//! kernel's own declaration, the `.param` list of its PTX.
use crate::{
    error::{Error, Result},
    launch::{Arg, Geometry, Launch, Operand, Target},
    plan::{Plan, Slot, Step},
};
use std::collections::HashMap;
use transfusion_ptx::{BASE, Entry, Kind, Module, Param};

/// Bytes of a tensor map.
pub const TENSOR_MAP: usize = 128;

/// Bytes of arguments that every driver takes.
const PARAMETERS: u32 = 4096;

/// The kernels of an architecture by name.
#[derive(Clone, Debug)]
pub struct Library {
    arch: &'static str,
    kernels: HashMap<String, Kernel>,
}

/// An entry point and the text that holds it.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The text.
    pub module: Module,
    /// How it may be launched.
    pub entry: Entry,
}

impl Library {
    /// The shipped kernels for `arch`, and `own` ones, which stand in for shipped ones of the same names.
    ///
    /// # Errors
    /// If one of the texts is no PTX.
    pub fn new(arch: &'static str, own: Vec<Module>) -> Result<Library> {
        let shipped = transfusion_ptx::modules().iter().filter(|m| !m.is_ladder());
        let of = |wanted: &'static str| shipped.clone().filter(move |m| m.arch == wanted).cloned();
        let exact = of(arch).filter(|_| arch != BASE);
        let mut kernels = HashMap::new();
        for module in of(BASE).chain(exact).chain(own) {
            let unread = |e| Error::Device(format!("{}/{}: {e}", module.arch, module.stem));
            for entry in module.entries().map_err(unread)? {
                kernels.insert(entry.name.clone(), Kernel { module: module.clone(), entry });
            }
        }
        Ok(Library { arch, kernels })
    }

    /// The architecture.
    pub fn arch(&self) -> &'static str {
        self.arch
    }

    /// A kernel by its entry point.
    pub fn find(&self, entry: &str) -> Option<&Kernel> {
        self.kernels.get(entry)
    }

    /// Every kernel, by name.
    pub fn kernels(&self) -> Vec<&Kernel> {
        let mut all: Vec<&Kernel> = self.kernels.values().collect();
        all.sort_by(|a, b| a.entry.name.cmp(&b.entry.name));
        all
    }

    /// The highest `.version` among its texts.
    pub fn version(&self) -> Option<(u32, u32)> {
        self.kernels.values().filter_map(|k| version(&k.module.text)).max()
    }
}

/// The `.version` of a PTX text.
pub fn version(ptx: &str) -> Option<(u32, u32)> {
    let line = ptx.lines().find_map(|line| line.trim().strip_prefix(".version"))?;
    let (major, minor) = line.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// What a device tells about its memory while a step is resolved.
pub trait Places {
    /// Where an operand begins.
    ///
    /// # Errors
    /// If it has no memory.
    fn address(&mut self, operand: Operand, slot: &Slot) -> Result<u64>;

    /// The tensor map over an operand that begins at `address`, as the machine wants it.
    ///
    /// # Errors
    /// If the machine refuses it.
    fn tensor_map(&mut self, address: u64, geometry: &Geometry) -> Result<[u8; TENSOR_MAP]>;
}

/// An operand, located.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// Which one.
    pub operand: Operand,
    /// Where it begins.
    pub address: u64,
    /// Its bytes.
    pub bytes: u64,
}

/// What a machine executes.
#[derive(Clone, Debug)]
pub enum Command<'a> {
    /// A kernel.
    Kernel(Call<'a>),
    /// Sets every byte of an operand.
    Fill {
        /// What is filled.
        what: Located,
        /// The byte.
        byte: u8,
    },
    /// Copies one operand over another.
    Copy {
        /// Source.
        from: Located,
        /// Destination, of the same size.
        to: Located,
    },
}

/// A kernel with everything that its launch needs.
#[derive(Clone, Debug)]
pub struct Call<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Blocks of a cluster.
    pub cluster: [u32; 3],
    /// Dynamic shared memory, bytes.
    pub shared: u32,
    /// The parameter buffer, packed as the entry declares it.
    pub params: Vec<u8>,
    /// The operand behind each parameter that is an address or a tensor map: what the kernel may touch.
    pub operands: Vec<(usize, Located)>,
}

/// What a step executes: nothing for a view, for a grid without blocks and for operands without bytes.
///
/// # Errors
/// [`Error::Launch`] if a launch contradicts its kernel or exceeds the machine; [`Error::NoKernel`] if the
/// step was planned for the CPU.
pub fn commands<'a>(
    step: &Step,
    target: &Target,
    library: &'a Library,
    places: &mut dyn Places,
) -> Result<Vec<Command<'a>>> {
    if step.is_view() {
        return Ok(Vec::new());
    }
    if step.launches.is_empty() && step.outs.iter().any(|s| s.spec.bytes() > 0) {
        let why = "the plan is one for the CPU device; `Plan::lowered` makes one for a GPU".into();
        return Err(Error::NoKernel { op: step.op.name(), why, at: step.at });
    }
    let mut resolver = Resolver { step, target, library, places };
    let mut commands = Vec::new();
    for launch in &step.launches {
        let of = |e: Refusal| e.at(step, launch);
        commands.extend(resolver.command(launch).map_err(of)?);
    }
    Ok(commands)
}

/// Holds every launch of a plan against its kernel without any machine.
///
/// # Errors
/// As [`commands`].
pub fn check(plan: &Plan, target: &Target, library: &Library) -> Result<()> {
    /// Every operand lies where its segment would, were each one alone in the world.
    struct Nowhere;
    impl Places for Nowhere {
        fn address(&mut self, _: Operand, slot: &Slot) -> Result<u64> {
            Ok((1 << 40) + slot.offset as u64)
        }
        fn tensor_map(&mut self, _: u64, _: &Geometry) -> Result<[u8; TENSOR_MAP]> {
            Ok([0; TENSOR_MAP])
        }
    }
    plan.steps.iter().try_for_each(|step| commands(step, target, library, &mut Nowhere).map(drop))
}

/// Why a launch is refused: in words, or by what the device answered.
enum Refusal {
    Words(String),
    Device(Error),
}

impl From<String> for Refusal {
    fn from(why: String) -> Refusal {
        Refusal::Words(why)
    }
}

impl From<&str> for Refusal {
    fn from(why: &str) -> Refusal {
        Refusal::Words(why.into())
    }
}

impl From<Error> for Refusal {
    fn from(e: Error) -> Refusal {
        Refusal::Device(e)
    }
}

impl Refusal {
    fn at(self, step: &Step, launch: &Launch) -> Error {
        let entry = match launch {
            Launch::Kernel { entry, .. } => entry.clone(),
            Launch::Fill { .. } => "a fill".into(),
            Launch::Copy { .. } => "a copy".into(),
        };
        match self {
            Refusal::Words(why) => Error::Launch { op: step.op.name(), at: step.at, entry, why },
            Refusal::Device(e) => e,
        }
    }
}

struct Resolver<'a, 'b> {
    step: &'b Step,
    target: &'b Target,
    library: &'a Library,
    places: &'b mut dyn Places,
}

impl<'a> Resolver<'a, '_> {
    fn command(&mut self, launch: &Launch) -> Result<Option<Command<'a>>, Refusal> {
        match launch {
            Launch::Kernel { entry, grid, block, cluster, shared, args } => {
                let arch = self.library.arch;
                let kernel =
                    self.library.find(entry).ok_or_else(|| format!("{arch} has no kernel of that name"))?;
                shape(&kernel.entry, self.target, *grid, *block, *cluster, *shared)?;
                if grid.contains(&0) {
                    return Ok(None);
                }
                let (params, operands) = self.pack(&kernel.entry, args)?;
                let (grid, block, cluster, shared) = (*grid, *block, *cluster, *shared);
                let call = Call { kernel, grid, block, cluster, shared, params, operands };
                Ok(Some(Command::Kernel(call)))
            }
            Launch::Fill { what, byte } => {
                let what = self.locate(*what)?;
                Ok((what.bytes > 0).then_some(Command::Fill { what, byte: *byte }))
            }
            Launch::Copy { from, to } => {
                let (from, to) = (self.locate(*from)?, self.locate(*to)?);
                if from.bytes != to.bytes {
                    Err(format!("{} bytes cannot be copied over {}", from.bytes, to.bytes))?;
                }
                Ok((to.bytes > 0).then_some(Command::Copy { from, to }))
            }
        }
    }

    fn slot(&self, operand: Operand) -> Result<&Slot, String> {
        let slot = match operand {
            Operand::In(i) => self.step.ins.get(i),
            Operand::Out(i) => self.step.outs.get(i),
            Operand::Scratch(i) => self.step.scratch.get(i),
        };
        slot.ok_or_else(|| format!("the step has no operand {operand:?}"))
    }

    fn locate(&mut self, operand: Operand) -> Result<Located, Refusal> {
        let slot = *self.slot(operand)?;
        let address = self.places.address(operand, &slot)?;
        Ok(Located { operand, address, bytes: slot.spec.bytes() as u64 })
    }

    /// The parameter buffer, and what each address in it belongs to.
    fn pack(&mut self, entry: &Entry, args: &[Arg]) -> Result<(Vec<u8>, Vec<(usize, Located)>), Refusal> {
        if args.len() != entry.params.len() {
            Err(format!("it takes {} arguments and is given {}", entry.params.len(), args.len()))?;
        }
        if entry.param_bytes() > PARAMETERS {
            Err(format!("its arguments take more than {PARAMETERS} bytes"))?;
        }
        let mut buffer = vec![0; entry.param_bytes() as usize];
        let mut operands = Vec::new();
        for (i, (arg, param)) in args.iter().zip(&entry.params).enumerate() {
            let bytes = self.argument(arg, &mut |located| operands.push((i, located)))?;
            if param.kind != kind(arg) || param.size as usize != bytes.len() || !aligned(arg, param) {
                let declared =
                    format!("{:?} of {} bytes, aligned to {}", param.kind, param.size, param.align);
                Err(format!("argument {i} is {arg:?}, declared is {declared}"))?;
            }
            let at = param.offset as usize;
            let place = buffer.get_mut(at..at + bytes.len());
            place.ok_or("its parameters are declared out of order")?.copy_from_slice(&bytes);
        }
        Ok((buffer, operands))
    }

    fn argument(&mut self, arg: &Arg, found: &mut dyn FnMut(Located)) -> Result<Vec<u8>, Refusal> {
        Ok(match arg {
            Arg::U32(x) => x.to_le_bytes().into(),
            Arg::U64(x) => x.to_le_bytes().into(),
            Arg::F32(x) => x.to_le_bytes().into(),
            Arg::Address(operand, offset) => {
                let located = self.locate(*operand)?;
                if *offset > located.bytes {
                    Err(format!("{operand:?} has {} bytes, not {offset}", located.bytes))?;
                }
                found(located);
                (located.address + offset).to_le_bytes().into()
            }
            Arg::Map(operand, geometry) => {
                let located = self.locate(*operand)?;
                geometry_fits(geometry, &located)
                    .map_err(|why| format!("tensor map of {operand:?}: {why}"))?;
                found(located);
                self.places.tensor_map(located.address, geometry)?.into()
            }
        })
    }
}

/// What a parameter that takes this argument is declared as.
fn kind(arg: &Arg) -> Kind {
    match arg {
        Arg::Address(..) | Arg::U64(_) => Kind::U64,
        Arg::U32(_) => Kind::U32,
        Arg::F32(_) => Kind::F32,
        Arg::Map(..) => Kind::Bytes,
    }
}

/// Whether the parameter is aligned as its contents need it.
fn aligned(arg: &Arg, param: &Param) -> bool {
    let need = match arg {
        Arg::Map(..) => 64,
        _ => param.size.max(1),
    };
    param.align >= need && param.offset.is_multiple_of(param.align.max(1))
}

/// Whether the kernel may be launched in this shape on this machine.
fn shape(
    entry: &Entry,
    target: &Target,
    grid: [u32; 3],
    block: [u32; 3],
    cluster: [u32; 3],
    shared: u32,
) -> Result<(), String> {
    const GRID: [u32; 3] = [i32::MAX as u32, 65_535, 65_535];
    const BLOCK: [u32; 3] = [1024, 1024, 64];
    let product = |n: [u32; 3]| n.iter().map(|&n| u64::from(n)).product::<u64>();
    let exceeds = |n: [u32; 3], most: [u32; 3]| n.iter().zip(&most).any(|(n, most)| n > most);
    if exceeds(grid, GRID) {
        return Err(format!("a grid of {grid:?} blocks; {GRID:?} is the most"));
    }
    let threads = entry.max_threads.map_or(1024, u64::from).min(1024);
    if block.contains(&0) || exceeds(block, BLOCK) || product(block) > threads {
        return Err(format!("a block of {block:?} threads; it is compiled for {threads}"));
    }
    if entry.block.is_some_and(|declared| declared != block) {
        return Err(format!("a block of {block:?} threads; it is compiled for {:?}", entry.block));
    }
    if entry.cluster.is_some_and(|declared| declared != cluster) {
        return Err(format!("a cluster of {cluster:?} blocks; it is compiled for {:?}", entry.cluster));
    }
    let whole = grid.iter().zip(&cluster).all(|(grid, cluster)| *cluster > 0 && grid % cluster == 0);
    let most = if target.arch == BASE { 1 } else { 8 };
    if !whole || product(cluster) > most {
        return Err(format!("a grid of {grid:?} in clusters of {cluster:?}; {most} blocks are the most"));
    }
    let all = u64::from(shared) + u64::from(entry.static_shared);
    if all > u64::from(target.shared) {
        let most = target.shared;
        return Err(format!("{all} bytes of shared memory; {} has {most} for a block", target.name));
    }
    Ok(())
}

/// Whether a tensor map may be encoded over an operand, and stays inside it.
fn geometry_fits(g: &Geometry, operand: &Located) -> Result<(), String> {
    let rank = g.extents.len();
    if !(1..=5).contains(&rank) || g.strides.len() + 1 != rank || g.tile.len() != rank {
        return Err("1 to 5 extents, as many sides of the box, and a stride fewer are needed".into());
    }
    if !matches!(g.element, 1 | 2 | 4) || !matches!(g.swizzle, 0 | 32 | 64 | 128) {
        return Err(format!("elements of {} bytes, swizzled by {}", g.element, g.swizzle));
    }
    if g.extents.iter().any(|&n| n == 0 || n > 1 << 32) || g.tile.iter().any(|&n| n == 0 || n > 256) {
        return Err(format!("extents {:?}, box {:?}", g.extents, g.tile));
    }
    if operand.address % 16 != 0 || g.strides.iter().any(|s| s % 16 != 0 || *s >= 1 << 40) {
        return Err(format!("address and strides {:?} must be multiples of 16 bytes", g.strides));
    }
    let row = g.tile[0] * g.element;
    if !row.is_multiple_of(16) || (g.swizzle > 0 && row > g.swizzle) {
        return Err(format!("a row of the box has {row} bytes, swizzled by {}", g.swizzle));
    }
    let reach = |(extent, stride): (&u64, &u64)| u128::from(extent - 1) * u128::from(*stride);
    let rest: u128 = g.extents[1..].iter().zip(&g.strides).map(reach).sum();
    let end = rest + u128::from(g.extents[0]) * u128::from(g.element);
    if end > u128::from(operand.bytes) {
        return Err(format!("it reaches {end} bytes into an operand of {}", operand.bytes));
    }
    Ok(())
}
