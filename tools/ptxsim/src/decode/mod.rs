//! From the syntax tree to executable code.
//!
//! Each submodule decodes instructions of one topic. It names the operands through a [`Builder`], which turns them
//! into virtual registers, and picks the [`Instruction`] to run. Modifiers are taken one by one; one that is left
//! over makes the form unknown, so that nothing is executed that was only half understood. Afterwards
//! [`crate::flow`] finds where branches meet, and [`crate::allocate`] packs the registers.

mod bulk;
mod control;
mod convert;
mod float;
mod integer;
mod memory;
mod tensor;

use crate::allocate::{self, Place, Use, Virtual};
use crate::counters::Class;
use crate::exec::arithmetic::{FromWarp, Map1, Map2, Map3, Map3Imm, Map4, Nothing};
use crate::exec::lane::Lane;
use crate::exec::warp::Exit;
use crate::exec::{Inst, Instruction, handler};
use crate::kernel::{Kernel, LaneMask, Special};
use crate::run::{SHARED_BASE, global_address};
use crate::syntax::ast::{Function, Location, Operand, Statement, Type, Unit, Variable};
use crate::syntax::{Parsed, at};
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

/// Decodes one statement.
pub(crate) struct Builder<'c, 'a> {
    code: &'c mut Code<'a>,
    statement: &'a Statement,
    parts: Vec<&'a str>,
    taken: Vec<bool>,
    inst: Inst,
    uses: Vec<Use>,
    flow: Flow,
    /// Conversions that follow the instruction.
    after: Vec<Draft>,
    emitted: bool,
}

impl<'c, 'a> Builder<'c, 'a> {
    fn new(code: &'c mut Code<'a>, statement: &'a Statement) -> Self {
        let parts: Vec<&str> = statement.opcode.split('.').collect();
        let mut taken = vec![false; parts.len()];
        taken[0] = true;
        Self {
            code,
            statement,
            parts,
            taken,
            inst: empty_instruction(statement.line),
            uses: Vec::new(),
            flow: Flow::Plain,
            after: Vec::new(),
            emitted: false,
        }
    }

    /// Decodes by the first part of the opcode.
    fn instruction(&mut self) -> Parsed<()> {
        match self.parts[0] {
            "add" | "sub" | "mul" | "mad" | "fma" | "div" | "rem" | "min" | "max" | "neg" | "abs" => {
                match self.parts.last().and_then(|s| Type::from_suffix(s)) {
                    Some(Type::F32 | Type::F64 | Type::F16 | Type::F16x2 | Type::Bf16 | Type::Bf16x2) => {
                        self.float()
                    }
                    _ => self.integer(),
                }
            }
            "sqrt" | "rsqrt" | "rcp" | "ex2" | "lg2" | "sin" | "cos" | "tanh" | "copysign" | "testp" => {
                self.float()
            }
            "and" | "or" | "xor" | "not" | "cnot" | "shl" | "shr" | "shf" | "bfe" | "bfi" | "popc"
            | "clz" | "brev" | "bfind" | "fns" | "lop3" | "prmt" | "mul24" | "mad24" | "sad" | "dp4a"
            | "szext" | "bmsk" => self.integer(),
            "setp" | "selp" | "slct" | "set" => self.comparison(),
            "mov" => self.mov(),
            "cvt" => self.cvt(),
            "cvta" | "isspacep" | "mapa" | "getctarank" => self.address(),
            "ld" | "ldu" => self.load(),
            "st" => self.store(),
            "atom" | "red" => self.atomic(),
            "ldmatrix" | "stmatrix" => self.matrix_access(),
            "mma" => self.mma(),
            "wgmma" => self.wgmma(),
            "cp" => self.copy(),
            "mbarrier" => self.mbarrier(),
            _ => self.control(),
        }
    }

    /// The refusal of this form.
    fn unknown<T>(&self) -> Parsed<T> {
        at(self.statement.line, format!("unsupported instruction `{}`", self.statement.opcode))
    }

    fn wrong<T>(&self, why: &str) -> Parsed<T> {
        at(self.statement.line, format!("`{}`: {why}", self.statement.opcode))
    }

    /// Takes a modifier if it is there.
    fn take(&mut self, modifier: &str) -> bool {
        let found = (1..self.parts.len()).find(|n| !self.taken[*n] && self.parts[*n] == modifier);
        if let Some(n) = found {
            self.taken[n] = true;
        }
        found.is_some()
    }

    /// Takes a modifier that must be there.
    fn need(&mut self, modifier: &str) -> Parsed<()> {
        if self.take(modifier) { Ok(()) } else { self.unknown() }
    }

    /// Takes the one of several modifiers that is there.
    fn take_any<T: Copy>(&mut self, choices: &[(&str, T)]) -> Option<T> {
        choices.iter().find(|(name, _)| self.take(name)).map(|(_, value)| *value)
    }

    /// Takes hints that change neither values nor order here.
    fn ignore(&mut self, modifiers: &[&str]) {
        for m in modifiers {
            self.take(m);
        }
    }

    /// Takes the last type that is left.
    fn ty(&mut self) -> Parsed<Type> {
        let last = (1..self.parts.len())
            .rev()
            .find_map(|n| Type::from_suffix(self.parts[n]).filter(|_| !self.taken[n]).map(|t| (n, t)));
        match last {
            Some((n, ty)) => {
                self.taken[n] = true;
                Ok(ty)
            }
            None => self.unknown(),
        }
    }

    /// Takes the first modifier that is left and starts with `prefix`; returns the rest of it.
    fn take_prefixed(&mut self, prefix: &str) -> Option<&'a str> {
        let n = (1..self.parts.len()).find(|n| !self.taken[*n] && self.parts[*n].starts_with(prefix))?;
        self.taken[n] = true;
        self.parts[n].strip_prefix(prefix)
    }

    fn operands(&self) -> usize {
        self.statement.operands.len()
    }

    fn operand(&self, n: usize) -> Parsed<&'a Operand> {
        match self.statement.operands.get(n) {
            Some(o) => Ok(o),
            None => self.wrong("too few operands"),
        }
    }

    /// Checks the number of operands.
    fn expect_operands(&self, n: usize) -> Parsed<()> {
        if self.operands() == n { Ok(()) } else { self.wrong("wrong number of operands") }
    }

    /// Records that a field of the instruction names a virtual register.
    fn using(&mut self, place: Place, register: u32, write: bool) -> u32 {
        self.uses.push(Use { place, register, write });
        register
    }

    /// The virtual register of a source operand. A register of the other width is converted first.
    fn source_of(&mut self, o: &Operand, wide: bool) -> Parsed<u32> {
        Ok(match o {
            Operand::Register(id) => {
                if self.code.function.registers[*id as usize] == Type::Pred {
                    return self.wrong("a predicate where a value is needed");
                }
                let register = self.code.register(*id);
                if self.code.virtuals[register as usize].wide == wide {
                    register
                } else {
                    self.convert_before(register, wide)
                }
            }
            Operand::Integer(v) => self.code.constant(wide, *v as u64),
            Operand::Single(bits) => self.code.constant(wide, (*bits).into()),
            Operand::Double(bits) => self.code.constant(wide, *bits),
            Operand::Symbol(name) => self.symbol(name, wide)?,
            _ => return self.wrong("an operand of another kind is needed"),
        })
    }

    fn symbol(&mut self, name: &str, wide: bool) -> Parsed<u32> {
        if let Some(value) = self.code.symbols.get(name) {
            let value = *value;
            return Ok(self.code.constant(wide, value));
        }
        let Some(special) = special(name) else {
            return self.wrong(&format!("`{name}` is not declared"));
        };
        let register = self.code.special(special);
        Ok(if wide { self.convert_before(register, true) } else { register })
    }

    /// A copy of a register in the other width, made before this instruction.
    fn convert_before(&mut self, register: u32, wide: bool) -> u32 {
        let copy = self.code.temporary(wide);
        let draft = self.conversion(register, copy, wide, false);
        self.code.drafts.push(draft);
        copy
    }

    fn conversion(&self, from: u32, to: u32, wide: bool, signed: bool) -> Draft {
        let mut inst = empty_instruction(self.statement.line);
        inst.class = Class::Internal;
        inst.run = match (wide, signed) {
            (true, false) => map1_handler(|a: u32| u64::from(a)),
            (true, true) => map1_handler(|a: i32| i64::from(a)),
            (false, _) => map1_handler(|a: u64| a as u32),
        };
        (inst.a, inst.d) = (from, to);
        self.guard(&mut inst);
        let uses = vec![
            Use { place: Place::A, register: from, write: false },
            Use { place: Place::D, register: to, write: true },
        ];
        Draft { inst, uses, location: None, flow: Flow::Plain }
    }

    fn guard(&self, inst: &mut Inst) {
        if let Some((id, negated)) = self.statement.guard
            && let Some(p) = self.code.registers[id as usize]
        {
            inst.guard = p as u16 + 1;
            inst.guard_negated = negated;
        }
    }

    /// The virtual register of a destination. A register of the other width is converted afterwards.
    fn destination_of(&mut self, o: &Operand, wide: bool, signed: bool) -> Parsed<u32> {
        match o {
            Operand::Sink => Ok(self.code.trash),
            Operand::Pair(first, _) => self.destination_of(first, wide, signed),
            Operand::Register(id) if self.code.function.registers[*id as usize] != Type::Pred => {
                let register = self.code.register(*id);
                if self.code.virtuals[register as usize].wide == wide {
                    return Ok(register);
                }
                // Only the other way round can the value be wider than the register.
                let temporary = self.code.temporary(wide);
                let draft = self.conversion(temporary, register, !wide, signed);
                self.after.push(draft);
                Ok(temporary)
            }
            _ => self.wrong("a register is needed as destination"),
        }
    }

    fn source<T: Lane>(&mut self, place: Place, n: usize) -> Parsed<u32> {
        let o = self.operand(n)?;
        let register = self.source_of(o, T::WIDE)?;
        Ok(self.using(place, register, false))
    }

    fn destination<T: Lane>(&mut self, n: usize) -> Parsed<()> {
        let o = self.operand(n)?;
        let register = self.destination_of(o, T::WIDE, false)?;
        self.inst.d = self.using(Place::D, register, true);
        Ok(())
    }

    /// Starts the list of the instruction with these operands.
    fn list(&mut self, operands: &[Operand], wide: bool, write: bool, signed: bool) -> Parsed<()> {
        let rows = operands
            .iter()
            .map(|o| if write { self.destination_of(o, wide, signed) } else { self.source_of(o, wide) })
            .collect::<Parsed<Vec<_>>>()?;
        self.list_registers(&rows, write);
        Ok(())
    }

    /// Appends virtual registers to the list.
    fn list_registers(&mut self, registers: &[u32], write: bool) {
        let listed = self.uses.iter().any(|u| matches!(u.place, Place::List(_)));
        if !listed {
            self.inst.list = self.code.lists.len() as u32;
        }
        for register in registers {
            let place = Place::List(self.code.lists.len() as u32);
            self.code.lists.push(*register);
            self.using(place, *register, write);
        }
    }

    /// The elements of a vector operand, or the operand itself as the only one.
    fn elements(&self, n: usize) -> Parsed<&'a [Operand]> {
        Ok(match self.operand(n)? {
            Operand::Vector(v) => v,
            o => std::slice::from_ref(o),
        })
    }

    /// A predicate operand and whether it is negated.
    fn predicate(&mut self, o: &Operand) -> Parsed<(u32, bool)> {
        match o {
            Operand::Register(id) if self.code.function.registers[*id as usize] == Type::Pred => {
                Ok((self.code.register(*id), false))
            }
            Operand::Not(inner) => self.predicate(inner).map(|(p, negated)| (p, !negated)),
            Operand::Sink => {
                self.code.predicates += 1;
                Ok((self.code.predicates - 1, false))
            }
            _ => self.wrong("a predicate is needed"),
        }
    }

    fn integer_operand(&self, n: usize) -> Parsed<i64> {
        match self.operand(n)? {
            Operand::Integer(v) => Ok(*v),
            _ => self.wrong("an integer is needed"),
        }
    }

    /// `[base + offset]`: the base goes to `a`, the offset to `imm`.
    fn address_operand(&mut self, n: usize, wide: bool) -> Parsed<()> {
        let Operand::Address(base, offset) = self.operand(n)? else {
            return self.wrong("an address is needed");
        };
        let register = self.source_of(base, wide)?;
        self.inst.a = self.using(Place::A, register, false);
        self.inst.imm = *offset;
        Ok(())
    }

    /// `[base]` without offset, into a place.
    fn plain_address(&mut self, n: usize, wide: bool, place: Place) -> Parsed<u32> {
        match self.operand(n)? {
            Operand::Address(base, 0) => {
                let register = self.source_of(base, wide)?;
                Ok(self.using(place, register, false))
            }
            _ => self.wrong("an address without offset is needed"),
        }
    }

    fn class(&mut self, class: Class) -> &mut Self {
        self.inst.class = class;
        self
    }

    /// Chooses what to run.
    fn run<I: Instruction>(&mut self) -> Parsed<()> {
        self.inst.run = handler::<I>();
        self.emitted = true;
        Ok(())
    }

    /// `d = f(a)` on the first two operands.
    fn map1<A: Lane, R: Lane, F: Fn(A) -> R + Copy>(&mut self, _: F) -> Parsed<()> {
        self.expect_operands(2)?;
        self.inst.a = self.source::<A>(Place::A, 1)?;
        self.destination::<R>(0)?;
        self.run::<Map1<A, R, F>>()
    }

    /// `d = f(a, b)` on the first three operands.
    fn map2<A: Lane, B: Lane, R: Lane, F: Fn(A, B) -> R + Copy>(&mut self, _: F) -> Parsed<()> {
        self.expect_operands(3)?;
        self.inst.a = self.source::<A>(Place::A, 1)?;
        self.inst.b = self.source::<B>(Place::B, 2)?;
        self.destination::<R>(0)?;
        self.run::<Map2<A, B, R, F>>()
    }

    fn sources3<A: Lane, B: Lane, C: Lane>(&mut self) -> Parsed<()> {
        self.inst.a = self.source::<A>(Place::A, 1)?;
        self.inst.b = self.source::<B>(Place::B, 2)?;
        self.inst.c = self.source::<C>(Place::C, 3)?;
        Ok(())
    }

    /// `d = f(a, b, c)` on the first four operands.
    fn map3<A: Lane, B: Lane, C: Lane, R: Lane, F>(&mut self, _: F) -> Parsed<()>
    where
        F: Fn(A, B, C) -> R + Copy,
    {
        self.expect_operands(4)?;
        self.sources3::<A, B, C>()?;
        self.destination::<R>(0)?;
        self.run::<Map3<A, B, C, R, F>>()
    }

    /// `d = f(a, b, c, n)` with the integer `n` of the fifth operand.
    fn map3_imm<A: Lane, B: Lane, C: Lane, R: Lane, F>(&mut self, _: F) -> Parsed<()>
    where
        F: Fn(A, B, C, i64) -> R + Copy,
    {
        self.expect_operands(5)?;
        self.sources3::<A, B, C>()?;
        self.inst.imm = self.integer_operand(4)?;
        self.destination::<R>(0)?;
        self.run::<Map3Imm<A, B, C, R, F>>()
    }

    /// `d = f(a, b, c, e)` on five operands.
    fn map4<A: Lane, B: Lane, C: Lane, E: Lane, R: Lane, F>(&mut self, _: F) -> Parsed<()>
    where
        F: Fn(A, B, C, E) -> R + Copy,
    {
        self.expect_operands(5)?;
        self.sources3::<A, B, C>()?;
        let fourth = self.operand(4)?;
        self.list(std::slice::from_ref(fourth), E::WIDE, false, false)?;
        self.destination::<R>(0)?;
        self.run::<Map4<A, B, C, E, R, F>>()
    }

    /// `d = f(clock)`
    fn from_warp<R: Lane, F: Fn(u32) -> R + Copy>(&mut self, _: F) -> Parsed<()> {
        self.destination::<R>(0)?;
        self.run::<FromWarp<R, F>>()
    }

    /// Does nothing.
    fn nothing(&mut self) -> Parsed<()> {
        self.run::<Nothing>()
    }

    /// Puts the instruction into the code, unless a modifier is left over.
    fn finish(mut self) -> Parsed<()> {
        if !self.emitted {
            return self.unknown();
        }
        if let Some(left) = (0..self.parts.len()).find(|n| !self.taken[*n]) {
            let why = format!("unsupported instruction `{}`: .{}", self.statement.opcode, self.parts[left]);
            return at(self.statement.line, why);
        }
        if let Some((id, _)) = self.statement.guard {
            self.code.register(id);
        }
        let mut inst = self.inst;
        self.guard(&mut inst);
        let location = self.statement.location;
        for draft in &mut self.after {
            if inst.guard != 0 {
                (draft.inst.guard, draft.inst.guard_negated) = (inst.guard, inst.guard_negated);
            }
        }
        self.code.drafts.push(Draft { inst, uses: self.uses, location, flow: self.flow });
        self.code.drafts.append(&mut self.after);
        Ok(())
    }
}

/// The function of a closure.
fn map1_handler<A: Lane, R: Lane, F: Fn(A) -> R + Copy>(_: F) -> crate::exec::Handler {
    handler::<Map1<A, R, F>>()
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
