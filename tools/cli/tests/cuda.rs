//! `--device` and `transfusion doctor` as a user meets them, with a pretended NVIDIA driver in every
//! condition. Needs no GPU.
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};
use transfusion_tests::fake_cuda::{driver, install, no_driver, said};

/// A driver's folder, and its condition.
struct Machine(PathBuf, &'static [(&'static str, &'static str)]);

fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn machine(variant: &str, condition: &'static [(&'static str, &'static str)]) -> Machine {
    let folder = if variant == "none" { no_driver(target()) } else { driver(target(), variant) };
    Machine(folder, condition)
}

impl Machine {
    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_transfusion"));
        command.args(args).current_dir(folder()).stdin(Stdio::null());
        let out = install(&mut command, &self.0, self.1).output().unwrap();
        assert!(!said(&out).contains("panicked"), "{:?} {args:?}: {}", self.1, said(&out));
        out
    }

    /// Exit code 1, an error with these words and a hint with these.
    fn fails(&self, args: &[&str], error: &str, hint: &str) {
        let out = self.run(args);
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{:?} {args:?}: {stderr}", self.1);
        let line = |start: &str| stderr.lines().find_map(|l| l.strip_prefix(start)).unwrap_or("").to_owned();
        assert!(line("error: ").contains(error), "{:?}: no {error:?} in {stderr}", self.1);
        assert!(line("hint: ").contains(hint), "{:?}: no {hint:?} in {stderr}", self.1);
    }

    fn doctor(&self) -> Value {
        let out = self.run(&["doctor", "--json"]);
        assert_eq!(out.status.code(), Some(0), "{}", said(&out));
        serde_json::from_slice(&out.stdout).unwrap()
    }
}

/// A folder of our own, where a tiny model comes to be only if a command goes as far as that.
fn folder() -> PathBuf {
    let folder = target().join("device");
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Trains two steps of a tiny model in a new run.
fn training<'a>(out: &'a str, device: &'a str) -> Vec<&'a str> {
    let _ = fs::remove_dir_all(folder().join(out));
    let small = ["model.hidden_size=32", "model.intermediate_size=32", "model.num_hidden_layers=1"];
    let heads = ["model.num_attention_heads=2", "model.num_key_value_heads=2", "model.head_dim=16"];
    let batch = ["train.rows=2", "train.positions=96"];
    let mut args = vec!["train", "--data", "shapes", "--out", out, "--steps", "2", "--device", device];
    args.push("--set");
    args.extend(small.into_iter().chain(heads).chain(batch));
    args
}

/// Every way in which there is no GPU: the driver, what `--device cuda` says, and the remedy.
fn absent() -> Vec<(Machine, &'static str, &'static str)> {
    vec![
        (machine("none", &[]), "library was not found", "install the NVIDIA driver"),
        (machine("", &[("", "stub")]), "a stub", "LD_LIBRARY_PATH"),
        (machine("", &[("", "no device")]), "sees no GPU", "nvidia-smi"),
        (machine("", &[("_DEVICES", "0")]), "sees no GPU", "CUDA_VISIBLE_DEVICES"),
        (machine("", &[("", "mismatch")]), "SYSTEM_DRIVER_MISMATCH 803", "restart"),
        (
            machine("", &[("_VERSION", "10020")]),
            "the driver is for CUDA 10.2",
            "install a driver for CUDA 11",
        ),
        (machine("", &[("_CAPABILITY", "7.5")]), "compute capability 7.5", "8.0 (Ampere)"),
        (machine("bare", &[]), "lacks cuDriverGetVersion", "install a driver for CUDA"),
        (machine("old", &[]), "lacks cuGraphInstantiateWithFlags", "install a driver for CUDA 11.4"),
    ]
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_and_the_remedy() {
    for (machine, error, hint) in absent() {
        machine.fails(&training("never", "cuda"), error, hint);
        machine.fails(&training("never", "cuda"), "", "transfusion doctor");
        machine.fails(&["demo", "--out", "never", "--device", "cuda:0"], error, hint);
    }
    let two = machine("", &[("_DEVICES", "2")]);
    two.fails(&training("never", "cuda:2"), "no CUDA device 2: there are 2", "counted from 0");
    machine("", &[]).fails(&training("never", "cuda:1"), "no CUDA device 1: there is 1", "counted from 0");
    assert!(!folder().join("never").exists(), "nothing is begun");
}

#[test]
fn auto_trains_on_the_cpu_where_no_gpu_can_be_used() {
    for (i, (machine, error, _)) in absent().into_iter().enumerate() {
        let out = format!("auto-{i}");
        let done = machine.run(&training(&out, "auto"));
        assert!(done.status.success(), "{}", said(&done));
        // A driver that is amiss is worth a line; a machine without a GPU is not.
        let is_told = said(&done).contains(error);
        let silent = error.contains("not found") || error.contains("no GPU");
        assert_eq!(is_told, !silent, "{error}: {}", said(&done));
        let lines = said(&done).lines().filter(|l| l.starts_with("running on the CPU: ")).count();
        assert_eq!(lines, usize::from(!silent));
    }
}

#[test]
fn an_op_without_a_kernel_is_an_error_for_cuda_and_a_notice_for_auto() {
    let healthy = machine("", &[]);
    let auto = healthy.run(&training("auto", "auto"));
    assert!(auto.status.success(), "{}", said(&auto));
    let notice =
        said(&auto).lines().any(|l| l.starts_with("running on the CPU: ") && l.contains("has no kernel"));
    if notice {
        healthy.fails(&training("never", "cuda"), "has no kernel", "--device cpu");
    }
    // A model that was trained is sampled where it was trained.
    let sample = ["sample", "auto", "--to", "text", "--max-text", "3", "--device", "cpu"];
    let sampled = healthy.run(&sample);
    assert!(sampled.status.success() && !said(&sampled).contains("running on"), "{}", said(&sampled));
}

#[test]
fn names_of_devices_are_checked() {
    for wrong in ["gpu", "cuda:", "cuda:x", "metal"] {
        let out = machine("none", &[]).run(&training("never", wrong));
        assert_eq!(out.status.code(), Some(2), "{}", said(&out));
        assert!(said(&out).contains("cuda:N"), "{}", said(&out));
    }
}

#[test]
fn the_doctor_tells_what_is_missing_and_the_remedy() {
    for (machine, error, remedy) in absent() {
        let found = machine.doctor();
        let missing = found["missing"].as_array().unwrap();
        let has = |m: &&Value| m["what"].as_str().unwrap().contains(error);
        let it = missing.iter().find(has).unwrap_or_else(|| panic!("no {error:?} in {found}"));
        assert!(it["remedy"].as_str().unwrap().contains(remedy), "{it}");
        let words = said(&machine.run(&["doctor"]));
        assert!(words.contains(error) && words.contains(remedy), "{words}");
    }
}

#[test]
fn the_doctor_describes_gpus() {
    let machine = machine("", &[("_DEVICES", "2"), ("_CAPABILITY", "9.0")]);
    let found = machine.doctor();
    let cuda = &found["cuda"];
    assert_eq!((&cuda["cuda"], &cuda["ptx"]), (&"12.4".into(), &"8.4".into()));
    assert!(cuda["library"].as_str().unwrap().contains("fake-cuda"), "{found}");
    assert_eq!(cuda["devices"].as_array().unwrap().len(), 2);
    let second = &cuda["devices"][1];
    assert_eq!(second["device"], "cuda:1");
    assert_eq!(second["name"], "Pretended GPU");
    assert_eq!(second["capability"], "9.0");
    assert_eq!(second["memory"], 80u64 << 30);
    assert_eq!(second["kernels"], "sm_90a");
    assert!(found["cpu"]["threads"].as_u64().unwrap() > 0);
    assert!(found["missing"].as_array().unwrap().iter().all(|m| !m["what"].to_string().contains("device")));
    let words = said(&machine.run(&["doctor"]));
    for word in ["cuda:1", "Pretended GPU, capability 9.0, 80.00 GiB, kernels sm_90a", "PTX up to 8.4"] {
        assert!(words.contains(word), "no {word:?} in {words}");
    }
}

/// Ops are measured by events, each behind a pass over more than the second-level cache holds, in several places in
/// turn; a step and sampling through the same device. The pretended driver computes nothing, and says 0.25 ms.
#[test]
fn a_gpu_is_measured_by_events_with_its_cache_overwritten() {
    let machine = machine("", &[("_LOG", "bench.log")]);
    let log = folder().join("bench.log");
    let _ = fs::remove_file(&log);
    let model = "--set model.hidden_size=64 model.intermediate_size=64 model.num_hidden_layers=1 \
         model.num_attention_heads=2 model.num_key_value_heads=2 model.head_dim=32 train.rows=1 train.positions=64";
    let words = |text: &'static str| text.split_whitespace().collect::<Vec<_>>();
    let short = words("--dtype bf16 --device cuda --rounds 2 --seconds 0 --json");
    let bench = |args: &'static str| {
        let out = machine.run(&[&["bench"], &words(args)[..], &short, &words(model)].concat());
        assert!(out.status.success(), "{}", said(&out));
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    let rows = bench("ops attention --group attention --unchecked");
    assert!(rows.len() >= 4, "{rows:?}");
    for row in &rows {
        assert_eq!((&row["device"], &row["ms"]), (&"Pretended GPU".into(), &0.25.into()));
        assert!(row["driver"].as_str().unwrap().contains("CUDA 12.4") && row["clocks"].is_string(), "{row}");
    }
    let log = fs::read_to_string(log).unwrap();
    let kernels: Vec<&str> = log.lines().filter(|l| l.starts_with("kernel ")).collect();
    let is_attention = |l: &&str| l.contains("attention");
    let (mut runs, mut places) = (0, std::collections::HashSet::new());
    for pair in kernels.windows(2).filter(|pair| is_attention(&pair[1]) && !is_attention(&pair[0])) {
        assert!(pair[0].starts_with("kernel add_fwd"), "{} before {}", pair[0], pair[1]);
        runs += 1;
        places.insert(pair[1].to_string());
    }
    assert!(runs >= 4 * 2 * 8 && places.len() >= 4 * 8, "{runs} runs in {} places", places.len());
    assert!(bench("step")[0]["rate"].as_f64().unwrap() > 0.0);
    let refused = machine.run(&[&["bench", "ops", "linear"], &short[..], &words(model)].concat());
    assert!(said(&refused).contains("from the CPU's"), "wrong results are not timed: {}", said(&refused));
}
