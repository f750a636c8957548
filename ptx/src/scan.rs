//! A scanner for the declarations of a PTX text: entries, their parameters, their shared memory. Instructions
//! are passed over; only the names in them are noted.
use crate::{Entry, Kind, Param};
use std::{
    collections::{HashMap, HashSet},
    fmt,
};

/// A text whose declarations cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong there.
    pub why: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.why)
    }
}

impl std::error::Error for Error {}

type Result<T> = std::result::Result<T, Error>;

/// Every entry of a text, in order.
pub(crate) fn entries(text: &str) -> Result<Vec<Entry>> {
    let mut scan = Scan { tokens: tokens(text)?, at: 0 };
    let (mut entries, mut functions, mut shared) = (Vec::new(), HashMap::new(), HashMap::new());
    while let Some(token) = scan.next() {
        match token.text {
            ".entry" => {
                let entry = scan.entry()?;
                if let Some(body) = scan.body()? {
                    entries.push((entry, body));
                }
            }
            ".func" => {
                let name = scan.function()?;
                if let Some(body) = scan.body()? {
                    functions.insert(name, body);
                }
            }
            ".shared" => shared.extend(scan.variables()?),
            _ => {}
        }
    }
    let total = |body: &Body| {
        let mut used = Vec::new();
        used_by(body, &functions, &shared, &mut HashSet::new(), &mut used);
        u32::try_from(extent(&used)).map_err(|_| Error { line: 1, why: "shared memory beyond 4 GiB".into() })
    };
    entries.into_iter().map(|(entry, body)| Ok(Entry { static_shared: total(&body)?, ..entry })).collect()
}

/// Collects the shared variables of a body and of what it names.
fn used_by<'a>(
    body: &Body<'a>,
    functions: &HashMap<&'a str, Body<'a>>,
    shared: &HashMap<&'a str, Variable>,
    seen: &mut HashSet<&'a str>,
    used: &mut Vec<Variable>,
) {
    used.extend(body.shared.iter().map(|(_, v)| v));
    for name in &body.names {
        if !seen.insert(name) {
            continue;
        }
        used.extend(shared.get(name));
        if let Some(function) = functions.get(name) {
            used_by(function, functions, shared, seen, used);
        }
    }
}

/// Bytes from the first variable to where the memory begins that a launch asks for: a variable without a size
/// (`extern`) stands for that memory, and its alignment moves the beginning.
fn extent(variables: &[Variable]) -> u64 {
    let (fixed, dynamic): (Vec<&Variable>, Vec<&Variable>) = variables.iter().partition(|v| v.size > 0);
    let end = fixed.iter().fold(0, |at, v| align_up(at, v.align) + v.size);
    dynamic.iter().fold(end, |at, v| align_up(at, v.align))
}

fn align_up(at: u64, align: u64) -> u64 {
    at.div_ceil(align) * align
}

#[derive(Clone, Copy, Debug)]
struct Token<'a> {
    line: usize,
    text: &'a str,
}

/// Words (with their dots), and single other characters; comments and strings are left out.
fn tokens(text: &str) -> Result<Vec<Token<'_>>> {
    let word = |c: char| c.is_ascii_alphanumeric() || "_$.%:".contains(c);
    let (mut found, mut rest, mut line) = (Vec::new(), text, 1);
    while let Some(c) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").ok_or(Error { line, why: "a comment without end".into() })? + 2
        } else if c == '"' {
            rest[1..].find('"').ok_or(Error { line, why: "a string without end".into() })? + 2
        } else if word(c) {
            let length = rest.find(|c| !word(c)).unwrap_or(rest.len());
            found.push(Token { line, text: &rest[..length] });
            length
        } else {
            if !c.is_whitespace() {
                found.push(Token { line, text: &rest[..c.len_utf8()] });
            }
            c.len_utf8()
        };
        line += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    Ok(found)
}

/// A variable in shared memory.
#[derive(Clone, Copy, Debug)]
struct Variable {
    align: u64,
    size: u64,
}

/// What stands between the braces of an entry or a function.
#[derive(Debug, Default)]
struct Body<'a> {
    shared: Vec<(&'a str, Variable)>,
    /// Every other word, each once, in order.
    names: Vec<&'a str>,
}

struct Scan<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
}

impl<'a> Scan<'a> {
    fn next(&mut self) -> Option<Token<'a>> {
        let token = self.tokens.get(self.at).copied();
        self.at += token.is_some() as usize;
        token
    }

    fn peek(&self) -> &'a str {
        self.tokens.get(self.at).map_or("", |t| t.text)
    }

    /// An error at the token last taken.
    fn error<T>(&self, why: impl fmt::Display) -> Result<T> {
        let token = self.tokens.get(self.at.saturating_sub(1));
        Err(Error { line: token.map_or(1, |t| t.line), why: why.to_string() })
    }

    fn take(&mut self) -> Result<&'a str> {
        match self.next() {
            Some(token) => Ok(token.text),
            None => self.error("the text ends here"),
        }
    }

    fn skip(&mut self, text: &str) -> bool {
        let there = self.peek() == text;
        self.at += there as usize;
        there
    }

    fn expect(&mut self, text: &str) -> Result<()> {
        match self.take()? {
            found if found == text => Ok(()),
            found => self.error(format!("{text} expected, {found} found")),
        }
    }

    fn number(&mut self) -> Result<u64> {
        let word = self.take()?;
        let word = word.trim_end_matches('U');
        let number = match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => word.parse(),
        };
        number
            .ok()
            .filter(|n| *n <= u32::MAX.into())
            .map_or_else(|| self.error(format!("{word} is no size")), Ok)
    }

    fn align(&mut self) -> Result<u64> {
        match self.number()? {
            n if n.is_power_of_two() => Ok(n),
            n => self.error(format!("{n} is no alignment")),
        }
    }

    /// `NAME ( parameters ) directives`, behind `.entry`, up to the brace of its body.
    fn entry(&mut self) -> Result<Entry> {
        let line = self.tokens.get(self.at).map_or(1, |t| t.line);
        let name = self.take()?.to_string();
        let params = if self.skip("(") { self.params()? } else { Vec::new() };
        let (max_threads, block, cluster, static_shared) = (None, None, None, 0);
        let mut entry = Entry { name, line, params, max_threads, block, cluster, static_shared };
        while !matches!(self.peek(), "{" | ";" | "") {
            match self.take()? {
                ".maxntid" => entry.max_threads = Some(self.product()?),
                ".reqntid" => {
                    entry.block = Some(self.shape()?);
                    entry.max_threads = entry.block.map(|[x, y, z]| x.saturating_mul(y).saturating_mul(z));
                }
                ".reqnctapercluster" => entry.cluster = Some(self.shape()?),
                ".pragma" => self.expect(";")?,
                _ => {}
            }
        }
        Ok(entry)
    }

    fn product(&mut self) -> Result<u32> {
        let [x, y, z] = self.shape()?;
        match x.checked_mul(y).and_then(|n| n.checked_mul(z)) {
            Some(n) => Ok(n),
            None => self.error("too many threads"),
        }
    }

    /// One to three sizes; those not given are 1.
    fn shape(&mut self) -> Result<[u32; 3]> {
        let mut shape = [1; 3];
        for (i, size) in shape.iter_mut().enumerate() {
            if i > 0 && !self.skip(",") {
                break;
            }
            *size = match u32::try_from(self.number()?) {
                Ok(n) => n,
                Err(_) => return self.error("too large"),
            };
        }
        Ok(shape)
    }

    /// Parameters up to the closing parenthesis, each at the next offset that its alignment allows.
    fn params(&mut self) -> Result<Vec<Param>> {
        let (mut params, mut end) = (Vec::new(), 0);
        if self.skip(")") {
            return Ok(params);
        }
        loop {
            self.expect(".param")?;
            let param = self.param(end)?;
            end = u64::from(param.offset) + u64::from(param.size);
            params.push(param);
            match self.take()? {
                "," => {}
                ")" => return Ok(params),
                other => return self.error(format!("a parameter list goes on with {other}")),
            }
        }
    }

    fn param(&mut self, end: u64) -> Result<Param> {
        let mut declared = None;
        if self.skip(".align") {
            declared = Some(self.align()?);
        }
        let (kind, width) = self.kind()?;
        if self.skip(".ptr") {
            self.pointee()?;
        }
        self.take()?; // its name
        let array = self.peek() == "[";
        let size = width * self.extents()?;
        let align = declared.unwrap_or(width);
        let kind = if array { Kind::Bytes } else { kind };
        let offset = align_up(end, align);
        match (u32::try_from(offset), u32::try_from(size)) {
            (Ok(offset), Ok(size)) if offset.checked_add(size).is_some() => {
                Ok(Param { offset, size, align: align as u32, kind })
            }
            _ => self.error("parameters larger than 4 GiB"),
        }
    }

    /// State space and alignment of what a pointer points to: of no interest here.
    fn pointee(&mut self) -> Result<()> {
        while self.peek().starts_with('.') {
            if self.take()? == ".align" {
                self.align()?;
            }
        }
        Ok(())
    }

    /// A type, and its width in bytes.
    fn kind(&mut self) -> Result<(Kind, u64)> {
        Ok(match self.take()? {
            ".u8" | ".s8" | ".b8" => (Kind::U8, 1),
            ".u16" | ".s16" | ".b16" | ".f16" => (Kind::U16, 2),
            ".u32" | ".s32" | ".b32" | ".f16x2" => (Kind::U32, 4),
            ".u64" | ".s64" | ".b64" => (Kind::U64, 8),
            ".f32" => (Kind::F32, 4),
            ".f64" => (Kind::F64, 8),
            other => return self.error(format!("{other} is no type of a parameter or variable")),
        })
    }

    /// `[n][m]`: the product, 1 without brackets, 0 for `[]`.
    fn extents(&mut self) -> Result<u64> {
        let mut product: u64 = 1;
        while self.skip("[") {
            let extent = if self.peek() == "]" { 0 } else { self.number()? };
            self.expect("]")?;
            product = match product.checked_mul(extent) {
                Some(p) if p <= u32::MAX.into() => p,
                _ => return self.error("an array larger than 4 GiB"),
            };
        }
        Ok(product)
    }

    /// Variables of one declaration, behind `.shared`.
    fn variables(&mut self) -> Result<Vec<(&'a str, Variable)>> {
        let mut declared = None;
        if self.skip(".align") {
            declared = Some(self.align()?);
        }
        let (_, width) = self.kind()?;
        let mut found = Vec::new();
        loop {
            let name = self.take()?;
            let size = width * self.extents()?;
            found.push((name, Variable { align: declared.unwrap_or(width), size }));
            match self.take()? {
                "," => {}
                ";" => return Ok(found),
                other => return self.error(format!("a declaration goes on with {other}")),
            }
        }
    }

    /// `( results ) NAME ( parameters )`, behind `.func`; the name.
    fn function(&mut self) -> Result<&'a str> {
        if self.skip("(") {
            while self.take()? != ")" {}
        }
        let name = self.take()?;
        while !matches!(self.peek(), "{" | ";" | "") {
            self.take()?;
        }
        Ok(name)
    }

    /// A body in braces; none behind a declaration that ends in a semicolon.
    fn body(&mut self) -> Result<Option<Body<'a>>> {
        if self.skip(";") {
            return Ok(None);
        }
        self.expect("{")?;
        let (mut body, mut depth, mut seen) = (Body::default(), 1, HashSet::new());
        while depth > 0 {
            match self.take()? {
                "{" => depth += 1,
                "}" => depth -= 1,
                ".shared" => body.shared.extend(self.variables()?),
                name => {
                    if seen.insert(name) {
                        body.names.push(name);
                    }
                }
            }
        }
        Ok(Some(body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Entry {
        let mut found = entries(text).unwrap();
        assert_eq!(found.len(), 1);
        found.remove(0)
    }

    fn refused(text: &str) -> (usize, String) {
        let e = entries(text).unwrap_err();
        (e.line, e.why)
    }

    #[test]
    fn parameters_stand_where_the_driver_wants_them() {
        let e = one(
            ".version 7.0\n.visible .entry f(\n.param .u64 a,\n.param .u32 b,\n.param .u64 c,\n.param .f32 d,\n\
             .param .u8 e,\n.param .align 64 .b8 m[128],\n.param .u32 z\n)\n.maxntid 256, 1, 1\n{\nret;\n}\n",
        );
        let places: Vec<_> = e.params.iter().map(|p| (p.offset, p.size, p.align, p.kind)).collect();
        let want = [
            (0, 8, 8, Kind::U64),
            (8, 4, 4, Kind::U32),
            (16, 8, 8, Kind::U64),
            (24, 4, 4, Kind::F32),
            (28, 1, 1, Kind::U8),
            (64, 128, 64, Kind::Bytes),
            (192, 4, 4, Kind::U32),
        ];
        assert_eq!(places, want);
        assert_eq!((e.param_bytes(), e.max_threads, e.block, e.line), (196, Some(256), None, 2));
    }

    #[test]
    fn pointers_may_say_what_they_point_to() {
        let e = one(".entry f(.param .u64 .ptr .global .align 16 a, .param .u64 .ptr .align 1 b) { ret; }");
        assert_eq!(e.params.iter().map(|p| p.align).collect::<Vec<_>>(), [8, 8]);
    }

    #[test]
    fn the_shape_of_blocks_and_clusters() {
        let e = one(
            ".entry f() .reqntid 32, 4 .minnctapersm 2 .reqnctapercluster 2, 1, 1 .pragma \"nounroll {\"; { }",
        );
        assert_eq!((e.max_threads, e.block, e.cluster), (Some(128), Some([32, 4, 1]), Some([2, 1, 1])));
        assert_eq!(one(".entry f .maxntid 64 { }").max_threads, Some(64));
        assert_eq!(one(".entry f { }").max_threads, None);
    }

    #[test]
    fn shared_memory_counts_what_the_entry_uses() {
        let text = ".extern .shared .align 128 .b8 dynamic[];\n.shared .align 4 .f32 both[3];\n.shared .align 16 .b8 other[64];
            .func (.param .b32 r) callee(.param .b32 x) { st.shared.f32 [deep], %f1; bra.uni $L; }
            .shared .b64 deep;\n.shared .u32 unused[9];
            .entry f() { .shared .align 1 .b8 own[5]; ld.shared.f32 %f1, [both+4]; mov.u64 %rd1, dynamic; call callee, (x); }
            .entry g() { { .shared .align 2 .b16 own, more[2][3]; } mov.b64 %rd1, other; }";
        let found = entries(text).unwrap();
        let bytes: Vec<_> = found.iter().map(|e| (e.name.as_str(), e.static_shared)).collect();
        // f: own 0..5, both 8..20, deep 24..32, dynamic from 128.  g: own 0..2, more 2..14, other 16..80.
        assert_eq!(bytes, [("f", 128), ("g", 80)]);
    }

    #[test]
    fn comments_strings_and_declarations_are_no_entries() {
        let text = "// .entry a() {\n/* .entry b() {\n*/ .extern .entry c(.param .u32 x);\n.file 1 \".entry d\"\n.entry e() { }";
        let e = one(text);
        assert_eq!((e.name.as_str(), e.line), ("e", 5));
    }

    #[test]
    fn broken_texts_are_refused_by_line() {
        assert_eq!(
            refused(".entry f(\n.param .u99 x)"),
            (2, ".u99 is no type of a parameter or variable".into())
        );
        assert_eq!(
            refused(".entry f(.param .u32 x .param"),
            (1, "a parameter list goes on with .param".into())
        );
        assert_eq!(refused("\n.entry f() {"), (2, "the text ends here".into()));
        assert_eq!(refused("\n\n/* "), (3, "a comment without end".into()));
        assert_eq!(refused(".entry f(.param .align 3 .b8 x[4])"), (1, "3 is no alignment".into()));
        assert_eq!(refused(".entry f(.param .b8 x[99999999999])"), (1, "99999999999 is no size".into()));
        assert_eq!(refused(".entry f(.param .b8 x[70000][70000])"), (1, "an array larger than 4 GiB".into()));
        assert_eq!(refused(".entry f() .maxntid 65536, 65536, 2 { }"), (1, "too many threads".into()));
    }

    #[test]
    fn no_cut_of_a_text_panics() {
        let text =
            ".entry f(.param .align 8 .b8 p[16]) .maxntid 8, 1, 1 { .shared .b32 s[2]; /* \u{e9} */ } \"x\"";
        for end in (0..text.len()).filter(|i| text.is_char_boundary(*i)) {
            let _ = entries(&text[..end]);
        }
    }
}
