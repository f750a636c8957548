//! The contract that opens a kernel source: a table of its entries, held against the source and the PTX.
//!
//! ```text
//! // RMSNorm, forward.
//! // entry             grid  block  shared  arguments            bytes    flops
//! // rmsnorm_fwd_bf16  N     256    32      y r | x w | C | eps  4NC+4N   4NC
//! // Needs   C % 8 == 0.
//! ```
//!
//! The grammar is in `kernels-cu/README.md`.
use crate::{Arch, Error, Result};
use std::{fmt, path::Path};
use transfusion_ptx as ptx;

/// The first columns of every table; `bytes` and `flops` may follow.
const COLUMNS: [&str; 7] = ["entry", "grid", "block", "shared", "arguments", "bytes", "flops"];

/// Columns that no table is without.
const REQUIRED: usize = 5;

/// The table that opens a kernel source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contract {
    /// One row for each entry.
    pub rows: Vec<Row>,
}

/// What a source promises of one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Line of the source, from 1.
    pub line: usize,
    /// Name of the entry.
    pub entry: String,
    /// Blocks, in words: `N`, `M/64, N/64`.
    pub grid: String,
    /// Threads of a block.
    pub block: [u32; 3],
    /// Static shared memory, bytes.
    pub shared: u32,
    /// Dynamic shared memory, in words; empty where there is none.
    pub dynamic: String,
    /// The arguments, in order.
    pub arguments: Vec<Argument>,
    /// Bytes read and written, in words.
    pub bytes: String,
    /// Floating-point operations, in words.
    pub flops: String,
}

/// An argument of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Its name.
    pub name: String,
    /// The group it stands in.
    pub role: Role,
    /// How it is passed.
    pub pass: Pass,
}

/// What an argument is to the kernel: the groups of the table, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Written, or read and written.
    Output,
    /// Read.
    Input,
    /// An integer.
    Size,
    /// A float.
    Scalar,
}

/// How an argument is passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// An address, 8 bytes.
    Address,
    /// A tensor map by value, 128 bytes.
    Map,
    /// A table of addresses and 64-bit sizes by value.
    Table {
        /// How many rows it has room for.
        rows: u32,
        /// Words of 8 bytes in each.
        words: u32,
    },
    /// `u32`.
    U32,
    /// `u64`.
    U64,
    /// `f32`.
    F32,
}

impl Pass {
    fn matches(self, p: &ptx::Param) -> bool {
        match self {
            Pass::Address | Pass::U64 => p.kind == ptx::Kind::U64,
            Pass::U32 => p.kind == ptx::Kind::U32,
            Pass::F32 => p.kind == ptx::Kind::F32,
            Pass::Map => p.kind == ptx::Kind::Bytes && p.size == 128 && p.align >= 64,
            Pass::Table { rows, words } => {
                p.kind == ptx::Kind::Bytes && p.size == 8 * rows * words && p.align == 8
            }
        }
    }
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pass::Address => f.write_str("an address"),
            Pass::Map => f.write_str("a tensor map"),
            Pass::Table { rows, words } => write!(f, "a table of {rows} rows of {words} words"),
            Pass::U32 => f.write_str("a u32"),
            Pass::U64 => f.write_str("a u64"),
            Pass::F32 => f.write_str("an f32"),
        }
    }
}

impl Contract {
    /// Reads the contract of a source.
    ///
    /// # Errors
    /// [`Error::Source`] with the line, where there is no table or it breaks the grammar.
    pub fn read(path: &Path, source: &str) -> Result<Contract> {
        parse(source).map_err(|(line, why)| Error::source(path, line, why))
    }

    /// Holds the contract against the parameter lists of the source and against the module compiled from it.
    ///
    /// # Errors
    /// [`Error::Source`] with the line of the row that is not kept, or of an entry that has no row.
    pub fn hold(&self, path: &Path, source: &str, arch: Arch, module: &ptx::Module) -> Result<()> {
        let bad = |line, why: String| Error::source(path, line, why);
        let entries = module.entries().map_err(|e| bad(0, format!("PTX for {arch}: {e}")))?;
        for row in &self.rows {
            let entry = entries.iter().find(|e| e.name == row.entry);
            let entry = entry
                .ok_or_else(|| bad(row.line, format!("no entry {} in the PTX for {arch}", row.entry)))?;
            row.hold_source(source).and_then(|()| row.hold_ptx(entry)).map_err(|why| bad(row.line, why))?;
        }
        match entries.iter().find(|e| self.rows.iter().all(|r| r.entry != e.name)) {
            Some(e) => Err(bad(0, format!("entry {} is not in the contract", e.name))),
            None => Ok(()),
        }
    }
}

impl Row {
    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.block.iter().product()
    }

    /// What the PTX says: number and kinds of the parameters, threads, static shared memory.
    fn hold_ptx(&self, entry: &ptx::Entry) -> Result<(), String> {
        let name = &self.entry;
        if entry.params.len() != self.arguments.len() {
            let (want, have) = (self.arguments.len(), entry.params.len());
            return Err(format!("{name} has {want} arguments here and {have} in the PTX"));
        }
        for (a, p) in self.arguments.iter().zip(&entry.params) {
            if !a.pass.matches(p) {
                let (pass, bytes, kind) = (a.pass, p.size, p.kind);
                return Err(format!(
                    "{name}: {} is {pass} here and {bytes} bytes, {kind:?}, in the PTX",
                    a.name
                ));
            }
        }
        match entry.max_threads {
            Some(n) if n == self.threads() => {}
            Some(n) => return Err(format!("{name} has {} threads here and {n} in the PTX", self.threads())),
            None => return Err(format!("{name} has no __launch_bounds__")),
        }
        if entry.static_shared != self.shared {
            let have = entry.static_shared;
            return Err(format!(
                "{name} has {} bytes of static shared memory here and {have} in the PTX",
                self.shared
            ));
        }
        Ok(())
    }

    /// What only the source says: names in order, and which operands are `const`. Sizes go by the letters of the
    /// formulas here, and may have longer names there.
    fn hold_source(&self, source: &str) -> Result<(), String> {
        let name = &self.entry;
        let signature = signature(source, name)
            .ok_or_else(|| format!("{name}( is not written out as a __global__ function of this file"))?;
        let same = |(a, p): (&Argument, &Parameter)| a.role == Role::Size || a.name == p.name;
        if signature.len() != self.arguments.len() || !self.arguments.iter().zip(&signature).all(same) {
            let here: Vec<&str> = self.arguments.iter().map(|a| a.name.as_str()).collect();
            let there: Vec<&str> = signature.iter().map(|p| p.name).collect();
            return Err(format!("{name} takes ({}), not ({})", there.join(" "), here.join(" ")));
        }
        for (a, p) in self.arguments.iter().zip(&signature).filter(|(a, _)| a.pass == Pass::Address) {
            match (a.role, p.constant) {
                (Role::Output, true) => return Err(format!("{name}: {} is an output, yet const", a.name)),
                (Role::Input, false) => return Err(format!("{name}: {} is an input, yet not const", a.name)),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A parameter of a function of the source.
struct Parameter<'a> {
    name: &'a str,
    constant: bool,
}

/// The parameters of the `__global__` function of this name; comments inside the list are not expected.
fn signature<'a>(source: &'a str, name: &str) -> Option<Vec<Parameter<'a>>> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let list = source.match_indices(name).find_map(|(at, _)| {
        let list = source[at + name.len()..].trim_start().strip_prefix('(')?;
        let head = source[..at].rsplit([';', '}']).next()?;
        (head.contains("__global__") && !source[..at].ends_with(word)).then_some(list)
    })?;
    let list = &list[..list.find(')')?];
    let parameter = |text: &'a str| {
        let text = text.trim();
        let name = text.rsplit(|c| !word(c)).next().unwrap_or_default();
        Parameter { name, constant: text.split(|c| !word(c)).any(|w| w == "const") }
    };
    let mut angles = 0;
    let ends = |c: char| {
        angles += i32::from(c == '<') - i32::from(c == '>');
        c == ',' && angles == 0
    };
    Some(list.split(ends).filter(|p| !p.trim().is_empty()).map(parameter).collect())
}

type Bad = (usize, String);

fn parse(source: &str) -> Result<Contract, Bad> {
    let comment = source.lines().map_while(|l| l.strip_prefix("//")).enumerate().map(|(i, l)| (i + 1, l));
    let mut lines = comment.skip_while(|(_, l)| l.split_whitespace().next() != Some("entry"));
    let (line, header) = lines.next().ok_or_else(|| {
        let table = COLUMNS.join("  ");
        (1, format!("no contract: the comment that opens the file has no table `// {table}`"))
    })?;
    let columns = cells(header);
    if columns.len() < REQUIRED || columns != COLUMNS[..columns.len().min(COLUMNS.len())] {
        return Err((
            line,
            format!("the columns are {}, two spaces or more between them", COLUMNS.join(", ")),
        ));
    }
    let mut rows: Vec<(usize, Vec<String>)> = Vec::new();
    for (line, text) in lines {
        let first = text.trim_start().chars().next();
        match rows.last_mut() {
            _ if first.is_none_or(|c| c.is_ascii_uppercase()) => break,
            Some((_, row)) if text.starts_with("   ") => {
                if let Some(arguments) = row.get_mut(REQUIRED - 1) {
                    *arguments = format!("{arguments} {}", text.trim());
                }
            }
            _ => rows.push((line, cells(text).into_iter().map(String::from).collect())),
        }
    }
    if rows.is_empty() {
        return Err((line, "the table has no row".into()));
    }
    let rows =
        rows.into_iter().map(|(line, cells)| row(line, &cells, columns.len()).map_err(|why| (line, why)));
    let rows = rows.collect::<Result<Vec<Row>, Bad>>()?;
    for (i, r) in rows.iter().enumerate() {
        if rows[..i].iter().any(|s| s.entry == r.entry) {
            return Err((r.line, format!("{} stands twice", r.entry)));
        }
    }
    Ok(Contract { rows })
}

/// The cells of a row: two spaces part them, one space belongs to a cell.
fn cells(text: &str) -> Vec<&str> {
    text.split("  ").map(str::trim).filter(|c| !c.is_empty()).collect()
}

fn row(line: usize, cells: &[String], columns: usize) -> Result<Row, String> {
    if cells.len() != columns {
        let why = "cells are two spaces or more apart, an empty cell is -";
        return Err(format!("{} cells under {columns} columns; {why}", cells.len()));
    }
    let entry = &cells[0];
    if !is_name(entry) || entry.contains(|c: char| c.is_ascii_uppercase()) {
        return Err(format!("{entry} is no name of an entry: lower case, digits and underscores"));
    }
    let (shared, dynamic) = match cells[3].split_once('+') {
        Some((shared, dynamic)) => (shared.trim(), dynamic.trim()),
        None => (cells[3].as_str(), ""),
    };
    let words = |i: usize| cells.get(i).filter(|c| *c != "-").cloned().unwrap_or_default();
    Ok(Row {
        line,
        entry: entry.clone(),
        grid: cells[1].clone(),
        block: block(&cells[2])?,
        shared: shared.parse().map_err(|_| {
            format!(
                "shared is {}; it is a number of static bytes, `+ words` behind it for dynamic ones",
                cells[3]
            )
        })?,
        dynamic: dynamic.into(),
        arguments: arguments(&cells[4])?,
        bytes: words(5),
        flops: words(6),
    })
}

fn block(text: &str) -> Result<[u32; 3], String> {
    let bad = || format!("block is {text}; it is a number of threads, or 32x4, or 8x8x4");
    let sizes = text.split('x').map(|n| n.trim().parse().ok().filter(|n| (1..=1024).contains(n)));
    let sizes = sizes.collect::<Option<Vec<u32>>>().ok_or_else(bad)?;
    if sizes.len() > 3 || sizes.iter().product::<u32>() > 1024 {
        return Err(bad());
    }
    let size = |i: usize| sizes.get(i).copied().unwrap_or(1);
    Ok([size(0), size(1), size(2)])
}

/// `outputs | inputs | sizes | scalars`; a group may be empty, and empty groups at the end may be left out.
fn arguments(text: &str) -> Result<Vec<Argument>, String> {
    let roles = [Role::Output, Role::Input, Role::Size, Role::Scalar];
    let groups: Vec<&str> = text.split('|').map(str::trim).collect();
    if groups.len() > roles.len() {
        return Err(format!(
            "{} groups of arguments; there are outputs | inputs | sizes | scalars",
            groups.len()
        ));
    }
    let mut found: Vec<Argument> = Vec::new();
    for (role, group) in roles.into_iter().zip(groups) {
        for word in group.split_whitespace().filter(|w| *w != "-") {
            let argument = argument(role, word)?;
            if found.iter().any(|a| a.name == argument.name) {
                return Err(format!("argument {} stands twice", argument.name));
            }
            found.push(argument);
        }
    }
    Ok(found)
}

fn argument(role: Role, word: &str) -> Result<Argument, String> {
    let (name, suffix) = word.split_once(':').map_or((word, None), |(n, s)| (n, Some(s)));
    let refused =
        || format!("{word}: an operand may be NAME:map or NAME:ROWSxWORDS and a size NAME:u64, nothing else");
    let pass = match (role, suffix) {
        (Role::Output | Role::Input, None) => Pass::Address,
        (Role::Output | Role::Input, Some("map")) => Pass::Map,
        (Role::Output | Role::Input, Some(size)) => table(size).ok_or_else(refused)?,
        (Role::Size, None) => Pass::U32,
        (Role::Size, Some("u64")) => Pass::U64,
        (Role::Scalar, None) => Pass::F32,
        _ => return Err(refused()),
    };
    match is_name(name) {
        true => Ok(Argument { name: name.into(), role, pass }),
        false => Err(format!("{name} is no name of an argument")),
    }
}

/// `32x6`: a table of 32 rows of 6 words.
fn table(size: &str) -> Option<Pass> {
    let (rows, words) = size.split_once('x')?;
    let count = |n: &str| n.parse().ok().filter(|n| (1..=512).contains(n));
    Some(Pass::Table { rows: count(rows)?, words: count(words)? })
}

fn is_name(text: &str) -> bool {
    let inside = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.chars().all(inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "// RMSNorm.\n//   y = x\n// entry  grid  block  shared  arguments  bytes  flops\n";

    fn with(rows: &str) -> Result<Contract, Bad> {
        parse(&format!("{HEADER}{rows}\nextern"))
    }

    fn refused(rows: &str) -> String {
        let (line, why) = with(rows).unwrap_err();
        format!("{line}: {why}")
    }

    #[test]
    fn the_example_of_the_readme_is_read() {
        let c =
            with("// rmsnorm_fwd_bf16  N  256  32  y r | x w | C | eps  4NC+4N  4NC\n// Needs  C % 8 == 0.")
                .unwrap();
        let [row] = &c.rows[..] else { panic!("{c:?}") };
        assert_eq!((row.line, row.entry.as_str(), row.grid.as_str()), (4, "rmsnorm_fwd_bf16", "N"));
        assert_eq!((row.block, row.shared, row.dynamic.as_str()), ([256, 1, 1], 32, ""));
        let names: String = row.arguments.iter().map(|a| format!("{}{:?} ", a.name, a.pass)).collect();
        assert_eq!(names, "yAddress rAddress xAddress wAddress CU32 epsF32 ");
        assert_eq!((row.bytes.as_str(), row.flops.as_str()), ("4NC+4N", "4NC"));
    }

    #[test]
    fn groups_may_be_empty_and_lists_may_go_on() {
        let row =
            |arguments| row(1, &["f", "1", "32", "0", arguments].map(String::from), 5).unwrap().arguments;
        assert_eq!(row("y | - | - | e"), row("y | | | e"));
        assert_eq!(row("y | x | N |"), row("y | x | N"));
        assert_eq!(row("-"), []);
        let rows =
            "// f_a  N, H  32x4  16 + 3 stages  c:map | -\n//        | M N:u64  -  -\n// g  1  1  0  y  1  2";
        let refusal = refused(rows);
        assert!(refusal.starts_with("4: 5 cells"), "{refusal}");
        let rows = "// f_a  N, H  32x4  16 + 3 stages  c:map | -  -  2N\n//        | M N:u64\n// g  1  1  0  y  1  2\n//\n// h";
        let c = with(rows).unwrap();
        assert_eq!(c.rows.len(), 2);
        let passes: Vec<Pass> = c.rows[0].arguments.iter().map(|a| a.pass).collect();
        assert_eq!(passes, [Pass::Map, Pass::U32, Pass::U64]);
        assert_eq!(
            (c.rows[0].threads(), c.rows[0].shared, c.rows[0].dynamic.as_str()),
            (128, 16, "3 stages")
        );
        assert_eq!((c.rows[0].bytes.as_str(), c.rows[0].flops.as_str()), ("", "2N"));
    }

    #[test]
    fn what_breaks_the_grammar_is_refused_by_line() {
        assert!(parse("#include <x>").unwrap_err().1.starts_with("no contract"));
        assert_eq!(parse("// entry  block\n").unwrap_err().0, 1);
        assert_eq!(parse(HEADER).unwrap_err(), (3, "the table has no row".into()));
        let cases = [
            ("// Rms  N  256  0  y  1  1", "3: the table has no row"),
            ("// r-s  N  256  0  y  1  1", "4: r-s is no name of an entry"),
            ("// rMs  N  256  0  y  1  1", "4: rMs is no name of an entry"),
            ("// f  N  256  0  y", "4: 5 cells under 7 columns"),
            ("// f  N  2048  0  y  1  1", "4: block is 2048"),
            ("// f  N  32x64  0  y  1  1", "4: block is 32x64"),
            ("// f  N  B  0  y  1  1", "4: block is B"),
            ("// f  N  32  some  y  1  1", "4: shared is some"),
            ("// f  N  32  0  y | x | C | e | z  1  1", "4: 5 groups"),
            ("// f  N  32  0  y | x:u32  1  1", "4: x:u32: an operand"),
            ("// f  N  32  0  y | x | C | e:f64  1  1", "4: e:f64: an operand"),
            ("// f  N  32  0  y | x:0x6 | C | e  1  1", "4: x:0x6: an operand"),
            ("// f  N  32  0  y | y  1  1", "4: argument y stands twice"),
            ("// f  N  32  0  2y  1  1", "4: 2y is no name"),
            ("// f  N  32  0  y  1  1\n// f  N  32  0  y  1  1", "5: f stands twice"),
        ];
        for (rows, want) in cases {
            let found = refused(rows);
            assert!(found.starts_with(want), "{rows}: {found}");
        }
    }

    const SOURCE: &str = "// entry  grid  block  shared  arguments\n// f  N  64  16  y | x | C n:u64 | eps\n\
        \n// f(float y) is documented here\nextern \"C\" __global__ void __launch_bounds__(64)\n\
        f(float* __restrict__ y, const float* __restrict__ x, unsigned C, u64 n, float eps) { }\n";

    const PTX: &str = ".entry f(.param .u64 a, .param .u64 b, .param .u32 c, .param .u64 d, .param .f32 e)\n\
        .maxntid 64, 1, 1\n{\n.shared .b32 s[4];\n}\n";

    fn hold(source: &str, ptx: &str) -> Result<(), String> {
        let path = Path::new("f.cu");
        let contract = Contract::read(path, source).map_err(|e| e.to_string())?;
        let module = ptx::Module::new("sm_80", "f", ptx);
        contract.hold(path, source, Arch::Sm80, &module).map_err(|e| e.to_string())
    }

    #[test]
    fn a_contract_that_is_kept_passes() {
        assert_eq!(hold(SOURCE, PTX), Ok(()));
    }

    #[test]
    fn tables_are_held_by_their_size() {
        let source =
            SOURCE.replace("y | x |", "y:3x2 | x |").replace("float* __restrict__ y", "const Table<A, B> y");
        let ptx = |bytes: &str| PTX.replace(".param .u64 a", &format!(".param .align 8 .b8 a[{bytes}]"));
        assert_eq!(hold(&source, &ptx("48")), Ok(()));
        let why = hold(&source, &ptx("40")).unwrap_err();
        assert_eq!(why, "f.cu:2: f: y is a table of 3 rows of 2 words here and 40 bytes, Bytes, in the PTX");
    }

    #[test]
    fn every_part_of_a_contract_is_held() {
        let cases = [
            (
                "y | x | C n:u64 | eps",
                "x | y | C n:u64 | eps",
                "f.cu:2: f takes (y x C n eps), not (x y C n eps)",
            ),
            ("| C n:u64 |", "| n:u64 C |", "f.cu:2: f: n is a u64 here and 4 bytes, U32, in the PTX"),
            ("| C n:u64 |", "| C |", "f.cu:2: f takes (y x C n eps), not (y x C eps)"),
            ("| eps", "| e", "f.cu:2: f takes (y x C n eps), not (y x C n e)"),
            ("| C n:u64 |", "| C n |", "f.cu:2: f: n is a u32 here and 8 bytes, U64, in the PTX"),
            ("| eps", "eps", "f.cu:2: f: eps is a u32 here and 4 bytes, F32, in the PTX"),
            ("y | x |", "y x | - |", "f.cu:2: f: x is an output, yet const"),
            ("const float*", "float*", "f.cu:2: f: x is an input, yet not const"),
            ("f  N  64", "f  N  32", "f.cu:2: f has 32 threads here and 64 in the PTX"),
            ("64  16", "64  0", "f.cu:2: f has 0 bytes of static shared memory here and 16 in the PTX"),
            ("// f  N", "// g  N", "f.cu:2: no entry g"),
            ("__global__", "__device__", "f.cu:2: f( is not written out"),
        ];
        for (from, to, want) in cases {
            assert!(SOURCE.contains(from));
            let found = hold(&SOURCE.replacen(from, to, 1), PTX);
            assert!(found.clone().is_err_and(|e| e.starts_with(want)), "{from} -> {to}: {found:?}");
        }
    }

    #[test]
    fn the_ptx_must_agree() {
        let cases = [
            (".param .u64 b, ", "", "f.cu:2: f has 5 arguments here and 4 in the PTX"),
            (
                ".param .u64 b",
                ".param .u32 b",
                "f.cu:2: f: x is an address here and 4 bytes, U32, in the PTX",
            ),
            (".maxntid 64, 1, 1", "", "f.cu:2: f has no __launch_bounds__"),
            (".entry f", ".entry f2() { } .entry f", "f.cu: entry f2 is not in the contract"),
            ("s[4]", "s[5]", "f.cu:2: f has 16 bytes of static"),
        ];
        for (from, to, want) in cases {
            let found = hold(SOURCE, &PTX.replacen(from, to, 1)).unwrap_err();
            assert!(found.starts_with(want), "{from} -> {to}: {found}");
        }
    }
}
