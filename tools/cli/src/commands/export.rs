//! `transfusion export`.
use crate::{
    console,
    failure::{Failure, Outcome},
};
use clap::Args;
use std::path::PathBuf;
use transfusion::{engine, hf, run};

/// Write a model as a Hugging Face folder.
///
/// The folder gets config.json with Llama keys and a `transfusion` block, and model.safetensors under
/// Llama names; the running means of the weights where the run kept them. The text trunk loads in
/// `transformers`, and the whole model in every command here.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  transfusion export runs/shapes --out exported")]
pub(crate) struct Export {
    /// Run directory, checkpoint, or exported folder.
    model: PathBuf,
    /// The new folder.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
}

impl Export {
    /// Writes the folder.
    pub(crate) fn run(self) -> Outcome {
        if self.out.symlink_metadata().is_ok() {
            let why = format!("{} exists and is never overwritten", self.out.display());
            return Err(Failure::error(why).hint("choose another --out"));
        }
        let mut engine = run::load(&self.model, engine::cpu(0)?)?;
        hf::export(&mut engine, &self.out)?;
        console::print(self.out.display())
    }
}
