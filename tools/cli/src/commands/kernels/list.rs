//! `transfusion kernels list`.
use crate::{
    console,
    failure::{Failure, Outcome},
};
use clap::Args;
use serde_json::json;
use transfusion_ptx::{Entry, Kind, Module, Param};

/// List the kernels that this program brings along: where from, threads of a block, static shared memory,
/// parameters.
#[derive(Args, Debug)]
pub(crate) struct List {
    /// Print JSON: [{"arch", "file", "entry", "threads", "shared", "parameters"}].
    #[arg(long)]
    json: bool,
}

impl List {
    /// Prints.
    pub(crate) fn run(self) -> Outcome {
        let kernels = kernels()?;
        if self.json {
            let row = |(m, e): &(&Module, Entry)| {
                let parameters: Vec<&str> = e.params.iter().map(kind).collect();
                json!({
                    "arch": m.arch, "file": m.stem, "entry": e.name, "threads": e.max_threads,
                    "shared": e.static_shared, "parameters": parameters,
                })
            };
            let rows: Vec<_> = kernels.iter().map(row).collect();
            return console::print(serde_json::to_string_pretty(&rows).map_err(Failure::error)?);
        }
        let width = kernels.iter().map(|(_, e)| e.name.len()).max().unwrap_or(0);
        let mut lines =
            vec![format!("{:7} {:width$} {:>7} {:>7}  parameters", "arch", "entry", "threads", "shared")];
        for (m, e) in &kernels {
            let threads = e.max_threads.map_or("any".into(), |n| n.to_string());
            let parameters: Vec<&str> = e.params.iter().map(kind).collect();
            let parameters = parameters.join(" ");
            lines.push(format!(
                "{:7} {:width$} {threads:>7} {:>7}  {parameters}",
                m.arch, e.name, e.static_shared
            ));
        }
        console::print(lines.join("\n"))
    }
}

fn kernels() -> Outcome<Vec<(&'static Module, Entry)>> {
    let mut all = Vec::new();
    for module in transfusion_ptx::modules() {
        let entries = module.entries().map_err(|e| Failure::error(format!("{}: {e}", module.stem)))?;
        all.extend(entries.into_iter().map(|e| (module, e)));
    }
    Ok(all)
}

fn kind(param: &Param) -> &'static str {
    match param.kind {
        Kind::U8 => "u8",
        Kind::U16 => "u16",
        Kind::U32 => "u32",
        Kind::U64 => "u64",
        Kind::F32 => "f32",
        Kind::F64 => "f64",
        Kind::Bytes => "bytes",
    }
}
