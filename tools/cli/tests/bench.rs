//! `transfusion bench` as a user runs it, without PyTorch: rows, tables, and what it says of wrong usage and of
//! an other side that is not there. Nothing timed is held to a figure.
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// A model that is measured in a moment.
const SMALL: &str = "--set model.hidden_size=32 model.intermediate_size=32 model.num_hidden_layers=3 \
     model.num_attention_heads=2 model.num_key_value_heads=2 model.head_dim=16 train.rows=2 train.positions=96";

/// As short as it gets.
const SHORT: &str = "--rounds 2 --seconds 0 --threads 1";

fn run(folder: &Path, args: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_transfusion"));
    command.arg("bench").args(args.split_whitespace()).current_dir(folder).stdin(Stdio::null());
    let out = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(!stderr.contains("panicked"), "{args}: {stderr}");
    out
}

fn succeed(folder: &Path, args: &str) -> String {
    let out = run(folder, args);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args}: {} {stderr}", out.status);
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn fail(folder: &Path, args: &str, code: i32, words: &[&str]) {
    let out = run(folder, args);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{args}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{args}: no {word:?} in {stderr}");
    }
}

fn rows(folder: &Path, args: &str) -> Vec<Value> {
    let text = succeed(folder, &format!("{args} --json"));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn positive(row: &Value, fields: &[&str]) {
    for field in fields {
        assert!(row[*field].as_f64().is_some_and(|x| x > 0.0), "no {field} in {row}");
    }
}

#[test]
fn a_step_is_a_row() {
    let folder = scratch("bench-step");
    for more in ["", "--dtype bf16", "--documents 2", "--preset text-tiny"] {
        let rows = rows(&folder, &format!("step --device cpu {more} {SHORT} {SMALL}"));
        let [row] = &rows[..] else { panic!("{rows:?}") };
        positive(row, &["ms", "tflops", "gbs", "roofline", "mfu", "rate"]);
        assert_eq!((&row["bench"], &row["what"]), (&"step".into(), &"training step".into()));
        assert_eq!(row["dtype"], if more.contains("bf16") { "bf16" } else { "f32" });
        let narrow = row["matmul"] == "bf16";
        let of = row["peak_of"].as_str().unwrap();
        assert!(of == "f32 multiply-adds" || narrow && of == "bf16 dot products", "{row}");
        assert!(row["shape"].as_str().unwrap().starts_with("2 x 96, ") && row["spread"].is_number());
        assert!(row["device"].as_str().is_some_and(|d| !d.is_empty()) && row["threads"] == 1);
        assert!(row["date"].as_str().unwrap().starts_with("20") && row["torch_ms"].is_null());
    }
    let single = "model.transfusion.matmul_precision=float32";
    let [row] = &rows(&folder, &format!("step --device cpu {SHORT} {SMALL} {single}"))[..] else { panic!() };
    assert_eq!((&row["matmul"], &row["peak_of"]), (&"f32".into(), &"f32 multiply-adds".into()));
    let table = succeed(&folder, &format!("step --device cpu {SHORT} {SMALL} --md"));
    assert!(
        table.contains("| what | preset | dtype | shape | ms |")
            && table.contains("| training step | tiny |")
    );
    let csv = succeed(&folder, &format!("step --device cpu {SHORT} {SMALL} --csv"));
    assert!(csv.starts_with("what,preset,") && csv.lines().count() == 2, "{csv}");
}

#[test]
fn sampling_is_text_images_and_a_cold_start() {
    let folder = scratch("bench-sample");
    let all = rows(&folder, &format!("sample --device cpu {SHORT} {SMALL}"));
    let names: Vec<&str> = all.iter().map(|r| r["what"].as_str().unwrap()).collect();
    assert_eq!(names, ["decode", "denoise", "cold start"]);
    all.iter().for_each(|row| positive(row, &["ms"]));
    all[..2].iter().for_each(|row| positive(row, &["rate", "gbs", "tflops"]));
    assert_eq!(all[0]["shape"], "1 x 78 tokens behind 16");
    assert_eq!(all[1]["shape"], "1 x 16 patches, guided");
    let text = rows(&folder, &format!("sample --preset text-tiny --batch 3 --device cpu {SHORT} {SMALL}"));
    assert_eq!(text.len(), 2);
    assert!(text[0]["shape"].as_str().unwrap().starts_with("3 x "));
    fail(
        &folder,
        &format!("sample --positions 18 --device cpu {SHORT}"),
        1,
        &["train.positions is 18", "19"],
    );
}

#[test]
fn ops_are_those_of_the_plans() {
    let folder = scratch("bench-ops");
    let all = rows(&folder, &format!("ops --device cpu {SHORT} {SMALL} train.ema=0.5"));
    let of = |program: &str, op: &str| {
        let is = |r: &&Value| r["program"] == program && r["what"] == op;
        all.iter().filter(is).collect::<Vec<_>>()
    };
    for program in ["loss", "update", "prefill", "decode", "commit", "denoise"] {
        assert!(all.iter().any(|r| r["program"] == program), "no {program}");
    }
    // Three layers are counted, though numbers come from two.
    assert_eq!(of("loss", "attention")[0]["count"], 3);
    assert_eq!(of("loss", "rmsnorm")[0]["count"], 7);
    assert_eq!(of("update", "update").len(), 1, "the optimiser as a whole");
    assert!(of("denoise", "sampler_update").len() == 1 && of("decode", "linear").len() > 3);
    all.iter().for_each(|row| positive(row, &["ms", "gbs", "count"]));
    of("loss", "linear").iter().for_each(|row| positive(row, &["tflops", "mfu"]));
    let some = rows(&folder, &format!("ops attention rmsnorm --device cpu {SHORT} {SMALL}"));
    assert!(
        some.iter().all(|r| ["attention", "rmsnorm"].contains(&r["what"].as_str().unwrap()))
            && some.len() >= 8
    );
    let squares = rows(&folder, &format!("ops --group squares --device cpu {SHORT} {SMALL}"));
    let names: Vec<&str> = squares.iter().map(|r| r["what"].as_str().unwrap()).collect();
    assert_eq!(names[..3], ["linear", "linear_dw", "linear_dx"]);
    fail(
        &folder,
        &format!("ops softmax --device cpu {SHORT} {SMALL}"),
        2,
        &["none of these ops", "--listing"],
    );
}

#[test]
fn scaling_varies_one_size_at_a_time() {
    let folder = scratch("bench-scaling");
    let all =
        rows(&folder, &format!("scaling --axis layers,documents --rounds 2 --seconds 0 --threads 1 {SMALL}"));
    let shapes: Vec<&str> = all.iter().map(|r| r["shape"].as_str().unwrap()).collect();
    assert_eq!(
        shapes,
        ["layers 1", "layers 2", "layers 4", "layers 8", "documents 1", "documents 2", "documents 4"]
    );
    all.iter().for_each(|row| positive(row, &["ms", "rate"]));
    let threads = "scaling --axis threads --rounds 2 --seconds 0 --threads 2 --set train.rows=1 train.positions=64 \
        model.num_hidden_layers=1";
    let threads = rows(&folder, threads);
    assert_eq!(threads.len(), 5);
    assert_eq!(threads[4]["shape"], "share of what multiply-adds gain");
    positive(&threads[4], &["rate"]);
}

#[test]
fn tables_are_made_of_rows_and_written_between_markers() {
    let folder = scratch("bench-table");
    let single = "model.transfusion.matmul_precision=float32";
    let rows = succeed(&folder, &format!("step --json --device cpu {SHORT} {SMALL} {single}"));
    fs::write(folder.join("rows.jsonl"), format!("# bench step\n{rows}")).unwrap();
    assert!(succeed(&folder, "table rows.jsonl").contains("| training step | tiny | f32 |"));
    fs::write(folder.join("page.md"), "A <!-- bench:step --> <!-- /bench --> B").unwrap();
    succeed(&folder, "table rows.jsonl --write page.md");
    let page = fs::read_to_string(folder.join("page.md")).unwrap();
    assert!(page.starts_with("A <!-- bench:step -->\n20") && page.contains("| training step |"), "{page}");
    assert!(page.ends_with("<!-- /bench --> B"), "{page}");
    fs::write(folder.join("bare.md"), "nothing").unwrap();
    fail(&folder, "table rows.jsonl --write bare.md", 1, &["bare.md", "<!-- bench:step -->"]);
    fs::write(folder.join("odd.jsonl"), "{\"bench\": 1}").unwrap();
    fail(&folder, "table odd.jsonl", 1, &["odd.jsonl: line 1", "hint: ", "--json"]);
    fail(&folder, "table nowhere.jsonl", 1, &["nowhere.jsonl", "cannot be read"]);
    fail(&folder, "table", 2, &["FILE"]);
}

#[test]
fn wrong_usage_and_an_absent_other_side() {
    let folder = scratch("bench-usage");
    for (args, word) in [
        ("", "step"),
        ("step --preset 7c", "text-tiny"),
        ("step --device tpu", "cuda:N"),
        ("step --device sim", "cuda:N"),
        ("step --rounds 1", "2.."),
        ("step --seconds=-1", "from 0 to 600"),
        ("step --dtype f16", "bf16"),
        ("step --against jax", "torch"),
        ("step --python python3", "--against"),
        ("step --variant eager", "--against"),
        ("step --json --csv", "--csv"),
        ("step --set train.rows", "KEY=VALUE"),
        ("ops --group norms", "rows"),
        ("scaling --axis depth", "layers"),
    ] {
        fail(&folder, args, 2, &[word]);
    }
    let absent = format!("step --device cpu --against torch --python /no/such/python {SHORT} {SMALL}");
    fail(&folder, &absent, 1, &["/no/such/python", "hint: --python names"]);
    let empty = format!("step --device cpu --against torch --python true {SHORT} {SMALL}");
    fail(&folder, &empty, 1, &["true ended during hello", "hint: --python names"]);
    fail(&folder, &format!("step --device cpu {SHORT} --set model.head_dim=7"), 1, &["head_dim 7"]);
    let help = succeed(&folder, "step --help");
    for word in
        ["--against", "--python", "--rounds", "--seconds", "--dtype", "--documents", "--variant", "--json"]
    {
        assert!(help.contains(word), "no {word} in {help}");
    }
}
