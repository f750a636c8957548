//! The program as a user runs it: help, errors, and a small model from training to export.
use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::OnceLock,
};

/// A model small enough to be trained in a moment.
const SMALL: [&str; 12] = [
    "--set",
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
    "model.head_dim=16",
    "train.rows=2",
    "train.positions=96",
    "train.warmup=2",
    "output.log_every=1",
    "output.validate_documents=10",
];

/// Runs the program in a folder.
fn run(folder: &Path, args: &[&str]) -> Output {
    let out = program(folder, args).output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    out
}

fn program(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_transfusion"));
    command.args(args).current_dir(folder).env_remove("NO_COLOR").stdin(Stdio::null());
    command
}

/// Its standard output, if it succeeds.
fn succeed(folder: &Path, args: &[&str]) -> String {
    let out = run(folder, args);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?}: {} {stderr}", out.status);
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Fails with exit code `code`, and stderr holds every one of `words`.
fn fail(folder: &Path, args: &[&str], code: i32, words: &[&str]) {
    let out = run(folder, args);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{args:?}: {stderr}");
    assert!(stderr.contains("error: "), "{args:?}: {stderr}");
    assert!(!stderr.contains('\x1b'), "{args:?}: colours outside of a terminal: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{args:?}: no {word:?} in {stderr}");
    }
}

/// A new empty folder.
fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// A folder whose `run` is a small model after six steps on shapes, and `text` one after two on a text.
fn trained() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = scratch("trained");
        let train = |args: &[&str]| succeed(&folder, &[&["train"], args, &SMALL].concat());
        let said = train(&["--data", "shapes", "--out", "run", "--steps", "6", "--threads", "1"]);
        assert_eq!(said.trim(), "run/report.html");
        fs::write(folder.join("book.txt"), "To be, or not to be.\n".repeat(100)).unwrap();
        train(&["--data", "book.txt", "--out", "text", "--steps", "2", "--preset", "text-tiny"]);
        folder
    })
}

/// What damages a file without changing its size.
fn flip_a_bit(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[test]
fn help_names_every_option() {
    let folder = scratch("help");
    let machine = ["--device", "--threads"];
    let settings = ["--preset", "--config", "--set"];
    let train = ["--data", "--out", "--init", "--steps", "--seed", "--resume", "--print-config"];
    let sample = [
        "--prompt",
        "--image",
        "--to",
        "--num",
        "--steps",
        "--cfg",
        "--sampler",
        "--temperature",
        "--top-k",
        "--top-p",
        "--max-text",
        "--max-images",
        "--seed",
        "--out",
    ];
    for (command, options) in [
        ("demo", [&["--out", "--seed"][..], &machine].concat()),
        ("train", [&train[..], &settings, &machine].concat()),
        ("sample", [&sample[..], &machine].concat()),
        ("eval", [&["--data", "--json", "--documents", "--levels"][..], &machine].concat()),
        (
            "plan",
            [&["--batch", "--fit", "--positions", "--target", "--json", "--listing"][..], &settings].concat(),
        ),
        ("inspect", vec!["PATH"]),
        ("export", vec!["--out"]),
    ] {
        let help = succeed(&folder, &[command, "--help"]);
        assert!(help.contains("Example") && help.contains(&format!("transfusion {command} ")), "{help}");
        for option in options {
            assert!(help.contains(option), "{command}: no {option} in {help}");
        }
    }
    assert!(succeed(&folder, &["--help"]).contains("130"));
    assert!(succeed(&folder, &["--version"]).starts_with("transfusion "));
}

#[test]
fn wrong_usage_exits_2() {
    let folder = scratch("usage");
    let usages: [(&[&str], &str); 16] = [
        (&["draw"], "draw"),
        (&["train", "--out", "r"], "--data"),
        (&["train", "--data", "shapes"], "--out"),
        (&["train", "--data", "shapes", "--out", "r", "--resume"], "--resume"),
        (&["train", "--data", "shapes", "--out", "r", "--set", "train.lr"], "KEY=VALUE"),
        (&["train", "--data", "shapes", "--out", "r", "--preset", "7c"], "0.16b"),
        (&["train", "--data", "shapes", "--out", "r", "--device", "tpu"], "auto, cpu"),
        (&["train", "--data", "shapes", "--out", "r", "--steps", "-3"], "-3"),
        (&["sample", "m", "--out", "a.png", "--num", "0"], "1..=256"),
        (&["sample", "m", "--out", "a.png", "--steps", "0"], "1..=10000"),
        (&["sample", "m", "--out", "a.png", "--cfg", "NaN"], "finite"),
        (&["sample", "m", "--to", "text", "--out", "a.png"], "a .txt file or a folder"),
        (&["plan", "--preset", "tiny", "--batch", "0"], "1..=4096"),
        (&["plan", "--preset", "tiny"], "--batch"),
        (&["plan", "--batch", "1", "--fit", "1GB"], "--fit"),
        (&["plan", "--fit", "12 parsecs"], "80GiB"),
    ];
    for (args, word) in usages {
        fail(&folder, args, 2, &[word]);
    }
}

#[test]
fn errors_name_the_file_the_value_and_the_remedy() {
    let folder = scratch("errors");
    fs::write(folder.join("broken.json"), "{\"train\": ").unwrap();
    fs::write(folder.join("unknown.json"), "{\"train\": {\"step\": 5}}").unwrap();
    fs::write(folder.join("photo.jpg"), "no picture").unwrap();
    fs::create_dir(folder.join("empty")).unwrap();
    let train = |args: &[&'static str]| [&["train", "--out", "r"], args].concat();
    let cases: [(Vec<&str>, &[&str]); 14] = [
        (train(&["--data", "nowhere"]), &["nowhere", "No such file"]),
        (train(&["--data", "photo.jpg"]), &["photo.jpg", "folder that holds it"]),
        (train(&["--data", "empty"]), &["empty"]),
        (train(&["--data", "shapes", "--config", "missing.json"]), &["missing.json", "cannot be read"]),
        (train(&["--data", "shapes", "--config", "broken.json"]), &["broken.json", "JSON"]),
        (train(&["--data", "shapes", "--config", "unknown.json"]), &["unknown.json", "train.step", "steps?"]),
        (train(&["--data", "shapes", "--set", "train.lrr=1"]), &["train.lrr", "did you mean lr?", "hint: "]),
        (train(&["--data", "shapes", "--set", "train.lr=fast"]), &["train.lr=fast"]),
        (train(&["--data", "shapes", "--set", "train.lr=-1"]), &["train.lr is -1", "above 0"]),
        (train(&["--data", "shapes", "--set", "model.head_dim=7"]), &["head_dim 7"]),
        (train(&["--resume"]), &["r: is no run"]),
        (vec!["sample", "nowhere", "--out", "a.png"], &["nowhere: does not exist", "run directory"]),
        (vec!["eval", "empty", "--data", "shapes"], &["empty: is no model"]),
        (vec!["inspect", "photo.jpg"], &["photo.jpg", "hint: "]),
    ];
    for (args, words) in &cases {
        fail(&folder, args, 1, words);
    }
    assert!(!folder.join("r").exists());
}

#[test]
fn a_run_is_inspected_and_never_overwritten() {
    let folder = trained();
    let run = succeed(folder, &["inspect", "run"]);
    for words in ["run run", "32x32x3 in 16 patches", "shapes", "6 steps", "loss/image", "step-00000006"] {
        assert!(run.contains(words), "no {words} in {run}");
    }
    let checkpoint = succeed(folder, &["inspect", "run/checkpoints/step-00000006"]);
    for words in
        ["6 steps", "model.embed_tokens.weight", "f32[264, 32]", "33792 bytes", "embed_tokens.weight.m"]
    {
        assert!(checkpoint.contains(words), "no {words} in {checkpoint}");
    }
    assert!(succeed(folder, &["inspect", "run/metrics.jsonl"]).contains("grad_norm"));
    for again in [&["train", "--data", "shapes", "--out", "run"][..], &["demo", "--out", "run"]] {
        fail(folder, again, 1, &["run: is not empty", "another --out"]);
    }
}

#[test]
fn damage_is_refused_by_name() {
    let folder = scratch("damage");
    copy_folder(&trained().join("run"), &folder.join("run"));
    flip_a_bit(&folder.join("run/checkpoints/step-00000006/model.safetensors"));
    let words = ["step-00000006/model.safetensors", "damaged", "CRC32"];
    fail(&folder, &["inspect", "run"], 1, &words);
    fail(&folder, &["inspect", "run/checkpoints/step-00000006"], 1, &words);
    fail(&folder, &["sample", "run", "--out", "a.png"], 1, &words);
    fail(&folder, &["train", "--resume", "--out", "run"], 1, &words);
    fail(&folder, &["export", "run", "--out", "exported"], 1, &words);
    assert!(!folder.join("exported").exists() && !folder.join("a.png").exists());
}

#[test]
fn pictures_and_texts_are_sampled() {
    let folder = trained();
    let out = scratch("samples");
    let at = |name: &str| out.join(name).display().to_string();
    let few = ["--steps", "2", "--max-text", "12", "--threads", "1"];
    let sample = |args: &[&str]| succeed(folder, &[&["sample"], args, &few].concat());
    sample(&["run", "--prompt", "a red circle", "--out", &at("one.png")]);
    sample(&["run", "--prompt", "a red circle", "--out", &at("again.png")]);
    sample(&["run", "--prompt", "", "--num", "5", "--out", &at("grid.png")]);
    let side = |name: &str| u32::from_be_bytes(fs::read(at(name)).unwrap()[16..20].try_into().unwrap());
    assert_eq!((side("one.png"), side("grid.png")), (32, 3 * 34 + 2));
    assert_eq!(fs::read(at("one.png")).unwrap(), fs::read(at("again.png")).unwrap());
    sample(&["run", "--num", "2", "--out", &at("pictures")]);
    assert!(out.join("pictures/sample-001.png").is_file());

    let caption = sample(&["run", "--image", &at("grid.png"), "--out", &at("caption.txt")]);
    assert_eq!(fs::read_to_string(at("caption.txt")).unwrap(), caption);
    sample(&["run", "--image", &at("one.png"), "--num", "2", "--out", &at("captions")]);
    assert!(out.join("captions/sample-001.txt").is_file());
    assert!(!sample(&["text", "--prompt", "To be"]).is_empty());

    sample(&[
        "run",
        "--image",
        &at("one.png"),
        "--prompt",
        "a \"red\"\n",
        "--to",
        "any",
        "--out",
        &at("any"),
    ]);
    let line = fs::read_to_string(out.join("any/documents.jsonl")).unwrap();
    let document: Value = serde_json::from_str(&line).unwrap();
    let image = document["parts"][0]["image"].as_str().unwrap();
    assert!(out.join("any").join(image).is_file());
    assert_eq!(document["parts"][1]["text"], "a \"red\"\n");
    let documents = at("any/documents.jsonl");
    succeed(folder, &["eval", "run", "--data", &documents, "--json"]);
}

#[test]
fn samples_are_refused_with_a_reason() {
    let folder = trained();
    let out = scratch("refused-samples");
    let at = |name: &str| out.join(name).display().to_string();
    fs::write(at("taken.png"), "mine").unwrap();
    fs::create_dir(at("folder")).unwrap();
    fs::write(at("folder/sample-001.png"), "mine").unwrap();
    let (new, long) = (at("new.png"), "x".repeat(100_000));
    let cases: [(&[&str], i32, &[&str]); 10] = [
        (&["run", "--out", &at("taken.png")], 1, &["taken.png exists", "another --out"]),
        (&["run", "--out", &at("folder"), "--num", "2"], 1, &["sample-001.png exists"]),
        (&["run", "--out", &at("a.gif")], 2, &["a.gif", ".png"]),
        (&["run"], 2, &["--out is missing"]),
        (&["run", "--out", &new, "--sampler", "euler"], 1, &["euler", "X0", "ddpm, ddim"]),
        (&["run", "--out", &new, "--prompt", &long], 1, &["100002 positions", "shorten"]),
        (&["run", "--image", "book.txt"], 1, &["book.txt", "neither PNG nor JPEG"]),
        (&["run", "--image", "nowhere.png"], 1, &["nowhere.png"]),
        (&["run", "--out", &new, "--cfg=-1"], 1, &["guidance is -1"]),
        (&["text", "--to", "image", "--out", &new], 1, &["no images"]),
    ];
    for (args, code, words) in cases {
        fail(folder, &[&["sample"], args].concat(), code, words);
    }
    assert!(!Path::new(&new).exists());
    assert_eq!(fs::read_to_string(at("taken.png")).unwrap(), "mine");
}

#[test]
fn an_exported_model_is_the_same_model() {
    let folder = trained();
    let out = scratch("export").join("exported").display().to_string();
    assert_eq!(succeed(folder, &["export", "run", "--out", &out]).trim(), out);
    fail(folder, &["export", "run", "--out", &out], 1, &["exists", "another --out"]);
    let inspected = succeed(folder, &["inspect", &out]);
    assert!(inspected.contains("self_attn.q_proj.weight") && inspected.contains("whole"), "{inspected}");
    let weights = format!("{out}/model.safetensors");
    assert!(succeed(folder, &["inspect", &weights]).contains("self_attn.q_proj.weight"));

    let data = ["--data", "shapes", "--documents", "12", "--json"];
    let eval = |model: &str| succeed(folder, &[&["eval", model], &data[..]].concat());
    let found = eval("run");
    assert_eq!(found, eval(&out));
    let json: Value = serde_json::from_str(&found).unwrap();
    assert_eq!(json.as_object().unwrap().len(), 2);
    let by_t: Vec<f64> = json["image"]["by_t"].as_array().unwrap().iter().filter_map(Value::as_f64).collect();
    let mse = json["image"]["mse"].as_f64().unwrap();
    assert_eq!(by_t.len(), 10);
    assert!((by_t.iter().sum::<f64>() / 10.0 - mse).abs() < 1e-9 * mse);
    let (nats, bits) = (&json["text"]["nats_per_token"], &json["text"]["bits_per_byte"]);
    // Besides its bytes, the text has the ends of documents and the beginnings of images.
    assert!(bits.as_f64().unwrap() > nats.as_f64().unwrap() / std::f64::consts::LN_2);
}

#[test]
fn texts_are_measured_whole() {
    let folder = trained();
    let json = succeed(folder, &["eval", "text", "--data", "book.txt", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert!(json["image"]["mse"].is_null() && json["image"]["by_t"].is_null(), "{json}");
    let number = |key: &str| json["text"][key].as_f64().unwrap();
    let bits = number("nats_per_token") / std::f64::consts::LN_2;
    assert!((number("bits_per_byte") - bits).abs() < 1e-9 && bits > 1.0 && bits < 9.0, "{json}");
    fail(folder, &["eval", "text", "--data", "shapes"], 1, &["shapes", "no images", "hint: "]);
    fail(folder, &["eval", "text", "--data", "run/none.txt"], 1, &["run/none.txt"]);
}

#[test]
fn plans_are_exact() {
    let folder = scratch("plan");
    let json = succeed(&folder, &["plan", "--preset", "7b", "--batch", "1", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let number = |path: &str| json.pointer(path).and_then(Value::as_f64).unwrap();
    let parameters = number("/parameters");
    assert!((parameters / 6.74e9 - 1.0).abs() < 1e-3, "{parameters}");
    // bf16 weights, f32 gradients, two f32 moments and f32 master weights.
    for (part, each) in [("parameters", 2.0), ("gradients", 4.0), ("optimizer", 12.0), ("ema", 0.0)] {
        assert_eq!(number(&format!("/bytes/{part}")), each * parameters, "{part}");
    }
    let all = json["bytes"].as_object().unwrap().iter().filter(|(name, _)| *name != "total");
    assert_eq!(all.map(|(_, n)| n.as_f64().unwrap()).sum::<f64>(), number("/bytes/total"));
    let ratio = number("/flops/total") / (6.0 * parameters * 4096.0);
    assert!((1.0..1.4).contains(&ratio), "{ratio}");
    // Keys and values of 32 layers, 32 heads of 128, 4096 positions, bf16.
    let cache = number("/sampling/decode/cache_bytes_per_sequence");
    assert_eq!(cache, f64::from(1u32 << 31));

    let listing = succeed(&folder, &["plan", "--preset", "tiny", "--batch", "2", "--listing"]);
    assert!(
        listing.contains("attention") && listing.contains("adamw") && listing.contains("FLOP"),
        "{listing}"
    );
    assert!(succeed(&folder, &["plan", "--batch", "2"]).contains("total"));
    let blocks = ["plan", "--batch", "2", "--target", "h200", "--set", "train.recompute=blocks"];
    let blocks = succeed(&folder, &[&blocks[..], &["model.torch_dtype=bfloat16"]].concat());
    assert!(blocks.contains("again") && blocks.contains("on H200"), "{blocks}");
    fail(&folder, &["plan", "--batch", "2", "--set", "train.rowz=1"], 1, &["did you mean rows?"]);
}

#[test]
fn settings_that_fit_are_found() {
    let folder = scratch("fit");
    let fit = |bytes: &str, more: &[&str]| {
        let args = [&["plan", "--preset", "text-tiny", "--json", "--fit", bytes], more].concat();
        serde_json::from_str::<Value>(&succeed(&folder, &args)).unwrap()
    };
    let total = |json: &Value, i: usize| json["alternatives"][i]["bytes"]["total"].as_u64().unwrap();
    // Everything fits: nothing is given up, and the step is one micro-batch.
    let all = fit("1TiB", &["--set", "train.rows=2", "train.accumulation=3"]);
    assert_eq!(all["chosen"], 0);
    assert_eq!(all["set"], serde_json::json!(["train.rows=6", "train.accumulation=1"]));
    // Nothing smaller than the largest alternative that does.
    let tight = total(&all, 0) - 1;
    let json = fit(&tight.to_string(), &["--set", "train.rows=2", "train.accumulation=3"]);
    let chosen = json["chosen"].as_u64().unwrap() as usize;
    assert!(total(&json, chosen) <= tight && total(&json, chosen) > tight / 2);
    assert_eq!(json["alternatives"][chosen]["gradients"], "float32");
    // What it says is what `plan` says of the same settings.
    let words: Vec<&str> = json["set"].as_array().unwrap().iter().map(|w| w.as_str().unwrap()).collect();
    let rows = json["alternatives"][chosen]["rows"].to_string();
    let plan = ["plan", "--preset", "text-tiny", "--json", "--batch", &rows, "--set"];
    let plan = succeed(&folder, &[&plan[..], &words].concat());
    let plan: Value = serde_json::from_str(&plan).unwrap();
    assert_eq!(plan["bytes"], json["alternatives"][chosen]["bytes"]);
    assert_eq!(plan["flops"], json["alternatives"][chosen]["flops"]);
    // In words, and where nothing fits.
    let words = succeed(&folder, &["plan", "--preset", "text-tiny", "--fit", &tight.to_string()]);
    assert!(
        words.contains("to take") && words.contains("--set") || words.contains("the settings as they are")
    );
    fail(
        &folder,
        &["plan", "--preset", "text-tiny", "--fit", "1MB"],
        1,
        &["the least takes", "with --set", "hint: "],
    );
}

#[test]
fn settings_have_an_order() {
    let folder = scratch("settings");
    fs::write(folder.join("c.json"), r#"{"train": {"lr": 0.5, "steps": 7, "beta2": 0.5}}"#).unwrap();
    let args = "train --print-config --config c.json --set train.steps=8 train.lr=0.25 --steps 9";
    let printed = succeed(&folder, &args.split(' ').collect::<Vec<_>>());
    let json: Value = serde_json::from_str(&printed).unwrap();
    let train = &json["train"];
    assert_eq!((&train["beta2"], &train["lr"], &train["steps"]), (&0.5.into(), &0.25.into(), &9.into()));
    fs::write(folder.join("whole.json"), &printed).unwrap();
    assert_eq!(succeed(&folder, &["train", "--print-config", "--config", "whole.json"]), printed);
}

#[test]
fn a_closed_pipe_is_no_error() {
    let folder = scratch("pipe");
    let mut child = program(&folder, &["plan", "--preset", "7b", "--batch", "1", "--listing"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// Interrupted after its first step and resumed, a training ends with the same bits.
#[cfg(unix)]
#[test]
fn an_interrupted_training_is_resumed_exactly() {
    let folder = scratch("interrupted");
    let train = |out| [&["train", "--data", "shapes", "--steps", "100", "--out", out][..], &SMALL].concat();
    let mut child = program(&folder, &train("run")).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let mut said = Vec::new();
    for line in lines {
        if line.starts_with("step 1 of 100: ") {
            let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
            assert!(killed.success());
        }
        said.push(line);
    }
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said:?}");
    assert!(said.iter().any(|line| line.contains("press Ctrl-C again")), "{said:?}");
    assert!(said.iter().any(|line| line.contains("train --resume --out run")), "{said:?}");
    assert!(!folder.join("run/checkpoints/step-00000100").exists(), "{said:?}");
    succeed(&folder, &["inspect", "run"]);

    succeed(&folder, &["train", "--resume", "--out", "run"]);
    succeed(&folder, &train("whole"));
    for file in ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"] {
        let bytes =
            |run: &str| fs::read(folder.join(run).join("checkpoints/step-00000100").join(file)).unwrap();
        assert!(bytes("run") == bytes("whole"), "{file} differs");
    }
    // Another resumption finds nothing left to do.
    succeed(&folder, &["train", "--resume", "--out", "run"]);
}
