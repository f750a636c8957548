//! What a person sees: results on stdout, all else on stderr; and Ctrl-C.
use crate::failure::{Failure, Outcome};
use std::{
    fmt::Display,
    io::{ErrorKind, IsTerminal, Write, stderr, stdout},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// Prints a result.
pub(crate) fn print(text: impl Display) -> Outcome {
    let mut out = stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|e| match e.kind() {
        ErrorKind::BrokenPipe => Failure::Unread,
        _ => Failure::error(format!("standard output: {e}")),
    })
}

/// Prints a remark; where nobody can read it, nothing is lost.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(stderr(), "{text}");
}

/// The text as stdout may show it: on a terminal without what would command the terminal.
pub(crate) fn harmless(text: &str) -> String {
    if !stdout().is_terminal() {
        return text.into();
    }
    let shown = |c: char| if c.is_control() && c != '\n' && c != '\t' { '\u{FFFD}' } else { c };
    text.chars().map(shown).collect()
}

/// How a word is set off.
#[derive(Clone, Copy)]
pub(crate) enum Style {
    /// Bold and red.
    Red,
    /// Bold.
    Bold,
}

/// The word as stderr should show it: plain outside of terminals and where NO_COLOR is set.
pub(crate) fn styled(style: Style, word: &str) -> String {
    let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if !wanted || !stderr().is_terminal() {
        return word.into();
    }
    let code = match style {
        Style::Red => "1;31",
        Style::Bold => "1",
    };
    format!("\x1b[{code}m{word}\x1b[0m")
}

/// A flag that the first Ctrl-C sets, with `remark`; the second one ends the program.
pub(crate) fn interruption(remark: &'static str) -> Outcome<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    let handler = move || {
        if set.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        note(format!("\n{remark}; press Ctrl-C again to abort"));
    };
    ctrlc::set_handler(handler).map_err(|e| Failure::error(format!("Ctrl-C cannot be handled: {e}")))?;
    Ok(flag)
}

/// A number of bytes in a unit that suits it.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (0..4).take_while(|i| n >> (10 * (i + 1)) > 0).count();
    match unit {
        0 => format!("{n} B"),
        _ => format!("{:.2} {}", n as f64 / (1u64 << (10 * unit)) as f64, UNITS[unit]),
    }
}

/// A count with a prefix that suits it: 6.74 G.
pub(crate) fn count(n: f64) -> String {
    const PREFIXES: [&str; 7] = ["", " k", " M", " G", " T", " P", " E"];
    let power = (0..6).take_while(|i| n >= 1000f64.powi(i + 1)).count();
    let digits = if power == 0 { 0 } else { 2 };
    format!("{:.digits$}{}", n / 1000f64.powi(power as i32), PREFIXES[power])
}

/// Seconds as 1:02:03.
pub(crate) fn duration(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match (s / 3600, s / 60 % 60, s % 60) {
        (0, minutes, s) => format!("{minutes}:{s:02}"),
        (hours, minutes, s) => format!("{hours}:{minutes:02}:{s:02}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [0, 1023, 1024, 3 << 29, 1 << 50].map(bytes),
            ["0 B", "1023 B", "1.00 KiB", "1.50 GiB", "1024.00 TiB"]
        );
        assert_eq!([0.0, 999.0, 1500.0, 6.74e9].map(count), ["0", "999", "1.50 k", "6.74 G"]);
        assert_eq!([0.4, 59.6, 3723.0].map(duration), ["0:00", "1:00", "1:02:03"]);
    }
}
