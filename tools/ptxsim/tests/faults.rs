//! Every file in `faults/` is a kernel with one planted fault. Comment lines at its head say how to launch it and
//! what must be found; the faulty line ends in `// FAULT`. A line `//+ x` is part of the repaired kernel only, one
//! that ends in `//-` of the faulty one only. For each, under several schedules:
//!
//! * the fault is found, of the right kind, at the right line;
//! * without that check nothing of the kind is reported, so that the test would fail;
//! * the repaired kernel is clean.

use std::error::Error;
use std::path::Path;
use transfusion_ptxsim::{
    Access, Argument, Checks, Finding, FindingKind, Launch, Memory, MemoryId, Module, Options, Schedule,
    Window, simulate,
};

struct Case {
    name: String,
    text: String,
    grid: u32,
    block: u32,
    expect: String,
    windows: Vec<Operand>,
}

struct Operand {
    name: String,
    bytes: usize,
    access: Access,
    initialised: usize,
}

impl Case {
    fn read(path: &Path) -> Result<Self, Box<dyn Error>> {
        let text = std::fs::read_to_string(path)?;
        let name = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default().to_string();
        let mut case =
            Self { name, text: text.clone(), grid: 1, block: 32, expect: String::new(), windows: vec![] };
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["//", "launch:", "grid", grid, "block", block] => {
                    (case.grid, case.block) = (grid.parse()?, block.parse()?);
                }
                ["//", "window:", name, bytes, access, rest @ ..] => {
                    let bytes = bytes.parse()?;
                    let initialised = match rest {
                        [] => 0,
                        ["init"] => bytes,
                        [_, count, ..] => count.parse()?,
                        _ => return Err(format!("{line}?").into()),
                    };
                    let access = match *access {
                        "read" => Access::Read,
                        "write" => Access::Write,
                        _ => Access::ReadWrite,
                    };
                    case.windows.push(Operand { name: name.to_string(), bytes, access, initialised });
                }
                ["//", "expect:", ..] => case.expect = words[2..].join(" "),
                _ => {}
            }
        }
        Ok(case)
    }

    /// The lines at which the fault may be reported.
    fn fault_lines(&self) -> Vec<u32> {
        let marked = self.text.lines().enumerate().filter(|(_, l)| l.contains("// FAULT"));
        marked.map(|(n, _)| n as u32 + 1).collect()
    }

    fn repaired(&self) -> String {
        let lines = self.text.lines().map(|l| match l.strip_prefix("//+") {
            Some(rest) => rest,
            None if l.ends_with("//-") => "",
            None => l,
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    fn run(&self, text: &str, schedule: Schedule, checks: Checks) -> Result<Vec<Finding>, Box<dyn Error>> {
        let module = Module::load(&self.name, text)?;
        // One memory, so that neighbours are real.
        let mut memory = Memory::new(self.windows.iter().map(|w| w.bytes.next_multiple_of(16)).sum());
        let mut args = Vec::new();
        let mut start = 0;
        for w in &self.windows {
            memory.write(start, &vec![1; w.initialised]);
            args.push(Argument::Window(Window {
                name: &w.name,
                memory: MemoryId(0),
                start,
                len: w.bytes,
                offset: 0,
                access: w.access,
            }));
            start += w.bytes.next_multiple_of(16);
        }
        let launch = Launch {
            kernel: module.kernel("test")?,
            grid: [self.grid, 1, 1],
            block: [self.block, 1, 1],
            cluster: [1, 1, 1],
            shared: 0,
            cooperative: false,
            args: &args,
        };
        let options = Options { schedule, checks, ..Options::default() };
        Ok(simulate(&mut [memory], &launch, &options)?.findings)
    }
}

fn kind_of(name: &str) -> Result<FindingKind, String> {
    FindingKind::ALL.into_iter().find(|k| k.to_string() == name).ok_or(format!("no kind `{name}`"))
}

#[test]
fn every_planted_fault_is_named_and_every_repair_is_clean() -> Result<(), Box<dyn Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults");
    let mut complaints = Vec::new();
    let mut kinds = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(folder)? {
        let case = Case::read(&entry?.path())?;
        let kind = kind_of(&case.expect)?;
        let lines = case.fault_lines();
        kinds.insert(kind);
        for schedule in Schedule::SEVERAL {
            let found = case.run(&case.text, schedule, Checks::all())?;
            if !found.iter().any(|f| f.kind == kind && lines.contains(&f.line)) {
                complaints
                    .push(format!("{} {schedule:?}: wanted {kind} at {lines:?}, got {found:#?}", case.name));
            }
            let blind = case.run(&case.text, schedule, Checks::all().without(kind))?;
            if blind.iter().any(|f| f.kind == kind) {
                complaints.push(format!("{}: {kind} reported although the check is off", case.name));
            }
            let clean = case.run(&case.repaired(), schedule, Checks::all())?;
            if !clean.is_empty() {
                complaints.push(format!("{} repaired, {schedule:?}: {clean:#?}", case.name));
            }
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    assert_eq!(kinds.len(), FindingKind::ALL.len(), "a kind has no test: {kinds:?}");
    Ok(())
}
