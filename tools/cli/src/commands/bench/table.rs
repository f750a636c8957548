//! `transfusion bench table`.
use crate::{
    console,
    failure::{Failure, Outcome},
};
use clap::Args;
use std::{fs, path::PathBuf};
use transfusion_benches::row::{self, Row};

/// Make tables of rows that were printed with --json.
///
/// Prints them, or writes them into a file between markers: a block from `<!-- bench:step -->` to
/// `<!-- /bench -->` gets the rows of `bench step`, with when and on what they were measured.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion bench step --preset tiny --against torch --json >> rows.jsonl
  transfusion bench table rows.jsonl
  transfusion bench table rows.jsonl --write README.md")]
pub(crate) struct Table {
    /// Files of rows, a line of JSON each.
    #[arg(value_name = "FILE", required = true)]
    rows: Vec<PathBuf>,
    /// The file whose blocks are written anew.
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

impl Table {
    /// Reads and prints or writes.
    pub(crate) fn run(self) -> Outcome {
        let mut rows: Vec<Row> = Vec::new();
        for path in &self.rows {
            let text = read(path)?;
            let more = row::read(&text).map_err(|why| Failure::error(format!("{}: {why}", path.display())));
            rows.extend(more.map_err(|e| e.hint("rows are what `transfusion bench ... --json` prints"))?);
        }
        let Some(path) = &self.write else {
            return console::print(format!(
                "{}\n\n{}",
                row::provenance(&rows),
                row::markdown(&rows).trim_end()
            ));
        };
        let text = row::written(&read(path)?, &rows);
        let text = text.map_err(|why| Failure::error(format!("{}: {why}", path.display())))?;
        fs::write(path, text)
            .map_err(|e| Failure::error(format!("{}: cannot be written: {e}", path.display())))
    }
}

fn read(path: &PathBuf) -> Outcome<String> {
    fs::read_to_string(path).map_err(|e| Failure::error(format!("{}: cannot be read: {e}", path.display())))
}
