//! Where every value lives and what runs when: the only thing that a device sees.
use crate::{
    error::{Error, Result},
    graph::{Computed, Graph, Node, Role},
    launch::{Cost, Launch, Target},
    op::{Kind, Memory, Op},
    tensor::{Spec, Tensor},
};
use std::{
    collections::{HashMap, HashSet},
    fmt,
    panic::Location,
    sync::Arc,
};

/// Values start at multiples of this many bytes.
pub const ALIGN: usize = 256;

/// Which piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Segment {
    /// A state, by its position in [`Plan::states`].
    State(usize),
    /// The inputs of this plan.
    Input,
    /// The arena that all open plans share.
    Scratch,
}

/// A typed piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Type.
    pub spec: Spec,
    /// Memory.
    pub segment: Segment,
    /// Bytes from the segment's start.
    pub offset: usize,
}

/// A state that the plan names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateRef {
    /// What it is for.
    pub kind: Kind,
    /// Its name, unique in its kind.
    pub name: String,
    /// Its type.
    pub spec: Spec,
}

/// One node, placed.
#[derive(Clone, Debug)]
pub struct Step {
    /// What runs.
    pub op: Arc<dyn Op>,
    /// The line of model code that applied it.
    pub at: &'static Location<'static>,
    /// Inputs.
    pub ins: Vec<Slot>,
    /// Outputs.
    pub outs: Vec<Slot>,
    /// Scratch buffers of its launches.
    pub scratch: Vec<Slot>,
    /// What a GPU launches; empty in a plan for the CPU.
    pub launches: Vec<Launch>,
    /// Work and traffic.
    pub cost: Cost,
    /// Whether it repeats an earlier step, whose results were not kept.
    pub again: bool,
}

impl Step {
    /// Whether output `out` holds nothing before the step.
    pub fn is_fresh(&self, out: usize) -> bool {
        self.op.memory(out).is_fresh()
    }

    /// Whether nothing has to run: every output is a view.
    pub fn is_view(&self) -> bool {
        (0..self.outs.len()).all(|o| matches!(self.op.memory(o), Memory::View { .. }))
    }
}

/// A program with every value placed.
#[derive(Clone, Debug)]
pub struct Plan {
    /// In execution order.
    pub steps: Vec<Step>,
    /// The states that it names.
    pub states: Vec<StateRef>,
    /// The inputs that the host writes before a run.
    pub inputs: Vec<(String, Slot)>,
    /// What stays readable after a run, until any plan of the device runs again.
    pub outputs: Vec<(String, Slot)>,
    /// Bytes of the input segment.
    pub input_bytes: usize,
    /// Bytes of the scratch arena.
    pub scratch_bytes: usize,
}

impl Plan {
    /// Plans for the CPU device: no launches.
    ///
    /// # Errors
    /// The first refused op; a read of overwritten memory.
    pub fn new(g: &Graph) -> Result<Plan> {
        Plan::on(g, None)
    }

    /// Plans for a GPU.
    ///
    /// # Errors
    /// As [`Plan::new`], and [`Error::NoKernel`] naming the first op that has none.
    pub fn lowered(g: &Graph, target: &Target) -> Result<Plan> {
        Plan::on(g, Some(target))
    }

    /// Plans for what [`Device::target`](crate::device::Device::target) says.
    ///
    /// # Errors
    /// As [`Plan::lowered`].
    pub fn on(g: &Graph, target: Option<&Target>) -> Result<Plan> {
        g.check()?;
        let nodes = steps(g)?;
        let home = homes(g, &nodes)?;
        let mut kernels = Vec::new();
        for n in &nodes {
            kernels.push(match target {
                Some(_) if is_view(n) => Default::default(),
                Some(t) => n
                    .op
                    .kernels(&specs(g, &n.ins), &specs(g, &n.outs), t)
                    .map_err(|why| Error::NoKernel { op: n.op.name(), why, at: n.at })?,
                None => Default::default(),
            });
        }
        let scratch: Vec<&[usize]> = kernels.iter().map(|k| &k.scratch[..]).collect();
        let layout = Layout::new(g, &nodes, &home, &scratch);
        let slots = |ts: &[Tensor]| ts.iter().map(|&t| layout.slot(g, &home, t)).collect::<Vec<_>>();
        let mut steps = Vec::with_capacity(nodes.len());
        for (i, (n, k)) in nodes.iter().zip(&kernels).enumerate() {
            steps.push(Step {
                op: n.op.clone(),
                at: n.at,
                ins: slots(&n.ins),
                outs: slots(&n.outs),
                scratch: layout.node_scratch[i].clone(),
                launches: k.launches.clone(),
                cost: n.op.cost(&specs(g, &n.ins), &specs(g, &n.outs)),
                again: n.computed == Computed::Again,
            });
        }
        let inputs = layout.inputs.iter().map(|&i| {
            let t = Tensor(i as u32);
            (g.values[i].name.clone(), layout.slot(g, &home, t))
        });
        Ok(Plan {
            steps,
            states: layout.states.clone(),
            inputs: inputs.collect(),
            outputs: g.outputs.iter().map(|(n, t)| (n.clone(), layout.slot(g, &home, *t))).collect(),
            input_bytes: layout.input_bytes,
            scratch_bytes: layout.scratch_bytes,
        })
    }

    /// The slot of an input.
    pub fn input(&self, name: &str) -> Option<Slot> {
        self.inputs.iter().find(|(n, _)| n == name).map(|(_, s)| *s)
    }

    /// The slot of an output.
    pub fn output(&self, name: &str) -> Option<Slot> {
        self.outputs.iter().find(|(n, _)| n == name).map(|(_, s)| *s)
    }

    /// Bytes of all states of a kind.
    pub fn state_bytes(&self, kind: Kind) -> u64 {
        self.states.iter().filter(|s| s.kind == kind).map(|s| s.spec.bytes() as u64).sum()
    }

    /// Bytes that the plan needs in all: states, inputs, scratch.
    pub fn total_bytes(&self) -> u64 {
        let states: u64 = self.states.iter().map(|s| s.spec.bytes() as u64).sum();
        states + self.input_bytes as u64 + self.scratch_bytes as u64
    }

    /// Work and traffic of one run.
    pub fn cost(&self) -> Cost {
        self.steps.iter().map(|s| s.cost).sum()
    }

    /// The part of it that repeats earlier steps: what recomputation costs.
    pub fn repeated(&self) -> Cost {
        self.steps.iter().filter(|s| s.again).map(|s| s.cost).sum()
    }
}

fn specs(g: &Graph, ts: &[Tensor]) -> Vec<Spec> {
    ts.iter().map(|&t| g.spec(t)).collect()
}

/// Whether a node moves nothing.
fn is_view(n: &Node) -> bool {
    (0..n.outs.len()).all(|o| matches!(n.op.memory(o), Memory::View { .. }))
}

/// The nodes that the steps of a plan run, in order: those that an output or a state depends on.
///
/// # Errors
/// If an output is void.
pub fn steps(g: &Graph) -> Result<Vec<&Node>> {
    let mut wanted: HashSet<Tensor> = HashSet::new();
    for (name, t) in &g.outputs {
        if *t == Tensor::VOID {
            return Err(Error::Graph(format!("output {name} is void")));
        }
        wanted.insert(*t);
    }
    let mut lasting: HashSet<Tensor> = (0..g.values.len())
        .filter(|&i| matches!(g.values[i].role, Role::State(_)))
        .map(|i| Tensor(i as u32))
        .collect();
    let mut keep = vec![false; g.nodes.len()];
    for n in &g.nodes {
        for (o, &out) in n.outs.iter().enumerate() {
            let source = match n.op.memory(o) {
                Memory::InPlace { input } | Memory::Over { input } | Memory::View { input, .. } => {
                    n.ins[input]
                }
                Memory::Own => continue,
            };
            if lasting.contains(&source) {
                lasting.insert(out);
            }
        }
    }
    for (n, keep) in g.nodes.iter().zip(&mut keep).rev() {
        let writes_state =
            |(o, out): (usize, &Tensor)| n.op.memory(o).replaced().is_some() && lasting.contains(out);
        *keep = n.outs.iter().any(|o| wanted.contains(o)) || n.outs.iter().enumerate().any(writes_state);
        if *keep {
            wanted.extend(&n.ins);
        }
    }
    Ok(g.nodes.iter().zip(keep).filter(|(_, k)| *k).map(|(n, _)| n).collect())
}

/// Whose memory each value uses, and how many bytes in. Reading memory after an in-place op replaced
/// it, through whatever view, is an error.
fn homes(g: &Graph, nodes: &[&Node]) -> Result<Vec<(usize, usize)>> {
    let mut home: Vec<(usize, usize)> = (0..g.values.len()).map(|i| (i, 0)).collect();
    // Version of each home, and the version that each value sees.
    let mut version: HashMap<usize, (u32, &'static str)> = HashMap::new();
    let mut sees = vec![0u32; g.values.len()];
    let stale =
        |home: &[(usize, usize)], version: &HashMap<usize, (u32, &'static str)>, sees: &[u32], t: Tensor| {
            let v = version.get(&home[t.index()].0).copied().unwrap_or((0, ""));
            (v.0 != sees[t.index()]).then_some(v.1)
        };
    for n in nodes {
        for &t in &n.ins {
            if let Some(by) = stale(&home, &version, &sees, t) {
                return Err(Error::Overwritten { reader: n.op.name(), at: n.at, by });
            }
        }
        for (o, &out) in n.outs.iter().enumerate() {
            let (input, offset) = match n.op.memory(o) {
                Memory::Own => continue,
                Memory::View { input, offset } => (input, offset),
                Memory::InPlace { input } | Memory::Over { input } => (input, 0),
            };
            let (root, at) = home[n.ins[input].index()];
            home[out.index()] = (root, at + offset);
            if n.op.memory(o).replaced().is_some() {
                let v = version.entry(root).or_default();
                *v = (v.0 + 1, n.op.name());
            }
            sees[out.index()] = version.get(&root).map_or(0, |v| v.0);
        }
    }
    for (name, t) in &g.outputs {
        if let Some(by) = stale(&home, &version, &sees, *t) {
            return Err(Error::Graph(format!("output {name} is overwritten by {by}")));
        }
    }
    Ok(home)
}

/// The three segments.
struct Layout {
    states: Vec<StateRef>,
    state_of: HashMap<usize, usize>,
    inputs: Vec<usize>,
    offset: HashMap<usize, usize>,
    node_scratch: Vec<Vec<Slot>>,
    input_bytes: usize,
    scratch_bytes: usize,
}

/// A piece of scratch memory and the steps during which it is held.
struct Piece {
    bytes: usize,
    first: usize,
    last: usize,
}

impl Layout {
    fn new(g: &Graph, nodes: &[&Node], home: &[(usize, usize)], scratch: &[&[usize]]) -> Layout {
        let mut l = Layout {
            states: Vec::new(),
            state_of: HashMap::new(),
            inputs: Vec::new(),
            offset: HashMap::new(),
            node_scratch: vec![Vec::new(); nodes.len()],
            input_bytes: 0,
            scratch_bytes: 0,
        };
        l.place_owned(g);
        let life = lifetimes(g, nodes, home);
        let mut temps: Vec<usize> = life.keys().copied().collect();
        temps.sort_unstable();
        let mut pieces: Vec<Piece> = temps
            .iter()
            .map(|i| Piece { bytes: g.values[*i].spec.bytes(), first: life[i].0, last: life[i].1 })
            .collect();
        for (step, sizes) in scratch.iter().enumerate() {
            pieces.extend(sizes.iter().map(|&bytes| Piece { bytes, first: step, last: step }));
        }
        let (offsets, bytes) = place(&pieces);
        l.scratch_bytes = bytes;
        l.offset.extend(temps.iter().copied().zip(offsets.iter().copied()));
        let mut rest = offsets[temps.len()..].iter();
        for (step, sizes) in scratch.iter().enumerate() {
            for (&bytes, &offset) in sizes.iter().zip(&mut rest) {
                let spec = Spec::new([bytes], crate::tensor::DType::U8);
                l.node_scratch[step].push(Slot { spec, segment: Segment::Scratch, offset });
            }
        }
        l
    }

    fn place_owned(&mut self, g: &Graph) {
        for (i, v) in g.values.iter().enumerate() {
            match v.role {
                Role::State(kind) => {
                    self.state_of.insert(i, self.states.len());
                    self.states.push(StateRef { kind, name: v.name.clone(), spec: v.spec });
                }
                Role::Input => {
                    self.inputs.push(i);
                    self.offset.insert(i, self.input_bytes);
                    self.input_bytes += v.spec.bytes().next_multiple_of(ALIGN);
                }
                Role::Temp => {}
            }
        }
    }

    fn slot(&self, g: &Graph, home: &[(usize, usize)], t: Tensor) -> Slot {
        let (root, at) = home[t.index()];
        let segment = match g.values[root].role {
            Role::State(_) => Segment::State(self.state_of[&root]),
            Role::Input => Segment::Input,
            Role::Temp => Segment::Scratch,
        };
        let offset = at + self.offset.get(&root).copied().unwrap_or(0);
        Slot { spec: g.values[t.index()].spec, segment, offset }
    }
}

/// First and last step that touches each temporary's memory.
fn lifetimes(g: &Graph, nodes: &[&Node], home: &[(usize, usize)]) -> HashMap<usize, (usize, usize)> {
    let mut life: HashMap<usize, (usize, usize)> = HashMap::new();
    let mut touch = |t: Tensor, step: usize| {
        let root = home[t.index()].0;
        if g.values[root].role == Role::Temp {
            let l = life.entry(root).or_insert((step, step));
            *l = (l.0.min(step), l.1.max(step));
        }
    };
    for (step, n) in nodes.iter().enumerate() {
        n.ins.iter().chain(&n.outs).for_each(|&t| touch(t, step));
    }
    for (_, t) in &g.outputs {
        touch(*t, nodes.len());
    }
    life
}

/// Offsets and total size: largest first, each at the lowest offset that is free for its whole life
/// (greedy by size, Pisarchyk & Lee 2020).
fn place(pieces: &[Piece]) -> (Vec<usize>, usize) {
    let size = |i: usize| pieces[i].bytes.next_multiple_of(ALIGN);
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(size(i)), i));
    let mut offset = vec![0; pieces.len()];
    let mut placed: Vec<usize> = Vec::new(); // by offset
    let mut end = 0;
    for i in order {
        let overlaps = |j: usize| pieces[i].first <= pieces[j].last && pieces[j].first <= pieces[i].last;
        let mut at = 0;
        for &j in placed.iter().filter(|&&j| overlaps(j)) {
            if at + size(i) <= offset[j] {
                break;
            }
            at = at.max(offset[j] + size(j));
        }
        offset[i] = at;
        end = end.max(at + size(i));
        let position = placed.partition_point(|&j| offset[j] <= at);
        placed.insert(position, i);
    }
    (offset, end)
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cost = self.cost();
        writeln!(
            f,
            "{} steps, {:.3} GFLOP ({:.3} again), {:.1} MB moved; states {:.1} MB, inputs {:.1} MB, scratch {:.1} MB",
            self.steps.len(),
            cost.flops as f64 / 1e9,
            self.repeated().flops as f64 / 1e9,
            cost.bytes as f64 / 1e6,
            self.states.iter().map(|s| s.spec.bytes()).sum::<usize>() as f64 / 1e6,
            self.input_bytes as f64 / 1e6,
            self.scratch_bytes as f64 / 1e6,
        )?;
        for (i, s) in self.steps.iter().enumerate() {
            let list = |slots: &[Slot]| slots.iter().map(|s| self.describe(s)).collect::<Vec<_>>().join(" ");
            writeln!(
                f,
                "{i:4}{} {:18} {} <- {}  {} B  {} FLOP",
                if s.again { '+' } else { ' ' },
                s.op.name(),
                list(&s.outs),
                list(&s.ins),
                s.cost.bytes,
                s.cost.flops
            )?;
            for l in &s.launches {
                writeln!(f, "      {l:?}")?;
            }
        }
        Ok(())
    }
}

impl Plan {
    /// A slot, readably: `bf16[4, 8]@scratch+512`, `f32[8]@Param model.norm.weight`.
    pub fn describe(&self, slot: &Slot) -> String {
        let place = match slot.segment {
            Segment::State(i) => {
                let s = &self.states[i];
                let offset = if slot.offset > 0 { format!("+{}", slot.offset) } else { String::new() };
                format!("{:?} {}{offset}", s.kind, s.name)
            }
            Segment::Input => {
                let named = self.inputs.iter().find(|(_, s)| s.offset == slot.offset);
                format!("input {}", named.map_or("?", |(n, _)| n))
            }
            Segment::Scratch => format!("scratch+{}", slot.offset),
        };
        format!("{:?}@{place}", slot.spec)
    }
}
