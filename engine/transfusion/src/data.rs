//! Training data: where documents come from, and in which order they are visited.
//!
//! In reading order: `source` (what a document is), `order`, `text`, `shapes`, `listing` (what a folder
//! says there is), `open`.

mod listing;
mod open;
mod order;
pub mod shapes;
mod source;
mod text;

pub use open::{OpenOptions, Opened, Report, Skipped, open};
pub use order::{Holdout, Order};
pub use source::{Document, Documents, Mixture, Part, Shared, Source, Subset};
pub use text::{Text, TextWindows, Windows};
