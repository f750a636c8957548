//! Against the references in Python (`reference/README.md`): the loss and every gradient, schedules and
//! samplers, and Hugging Face folders.
use serde_json::{Value, json};
use std::path::Path;
use transfusion::{
    config::{ModelConfig, Objective},
    diffusion::{self, Sampler, evaluations},
    engine::{Engine, Program, cpu},
    hf,
    model::{self, Capacity, Extend, LossOptions, NoiseSource},
};
use transfusion_core::{
    checkpoint::weights::{self, Weights},
    graph::Graph,
    op::Kind,
    ops::{SamplerInputs, SamplerStep},
    tensor::{DType, Shape, Spec, ViewMut},
};
use transfusion_tests::{Machine, Scratch, furthest, golden, mixed, random_weights, relative, tensor};

/// The reference's configuration in our words.
fn reference_config(mut of: Value) -> ModelConfig {
    let own = of["transfusion"].take();
    of["max_position_embeddings"] = json!(64);
    of["transfusion"] = json!({
        "boi_token_id": 66, "eoi_token_id": 67, "pad_token_id": 68, "qk_norm": own["qk_norm"],
        "image": {
            "size": own["image_size"], "channels": own["channels"], "patch_size": own["patch_size"],
            "positions": own["patch_positions"], "objective": "epsilon", "lambda": own["lambda"],
        },
    });
    let config: ModelConfig = serde_json::from_value(of).unwrap();
    assert_eq!(config.image().unwrap().patch_width() as u64, own["patch_width"].as_u64().unwrap());
    config
}

/// The metadata entry `configs` of the golden file.
fn reference_configs(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    serde_json::from_str(header["__metadata__"]["configs"].as_str().unwrap()).unwrap()
}

/// Every weight of a model from its external tensors.
fn internal(config: &ModelConfig, external: impl Fn(&str) -> Vec<f64>) -> Vec<(String, Vec<f32>)> {
    let all = hf::externals(config);
    let gathered = |w: &model::Weight| {
        let mut values = vec![0.0; w.elements()];
        for e in all.iter().filter(|e| e.internal == w.name) {
            e.put(&external(&e.name).iter().map(|&x| x as f32).collect::<Vec<_>>(), &mut values);
        }
        (w.name.clone(), values)
    };
    model::weights(config).iter().map(gathered).collect()
}

#[test]
fn loss_and_every_gradient_agree_with_pytorch() {
    let path = golden("transfusion.safetensors");
    let (file, configs) = (Weights::open(&path).unwrap(), reference_configs(&path));
    let mut worst: (f64, String) = (0.0, String::new());
    for variant in ["a", "b"] {
        let config = reference_config(configs[variant].clone());
        let wanted = |group: &str, name: &str| tensor(&file, &format!("{variant}.{group}.{name}"));
        let dims = |name: &str| file.spec(&format!("{variant}.input.{name}")).unwrap().shape.dims().to_vec();
        let capacity = Capacity {
            rows: dims("tokens")[0],
            positions: dims("tokens")[1],
            text_rows: dims("text_rows")[0],
            images: dims("images")[0],
        };
        let options = LossOptions { noise: NoiseSource::Given, inspect: true, ..LossOptions::TRAIN };
        let mut machine = Machine::new();
        let program = machine.open(&model::loss_graph(&config, capacity, options).unwrap());
        machine.put_weights(&program, &internal(&config, |name| wanted("param", name)));
        for (ours, theirs) in [("text_count", "count_text"), ("image_count", "count_images")] {
            machine.set(&program, ours, wanted("input", theirs));
        }
        for name in ["tokens", "positions", "row_start", "row_end", "text_rows", "targets", "image_rows"] {
            machine.set(&program, name, wanted("input", name));
        }
        for name in ["images", "noise", "times", "coefficients", "image_weights"] {
            machine.set(&program, name, wanted("input", name));
        }
        machine.run(&program);
        let mut compare = |what: &str, have: &[f64], want: &[f64]| {
            let error = relative(have, want);
            assert!(error <= 1e-5, "{variant} {what}: {error:.2e}");
            if error > worst.0 {
                worst = (error, format!("{variant} {what}"));
            }
        };
        for (ours, theirs) in [
            ("loss", "loss"),
            ("loss_text", "loss_text"),
            ("loss_image", "loss_image"),
            ("image_errors", "image_mse"),
        ] {
            compare(ours, &machine.output(&program, ours), &wanted("output", theirs));
        }
        // A slot without a picture predicts nothing there, and the output layer's bias here.
        let mut prediction = machine.output(&program, "prediction");
        let numel = prediction.len() / capacity.images;
        for (weight, values) in wanted("input", "image_weights").iter().zip(prediction.chunks_mut(numel)) {
            values.iter_mut().for_each(|x| *x = if *weight == 0.0 { 0.0 } else { *x });
        }
        compare("prediction", &prediction, &wanted("output", "prediction"));
        for e in hf::externals(&config) {
            let ours: Vec<f32> = machine.state(Kind::Grad, &e.internal).iter().map(|&x| x as f32).collect();
            let ours: Vec<f64> = e.take(&ours).map(f64::from).collect();
            compare(&e.name, &ours, &wanted("grad", &e.name));
        }
    }
    println!("against PyTorch: at most {:.2e} relative, in {}", worst.0, worst.1);
}

fn numbers(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn schedule() -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden("schedule.json")).unwrap()).unwrap()
}

#[test]
fn schedules_agree_with_the_reference() {
    let golden = schedule();
    for (t, want) in golden["alpha_bar"].as_object().unwrap() {
        let have = diffusion::alpha_bar(t.parse().unwrap());
        assert!((have - want.as_f64().unwrap()).abs() <= 1e-14, "alpha_bar({t}): {have} {want}");
    }
    for (name, of) in golden["coefficients"].as_object().unwrap() {
        let objective: Objective = serde_json::from_value(json!(name)).unwrap();
        for (t, want) in of.as_object().unwrap() {
            let have = diffusion::coefficients(objective, t.parse().unwrap()).map(f64::from);
            assert!(furthest(&have, &numbers(want)) <= 6e-8, "{name} at {t}: {have:?} {want}");
        }
    }
}

/// One step on a device: images `x`, memory, prediction -> next images and memory. Noise enters
/// through the memory, with the noise's coefficient.
fn on_device(step: SamplerStep, x: &[f64], memory: &[f64], prediction: &[f64]) -> [Vec<f64>; 2] {
    let (mut g, shape) = (Graph::new(), [1, x.len()]);
    let inputs = SamplerInputs {
        x: g.state(Kind::Cache, "x", shape, DType::F32),
        memory: g.state(Kind::Cache, "memory", shape, DType::F32),
        prediction: g.input("prediction", shape, DType::F32),
        steps: g.input("steps", [1, SamplerStep::WIDTH], DType::F32),
        seed: g.input("seed", [2], DType::I32),
        keys: g.input("keys", [1, 3], DType::I32),
    };
    g.sampler_update(inputs);
    let mut machine = Machine::new();
    let program = machine.open(&g);
    machine.put(&program, Kind::Cache, "x", x.iter().copied());
    machine.put(&program, Kind::Cache, "memory", memory.iter().copied());
    machine.set(&program, "prediction", prediction.iter().copied());
    machine.set(&program, "steps", step.row());
    machine.run(&program);
    ["x", "memory"].map(|name| machine.state(Kind::Cache, name))
}

#[test]
fn sampler_steps_agree_with_the_reference() {
    let golden = schedule();
    let [x0, eps, z, v, v_next] = ["x0", "eps", "z", "v", "v_next"].map(|name| numbers(&golden[name]));
    let nothing = vec![0.0; x0.len()];
    let mut worst: f64 = 0.0;
    let mut compare = |what: String, have: &[f64], want: &[f64], bound: f64| {
        let error = furthest(have, want);
        assert!(error <= bound, "{what}: off by {error:.2e}");
        worst = worst.max(error);
    };
    for case in golden["steps"].as_array().unwrap() {
        let [t, s] = ["t", "s"].map(|name| case[name].as_f64().unwrap());
        let xt = numbers(&case["x_t"]);
        let first = |sampler, objective| {
            evaluations(sampler, objective, (t / (t - s)).round() as usize, 1.0, 100.0, t as f32)
        };
        for objective in [Objective::Epsilon, Objective::X0, Objective::V] {
            let [.., c, d] = diffusion::coefficients(objective, t as f32).map(f64::from);
            let prediction: Vec<f64> = x0.iter().zip(&eps).map(|(x, e)| c * x + d * e).collect();
            // From noise predictions the clean image is x / a, and a is 5e-5 at the last step.
            let bound = if objective == Objective::Epsilon && t == 1000.0 { 1e-3 } else { 1e-6 };
            let step = first(Sampler::Ddim, objective)[0].step;
            let [have, _] = on_device(step, &xt, &nothing, &prediction);
            compare(format!("ddim {objective:?} {t}"), &have, &numbers(&case["ddim"]), bound);
            let mut step = first(Sampler::Ddpm, objective)[0].step;
            step.next.swap(3, 4);
            let [have, _] = on_device(step, &xt, &z, &prediction);
            compare(format!("ancestral {objective:?} {t}"), &have, &numbers(&case["ancestral"]), bound);
        }
        for sampler in [Sampler::Euler, Sampler::Ddim] {
            let [have, _] = on_device(first(sampler, Objective::Flow)[0].step, &xt, &nothing, &v);
            compare(format!("{sampler:?} {t}"), &have, &numbers(&case["euler"]), 1e-6);
        }
        let heun = first(Sampler::Heun, Objective::Flow);
        let [euler, memory] = on_device(heun[0].step, &xt, &nothing, &v);
        compare(format!("heun's first {t}"), &euler, &numbers(&case["euler"]), 1e-6);
        if s > 0.0 {
            assert_eq!(f64::from(heun[1].t), s);
            let [have, _] = on_device(heun[1].step, &euler, &memory, &v_next);
            compare(format!("heun {t}"), &have, &numbers(&case["heun"]), 1e-6);
        }
    }
    println!("sampler steps: at most {worst:.2e} off");
}

/// Logits after every token: the first `prefix` at once, the others one by one.
fn logits(engine: &mut Engine, tokens: &[i32], prefix: usize) -> Vec<f64> {
    let vocabulary = engine.config().vocab_size;
    let mut all = Vec::new();
    let mut done = 0;
    while done < tokens.len() {
        let n = if done == 0 { prefix } else { 1 };
        let extend = Extend { rows: 1, positions: n, slots: 1, capacity: tokens.len(), ema: false };
        let plan = engine.open(Program::Text(extend)).unwrap();
        let at: Vec<i32> = (done..done + n).map(|i| i as i32).collect();
        let end: Vec<i32> = at.iter().map(|i| i + 1).collect();
        engine.ints(plan, "tokens", &tokens[done..done + n]).unwrap();
        engine.ints(plan, "positions", &at).unwrap();
        engine.ints(plan, "row_end", &end).unwrap();
        engine.ints(plan, "slots", &[0]).unwrap();
        engine.ints(plan, "last", &[n as i32 - 1]).unwrap();
        engine.run(plan).unwrap();
        let mut row = vec![0.0; vocabulary];
        engine.output(plan, "logits", &mut row).unwrap();
        all.extend(row.iter().copied().map(f64::from));
        done += n;
    }
    all
}

#[test]
fn hugging_face_folders_give_the_logits_of_transformers() {
    for name in ["untied", "tied"] {
        let folder = golden("hf_llama").join(name);
        let expected = Weights::open(&folder.join("expected.safetensors")).unwrap();
        let tokens: Vec<i32> = tensor(&expected, "tokens").iter().map(|&t| t as i32).collect();
        let want = tensor(&expected, "logits");
        let mut engine = hf::import(&folder, cpu(2).unwrap()).unwrap();
        let vocabulary = engine.config().vocab_size;
        for prefix in 1..=tokens.len() {
            let have = logits(&mut engine, &tokens, prefix);
            let error = furthest(&have, &want[(prefix - 1) * vocabulary..]);
            assert!(error <= 1e-4, "{name} after {prefix}: {error:.2e}");
            if prefix == 1 {
                println!("{name}: logits at most {error:.2e} from transformers'");
            }
        }
    }
}

#[test]
fn an_imported_folder_is_exported_exactly() {
    let scratch = Scratch::new("export");
    for name in ["untied", "tied"] {
        let (from, to) = (golden("hf_llama").join(name), scratch.0.join(name));
        let mut engine = hf::import(&from, cpu(1).unwrap()).unwrap();
        hf::export(&mut engine, &to).unwrap();
        let [from, to] = [from, to].map(|f| Weights::open(&f).unwrap());
        assert!(from.names().eq(to.names()));
        for tensor in from.names() {
            let [a, b] = [&from, &to].map(|f| f.read(tensor).unwrap());
            assert_eq!(a.view().bytes(), b.view().bytes(), "{name} {tensor}");
            assert_eq!(from.spec(tensor).unwrap(), to.spec(tensor).unwrap());
        }
    }
}

/// A model with everything goes out and comes back with the same weights and the same logits.
#[test]
fn an_exported_model_comes_back() {
    let scratch = Scratch::new("round-trip");
    let mut engine = Engine::new(mixed(), cpu(2).unwrap()).unwrap();
    for (name, values) in random_weights(&mixed(), 3) {
        engine.write_weight(Kind::Param, &name, &values).unwrap();
    }
    let folder = scratch.0.join("exported");
    hf::export(&mut engine, &folder).unwrap();
    let mut again = hf::import(&folder, cpu(2).unwrap()).unwrap();
    for w in engine.weights().to_vec() {
        let [a, b] = [&mut engine, &mut again].map(|e| e.read_weight(Kind::Param, &w.name).unwrap());
        assert_eq!(a, b, "{}", w.name);
    }
    let tokens = [256, 72, 105, 0, 255, 257];
    assert_eq!(logits(&mut engine, &tokens, 6), logits(&mut again, &tokens, 6));
    assert!(hf::export(&mut engine, &folder).unwrap_err().to_string().contains("never overwritten"));
}

/// Run by hand: leaves a folder and logits for `reference/hf_llama.py check` in the folder that
/// TRANSFUSION_EXPORT names.
#[test]
fn leaves_an_export_for_transformers() {
    let Some(at) = std::env::var_os("TRANSFUSION_EXPORT").map(std::path::PathBuf::from) else {
        println!("TRANSFUSION_EXPORT is not set: no folders are left for transformers");
        return;
    };
    for qk_norm in [false, true] {
        let mut config = mixed();
        config.transfusion.as_mut().unwrap().qk_norm = qk_norm;
        let mut engine = Engine::new(config.clone(), cpu(2).unwrap()).unwrap();
        for (name, values) in random_weights(&config, 3) {
            engine.write_weight(Kind::Param, &name, &values).unwrap();
        }
        let name = if qk_norm { "qwen3" } else { "llama" };
        hf::export(&mut engine, &at.join(name)).unwrap();
        let tokens = [256, 72, 105, 0, 255, 33, 105, 72, 257];
        let have = logits(&mut engine, &tokens, 1);
        let shape: Shape = [tokens.len(), config.vocab_size].into();
        let specs =
            [("tokens", Spec::new([tokens.len()], DType::I32)), ("logits", Spec::new(shape, DType::F32))];
        weights::write(&at.join(format!("{name}.safetensors")), &specs, |_, into| {
            match into {
                ViewMut::I32(to) => to.copy_from_slice(&tokens),
                ViewMut::F32(to) => to.iter_mut().zip(&have).for_each(|(to, x)| *to = *x as f32),
                _ => {}
            }
            Ok(())
        })
        .unwrap();
    }
}
