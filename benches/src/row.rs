//! A row of a table: one thing measured, on one machine, once.
use crate::{
    floats::Floats,
    machine::Machine,
    statistics::{Pair, Verdict},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt::Write as _};
use transfusion_core::launch::Cost;

/// One thing measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Which measurement: `step`, `sample`, `ops`, `scaling`.
    pub bench: String,
    /// What was measured: `training step`, `decode`, an op.
    pub what: String,
    /// The preset.
    pub preset: String,
    /// The program whose op it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub program: String,
    /// How floats are stored.
    pub dtype: String,
    /// What the factors of products are: `f32` or `bf16`.
    pub matmul: String,
    /// Sizes.
    pub shape: String,
    /// How often a step of the plan does it; 0 where that makes no sense.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub count: u64,
    /// Processor or GPU.
    pub device: String,
    /// Driver of a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// Clocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clocks: Option<String>,
    /// Threads of the CPU.
    pub threads: usize,
    /// Commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Day.
    pub date: String,
    /// Milliseconds, the median; absent where only the other side was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ms: Option<f64>,
    /// How much two blocks of ours differ, as a share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<f64>,
    /// 10^12 model FLOP/s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tflops: Option<f64>,
    /// 10^9 bytes/s, each operand once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gbs: Option<f64>,
    /// The least time by the machine's ceilings over ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roofline: Option<f64>,
    /// Model FLOP/s over the machine's, which are `peak`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// 10^12 FLOP/s that the machine does at most, of such products.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak: Option<f64>,
    /// What does them: `f32 multiply-adds`, `bf16 dot products`, or the `data sheet` that says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_of: Option<String>,
    /// How many of `unit` a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// `tokens/s`, `steps/s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Version of PyTorch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torch: Option<String>,
    /// The variant of the other side that was fastest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torch_variant: Option<String>,
    /// Its milliseconds, the median.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torch_ms: Option<f64>,
    /// How much two blocks of its differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torch_spread: Option<f64>,
    /// How many times as long the other side takes, the median over rounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speedup: Option<f64>,
    /// `faster`, `slower`, or `even` where the difference is inside the spread.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
    /// How far the results of both sides are apart at most, relative.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub apart: Option<f64>,
    /// Milliseconds of the other side's other variants.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub others: BTreeMap<String, f64>,
    /// The other side in other precisions than `torch_ms`, measured in the same run: `medium`, `bf16`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub peers: BTreeMap<String, Versus>,
}

/// Ours in turn with the other side in another precision.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Versus {
    /// The variant that was fastest.
    pub variant: String,
    /// Its milliseconds, the median.
    pub ms: f64,
    /// How much two blocks of its differ.
    pub spread: f64,
    /// How many times as long it takes, the median over rounds.
    pub speedup: f64,
    /// As [`Row::verdict`].
    pub verdict: String,
    /// How far its results are from ours at most, relative.
    pub apart: f64,
    /// Milliseconds of the other variants in this precision.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub others: BTreeMap<String, f64>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Row {
    /// A row of a machine, without figures yet.
    pub fn new(machine: &Machine, bench: &str, what: &str) -> Row {
        Row {
            bench: bench.into(),
            what: what.into(),
            device: machine.device.clone(),
            driver: machine.driver.clone(),
            clocks: machine.clocks.clone(),
            threads: machine.threads,
            commit: machine.commit.clone(),
            date: machine.date.clone(),
            ..Row::default()
        }
    }

    /// Adds how floats are stored and rounded.
    pub fn of(self, floats: Floats) -> Row {
        Row { dtype: floats.stored.name().into(), matmul: floats.factors().into(), ..self }
    }

    /// Adds what both sides took.
    pub fn timed(mut self, pair: &Pair) -> Row {
        if !pair.ours.0.is_empty() {
            (self.ms, self.spread) = (Some(pair.ours.median()), Some(pair.ours.spread()));
        }
        if !pair.theirs.0.is_empty() {
            (self.torch_ms, self.torch_spread) = (Some(pair.theirs.median()), Some(pair.theirs.spread()));
        }
        if self.ms.is_some() && self.torch_ms.is_some() {
            self.speedup = Some(pair.speedup());
            self.verdict = Some(pair.verdict().name().into());
        }
        self
    }

    /// Adds what follows from the time of one run: `work` are its model FLOPs and the bytes of its operands,
    /// `least` the least seconds that they take on the machine.
    pub fn rated(mut self, work: Cost, least: Option<f64>, machine: &Machine) -> Row {
        let Some(seconds) = self.ms.map(|ms| ms / 1e3) else { return self };
        let (rate, peak) = (work.flops as f64 / seconds, machine.ceilings.peak(self.matmul == "bf16"));
        if work.flops > 0 {
            self.tflops = Some(rate / 1e12);
        }
        if work.flops > 0 && peak.rate > 0.0 {
            self.mfu = Some(rate / peak.rate);
            (self.peak, self.peak_of) = (Some(peak.rate / 1e12), Some(peak.of.into()));
        }
        if work.bytes > 0 {
            self.gbs = Some(work.bytes as f64 / seconds / 1e9);
        }
        self.roofline = least.map(|least| least / seconds);
        self
    }

    /// Whether the comparison was won, lost, or neither.
    pub fn has(&self, verdict: Verdict) -> bool {
        self.verdict.as_deref() == Some(verdict.name())
    }
}

/// A column: its title and what it says of a row.
type Column = (&'static str, fn(&Row) -> String);

/// In Markdown only columns of which some row has something.
const COLUMNS: &[Column] = &[
    ("what", |r| r.what.clone()),
    ("preset", |r| r.preset.clone()),
    ("program", |r| r.program.clone()),
    ("dtype", |r| match r.dtype == "f32" && r.matmul == "bf16" {
        true => "f32, products bf16".into(),
        false => r.dtype.clone(),
    }),
    ("shape", |r| r.shape.clone()),
    ("times", |r| if r.count > 0 { r.count.to_string() } else { String::new() }),
    ("ms", |r| number(r.ms)),
    ("±", |r| percent(r.spread)),
    ("TFLOP/s", |r| number(r.tflops)),
    ("GB/s", |r| number(r.gbs)),
    ("of roofline", |r| percent(r.roofline)),
    ("MFU", |r| percent(r.mfu)),
    ("of TFLOP/s", |r| match &r.peak_of {
        Some(of) => format!("{} ({of})", number(r.peak)),
        None => String::new(),
    }),
    ("rate", |r| match (r.rate, &r.unit) {
        (Some(rate), Some(unit)) => format!("{} {unit}", number(Some(rate))),
        _ => String::new(),
    }),
    ("PyTorch ms", |r| number(r.torch_ms)),
    ("± ", |r| percent(r.torch_spread)),
    ("its variant", |r| r.torch_variant.clone().unwrap_or_default()),
    ("ratio", |r| r.speedup.map_or(String::new(), |x| format!("{x:.2}"))),
    ("ours is", |r| r.verdict.clone().unwrap_or_default()),
    ("medium ms", |r| number(r.peers.get("medium").map(|p| p.ms))),
    ("ratio to medium", |r| ratio(r.peers.get("medium"))),
    ("bf16 ms", |r| number(r.peers.get("bf16").map(|p| p.ms))),
    ("ratio to bf16", |r| ratio(r.peers.get("bf16"))),
];

/// What a short table leaves out.
const LONG: &[&str] = &["times", "±", "GB/s", "of roofline", "± ", "of TFLOP/s", "medium ms", "bf16 ms"];

/// What CSV has beside them.
const MORE: &[Column] = &[
    ("bench", |r| r.bench.clone()),
    ("unit", |r| r.unit.clone().unwrap_or_default()),
    ("torch", |r| r.torch.clone().unwrap_or_default()),
    ("apart", |r| r.apart.map_or(String::new(), |x| format!("{x:.1e}"))),
    ("device", |r| r.device.clone()),
    ("threads", |r| r.threads.to_string()),
    ("driver", |r| r.driver.clone().unwrap_or_default()),
    ("clocks", |r| r.clocks.clone().unwrap_or_default()),
    ("commit", |r| r.commit.clone().unwrap_or_default()),
    ("date", |r| r.date.clone()),
];

/// Four digits that count.
fn number(x: Option<f64>) -> String {
    let Some(x) = x else { return String::new() };
    let whole = x.abs().log10().floor().max(-3.0) as i32 + 1;
    format!("{x:.*}", (4 - whole).clamp(0, 6) as usize)
}

/// A ratio, with what may be said of it.
fn ratio(p: Option<&Versus>) -> String {
    p.map_or(String::new(), |p| format!("{:.2}, {}", p.speedup, p.verdict))
}

fn percent(x: Option<f64>) -> String {
    x.map_or(String::new(), |x| format!("{:.1} %", 100.0 * x))
}

/// The rows as a Markdown table.
pub fn markdown(rows: &[Row]) -> String {
    table(rows, &[])
}

/// The rows as a Markdown table of what matters most.
pub fn brief(rows: &[Row]) -> String {
    table(rows, LONG)
}

fn table(rows: &[Row], without: &[&str]) -> String {
    let is_used = |of: &fn(&Row) -> String| rows.iter().any(|r| !of(r).is_empty());
    let used = COLUMNS.iter().filter(|(title, of)| !without.contains(title) && is_used(of));
    let used: Vec<&Column> = used.collect();
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut out = line(used.iter().map(|(title, _)| title.trim().into()).collect());
    out += &line(vec!["---".into(); used.len()]);
    for row in rows {
        out += &line(used.iter().map(|(_, of)| of(row).replace('|', "\\|")).collect());
    }
    out
}

/// A text in which every block `<!-- bench:KIND -->` to `<!-- /bench -->` whose kind there are rows of holds their
/// table, with when and on what they were measured.
///
/// # Errors
/// If it has no such block, or one that does not end.
pub fn written(text: &str, rows: &[Row]) -> Result<String, String> {
    const END: &str = "<!-- /bench -->";
    let (mut out, mut rest, mut found) = (String::new(), text, false);
    while let Some((before, after)) = rest.split_once("<!-- bench:") {
        let (kind, inside) = after.split_once(" -->").ok_or("a marker <!-- bench: has no end -->")?;
        let unclosed = || format!("<!-- bench:{kind} --> is not followed by {END}");
        let (old, behind) = inside.split_once(END).ok_or_else(unclosed)?;
        let own: Vec<Row> = rows.iter().filter(|r| r.bench == kind).cloned().collect();
        found |= !own.is_empty();
        let new = match own.is_empty() {
            true => old.to_string(),
            false => format!("\n{}\n\n{}\n", provenance(&own), brief(&own).trim_end()),
        };
        out += &format!("{before}<!-- bench:{kind} -->{new}{END}");
        rest = behind;
    }
    match found {
        true => Ok(out + rest),
        false => Err(format!("there is no block for {}", kinds(rows).join(", "))),
    }
}

/// The measurements that rows are of.
fn kinds(rows: &[Row]) -> Vec<String> {
    let mut kinds: Vec<String> =
        rows.iter().map(|r| format!("<!-- bench:{} --> ... <!-- /bench -->", r.bench)).collect();
    kinds.sort();
    kinds.dedup();
    kinds
}

/// Rows that were printed as JSON; lines that begin with `#` are remarks.
///
/// # Errors
/// Names the line, and what is wrong with it.
pub fn read(text: &str) -> Result<Vec<Row>, String> {
    let is_row = |(_, line): &(usize, &str)| !line.trim().is_empty() && !line.starts_with('#');
    let row =
        |(i, line): (usize, &str)| serde_json::from_str(line).map_err(|e| format!("line {}: {e}", i + 1));
    text.lines().enumerate().filter(is_row).map(row).collect()
}

/// The rows as CSV (RFC 4180), with a line of titles.
pub fn csv(rows: &[Row]) -> String {
    let cell = |text: &str| match text.contains([',', '"', '\n']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.into(),
    };
    let all: Vec<&Column> = COLUMNS.iter().chain(MORE).collect();
    let line = |cells: Vec<String>| cells.iter().map(|c| cell(c)).collect::<Vec<_>>().join(",") + "\r\n";
    let mut out = line(all.iter().map(|(title, _)| title.to_string()).collect());
    rows.iter().for_each(|row| out += &line(all.iter().map(|(_, of)| of(row)).collect()));
    out
}

/// The rows as JSON, one to a line.
pub fn json(rows: &[Row]) -> String {
    let mut out = String::new();
    for row in rows {
        let _ = writeln!(out, "{}", serde_json::to_string(row).unwrap_or_default());
    }
    out
}

/// When, on what and against what rows were measured, a line for each combination.
pub fn provenance(rows: &[Row]) -> String {
    let mut lines: Vec<String> = Vec::new();
    for r in rows {
        let mut line = format!(
            "{}, {}, {} thread{}",
            r.date,
            r.device,
            r.threads,
            if r.threads == 1 { "" } else { "s" }
        );
        let (commit, torch) = (r.commit.as_ref(), r.torch.as_ref());
        let more = [
            r.driver.clone(),
            r.clocks.clone(),
            commit.map(|c| format!("commit {c}")),
            torch.map(|t| format!("PyTorch {t}")),
        ];
        more.into_iter().flatten().for_each(|part| line += &format!(", {part}"));
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines.join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{peak::Peak, statistics::Blocks};
    use transfusion_core::tensor::DType;

    fn row(what: &str) -> Row {
        let machine = Machine {
            device: "CPU, fast".into(),
            date: "2026-11-23".into(),
            threads: 2,
            ..Machine::unknown()
        };
        let pair = Pair { ours: Blocks(vec![2.0, 2.0]), theirs: Blocks(vec![6.0, 6.6]) };
        Row { preset: "tiny".into(), dtype: "f32".into(), ..Row::new(&machine, "step", what).timed(&pair) }
    }

    #[test]
    fn a_row_says_what_follows_from_its_times() {
        let mut machine = Machine::unknown();
        machine.ceilings.f32 = Peak { rate: 4e12, of: "f32 multiply-adds" };
        let rated = row("a").rated(Cost { flops: 2_000_000_000, bytes: 4_000_000 }, Some(1e-3), &machine);
        let near = |have: Option<f64>, want: f64| {
            assert!((have.unwrap() / want - 1.0).abs() < 1e-9, "{have:?} {want}")
        };
        near(rated.ms, 2.0);
        near(rated.tflops, 1.0);
        near(rated.mfu, 0.25);
        near(rated.gbs, 2.0);
        near(rated.roofline, 0.5);
        near(rated.speedup, 3.15);
        assert!(rated.has(Verdict::Faster) && !rated.has(Verdict::Even));
        machine.ceilings.bf16 = Peak { rate: 8e12, of: "bf16 dot products" };
        let floats = Floats { stored: DType::F32, narrow: true };
        let work = Cost { flops: 2_000_000_000, bytes: 0 };
        let rounded = row("a").of(floats).rated(work, None, &machine);
        near(rounded.mfu, 0.125);
        let table = markdown(&[rounded]);
        assert!(table.contains("| f32, products bf16 |"), "{table}");
        assert!(table.contains("| 8.000 (bf16 dot products) |"), "{table}");
        let alone =
            Row::new(&machine, "ops", "b").timed(&Pair { theirs: Blocks(vec![1.0]), ..Pair::default() });
        assert_eq!((alone.ms, alone.torch_ms, alone.speedup, alone.verdict), (None, Some(1.0), None, None));
    }

    fn versus(speedup: f64) -> Versus {
        Versus { variant: "eager".into(), ms: 4.0, speedup, verdict: "faster".into(), ..Versus::default() }
    }

    #[test]
    fn other_precisions_have_columns_of_their_own() {
        let peers = [("medium", 2.0), ("bf16", 1.5)].map(|(name, x)| (name.into(), versus(x)));
        let row = Row { peers: peers.into(), ..row("a") };
        let (long, short) = (markdown(std::slice::from_ref(&row)), brief(&[row]));
        assert!(long.contains("| faster | 4.000 | 2.00, faster | 4.000 | 1.50, faster |"), "{long}");
        assert!(
            short.contains("| ratio to medium | ratio to bf16 |") && !short.contains("medium ms"),
            "{short}"
        );
    }

    #[test]
    fn rows_come_back_from_json() {
        let peers = [("medium".into(), versus(2.0))].into();
        let rows = vec![Row { peers, ..row("a") }, Row { count: 3, rate: Some(0.1 + 0.2), ..row("b") }];
        let text = json(&rows);
        assert!(
            text.contains("\"ms\":2.0")
                && text.contains("\"torch_ms\":6.3")
                && text.contains("\"speedup\":3.15")
        );
        assert_eq!(read(&format!("# how\n{text}\n")).unwrap(), rows);
        assert!(read("{}").unwrap_err().starts_with("line 1: missing field"));
        assert!(read("\n{\"bench\": 3}").unwrap_err().starts_with("line 2: "));
    }

    #[test]
    fn tables_have_the_columns_that_are_used() {
        let long = markdown(&[row("a")]);
        assert!(
            long.contains("| what | preset | dtype | ms | ± | PyTorch ms | ± | ratio | ours is |"),
            "{long}"
        );
        assert!(
            long.contains("| a | tiny | f32 | 2.000 | 0.0 % | 6.300 | 10.0 % | 3.15 | faster |"),
            "{long}"
        );
        assert!(brief(&[row("a")]).contains("| a | tiny | f32 | 2.000 | 6.300 | 3.15 | faster |"));
        let lines = csv(&[Row { shape: "2 \"x\" 3".into(), ..row("a") }]);
        assert!(lines.contains("\"CPU, fast\"") && lines.contains("\"2 \"\"x\"\" 3\""), "{lines}");
        let titles = lines.lines().next().unwrap().split(',').count();
        assert_eq!(titles, COLUMNS.len() + MORE.len());
    }

    #[test]
    fn numbers_have_four_digits() {
        let all = [12345.6, 123.456, 1.23456, 0.0123456, 0.0, 1e-9].map(|x| number(Some(x)));
        assert_eq!(all, ["12346", "123.5", "1.235", "0.01235", "0.000000", "0.000000"]);
    }

    #[test]
    fn tables_are_written_between_markers() {
        let page = "# Title\n<!-- bench:step -->old<!-- /bench -->\nmore\n<!-- bench:ops -->kept<!-- /bench -->\nend\n";
        let out = written(page, &[row("a")]).unwrap();
        assert!(
            out.starts_with("# Title\n<!-- bench:step -->\n2026-11-23, CPU, fast, 2 threads\n\n| what"),
            "{out}"
        );
        assert!(
            out.ends_with("|\n<!-- /bench -->\nmore\n<!-- bench:ops -->kept<!-- /bench -->\nend\n")
                && !out.contains("old")
        );
        assert_eq!(written(&out, &[row("a")]).unwrap(), out);
        assert!(written("nothing", &[row("a")]).unwrap_err().contains("<!-- bench:step -->"));
        assert!(
            written("<!-- bench:step --> and no more", &[row("a")])
                .unwrap_err()
                .contains("is not followed by")
        );
    }
}
