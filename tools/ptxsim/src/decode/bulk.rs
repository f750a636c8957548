//! `cp.async` and bulk copies.

use super::builder::Builder;
use crate::allocate::Place;
use crate::counters::Class;
use crate::exec::bulk::{CommitBulk, LoadRange, LoadTile, Reduction, StoreRange, StoreTile, WaitBulk};
use crate::exec::copy::{Commit, CopyAsync, Wait};
use crate::syntax::Parsed;
use crate::syntax::ast::{Operand, Type};

const DIMENSIONS: [(&str, u8); 5] = [("1d", 1), ("2d", 2), ("3d", 3), ("4d", 4), ("5d", 5)];

impl Builder<'_, '_> {
    pub(super) fn copy(&mut self) -> Parsed<()> {
        self.class(Class::Copy);
        let reduce = self.take("reduce");
        self.need("async")?;
        if self.take("bulk") {
            return self.bulk(reduce);
        }
        if self.take("commit_group") {
            return self.run::<Commit>();
        }
        if self.take("wait_group") {
            self.inst.imm = self.integer_operand(0)?;
            return self.run::<Wait>();
        }
        if self.take("wait_all") {
            self.inst.mode = 1;
            return self.run::<Wait>();
        }
        if self.take("mbarrier") {
            return self.copy_arrive();
        }
        self.copy_async()
    }

    /// `cp.async.ca|cg.shared.global [to], [from], size{, source size | ignore}`
    fn copy_async(&mut self) -> Parsed<()> {
        let all_levels = self.take("ca");
        if !all_levels {
            self.need("cg")?;
        }
        if !self.take("shared") {
            self.need("shared::cta")?;
        }
        self.need("global")?;
        self.ignore(&["L2::64B", "L2::128B", "L2::256B", "L2::cache_hint"]);
        self.address_operand(0, false)?;
        let Operand::Address(from, offset) = self.operand(1)? else {
            return self.wrong("an address is needed");
        };
        let from = self.source_of(from, true)?;
        self.inst.b = self.using(Place::B, from, false);
        let Ok(offset) = i32::try_from(*offset) else { return self.wrong("the offset is too large") };
        self.inst.d = offset as u32;
        let size = self.integer_operand(2)?;
        if !(size == 16 || all_levels && (size == 4 || size == 8)) {
            return self.wrong("sizes are 4, 8 and 16, or 16 alone with .cg");
        }
        self.inst.size = size as u8;
        let whole = self.code.constant(false, size as u64);
        match self.statement.operands.get(3) {
            None => self.inst.c = self.using(Place::C, whole, false),
            Some(Operand::Register(id)) if self.code.function.registers[*id as usize] == Type::Pred => {
                let (p, _) = self.predicate(self.operand(3)?)?;
                self.inst.list = self.code.lists.len() as u32;
                self.code.lists.push(p);
                self.inst.mode = 1;
                self.inst.c = self.using(Place::C, whole, false);
            }
            Some(_) => self.inst.c = self.source::<u32>(Place::C, 3)?,
        }
        self.run::<CopyAsync>()
    }

    fn bulk(&mut self, reduce: bool) -> Parsed<()> {
        if self.take("commit_group") {
            return self.run::<CommitBulk>();
        }
        if self.take("wait_group") {
            self.inst.mode = self.take("read").into();
            self.inst.imm = self.integer_operand(0)?;
            return self.run::<WaitBulk>();
        }
        if self.take("prefetch") {
            self.ignore(&["tensor", "1d", "2d", "3d", "4d", "5d", "L2", "global", "tile"]);
            return self.nothing();
        }
        let tensor = self.take("tensor");
        self.ignore(&["tile"]);
        let load = !self.is_store();
        match (tensor, load) {
            (true, true) if !reduce => self.load_tile(),
            (true, false) => self.store_tile(reduce),
            (false, true) if !reduce => self.load_range(),
            (false, false) => self.store_range(reduce),
            _ => self.unknown(),
        }
    }

    /// Whether the destination is global: `.global` stands before `.shared`.
    fn is_store(&self) -> bool {
        let position = |prefix: &str| self.parts.iter().position(|p| p.starts_with(prefix));
        position("global") < position("shared")
    }

    fn load_modifiers(&mut self) -> Parsed<()> {
        if !self.take("shared::cluster") {
            self.need("shared::cta")?;
        }
        self.need("global")?;
        self.need("mbarrier::complete_tx::bytes")?;
        self.inst.mode = self.take("multicast::cluster").into();
        Ok(())
    }

    fn store_modifiers(&mut self, reduce: bool) -> Parsed<()> {
        self.need("global")?;
        self.need("shared::cta")?;
        self.need("bulk_group")?;
        if reduce {
            let operation =
                self.take_any(&[("add", Reduction::Add), ("min", Reduction::Min), ("max", Reduction::Max)]);
            let Some(operation) = operation else { return self.unknown() };
            self.inst.mode = operation as u8;
        }
        Ok(())
    }

    /// `[map, {coordinates}]`
    fn tensor_operand(&mut self, n: usize) -> Parsed<()> {
        let Some(dimensions) = self.take_any(&DIMENSIONS) else { return self.unknown() };
        let Operand::Tensor(map, coordinates) = self.operand(n)? else {
            return self.wrong("`[map, {coordinates}]` is needed");
        };
        if coordinates.len() != usize::from(dimensions) {
            return self.wrong("another number of coordinates than dimensions");
        }
        let map = self.source_of(map, true)?;
        self.inst.a = self.using(Place::A, map, false);
        self.inst.count = dimensions;
        self.list(coordinates, false, false, false)
    }

    /// `[shared], [map, {coordinates}], [mbarrier]{, mask}{, cache policy}`
    fn load_tile(&mut self) -> Parsed<()> {
        self.load_modifiers()?;
        self.take("L2::cache_hint");
        self.inst.d = self.plain_address(0, false, Place::D)?;
        self.tensor_operand(1)?;
        self.inst.b = self.plain_address(2, false, Place::B)?;
        if self.inst.mode == 1 {
            self.inst.c = self.source::<u16>(Place::C, 3)?;
        }
        self.run::<LoadTile>()
    }

    /// `[map, {coordinates}], [shared]`
    fn store_tile(&mut self, reduce: bool) -> Parsed<()> {
        self.store_modifiers(reduce)?;
        self.take("L2::cache_hint");
        self.tensor_operand(0)?;
        self.inst.d = self.plain_address(1, false, Place::D)?;
        self.run::<StoreTile>()
    }

    /// `[shared], [global], bytes, [mbarrier]{, mask}`
    fn load_range(&mut self) -> Parsed<()> {
        self.load_modifiers()?;
        self.take("L2::cache_hint");
        self.inst.d = self.plain_address(0, false, Place::D)?;
        self.inst.a = self.plain_address(1, true, Place::A)?;
        self.inst.b = self.source::<u32>(Place::B, 2)?;
        let Operand::Address(mbarrier, 0) = self.operand(3)? else {
            return self.wrong("an mbarrier is needed");
        };
        self.list(std::slice::from_ref(&**mbarrier), false, false, false)?;
        if self.inst.mode == 1 {
            self.inst.c = self.source::<u16>(Place::C, 4)?;
        }
        self.run::<LoadRange>()
    }

    /// `[global], [shared], bytes`
    fn store_range(&mut self, reduce: bool) -> Parsed<()> {
        self.store_modifiers(reduce)?;
        self.take("L2::cache_hint");
        self.take("noftz");
        if reduce {
            let ty = self.ty()?;
            self.inst.size = ty.bytes() as u8;
            self.inst.count = match ty {
                Type::F16 | Type::F32 | Type::F64 => 1,
                Type::Bf16 => 2,
                Type::U32 | Type::U64 => 0,
                Type::S32 | Type::S64 if self.inst.mode == Reduction::Add as u8 => 0,
                _ => return self.unknown(),
            };
        }
        self.inst.a = self.plain_address(0, true, Place::A)?;
        self.inst.d = self.plain_address(1, false, Place::D)?;
        self.inst.b = self.source::<u32>(Place::B, 2)?;
        self.run::<StoreRange>()
    }
}
