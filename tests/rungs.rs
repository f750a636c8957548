//! The rungs of `kernels-cu/ladder` as kernels of their ops.
//!
//! A rung has no line of Rust: its contract is its launch. The op says what its own kernel is given, the
//! contract of that kernel calls each argument by a name, and the rung's contract asks for them by name; grid,
//! dynamic shared memory and scratch buffers are formulas of the sizes. So a rung is one more implementation of
//! the op: cases, tolerance law and devices are those of the real kernel.
mod words;

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use transfusion_core::{
    Error,
    agreement::{self, Application},
    cases::{self, Case},
    cpu::Cpu,
    device::{CudaDevice, CudaOptions, Device},
    graph::Graph,
    launch::{Arg, Cost, Kernels, Launch, Operand, Target},
    op::{Memory, Op},
    ops::{Epilogue, Heads},
    tensor::{DType, Host, In, Out, Spec},
};
use transfusion_ptx::Module;
use transfusion_ptxc::{
    Contract,
    contract::{Role, Row},
};
use transfusion_ptxsim::{Class, Counters, Options, SimDevice, SimOptions};
use words::Names;

/// Every ladder: the op, and its rungs from the ground up.
pub const LADDERS: [(&str, &[&str]); 3] = [
    ("linear", &["naive", "shared_tile", "register_tile", "tensor_core", "ldmatrix_swizzle", "cp_async"]),
    ("attention", &["two_pass", "online_softmax", "shared_tile", "tensor_core", "skip_tiles", "cp_async"]),
    ("rmsnorm", &["thread_per_row", "block_per_row", "warp_shuffle", "vector_loads", "in_registers"]),
];

/// The machine that grids are made for.
pub const TARGET: Target = Target::A100;

/// A version of a kernel that is kept for learning.
#[derive(Clone, Debug)]
pub struct Rung {
    /// Its idea: the stem of its file.
    pub name: String,
    /// Its PTX.
    pub module: Module,
    rows: Vec<Row>,
    /// Operands of which anything may stand where a mask hides it.
    pub hides: Vec<String>,
    /// Conditions on the sizes.
    needs: Vec<String>,
    /// Buffers of its own, and their bytes.
    scratch: Vec<(String, String)>,
    /// The contracts of the kernels that are shipped.
    shipped: Arc<Vec<Row>>,
}

impl Rung {
    /// The rungs of an op, from the ground up.
    ///
    /// # Panics
    /// If a file is missing or has no contract.
    pub fn of(op: &str) -> Vec<Rung> {
        let (_, names) = LADDERS.iter().find(|(o, _)| *o == op).unwrap();
        let shipped = Arc::new(shipped(op));
        let rung = |name: &&str| {
            let stem = format!("ladder/{op}/{name}");
            let (contract, text) = contract(&kernels().join(format!("{stem}.cu")));
            let line = |word: &str| {
                let line = text.lines().find_map(|l| l.strip_prefix("// ")?.strip_prefix(word));
                line.into_iter().flat_map(|l| l.split(',')).map(|part| part.trim().to_string())
            };
            let pair = |text: String| text.split_once(' ').map(|(name, bytes)| (name.into(), bytes.into()));
            let ptx = read(&kernels().join(format!("../ptx/{}/{stem}.ptx", TARGET.arch)));
            Rung {
                name: name.to_string(),
                module: Module::new(TARGET.arch, stem, ptx),
                rows: contract.rows,
                hides: line("Hides ").collect(),
                needs: line("Needs ").collect(),
                scratch: line("Scratch ").map(|text| pair(text).unwrap()).collect(),
                shipped: shipped.clone(),
            }
        };
        names.iter().map(rung).collect()
    }

    /// An application of its op, made by this rung.
    pub fn application(self: &Arc<Self>, a: &Application) -> Application {
        Application { op: Arc::new(OnRung { op: a.op.clone(), rung: self.clone() }), ..a.clone() }
    }

    /// What its contract says that an application costs, if it takes that in a single launch.
    ///
    /// # Errors
    /// If it does not take it, or says nothing that can be computed.
    pub fn promise(&self, a: &Application) -> Result<Option<Cost>, String> {
        let shipped = a.op.kernels(&a.specs, &a.op.infer(&a.specs)?, &TARGET)?;
        let Some(bound) = self.bind(&shipped, &TARGET)? else { return Ok(None) };
        let [row] = bound.rows[..] else { return Ok(None) };
        let number = |text: &str| words::number(text, &bound.names);
        Ok(Some(Cost { flops: number(&row.flops)?, bytes: number(&row.bytes)? }))
    }

    /// What it launches in place of `shipped`.
    fn kernels(&self, shipped: &Kernels, outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        let Some(bound) = self.bind(shipped, on)? else { return Ok(shipped.clone()) };
        self.admit(&bound, outs.len())?;
        let bytes = |(_, bytes): &(String, String)| words::number(bytes, &bound.names).map(|n| n as usize);
        Ok(Kernels {
            scratch: self.scratch.iter().map(bytes).collect::<Result<_, String>>()?,
            launches: bound.rows.iter().map(|r| self.launch(r, &bound)).collect::<Result<_, String>>()?,
        })
    }

    /// Its contract, applied to what the launches of `shipped` are given, all but their scratch; `None` if there are
    /// none.
    fn bind<'a>(&'a self, shipped: &'a Kernels, on: &Target) -> Result<Option<Bound<'a>>, String> {
        let mut bound: Option<Bound<'_>> = None;
        for launch in &shipped.launches {
            let Launch::Kernel { entry, grid, args, .. } = launch else {
                return Err(format!("{launch:?} is no kernel"));
            };
            let row = self.shipped.iter().find(|row| row.entry == *entry);
            let row = row.ok_or_else(|| format!("no contract has {entry}"))?;
            let named = row.arguments.iter().map(|a| a.name.as_str()).zip(args);
            let given: Given<'_> =
                named.filter(|(_, arg)| !matches!(operand(arg), Some(Operand::Scratch(_)))).collect();
            let names = names(row, &given, *grid, on);
            let bound = bound.get_or_insert_with(|| Bound {
                rows: self.rows.iter().filter(|r| dtype(&r.entry) == dtype(entry)).collect(),
                given: Given::new(),
                names: Names::new(),
            });
            bound.given.extend(given);
            bound.names.extend(names);
        }
        Ok(bound)
    }

    /// Refuses sizes that the contract does not admit, and operands that it does not name.
    fn admit(&self, bound: &Bound<'_>, outs: usize) -> Result<(), String> {
        for need in &self.needs {
            if !words::holds(need, &bound.names)? {
                return Err(format!("{} needs {need}", self.name));
            }
        }
        let arguments = bound.rows.iter().flat_map(|r| &r.arguments);
        let args = arguments.filter_map(|a| bound.given.get(a.name.as_str()));
        let named: Vec<Operand> = args.filter_map(|arg| operand(arg)).collect();
        let all = (0..outs).map(Operand::Out).chain(bound.given.values().filter_map(|arg| operand(arg)));
        match all.into_iter().find(|o| !named.contains(o)) {
            Some(left) => Err(format!("{} has no use for {left:?}", self.name)),
            None => Ok(()),
        }
    }

    fn launch(&self, row: &Row, Bound { given, names, .. }: &Bound<'_>) -> Result<Launch, String> {
        let argument = |name: &str| {
            let own = self.scratch.iter().position(|(scratch, _)| scratch == name).map(Arg::scratch);
            let size = || names.get(name).map(|n| Arg::U32(*n as u32));
            let arg = own.or_else(|| given.get(name).copied().cloned()).or_else(size);
            arg.ok_or_else(|| format!("what is {name}?"))
        };
        let mut grid = words::numbers(&row.grid, names)?;
        grid.resize(3, 1);
        Ok(Launch::Kernel {
            entry: row.entry.clone(),
            grid: [0, 1, 2].map(|i| grid[i] as u32),
            block: row.block,
            cluster: [1; 3],
            shared: if row.dynamic.is_empty() { 0 } else { words::number(&row.dynamic, names)? as u32 },
            args: row.arguments.iter().map(|a| argument(&a.name)).collect::<Result<_, String>>()?,
        })
    }
}

/// What the shipped kernel is given, by the names of its contract.
type Given<'a> = BTreeMap<&'a str, &'a Arg>;

/// A contract, applied.
struct Bound<'a> {
    /// Its entries for this dtype.
    rows: Vec<&'a Row>,
    given: Given<'a>,
    /// Sizes.
    names: Names,
}

/// The folder of the sources.
pub fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels-cu")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The contracts of an op's kernels: those of few rows or queries have a file of their own.
fn shipped(op: &str) -> Vec<Row> {
    let files = fs::read_dir(kernels()).unwrap().map(|f| f.unwrap().path());
    let own = files.filter(|f| {
        let stem = f.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let rest = stem.strip_prefix(op).map(str::to_owned);
        f.extension().is_some_and(|e| e == "cu") && rest.is_some_and(|r| r.is_empty() || r.starts_with('_'))
    });
    own.flat_map(|f| contract(&f).0.rows).collect()
}

fn contract(path: &Path) -> (Contract, String) {
    let text = read(path);
    (Contract::read(path, &text).unwrap_or_else(|e| panic!("{e}")), text)
}

/// The dtype that an entry names, last of all.
fn dtype(entry: &str) -> Option<&str> {
    entry.rsplit('_').next()
}

/// The head width that an entry names, as `d64`.
fn width(entry: &str) -> Option<u64> {
    entry.split('_').find_map(|part| part.strip_prefix('d')?.parse().ok())
}

/// The sizes of a launch by name: its arguments, what its grid is said to be, and the head width.
fn names(row: &Row, given: &Given<'_>, grid: [u32; 3], on: &Target) -> Names {
    let sizes = row.arguments.iter().filter(|a| a.role == Role::Size);
    let sizes = sizes.filter_map(|a| match given.get(a.name.as_str()) {
        Some(Arg::U32(n)) => Some((a.name.clone(), u64::from(*n))),
        _ => None,
    });
    let cells = row.grid.split(',').map(|cell| cell.trim().to_string());
    let cells = cells.zip(grid.map(u64::from)).filter(|(cell, _)| cell.chars().all(char::is_alphabetic));
    let others = width(&row.entry).map(|d| ("D".into(), d));
    let mut names: Names = cells.chain(sizes).chain(others).collect();
    names.insert("sms".into(), on.sms.into());
    names
}

fn operand(arg: &Arg) -> Option<Operand> {
    match arg {
        Arg::Address(operand, _) | Arg::Map(operand, _) => Some(*operand),
        _ => None,
    }
}

/// An op that runs on a rung: the op in everything but its kernels.
#[derive(Debug)]
struct OnRung {
    op: Arc<dyn Op>,
    rung: Arc<Rung>,
}

impl Op for OnRung {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn infer(&self, ins: &[Spec]) -> Result<Vec<Spec>, String> {
        self.op.infer(ins)
    }

    fn eval(&self, ins: &[In<'_>], outs: &mut [Out<'_>], cpu: &Cpu) {
        self.op.eval(ins, outs, cpu);
    }

    fn kernels(&self, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
        self.rung.kernels(&self.op.kernels(ins, outs, on)?, outs, on)
    }

    fn plain(&self, specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
        self.op.plain(specs, ins)
    }

    fn cost(&self, ins: &[Spec], outs: &[Spec]) -> Cost {
        self.op.cost(ins, outs)
    }

    fn memory(&self, out: usize) -> Memory {
        self.op.memory(out)
    }
}

/// The applications of an op in its case tables, of at most so many operations.
///
/// # Panics
/// If a case is refused.
pub fn applications(op: &str, flops: u64) -> Vec<Application> {
    let all = cases::all().into_iter().filter(|case| case.op == op);
    let all = all.flat_map(|case| [DType::Bf16, DType::F32].map(|float| forward(&case, float)));
    let mut seen = HashSet::new();
    all.filter(|a| a.cost().flops <= flops && seen.insert(format!("{a} {:?}", a.op))).collect()
}

/// The op of a case, applied.
fn forward(case: &Case, float: DType) -> Application {
    let all = agreement::applications(case, float, &mut agreement::cpu(1).unwrap()).unwrap();
    all.into_iter().find(|a| a.op.name() == case.op).unwrap()
}

/// The application that the ladder of an op is told with, and in words what it is.
///
/// # Panics
/// If the op has no ladder.
pub fn shown(op: &str) -> (Application, String) {
    let (case, words) = match op {
        "linear" => {
            let build = |g: &mut Graph, x: &[_]| vec![g.linear(x[0], x[1], Epilogue::default())];
            let case = Case::new("linear", "256x256x256", build).normal([256, 256]).normal([256, 256]);
            (case, "`y [256, 256] = x [256, 256] w [256, 256]^T`, bf16")
        }
        "rmsnorm" => {
            let case = Case::new("rmsnorm", "8192x1024", |g, x| vec![g.rmsnorm(x[0], x[1], 1e-5)]);
            (case.normal([8192, 1024]).normal([1024]), "`x [8192, 1024]`, bf16")
        }
        "attention" => {
            // Text, a picture of 64 positions that see each other, text.
            let (positions, picture) = (256, 96..160);
            let end = |i| if picture.contains(&i) { picture.end } else { i + 1 };
            let ends: Vec<i32> = (0..positions).map(end).collect();
            let heads = Heads { heads: 4, kv_heads: 2, width: 64 };
            let case = Case::new("attention", "256", move |g, x| vec![g.attention(x[0], x[1], x[2], heads)]);
            let case = case.normal([1, 256, 8 * 64]).ints([1, 256], &[0]).ints([1, 256], &ends);
            let words = "256 positions, 4 heads of 64 over 2 heads of keys and values, bf16; causal, but for a \
                picture of 64 positions that see each other";
            (case, words)
        }
        _ => panic!("{op} has no ladder"),
    };
    (forward(&case.without_gradient(), DType::Bf16), words.into())
}

/// What an application does on a simulated GPU, all its kernels together.
fn count(a: &Application, kernels: &[Module]) -> Result<Counters, Error> {
    let options = SimOptions { target: TARGET, simulation: Options::default(), kernels: kernels.to_vec() };
    let mut machine = SimDevice::new(options)?;
    a.run(&mut machine)?;
    let mut sum = Counters::default();
    machine.counters().values().for_each(|c| sum.add(c));
    Ok(sum)
}

/// The ladder of an op in the simulator's counters, the shipped kernel last.
///
/// # Panics
/// If a rung has findings.
pub fn table(op: &str) -> String {
    let (a, words) = shown(op);
    let cost = a.cost();
    let mut lines: Vec<(String, Counters)> = Rung::of(op)
        .into_iter()
        .map(Arc::new)
        .map(|rung| {
            let counters = count(&rung.application(&a), std::slice::from_ref(&rung.module));
            (rung.name.clone(), counters.unwrap())
        })
        .collect();
    lines.push((format!("*{op}.cu*"), count(&a, &[]).unwrap()));
    let tensor = lines.iter().any(|(_, c)| c.total.tensor_flops > 0);
    let (flops, bytes) = (short(cost.flops), short(cost.bytes));
    let mut text = format!("{words}: {flops} flops, {bytes} bytes at least.\n\n");
    text.push_str(
        "| rung | thread instructions | sectors / least | shared wavefronts | of these conflicts |",
    );
    text.push_str(if tensor { " mma share | tensor flops / flops |\n" } else { "\n" });
    text.push_str("|---|---:|---:|---:|---:|");
    text.push_str(if tensor { "---:|---:|\n" } else { "\n" });
    for (name, c) in lines {
        let t = c.total;
        let mma = c.classes.get(&Class::Tensor).map_or(0, |c| c.warp_instructions);
        let least = t.global_sectors as f64 * 32.0 / cost.bytes as f64;
        text.push_str(&format!(
            "| {name} | {} | {least:.2} | {} | {} |",
            short(t.thread_instructions),
            short(t.shared_wavefronts),
            short(t.bank_conflicts)
        ));
        if tensor {
            let share = 100.0 * mma as f64 / t.warp_instructions as f64;
            text.push_str(&format!(" {share:.1} % | {:.2} |", t.tensor_flops as f64 / cost.flops as f64));
        }
        text.push('\n');
    }
    text
}

/// A count in four digits.
fn short(n: u64) -> String {
    let (n, unit) = match n {
        0..10_000 => return n.to_string(),
        10_000..1_000_000 => (n as f64 / 1e3, "k"),
        _ => (n as f64 / 1e6, "M"),
    };
    let digits = 3 - (n.log10().floor() as usize).min(3);
    format!("{n:.digits$} {unit}")
}

/// The median time of each rung of an op on a GPU, and of the shipped kernel, in lines.
///
/// # Errors
/// Those of the device.
pub fn times(op: &str, ordinal: usize) -> Result<String, Error> {
    let (a, _) = shown(op);
    let mut all: Vec<(String, Application, Vec<Module>)> = Rung::of(op)
        .into_iter()
        .map(Arc::new)
        .map(|rung| (rung.name.clone(), rung.application(&a), vec![rung.module.clone()]))
        .collect();
    all.push((format!("{op}.cu"), a, vec![]));
    let mut text = String::new();
    for (name, a, kernels) in all {
        let mut gpu = CudaDevice::new(CudaOptions { ordinal, kernels, ..CudaOptions::default() })?;
        let id = a.open(&mut gpu)?;
        // The first launches load code and raise clocks.
        let runs = (0..23).map(|_| Ok(gpu.profile(id)?.iter().sum()));
        let mut times = runs.skip(3).collect::<Result<Vec<Duration>, Error>>()?;
        times.sort();
        text.push_str(&format!("{name:20} {:9.1} us\n", times[times.len() / 2].as_secs_f64() * 1e6));
    }
    Ok(text)
}

/// The README of the ladders with its tables, which stand between markers, counted anew.
///
/// # Panics
/// If a marker is missing.
pub fn readme(text: &str) -> String {
    let mut text = text.to_string();
    for (op, _) in LADDERS {
        let (begin, end) = (format!("<!-- {op}: written by `ladder write` -->\n"), "<!-- end -->");
        let (head, rest) = text.split_once(&begin).unwrap_or_else(|| panic!("no line {begin}"));
        let (_, tail) = rest.split_once(end).unwrap_or_else(|| panic!("no line {end}"));
        text = format!("{head}{begin}{}{end}{tail}", table(op));
    }
    text
}
