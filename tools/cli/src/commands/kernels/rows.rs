//! The steps of a plan, those that launch the same as one.
use serde_json::{Value, json};
use transfusion_core::{
    device::resolve::Library,
    launch::{Cost, Launch},
    plan::{Plan, Step},
};

/// One thing that a step launches.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shape {
    /// The kernel, or `fill`, or `copy`.
    pub(super) kernel: String,
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    /// Static and dynamic shared memory of a block, bytes.
    pub(super) shared: u32,
}

/// Steps of one op that launch the same and cost the same.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) op: &'static str,
    pub(super) launches: Vec<Shape>,
    /// Of one step.
    pub(super) cost: Cost,
    /// Whether tensor cores do its work.
    pub(super) tensor: bool,
    /// How many steps.
    pub(super) count: u64,
}

impl Row {
    /// A step alone.
    pub(super) fn of(step: &Step, library: &Library) -> Row {
        let launches = step.launches.iter().map(|l| shape(l, library)).collect();
        let kernels = step.launches.iter().filter_map(entry);
        let tensor = kernels.filter_map(|e| Some((e, library.find(e)?)));
        let tensor = tensor.into_iter().any(|(e, k)| multiplies(&k.module.text, e));
        Row { op: step.op.name(), launches, cost: step.cost, tensor, count: 1 }
    }

    /// Whether another step belongs here.
    pub(super) fn is_like(&self, other: &Row) -> bool {
        (self.op, self.cost, &self.launches) == (other.op, other.cost, &other.launches)
    }

    /// All its steps.
    pub(super) fn total(&self) -> Cost {
        Cost { flops: self.count * self.cost.flops, bytes: self.count * self.cost.bytes }
    }
}

impl Shape {
    /// In JSON.
    pub(super) fn json(&self) -> Value {
        let Shape { kernel, grid, block, shared } = self;
        json!({ "kernel": kernel, "grid": grid, "block": block, "shared": shared })
    }
}

/// The steps of a plan that launch something, in the order in which the first of each kind runs.
pub(super) fn rows(plan: &Plan, library: &Library) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for step in plan.steps.iter().filter(|s| !s.launches.is_empty()) {
        let row = Row::of(step, library);
        match rows.iter_mut().find(|r| r.is_like(&row)) {
            Some(like) => like.count += 1,
            None => rows.push(row),
        }
    }
    rows
}

/// Extents, without those behind the last that is not 1: `12x4`; nothing of what is no kernel.
pub(super) fn extents(n: [u32; 3]) -> String {
    if n == [0; 3] {
        return String::new();
    }
    let used = n.iter().rposition(|&n| n != 1).unwrap_or(0);
    n[..=used].iter().map(u32::to_string).collect::<Vec<_>>().join("x")
}

/// The kernel of a launch.
pub(super) fn entry(launch: &Launch) -> Option<&str> {
    match launch {
        Launch::Kernel { entry, .. } => Some(entry),
        Launch::Fill { .. } | Launch::Copy { .. } => None,
    }
}

fn shape(launch: &Launch, library: &Library) -> Shape {
    let moved = |what: &str| Shape { kernel: what.into(), grid: [0; 3], block: [0; 3], shared: 0 };
    match launch {
        Launch::Kernel { entry, grid, block, shared, .. } => {
            let fixed = library.find(entry).map_or(0, |k| k.entry.static_shared);
            Shape { kernel: entry.clone(), grid: *grid, block: *block, shared: shared + fixed }
        }
        Launch::Fill { .. } => moved("fill"),
        Launch::Copy { .. } => moved("copy"),
    }
}

/// Whether the PTX of a kernel uses tensor cores.
fn multiplies(ptx: &str, entry: &str) -> bool {
    let begin = format!(".entry {entry}(");
    let body = ptx.split_once(&begin).map_or("", |(_, rest)| rest);
    let body = body.split_once(".entry ").map_or(body, |(own, _)| own);
    body.contains("mma.")
}
