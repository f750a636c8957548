//! Mutants of the kernels: whether a fault in them fails a test that needs no GPU.
//!
//! Each mutant of `mutants/table.rs` is applied to the sources in memory, compiled with the pinned NVRTC, and put
//! to the exam that `kernels.rs` puts to the shipped kernels. Run it and write the table with
//!
//! ```sh
//! cargo test --release -p transfusion-tests --test mutants -- --ignored --nocapture
//! ```
//!
//! `MUTANT='WORDS|WORDS'` runs those whose names hold some of them, and leaves the other rows of the table as they are. What
//! the pinned NVRTC needs is in
//! `tools/ptxc`; the first run fetches it.
#[path = "mutants/table.rs"]
mod table;

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};
use table::MUTANTS;
use transfusion_ptx::Module;
use transfusion_ptxc::{Nvrtc, Source, Tree, nvrtc::Choice, wheel::Cache};
use transfusion_tests::judge::Exam;

/// A change that makes a kernel wrong.
struct Mutant {
    /// What is wrong then.
    name: &'static str,
    /// Whose exam it must fail.
    op: &'static str,
    /// Source, below `kernels-cu/`.
    file: &'static str,
    /// What stands there once.
    old: &'static str,
    /// What stands there then.
    new: &'static str,
    /// Why it is no fault after all.
    harmless: Option<&'static str>,
}

const fn mutant(
    op: &'static str,
    file: &'static str,
    name: &'static str,
    old: &'static str,
    new: &'static str,
) -> Mutant {
    Mutant { name, op, file, old, new, harmless: None }
}

impl Mutant {
    /// Says why it is no fault after all.
    const fn harmless(self, why: &'static str) -> Mutant {
        Mutant { harmless: Some(why), ..self }
    }

    /// The source of the op, changed.
    fn apply(&self, sources: &BTreeMap<String, Source>) -> Source {
        let mut source = sources[self.op].clone();
        let header = source.headers.iter_mut().find(|h| h.path.ends_with(self.file));
        let text = header.map_or(&mut source.text, |h| &mut h.text);
        assert_eq!(text.matches(self.old).count(), 1, "{}: the old text should stand once", self.name);
        *text = text.replace(self.old, self.new);
        source
    }
}

/// What became of a mutant.
enum Fate {
    /// The first fault.
    Killed(String),
    Survived,
    DoesNotCompile(String),
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn sources() -> BTreeMap<String, Source> {
    let all = Tree::new(root()).sources().unwrap();
    all.into_iter().map(|s| (s.stem.clone(), s)).collect()
}

#[test]
fn every_mutant_finds_its_text() {
    let sources = sources();
    for m in MUTANTS {
        let source = m.apply(&sources);
        assert!(m.file.starts_with(&source.stem) || m.file.starts_with("common/"), "{}", m.name);
        assert_eq!(MUTANTS.iter().filter(|other| other.name == m.name).count(), 1, "{} stands twice", m.name);
    }
}

#[test]
#[ignore = "compiles every mutant with NVRTC: minutes"]
fn mutants_fail_a_test() {
    let wanted = std::env::var("MUTANT").unwrap_or_default();
    let is_wanted = |m: &&Mutant| wanted.split('|').any(|words| m.name.contains(words));
    let mutants: Vec<&Mutant> = MUTANTS.iter().filter(is_wanted).collect();
    let fates = fates(&mutants);
    let path = root().join("tests/mutants.md");
    let mut rows = rows(&fs::read_to_string(&path).unwrap_or_default());
    rows.extend(mutants.iter().zip(&fates).map(|(m, fate)| (m.name.to_string(), row(m, fate))));
    fs::write(path, table(&rows)).unwrap();
    let compiled = fates.iter().filter(|f| !matches!(f, Fate::DoesNotCompile(_))).count();
    let killed = fates.iter().filter(|f| matches!(f, Fate::Killed(_))).count();
    for (m, fate) in mutants.iter().zip(&fates) {
        match (fate, m.harmless) {
            (Fate::Survived, None) => panic!("{} survives", m.name),
            (Fate::Killed(_), Some(why)) => panic!("{} is killed, but should not be: {why}", m.name),
            _ => {}
        }
    }
    assert!(killed * 100 >= compiled * 95 || !wanted.is_empty(), "{killed} of {compiled} are killed");
}

/// Tries all, two at a time.
fn fates(mutants: &[&Mutant]) -> Vec<Fate> {
    let nvrtc = Nvrtc::open(&Choice::Pinned, &Cache::new(root().join(".cache/ptxc"))).unwrap();
    let sources = sources();
    let exams: BTreeMap<&str, Exam> = sources
        .keys()
        .filter(|op| mutants.iter().any(|m| m.op == *op))
        .map(|op| (op.as_str(), Exam::new(op)))
        .collect();
    for (op, exam) in &exams {
        assert_eq!(exam.faults(&[]).next(), None, "the shipped kernels of {op} pass");
    }
    let (next, fates) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let work = || {
        while let Some((i, m)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, mutants.get(i)?)))
        {
            let fate = fate(&nvrtc, &exams[m.op], &m.apply(&sources));
            eprintln!("{i}: {}: {}", m.name, fate.summary());
            fates.lock().unwrap().insert(i, fate);
        }
    };
    thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(work))));
    fates.into_inner().unwrap().into_values().collect()
}

fn fate(nvrtc: &Nvrtc, exam: &Exam, source: &Source) -> Fate {
    let arch = source.targets[0];
    let compiled = match nvrtc.compile(source, arch) {
        Ok(compiled) => compiled,
        Err(e) => return Fate::DoesNotCompile(e.to_string()),
    };
    let module = Module::new(arch.name(), source.stem.as_str(), compiled.ptx);
    exam.faults(&[module]).next().map_or(Fate::Survived, Fate::Killed)
}

impl Fate {
    /// In one line without places that change with the compiler.
    fn summary(&self) -> String {
        match self {
            Fate::Killed(fault) => short(fault),
            Fate::Survived => "SURVIVED".into(),
            Fate::DoesNotCompile(why) => format!("does not compile: {why}"),
        }
    }
}

/// The first finding of a fault, or its last part.
fn short(fault: &str) -> String {
    let case = fault.split(": ").next().unwrap_or_default();
    let what = match fault.split_once("has faults:\n") {
        Some((_, findings)) => findings.lines().next().unwrap_or_default().trim(),
        None => fault.splitn(3, ": ").last().unwrap_or_default(),
    };
    format!("{} ({case})", what.lines().next().unwrap_or_default())
}

/// The row of a mutant.
fn row(m: &Mutant, fate: &Fate) -> String {
    let summary = match (fate, m.harmless) {
        (Fate::Survived, Some(why)) => format!("SURVIVED: {why}"),
        _ => fate.summary(),
    };
    let cell = |s: &str| s.replace('|', "\\|").replace('\n', " ");
    format!("| {} | {} | {} |", m.file, m.name, cell(&summary))
}

/// The rows of a table, by the names of their mutants.
fn rows(table: &str) -> BTreeMap<String, String> {
    let named = |line: &str| Some((line.split(" | ").nth(1)?.to_string(), line.to_string()));
    table.lines().skip_while(|line| !line.starts_with("|---")).skip(1).filter_map(named).collect()
}

/// The table of the mutants that there are, of these rows.
fn table(rows: &BTreeMap<String, String>) -> String {
    let rows: Vec<&String> = MUTANTS.iter().filter_map(|m| rows.get(m.name)).collect();
    let count = |fate: &str| rows.iter().filter(|row| row.contains(&format!(" | {fate}"))).count();
    let compiled = rows.len() - count("does not compile");
    let killed = compiled - count("SURVIVED");
    let left = match MUTANTS.len() - rows.len() {
        0 => String::new(),
        left => format!("; {left} have not been tried yet"),
    };
    let mut text = format!(
        "# Mutants of the kernels\n\n{killed} of {compiled} fail a test without a GPU{left}. Made by\n\n```sh\ncargo test \
         --release -p transfusion-tests --test mutants -- --ignored --nocapture\n```\n\nThe first fault of each, \
         with the case that shows it:\n\n| source | mutant | first fault |\n|---|---|---|\n"
    );
    for row in rows {
        let _ = writeln!(text, "{row}");
    }
    text
}
