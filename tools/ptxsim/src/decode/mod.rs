//! From the syntax tree to executable code.
//!
//! Each submodule decodes instructions of one topic. It names the operands through a [`Builder`], which turns them
//! into virtual registers, and picks the [`Instruction`] to run. Modifiers are taken one by one; one that is left
//! over makes the form unknown, so that nothing is executed that was only half understood. Afterwards
//! [`crate::flow`] finds where branches meet, and [`crate::allocate`] packs the registers.

mod builder;
mod bulk;
mod control;
mod convert;
mod float;
mod integer;
mod memory;
mod tensor;

use crate::allocate::{self, Use, Virtual};
use crate::counters::Class;
use crate::exec::arithmetic::Nothing;
use crate::exec::warp::Exit;
use crate::exec::{Inst, handler};
use crate::kernel::{Kernel, LaneMask, Special};
use crate::run::{SHARED_BASE, global_address};
use crate::syntax::ast::{Function, Location, Operand, Type, Unit, Variable};
use crate::syntax::{Parsed, at};
use builder::Builder;
use std::collections::HashMap;

/// Decodes a function.
pub(crate) fn decode(file: &str, function: &Function, unit: &Unit) -> Parsed<Kernel> {
    let layout = Layout::new(function, unit);
    let mut code = Code::new(function, layout.symbols);
    let mut starts = Vec::with_capacity(function.body.len() + 1);
    for statement in &function.body {
        starts.push(code.drafts.len());
        let mut builder = Builder::new(&mut code, statement);
        builder.instruction()?;
        builder.finish()?;
    }
    starts.push(code.drafts.len());
    code.close();
    code.resolve_labels(&starts, function)?;
    crate::flow::join_branches(&mut code.drafts, &mut code.lists);
    let unfenced = crate::flow::unfenced_products(&code.drafts, &code.lists);
    let predicates = code.predicates.max(1);
    let Code { mut drafts, mut lists, virtuals, .. } = code;
    let registers = allocate::allocate(&mut drafts, &mut lists, &virtuals);
    let last = function.parameters.last();
    Ok(Kernel {
        name: function.name.clone(),
        file: file.to_string(),
        files: unit.files.clone(),
        locations: drafts.iter().map(|d| d.location).collect(),
        code: drafts.into_iter().map(|d| d.inst).collect(),
        lists,
        rows: registers.rows,
        predicates,
        constants: registers.constants,
        specials: registers.specials,
        touches: registers.touches,
        unfenced,
        parameter_bytes: last.map_or(0, |p| p.offset + p.size),
        parameters: function.parameters.clone(),
        shared_bytes: layout.shared_bytes,
        dynamic_shared: layout.dynamic_shared,
        local_bytes: layout.local_bytes,
        max_threads: function.max_threads,
        exact_threads: function.exact_threads,
        cluster: function.cluster,
        globals: unit.globals.iter().map(|(v, constant)| (initial_bytes(v), *constant)).collect(),
    })
}

fn initial_bytes(v: &Variable) -> Vec<u8> {
    let mut bytes = v.init.clone();
    bytes.resize(v.size as usize, 0);
    bytes
}

/// Addresses of variables and parameters.
struct Layout {
    symbols: HashMap<String, u64>,
    shared_bytes: u32,
    dynamic_shared: u32,
    local_bytes: u32,
}

impl Layout {
    fn new(function: &Function, unit: &Unit) -> Self {
        let mut symbols = HashMap::new();
        for (n, (v, _)) in unit.globals.iter().enumerate() {
            symbols.insert(v.name.clone(), global_address(n));
        }
        let used = used_symbols(function);
        let shared =
            function.shared.iter().chain(unit.shared.iter().filter(|v| used.contains(&v.name.as_str())));
        let shared_end = place(shared, SHARED_BASE, &mut symbols);
        let align = unit.extern_shared.iter().map(|v| v.align).max().unwrap_or(16);
        let dynamic_shared = shared_end.next_multiple_of(align);
        for v in &unit.extern_shared {
            symbols.insert(v.name.clone(), dynamic_shared.into());
        }
        let local_bytes = place(function.local.iter(), 0, &mut symbols).next_multiple_of(16);
        for p in &function.parameters {
            symbols.insert(p.name.clone(), p.offset.into());
        }
        Self { symbols, shared_bytes: shared_end - SHARED_BASE, dynamic_shared, local_bytes }
    }
}

fn used_symbols(function: &Function) -> Vec<&str> {
    fn visit<'a>(o: &'a Operand, out: &mut Vec<&'a str>) {
        match o {
            Operand::Symbol(s) => out.push(s),
            Operand::Address(b, _) | Operand::Not(b) => visit(b, out),
            Operand::Vector(v) => v.iter().for_each(|o| visit(o, out)),
            Operand::Tensor(b, v) => {
                visit(b, out);
                v.iter().for_each(|o| visit(o, out));
            }
            _ => {}
        }
    }
    let mut out = Vec::new();
    function.body.iter().flat_map(|s| &s.operands).for_each(|o| visit(o, &mut out));
    out
}

/// Lays variables out one after another from `start`; returns the end.
fn place<'a>(
    variables: impl Iterator<Item = &'a Variable>,
    start: u32,
    symbols: &mut HashMap<String, u64>,
) -> u32 {
    variables.fold(start, |end, v| {
        let at = end.next_multiple_of(v.align);
        symbols.insert(v.name.clone(), at.into());
        at + v.size
    })
}

/// An instruction whose operands are virtual registers.
pub(crate) struct Draft {
    pub(crate) inst: Inst,
    pub(crate) uses: Vec<Use>,
    pub(crate) location: Option<Location>,
    pub(crate) flow: Flow,
}

/// What control flow and analyses need to know of an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    Plain,
    /// To a label, until labels are resolved; then `inst.a` has the target.
    Branch(usize, String),
    /// To one of several labels; then the list has the targets.
    Table(usize, Vec<String>),
    Exit,
    /// A `wgmma` whose list starts with this many accumulators and A registers.
    Product(usize),
    ProductFence,
    ProductWait,
}

/// The code of a kernel while it is decoded.
struct Code<'a> {
    function: &'a Function,
    symbols: HashMap<String, u64>,
    drafts: Vec<Draft>,
    lists: Vec<u32>,
    virtuals: Vec<Virtual>,
    constants: HashMap<(bool, u64), u32>,
    specials: HashMap<Special, u32>,
    /// Where declared registers live: a virtual register, or a predicate.
    registers: Vec<Option<u32>>,
    predicates: u32,
    trash: u32,
}

impl<'a> Code<'a> {
    fn new(function: &'a Function, symbols: HashMap<String, u64>) -> Self {
        Self {
            function,
            symbols,
            drafts: Vec::new(),
            lists: Vec::new(),
            // Writes to `_` go to a register of their own.
            virtuals: vec![Virtual::constant(true, 0)],
            constants: HashMap::new(),
            specials: HashMap::new(),
            registers: vec![None; function.registers.len()],
            predicates: 0,
            trash: 0,
        }
    }

    /// Ends the code with an exit, which branches to the end reach.
    fn close(&mut self) {
        let line = self.drafts.last().map_or(0, |d| d.inst.line);
        let mut inst = empty_instruction(line);
        inst.run = handler::<Exit>();
        inst.class = Class::Internal;
        self.drafts.push(Draft { inst, uses: Vec::new(), location: None, flow: Flow::Exit });
    }

    fn resolve_labels(&mut self, starts: &[usize], function: &Function) -> Parsed<()> {
        let find = |mut scope: usize, name: &str, line: u32| loop {
            if let Some(n) = function.labels.get(&(scope, name.to_string())) {
                return Ok(starts[*n] as u32);
            }
            if scope == 0 {
                return at(line, format!("no label `{name}`"));
            }
            scope = function.scopes[scope];
        };
        for draft in &mut self.drafts {
            let line = draft.inst.line;
            match &draft.flow {
                Flow::Branch(scope, label) => draft.inst.a = find(*scope, label, line)?,
                Flow::Table(scope, labels) => {
                    for (n, label) in labels.iter().enumerate() {
                        self.lists[draft.inst.list as usize + n] = find(*scope, label, line)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn constant(&mut self, wide: bool, value: u64) -> u32 {
        let value = if wide { value } else { value & 0xffff_ffff };
        *self.constants.entry((wide, value)).or_insert_with(|| {
            self.virtuals.push(Virtual::constant(wide, value));
            self.virtuals.len() as u32 - 1
        })
    }

    fn special(&mut self, special: Special) -> u32 {
        *self.specials.entry(special).or_insert_with(|| {
            self.virtuals.push(Virtual::special(special));
            self.virtuals.len() as u32 - 1
        })
    }

    fn temporary(&mut self, wide: bool) -> u32 {
        self.virtuals.push(Virtual::register(wide));
        self.virtuals.len() as u32 - 1
    }

    /// The virtual register, or the predicate, of a declared register.
    fn register(&mut self, id: u32) -> u32 {
        if let Some(known) = self.registers[id as usize] {
            return known;
        }
        let new = match self.function.registers[id as usize] {
            Type::Pred => {
                self.predicates += 1;
                self.predicates - 1
            }
            ty => self.temporary(ty.bytes() == 8),
        };
        self.registers[id as usize] = Some(new);
        new
    }
}

fn empty_instruction(line: u32) -> Inst {
    Inst {
        run: handler::<Nothing>(),
        d: 0,
        a: 0,
        b: 0,
        c: 0,
        list: 0,
        guard: 0,
        guard_negated: false,
        always: false,
        class: Class::Integer,
        size: 0,
        count: 0,
        mode: 0,
        imm: 0,
        line,
        flops: 0,
    }
}

/// The special register of a name.
fn special(name: &str) -> Option<Special> {
    let name = name.strip_prefix('%')?;
    let (stem, dimension) = match name.rsplit_once('.') {
        Some((stem, "x")) => (stem, 0),
        Some((stem, "y")) => (stem, 1),
        Some((stem, "z")) => (stem, 2),
        Some(_) => return None,
        None => (name, usize::MAX),
    };
    if dimension != usize::MAX {
        return Some(match stem {
            "tid" => Special::Thread(dimension),
            "ntid" => Special::Threads(dimension),
            "ctaid" => Special::Block(dimension),
            "nctaid" => Special::Blocks(dimension),
            "cluster_ctaid" => Special::ClusterBlock(dimension),
            "cluster_nctaid" => Special::ClusterBlocks(dimension),
            "clusterid" => Special::Cluster(dimension),
            "nclusterid" => Special::Clusters(dimension),
            _ => return None,
        });
    }
    Some(match stem {
        "laneid" => Special::Lane,
        "warpid" => Special::Warp,
        "nwarpid" => Special::Warps,
        "lanemask_lt" => Special::LaneMask(LaneMask::Below),
        "lanemask_le" => Special::LaneMask(LaneMask::UpTo),
        "lanemask_eq" => Special::LaneMask(LaneMask::At),
        "lanemask_ge" => Special::LaneMask(LaneMask::From),
        "lanemask_gt" => Special::LaneMask(LaneMask::Above),
        "cluster_ctarank" => Special::ClusterRank,
        "cluster_nctarank" => Special::ClusterSize,
        "is_explicit_cluster" => Special::One,
        "dynamic_smem_size" => Special::DynamicShared,
        "total_smem_size" | "aggr_smem_size" => Special::TotalShared,
        "smid" | "gridid" => Special::Zero,
        "nsmid" => Special::One,
        _ => return None,
    })
}
