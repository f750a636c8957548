//! Matrix instructions.

use super::Flow;
use super::builder::Builder;
use crate::allocate::Place;
use crate::counters::Class;
use crate::exec::matrix::{LoadMatrix, StoreMatrix};
use crate::exec::product::{BFloat, Float16, Mma, Tf32};
use crate::exec::wgmma::{self, WgmmaBf16, WgmmaF16, WgmmaTf32};
#[cfg(target_arch = "x86_64")]
use crate::exec::{wide::WideMma, wide_host};
use crate::syntax::Parsed;
use crate::syntax::ast::{Operand, Type};

impl Builder<'_, '_> {
    /// `ldmatrix` and `stmatrix` of 8 by 8 matrices of 16-bit elements.
    pub(super) fn matrix_access(&mut self) -> Parsed<()> {
        self.class(Class::Shared);
        let store = self.parts[0] == "stmatrix";
        for m in ["sync", "aligned", "m8n8", "b16"] {
            self.need(m)?;
        }
        self.ignore(&["shared", "shared::cta"]);
        let Some(count) = self.take_any(&[("x1", 1), ("x2", 2), ("x4", 4)]) else { return self.unknown() };
        self.inst.count = count;
        self.inst.mode = self.take("trans").into();
        let (address, values) = if store { (0, 1) } else { (1, 0) };
        self.address_operand(address, false)?;
        let elements = self.elements(values)?;
        if elements.len() != usize::from(count) {
            return self.wrong("the vector has another length");
        }
        self.list(elements, false, !store, false)?;
        if store { self.run::<StoreMatrix>() } else { self.run::<LoadMatrix>() }
    }

    /// `mma.sync.aligned.m16n8kK.row.col.d.a.b.c`
    pub(super) fn mma(&mut self) -> Parsed<()> {
        self.class(Class::Tensor);
        for m in ["sync", "aligned", "row", "col"] {
            self.need(m)?;
        }
        let Some(k) = self.take_any(&[("m16n8k16", 16), ("m16n8k8", 8), ("m16n8k4", 4)]) else {
            return self.unknown();
        };
        let accumulator = self.ty()?;
        let element = if self.take("tf32") {
            self.need("tf32")?;
            None
        } else {
            let b = self.ty()?;
            if self.ty()? != b {
                return self.unknown();
            }
            Some(b)
        };
        if self.ty()? != accumulator {
            return self.unknown();
        }
        let sums = match (accumulator, element) {
            (Type::F32, _) => 4,
            (Type::F16, Some(Type::F16)) => 2,
            _ => return self.unknown(),
        };
        self.inst.mode = u8::from(sums == 2);
        let (a, b) = if element.is_none() { (k / 2, k / 4) } else { (k / 4, k / 8) };
        self.inst.flops = 2 * 16 * 8 * k as u32;
        for (n, length) in [sums, a, b, sums].into_iter().enumerate() {
            let Operand::Vector(v) = self.operand(n)? else { return self.wrong("vectors are needed") };
            if v.len() != length {
                return self.wrong("a vector has another length");
            }
            self.list(v, false, n == 0, false)?;
        }
        #[cfg(target_arch = "x86_64")]
        match (element, k) {
            (Some(Type::Bf16), 16) if wide_host() => return self.run::<WideMma<2>>(),
            (Some(Type::Bf16), 8) if wide_host() => return self.run::<WideMma<1>>(),
            _ => {}
        }
        match (element, k) {
            (Some(Type::Bf16), 16) => self.run::<Mma<BFloat, 4>>(),
            (Some(Type::Bf16), 8) => self.run::<Mma<BFloat, 2>>(),
            (Some(Type::F16), 16) => self.run::<Mma<Float16, 4>>(),
            (Some(Type::F16), 8) => self.run::<Mma<Float16, 2>>(),
            (None, 8) => self.run::<Mma<Tf32, 2>>(),
            (None, 4) => self.run::<Mma<Tf32, 1>>(),
            _ => self.unknown(),
        }
    }

    pub(super) fn wgmma(&mut self) -> Parsed<()> {
        self.class(Class::Tensor);
        self.need("sync")?;
        self.need("aligned")?;
        if self.take("fence") {
            self.class(Class::Sync);
            self.flow = Flow::ProductFence;
            return self.nothing();
        }
        if self.take("commit_group") {
            self.class(Class::Sync);
            return self.run::<wgmma::Commit>();
        }
        if self.take("wait_group") {
            self.class(Class::Sync);
            self.inst.imm = self.integer_operand(0)?;
            self.flow = Flow::ProductWait;
            return self.run::<wgmma::Wait>();
        }
        self.need("mma_async")?;
        self.product()
    }

    /// `wgmma.mma_async.sync.aligned.m64nNkK.f32.T.T {d}, a, b, scale-d, imm-a, imm-b{, trans-a}{, trans-b}`
    fn product(&mut self) -> Parsed<()> {
        let tf32 = self.take("tf32");
        let element = if tf32 {
            self.need("tf32")?;
            Type::F32
        } else {
            let b = self.ty()?;
            if self.ty()? != b {
                return self.unknown();
            }
            b
        };
        self.need("f32")?;
        let k = if tf32 { 8 } else { 16 };
        let Some(shape) = self.take_prefixed("m64n") else { return self.unknown() };
        let n = shape.strip_suffix(&format!("k{k}")).and_then(|n| n.parse::<u32>().ok());
        let Some(n) = n.filter(|n| n.is_multiple_of(8) && (8..=256).contains(n)) else {
            return self.unknown();
        };
        self.inst.count = (n / 8) as u8;
        self.inst.flops = 2 * 16 * n * k;
        let sums = self.elements(0)?;
        if sums.len() != n as usize / 2 {
            return self.wrong("the accumulator has another length");
        }
        // Accumulators are read unless scale-d is false; as reads they stay alive over the whole product.
        self.list(sums, false, false, false)?;
        let listed = self.code.lists.len();
        for (i, o) in sums.iter().enumerate() {
            let register = self.destination_of(o, false, false)?;
            let place = crate::allocate::Place::List((listed - sums.len() + i) as u32);
            self.using(place, register, true);
        }
        let mut in_registers = false;
        if let Operand::Vector(v) = self.operand(1)? {
            if v.len() != 4 {
                return self.wrong("A in registers has four of them");
            }
            self.list(v, false, false, false)?;
            in_registers = true;
            self.inst.mode |= wgmma::A_IN_REGISTERS;
        } else {
            self.inst.a = self.source::<u64>(Place::A, 1)?;
        }
        self.flow = Flow::Product(sums.len() + if in_registers { 4 } else { 0 });
        self.inst.b = self.source::<u64>(Place::B, 2)?;
        let (p, negated) = self.predicate(self.operand(3)?)?;
        if negated {
            return self.unknown();
        }
        self.inst.c = p;
        for (n, bit) in [(4, wgmma::NEGATE_A), (5, wgmma::NEGATE_B)] {
            match self.integer_operand(n)? {
                1 => {}
                -1 => self.inst.mode |= bit,
                _ => return self.wrong("scales are 1 or -1"),
            }
        }
        let transposes: &[(usize, u8)] = match (tf32, in_registers) {
            (true, _) => &[],
            (false, true) => &[(6, wgmma::B_TRANSPOSED)],
            (false, false) => &[(6, wgmma::A_TRANSPOSED), (7, wgmma::B_TRANSPOSED)],
        };
        for (n, bit) in transposes {
            self.inst.mode |= if self.integer_operand(*n)? != 0 { *bit } else { 0 };
        }
        match element {
            Type::Bf16 => self.run::<WgmmaBf16>(),
            Type::F16 => self.run::<WgmmaF16>(),
            Type::F32 => self.run::<WgmmaTf32>(),
            _ => self.unknown(),
        }
    }
}
