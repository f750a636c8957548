//! The program: values in single-assignment form, nodes in execution order.
use crate::{
    cpu::Precision,
    error::{Error, Result},
    op::{Accumulation, Grad, Kind, Memory, Op},
    tensor::{DType, Shape, Spec, Tensor},
};
use std::{collections::HashMap, panic::Location, sync::Arc};

/// One application of an op.
#[derive(Debug, Clone)]
pub struct Node {
    /// What is applied.
    pub op: Arc<dyn Op>,
    /// To what.
    pub ins: Vec<Tensor>,
    /// Yielding what.
    pub outs: Vec<Tensor>,
    /// The line of model code that applied it.
    pub at: &'static Location<'static>,
    /// How often.
    pub computed: Computed,
}

/// How often a node is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Computed {
    /// Once: what it yields is kept as long as something reads it.
    #[default]
    Once,
    /// Again in the backward pass, where that reads what it yields.
    Twice,
    /// This is the second time.
    Again,
}

impl Node {
    /// The error of an op without a derivative.
    pub fn no_adjoint(&self, why: &'static str) -> Error {
        Error::NoAdjoint { op: self.op.name(), why, at: self.at }
    }
}

/// Who owns a value's memory, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Written by the host before each run.
    Input,
    /// Lives across runs and plans.
    State(Kind),
    /// Made and dropped inside one run.
    Temp,
}

/// A value: its type, its owner, and its name (of an input or state; a temporary has its op's).
#[derive(Debug, Clone)]
pub struct Value {
    /// Static type.
    pub spec: Spec,
    /// Owner.
    pub role: Role,
    /// Name.
    pub name: String,
}

/// A program under construction.
#[derive(Debug, Default)]
pub struct Graph {
    pub(crate) values: Vec<Value>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) outputs: Vec<(String, Tensor)>,
    pub(crate) accumulators: HashMap<Tensor, Tensor>,
    pub(crate) arrived: HashMap<Tensor, Tensor>,
    /// Of the matrix products that are added from here on, and of their gradients.
    pub precision: Precision,
    /// Whether what is added from here on is computed again in the backward pass, instead of being kept until
    /// then. What replaces a kept value in place is kept, since it takes no memory.
    pub recompute: bool,
    /// What gradients are summed in: f32 where nothing is said. Each addition is rounded once. The gradient of an
    /// f64 parameter is f64.
    pub gradients: Option<DType>,
    /// Whether kernels may add up gradients that a backward pass makes from here on in whatever order their blocks
    /// come: other bits on every run, without waiting for turns.
    pub unordered: bool,
    /// Whether [`Graph::backward`] begins the sums in the `Grad` states: the first gradient of each is stored over what
    /// was there. Else all are added to that.
    pub begins: bool,
    named: HashMap<(Role, String), Tensor>,
    latest: HashMap<Tensor, Tensor>,
    error: Option<Error>,
}

impl Graph {
    /// An empty program.
    pub fn new() -> Graph {
        Graph::default()
    }

    /// A value that the host writes before each run.
    pub fn input(&mut self, name: &str, shape: impl Into<Shape>, dtype: DType) -> Tensor {
        self.named(Role::Input, name, Spec::new(shape, dtype))
    }

    /// A value that lives across runs; plans that name the same state share it. Asked for again,
    /// it is the newest version of that state.
    pub fn state(&mut self, kind: Kind, name: &str, shape: impl Into<Shape>, dtype: DType) -> Tensor {
        self.named(Role::State(kind), name, Spec::new(shape, dtype))
    }

    /// Keeps `t` readable under `name` after a run.
    pub fn output(&mut self, name: &str, t: Tensor) {
        if self.outputs.iter().any(|(n, _)| n == name) {
            self.refuse(Error::Graph(format!("output {name} is named twice")));
        }
        self.outputs.push((name.into(), t));
    }

    /// The static type of `t`; the void tensor, and a tensor of another graph, is an empty scalar.
    pub fn spec(&self, t: Tensor) -> Spec {
        self.values.get(t.index()).map_or(Spec::new([0], DType::F32), |v| v.spec)
    }

    /// Every value.
    pub fn values(&self) -> &[Value] {
        &self.values
    }

    /// Every node, in execution order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The states of `kind` that the graph names, in the order they were named.
    pub fn states(&self, kind: Kind) -> impl Iterator<Item = (Tensor, &Value)> {
        let of_kind = move |v: &Value| v.role == Role::State(kind);
        self.values.iter().enumerate().filter(move |(_, v)| of_kind(v)).map(|(i, v)| (Tensor(i as u32), v))
    }

    /// What is there before a run: the inputs and the states.
    pub fn sources(&self) -> impl Iterator<Item = (Tensor, &Value)> {
        let all = self.values.iter().enumerate().filter(|(_, v)| v.role != Role::Temp);
        all.map(|(i, v)| (Tensor(i as u32), v))
    }

    /// Applies `op`. A refusal is remembered with the caller's line and reported by [`Graph::check`]:
    /// model code stays free of `?` and still names its own faulty line.
    #[track_caller]
    pub fn push<const N: usize>(&mut self, op: impl Op + 'static, ins: &[Tensor]) -> [Tensor; N] {
        let outs = self.apply(Arc::new(op), ins);
        std::array::from_fn(|i| outs.get(i).copied().unwrap_or(Tensor::VOID))
    }

    /// The same for an op that is shared; no outputs if it refuses.
    #[track_caller]
    pub fn apply(&mut self, op: Arc<dyn Op>, ins: &[Tensor]) -> Vec<Tensor> {
        let at = Location::caller();
        if ins.iter().any(|t| t.index() >= self.values.len()) {
            if self.error.is_none() {
                let why = "an input is no tensor of this graph".to_string();
                self.error = Some(Error::Refused { op: op.name(), why, ins: vec![], at });
            }
            return vec![];
        }
        let specs: Vec<Spec> = ins.iter().map(|&t| self.spec(t)).collect();
        match op.infer(&specs).and_then(|outs| consistent(op.as_ref(), &specs, outs)) {
            Ok(outs) => {
                let outs: Vec<Tensor> =
                    outs.into_iter().map(|s| self.value(s, Role::Temp, op.name())).collect();
                self.follow_in_place(op.as_ref(), ins, &outs);
                let computed = if self.recompute { Computed::Twice } else { Computed::Once };
                self.nodes.push(Node { op, ins: ins.to_vec(), outs: outs.clone(), at, computed });
                outs
            }
            Err(why) => {
                self.refuse(Error::Refused { op: op.name(), why, ins: specs, at });
                vec![]
            }
        }
    }

    /// A state that an op replaces has a new newest version.
    fn follow_in_place(&mut self, op: &dyn Op, ins: &[Tensor], outs: &[Tensor]) {
        for (o, &out) in outs.iter().enumerate() {
            if let Some(input) = op.memory(o).replaced() {
                let old = ins[input];
                let first = self.latest.iter().find(|(_, v)| **v == old).map_or(old, |(k, _)| *k);
                self.latest.insert(first, out);
            }
        }
    }

    /// Remembers the first error.
    pub fn refuse(&mut self, error: Error) {
        self.error.get_or_insert(error);
    }

    /// The first refusal, if there was one.
    ///
    /// # Errors
    /// That refusal.
    pub fn check(&self) -> Result<()> {
        self.error.clone().map_or(Ok(()), Err)
    }

    /// The gradient accumulator of `t`, while a backward pass is built and if `t` has one.
    pub fn accumulator(&self, t: Tensor) -> Option<Tensor> {
        self.accumulators.get(&t).copied()
    }

    /// What becomes of the gradient of `t` that an op gives now.
    pub fn accumulation(&self, t: Tensor) -> Accumulation {
        match self.accumulator(t) {
            None => Accumulation::Apart,
            // What has the role of a state is what the program found there.
            Some(sum) if self.begins && self.values[sum.index()].role != Role::Temp => Accumulation::Begun,
            Some(_) => Accumulation::Added,
        }
    }

    /// The new version of the accumulator `sum` of `t`, with `delta` in it.
    #[track_caller]
    pub(crate) fn summed(&mut self, t: Tensor, sum: Tensor, delta: Tensor) -> Tensor {
        if self.accumulation(t) == Accumulation::Begun {
            self.store_into(sum, delta)
        } else {
            self.add_into(sum, delta)
        }
    }

    /// What has arrived so far of the gradient of input `t`, if it has the shape and the type of `t`, while a backward
    /// pass is built. It is taken: who asks adds its own gradient to it and gives the sum as [`Grad::To`].
    pub(crate) fn take_arrived(&mut self, t: Tensor) -> Option<Tensor> {
        let arrived = self.arrived.get(&t).copied().filter(|&d| self.spec(d) == self.spec(t))?;
        self.arrived.remove(&t);
        Some(arrived)
    }

    /// Gives `delta` to input `t`: into its accumulator where it has one.
    #[track_caller]
    pub fn give(&mut self, t: Tensor, delta: Tensor) -> Grad {
        match self.accumulator(t) {
            Some(sum) => Grad::Into(self.summed(t, sum, delta)),
            None => Grad::To(delta),
        }
    }

    fn named(&mut self, role: Role, name: &str, spec: Spec) -> Tensor {
        let Some(&t) = self.named.get(&(role, name.to_string())) else {
            let t = self.value(spec, role, name);
            self.named.insert((role, name.to_string()), t);
            return t;
        };
        let have = self.spec(t);
        if have != spec {
            self.refuse(Error::Graph(format!("{role:?} {name} is {have:?} and again {spec:?}")));
        }
        self.latest.get(&t).copied().unwrap_or(t)
    }

    pub(crate) fn value(&mut self, spec: Spec, role: Role, name: &str) -> Tensor {
        self.values.push(Value { spec, role, name: name.into() });
        Tensor(self.values.len() as u32 - 1)
    }
}

/// Rules that every op obeys: f64 does not mix with narrower floats, sizes fit 32-bit indices of
/// rows, an output that lives in an input's memory fits there.
fn consistent(op: &dyn Op, ins: &[Spec], outs: Vec<Spec>) -> Result<Vec<Spec>, String> {
    let all = || ins.iter().chain(&outs).map(|s| s.dtype);
    if op.name() != "cast"
        && all().any(|d| d == DType::F64)
        && let Some(d) = all().find(|d| d.is_float() && *d != DType::F64)
    {
        return Err(format!("f64 is mixed with {}", d.name()));
    }
    for (o, out) in outs.iter().enumerate() {
        match op.memory(o) {
            Memory::InPlace { input } | Memory::Over { input } if ins.get(input) != Some(out) => {
                return Err(format!("output {o} replaces input {input}, but is {out:?}"));
            }
            Memory::View { input, offset } => {
                let room = ins.get(input).map_or(0, Spec::bytes);
                if offset % out.dtype.size() != 0 || offset + out.bytes() > room {
                    return Err(format!("output {o} lies outside input {input}"));
                }
            }
            _ => {}
        }
    }
    Ok(outs)
}
