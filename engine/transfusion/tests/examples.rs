//! The examples run.
use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};
use transfusion::{
    config::ModelConfig,
    engine::{Engine, cpu},
    hf,
};

/// An example's binary: cargo builds it beside this test's.
fn example(name: &str, args: &[&str]) -> Output {
    let this = std::env::current_exe().unwrap();
    let folder: PathBuf = this.parent().and_then(Path::parent).unwrap().join("examples");
    let binary = folder.join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    Command::new(&binary).args(args).output().unwrap_or_else(|e| panic!("{}: {e}", binary.display()))
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn an_application_trains_in_its_own_loop() {
    let said = text(&example("train", &["20"]));
    assert!(said.contains("step   20") && said.contains("drew a picture of 32x32"), "{said}");
}

#[test]
fn an_application_samples_with_a_callback() {
    let folder = std::env::temp_dir().join(format!("transfusion-example-{}", std::process::id()));
    let mut engine = Engine::initialised(ModelConfig::preset("tiny").unwrap(), cpu(1).unwrap(), 1).unwrap();
    hf::export(&mut engine, &folder).unwrap();
    let said = text(&example("sample", &[&folder.to_string_lossy(), "a big circle in red"]));
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(said.contains("a big circle in red: 32x32 pixels"), "{said}");
}
