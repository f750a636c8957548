//! `metrics.jsonl`: what a run measured, one JSON object per line.
//!
//! A resumed run first drops what lies behind its checkpoint, so that its file equals that of a run
//! which was never interrupted, but for timings.
use crate::{error::Result, run_dir::failed};
use serde::{
    Deserialize,
    de::{Deserializer, Error as _, MapAccess, Visitor},
};
use std::{
    fmt::{self, Write as _},
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

/// What was measured at one step: `{"step":100,"loss":2.5,"loss/text":1.25}`.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Record {
    /// How many optimiser steps were done.
    pub step: u64,
    /// Names and values in the order of writing: `loss`, `loss/text`, `val/image/t3`, ...
    pub values: Vec<(String, f64)>,
}

impl Record {
    /// A record without values.
    pub fn new(step: u64) -> Record {
        Record { step, values: Vec::new() }
    }

    /// Adds a value.
    pub fn with(mut self, name: impl Into<String>, value: f64) -> Record {
        self.values.push((name.into(), value));
        self
    }

    /// The value of a name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.values.iter().find(|(n, _)| n == name).map(|&(_, value)| value)
    }

    /// The line that says it. What is not finite becomes `null`, whole numbers have no fraction, and
    /// every other number has the digits that bring back its bits.
    fn line(&self) -> String {
        let mut line = format!("{{\"step\":{}", self.step);
        for (name, value) in &self.values {
            let _ = write!(line, ",{}:", serde_json::Value::from(name.as_str()));
            let whole = *value as i64;
            let _ = if value.abs() < 1e15 && value.to_bits() == (whole as f64).to_bits() {
                write!(line, "{whole}")
            } else {
                write!(line, "{}", serde_json::Value::from(*value))
            };
        }
        line.push_str("}\n");
        line
    }
}

impl<'de> Deserialize<'de> for Record {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Record, D::Error> {
        deserializer.deserialize_map(RecordVisitor)
    }
}

struct RecordVisitor;

impl<'de> Visitor<'de> for RecordVisitor {
    type Value = Record;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a step with named numbers")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<Record, M::Error> {
        let (mut step, mut values) = (None, Vec::new());
        while let Some(name) = map.next_key::<String>()? {
            if name == "step" {
                step = Some(map.next_value()?);
            } else {
                values.push((name, map.next_value::<Option<f64>>()?.unwrap_or(f64::NAN)));
            }
        }
        let step = step.ok_or_else(|| M::Error::missing_field("step"))?;
        Ok(Record { step, values })
    }
}

/// The metrics file of a run, open at its end.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Begins a file.
    ///
    /// # Errors
    /// The file exists or cannot be made.
    pub fn create(path: impl Into<PathBuf>) -> Result<Metrics> {
        let path = path.into();
        let file = File::create_new(&path).map_err(|e| failed(&path, format!("cannot be made: {e}")))?;
        Ok(Metrics { path, file })
    }

    /// Goes on with a file after `step`: lines of later steps and a torn last line are dropped. A file
    /// that is not there is made.
    ///
    /// # Errors
    /// A whole line that is no record, and whatever the file system refuses.
    pub fn resume(path: impl Into<PathBuf>, step: u64) -> Result<Metrics> {
        let path = path.into();
        if !path.exists() {
            return Metrics::create(path);
        }
        let keep =
            parse(&path)?.iter().take_while(|(record, _)| record.step <= step).last().map(|&(_, end)| end);
        let file = File::options()
            .append(true)
            .open(&path)
            .and_then(|file| file.set_len(keep.unwrap_or(0) as u64).map(|()| file))
            .map_err(|e| failed(&path, format!("cannot be continued: {e}; check the permissions")))?;
        Ok(Metrics { path, file })
    }

    /// Appends a line; whoever reads the file sees it at once.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        self.file
            .write_all(record.line().as_bytes())
            .map_err(|e| failed(&self.path, format!("cannot be written: {e}; check the free space")))
    }

    /// Makes all lines durable; to be called before a checkpoint, which must not know of steps that
    /// the metrics have forgotten.
    ///
    /// # Errors
    /// Whatever the file system refuses.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| failed(&self.path, format!("cannot be written: {e}")))
    }
}

/// Reads a metrics file; a torn last line, of a run that is being written or was killed, is left out.
///
/// # Errors
/// A whole line that is no record, by number, and whatever the file system refuses.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    Ok(parse(path)?.into_iter().map(|(record, _)| record).collect())
}

/// The records, each with the byte at which its line ends.
fn parse(path: &Path) -> Result<Vec<(Record, usize)>> {
    let text = fs::read(path).map_err(|e| failed(path, format!("cannot be read: {e}")))?;
    let mut end = 0;
    let whole = text.split_inclusive(|&b| b == b'\n').filter(|line| line.ends_with(b"\n"));
    whole
        .zip(1..)
        .map(|(line, number)| {
            end += line.len();
            let record = serde_json::from_slice(line)
                .map_err(|e| failed(path, format!("line {number}: {e}; remove the line")))?;
            Ok((record, end))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_dir::tests::Scratch;
    use transfusion_core::random::{Purpose, Stream};

    fn record(step: u64) -> Record {
        Record::new(step).with("tokens", 4096.0 * step as f64).with("loss/text", 1.0 / (step as f64 + 0.3))
    }

    #[test]
    fn lines_keep_order_bits_and_strange_values() {
        let scratch = Scratch::new("metrics");
        let path = scratch.0.join("metrics.jsonl");
        let strange = Record::new(u64::MAX)
            .with("zero \"quoted\"\n", -0.0)
            .with("a", f64::MIN_POSITIVE)
            .with("nan", f64::NAN)
            .with("inf", f64::NEG_INFINITY)
            .with("big", 1e300);
        let mut metrics = Metrics::create(&path).unwrap();
        metrics.write(&record(7)).unwrap();
        metrics.write(&strange).unwrap();
        metrics.sync().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            text.starts_with("{\"step\":7,\"tokens\":28672,\"loss/text\":0.136986301369863}\n"),
            "{text}"
        );
        assert!(text.contains("\"nan\":null,\"inf\":null"), "{text}");
        let back = read(&path).unwrap();
        assert_eq!(back[0], record(7));
        for ((name, value), (same, want)) in back[1].values.iter().zip(&strange.values) {
            assert_eq!(name, same);
            assert!(value.to_bits() == want.to_bits() || (value.is_nan() && !want.is_finite()), "{name}");
        }
        assert_eq!((back[1].step, back[0].get("tokens"), back[0].get("x")), (u64::MAX, Some(28672.0), None));
        assert!(Metrics::create(&path).unwrap_err().to_string().contains("metrics.jsonl: cannot be made"));
    }

    #[test]
    fn every_number_comes_back_with_its_bits() {
        for i in 0..20_000 {
            let words = Stream::new(1, Purpose::Test, i).words(0);
            let value = f64::from_bits(u64::from(words[0]) << 32 | u64::from(words[1]));
            let back: Record = serde_json::from_str(&Record::new(i).with("x", value).line()).unwrap();
            let want = if value.is_finite() { value.to_bits() } else { f64::NAN.to_bits() };
            assert_eq!(back.get("x").map(f64::to_bits), Some(want), "{value:e}");
        }
    }

    #[test]
    fn a_resumed_file_equals_an_uninterrupted_one() {
        let scratch = Scratch::new("resume");
        let whole = scratch.0.join("whole.jsonl");
        let mut metrics = Metrics::create(&whole).unwrap();
        (1..=9).for_each(|step| metrics.write(&record(step)).unwrap());
        let whole = fs::read(&whole).unwrap();

        let path = scratch.0.join("metrics.jsonl");
        for cut in 0..=whole.len() {
            // Killed after `cut` bytes; the checkpoint is of step 3, or of the last line if before.
            fs::write(&path, &whole[..cut]).unwrap();
            let from = read(&path).unwrap().last().map_or(0, |record| record.step.min(3));
            let mut metrics = Metrics::resume(&path, from).unwrap();
            (from + 1..=9).for_each(|step| metrics.write(&record(step)).unwrap());
            assert_eq!(fs::read(&path).unwrap(), whole, "cut at {cut}");
        }
        fs::remove_file(&path).unwrap();
        Metrics::resume(&path, 4).unwrap();
        assert_eq!(read(&path).unwrap(), []);
    }

    #[test]
    fn what_is_no_record_is_named_by_line() {
        let scratch = Scratch::new("bad-metrics");
        let path = scratch.0.join("metrics.jsonl");
        for bad in ["{}", "{\"step\":-1}", "{\"step\":2,\"loss\":\"x\"}", "", "[", "\u{1}"] {
            fs::write(&path, format!("{{\"step\":1}}\n{bad}\n{{\"step\":3}}\n")).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("metrics.jsonl: line 2:"), "{error}");
            assert!(Metrics::resume(&path, 1).is_err());
        }
    }
}
