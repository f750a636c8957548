//! PTX text to a syntax tree: [`lex`] makes tokens, [`parse`] declarations and statements.
//!
//! Register names are resolved here, since their scope is a matter of syntax; what an instruction means is
//! left to [`crate::decode`].

pub(crate) mod ast;
mod lex;
mod parse;

pub(crate) use parse::parse;

/// An error at a line; the caller adds the file.
#[derive(Debug)]
pub(crate) struct At {
    pub(crate) line: u32,
    pub(crate) why: String,
}

/// Shorthand for results of the front end.
pub(crate) type Parsed<T> = Result<T, At>;

/// An error at `line`.
pub(crate) fn at<T>(line: u32, why: impl Into<String>) -> Parsed<T> {
    Err(At { line, why: why.into() })
}
