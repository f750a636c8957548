//! `transfusion bench step`.
use super::common::{Bout, Format, Sizing, failure};
use crate::{console, failure::Outcome};
use clap::Args;
use transfusion::sample::Cancel;
use transfusion_benches::step;

/// Time a whole training step: loss, gradient, clipping, optimiser, running means.
///
/// TFLOP/s and MFU count model FLOPs: positions, targets and images that the batch holds, and the pairs of a
/// query and a key that it sees. PyTorch's losses and gradient norms have to agree with ours over the first
/// steps before it is timed. Where ours rounds the factors of products to bf16 (settings:
/// model.transfusion.matmul_precision) "torch_ms" is PyTorch's f32 as ever, and "peers" tells of PyTorch
/// that may round as well ("medium") and of PyTorch in bf16.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion bench step --preset tiny --device cpu
  transfusion bench step --preset text-tiny --device cpu --against torch --json
  transfusion bench step --preset tiny --dtype bf16 --against torch --variant \"eager autocast\"")]
pub(crate) struct Step {
    #[command(flatten)]
    sizing: Sizing,
    #[command(flatten)]
    bout: Bout,
    #[command(flatten)]
    format: Format,
}

impl Step {
    /// Measures and prints.
    pub(crate) fn run(self) -> Outcome {
        let config = self.sizing.resolve()?;
        let stop = console::interruption("stopping after this block")?;
        let opened = self.bout.open(&config)?;
        let mut peer = self.bout.peer(&opened)?;
        let packing = self.sizing.packing(&config);
        let measured = step::Step::new(&config, packing, opened.device).map_err(failure)?;
        let row = step::measure(
            &self.sizing.settings.preset,
            measured,
            &opened.machine,
            peer.as_mut(),
            self.bout.schedule(2.0),
            &mut |text| console::note(text),
            Cancel(Some(&stop)),
        );
        self.format.print(&[row.map_err(failure)?])
    }
}
