//! Long texts, seen through windows.
use super::{
    order::Holdout,
    source::{Document, Part, Source},
};
use crate::error::{Error, Result};
use std::{ops::Range, sync::Arc};
use transfusion_core::random::{Purpose, Stream};

/// One or more texts in memory. No window reaches from one into another.
#[derive(Clone, Debug)]
pub struct Text {
    name: String,
    bytes: Arc<[u8]>,
    spans: Vec<Range<usize>>,
}

/// Which windows of a text are its documents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Windows {
    /// One at a random place for each document number, without end: for training.
    Random {
        /// Seed of the places.
        seed: u64,
    },
    /// One after the other: for validation. A window begins with the last byte of the one before it,
    /// so that every byte but the first of a text is predicted exactly once.
    Consecutive,
}

impl Text {
    /// The texts of `name`, each a list of bytes.
    pub fn new(name: impl Into<String>, texts: &[Vec<u8>]) -> Text {
        let mut end = 0;
        let span = |text: &Vec<u8>| {
            end += text.len();
            end - text.len()..end
        };
        let spans = texts.iter().map(span).collect();
        Text { name: name.into(), bytes: texts.concat().into(), spans }
    }

    /// Bytes of all texts.
    pub fn len(&self) -> u64 {
        self.spans.iter().map(|span| span.len() as u64).sum()
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Cuts off the end that `holdout` keeps for validation.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Data`] where the holdout has no meaning or leaves a side empty.
    pub fn split(self, holdout: Holdout) -> Result<(Text, Option<Text>)> {
        let kept = holdout.count(self.len(), "bytes of text")?;
        if kept == 0 {
            return Ok((self, None));
        }
        let cut = self.bytes.len() - kept as usize;
        let clip = |to: Range<usize>| {
            let spans =
                self.spans.iter().map(|s| s.start.clamp(to.start, to.end)..s.end.clamp(to.start, to.end));
            Text { spans: spans.filter(|s| !s.is_empty()).collect(), ..self.clone() }
        };
        Ok((clip(0..cut), Some(clip(cut..self.bytes.len()))))
    }
}

/// The windows of a text as documents of `window` bytes; a text shorter than that is one document.
pub struct TextWindows {
    text: Text,
    window: usize,
    windows: Windows,
    /// For every text how many windows there are in it and in those before it.
    ends: Vec<u64>,
}

impl TextWindows {
    /// Windows of `window` bytes: one more than the positions of a row, as each byte predicts the next.
    ///
    /// # Errors
    /// [`Error::Config`] for a window below two bytes, [`Error::Data`] where no text has two bytes.
    pub fn new(text: Text, window: usize, windows: Windows) -> Result<TextWindows> {
        if window < 2 {
            return Err(Error::Config(format!(
                "a text window of {window} bytes predicts nothing; give 2 or more"
            )));
        }
        let count = |span: &Range<usize>| match (span.len(), windows) {
            (0 | 1, _) => 0,
            (len, Windows::Random { .. }) => len.saturating_sub(window) as u64 + 1,
            (len, Windows::Consecutive) => (len - 1).div_ceil(window - 1) as u64,
        };
        let counts = text.spans.iter().map(count);
        let ends: Vec<u64> = counts
            .scan(0, |end, n| {
                *end += n;
                Some(*end)
            })
            .collect();
        if ends.last().is_none_or(|&end| end == 0) {
            return Err(Error::Data(format!("{}: a text of at least two bytes is needed", text.name)));
        }
        Ok(TextWindows { text, window, windows, ends })
    }

    fn total(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Window `number` of all.
    fn bytes(&self, number: u64) -> &[u8] {
        let which = self.ends.partition_point(|&end| end <= number);
        let before = which.checked_sub(1).map_or(0, |b| self.ends[b]);
        let step = match self.windows {
            Windows::Random { .. } => 1,
            Windows::Consecutive => self.window - 1,
        };
        let Some(span) = self.text.spans.get(which) else { return &[] };
        let start = span.start + (number - before) as usize * step;
        &self.text.bytes[start..span.end.min(start + self.window)]
    }
}

impl Source for TextWindows {
    fn len(&self) -> Option<u64> {
        match self.windows {
            Windows::Random { .. } => None,
            Windows::Consecutive => Some(self.total()),
        }
    }

    fn document(&self, index: u64) -> Document {
        let number = match self.windows {
            Windows::Consecutive => index % self.total(),
            Windows::Random { seed } => {
                let [low, high, ..] = Stream::new(seed, Purpose::Data, index).words(0);
                let word = (u64::from(high) << 32) | u64::from(low);
                ((u128::from(word) * u128::from(self.total())) >> 64) as u64
            }
        };
        Document { parts: vec![Part::Text(self.bytes(number).to_vec())], stream: true }
    }

    fn describe(&self) -> String {
        format!("{}: {} bytes in windows of {}", self.text.name, self.text.len(), self.window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(texts: &[&str]) -> Text {
        Text::new("t", &texts.iter().map(|t| t.as_bytes().to_vec()).collect::<Vec<_>>())
    }

    fn window(source: &TextWindows, index: u64) -> String {
        let document = source.document(index);
        assert!(document.stream);
        match &document.parts[..] {
            [Part::Text(text)] => String::from_utf8(text.clone()).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn consecutive_windows_predict_every_byte_once() {
        let source =
            TextWindows::new(text(&["abcdefghij", "k", "lm", "nopq"]), 4, Windows::Consecutive).unwrap();
        let windows: Vec<String> = (0..source.len().unwrap()).map(|i| window(&source, i)).collect();
        assert_eq!(windows, ["abcd", "defg", "ghij", "lm", "nopq"]);
        assert_eq!(window(&source, 5), "abcd");
    }

    #[test]
    fn random_windows_reach_every_place_and_no_other_text() {
        let source =
            TextWindows::new(text(&["abcdef", "gh", "ijkl"]), 3, Windows::Random { seed: 4 }).unwrap();
        assert_eq!(source.len(), None);
        let mut counts = std::collections::BTreeMap::new();
        for i in 0..7000 {
            *counts.entry(window(&source, i)).or_insert(0) += 1;
        }
        assert_eq!(counts.keys().collect::<Vec<_>>(), ["abc", "bcd", "cde", "def", "gh", "ijk", "jkl"]);
        let sigma = (7000.0f64 * (1.0 / 7.0) * (6.0 / 7.0)).sqrt();
        assert!(counts.values().all(|&n| (f64::from(n) - 1000.0).abs() < 4.0 * sigma), "{counts:?}");
        let other = TextWindows::new(text(&["abcdef"]), 3, Windows::Random { seed: 5 }).unwrap();
        assert!((0..20).any(|i| window(&source, i) != window(&other, i)));
    }

    #[test]
    fn the_end_is_held_out() {
        let (train, validation) = text(&["abcde", "fghij"]).split(Holdout::Last(7)).unwrap();
        let validation = validation.unwrap();
        assert_eq!((train.len(), validation.len()), (3, 7));
        let windows = |text| TextWindows::new(text, 9, Windows::Consecutive).unwrap();
        assert_eq!(window(&windows(train), 0), "abc");
        let validation = windows(validation);
        assert_eq!([window(&validation, 0), window(&validation, 1)], ["de", "fghij"]);
        assert_eq!(text(&["abcdefghij"]).split(Holdout::Fraction(0.2)).unwrap().0.len(), 8);
        assert!(text(&["abc"]).split(Holdout::Last(3)).is_err());
    }

    #[test]
    fn too_little_text_is_refused() {
        for texts in [&[][..], &[""], &["a", "b"]] {
            assert!(TextWindows::new(text(texts), 4, Windows::Consecutive).is_err());
        }
        assert!(TextWindows::new(text(&["abc"]), 1, Windows::Consecutive).is_err());
    }
}
