//! What a training step holds in memory: recomputation, and what becomes of the bits.
use transfusion::{
    config::ModelConfig,
    engine::{Engine, cpu},
    model::{self, Capacity, LossOptions, Recompute},
    train::{TrainOptions, Trainer},
};
use transfusion_core::{device::Device, op::Kind, plan::Plan};
use transfusion_ptxsim::{SimDevice, SimOptions};
use transfusion_tests::{Machine, bits, document, documents, mixed, pack, random_weights};

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
            let options = LossOptions { recompute, ..LossOptions::TRAIN };
            let program = machine.open(&model::loss_graph(&config, CAPACITY, options).unwrap());
            machine.put_weights(&program, &weights);
            machine.feed(&program, &batch);
            // Twice: gradients are added to what is there.
            machine.run(&program);
            machine.run(&program);
            let mut all = vec![("loss".to_string(), bits(&machine.output(&program, "loss")))];
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

/// Losses and weights after two steps.
fn trained(config: &ModelConfig, recompute: Recompute, device: Box<dyn Device>) -> Vec<u64> {
    let engine = Engine::initialised(config.clone(), device, 3).unwrap();
    let options =
        TrainOptions { rows: 1, positions: 48, images: 1, warmup: 0, recompute, ..TrainOptions::default() };
    let mut trainer = Trainer::new(engine, options).unwrap();
    let batch = pack(config, trainer.capacity(), vec![document(&["a cat", "#", "on a mat"], 5)]);
    let mut all: Vec<f64> =
        (0..2).map(|_| trainer.step(std::slice::from_ref(&batch)).unwrap().loss).collect();
    let engine = trainer.engine();
    for w in engine.weights().to_vec() {
        all.extend(engine.read_weight(Kind::Param, &w.name).unwrap().into_iter().map(f64::from));
    }
    bits(&all)
}

#[test]
fn the_kernels_compute_the_same_bits_again() {
    let mut config = stored("bfloat16", true);
    (config.hidden_size, config.head_dim) = (64, Some(32));
    let simulator = || Box::new(SimDevice::new(SimOptions::default()).unwrap());
    let kept = trained(&config, Recompute::None, simulator());
    for way in [Recompute::Cheap, Recompute::Blocks] {
        assert!(trained(&config, way, simulator()) == kept, "{way:?}");
        let on_cpu = trained(&config, way, cpu(2).unwrap());
        assert!(on_cpu == trained(&config, Recompute::None, cpu(2).unwrap()), "{way:?} on the CPU");
    }
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
