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
        let shipped = transfusion_ptx::modules().iter();
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

    /// The tensor map whose first element lies at `address`, as the machine wants it.
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
    /// The operand behind each address and tensor map, by the byte of `params` where that begins: what the kernel
    /// may touch.
    pub operands: Vec<(usize, Located)>,
}

/// The operand behind each address, by where in the parameter buffer that is.
type Operands = Vec<(usize, Located)>;

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
    fn pack(&mut self, entry: &Entry, args: &[Arg]) -> Result<(Vec<u8>, Operands), Refusal> {
        if args.len() != entry.params.len() {
            Err(format!("it takes {} arguments and is given {}", entry.params.len(), args.len()))?;
        }
        if entry.param_bytes() > PARAMETERS {
            Err(format!("its arguments take more than {PARAMETERS} bytes"))?;
        }
        let mut buffer = vec![0; entry.param_bytes() as usize];
        let mut operands = Vec::new();
        for (i, (arg, param)) in args.iter().zip(&entry.params).enumerate() {
            let at = param.offset as usize;
            let bytes = self.argument(arg, &mut |byte, located| operands.push((at + byte, located)))?;
            if param.kind != kind(arg) || !fills(arg, bytes.len(), param) || !aligned(arg, param) {
                let declared =
                    format!("{:?} of {} bytes, aligned to {}", param.kind, param.size, param.align);
                Err(format!("argument {i} is {arg:?}, declared is {declared}"))?;
            }
            let place = buffer.get_mut(at..at + bytes.len());
            place.ok_or("its parameters are declared out of order")?.copy_from_slice(&bytes);
        }
        Ok((buffer, operands))
    }

    /// The bytes of an argument; `found` hears of the operands in it, and behind which byte each begins.
    fn argument(&mut self, arg: &Arg, found: &mut dyn FnMut(usize, Located)) -> Result<Vec<u8>, Refusal> {
        Ok(match arg {
            Arg::U32(x) => x.to_le_bytes().into(),
            Arg::U64(x) => x.to_le_bytes().into(),
            Arg::F32(x) => x.to_le_bytes().into(),
            Arg::Address(operand, offset) => {
                let located = self.locate(*operand)?;
                if *offset > located.bytes {
                    Err(format!("{operand:?} has {} bytes, not {offset}", located.bytes))?;
                }
                found(0, located);
                (located.address + offset).to_le_bytes().into()
            }
            Arg::Map(operand, geometry) => {
                let located = self.locate(*operand)?;
                geometry_fits(geometry, &located)
                    .map_err(|why| format!("tensor map of {operand:?}: {why}"))?;
                found(0, located);
                self.places.tensor_map(located.address + geometry.offset, geometry)?.into()
            }
            Arg::Table(words) => {
                let mut table = Vec::new();
                for word in words {
                    if !matches!(word, Arg::Address(..) | Arg::U64(_)) {
                        Err(format!("{word:?} stands in a table, which holds addresses and 64-bit sizes"))?;
                    }
                    let at = table.len();
                    table.extend(self.argument(word, &mut |_, located| found(at, located))?);
                }
                table
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
        Arg::Map(..) | Arg::Table(_) => Kind::Bytes,
    }
}

/// Whether an argument of so many bytes is one for this parameter: a table may have room left.
fn fills(arg: &Arg, bytes: usize, param: &Param) -> bool {
    let room = param.size as usize;
    if matches!(arg, Arg::Table(_)) { bytes <= room } else { bytes == room }
}

/// Whether the parameter is aligned as its contents need it.
fn aligned(arg: &Arg, param: &Param) -> bool {
    let need = match arg {
        Arg::Map(..) => 64,
        Arg::Table(_) => 8,
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
    let first = operand.address.wrapping_add(g.offset);
    if !first.is_multiple_of(16) || g.strides.iter().any(|s| s % 16 != 0 || *s >= 1 << 40) {
        return Err(format!("address and strides {:?} must be multiples of 16 bytes", g.strides));
    }
    let row = g.tile[0] * g.element;
    if !row.is_multiple_of(16) || (g.swizzle > 0 && row > g.swizzle) {
        return Err(format!("a row of the box has {row} bytes, swizzled by {}", g.swizzle));
    }
    let reach = |(extent, stride): (&u64, &u64)| u128::from(extent - 1) * u128::from(*stride);
    let rest: u128 = g.extents[1..].iter().zip(&g.strides).map(reach).sum();
    let end = u128::from(g.offset) + rest + u128::from(g.extents[0]) * u128::from(g.element);
    if end > u128::from(operand.bytes) {
        return Err(format!("it reaches {end} bytes into an operand of {}", operand.bytes));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        op::Op,
        plan::Segment,
        tensor::{DType, In, Out, Spec},
    };
    use std::{panic::Location, sync::Arc};

    const PTX: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry scale_f32(
	.param .u64 scale_f32_param_0,
	.param .u64 scale_f32_param_1,
	.param .u32 scale_f32_param_2,
	.param .u64 scale_f32_param_3,
	.param .f32 scale_f32_param_4
)
.maxntid 256, 1, 1
{
	.shared .align 4 .b8 sums[1024];
	ret;
}
.visible .entry tiles_bf16(
	.param .u32 tiles_bf16_param_0,
	.param .align 64 .b8 tiles_bf16_param_1[128]
)
.maxntid 128, 1, 1
{
	ret;
}
.visible .entry rows_f32(
	.param .f32 rows_f32_param_0,
	.param .align 8 .b8 rows_f32_param_1[48]
)
.maxntid 256, 1, 1
{
	ret;
}
";

    #[derive(Debug)]
    struct Scale;

    impl Op for Scale {
        fn name(&self) -> &'static str {
            "scale"
        }
        fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
            Ok(ins.to_vec())
        }
        fn eval(&self, _: &[In<'_>], _: &mut [Out<'_>], _: &crate::cpu::Cpu) {}
    }

    /// A step on `x [8, 64]` with an output of its size and 32 bytes of scratch.
    fn step(launches: Vec<Launch>) -> Step {
        let spec = Spec::new([8, 64], DType::F32);
        let slot = |spec, segment, offset| Slot { spec, segment, offset };
        Step {
            op: Arc::new(Scale),
            at: Location::caller(),
            ins: vec![slot(spec, Segment::Input, 256)],
            outs: vec![slot(spec, Segment::Scratch, 0)],
            scratch: vec![slot(Spec::new([32], DType::U8), Segment::Scratch, 4096)],
            launches,
            cost: Default::default(),
            again: false,
        }
    }

    struct Flat;

    impl Places for Flat {
        fn address(&mut self, _: Operand, slot: &Slot) -> Result<u64> {
            let base = if slot.segment == Segment::Input { 0x1000_0000 } else { 0x2000_0000 };
            Ok(base + slot.offset as u64)
        }
        fn tensor_map(&mut self, address: u64, _: &Geometry) -> Result<[u8; TENSOR_MAP]> {
            let mut map = [0xee; TENSOR_MAP];
            map[..8].copy_from_slice(&address.to_le_bytes());
            Ok(map)
        }
    }

    fn library(target: &Target) -> Library {
        Library::new(target.arch, vec![Module::new("sm_80", "scale", PTX)]).unwrap()
    }

    /// What a launch of a kernel is made of.
    struct Parts {
        entry: &'static str,
        grid: [u32; 3],
        block: [u32; 3],
        cluster: [u32; 3],
        shared: u32,
        args: Vec<Arg>,
    }

    /// A launch that is in order, changed.
    fn changed(change: impl Fn(&mut Parts)) -> Launch {
        let args = vec![
            Arg::Address(Operand::Out(0), 16),
            Arg::Address(Operand::In(0), 0),
            Arg::U32(7),
            Arg::U64(9),
            Arg::F32(1.5),
        ];
        let (grid, block, cluster) = ([4, 1, 1], [256, 1, 1], [1, 1, 1]);
        let mut parts = Parts { entry: "scale_f32", grid, block, cluster, shared: 0, args };
        change(&mut parts);
        let Parts { entry, grid, block, cluster, shared, args } = parts;
        Launch::Kernel { entry: entry.into(), grid, block, cluster, shared, args }
    }

    fn geometry() -> Geometry {
        let (extents, tile) = (vec![64, 8], vec![64, 8]);
        Geometry { offset: 0, element: 2, extents, strides: vec![128], tile, swizzle: 128 }
    }

    fn tiles(geometry: Geometry) -> Launch {
        Launch::Kernel {
            entry: "tiles_bf16".into(),
            grid: [4, 1, 1],
            block: [128, 1, 1],
            cluster: [1, 1, 1],
            shared: 1024,
            args: vec![Arg::U32(3), Arg::Map(Operand::In(0), geometry)],
        }
    }

    /// What a launch is refused for.
    fn refused(launch: Launch, words: &str) {
        let (target, library) = (Target::A100, library(&Target::A100));
        let e = commands(&step(vec![launch]), &target, &library, &mut Flat).unwrap_err();
        assert!(matches!(&e, Error::Launch { op: "scale", .. }), "{e:?}");
        assert!(e.to_string().contains(words), "no {words:?} in {e}");
    }

    #[test]
    fn arguments_are_packed_as_declared() {
        let library = library(&Target::A100);
        let step = step(vec![changed(|_| ()), tiles(Geometry { offset: 16, ..geometry() })]);
        let found = commands(&step, &Target::A100, &library, &mut Flat).unwrap();
        let [Command::Kernel(scale), Command::Kernel(tiles)] = &found[..] else { panic!("{found:?}") };
        let mut want = Vec::new();
        want.extend(0x2000_0010u64.to_le_bytes());
        want.extend(0x1000_0100u64.to_le_bytes());
        want.extend([7, 0, 0, 0, 0, 0, 0, 0]);
        want.extend(9u64.to_le_bytes());
        want.extend(1.5f32.to_le_bytes());
        assert_eq!(scale.params, want);
        let located = |operand, address| Located { operand, address, bytes: 2048 };
        let operands =
            vec![(0, located(Operand::Out(0), 0x2000_0000)), (8, located(Operand::In(0), 0x1000_0100))];
        assert_eq!(scale.operands, operands);
        assert_eq!((tiles.params.len(), &tiles.params[..4]), (192, &[3, 0, 0, 0][..]));
        assert_eq!(&tiles.params[64..73], &[0x10, 1, 0, 0x10, 0, 0, 0, 0, 0xee]);
    }

    #[test]
    fn tables_hold_addresses_and_sizes_and_zeros_behind_them() {
        let rows = |words: Vec<Arg>| {
            changed(|p| (p.entry, p.args) = ("rows_f32", vec![Arg::F32(1.5), Arg::Table(words.clone())]))
        };
        let words = vec![Arg::Address(Operand::Out(0), 16), Arg::U64(9), Arg::input(0)];
        let (library, step) = (library(&Target::A100), step(vec![rows(words)]));
        let found = commands(&step, &Target::A100, &library, &mut Flat).unwrap();
        let [Command::Kernel(call)] = &found[..] else { panic!("{found:?}") };
        let want: Vec<u8> =
            [0x2000_0010u64, 9, 0x1000_0100, 0, 0, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(call.params[8..], want);
        let located = |operand, address| Located { operand, address, bytes: 2048 };
        let operands =
            [(8, located(Operand::Out(0), 0x2000_0000)), (24, located(Operand::In(0), 0x1000_0100))];
        assert_eq!(call.operands, operands);
        refused(rows(vec![Arg::U64(1); 7]), "declared is Bytes of 48 bytes, aligned to 8");
        refused(rows(vec![Arg::U32(1)]), "U32(1) stands in a table");
        refused(changed(|p| p.args[3] = Arg::Table(vec![Arg::U64(9)])), "argument 3 is Table");
    }

    #[test]
    fn what_does_nothing_is_left_out() {
        let library = library(&Target::A100);
        let empty = changed(|p| p.grid[1] = 0);
        let fill = Launch::Fill { what: Operand::Scratch(0), byte: 3 };
        let step = step(vec![empty, fill]);
        let found = commands(&step, &Target::A100, &library, &mut Flat).unwrap();
        let located = Located { operand: Operand::Scratch(0), address: 0x2000_1000, bytes: 32 };
        assert!(matches!(&found[..], [Command::Fill { what, byte: 3 }] if *what == located), "{found:?}");
    }

    #[test]
    fn launches_that_contradict_their_kernels_are_refused() {
        let arg = |i: usize, arg: Arg, words: &str| refused(changed(|p| p.args[i] = arg.clone()), words);
        refused(changed(|p| drop(p.args.pop())), "takes 5 arguments and is given 4");
        refused(changed(|p| p.args.swap(2, 3)), "argument 2 is U64(9)");
        arg(2, Arg::F32(7.0), "argument 2 is F32(7.0)");
        arg(0, Arg::Address(Operand::Out(1), 0), "no operand Out(1)");
        arg(0, Arg::Address(Operand::Out(0), 2049), "2048 bytes, not 2049");
        arg(3, Arg::Map(Operand::In(0), geometry()), "argument 3 is Map");
        refused(changed(|p| p.block[1] = 2), "compiled for 256");
        refused(changed(|p| p.block[2] = 0), "a block of");
        refused(changed(|p| p.grid[1] = 65_536), "a grid of");
        refused(changed(|p| p.shared = Target::A100.shared), "167936 bytes of shared memory");
        refused(changed(|p| p.entry = "scale_f16"), "sm_80 has no kernel of that name");
        let copy = Launch::Copy { from: Operand::In(0), to: Operand::Scratch(0) };
        refused(copy, "2048 bytes cannot be copied over 32");
        let clustered = changed(|p| p.cluster = [2, 1, 1]);
        refused(clustered.clone(), "in clusters of [2, 1, 1]");
        let hopper = library(&Target::H200);
        commands(&step(vec![clustered]), &Target::H200, &hopper, &mut Flat).unwrap();
    }

    #[test]
    fn tensor_maps_that_the_hardware_cannot_do_are_refused() {
        let broken = |change: &dyn Fn(&mut Geometry), words: &str| {
            let mut g = geometry();
            change(&mut g);
            refused(tiles(g), words);
        };
        broken(&|g| g.extents[1] = 17, "reaches 2176 bytes into an operand of 2048");
        broken(&|g| g.strides[0] = 136, "multiples of 16");
        broken(&|g| g.offset = 8, "multiples of 16");
        broken(&|g| g.offset = 1040, "reaches 2064 bytes into an operand of 2048");
        broken(&|g| g.tile[0] = 72, "a row of the box has 144 bytes");
        broken(&|g| g.tile[1] = 512, "box [64, 512]");
        broken(&|g| g.swizzle = 16, "swizzled by 16");
        broken(&|g| g.strides.clear(), "a stride fewer");
    }

    #[test]
    fn a_step_for_the_cpu_is_refused() {
        let library = library(&Target::A100);
        let e = commands(&step(vec![]), &Target::A100, &library, &mut Flat).unwrap_err();
        assert!(matches!(e, Error::NoKernel { op: "scale", .. }), "{e:?}");
    }

    #[test]
    fn own_kernels_stand_in_for_shipped_ones() {
        let own = PTX.replace("sums[1024]", "sums[2048]");
        let twice = vec![Module::new("sm_80", "scale", PTX), Module::new("sm_80", "edited", own)];
        let library = Library::new("sm_80", twice).unwrap();
        assert_eq!(library.find("scale_f32").unwrap().entry.static_shared, 2048);
        assert!(library.find("scale_f16").is_none());
        assert_eq!(version(PTX), Some((7, 0)));
        assert!(
            Library::new("sm_80", vec![Module::new("sm_80", "bad", ".visible .entry x( .param")]).is_err()
        );
    }
}
