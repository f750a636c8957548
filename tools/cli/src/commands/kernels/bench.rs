//! `transfusion kernels bench`.
use super::{
    check,
    workbench::{Machine, Workbench},
};
use crate::{
    console,
    failure::{Failure, Outcome},
};
use clap::Args;
use serde_json::json;
use std::{collections::HashSet, time::Duration};
use transfusion_core::{
    Error,
    agreement::{self, Application},
    cases,
    device::Device,
};
use transfusion_ptxsim::Schedule;

/// Time kernels on a GPU, or count what they do in the simulator.
///
/// Kernels are checked first, and a wrong one is refused. On a GPU: the median time of a launch with random
/// data, and what follows from it. In the simulator: instructions by class, tensor-core work, global and
/// shared traffic, bank conflicts, for each kernel over the case tables.
#[derive(Args, Debug)]
pub(crate) struct Bench {
    #[command(flatten)]
    bench: Workbench,
    /// Launches that are timed.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    repeat: u16,
    /// Skip the check.
    #[arg(long)]
    unchecked: bool,
    /// Print a line of JSON for each application: {"case", "op", "operands", "ms", "tflops",
    /// "gbs"}; on a GPU only.
    #[arg(long)]
    json: bool,
}

impl Bench {
    /// Checks, times and prints.
    pub(crate) fn run(self) -> Outcome {
        let mut machines = self.bench.open(&Schedule::SEVERAL[..1])?;
        if !self.unchecked {
            check::refuse_wrong_ones(&self.bench, &mut machines)?;
        }
        match machines.as_mut_slice() {
            [Machine::Cuda(gpu)] => self.time(gpu),
            [Machine::Sim(sim)] => {
                if self.unchecked {
                    self.count(sim)?;
                }
                let all: Vec<String> = sim.counters().values().map(|c| c.to_string()).collect();
                if all.is_empty() {
                    return Err(Failure::error(
                        "none of these ops has a kernel that takes the shapes of its cases",
                    ));
                }
                console::print(all.join("\n"))
            }
            _ => Ok(()),
        }
    }

    /// Runs the case tables for their counters.
    fn count(&self, sim: &mut dyn Device) -> Outcome {
        for case in self.bench.tables()? {
            for float in self.bench.floats() {
                for a in agreement::applications(&case, float, &mut agreement::cpu(0)?)? {
                    match a.run(sim) {
                        Ok(_) | Err(Error::NoKernel { .. }) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
            }
        }
        Ok(())
    }

    fn time(&self, gpu: &mut dyn Device) -> Outcome {
        if !self.json {
            console::print(format!("{:>9} {:>9} {:>9}  application", "ms", "TFLOP/s", "GB/s"))?;
        }
        let mut seen = HashSet::new();
        for case in self.bench.cases(cases::speed())? {
            for float in self.bench.floats() {
                for a in agreement::applications(&case, float, gpu)? {
                    if seen.insert(format!("{} {a}", case.name)) {
                        self.time_one(&case.name, &a, gpu)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn time_one(&self, case: &str, a: &Application, gpu: &mut dyn Device) -> Outcome {
        let id = match a.open(gpu) {
            Err(Error::NoKernel { .. }) => return Ok(()),
            other => other?,
        };
        let mut times = Vec::new();
        for i in 0..self.repeat + 3 {
            let time: Duration = gpu.profile(id)?.iter().sum();
            // The first launches load code and raise clocks.
            if i >= 3 {
                times.push(time);
            }
        }
        gpu.close(id);
        times.sort();
        let (seconds, cost) = (times[times.len() / 2].as_secs_f64(), a.cost());
        let (flops, bytes) = (cost.flops as f64 / seconds / 1e12, cost.bytes as f64 / seconds / 1e9);
        let ms = seconds * 1e3;
        if self.json {
            let operands: Vec<String> = a.specs.iter().map(|s| format!("{s:?}")).collect();
            let line = json!({
                "case": case, "op": a.op.name(), "operands": operands, "ms": ms, "tflops": flops, "gbs": bytes,
            });
            return console::print(line);
        }
        console::print(format!("{ms:9.4} {flops:9.1} {bytes:9.0}  {a}  ({case})"))
    }
}
