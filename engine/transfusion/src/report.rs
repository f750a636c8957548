//! `report.html`: one page about a run that needs nothing but itself.
//!
//! Style sheet, curves (SVG) and pictures (PNG, base64) are in the page, so that it can be mailed,
//! archived and opened without a network. It follows the reader's light or dark scheme, fits a phone,
//! and runs no script.
use crate::{error::Result, run_dir::write_atomic};
use std::{fmt::Write, path::Path};

mod chart;

pub use chart::{Kind, Scale, Series};

const STYLE: &str = include_str!("report/style.css");

/// A page that grows from top to bottom.
#[derive(Clone, Debug)]
pub struct Report {
    title: String,
    body: String,
}

/// A picture and what is said beneath it.
#[derive(Clone, Debug)]
pub struct Picture {
    /// The PNG file.
    pub png: Vec<u8>,
    /// Captions: one for a single picture; for a grid one for each cell, row by row.
    pub captions: Vec<String>,
}

impl Report {
    /// An empty page.
    pub fn new(title: &str) -> Report {
        Report { title: title.to_owned(), body: String::new() }
    }

    /// A heading; what follows belongs to it.
    pub fn heading(&mut self, text: &str) -> &mut Report {
        self.add(format_args!("<h2>{}</h2>\n", escape(text)))
    }

    /// A paragraph.
    pub fn text(&mut self, text: &str) -> &mut Report {
        self.add(format_args!("<p>{}</p>\n", escape(text)))
    }

    /// The figures to read first, each a label and a value, as large tiles.
    pub fn figures(&mut self, figures: &[(String, String)]) -> &mut Report {
        self.pairs("figures", figures)
    }

    /// Labels and values in small print: the configuration of a run.
    pub fn summary(&mut self, settings: &[(String, String)]) -> &mut Report {
        self.pairs("summary", settings)
    }

    /// Curves over the optimiser step. Points that are not finite leave a gap; so do points that are
    /// not positive on a logarithmic scale.
    pub fn curve(&mut self, title: &str, y: &str, scale: Scale, series: &[Series]) -> &mut Report {
        let svg = chart::curve(title, y, scale, series);
        self.add(format_args!("{svg}"))
    }

    /// Bars side by side: `values[s][g]` is the height for series `s` in group `g`, at least 0.
    pub fn bars(
        &mut self,
        title: &str,
        y: &str,
        groups: &[String],
        series: &[(String, Vec<f64>)],
    ) -> &mut Report {
        let svg = chart::bars(title, y, groups, series);
        self.add(format_args!("{svg}"))
    }

    /// A table; columns that hold numbers only are aligned to the right.
    pub fn table(&mut self, title: &str, columns: &[&str], rows: &[Vec<String>]) -> &mut Report {
        let numeric = |c: usize| rows.iter().all(|row| row.get(c).is_none_or(|cell| is_number(cell)));
        let class = |c| if numeric(c) { " class=\"n\"" } else { "" };
        let cells = |tag: &str, cells: &mut dyn Iterator<Item = &str>| {
            let cell = |(c, text)| format!("<{tag}{}>{}</{tag}>", class(c), escape(text));
            format!("<tr>{}</tr>\n", cells.enumerate().map(cell).collect::<String>())
        };
        let head = cells("th", &mut columns.iter().copied());
        let rows: String = rows.iter().map(|row| cells("td", &mut row.iter().map(String::as_str))).collect();
        let title = escape(title);
        self.add(format_args!(
            "<section><h3>{title}</h3><div class=\"scroll\"><table>\n<thead>{head}</thead>\n<tbody>{rows}</tbody></table></div></section>\n"
        ))
    }

    /// Pictures side by side, each with its captions beneath. Small ones are enlarged, pixel by pixel.
    pub fn pictures(&mut self, title: &str, pictures: &[Picture]) -> &mut Report {
        let figures: String = pictures.iter().map(picture).collect();
        self.add(format_args!(
            "<section class=\"wide\"><h3>{}</h3><div class=\"pictures\">\n{figures}</div></section>\n",
            escape(title)
        ))
    }

    /// The page.
    pub fn html(&self) -> String {
        let title = escape(&self.title);
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n\
             <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{}</main>\n\
             <footer>transfusion {}</footer>\n</body>\n</html>\n",
            self.body,
            env!("CARGO_PKG_VERSION")
        )
    }

    /// Writes the page, replacing an older one as a whole.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_atomic(path, self.html().as_bytes())
    }

    fn pairs(&mut self, class: &str, pairs: &[(String, String)]) -> &mut Report {
        let pair = |(label, value): &(String, String)| {
            format!("<div><dt>{}</dt><dd>{}</dd></div>\n", escape(label), escape(value))
        };
        let pairs: String = pairs.iter().map(pair).collect();
        self.add(format_args!("<dl class=\"{class}\">\n{pairs}</dl>\n"))
    }

    fn add(&mut self, html: std::fmt::Arguments<'_>) -> &mut Report {
        let _ = self.body.write_fmt(html);
        self
    }
}

/// Whether a cell reads as a number, with or without a unit.
fn is_number(cell: &str) -> bool {
    let digits = cell.trim().trim_start_matches(['-', '+', '\u{2212}']);
    digits.is_empty() || digits == "\u{2013}" || digits.starts_with(|c: char| c.is_ascii_digit())
}

fn picture(picture: &Picture) -> String {
    let (width, height) = png_size(&picture.png).unwrap_or((128, 128));
    let (room, caption) = match picture.captions.as_slice() {
        [] => (128, String::new()),
        [one] => (128, escape(one)),
        cells => {
            let items: String = cells.iter().map(|c| format!("<li>{}</li>", escape(c))).collect();
            (640, format!("<ol>{items}</ol>"))
        }
    };
    // Whole multiples keep the pixels of small pictures square.
    let zoom = (room / width.max(1)).max(1);
    let alt = escape(&picture.captions.join("; "));
    let (width, height) = (width.saturating_mul(zoom), height.saturating_mul(zoom));
    let pixels = if zoom > 1 { " class=\"pixels\"" } else { "" };
    let data = base64(&picture.png);
    let extent = if room > 128 { "100%".to_owned() } else { format!("{width}px") };
    format!(
        "<figure style=\"width:{extent}\"><img{pixels} width=\"{width}\" height=\"{height}\" alt=\"{alt}\" \
         src=\"data:image/png;base64,{data}\"><figcaption>{caption}</figcaption></figure>\n"
    )
}

/// Width and height from the header of a PNG file.
fn png_size(png: &[u8]) -> Option<(u32, u32)> {
    let word = |at: usize| png.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes);
    png.starts_with(b"\x89PNG").then_some(())?;
    Some((word(16)?, word(20)?))
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = (0..3).fold(0, |word, i| word << 8 | u32::from(three.get(i).copied().unwrap_or(0)));
        for i in 0..4 {
            let digit = (word >> (18 - 6 * i)) as usize & 63;
            text.push(if i <= three.len() { char::from(ALPHABET[digit]) } else { '=' });
        }
    }
    text
}

/// Text as it may stand in HTML, between tags and in quoted attributes.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c if c.is_control() && c != '\n' => safe.push('\u{FFFD}'),
            c => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests;
