//! A model on a device: its weights, and the programs that were opened for it so far.
use crate::{
    config::ModelConfig,
    error::{Error, Result},
    model::{self, Capacity, Extend, ImagePass, Init, LossOptions, UpdateOptions, Weight},
};
use half::bf16;
use std::sync::Arc;
use transfusion_core::{
    checkpoint::Checkpoint,
    device::{CpuDevice, CpuOptions, Device, Place, PlanId},
    graph::Graph,
    op::Kind,
    plan::Plan,
    random::{Purpose, Stream},
    tensor::{DType, Host, Spec, View, ViewMut},
};

/// A program of the model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Program {
    /// Loss, and its gradient, of a micro-batch.
    Loss(Capacity, LossOptions),
    /// The optimiser's step.
    Update(UpdateOptions),
    /// Adds text to cached sequences.
    Text(Extend),
    /// Adds images to cached sequences, or denoises them.
    Image(Extend, ImagePass),
}

impl Program {
    /// Builds it.
    ///
    /// # Errors
    /// If an op refuses.
    pub fn graph(self, c: &ModelConfig) -> Result<Graph> {
        Ok(match self {
            Program::Loss(capacity, options) => model::loss_graph(c, capacity, options)?,
            Program::Update(options) => model::update_graph(c, options),
            Program::Text(extend) => model::text_graph(c, extend),
            Program::Image(extend, pass) => model::image_graph(c, extend, pass),
        })
    }
}

/// A model on a device.
pub struct Engine {
    config: ModelConfig,
    weights: Vec<Weight>,
    device: Box<dyn Device>,
    programs: Vec<(Program, PlanId)>,
    has_ema: bool,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("config", &self.config).field("programs", &self.programs).finish()
    }
}

/// The CPU as a device; `threads` 0 means one for each core.
///
/// # Errors
/// If its threads cannot be started.
pub fn cpu(threads: usize) -> Result<Box<dyn Device>> {
    Ok(Box::new(CpuDevice::new(CpuOptions { threads, poison: false })?))
}

impl Engine {
    /// A model whose weights are still zero.
    ///
    /// # Errors
    /// If the configuration makes no sense, or the device has no room.
    pub fn new(config: ModelConfig, mut device: Box<dyn Device>) -> Result<Engine> {
        config.check()?;
        let weights = model::weights(&config);
        declare(device.as_mut(), &weights, Kind::Param, config.dtype())?;
        Ok(Engine { config, weights, device, programs: Vec::new(), has_ema: false })
    }

    /// A model with the weights of [`model::weights`] drawn under `seed`: a weight is a function of
    /// its name, its place and the seed.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn initialised(config: ModelConfig, device: Box<dyn Device>, seed: u64) -> Result<Engine> {
        let mut engine = Engine::new(config, device)?;
        for w in engine.weights.clone() {
            let n = w.shape.iter().product();
            let mut values = vec![0.0; n];
            match w.init {
                Init::Zeros => {}
                Init::Ones => values.fill(1.0),
                Init::Normal(deviation) => {
                    Stream::new(seed, Purpose::Init, fnv(&w.name)).fill_normal(0, &mut values);
                    values.iter_mut().for_each(|x| *x *= deviation as f32);
                }
            }
            engine.write_weight(Kind::Param, &w.name, &values)?;
        }
        Ok(engine)
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Its weights, in their fixed order.
    pub fn weights(&self) -> &[Weight] {
        &self.weights
    }

    /// The machine.
    pub fn device(&mut self) -> &mut dyn Device {
        self.device.as_mut()
    }

    /// How many parameters it has.
    pub fn parameters(&self) -> usize {
        self.weights.iter().map(|w| w.shape.iter().product::<usize>()).sum()
    }

    /// Whether running means of the weights are there; sampling and evaluation use them if so.
    pub fn has_ema(&self) -> bool {
        self.has_ema
    }

    /// Names and types of all weights, or of their running means.
    pub fn states(&self, kind: Kind) -> Vec<(String, Spec)> {
        let dtype = if kind == Kind::Param { self.config.dtype() } else { DType::F32 };
        self.weights.iter().map(|w| (w.name.clone(), Spec::new(w.shape(), dtype))).collect()
    }

    /// Writes states from a file of a checkpoint.
    ///
    /// # Errors
    /// If one is missing there or of another type.
    pub fn load_states(
        &mut self,
        checkpoint: &Checkpoint,
        file: &str,
        kind: Kind,
        states: &[(String, Spec)],
    ) -> Result<()> {
        for (name, want) in states {
            let host = checkpoint.tensor(file, name)?;
            let have = host.view();
            if have.dtype() != want.dtype || have.len() != want.shape.numel() {
                let (n, dtype) = (have.len(), have.dtype().name());
                let why = format!("{name} is {n} elements of {dtype}, this model wants {want:?}");
                return Err(Error::file(checkpoint.dir().join(file), why));
            }
            self.device.write(Place::State(kind, name), have)?;
        }
        Ok(())
    }

    /// Starts running means at the weights.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn start_ema(&mut self) -> Result<()> {
        self.declare_ema()?;
        for w in self.weights.clone() {
            let values = self.read_weight(Kind::Param, &w.name)?;
            self.write_weight(Kind::Ema, &w.name, &values)?;
        }
        Ok(())
    }

    /// Makes room for running means, which the caller then writes.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn declare_ema(&mut self) -> Result<()> {
        declare(self.device.as_mut(), &self.weights, Kind::Ema, DType::F32)?;
        self.has_ema = true;
        Ok(())
    }

    /// Writes a weight or its running mean, rounded to what it is stored as.
    ///
    /// # Errors
    /// If there is no such weight, or it has another number of elements.
    pub fn write_weight(&mut self, kind: Kind, name: &str, values: &[f32]) -> Result<()> {
        let at = Place::State(kind, name);
        if kind == Kind::Param && self.config.dtype() == DType::Bf16 {
            let narrow: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
            self.device.write(at, View::Bf16(&narrow))?;
        } else {
            self.device.write(at, View::F32(values))?;
        }
        Ok(())
    }

    /// A weight or its running mean.
    ///
    /// # Errors
    /// If there is no such weight.
    pub fn read_weight(&mut self, kind: Kind, name: &str) -> Result<Vec<f32>> {
        let host = self.device.fetch(Place::State(kind, name))?;
        Ok(match host {
            Host::F32(values) => values,
            Host::Bf16(values) => values.into_iter().map(f32::from).collect(),
            other => other.to_f64().iter().map(|&x| x as f32).collect(),
        })
    }

    /// The plan of a program, opened at its first use.
    ///
    /// # Errors
    /// If the program cannot be built, or the device has no room for it.
    pub fn open(&mut self, program: Program) -> Result<PlanId> {
        if let Some((_, id)) = self.programs.iter().find(|(p, _)| *p == program) {
            return Ok(*id);
        }
        let plan = self.plan(program)?;
        let id = self.device.open(Arc::new(plan))?;
        self.programs.push((program, id));
        Ok(id)
    }

    /// Forgets the programs that extend cached sequences, whose capacity is one sampling's.
    pub fn close_sampling(&mut self) {
        let device = &mut self.device;
        self.programs.retain(|(program, id)| {
            let sampling = matches!(program, Program::Text(_) | Program::Image(..));
            if sampling {
                device.close(*id);
            }
            !sampling
        });
    }

    /// Writes an i32 input.
    ///
    /// # Errors
    /// If the plan has no such input of that size.
    pub fn ints(&mut self, plan: PlanId, name: &str, values: &[i32]) -> Result<()> {
        Ok(self.device.write(Place::Input(plan, name), View::I32(values))?)
    }

    /// Writes an f32 input.
    ///
    /// # Errors
    /// If the plan has no such input of that size.
    pub fn floats(&mut self, plan: PlanId, name: &str, values: &[f32]) -> Result<()> {
        Ok(self.device.write(Place::Input(plan, name), View::F32(values))?)
    }

    /// Reads an f32 output.
    ///
    /// # Errors
    /// If the plan has no such output of that size.
    pub fn output(&mut self, plan: PlanId, name: &str, into: &mut [f32]) -> Result<()> {
        Ok(self.device.read(Place::Output(plan, name), ViewMut::F32(into))?)
    }

    /// Reads an output that is one number.
    ///
    /// # Errors
    /// As [`Engine::output`].
    pub fn number(&mut self, plan: PlanId, name: &str) -> Result<f32> {
        let mut one = [0.0];
        self.output(plan, name, &mut one)?;
        Ok(one[0])
    }

    /// Runs a plan.
    ///
    /// # Errors
    /// If the machine fails.
    pub fn run(&mut self, plan: PlanId) -> Result<()> {
        Ok(self.device.run(plan)?)
    }

    /// The plan of a program for this device; it is not opened.
    ///
    /// # Errors
    /// If the program cannot be built, or the device lacks a kernel for one of its ops.
    pub fn plan(&self, program: Program) -> Result<Plan> {
        Ok(Plan::on(&program.graph(&self.config)?, self.device.target().as_ref())?)
    }
}

/// Opens a plan that only names states, so that they exist.
fn declare(device: &mut dyn Device, weights: &[Weight], kind: Kind, dtype: DType) -> Result<()> {
    let mut g = Graph::new();
    for w in weights {
        g.state(kind, &w.name, w.shape(), dtype);
    }
    device.open(Arc::new(Plan::on(&g, device.target().as_ref())?))?;
    Ok(())
}

/// FNV-1a, so that a weight's random numbers do not depend on which other weights there are.
fn fnv(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// What sampling and evaluation lack when asked of a model of text alone.
pub(crate) fn no_images() -> Error {
    Error::Config("this model has no images: its config.json has no transfusion.image block".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_weights_have_the_deviation_asked_for() {
        let config = ModelConfig::preset("tiny").unwrap();
        let mut e = Engine::initialised(config, cpu(1).unwrap(), 3).unwrap();
        for w in e.weights().to_vec() {
            let values = e.read_weight(Kind::Param, &w.name).unwrap();
            let rms = (values.iter().map(|x| f64::from(x * x)).sum::<f64>() / values.len() as f64).sqrt();
            let want = match w.init {
                Init::Normal(d) => d,
                Init::Ones => 1.0,
                Init::Zeros => 0.0,
            };
            assert!((rms - want).abs() <= 0.05 * want, "{}: {rms} {want}", w.name);
        }
    }
}
