//! Climbs the ladders of `kernels-cu/ladder`: what each rung does, as the simulator counts it.
//!
//! `ladder` prints the tables, `ladder write` puts them into the README of the folder, `ladder cuda` or `cuda:N` times
//! the rungs on a GPU.
use std::{fs, process::ExitCode};
use transfusion_tests::rungs::{self, LADDERS};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let gpu = |word: &str| match word {
        "cuda" => Some(0),
        _ => word.strip_prefix("cuda:")?.parse().ok(),
    };
    match words.as_slice() {
        [] => LADDERS.iter().for_each(|(op, _)| println!("{op}\n{}", rungs::table(op))),
        [word] if word == "write" => {
            let path = rungs::kernels().join("ladder/README.md");
            fs::write(&path, rungs::readme(&fs::read_to_string(&path).unwrap())).unwrap();
        }
        [word] if gpu(word).is_some() => {
            for (op, _) in LADDERS {
                match rungs::times(op, gpu(word).unwrap_or(0)) {
                    Ok(times) => println!("{op}\n{times}"),
                    Err(e) => {
                        eprintln!("{e}");
                        return ExitCode::FAILURE;
                    }
                }
            }
        }
        _ => {
            eprintln!("ladder [write | cuda | cuda:N]");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}
