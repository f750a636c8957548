//! Tokens of PTX.

use super::{Parsed, at};

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Token<'a> {
    /// A name, a directive, an opcode with its modifiers or a special register.
    Word(&'a str),
    Number(&'a str),
    Text(&'a str),
    Mark(char),
}

/// The tokens of `text` with their lines.
pub(super) fn lex(text: &str) -> Parsed<Vec<(Token<'_>, u32)>> {
    let bytes = text.as_bytes();
    let (mut i, mut line) = (0, 1);
    let mut tokens = Vec::new();
    while i < bytes.len() {
        let c = bytes[i];
        if c == b'\n' {
            line += 1;
            i += 1;
        } else if c.is_ascii_whitespace() {
            i += 1;
        } else if bytes[i..].starts_with(b"//") {
            i += bytes[i..].iter().take_while(|c| **c != b'\n').count();
        } else if bytes[i..].starts_with(b"/*") {
            let Some(len) = text[i..].find("*/") else { return at(line, "comment without end") };
            line += count_lines(&bytes[i..i + len]);
            i += len + 2;
        } else if c == b'"' {
            let Some(len) = text[i + 1..].find('"') else { return at(line, "string without end") };
            tokens.push((Token::Text(&text[i + 1..i + 1 + len]), line));
            line += count_lines(&bytes[i + 1..i + 1 + len]);
            i += len + 2;
        } else if c.is_ascii_alphabetic() || b"_$%.".contains(&c) {
            let len = word_length(&bytes[i..]);
            tokens.push((Token::Word(&text[i..i + len]), line));
            i += len;
        } else if c.is_ascii_digit() {
            let len = bytes[i..].iter().take_while(|c| c.is_ascii_alphanumeric()).count();
            tokens.push((Token::Number(&text[i..i + len]), line));
            i += len;
        } else if c.is_ascii() {
            tokens.push((Token::Mark(c as char), line));
            i += 1;
        } else {
            return at(line, "only ASCII is allowed outside comments");
        }
    }
    Ok(tokens)
}

fn count_lines(bytes: &[u8]) -> u32 {
    bytes.iter().filter(|c| **c == b'\n').count() as u32
}

/// Length of a word: letters, digits, `_ $ .` and `::`, which joins the parts of some modifiers.
fn word_length(bytes: &[u8]) -> usize {
    let mut i = 1;
    while i < bytes.len() {
        if bytes[i].is_ascii_alphanumeric() || b"_$.".contains(&bytes[i]) {
            i += 1;
        } else if bytes[i..].starts_with(b"::") {
            i += 2;
        } else {
            break;
        }
    }
    i
}
