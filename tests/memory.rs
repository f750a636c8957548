//! What a training step holds in memory: recomputation, gradients and moments in bf16, and what becomes of the
//! numbers.
use transfusion::{
    batch::Batch,
    config::{Float, ModelConfig},
    engine::{Engine, Program, cpu},
    footprint::{Footprint, Step},
    model::{self, Capacity, LossOptions, Recompute},
    run::RunConfig,
    train::{TrainOptions, Trainer},
};
use transfusion_core::{checkpoint::Checkpoint, device::Device, op::Kind, plan::Plan};
use transfusion_ptxsim::{SimDevice, SimOptions};
use transfusion_tests::{
    Machine, Scratch, bits, document, documents, file_bits, mixed, pack, random_weights,
};

const CAPACITY: Capacity = Capacity { rows: 2, positions: 96, text_rows: 80, images: 7 };
const WAYS: [Recompute; 3] = [Recompute::None, Recompute::Cheap, Recompute::Blocks];

/// A small model, stored as `dtype`.
fn stored(dtype: &str, qk_norm: bool) -> ModelConfig {
    let mut config = ModelConfig { torch_dtype: dtype.into(), num_hidden_layers: 3, ..mixed() };
    config.transfusion.as_mut().unwrap().qk_norm = qk_norm;
    config
}

fn plan(config: &ModelConfig, recompute: Recompute) -> Plan {
    let options = LossOptions { recompute, ..LossOptions::TRAIN };
    Plan::new(&model::loss_graph(config, CAPACITY, options).unwrap()).unwrap()
}

#[test]
fn recomputation_changes_no_bit_of_loss_and_gradients() {
    for (dtype, qk_norm) in [("float32", true), ("float32", false), ("bfloat16", true), ("bfloat16", false)] {
        let config = stored(dtype, qk_norm);
        let batch = pack(&config, CAPACITY, documents());
        let weights = random_weights(&config, 1);
        let gradients = WAYS.map(|recompute| {
            let mut machine = Machine::new();
            let mut all = Vec::new();
            for begins in [true, false] {
                let options = LossOptions { recompute, begins, ..LossOptions::TRAIN };
                let program = machine.open(&model::loss_graph(&config, CAPACITY, options).unwrap());
                machine.put_weights(&program, &weights);
                machine.feed(&program, &batch);
                machine.run(&program);
                all.push(("loss".to_string(), bits(&machine.output(&program, "loss"))));
            }
            all.extend(
                weights.iter().map(|(name, _)| (name.clone(), bits(&machine.state(Kind::Grad, name)))),
            );
            all
        });
        assert!(gradients[0].iter().all(|(_, bits)| bits.iter().any(|b| *b != 0)));
        for (way, have) in WAYS.iter().zip(&gradients) {
            for ((name, have), (_, want)) in have.iter().zip(&gradients[0]) {
                assert!(have == want, "{dtype}, QK-norm {qk_norm}, {way:?}: {name}");
            }
        }
    }
}

#[test]
fn gradients_that_begin_are_those_added_to_zeros() {
    for (dtype, qk_norm) in [("float32", true), ("bfloat16", false)] {
        let config = stored(dtype, qk_norm);
        let batch = pack(&config, CAPACITY, documents());
        let weights = random_weights(&config, 1);
        // After one micro-batch and after two.
        let gradients = |begins: bool, before: f64| {
            let mut machine = Machine::new();
            let mut all = Vec::new();
            for (i, begins) in [begins, false].into_iter().enumerate() {
                let options = LossOptions { begins, ..LossOptions::TRAIN };
                let program = machine.open(&model::loss_graph(&config, CAPACITY, options).unwrap());
                for (name, values) in weights.iter().filter(|_| i == 0) {
                    machine.put(&program, Kind::Param, name, values.iter().copied());
                    machine.put(&program, Kind::Grad, name, values.iter().map(|_| before));
                }
                machine.feed(&program, &batch);
                machine.run(&program);
                all.extend(weights.iter().map(|(name, _)| (i, name, machine.state(Kind::Grad, name))));
            }
            all
        };
        for (have, want) in gradients(true, f64::NAN).into_iter().zip(gradients(false, 0.0)) {
            // Of zeros the sign may be another.
            assert!(have == want, "{dtype}, QK-norm {qk_norm}, micro-batch {}: {}", have.0, have.1);
        }
    }
}

/// A model that kernels take.
fn for_kernels() -> ModelConfig {
    ModelConfig { hidden_size: 64, head_dim: Some(32), ..stored("bfloat16", true) }
}

fn options() -> TrainOptions {
    TrainOptions { rows: 1, positions: 48, images: 1, warmup: 0, lr: 1e-3, ..TrainOptions::default() }
}

fn simulator() -> Box<dyn Device> {
    Box::new(SimDevice::new(SimOptions::default()).unwrap())
}

fn trainer(options: TrainOptions, device: Box<dyn Device>) -> Trainer {
    Trainer::new(Engine::initialised(for_kernels(), device, 3).unwrap(), options).unwrap()
}

fn batch(seed: u64) -> Batch {
    let config = for_kernels();
    pack(&config, options().capacity(&config), vec![document(&["a cat", "#", "on a mat"], seed)])
}

/// Losses of two steps, and the weights after them.
fn trained(options: TrainOptions, device: Box<dyn Device>) -> Vec<f64> {
    let mut trainer = trainer(options, device);
    let mut all: Vec<f64> = (0..2).map(|_| trainer.step(&[batch(5)]).unwrap().loss).collect();
    let engine = trainer.engine();
    for w in engine.weights().to_vec() {
        all.extend(engine.read_weight(Kind::Param, &w.name).unwrap().into_iter().map(f64::from));
    }
    all
}

#[test]
fn the_kernels_compute_the_same_bits_again() {
    let on = |device: fn() -> Box<dyn Device>| {
        WAYS.map(|recompute| bits(&trained(TrainOptions { recompute, ..options() }, device())))
    };
    for found in [on(simulator), on(|| cpu(2).unwrap())] {
        assert!(found[1] == found[0] && found[2] == found[0]);
    }
}

#[test]
fn what_gradients_hold_between_steps_does_not_count() {
    for device in [simulator, || cpu(2).unwrap()] {
        let trained = |before: Option<f32>| {
            let mut trainer = trainer(TrainOptions { accumulation: 2, ..options() }, device());
            let mut all = Vec::new();
            for _ in 0..2 {
                for w in trainer.engine().weights().to_vec() {
                    let values = before.map(|x| vec![x; w.elements()]);
                    values
                        .into_iter()
                        .for_each(|v| trainer.engine().write_weight(Kind::Grad, &w.name, &v).unwrap());
                }
                all.push(trainer.step(&[batch(5), batch(6)]).unwrap().loss);
            }
            let engine = trainer.engine();
            for w in engine.weights().to_vec() {
                all.extend(engine.read_weight(Kind::Param, &w.name).unwrap().into_iter().map(f64::from));
            }
            bits(&all)
        };
        assert!(trained(None) == trained(Some(f32::NAN)));
    }
}

#[test]
fn a_step_of_one_micro_batch_has_one_program_of_the_loss() {
    let inputs = |accumulation: usize| {
        let mut config = RunConfig::preset("tiny").unwrap();
        config.train.accumulation = accumulation;
        Footprint::new(&Step::new(&config, None).unwrap(), 1).inputs
    };
    let [one, two, three] = [1, 2, 3].map(inputs);
    assert!(one < two && two < 2 * one && two == three);
}

#[test]
fn recomputation_takes_less_memory_and_its_work_is_counted() {
    let config = stored("bfloat16", true);
    let [none, cheap, blocks] = WAYS.map(|way| plan(&config, way));
    println!("scratch {} {} {}", none.scratch_bytes, cheap.scratch_bytes, blocks.scratch_bytes);
    assert!(cheap.scratch_bytes < none.scratch_bytes && blocks.scratch_bytes < cheap.scratch_bytes);
    assert_eq!(none.repeated().flops, 0);
    assert!(0 < cheap.repeated().flops && cheap.repeated().flops < blocks.repeated().flops);
    // What is repeated comes on top of the same work.
    assert_eq!(blocks.cost().flops - blocks.repeated().flops, none.cost().flops);
    let named = |plan: &Plan| plan.steps.iter().filter(|s| s.again).map(|s| s.op.name()).collect::<Vec<_>>();
    assert!(named(&cheap).iter().all(|name| *name != "linear" && *name != "attention"));
    let layers = config.num_hidden_layers;
    let times = |name: &str| named(&blocks).iter().filter(|n| **n == name).count();
    // Of a layer everything but its last product.
    assert_eq!([times("attention"), times("linear")], [layers, 3 * layers]);
}

/// Gradients, moments, and both in bf16.
fn narrow() -> [TrainOptions; 3] {
    let (f32, bf16) = (Float::Float32, Float::Bfloat16);
    [(bf16, f32), (f32, bf16), (bf16, bf16)].map(|(gradients, moments)| TrainOptions {
        gradients,
        moments,
        ..options()
    })
}

#[test]
fn gradients_and_moments_in_bf16_take_half_the_bytes_and_train_alike() {
    let config = for_kernels();
    let parameters: usize = model::weights(&config).iter().map(|w| w.elements()).sum();
    let wide = trained(options(), cpu(2).unwrap());
    for options in narrow() {
        let update = Plan::new(&Program::Update(options.update()).graph(&config).unwrap()).unwrap();
        let bytes = |float: Float| float.dtype().size() as u64;
        let [gradients, moments] = [bytes(options.gradients), bytes(options.moments)];
        let each = |kind| update.state_bytes(kind) / parameters as u64;
        assert_eq!([each(Kind::Grad), each(Kind::Optim)], [gradients, 2 * moments + 4]);
        let capacity = options.capacity(&config);
        let loss = Plan::new(&Program::Loss(capacity, options.loss()).graph(&config).unwrap()).unwrap();
        assert_eq!(loss.state_bytes(Kind::Grad), update.state_bytes(Kind::Grad));
        let on_cpu = trained(options.clone(), cpu(2).unwrap());
        for (name, device) in [("CPU", on_cpu), ("simulator", trained(options.clone(), simulator()))] {
            let near = (device[1] - wide[1]).abs() / wide[1];
            assert!(near < 2e-2, "{name}, {options:?}: a loss of {} for {}", device[1], wide[1]);
            assert!(device != wide);
        }
    }
}

#[test]
fn training_with_narrow_states_goes_on_bit_for_bit() {
    let scratch = Scratch::new("narrow");
    for (i, options) in narrow().into_iter().enumerate() {
        let dir = |name: &str| scratch.0.join(format!("{name}-{i}"));
        let mut whole = trainer(options.clone(), cpu(1).unwrap());
        whole.step(&[batch(1)]).unwrap();
        whole.save(&dir("half")).unwrap();
        whole.step(&[batch(2)]).unwrap();
        whole.save(&dir("whole")).unwrap();
        let checkpoint = Checkpoint::open(dir("half")).unwrap();
        let mut resumed = Trainer::resume(cpu(2).unwrap(), options.clone(), &checkpoint).unwrap();
        resumed.step(&[batch(2)]).unwrap();
        resumed.save(&dir("resumed")).unwrap();
        for file in ["model.safetensors", "optimizer.safetensors"] {
            let [have, want] = ["resumed", "whole"].map(|name| file_bits(&dir(name).join(file)));
            assert!(have == want, "{options:?}: {file}");
        }
        // Moments are not converted behind anybody's back.
        let moments = if options.moments == Float::Float32 { Float::Bfloat16 } else { Float::Float32 };
        let other = TrainOptions { moments, ..options };
        let why = Trainer::resume(cpu(1).unwrap(), other, &checkpoint).unwrap_err().to_string();
        assert!(why.contains("optimizer.safetensors") && why.contains("this model wants"), "{why}");
    }
}

#[test]
fn sums_that_bf16_cannot_hold_are_refused() {
    let bf16 = Float::Bfloat16;
    let refused = |options: TrainOptions| options.check().unwrap_err().to_string();
    let many = TrainOptions { gradients: bf16, accumulation: 257, ..options() };
    assert!(refused(many.clone()).contains("set train.accumulation to 256"), "{}", refused(many.clone()));
    TrainOptions { accumulation: 256, ..many }.check().unwrap();
    let slow = TrainOptions { moments: bf16, beta2: 0.999, ..options() };
    assert!(
        refused(slow.clone()).contains("set train.beta2 to 0.99609375 or less"),
        "{}",
        refused(slow.clone())
    );
    TrainOptions { beta2: 0.99, ..slow }.check().unwrap();
}

/// What a run wrote before there were these options is read as it was meant.
#[test]
fn settings_from_before_the_options_are_read() {
    let config = RunConfig::preset("tiny").unwrap();
    let mut json = serde_json::to_value(&config).unwrap();
    let train = json["train"].as_object_mut().unwrap();
    for key in ["recompute", "gradients", "moments"] {
        train.remove(key).unwrap();
    }
    assert_eq!(serde_json::from_value::<RunConfig>(json).unwrap(), config);
}
