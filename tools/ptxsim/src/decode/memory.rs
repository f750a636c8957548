//! Loads, stores, atomics and address arithmetic.

use super::builder::Builder;
use crate::allocate::Place;
use crate::counters::Class;
use crate::exec::access::cluster_address;
use crate::exec::atomic::{self, Atomic, UPDATES};
use crate::exec::memory::{
    Generic, Load, LoadGlobal, LoadParam, Local, ORDERS, STRONG, Shared, Store, StoreGlobal,
};
use crate::run::{LOCAL_SLOT, PARAM_SLOT, SHARED_SLOT};
use crate::syntax::Parsed;
use crate::syntax::ast::Type;

/// A state space by its modifier.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Space {
    Global,
    Shared,
    Local,
    Param,
    Generic,
}

/// Cache and scope hints; order among threads is stricter here than the weakest that they allow.
const HINTS: &[&str] = &[
    "nc",
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "volatile",
    "weak",
    "relaxed",
    "acquire",
    "release",
    "acq_rel",
    "cta",
    "cluster",
    "gpu",
    "sys",
    "L1::no_allocate",
    "L1::evict_last",
    "L1::evict_first",
    "L1::evict_normal",
    "L1::evict_unchanged",
    "L2::64B",
    "L2::128B",
    "L2::256B",
    "noftz",
];

impl Builder<'_, '_> {
    fn space(&mut self) -> Space {
        self.take_any(&[
            ("global", Space::Global),
            ("const", Space::Global),
            ("shared", Space::Shared),
            ("shared::cta", Space::Shared),
            ("shared::cluster", Space::Shared),
            ("local", Space::Local),
            ("param", Space::Param),
            ("param::entry", Space::Param),
        ])
        .unwrap_or(Space::Generic)
    }

    fn vector_length(&mut self) -> u8 {
        self.take_any(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1)
    }

    /// Size, count, address and class of an access; returns the space.
    fn access(&mut self, address: usize) -> Parsed<(Space, Type)> {
        let space = self.space();
        self.ignore(HINTS);
        let ty = self.ty()?;
        self.inst.size = ty.bytes() as u8;
        self.inst.count = self.vector_length();
        self.inst.mode = ty.is_signed().into();
        if ![1, 2, 4, 8].contains(&self.inst.size) || self.inst.size * self.inst.count > 16 {
            return self.unknown();
        }
        self.class(match space {
            Space::Global | Space::Generic => Class::Global,
            Space::Shared => Class::Shared,
            Space::Local | Space::Param => Class::Local,
        });
        self.address_operand(address, space != Space::Shared)?;
        Ok((space, ty))
    }

    /// The elements of the value operand.
    fn values(&mut self, n: usize, write: bool, ty: Type) -> Parsed<()> {
        let elements = self.elements(n)?;
        if elements.len() != usize::from(self.inst.count) {
            return self.wrong("the vector has another length");
        }
        self.list(elements, ty.bytes() == 8, write, ty.is_signed())
    }

    /// Bits of `mode` for a load or store by its modifiers; `order` is the one that orders others.
    fn order(&self, order: &str) -> u8 {
        let has = |m: &str| self.parts.contains(&m);
        let orders = has(order) && !has("cta");
        let strong = orders || ["volatile", "relaxed", "cv"].into_iter().any(has);
        u8::from(strong) * STRONG | u8::from(orders) * ORDERS
    }

    pub(super) fn load(&mut self) -> Parsed<()> {
        self.expect_operands(2)?;
        let order = self.order("acquire");
        let (space, ty) = self.access(1)?;
        self.inst.mode |= order;
        self.values(0, true, ty)?;
        match space {
            Space::Global => self.run::<LoadGlobal>(),
            Space::Shared => self.run::<Load<Shared>>(),
            Space::Local => self.run::<Load<Local>>(),
            Space::Param => self.run::<LoadParam>(),
            Space::Generic => self.run::<Load<Generic>>(),
        }
    }

    pub(super) fn store(&mut self) -> Parsed<()> {
        if self.take("async") {
            return self.unknown();
        }
        self.expect_operands(2)?;
        let order = self.order("release");
        let (space, ty) = self.access(0)?;
        self.inst.mode |= order;
        self.values(1, false, ty)?;
        match space {
            Space::Global => self.run::<StoreGlobal>(),
            Space::Shared => self.run::<Store<Shared>>(),
            Space::Local => self.run::<Store<Local>>(),
            Space::Generic => self.run::<Store<Generic>>(),
            Space::Param => self.unknown(),
        }
    }

    pub(super) fn atomic(&mut self) -> Parsed<()> {
        let returns = self.parts[0] == "atom";
        if self.take("async") {
            return self.unknown();
        }
        let operations = UPDATES.iter().map(|u| u.operation);
        let Some(operation) = operations.into_iter().find(|o| self.take(o)) else { return self.unknown() };
        let first = usize::from(returns);
        let device = !self.parts.contains(&"cta");
        let orders = |m: &str| device && (self.parts.contains(&m) || self.parts.contains(&"acq_rel"));
        let (acquires, releases) = (orders("acquire"), orders("release"));
        let (space, ty) = self.access(first)?;
        let known = UPDATES.iter().position(|u| {
            u.operation == operation && u.types.iter().any(|t| Type::from_suffix(t) == Some(ty))
        });
        let Some(update) = known else { return self.unknown() };
        self.inst.d = update as u32;
        self.inst.mode = u8::from(returns);
        if acquires {
            self.inst.mode |= atomic::ACQUIRE;
        }
        if releases {
            self.inst.mode |= atomic::RELEASE;
        }
        let wide = ty.bytes() == 8;
        if returns {
            let results = self.elements(0)?;
            self.list(results, wide, true, false)?;
        }
        self.expect_operands(first + 2 + usize::from(operation == "cas"))?;
        let operands = self.elements(first + 1)?;
        if operands.len() != usize::from(self.inst.count) {
            return self.wrong("the vector has another length");
        }
        self.list(operands, wide, false, false)?;
        if operation == "cas" {
            self.inst.mode |= 2;
            let second = std::slice::from_ref(self.operand(first + 2)?);
            self.list(second, wide, false, false)?;
        }
        match space {
            Space::Global => self.run::<Atomic<crate::exec::memory::Global>>(),
            Space::Shared => self.run::<Atomic<Shared>>(),
            Space::Generic => self.run::<Atomic<Generic>>(),
            Space::Local | Space::Param => self.unknown(),
        }
    }

    /// `cvta`, `isspacep`, `mapa`, `getctarank`
    pub(super) fn address(&mut self) -> Parsed<()> {
        match self.parts[0] {
            "cvta" => self.cvta(),
            "mapa" => self.mapa(),
            "isspacep" => {
                self.inst.d = self.predicate(self.operand(0)?)?.0;
                self.inst.a = self.source::<u64>(Place::A, 1)?;
                self.inst.b = self.inst.a;
                self.using(Place::B, self.inst.a, false);
                match self.space() {
                    Space::Shared => self.in_space(|a, _| a >> 32 == SHARED_SLOT),
                    Space::Local => self.in_space(|a, _| a >> 32 == LOCAL_SLOT),
                    Space::Param => self.in_space(|a, _| a >> 32 == PARAM_SLOT),
                    Space::Global => self.in_space(|a, _| a >> 32 > LOCAL_SLOT),
                    Space::Generic => self.unknown(),
                }
            }
            _ => self.unknown(),
        }
    }

    fn in_space<F: Fn(u64, u64) -> bool + Copy>(&mut self, _: F) -> Parsed<()> {
        self.run::<crate::exec::arithmetic::Compare<u64, F>>()
    }

    fn cvta(&mut self) -> Parsed<()> {
        let to = self.take("to");
        let space = self.space();
        match self.ty()? {
            Type::U64 | Type::B64 => {}
            _ => return self.unknown(),
        }
        self.expect_operands(2)?;
        let slot: fn(&mut Self) -> Parsed<()> = match (space, to) {
            (Space::Global, _) => |b| b.map1(|a: u64| a),
            (Space::Generic, _) => return self.unknown(),
            (_, true) => |b| b.map1(|a: u64| a & 0xffff_ffff),
            (Space::Shared, false) => |b| b.map1(|a: u64| a & 0xffff_ffff | SHARED_SLOT << 32),
            (Space::Local, false) => |b| b.map1(|a: u64| a & 0xffff_ffff | LOCAL_SLOT << 32),
            (Space::Param, false) => |b| b.map1(|a: u64| a & 0xffff_ffff | PARAM_SLOT << 32),
        };
        slot(self)
    }

    /// `mapa.shared::cluster.u32 d, a, rank`
    fn mapa(&mut self) -> Parsed<()> {
        self.expect_operands(3)?;
        let space = self.space();
        match (space, self.ty()?) {
            (Space::Shared, Type::U32 | Type::B32) => self.map2(cluster_address),
            (Space::Generic, Type::U64 | Type::B64) => {
                self.map2(|a: u64, rank: u32| u64::from(cluster_address(a as u32, rank)) | SHARED_SLOT << 32)
            }
            _ => self.unknown(),
        }
    }
}
