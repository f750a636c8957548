//! `transfusion kernels explain`.
use super::{
    rows::{Row, extents, rows},
    workbench::Model,
};
use crate::{
    commands::programs::{Sizing, Which},
    console::{self, bytes, count},
    failure::{Failure, Outcome},
};
use clap::Args;
use serde_json::{Value, json};
use transfusion::{programs::Named, run::RunConfig};
use transfusion_core::{
    device::resolve::{self, Library},
    launch::{Bound, Cost, Roofline},
    plan::Plan,
};

/// Show every launch of a plan, with the least time that a GPU can take for it. Needs no GPU.
///
/// The launches are those of the very plan that would run, made for the machine that is named; no memory is
/// taken for it. Steps that launch the same are one row. FLOPs and bytes are the least possible, each operand
/// once, and every position of a batch counts as used. The least time is the larger of FLOPs over the peak
/// rate (of the tensor cores for a kernel that uses them, else of f32) and bytes over the memory's bandwidth,
/// as NVIDIA's data sheets have them.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion kernels explain --preset 0.76b --batch 4 --target H200
  transfusion kernels explain --preset 7b --batch 1 --program denoise
  transfusion kernels explain --batch 8 --program loss --json")]
pub(crate) struct Explain {
    #[command(flatten)]
    sizing: Sizing,
    /// What runs.
    #[arg(long, value_enum, default_value_t = Which::Train)]
    program: Which,
    /// The machine that launches are made for.
    #[arg(long, value_enum, default_value_t = Model::H200)]
    target: Model,
    /// Print JSON: {"target", "programs": [{"name", "rows": [{"op", "count", "launches", "flops", "bytes",
    /// "seconds", "bound"}], "total"}]}; figures of a row are those of one step.
    #[arg(long)]
    json: bool,
}

/// A program, explained.
struct Page {
    name: &'static str,
    rows: Vec<Row>,
}

/// What some steps take at least.
#[derive(Default)]
struct Sum {
    launches: u64,
    cost: Cost,
    seconds: f64,
}

impl Explain {
    /// Plans and prints.
    pub(crate) fn run(self) -> Outcome {
        let config = self.sizing.resolve()?;
        let roofline = self.target.roofline();
        let programs = self.sizing.programs(self.program, &config)?;
        let library = Library::new(roofline.target.arch, vec![])?;
        let pages = programs.iter().map(|p| page(&config, p, &roofline, &library));
        let pages: Vec<Page> = pages.collect::<Outcome<_>>()?;
        if self.json {
            let json = in_json(&pages, &roofline);
            return console::print(serde_json::to_string_pretty(&json).map_err(Failure::error)?);
        }
        let mut lines = vec![self.title(&config, &roofline)];
        pages.iter().for_each(|page| lines.extend(page.in_words(&roofline)));
        if let [_, _, ..] = &pages[..] {
            lines.push(format!("\nin all: {}", sum(pages.iter().flat_map(|p| &p.rows), &roofline)));
        }
        console::print(lines.join("\n"))
    }

    fn title(&self, config: &RunConfig, r: &Roofline) -> String {
        let (t, train) = (&r.target, &config.train);
        format!(
            "{}, {} rows of {} positions, on {}: {} SMs, {}FLOP/s in bf16, {}FLOP/s in f32, {}B/s",
            self.sizing.settings.preset,
            train.rows,
            train.positions,
            t.name,
            t.sms,
            count(t.peak),
            count(r.f32),
            count(r.bandwidth),
        )
    }
}

/// Plans a program and holds its launches against their kernels.
fn page(config: &RunConfig, p: &Named, r: &Roofline, library: &Library) -> Outcome<Page> {
    let plan = Plan::lowered(&p.program.graph(&config.model)?, &r.target)?;
    resolve::check(&plan, &r.target, library)?;
    Ok(Page { name: p.name, rows: rows(&plan, library) })
}

fn sum<'a>(rows: impl Iterator<Item = &'a Row>, r: &Roofline) -> Sum {
    rows.fold(Sum::default(), |mut sum, row| {
        let all = row.total();
        sum.launches += row.count * row.launches.len() as u64;
        sum.cost = Cost { flops: sum.cost.flops + all.flops, bytes: sum.cost.bytes + all.bytes };
        sum.seconds += row.count as f64 * r.seconds(row.cost, row.tensor).0;
        sum
    })
}

impl std::fmt::Display for Sum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (flops, moved, ms) = (count(self.cost.flops as f64), bytes(self.cost.bytes), self.seconds * 1e3);
        write!(f, "{} launches, {flops}FLOP, {moved}, {ms:.3} ms at least", self.launches)
    }
}

impl Page {
    fn in_words(&self, r: &Roofline) -> Vec<String> {
        let sum = sum(self.rows.iter(), r);
        let widest = |of: &dyn Fn(&Row) -> usize| self.rows.iter().map(of).max().unwrap_or(0);
        let op = widest(&|row| row.op.len());
        let kernel = widest(&|row| row.launches.iter().map(|l| l.kernel.len()).max().unwrap_or(0));
        let mut lines = vec![
            format!("\n{}", self.name),
            format!(
                "{:>5}  {:op$}  {:kernel$}  {:>11} {:>6} {:>7} {:>10} {:>11} {:>9} {:>6}  bound",
                "steps", "op", "kernel", "grid", "block", "shared", "FLOP", "bytes", "us each", "share"
            ),
        ];
        for row in &self.rows {
            let (seconds, bound) = r.seconds(row.cost, row.tensor);
            let share = 100.0 * row.count as f64 * seconds / sum.seconds;
            for (i, l) in row.launches.iter().enumerate() {
                let (grid, block) = (extents(l.grid), extents(l.block));
                let launch = format!("{:kernel$}  {grid:>11} {block:>6} {:>7}", l.kernel, l.shared);
                lines.push(match i {
                    0 => format!(
                        "{:>5}  {:op$}  {launch} {:>10} {:>11} {:>9.2} {share:>5.1}%  {}",
                        row.count,
                        row.op,
                        count(row.cost.flops as f64),
                        bytes(row.cost.bytes),
                        seconds * 1e6,
                        word(bound)
                    ),
                    _ => format!("{:5}  {:op$}  {launch}", "", ""),
                });
            }
        }
        lines.push(format!("{}: {sum}", self.name));
        lines
    }
}

fn word(bound: Bound) -> &'static str {
    match bound {
        Bound::Tensor => "tensor cores",
        Bound::F32 => "f32",
        Bound::Memory => "memory",
    }
}

fn in_json(pages: &[Page], r: &Roofline) -> Value {
    let row = |row: &Row| {
        let (seconds, bound) = r.seconds(row.cost, row.tensor);
        let launches: Vec<Value> = row.launches.iter().map(|l| l.json()).collect();
        json!({
            "op": row.op, "count": row.count, "launches": launches, "flops": row.cost.flops,
            "bytes": row.cost.bytes, "seconds": seconds, "bound": word(bound),
        })
    };
    let total = |rows: &[Row]| {
        let s = sum(rows.iter(), r);
        json!({
            "launches": s.launches, "flops": s.cost.flops, "bytes": s.cost.bytes, "seconds": s.seconds,
        })
    };
    let page = |p: &Page| {
        let rows: Vec<Value> = p.rows.iter().map(row).collect();
        json!({ "name": p.name, "rows": rows, "total": total(&p.rows) })
    };
    let target = json!({
        "name": r.target.name, "sms": r.target.sms, "bf16": r.target.peak, "f32": r.f32,
        "bandwidth": r.bandwidth,
    });
    json!({ "target": target, "programs": pages.iter().map(page).collect::<Vec<_>>() })
}
