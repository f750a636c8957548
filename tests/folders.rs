//! Real folders of data, where TRANSFUSION_DATA names a folder that holds `openmoji` and `shakespeare`.
use std::path::PathBuf;
use transfusion::{
    data::{Holdout, OpenOptions, open},
    engine::cpu,
    run::{Run, RunConfig},
    sample::Cancel,
};
use transfusion_tests::Scratch;

/// The folder of a data set, or one line that says it is left out.
fn folder(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("TRANSFUSION_DATA").map(|all| PathBuf::from(all).join(name));
    if path.is_none() {
        println!("{name} is left out: TRANSFUSION_DATA is not set");
    }
    path
}

#[test]
fn captioned_pictures_open_and_train() {
    let Some(path) = folder("openmoji") else { return };
    let options = OpenOptions { holdout: Holdout::Fraction(0.05), ..OpenOptions::default() };
    let opened = open(std::slice::from_ref(&path), &options).unwrap();
    assert_eq!(opened.report.skipped, []);
    assert_eq!(opened.report.documents, 2334);
    let sizes = [&opened.source, opened.validation.as_ref().unwrap()].map(|s| s.len().unwrap());
    assert_eq!(sizes.iter().sum::<u64>(), 2334);
    let scratch = Scratch::new("openmoji");
    let mut config = RunConfig::preset("tiny").unwrap();
    config.data.paths = vec![path];
    config.train.steps = 1;
    config.output.validate_documents = 4;
    let mut run = Run::create(config, &scratch.0.join("run"), None, cpu(0).unwrap(), &mut |_| ()).unwrap();
    run.train(&mut |_| (), Cancel(None)).unwrap();
    let metrics = transfusion::metrics::read(&run.dir().metrics()).unwrap();
    assert!(metrics[0].get("loss/image").unwrap() > 0.0 && metrics[0].get("images").unwrap() > 4.0);
    // The comparison at the end: a linear denoiser does better than nothing, and worse with more noise.
    let last = metrics.last().unwrap();
    let linear: Vec<f64> = (0..10).map(|i| last.get(&format!("linear/image/t{i}")).unwrap()).collect();
    assert!(linear[0] < 0.01 && linear.windows(2).all(|e| e[0] < e[1]) && linear[9] < 0.4, "{linear:?}");
    assert!(std::fs::read_to_string(run.dir().report()).unwrap().contains("best linear denoiser"));
}

#[test]
fn a_text_is_split_at_a_byte() {
    let Some(path) = folder("shakespeare") else { return };
    const VALIDATION: u64 = 111_540;
    let options = OpenOptions { holdout: Holdout::Last(VALIDATION), window: 65, ..OpenOptions::default() };
    let opened = open(&[path.join("train.txt")], &options).unwrap();
    assert_eq!((opened.report.text_bytes, opened.report.skipped.len()), (1_003_854, 0));
    let validation = opened.validation.unwrap();
    // Consecutive windows of 65 bytes that share one byte with the next: every byte is predicted once.
    assert_eq!(validation.len().unwrap(), (VALIDATION - 1).div_ceil(64));
}
