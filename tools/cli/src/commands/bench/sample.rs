//! `transfusion bench sample`.
use super::common::{Bout, Format, Sizing, failure};
use crate::{
    console,
    failure::{Failure, Outcome},
};
use clap::Args;
use transfusion::sample::Cancel;
use transfusion_benches::{folder::Folder, sample::Sampler};

/// Time sampling: text, denoising, and a cold start.
///
/// Text is greedy, one token of every sequence at a time; a denoising step is guided, so that it sees every
/// image twice. A cold start is the whole life of a process of this program that loads an exported model,
/// writes one token and ends. PyTorch's logits and images have to agree with ours before it is timed.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  transfusion bench sample --preset text-tiny --device cpu
  transfusion bench sample --preset tiny --device cpu --against torch --json")]
pub(crate) struct Sample {
    #[command(flatten)]
    sizing: Sizing,
    #[command(flatten)]
    bout: Bout,
    #[command(flatten)]
    format: Format,
}

impl Sample {
    /// Measures and prints.
    pub(crate) fn run(self) -> Outcome {
        let config = self.sizing.one_sequence()?;
        let stop = console::interruption("stopping after this block")?;
        let opened = self.bout.open(&config)?;
        let mut peer = self.bout.peer(&opened)?;
        let machine = opened.machine.clone();
        let sampler = Sampler {
            preset: &self.sizing.settings.preset,
            config: &config,
            machine: &machine,
            schedule: self.bout.schedule(2.0),
            cancel: Cancel(Some(&stop)),
        };
        let device = opened.name.clone();
        let measured = sampler.measure(opened.device, peer.as_mut(), &mut |text| console::note(text));
        let mut rows = measured.map_err(failure)?;
        console::note("cold starts");
        let program = std::env::current_exe().map_err(|e| Failure::error(format!("this program: {e}")))?;
        let folder = Folder::new().map_err(failure)?;
        rows.push(sampler.cold(&program, &device, peer.as_ref(), folder.path()).map_err(failure)?);
        self.format.print(&rows)
    }
}
