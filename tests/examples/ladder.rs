//! Climbs the ladders of `kernels-cu/ladder`: what each rung does, as the simulator counts it.
//!
//! `ladder` prints the tables, `ladder write` puts them into the README of the folder.
use std::{fs, process::ExitCode};
use transfusion_tests::rungs::{self, LADDERS};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => LADDERS.iter().for_each(|(op, _)| println!("{op}\n{}", rungs::table(op))),
        ["write"] => {
            let path = rungs::kernels().join("ladder/README.md");
            fs::write(&path, rungs::readme(&fs::read_to_string(&path).unwrap())).unwrap();
        }
        _ => {
            eprintln!("ladder [write]");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}
