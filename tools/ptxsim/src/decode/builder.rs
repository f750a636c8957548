//! How a statement becomes an instruction: modifiers are taken one by one, operands become virtual registers.

use super::{Code, Draft, Flow, empty_instruction, special};
use crate::allocate::{Place, Use};
use crate::counters::Class;
use crate::exec::arithmetic::{Called1, FromWarp, Map1, Map2, Map3, Map3Imm, Map4, Nothing};
use crate::exec::lane::Lane;
use crate::exec::{Inst, Instruction, handler};
use crate::syntax::ast::{Operand, Statement, Type};
use crate::syntax::{Parsed, at};

/// Decodes one statement.
pub(super) struct Builder<'c, 'a> {
    pub(super) code: &'c mut Code<'a>,
    pub(super) statement: &'a Statement,
    pub(super) parts: Vec<&'a str>,
    taken: Vec<bool>,
    pub(super) inst: Inst,
    uses: Vec<Use>,
    pub(super) flow: Flow,
    /// Conversions that follow the instruction.
    after: Vec<Draft>,
    emitted: bool,
}

impl<'c, 'a> Builder<'c, 'a> {
    pub(super) fn new(code: &'c mut Code<'a>, statement: &'a Statement) -> Self {
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
    pub(super) fn instruction(&mut self) -> Parsed<()> {
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
    pub(super) fn unknown<T>(&self) -> Parsed<T> {
        at(self.statement.line, format!("unsupported instruction `{}`", self.statement.opcode))
    }

    pub(super) fn wrong<T>(&self, why: &str) -> Parsed<T> {
        at(self.statement.line, format!("`{}`: {why}", self.statement.opcode))
    }

    /// Takes a modifier if it is there.
    pub(super) fn take(&mut self, modifier: &str) -> bool {
        let found = (1..self.parts.len()).find(|n| !self.taken[*n] && self.parts[*n] == modifier);
        if let Some(n) = found {
            self.taken[n] = true;
        }
        found.is_some()
    }

    /// Takes a modifier that must be there.
    pub(super) fn need(&mut self, modifier: &str) -> Parsed<()> {
        if self.take(modifier) { Ok(()) } else { self.unknown() }
    }

    /// Takes the one of several modifiers that is there.
    pub(super) fn take_any<T: Copy>(&mut self, choices: &[(&str, T)]) -> Option<T> {
        choices.iter().find(|(name, _)| self.take(name)).map(|(_, value)| *value)
    }

    /// Takes hints that change neither values nor order here.
    pub(super) fn ignore(&mut self, modifiers: &[&str]) {
        for m in modifiers {
            self.take(m);
        }
    }

    /// Takes the last type that is left.
    pub(super) fn ty(&mut self) -> Parsed<Type> {
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
    pub(super) fn take_prefixed(&mut self, prefix: &str) -> Option<&'a str> {
        let n = (1..self.parts.len()).find(|n| !self.taken[*n] && self.parts[*n].starts_with(prefix))?;
        self.taken[n] = true;
        self.parts[n].strip_prefix(prefix)
    }

    pub(super) fn operands(&self) -> usize {
        self.statement.operands.len()
    }

    pub(super) fn operand(&self, n: usize) -> Parsed<&'a Operand> {
        match self.statement.operands.get(n) {
            Some(o) => Ok(o),
            None => self.wrong("too few operands"),
        }
    }

    /// Checks the number of operands.
    pub(super) fn expect_operands(&self, n: usize) -> Parsed<()> {
        if self.operands() == n { Ok(()) } else { self.wrong("wrong number of operands") }
    }

    /// Records that a field of the instruction names a virtual register.
    pub(super) fn using(&mut self, place: Place, register: u32, write: bool) -> u32 {
        self.uses.push(Use { place, register, write });
        register
    }

    /// The virtual register of a source operand. A register of the other width is converted first.
    pub(super) fn source_of(&mut self, o: &Operand, wide: bool) -> Parsed<u32> {
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

    pub(super) fn symbol(&mut self, name: &str, wide: bool) -> Parsed<u32> {
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
    pub(super) fn convert_before(&mut self, register: u32, wide: bool) -> u32 {
        let copy = self.code.temporary(wide);
        let draft = self.conversion(register, copy, wide, false);
        self.code.drafts.push(draft);
        copy
    }

    pub(super) fn conversion(&self, from: u32, to: u32, wide: bool, signed: bool) -> Draft {
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

    pub(super) fn guard(&self, inst: &mut Inst) {
        if let Some((id, negated)) = self.statement.guard
            && let Some(p) = self.code.registers[id as usize]
        {
            inst.guard = p as u16 + 1;
            inst.guard_negated = negated;
        }
    }

    /// The virtual register of a destination. A register of the other width is converted afterwards.
    pub(super) fn destination_of(&mut self, o: &Operand, wide: bool, signed: bool) -> Parsed<u32> {
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

    pub(super) fn source<T: Lane>(&mut self, place: Place, n: usize) -> Parsed<u32> {
        let o = self.operand(n)?;
        let register = self.source_of(o, T::WIDE)?;
        Ok(self.using(place, register, false))
    }

    pub(super) fn destination<T: Lane>(&mut self, n: usize) -> Parsed<()> {
        let o = self.operand(n)?;
        let register = self.destination_of(o, T::WIDE, false)?;
        self.inst.d = self.using(Place::D, register, true);
        Ok(())
    }

    /// Starts the list of the instruction with these operands.
    pub(super) fn list(&mut self, operands: &[Operand], wide: bool, write: bool, signed: bool) -> Parsed<()> {
        let rows = operands
            .iter()
            .map(|o| if write { self.destination_of(o, wide, signed) } else { self.source_of(o, wide) })
            .collect::<Parsed<Vec<_>>>()?;
        self.list_registers(&rows, write);
        Ok(())
    }

    /// Appends virtual registers to the list.
    pub(super) fn list_registers(&mut self, registers: &[u32], write: bool) {
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
    pub(super) fn elements(&self, n: usize) -> Parsed<&'a [Operand]> {
        Ok(match self.operand(n)? {
            Operand::Vector(v) => v,
            o => std::slice::from_ref(o),
        })
    }

    /// A predicate operand and whether it is negated.
    pub(super) fn predicate(&mut self, o: &Operand) -> Parsed<(u32, bool)> {
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

    pub(super) fn integer_operand(&self, n: usize) -> Parsed<i64> {
        match self.operand(n)? {
            Operand::Integer(v) => Ok(*v),
            _ => self.wrong("an integer is needed"),
        }
    }

    /// `[base + offset]`: the base goes to `a`, the offset to `imm`.
    pub(super) fn address_operand(&mut self, n: usize, wide: bool) -> Parsed<()> {
        let Operand::Address(base, offset) = self.operand(n)? else {
            return self.wrong("an address is needed");
        };
        let register = self.source_of(base, wide)?;
        self.inst.a = self.using(Place::A, register, false);
        self.inst.imm = *offset;
        Ok(())
    }

    /// `[base]` without offset, into a place.
    pub(super) fn plain_address(&mut self, n: usize, wide: bool, place: Place) -> Parsed<u32> {
        match self.operand(n)? {
            Operand::Address(base, 0) => {
                let register = self.source_of(base, wide)?;
                Ok(self.using(place, register, false))
            }
            _ => self.wrong("an address without offset is needed"),
        }
    }

    pub(super) fn class(&mut self, class: Class) -> &mut Self {
        self.inst.class = class;
        self
    }

    /// Chooses what to run.
    pub(super) fn run<I: Instruction>(&mut self) -> Parsed<()> {
        self.inst.run = handler::<I>();
        self.emitted = true;
        Ok(())
    }

    /// `d = f(a)` on the first two operands.
    pub(super) fn map1<A: Lane, R: Lane, F: Fn(A) -> R + Copy>(&mut self, _: F) -> Parsed<()> {
        self.expect_operands(2)?;
        self.inst.a = self.source::<A>(Place::A, 1)?;
        self.destination::<R>(0)?;
        self.run::<Map1<A, R, F>>()
    }

    /// `d = f(a)` on the first two operands, for what kernels seldom do.
    pub(super) fn called1<A: Lane, R: Lane, F: Fn(A) -> R + Copy>(&mut self, f: F) -> Parsed<()> {
        self.expect_operands(2)?;
        self.inst.a = self.source::<A>(Place::A, 1)?;
        self.destination::<R>(0)?;
        self.inst.imm = Called1::<A, R>::pointer(f);
        match (A::WIDE, R::WIDE) {
            (false, false) => self.run::<Called1<u32, u32>>(),
            (false, true) => self.run::<Called1<u32, u64>>(),
            (true, false) => self.run::<Called1<u64, u32>>(),
            (true, true) => self.run::<Called1<u64, u64>>(),
        }
    }

    /// `d = f(a, b)` on the first three operands.
    pub(super) fn map2<A: Lane, B: Lane, R: Lane, F: Fn(A, B) -> R + Copy>(&mut self, _: F) -> Parsed<()> {
        self.expect_operands(3)?;
        self.inst.a = self.source::<A>(Place::A, 1)?;
        self.inst.b = self.source::<B>(Place::B, 2)?;
        self.destination::<R>(0)?;
        self.run::<Map2<A, B, R, F>>()
    }

    pub(super) fn sources3<A: Lane, B: Lane, C: Lane>(&mut self) -> Parsed<()> {
        self.inst.a = self.source::<A>(Place::A, 1)?;
        self.inst.b = self.source::<B>(Place::B, 2)?;
        self.inst.c = self.source::<C>(Place::C, 3)?;
        Ok(())
    }

    /// `d = f(a, b, c)` on the first four operands.
    pub(super) fn map3<A: Lane, B: Lane, C: Lane, R: Lane, F>(&mut self, _: F) -> Parsed<()>
    where
        F: Fn(A, B, C) -> R + Copy,
    {
        self.expect_operands(4)?;
        self.sources3::<A, B, C>()?;
        self.destination::<R>(0)?;
        self.run::<Map3<A, B, C, R, F>>()
    }

    /// `d = f(a, b, c, n)` with the integer `n` of the fifth operand.
    pub(super) fn map3_imm<A: Lane, B: Lane, C: Lane, R: Lane, F>(&mut self, _: F) -> Parsed<()>
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
    pub(super) fn map4<A: Lane, B: Lane, C: Lane, E: Lane, R: Lane, F>(&mut self, _: F) -> Parsed<()>
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
    pub(super) fn clock<R: Lane, F: Fn(u32) -> R + Copy>(&mut self, _: F) -> Parsed<()> {
        self.destination::<R>(0)?;
        self.run::<FromWarp<R, F>>()
    }

    /// Does nothing.
    pub(super) fn nothing(&mut self) -> Parsed<()> {
        self.run::<Nothing>()
    }

    /// Puts the instruction into the code, unless a modifier is left over.
    pub(super) fn finish(mut self) -> Parsed<()> {
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
