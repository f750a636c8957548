//! `transfusion kernels` as an experimenter runs it. Needs no GPU.
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};
use transfusion::picture::{Limits, Picture};

const SCALE: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry scale(.param .u64 y, .param .u64 x, .param .f32 a, .param .u32 n) {
    .reg .pred %p<2>;
    .reg .b32 %r<6>;
    .reg .f32 %f<4>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [y];
    ld.param.u64 %rd2, [x];
    ld.param.f32 %f1, [a];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra DONE;
    cvta.to.global.u64 %rd3, %rd1;
    cvta.to.global.u64 %rd4, %rd2;
    mul.wide.u32 %rd5, %r5, 4;
    add.s64 %rd6, %rd4, %rd5;
    add.s64 %rd7, %rd3, %rd5;
    ld.global.f32 %f2, [%rd6];
    mul.f32 %f3, %f2, %f1;
    st.global.f32 [%rd7], %f3;
DONE:
    ret;
}
";

/// A folder of its own with the kernel and 1000 numbers.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels").join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("scale.ptx"), SCALE).unwrap();
    let x: Vec<u8> = (0..1000).flat_map(|i| (i as f32).to_le_bytes()).collect();
    fs::write(folder.join("x.bin"), x).unwrap();
    folder
}

fn run(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_transfusion"));
    let out = command.arg("kernels").args(args).current_dir(folder).stdin(Stdio::null()).output().unwrap();
    assert!(!text(&out.stderr).contains("panicked"), "{args:?}: {}", text(&out.stderr));
    out
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Ends with `code`, and stderr holds every one of `words`.
fn fail(folder: &Path, args: &[&str], code: i32, words: &[&str]) {
    let out = run(folder, args);
    let stderr = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{args:?}: no {word:?} in {stderr}");
    }
}

const LAUNCH: [&str; 7] = ["sim", "scale.ptx", "scale", "--grid", "4", "--block", "256"];

#[test]
fn a_kernel_runs_on_arrays_of_files() {
    let folder = folder("runs");
    let args = [&LAUNCH[..], &["out:y.bin:4000", "in:x.bin", "f32:2", "u32:1000"]].concat();
    let out = run(&folder, &args);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("global bytes requested"), "{}", text(&out.stdout));
    let y = fs::read(folder.join("y.bin")).unwrap();
    let y: Vec<f32> = y.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert!(y.iter().enumerate().all(|(i, y)| *y == 2.0 * i as f32));
    // What is there is not overwritten.
    fs::write(folder.join("y.bin"), "mine").unwrap();
    fail(&folder, &args, 1, &["y.bin: the file exists and is not overwritten", "hint: "]);
    assert_eq!(fs::read(folder.join("y.bin")).unwrap(), b"mine");
}

#[test]
fn faults_are_named_by_line_and_operand() {
    let folder = folder("faults");
    let args = [&LAUNCH[..], &["--quiet", "out:y.bin:4000", "in:x.bin", "f32:2", "u32:1001"]].concat();
    let said =
        ["scale.ptx:25: out of bounds", "`argument 1` byte 4000", "scale.ptx:27: out of bounds", "2 faults"];
    fail(&folder, &args, 1, &said);
}

#[test]
fn nonsense_is_refused_in_words() {
    let folder = folder("nonsense");
    let cases: [(&[&str], i32, &[&str]); 8] = [
        (&["sim", "scale.ptx", "scal"], 1, &["no kernel `scal`; the module has scale"]),
        (&["sim", "scale.ptx", "scale", "in:x.bin"], 1, &["takes 4 arguments, 1 given"]),
        (&["sim", "scale.ptx", "scale", "foo:3"], 2, &["`foo:3` is no argument"]),
        (&["sim", "scale.ptx", "scale", "out:y.bin"], 2, &["out:FILE:BYTES"]),
        (&["sim", "x.bin", "scale"], 1, &["x.bin: "]),
        (&["sim", "none.ptx", "scale"], 1, &["none.ptx: "]),
        (&["check", "rmsnor"], 2, &["there is no op rmsnor", "rmsnorm"]),
        (&["check", "rmsnorm", "--device", "gpu"], 2, &["sim, cuda or cuda:N"]),
    ];
    for (args, code, words) in cases {
        fail(&folder, args, code, words);
    }
    fs::write(folder.join("bad.ptx"), SCALE.replace("mul.f32", "mulx.f32")).unwrap();
    fail(&folder, &["sim", "bad.ptx", "scale"], 1, &["bad.ptx:26: unsupported instruction `mulx.f32`"]);
}

#[test]
fn shipped_kernels_are_listed_and_agree() {
    let folder = folder("shipped");
    let out = run(&folder, &["list", "--json"]);
    let list: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let named = |name: &str| list.as_array().unwrap().iter().any(|k| k["entry"] == name);
    assert!(named("rmsnorm_fwd_narrow_bf16") && named("linear_fwd_64x64_bf16"));
    let out = run(&folder, &["check", "rmsnorm"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("rmsnorm_bwd"), "{}", text(&out.stdout));
}

/// A changed kernel takes the place of the shipped one; a wrong one is refused before it is timed.
#[test]
fn a_changed_kernel_is_tried_in_place_of_the_shipped_one() {
    let folder = folder("changed");
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels-cu").canonicalize().unwrap();
    let include = tree.to_str().unwrap();
    let source = fs::read_to_string(tree.join("rmsnorm.cu")).unwrap();
    let try_out = |name: &str, from: &str, to: &str| {
        assert!(source.contains(from), "{from}");
        fs::write(folder.join(name), source.replace(from, to)).unwrap();
        run(&folder, &["bench", "rmsnorm", "--float", "f32", "--cu", name, "-I", include])
    };
    let out = try_out("same.cu", "float rstd = 1.0f", "float rstd = 1.00f");
    if text(&out.stderr).contains("NVRTC") && std::env::var_os("REQUIRE_NVRTC").is_none() {
        eprintln!("left out: there is no NVRTC");
        return;
    }
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("rmsnorm_fwd_narrow_f32"), "{}", text(&out.stdout));
    let out = try_out("wrong.cu", "float rstd = 1.0f", "float rstd = 1.01f");
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("a kernel is wrong and is not timed"), "{}", text(&out.stderr));
    let out = try_out("broken.cu", "float rstd = 1.0f", "float rstd = one");
    assert!(text(&out.stderr).contains("\"one\" is undefined"), "{}", text(&out.stderr));
}

/// The launches of every preset are shown, and their work is that of its plan.
#[test]
fn every_preset_is_explained_without_its_memory() {
    let folder = folder("explained");
    let json = |args: &[&str]| -> serde_json::Value {
        let out = run(&folder, args);
        assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    };
    for preset in ["tiny", "text-tiny", "0.16b", "0.37b", "0.76b", "1.4b", "7b"] {
        for target in ["A100", "H100", "H200"] {
            let page = json(&["explain", "--preset", preset, "--batch", "1", "--target", target, "--json"]);
            assert_eq!(page["target"]["name"], target);
            for program in page["programs"].as_array().unwrap() {
                let rows = program["rows"].as_array().unwrap();
                let sum = |of: &dyn Fn(&serde_json::Value) -> f64| -> f64 {
                    rows.iter().map(|r| r["count"].as_f64().unwrap() * of(r)).sum()
                };
                let total = |key: &str| program["total"][key].as_f64().unwrap();
                assert_eq!(sum(&|r| r["flops"].as_f64().unwrap()), total("flops"));
                assert_eq!(sum(&|r| r["launches"].as_array().unwrap().len() as f64), total("launches"));
                let seconds = sum(&|r| r["seconds"].as_f64().unwrap());
                assert!(seconds > 0.0 && (seconds / total("seconds") - 1.0).abs() < 1e-9);
            }
        }
    }
    for program in ["loss", "update", "eval", "prefill", "decode", "commit", "denoise"] {
        let page = json(&["explain", "--batch", "2", "--program", program, "--json"]);
        assert_eq!(page["programs"][0]["name"], program);
    }
    let page = json(&["explain", "--preset", "7b", "--batch", "1", "--program", "loss", "--json"]);
    let plan = Command::new(env!("CARGO_BIN_EXE_transfusion"))
        .args(["plan", "--preset", "7b", "--batch", "1", "--json"])
        .output()
        .unwrap();
    let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).unwrap();
    assert_eq!(page["programs"][0]["total"]["flops"], plan["flops"]["loss"]);
    fail(
        &folder,
        &["explain", "--preset", "text-tiny", "--program", "denoise"],
        2,
        &["text-tiny has no images"],
    );
}

/// Two layers of width 64, with images.
const SMALL: &str = "--batch 1 --positions 64 --set model.hidden_size=64 model.intermediate_size=96 \
     model.num_hidden_layers=2 model.num_attention_heads=2 model.num_key_value_heads=2 model.head_dim=32";

/// Every step of a real training step and of what sampling replays agrees with the CPU, and a wrong kernel is
/// named where it first runs.
#[test]
fn a_wrong_kernel_is_found_inside_a_model() {
    let folder = folder("bisected");
    let bisect = |more: &[&str]| {
        run(&folder, &[&["bisect"], &SMALL.split_whitespace().collect::<Vec<_>>()[..], more].concat())
    };
    let agreed = |program: &str| -> usize {
        let out = bisect(&["--program", program]);
        assert!(out.status.success(), "{program}: {}", text(&out.stderr));
        let said = text(&out.stdout);
        assert!(said.starts_with("all ") && said.ends_with(" steps agree\n"), "{program}: {said}");
        said.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    assert!(agreed("train") > 90);
    let parts: usize = ["prefill", "decode", "commit", "denoise"].map(agreed).iter().sum();
    assert_eq!(agreed("sample"), parts);
    assert!(agreed("eval") < agreed("loss"));
    let case = ["bisect", "--case", "rmsnorm/9x8", "--device", "sim"];
    assert!(text(&run(&folder, &case).stdout).ends_with(" steps agree\n"));
    fail(&folder, &["bisect", "--case", "rmsnorm/9x9"], 2, &["no case rmsnorm/9x9", "rmsnorm/9x8"]);
    fail(&folder, &["bisect", "--case", "rmsnor/9x8"], 2, &["there is no op rmsnor", "rmsnorm"]);
    fail(
        &folder,
        &["bisect", "--preset", "0.16b", "--batch", "1"],
        1,
        &["model.transfusion.image.channels=3"],
    );
    fail(&folder, &["bisect", "--case", "rmsnorm/9x8", "--program", "decode"], 2, &["--program"]);
    fail(
        &folder,
        &["bisect", "--preset", "text-tiny", "--program", "denoise"],
        2,
        &["text-tiny has no images"],
    );
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels-cu").canonicalize().unwrap();
    for (file, right, wrong, program, found) in [
        ("swiglu.cu", "s, 1.0f)", "s, 1.1f)", "train", ["of loss (", "silu_bwd by silu_bwd_bf16"]),
        (
            "sampler_update.cu",
            "plus(without, guidance",
            "plus(with, guidance",
            "sample",
            ["of denoise (", "sampler_update by sampler_update_f32"],
        ),
    ] {
        let source = fs::read_to_string(tree.join(file)).unwrap();
        assert!(source.contains(right), "{right}");
        fs::write(folder.join(file), source.replace(right, wrong)).unwrap();
        let out = bisect(&["--program", program, "--cu", file, "-I", tree.to_str().unwrap()]);
        let said = text(&out.stderr);
        if said.contains("NVRTC") && std::env::var_os("REQUIRE_NVRTC").is_none() {
            eprintln!("left out: there is no NVRTC");
            return;
        }
        assert_eq!(out.status.code(), Some(1), "{said}");
        for word in ["steps agree; step ", found[0], "does not: ", found[1], "of the tolerance"] {
            assert!(said.contains(word), "no {word:?} in {said}");
        }
    }
}

/// What kernels of rows and elements move in a real step is within 1.05 of the least possible, with as many rows
/// for each SM as there are in training, or in sampling of many; nothing meets a bank conflict.
#[test]
fn kernels_move_little_more_than_they_must() {
    let folder = folder("traffic");
    let held = |args: &str, least: f64| -> usize {
        let model = "--positions 512 --json --set model.hidden_size=512 model.intermediate_size=512 \
             model.num_hidden_layers=1 model.num_attention_heads=8 model.num_key_value_heads=8 \
             model.head_dim=64 train.ema=0.9";
        let out = run(&folder, &format!("traffic {args} {model}").split_whitespace().collect::<Vec<_>>());
        assert!(out.status.success(), "{}", text(&out.stderr));
        let rows: Vec<serde_json::Value> = serde_json::from_slice(&out.stdout).unwrap();
        rows.iter().filter(|row| moves_little(row, least)).count()
    };
    assert!(held("--batch 2 --sms 2", 20e3) >= 29);
    assert!(held("--batch 16 --sms 1 --program denoise", 60e3) >= 14);
    assert!(held("--batch 8 --sms 1 --program prefill", 60e3) >= 9);
}

/// What tiles of products share, each asks for again; but none touches more than its operands, in either kind of kernels.
#[test]
fn products_touch_their_operands_alone() {
    let folder = folder("touched");
    let model = "--program loss --batch 1 --positions 512 --sms 4 --json --set model.hidden_size=512 \
         model.intermediate_size=512 model.num_hidden_layers=1 model.num_attention_heads=8 \
         model.num_key_value_heads=8 model.head_dim=64";
    for target in ["A100", "H200"] {
        let args = format!("traffic --target {target} {model}");
        let out = run(&folder, &args.split_whitespace().collect::<Vec<_>>());
        assert!(out.status.success(), "{}", text(&out.stderr));
        let rows: Vec<serde_json::Value> = serde_json::from_slice(&out.stdout).unwrap();
        // A depth that is split leaves parts, and few rows fill no sectors.
        let product = |row: &&serde_json::Value| {
            let (op, kernels) = (row["op"].as_str().unwrap(), row["kernels"].as_object().unwrap());
            op.starts_with("linear") && kernels.len() == 1 && row["least"].as_u64().unwrap() >= 100_000
        };
        let held = rows.iter().filter(product).map(|row| {
            let kernel = row["kernels"].as_object().unwrap().values().next().unwrap();
            let [touched, moved] = ["touched", "moved"].map(|key| kernel[key].as_f64().unwrap());
            let least = row["least"].as_f64().unwrap();
            assert!((0.99 * least..=1.01 * least).contains(&touched) && touched <= moved, "{row}");
        });
        assert!(held.count() >= 10, "{target}");
    }
}

/// Whether a row of the table is of a kernel of rows or elements that has to move `least` bytes in a step. Then it
/// moves little more; what is smaller fills no sectors, and products read their operands tile by tile.
fn moves_little(row: &serde_json::Value, least: f64) -> bool {
    let number = |v: &serde_json::Value| v.as_f64().unwrap();
    let kernels: Vec<_> = row["kernels"].as_object().unwrap().values().collect();
    let sum = |key: &str| kernels.iter().map(|k| number(&k[key])).sum::<f64>();
    assert_eq!(sum("conflicts"), 0.0, "{row}");
    let all = number(&row["least"]);
    let held = sum("tensor_share") == 0.0 && row["op"] != "linear" && all / number(&row["steps"]) >= least;
    assert!(!held || sum("moved") <= 1.05 * all, "{row}");
    held
}

/// The whole model, on the kernels that a GPU would run: fifty steps of a bf16 model of two layers follow the CPU,
/// and the picture that either device draws from the trained weights is the same.
#[test]
fn a_small_model_trains_and_samples_on_the_simulator_as_on_the_cpu() {
    let folder = folder("model");
    let run = |device: &str, words: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_transfusion"));
        command.args(words.split_whitespace()).args(["--device", device]);
        let out = command.current_dir(&folder).stdin(Stdio::null()).output().unwrap();
        assert!(out.status.success(), "{device}: {}", text(&out.stderr));
    };
    let losses = |device: &str| -> Vec<f64> {
        let settings = "train --data shapes --steps 50 --set model.hidden_size=64 model.intermediate_size=96 \
             model.num_hidden_layers=2 model.num_attention_heads=2 model.num_key_value_heads=2 model.head_dim=32 \
             model.torch_dtype=bfloat16 train.rows=1 train.positions=64 output.log_every=1 \
             output.validate_every=1000 output.sample_every=1000";
        run(device, &format!("{settings} --out {device}"));
        let metrics = fs::read_to_string(folder.join(device).join("metrics.jsonl")).unwrap();
        let records = metrics.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
        records.filter_map(|r| r["grad_norm"].as_f64().and(r["loss"].as_f64())).collect()
    };
    let (sim, cpu) = (losses("sim"), losses("cpu"));
    assert_eq!((sim.len(), cpu.len()), (50, 50));
    assert!(cpu[49] < 0.5 * cpu[0], "nothing was learnt: {cpu:?}");
    for (step, (sim, cpu)) in sim.iter().zip(&cpu).enumerate() {
        assert!((sim - cpu).abs() <= 0.02, "step {}: {sim} on the simulator, {cpu} on the CPU", step + 1);
    }

    let picture = |device: &str| {
        let words = "sample cpu --to image --steps 10 --sampler ddim --cfg 3 --seed 3 --prompt circle";
        run(device, &format!("{words} --out pictures-{device}"));
        let file = folder.join(format!("pictures-{device}")).join("sample-000.png");
        Picture::load(&file, &Limits::default()).unwrap()
    };
    let (sim, cpu) = (picture("sim"), picture("cpu"));
    assert!(cpu.rgb().iter().max() > cpu.rgb().iter().min(), "the picture is blank");
    let squares = sim.rgb().iter().zip(cpu.rgb()).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    let mse = squares.sum::<f64>() / cpu.rgb().len() as f64;
    let psnr = 10.0 * (255.0 * 255.0 / mse).log10();
    assert!(psnr >= 30.0, "{psnr:.1} dB between the pictures of the devices");
}
