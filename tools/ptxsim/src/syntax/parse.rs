//! A recursive-descent parser for PTX modules.

use super::ast::*;
use super::lex::{Token, lex};
use super::{Parsed, at};
use std::collections::HashMap;

/// Parses a module.
pub(crate) fn parse(text: &str) -> Parsed<Unit> {
    let tokens = lex(text)?;
    let mut p = Parser { tokens: &tokens, next: 0 };
    let mut unit = Unit::default();
    while !p.at_end() {
        p.module_item(&mut unit)?;
    }
    Ok(unit)
}

struct Parser<'a> {
    tokens: &'a [(Token<'a>, u32)],
    next: usize,
}

/// The registers of one `{ }`: single names, and families such as `%r<60>` as name, first index, count.
struct Scope<'a> {
    id: usize,
    names: HashMap<&'a str, RegisterId>,
    families: Vec<(&'a str, RegisterId, u32)>,
}

impl Scope<'_> {
    fn find(&self, name: &str) -> Option<RegisterId> {
        if let Some(id) = self.names.get(name) {
            return Some(*id);
        }
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let index: u32 = name[stem.len()..].parse().ok()?;
        let (_, first, count) = self.families.iter().find(|f| f.0 == stem)?;
        (index < *count).then_some(first + index)
    }
}

impl<'a> Parser<'a> {
    fn at_end(&self) -> bool {
        self.next >= self.tokens.len()
    }

    /// Line of the next token, or of the last one at the end of the text.
    fn line(&self) -> u32 {
        self.tokens.get(self.next).or(self.tokens.last()).map_or(1, |t| t.1)
    }

    fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.next).map(|t| t.0)
    }

    fn take(&mut self) -> Parsed<Token<'a>> {
        let Some(token) = self.peek() else { return at(self.line(), "text ends too early") };
        self.next += 1;
        Ok(token)
    }

    fn eat(&mut self, mark: char) -> bool {
        let found = self.peek() == Some(Token::Mark(mark));
        self.next += usize::from(found);
        found
    }

    fn expect(&mut self, mark: char) -> Parsed<()> {
        // What is missing belongs behind the last token, not in front of the next.
        let line = self.tokens.get(self.next.saturating_sub(1)).map_or(1, |t| t.1);
        if self.eat(mark) { Ok(()) } else { at(line, format!("expected `{mark}`")) }
    }

    fn word(&mut self) -> Parsed<&'a str> {
        let line = self.line();
        match self.take()? {
            Token::Word(s) => Ok(s),
            other => at(line, format!("expected a name, found {other:?}")),
        }
    }

    fn integer(&mut self) -> Parsed<i64> {
        let line = self.line();
        let negative = self.eat('-');
        match self.take()? {
            Token::Number(s) => match number(s, line)? {
                Operand::Integer(v) => Ok(if negative { v.wrapping_neg() } else { v }),
                _ => at(line, "expected an integer"),
            },
            other => at(line, format!("expected an integer, found {other:?}")),
        }
    }

    fn unsigned(&mut self) -> Parsed<u32> {
        let line = self.line();
        u32::try_from(self.integer()?).or_else(|_| at(line, "number out of range"))
    }

    /// Up to three extents; missing ones are 1.
    fn extents(&mut self) -> Parsed<[u32; 3]> {
        let mut extents = [self.unsigned()?, 1, 1];
        for e in &mut extents[1..] {
            if !self.eat(',') {
                break;
            }
            *e = self.unsigned()?;
        }
        Ok(extents)
    }

    fn skip_line(&mut self) {
        let line = self.line();
        while !self.at_end() && self.line() == line {
            self.next += 1;
        }
    }

    fn module_item(&mut self, unit: &mut Unit) -> Parsed<()> {
        let line = self.line();
        match self.word()? {
            ".version" => {
                unit.version = match self.take()? {
                    Token::Number(major) => major.to_string(),
                    _ => return at(line, "expected a version"),
                };
                if let Some(Token::Word(minor)) = self.peek()
                    && self.line() == line
                {
                    unit.version.push_str(minor);
                    self.next += 1;
                }
            }
            ".target" => {
                unit.target = self.word()?.to_string();
                while self.eat(',') {
                    self.word()?;
                }
            }
            ".address_size" => {
                if self.integer()? != 64 {
                    return at(line, "only 64-bit addresses are supported");
                }
            }
            ".visible" | ".weak" | ".common" => {}
            ".file" => self.file(unit)?,
            ".extern" => match self.word()? {
                ".shared" => {
                    let v = self.variable()?;
                    unit.extern_shared.push(v);
                }
                other => return at(line, format!("`.extern {other}` is not supported")),
            },
            ".shared" => {
                let v = self.variable()?;
                unit.shared.push(v);
            }
            ".global" => {
                let v = self.variable()?;
                unit.globals.push((v, false));
            }
            ".const" => {
                let v = self.variable()?;
                unit.globals.push((v, true));
            }
            ".entry" => {
                let f = self.function()?;
                unit.functions.push(f);
            }
            ".section" => {
                while !self.eat('}') {
                    self.take()?;
                }
            }
            other => return at(line, format!("`{other}` is not supported")),
        }
        Ok(())
    }

    /// `.file index "name" [, time, size]`
    fn file(&mut self, unit: &mut Unit) -> Parsed<()> {
        let line = self.line();
        let index = self.unsigned()?;
        match self.take()? {
            Token::Text(name) => {
                unit.files.insert(index, name.to_string());
            }
            other => return at(line, format!("expected a file name, found {other:?}")),
        }
        while self.eat(',') {
            self.integer()?;
        }
        Ok(())
    }

    /// `[.align n] .type name[count] [= init];` after the state space
    fn variable(&mut self) -> Parsed<Variable> {
        let v = self.declaration()?;
        self.expect(';')?;
        Ok(v)
    }

    fn declaration(&mut self) -> Parsed<Variable> {
        let mut align = None;
        let mut lanes = 1;
        let ty = loop {
            let line = self.line();
            match self.word()? {
                ".align" => align = Some(self.unsigned()?.max(1)),
                ".v2" => lanes = 2,
                ".v4" => lanes = 4,
                ".ptr" | ".global" | ".shared" | ".const" | ".local" => {}
                word => match word.strip_prefix('.').and_then(Type::from_suffix) {
                    Some(ty) => break ty,
                    None => return at(line, format!("expected a type, found `{word}`")),
                },
            }
        };
        // `.param .u64 .ptr .global .align 16 name`
        let line = self.line();
        let mut name = self.word()?;
        while name.starts_with('.') {
            if name == ".align" {
                self.unsigned()?;
            }
            name = self.word()?;
        }
        let element = ty.bytes();
        let mut count = lanes;
        while self.eat('[') {
            if self.eat(']') {
                count = 0;
            } else {
                let Some(product) = self.unsigned()?.checked_mul(count) else {
                    return at(line, "variable too large");
                };
                count = product;
                self.expect(']')?;
            }
        }
        let size = element.checked_mul(count).filter(|s| *s < 1 << 24);
        let Some(size) = size else { return at(line, "variable too large") };
        let mut init = Vec::new();
        if self.eat('=') {
            self.initialiser(element, &mut init)?;
        }
        let size = if count == 0 { init.len() as u32 } else { size };
        Ok(Variable { name: name.to_string(), align: align.unwrap_or(element.max(1)), size, init })
    }

    fn initialiser(&mut self, element: u32, out: &mut Vec<u8>) -> Parsed<()> {
        if self.eat('{') {
            while !self.eat('}') {
                self.initialiser(element, out)?;
                self.eat(',');
            }
            return Ok(());
        }
        let line = self.line();
        let negative = self.eat('-');
        let bits = match self.take()? {
            Token::Number(s) => match number(s, line)? {
                Operand::Integer(v) if negative => v.wrapping_neg() as u64,
                Operand::Integer(v) => v as u64,
                Operand::Single(v) => v.into(),
                Operand::Double(v) => v,
                _ => return at(line, "unsupported initialiser"),
            },
            _ => return at(line, "unsupported initialiser"),
        };
        out.extend_from_slice(&bits.to_le_bytes()[..element as usize]);
        Ok(())
    }

    fn function(&mut self) -> Parsed<Function> {
        let mut f = Function { name: self.word()?.to_string(), ..Function::default() };
        if self.eat('(') {
            self.parameters(&mut f)?;
        }
        while !self.eat('{') {
            self.performance_directive(&mut f)?;
        }
        self.body(&mut f)?;
        Ok(f)
    }

    fn parameters(&mut self, f: &mut Function) -> Parsed<()> {
        let mut end = 0u32;
        while !self.eat(')') {
            let line = self.line();
            if self.word()? != ".param" {
                return at(line, "expected `.param`");
            }
            let v = self.declaration()?;
            let offset = end.next_multiple_of(v.align);
            end = offset + v.size;
            f.parameters.push(Parameter { name: v.name, offset, size: v.size, align: v.align });
            self.eat(',');
        }
        Ok(())
    }

    fn performance_directive(&mut self, f: &mut Function) -> Parsed<()> {
        let line = self.line();
        match self.word()? {
            ".maxntid" => f.max_threads = Some(self.extents()?),
            ".reqntid" => {
                f.max_threads = Some(self.extents()?);
                f.exact_threads = true;
            }
            ".reqnctapercluster" => f.cluster = Some(self.extents()?),
            ".minnctapersm" | ".maxnctapersm" | ".maxnreg" | ".maxclusterrank" => {
                self.integer()?;
            }
            ".explicitcluster" => {}
            other => return at(line, format!("`{other}` is not supported")),
        }
        Ok(())
    }

    fn body(&mut self, f: &mut Function) -> Parsed<()> {
        f.scopes.push(0);
        let mut scopes = vec![Scope { id: 0, names: HashMap::new(), families: Vec::new() }];
        let mut location = None;
        loop {
            let line = self.line();
            let Some(scope) = scopes.last_mut() else { return Ok(()) };
            if self.eat('}') {
                scopes.pop();
            } else if self.eat('{') {
                let id = f.scopes.len();
                f.scopes.push(scope.id);
                scopes.push(Scope { id, names: HashMap::new(), families: Vec::new() });
            } else if self.eat(';') {
            } else if self.eat('@') {
                let negated = self.eat('!');
                let name = self.word()?;
                let guard = find(&scopes, name).filter(|r| f.registers[*r as usize] == Type::Pred);
                let Some(register) = guard else { return at(line, format!("no predicate `{name}`")) };
                self.statement(f, &scopes, Some((register, negated)), location)?;
            } else {
                match self.peek() {
                    Some(Token::Word(".reg")) => self.registers(f, scope)?,
                    Some(Token::Word(".loc")) => location = self.location()?,
                    Some(Token::Word(word)) if word.starts_with('.') => self.body_directive(f)?,
                    Some(Token::Word(word)) if self.is_label() => {
                        self.next += 2;
                        if f.labels.insert((scope.id, word.to_string()), f.body.len()).is_some() {
                            return at(line, format!("label `{word}` twice"));
                        }
                    }
                    _ => self.statement(f, &scopes, None, location)?,
                }
            }
        }
    }

    fn is_label(&self) -> bool {
        self.tokens.get(self.next + 1).map(|t| t.0) == Some(Token::Mark(':'))
    }

    fn body_directive(&mut self, f: &mut Function) -> Parsed<()> {
        let line = self.line();
        match self.word()? {
            ".shared" => {
                let v = self.variable()?;
                f.shared.push(v);
            }
            ".local" => {
                let v = self.variable()?;
                f.local.push(v);
            }
            ".pragma" => {
                self.take()?;
                self.expect(';')?;
            }
            other => return at(line, format!("`{other}` is not supported")),
        }
        Ok(())
    }

    /// `.loc file line column [, ...]`
    fn location(&mut self) -> Parsed<Option<Location>> {
        self.word()?;
        let location = Location { file: self.unsigned()?, line: self.unsigned()? };
        let this = self.tokens[self.next - 1].1;
        if self.line() == this {
            self.skip_line();
        }
        Ok((location.line != 0).then_some(location))
    }

    fn registers(&mut self, f: &mut Function, scope: &mut Scope<'a>) -> Parsed<()> {
        self.word()?;
        let line = self.line();
        let word = self.word()?;
        let Some(ty) = word.strip_prefix('.').and_then(Type::from_suffix) else {
            return at(line, format!("registers of type `{word}` are not supported"));
        };
        if ty == Type::B128 {
            return at(line, "registers of type `.b128` are not supported");
        }
        loop {
            let name = self.word()?;
            let first = f.registers.len() as RegisterId;
            if self.eat('<') {
                let count = self.unsigned()?;
                self.expect('>')?;
                scope.families.push((name, first, count));
                f.registers.extend((0..count).map(|_| ty));
            } else {
                scope.names.insert(name, first);
                f.registers.push(ty);
            }
            if !self.eat(',') {
                break;
            }
        }
        self.expect(';')
    }

    fn statement(
        &mut self,
        f: &mut Function,
        scopes: &[Scope<'a>],
        guard: Option<(RegisterId, bool)>,
        location: Option<Location>,
    ) -> Parsed<()> {
        let line = self.line();
        let opcode = self.word()?.to_string();
        let mut operands = Vec::new();
        while !self.eat(';') {
            operands.push(self.operand(scopes)?);
            if !self.eat(',') {
                self.expect(';')?;
                break;
            }
        }
        let scope = scopes.last().map_or(0, |s| s.id);
        f.body.push(Statement { guard, opcode, operands, line, location, scope });
        Ok(())
    }

    fn operand(&mut self, scopes: &[Scope<'a>]) -> Parsed<Operand> {
        let line = self.line();
        if self.eat('{') {
            return Ok(Operand::Vector(self.vector(scopes)?));
        }
        if self.eat('!') {
            return Ok(Operand::Not(Box::new(self.operand(scopes)?)));
        }
        if self.eat('[') {
            return self.address(scopes);
        }
        if self.eat('-') {
            return match self.take()? {
                Token::Number(s) => Ok(match number(s, line)? {
                    Operand::Integer(v) => Operand::Integer(v.wrapping_neg()),
                    Operand::Single(v) => Operand::Single(v ^ 1 << 31),
                    Operand::Double(v) => Operand::Double(v ^ 1 << 63),
                    other => other,
                }),
                _ => at(line, "expected a number after `-`"),
            };
        }
        match self.take()? {
            Token::Number(s) => number(s, line),
            Token::Word("_") => Ok(Operand::Sink),
            Token::Word(name) => {
                let o = match find(scopes, name) {
                    Some(register) => Operand::Register(register),
                    None => Operand::Symbol(name.to_string()),
                };
                if self.eat('|') {
                    return Ok(Operand::Pair(Box::new(o), Box::new(self.operand(scopes)?)));
                }
                Ok(o)
            }
            other => at(line, format!("expected an operand, found {other:?}")),
        }
    }

    fn vector(&mut self, scopes: &[Scope<'a>]) -> Parsed<Vec<Operand>> {
        let mut elements = Vec::new();
        while !self.eat('}') {
            elements.push(self.operand(scopes)?);
            if !self.eat(',') {
                self.expect('}')?;
                break;
            }
        }
        Ok(elements)
    }

    fn address(&mut self, scopes: &[Scope<'a>]) -> Parsed<Operand> {
        let base = Box::new(self.operand(scopes)?);
        if self.eat(',') {
            self.expect('{')?;
            let coordinates = self.vector(scopes)?;
            self.expect(']')?;
            return Ok(Operand::Tensor(base, coordinates));
        }
        let offset = if self.eat('+') || self.peek() == Some(Token::Mark('-')) { self.integer()? } else { 0 };
        self.expect(']')?;
        Ok(Operand::Address(base, offset))
    }
}

fn find(scopes: &[Scope<'_>], name: &str) -> Option<RegisterId> {
    scopes.iter().rev().find_map(|s| s.find(name))
}

/// A literal: `0f3F800000`, `0d…`, hexadecimal, octal, binary or decimal with an optional `U`.
fn number(s: &str, line: u32) -> Parsed<Operand> {
    let bad = |_| super::At { line, why: format!("bad number `{s}`") };
    if let Some(hex) = s.strip_prefix("0f").or(s.strip_prefix("0F")) {
        return u32::from_str_radix(hex, 16).map(Operand::Single).map_err(bad);
    }
    if let Some(hex) = s.strip_prefix("0d").or(s.strip_prefix("0D")) {
        return u64::from_str_radix(hex, 16).map(Operand::Double).map_err(bad);
    }
    let digits = s.trim_end_matches('U');
    let value = if let Some(hex) = digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        u64::from_str_radix(hex, 16)
    } else if let Some(binary) = digits.strip_prefix("0b").or(digits.strip_prefix("0B")) {
        u64::from_str_radix(binary, 2)
    } else if digits.len() > 1 && digits.starts_with('0') {
        u64::from_str_radix(digits, 8)
    } else {
        digits.parse::<u64>()
    };
    value.map(|v| Operand::Integer(v as i64)).map_err(bad)
}
