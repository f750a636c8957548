//! Branches, barriers, fences, and exchanges within a warp.

use super::Flow;
use super::builder::Builder;
use crate::allocate::Place;
use crate::counters::Class;
use crate::exec::barrier::{ClusterArrive, ClusterWait, Converged, Fence, ProxyFence, Sync, WarpSync};
use crate::exec::collective::{ActiveMask, Elect, Match, Reduce, Shfl, Shuffle, Vote};
use crate::exec::copy::ArriveAfter;
use crate::exec::mbarrier::{Announce, Arrive, Init, Invalidate, TryWait};
use crate::exec::warp::{Branch, BranchTable, Exit, Sleep, Trap};
use crate::syntax::Parsed;
use crate::syntax::ast::{Operand, Type};

impl Builder<'_, '_> {
    pub(super) fn control(&mut self) -> Parsed<()> {
        match self.parts[0] {
            "bra" => self.branch(),
            "brx" => self.branch_table(),
            "ret" | "exit" => {
                self.take("uni");
                self.class(Class::Control);
                self.flow = Flow::Exit;
                self.run::<Exit>()
            }
            "trap" => self.class(Class::Control).run::<Trap>(),
            "nanosleep" => {
                self.ty()?;
                self.class(Class::Sync).run::<Sleep>()
            }
            "bar" | "barrier" => self.barrier(),
            "fence" | "membar" => self.fence(),
            "shfl" => self.shfl(),
            "vote" => self.vote(),
            "match" => self.matching(),
            "redux" => self.redux(),
            "elect" => self.elect(),
            "activemask" => {
                self.need("b32")?;
                self.destination::<u32>(0)?;
                self.class(Class::Exchange).run::<ActiveMask>()
            }
            "setmaxnreg" => {
                if !self.take("inc") && !self.take("dec") {
                    return self.unknown();
                }
                self.ignore(&["sync", "aligned", "u32"]);
                self.class(Class::Control).run::<Converged>()
            }
            "prefetch" | "prefetchu" => {
                self.ignore(&["global", "local", "param", "const", "tensormap"]);
                self.ignore(&["L1", "L2", "L2::evict_last", "L2::evict_normal"]);
                self.class(Class::Control).nothing()
            }
            "griddepcontrol" => {
                if !self.take("wait") && !self.take("launch_dependents") {
                    return self.unknown();
                }
                self.class(Class::Control).nothing()
            }
            "pmevent" | "brkpt" => self.class(Class::Control).nothing(),
            _ => self.unknown(),
        }
    }

    fn branch(&mut self) -> Parsed<()> {
        self.take("uni");
        self.class(Class::Control);
        let Operand::Symbol(label) = self.operand(0)? else { return self.wrong("a label is needed") };
        self.flow = Flow::Branch(self.statement.scope, label.clone());
        self.inst.always = true;
        self.run::<Branch>()
    }

    /// `brx.idx index, {labels}`
    fn branch_table(&mut self) -> Parsed<()> {
        self.need("idx")?;
        self.take("uni");
        self.class(Class::Control);
        let Operand::Vector(labels) = self.operand(1)? else {
            return self.wrong("a list of labels in braces is needed");
        };
        let names = labels.iter().map(|o| match o {
            Operand::Symbol(s) => Ok(s.clone()),
            _ => self.wrong("a label is needed"),
        });
        let names = names.collect::<Parsed<Vec<_>>>()?;
        self.inst.a = self.source::<u32>(Place::A, 0)?;
        self.inst.list = self.code.lists.len() as u32;
        let Ok(count) = u8::try_from(names.len()) else { return self.wrong("more than 255 labels") };
        self.inst.count = count;
        self.code.lists.extend(names.iter().map(|_| 0));
        self.flow = Flow::Table(self.statement.scope, names);
        self.run::<BranchTable>()
    }

    fn barrier(&mut self) -> Parsed<()> {
        self.class(Class::Sync);
        if self.take("warp") {
            self.need("sync")?;
            self.inst.a = self.source::<u32>(Place::A, 0)?;
            return self.run::<WarpSync>();
        }
        if self.take("cluster") {
            self.ignore(&["acquire", "release", "relaxed", "aligned"]);
            if self.take("arrive") {
                return self.run::<ClusterArrive>();
            }
            self.need("wait")?;
            return self.run::<ClusterWait>();
        }
        self.ignore(&["cta", "aligned"]);
        if self.take("arrive") {
            self.inst.mode = 1;
        } else {
            self.need("sync")?;
        }
        self.inst.a = self.source::<u32>(Place::A, 0)?;
        if self.operands() > 1 {
            self.inst.b = self.source::<u32>(Place::B, 1)?;
            self.inst.count = 1;
        }
        self.run::<Sync>()
    }

    fn fence(&mut self) -> Parsed<()> {
        self.class(Class::Sync);
        if self.take("proxy") {
            if self.take("async") {
                if self.take("global") {
                    // Of global memory alone, whose order with copies is not looked at.
                    return self.nothing();
                }
                if self.take("shared::cta") || self.take("shared::cluster") || self.operands() == 0 {
                    return self.run::<ProxyFence>();
                }
            }
            self.ignore(&["alias", "async::generic", "acquire", "release", "sync_restrict::shared::cta"]);
            self.ignore(&["sync_restrict::shared::cluster", "cluster"]);
            return self.nothing();
        }
        if self.take("async") {
            return self.run::<ProxyFence>();
        }
        if self.take("mbarrier_init") {
            self.ignore(&["release", "cluster"]);
            return self.run::<Announce>();
        }
        let device = ["gpu", "sys", "gl"].iter().any(|m| self.parts.contains(m));
        self.ignore(&["sc", "acq_rel", "acquire", "release", "cta", "cluster", "gpu", "sys", "gl"]);
        if device { self.run::<Fence>() } else { self.nothing() }
    }

    fn shfl(&mut self) -> Parsed<()> {
        self.class(Class::Exchange);
        self.need("sync")?;
        self.need("b32")?;
        let mode = self.take_any(&[
            ("bfly", Shuffle::Butterfly),
            ("down", Shuffle::Down),
            ("up", Shuffle::Up),
            ("idx", Shuffle::Index),
        ]);
        let Some(mode) = mode else { return self.unknown() };
        self.inst.mode = mode as u8;
        self.expect_operands(5)?;
        if let Operand::Pair(_, p) = self.operand(0)? {
            self.inst.imm = self.predicate(p)?.0.into();
            self.inst.count = 1;
        }
        self.sources3::<u32, u32, u32>()?;
        let mask = std::slice::from_ref(self.operand(4)?);
        self.list(mask, false, false, false)?;
        self.destination::<u32>(0)?;
        self.run::<Shfl>()
    }

    fn vote(&mut self) -> Parsed<()> {
        self.class(Class::Exchange);
        self.need("sync")?;
        let Some(mode) = self.take_any(&[("all", 0), ("any", 1), ("uni", 2), ("ballot", 3)]) else {
            return self.unknown();
        };
        self.inst.mode = mode;
        self.expect_operands(3)?;
        let (p, negated) = self.predicate(self.operand(1)?)?;
        (self.inst.a, self.inst.count) = (p, negated.into());
        self.inst.b = self.source::<u32>(Place::B, 2)?;
        if mode == 3 {
            self.need("b32")?;
            self.destination::<u32>(0)?;
        } else {
            self.need("pred")?;
            self.inst.d = self.predicate(self.operand(0)?)?.0;
        }
        self.run::<Vote>()
    }

    fn matching(&mut self) -> Parsed<()> {
        self.class(Class::Exchange);
        self.need("sync")?;
        let Some(mode) = self.take_any(&[("any", 0), ("all", 1)]) else { return self.unknown() };
        self.inst.mode = mode;
        self.expect_operands(3)?;
        if let Operand::Pair(_, p) = self.operand(0)? {
            self.inst.imm = self.predicate(p)?.0.into();
            self.inst.count = 1;
        }
        self.inst.b = self.source::<u32>(Place::B, 2)?;
        self.destination::<u32>(0)?;
        match self.ty()? {
            Type::B32 => {
                self.inst.a = self.source::<u32>(Place::A, 1)?;
                self.run::<Match<u32>>()
            }
            Type::B64 => {
                self.inst.a = self.source::<u64>(Place::A, 1)?;
                self.run::<Match<u64>>()
            }
            _ => self.unknown(),
        }
    }

    fn redux(&mut self) -> Parsed<()> {
        self.class(Class::Exchange);
        self.need("sync")?;
        let ty = self.ty()?;
        let operation = if self.take("xor") && ty == Type::B32 {
            Some(Reduce::XOR)
        } else {
            let known = Reduce::OPERATIONS.iter().position(|(name, types)| {
                types.iter().any(|t| Type::from_suffix(t) == Some(ty)) && self.take(name)
            });
            known.map(|n| n as u8)
        };
        let Some(operation) = operation else { return self.unknown() };
        self.inst.mode = operation;
        self.expect_operands(3)?;
        self.inst.a = self.source::<u32>(Place::A, 1)?;
        self.inst.b = self.source::<u32>(Place::B, 2)?;
        self.destination::<u32>(0)?;
        self.run::<Reduce>()
    }

    fn elect(&mut self) -> Parsed<()> {
        self.class(Class::Exchange);
        self.need("sync")?;
        let Operand::Pair(_, p) = self.operand(0)? else { return self.wrong("`d|p` is needed") };
        self.inst.imm = self.predicate(p)?.0.into();
        self.inst.b = self.source::<u32>(Place::B, 1)?;
        self.destination::<u32>(0)?;
        self.run::<Elect>()
    }

    pub(super) fn mbarrier(&mut self) -> Parsed<()> {
        self.class(Class::Sync);
        self.ignore(&["shared", "shared::cta", "shared::cluster", "b64"]);
        let far = self.take("cluster");
        self.ignore(&["release", "acquire", "relaxed", "cta"]);
        if self.take("init") {
            self.address_operand(0, false)?;
            self.inst.b = self.source::<u32>(Place::B, 1)?;
            return self.run::<Init>();
        }
        if self.take("inval") {
            self.address_operand(0, false)?;
            return self.run::<Invalidate>();
        }
        if self.take("try_wait") || self.take("test_wait") {
            self.inst.mode = u8::from(far) << 1;
            return self.try_wait();
        }
        if self.take("arrive") {
            return self.arrive();
        }
        if self.take("expect_tx") {
            self.address_operand(0, false)?;
            let zero = self.code.constant(false, 0);
            self.inst.b = self.using(Place::B, zero, false);
            self.inst.c = self.source::<u32>(Place::C, 1)?;
            self.inst.mode = 2;
            self.inst.d = self.using(Place::D, self.code.trash, true);
            return self.run::<Arrive>();
        }
        self.unknown()
    }

    fn try_wait(&mut self) -> Parsed<()> {
        self.inst.d = self.predicate(self.operand(0)?)?.0;
        self.address_operand(1, false)?;
        if self.take("parity") {
            self.inst.b = self.source::<u32>(Place::B, 2)?;
        } else {
            self.inst.b = self.source::<u64>(Place::B, 2)?;
            self.inst.mode |= 1;
        }
        self.run::<TryWait>()
    }

    /// `mbarrier.arrive state, [address]{, count}` and with `.expect_tx` the bytes in place of the count. Arrivals
    /// at other blocks' barriers have no state.
    fn arrive(&mut self) -> Parsed<()> {
        let expect = self.take("expect_tx");
        let has_state = !matches!(self.operand(0)?, Operand::Address(..));
        let address = usize::from(has_state);
        if has_state {
            self.destination::<u64>(0)?;
        } else {
            self.inst.d = self.using(Place::D, self.code.trash, true);
        }
        self.address_operand(address, false)?;
        let one = self.code.constant(false, 1);
        if expect {
            self.inst.mode = 1;
            self.inst.c = self.source::<u32>(Place::C, address + 1)?;
            self.inst.b = self.using(Place::B, one, false);
        } else if self.operands() > address + 1 {
            self.inst.b = self.source::<u32>(Place::B, address + 1)?;
        } else {
            self.inst.b = self.using(Place::B, one, false);
        }
        self.run::<Arrive>()
    }

    /// `cp.async.mbarrier.arrive{.noinc}`
    pub(super) fn copy_arrive(&mut self) -> Parsed<()> {
        self.need("arrive")?;
        self.inst.mode = self.take("noinc").into();
        self.ignore(&["shared", "shared::cta", "b64"]);
        self.address_operand(0, false)?;
        self.run::<ArriveAfter>()
    }
}
