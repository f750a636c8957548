//! What a device remembers: which states exist, which plans are open, and where every place lies.
//!
//! Every device has the same rules (a state exists once, an opening that fails changes nothing, caches
//! go with their last plan); devices differ only in the memory behind them, the type `B`.
use super::{Place, PlanId};
use crate::{
    error::{Error, Result},
    op::Kind,
    plan::{Plan, Segment, Slot, Step},
    tensor::{DType, Spec},
};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// The plans and the memory of a device; `B` is a block of its memory.
///
/// Blocks are asked for in bytes and arrive zeroed; a block is dropped when nothing needs it any more.
#[derive(Debug)]
pub struct Ledger<B> {
    /// Which of `states` has this name: by kind, so that a look-up makes no name of its own.
    index: HashMap<Kind, HashMap<String, usize>>,
    states: Vec<Option<(Spec, B)>>,
    plans: Vec<Option<Opened<B>>>,
    scratch: Option<(usize, B)>,
    moves: u64,
}

#[derive(Debug)]
struct Opened<B> {
    plan: Arc<Plan>,
    /// Which of the device's states each state of the plan is.
    states: Vec<usize>,
    inputs: B,
}

/// Bytes that the device does not hold yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// States that no open plan has named.
    pub states: u64,
    /// The inputs of the plan.
    pub inputs: u64,
    /// What the scratch arena has to grow by.
    pub scratch: u64,
}

impl Missing {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.states + self.inputs + self.scratch
    }
}

impl<B> Default for Ledger<B> {
    fn default() -> Self {
        Ledger { index: HashMap::new(), states: Vec::new(), plans: Vec::new(), scratch: None, moves: 0 }
    }
}

impl<B> Ledger<B> {
    /// Proves a plan harmless (see [`check`]) and says what it takes to open it.
    ///
    /// # Errors
    /// If the plan is faulty, or gives a state another type than the device holds.
    pub fn missing(&self, plan: &Plan) -> Result<Missing> {
        check(plan)?;
        let mut missing = Missing {
            states: 0,
            inputs: plan.input_bytes as u64,
            scratch: plan.scratch_bytes.saturating_sub(self.scratch_bytes()) as u64,
        };
        for s in &plan.states {
            let held = self.number(s.kind, &s.name).and_then(|i| self.states[i].as_ref());
            match held {
                Some((have, _)) if *have == s.spec => {}
                Some((have, _)) => {
                    let (kind, name) = (s.kind, s.name.clone());
                    let (have, want) = (Box::new(*have), Box::new(s.spec));
                    return Err(Error::StateClash { kind, name, have, want });
                }
                None => missing.states += s.spec.bytes() as u64,
            }
        }
        Ok(missing)
    }

    /// Opens a plan: its inputs, the states that do not exist yet, and a larger scratch arena where the
    /// present one is too small. `zeroed` gives so many bytes for a purpose; if it fails, nothing has
    /// changed, but for the contents of the arena.
    ///
    /// # Errors
    /// As [`Ledger::missing`], and whatever `zeroed` answers.
    pub fn open(
        &mut self,
        plan: Arc<Plan>,
        mut zeroed: impl FnMut(usize, &str) -> Result<B>,
    ) -> Result<PlanId> {
        self.missing(&plan)?;
        let mut fresh = Vec::new();
        let mut states = Vec::with_capacity(plan.states.len());
        for s in &plan.states {
            states.push(match self.number(s.kind, &s.name) {
                Some(i) => i,
                None => {
                    fresh.push((s, zeroed(s.spec.bytes(), &s.name)?));
                    self.states.len() + fresh.len() - 1
                }
            });
        }
        let inputs = zeroed(plan.input_bytes, "the inputs of a plan")?;
        self.grow(plan.scratch_bytes, &mut zeroed)?;
        for (s, block) in fresh {
            self.index.entry(s.kind).or_default().insert(s.name.clone(), self.states.len());
            self.states.push(Some((s.spec, block)));
        }
        self.plans.push(Some(Opened { plan, states, inputs }));
        Ok(PlanId(self.plans.len() - 1))
    }

    /// Makes the arena at least so large; it is there even where nothing needs a byte of it. Where both do not fit
    /// at once, the old one goes first.
    fn grow(&mut self, bytes: usize, zeroed: &mut impl FnMut(usize, &str) -> Result<B>) -> Result<()> {
        const WHAT: &str = "the scratch arena";
        let have = self.scratch_bytes();
        if self.scratch.is_some() && bytes <= have {
            return Ok(());
        }
        self.moves += 1;
        match zeroed(bytes, WHAT) {
            Ok(block) => self.scratch = Some((bytes, block)),
            Err(e) if have == 0 => return Err(e),
            Err(_) => {
                self.scratch = None;
                let larger = zeroed(bytes, WHAT);
                let size = if larger.is_ok() { bytes } else { have };
                let failure = larger.as_ref().err().cloned();
                let block = larger.or_else(|_| zeroed(have, WHAT))?;
                self.scratch = Some((size, block));
                failure.map_or(Ok(()), Err)?;
            }
        }
        Ok(())
    }

    /// Forgets a plan, its inputs, and the `Cache` states that no other open plan names.
    pub fn close(&mut self, plan: PlanId) {
        if let Some(p) = self.plans.get_mut(plan.0) {
            *p = None;
        }
        let named: HashSet<usize> = self.plans.iter().flatten().flat_map(|p| p.states.clone()).collect();
        let states = &mut self.states;
        self.index.entry(Kind::Cache).or_default().retain(|_, i| {
            let stays = named.contains(i);
            if !stays {
                states[*i] = None;
            }
            stays
        });
    }

    /// Bytes of the scratch arena.
    pub fn scratch_bytes(&self) -> usize {
        self.scratch.as_ref().map_or(0, |(bytes, _)| *bytes)
    }

    /// How often the scratch arena has moved: what remembers an address in it has to look again.
    pub fn moves(&self) -> u64 {
        self.moves
    }

    /// A plan that is open.
    ///
    /// # Errors
    /// If it is not.
    pub fn plan(&self, id: PlanId) -> Result<&Arc<Plan>> {
        Ok(&self.opened(id)?.plan)
    }

    /// The block of a segment of a plan.
    ///
    /// # Errors
    /// If the plan is not open or has no such segment.
    pub fn block(&self, id: PlanId, segment: Segment) -> Result<&B> {
        self.segment(self.opened(id)?, segment).ok_or_else(|| absent(id, segment))
    }

    /// The same, for writing.
    ///
    /// # Errors
    /// As [`Ledger::block`].
    pub fn block_mut(&mut self, id: PlanId, segment: Segment) -> Result<&mut B> {
        self.opened(id)?;
        let Some(opened) = self.plans[id.0].as_mut() else { return Err(absent(id, segment)) };
        let block = match segment {
            Segment::State(i) => {
                let state = opened.states.get(i).and_then(|&i| self.states.get_mut(i));
                state.and_then(Option::as_mut).map(|(_, block)| block)
            }
            Segment::Input => Some(&mut opened.inputs),
            Segment::Scratch => self.scratch.as_mut().map(|(_, block)| block),
        };
        block.ok_or_else(|| absent(id, segment))
    }

    /// The block, byte offset and type of a place from which `len` elements of `dtype` are to be read.
    ///
    /// # Errors
    /// If there is no such place, or it is of another type or length.
    pub fn source(&self, at: Place<'_>, dtype: DType, len: usize) -> Result<(&B, usize)> {
        let (block, offset, spec) = self.find(at)?;
        fits(at, spec, dtype, len)?;
        Ok((block, offset))
    }

    /// The block and byte offset of a place to which `len` elements of `dtype` are to be written.
    ///
    /// # Errors
    /// As [`Ledger::source`]; and outputs are read-only.
    pub fn target(&mut self, at: Place<'_>, dtype: DType, len: usize) -> Result<(&mut B, usize)> {
        let (_, offset, spec) = self.find(at)?;
        fits(at, spec, dtype, len)?;
        let missing = |why: &str| Error::Place { what: format!("{at:?}"), why: why.into() };
        let block = match at {
            Place::State(kind, name) => {
                let i = self.number(kind, name);
                let state = i.and_then(|i| self.states[i].as_mut()).map(|(_, block)| block);
                state.ok_or_else(|| missing("no plan has named it"))?
            }
            Place::Input(id, _) => self.block_mut(id, Segment::Input)?,
            Place::Output(..) => return Err(missing("outputs are read-only")),
        };
        Ok((block, offset))
    }

    /// The block, byte offset and type of a place.
    ///
    /// # Errors
    /// If there is no such place.
    pub fn find(&self, at: Place<'_>) -> Result<(&B, usize, Spec)> {
        let missing = |why: &str| Error::Place { what: format!("{at:?}"), why: why.into() };
        let (opened, slot) = match at {
            Place::State(kind, name) => {
                let state = self.number(kind, name).and_then(|i| self.states[i].as_ref());
                let (spec, block) = state.ok_or_else(|| missing("no plan has named it"))?;
                return Ok((block, 0, *spec));
            }
            Place::Input(id, name) => self.opened(id).map(|o| (o, o.plan.input(name)))?,
            Place::Output(id, name) => self.opened(id).map(|o| (o, o.plan.output(name)))?,
        };
        let slot = slot.ok_or_else(|| missing("the plan has no such name"))?;
        let block = self.segment(opened, slot.segment).ok_or_else(|| missing("it has no memory"))?;
        Ok((block, slot.offset, slot.spec))
    }

    /// Which of the states has this name.
    fn number(&self, kind: Kind, name: &str) -> Option<usize> {
        self.index.get(&kind)?.get(name).copied()
    }

    fn opened(&self, plan: PlanId) -> Result<&Opened<B>> {
        self.plans.get(plan.0).and_then(Option::as_ref).ok_or_else(|| Error::Place {
            what: format!("plan {}", plan.0),
            why: "it is not open on this device".into(),
        })
    }

    fn segment<'a>(&'a self, opened: &'a Opened<B>, segment: Segment) -> Option<&'a B> {
        match segment {
            Segment::State(i) => {
                let state = self.states.get(*opened.states.get(i)?)?;
                state.as_ref().map(|(_, block)| block)
            }
            Segment::Input => Some(&opened.inputs),
            Segment::Scratch => self.scratch.as_ref().map(|(_, block)| block),
        }
    }
}

fn absent(id: PlanId, segment: Segment) -> Error {
    Error::Place { what: format!("{segment:?} of plan {}", id.0), why: "it has no memory".into() }
}

fn fits(at: Place<'_>, spec: Spec, dtype: DType, len: usize) -> Result<()> {
    if spec.dtype == dtype && spec.shape.numel() == len {
        return Ok(());
    }
    let why = format!("it is {spec:?}, the data are {len} elements of {}", dtype.name());
    Err(Error::Place { what: format!("{at:?}"), why })
}

/// Proves a plan harmless, so that no device has to trust the planner: every state is named once, every
/// slot lies inside its segment, aligned, and no output or scratch buffer of a step overlaps another
/// operand, but for the input that it replaces or renames.
///
/// # Errors
/// The first step that breaks this.
pub fn check(plan: &Plan) -> Result<()> {
    let faulty = |why: String| Error::Device(format!("faulty plan: {why}"));
    let mut names = HashSet::new();
    if let Some(s) = plan.states.iter().find(|s| !names.insert((s.kind, &s.name))) {
        return Err(faulty(format!("{:?} state {} appears twice", s.kind, s.name)));
    }
    for (name, slot) in plan.inputs.iter().chain(&plan.outputs) {
        if !is_inside(plan, slot) {
            return Err(faulty(format!("{name} lies outside its segment or is misaligned")));
        }
    }
    for (i, step) in plan.steps.iter().enumerate() {
        check_step(plan, step).map_err(|why| faulty(format!("step {i}, {}: {why}", step.op.name())))?;
    }
    Ok(())
}

fn check_step(plan: &Plan, step: &Step) -> Result<(), &'static str> {
    if !step.ins.iter().chain(&step.outs).chain(&step.scratch).all(|s| is_inside(plan, s)) {
        return Err("an operand lies outside its segment or is misaligned");
    }
    if step.is_view() {
        return Ok(());
    }
    for (o, out) in step.outs.iter().enumerate() {
        let source = replaced(step, o);
        let others = step.outs.iter().enumerate().filter(|(p, _)| *p != o).map(|(_, s)| s);
        let ins = step.ins.iter().enumerate().filter(|(p, _)| Some(*p) != source).map(|(_, s)| s);
        if others.chain(ins).any(|s| overlap(out, s)) {
            return Err("an output overlaps another operand");
        }
    }
    for (b, buffer) in step.scratch.iter().enumerate() {
        let others = step.ins.iter().chain(&step.outs).chain(&step.scratch[..b]);
        if others.into_iter().any(|s| overlap(buffer, s)) {
            return Err("a scratch buffer overlaps another operand");
        }
    }
    Ok(())
}

fn is_inside(plan: &Plan, slot: &Slot) -> bool {
    let size = match slot.segment {
        Segment::State(i) => plan.states.get(i).map_or(0, |s| s.spec.bytes()),
        Segment::Input => plan.input_bytes,
        Segment::Scratch => plan.scratch_bytes,
    };
    let end = slot.offset.checked_add(slot.spec.bytes());
    end.is_some_and(|end| end <= size) && slot.offset.is_multiple_of(slot.spec.dtype.size())
}

fn overlap(a: &Slot, b: &Slot) -> bool {
    let (x, y) = (a.offset..a.offset + a.spec.bytes(), b.offset..b.offset + b.spec.bytes());
    a.segment == b.segment && x.start < y.end && y.start < x.end
}

/// The input that output `o` of a step replaces.
pub(super) fn replaced(step: &Step, o: usize) -> Option<usize> {
    step.op.memory(o).replaced()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Graph;

    /// A machine with so many bytes.
    struct Ram(usize);

    impl Ram {
        fn zeroed(&mut self, bytes: usize, what: &str) -> Result<std::rc::Rc<usize>> {
            let error = Error::Memory { need: bytes as u64, free: Some(self.0 as u64), what: what.into() };
            self.0 = self.0.checked_sub(bytes).ok_or(error)?;
            Ok(std::rc::Rc::new(bytes))
        }
    }

    /// `y = x + x + x`, with a cache of `cached` numbers.
    fn plan(n: usize, cached: usize) -> Plan {
        let mut g = Graph::new();
        let x = g.input("x", [n], DType::F32);
        let cache = g.state(Kind::Cache, "kept", [cached], DType::F32);
        let y = g.add(x, x);
        let y = g.add(y, x);
        g.output("y", y);
        g.output("kept", cache);
        Plan::new(&g).unwrap()
    }

    #[test]
    fn what_is_missing_is_what_opening_takes() {
        let (mut ledger, mut ram) = (Ledger::default(), Ram(1 << 20));
        for (n, cached) in [(100, 7), (3, 7), (1000, 7)] {
            let plan = plan(n, cached);
            let (missing, before) = (ledger.missing(&plan).unwrap(), ram.0);
            let held = ledger.scratch_bytes() as u64;
            ledger.open(Arc::new(plan), |n, what| ram.zeroed(n, what)).unwrap();
            // The larger arena is there before the smaller one goes.
            let grown = if missing.scratch > 0 { held } else { 0 };
            assert_eq!((before - ram.0) as u64, missing.total() + grown);
        }
        let clash = ledger.missing(&plan(3, 8)).unwrap_err();
        assert!(matches!(clash, Error::StateClash { .. }), "{clash}");
    }

    #[test]
    fn a_state_is_there_once_and_a_cache_goes_with_its_last_plan() {
        let (mut ledger, mut ram) = (Ledger::default(), Ram(1 << 20));
        let mut open = |ledger: &mut Ledger<_>, n| {
            ledger.open(Arc::new(plan(n, 7)), |n, what| ram.zeroed(n, what)).unwrap()
        };
        let (a, b) = (open(&mut ledger, 3), open(&mut ledger, 5));
        let at = Place::State(Kind::Cache, "kept");
        let kept = ledger.find(at).unwrap().0.clone();
        assert!(std::rc::Rc::ptr_eq(&kept, ledger.block(b, Segment::State(0)).unwrap()));
        ledger.close(a);
        assert!(ledger.find(at).is_ok() && ledger.plan(a).is_err());
        ledger.close(b);
        assert!(ledger.find(at).is_err());
        assert_eq!(std::rc::Rc::strong_count(&kept), 1, "its memory is given back");
    }

    #[test]
    fn an_arena_that_cannot_grow_is_as_large_as_before() {
        let mut ledger = Ledger::default();
        let small = Arc::new(plan(100, 7));
        ledger.open(small.clone(), |n, _| Ok(n)).unwrap();
        let (had, moved) = (ledger.scratch_bytes(), ledger.moves());
        let short = |bytes: usize, what: &str| match bytes > had && what.contains("arena") {
            true => Err(Error::Memory { need: bytes as u64, free: None, what: what.into() }),
            false => Ok(bytes),
        };
        assert!(ledger.open(Arc::new(plan(1000, 7)), short).is_err());
        assert_eq!(ledger.scratch_bytes(), had);
        assert!(ledger.moves() > moved, "its address may be another");
        let id = ledger.open(small, short).unwrap();
        assert_eq!(*ledger.block(id, Segment::Scratch).unwrap(), had);
    }

    #[test]
    fn an_output_without_bytes_has_a_place() {
        let mut ledger = Ledger::default();
        let id = ledger.open(Arc::new(plan(0, 7)), |n, _| Ok(n)).unwrap();
        let (_, offset, spec) = ledger.find(Place::Output(id, "y")).unwrap();
        assert_eq!((offset, spec), (0, Spec::new([0], DType::F32)));
    }

    #[test]
    fn faulty_plans_are_refused() {
        let fault = |break_it: &dyn Fn(&mut Plan), words: &str| {
            let mut plan = plan(64, 7);
            check(&plan).unwrap();
            break_it(&mut plan);
            let error = check(&plan).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        fault(&|p| p.states.push(p.states[0].clone()), "appears twice");
        fault(&|p| p.inputs[0].1.offset += 256, "x lies outside");
        fault(&|p| p.outputs[0].1.offset = usize::MAX, "y lies outside");
        fault(&|p| p.steps[0].outs[0].offset += 2, "misaligned");
        fault(&|p| p.steps[1].outs[0] = p.steps[1].ins[0], "an output overlaps");
        fault(
            &|p| {
                let buffer = Slot { spec: Spec::new([8], DType::U8), ..p.steps[1].ins[0] };
                p.steps[1].scratch.push(buffer);
            },
            "a scratch buffer overlaps",
        );
    }
}
