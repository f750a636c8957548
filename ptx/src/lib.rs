//! placeholder while the scanner is written
