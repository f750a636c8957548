//! `transfusion doctor`.
use crate::{
    console::{self, bytes},
    failure::{Failure, Outcome},
};
use clap::Args;
use serde_json::{Value, json};
use transfusion_core::device::cuda::{self, Gpu, Shipped, Survey, cuda_for, ptx_for};

/// Tell what this machine has for training and sampling, what is missing, and the remedy.
///
/// It looks at the CPU, the NVIDIA driver and its GPUs, and the kernels of this program. Nothing is
/// changed, and no memory of a GPU is taken. Exit code 0, whatever it finds.
#[derive(Args, Debug)]
#[command(after_help = "\
JSON: {\"version\", \"cpu\": {\"threads\", \"avx2\", \"avx512\"}, \"cuda\": {\"library\", \"driver\", \"cuda\",
\"ptx\", \"nvrtc\", \"devices\": [{\"device\", \"name\", \"capability\", \"memory\", \"kernels\"}]},
\"kernels\": [{\"arch\", \"entries\", \"ptx\", \"cuda\"}], \"missing\": [{\"what\", \"remedy\"}]}; what is
unknown or not there is null.

Examples:
  transfusion doctor
  transfusion doctor --json")]
pub(crate) struct Doctor {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Everything that was found.
struct Findings {
    threads: usize,
    avx2: bool,
    avx512: bool,
    /// Version of the kernel module.
    driver: Option<String>,
    survey: Survey,
    shipped: Vec<Shipped>,
}

/// Something that is not there.
struct Missing {
    what: String,
    remedy: String,
}

impl Doctor {
    /// Looks and prints.
    pub(crate) fn run(self) -> Outcome {
        let findings = Findings::new();
        if self.json {
            let json = serde_json::to_string_pretty(&findings.in_json()).map_err(Failure::error)?;
            return console::print(json);
        }
        console::print(findings.in_words())
    }
}

impl Findings {
    fn new() -> Findings {
        let (avx2, avx512) = vectors();
        Findings {
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            avx2,
            avx512,
            driver: kernel_module(),
            survey: cuda::survey(),
            shipped: cuda::shipped(),
        }
    }

    fn missing(&self) -> Vec<Missing> {
        let mut missing = Vec::new();
        let mut add = |what: &str, remedy: &str| {
            missing.push(Missing { what: what.into(), remedy: remedy.into() });
        };
        if let Some(problem) = &self.survey.problem {
            add(&problem.to_string(), &problem.remedy());
        }
        if self.shipped.is_empty() {
            add("this build holds no GPU kernels", "use --device cpu, or a build that has them");
        }
        if !self.survey.nvrtc {
            let remedy = "only `kernels --cu` wants it, and fetches one by itself with Python's pip; or name a \
                          libnvrtc.so in TRANSFUSION_NVRTC";
            add("NVRTC was not found", remedy);
        }
        if !self.avx2 {
            add("the CPU has no AVX2 and FMA", "nothing to install: training on this CPU is slow");
        }
        missing
    }

    fn in_words(&self) -> String {
        let s = &self.survey;
        let vectors = match (self.avx2, self.avx512) {
            (_, true) => "AVX-512",
            (true, _) => "AVX2",
            _ => "no vector instructions that count",
        };
        let mut lines = vec![
            format!("transfusion  {}", env!("CARGO_PKG_VERSION")),
            format!("cpu          {} threads, {vectors}", self.threads),
        ];
        let library = s.library.as_ref().map_or("not found".into(), |p| p.display().to_string());
        let serves = s.version.map_or(String::new(), |v| {
            format!(", CUDA {}, reads PTX up to {}", dotted(v), dotted(ptx_for(v)))
        });
        let module = self.driver.as_ref().map_or(String::new(), |v| format!("{v}, "));
        lines.push(format!("driver       {module}{library}{serves}"));
        for (i, (gpu, arch)) in s.gpus.iter().enumerate() {
            let kernels = match arch {
                Ok(arch) => format!("kernels {arch}"),
                Err(why) => why.to_string(),
            };
            let Gpu { name, capability, memory, .. } = gpu;
            let (capability, memory) = (dotted(*capability), bytes(*memory));
            lines.push(format!("cuda:{i:<7} {name}, capability {capability}, {memory}, {kernels}"));
        }
        for k in &self.shipped {
            let (ptx, cuda) = (dotted(k.ptx), dotted(cuda_for(k.ptx)));
            lines.push(format!("{:12} {} kernels, PTX {ptx} (CUDA {cuda} or newer)", k.arch, k.kernels));
        }
        lines.push(format!("nvrtc        {}", if s.nvrtc { "found" } else { "not found" }));
        for m in self.missing() {
            lines.push(format!("\nmissing: {}\nremedy:  {}", m.what, m.remedy));
        }
        lines.join("\n")
    }

    fn in_json(&self) -> Value {
        let s = &self.survey;
        let device = |(i, (gpu, arch)): (usize, &(Gpu, Result<&str, _>))| {
            json!({
                "device": format!("cuda:{i}"),
                "name": gpu.name,
                "capability": dotted(gpu.capability),
                "memory": gpu.memory,
                "kernels": arch.as_ref().ok(),
            })
        };
        let kernels = |k: &Shipped| {
            let (ptx, cuda) = (dotted(k.ptx), dotted(cuda_for(k.ptx)));
            json!({ "arch": k.arch, "entries": k.kernels, "ptx": ptx, "cuda": cuda })
        };
        let missing = |m: Missing| json!({ "what": m.what, "remedy": m.remedy });
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cpu": { "threads": self.threads, "avx2": self.avx2, "avx512": self.avx512 },
            "cuda": {
                "library": s.library,
                "driver": self.driver,
                "cuda": s.version.map(dotted),
                "ptx": s.version.map(ptx_for).map(dotted),
                "nvrtc": s.nvrtc,
                "devices": s.gpus.iter().enumerate().map(device).collect::<Vec<_>>(),
            },
            "kernels": self.shipped.iter().map(kernels).collect::<Vec<_>>(),
            "missing": self.missing().into_iter().map(missing).collect::<Vec<_>>(),
        })
    }
}

/// Whether the CPU has AVX2 with FMA, and AVX-512.
fn vectors() -> (bool, bool) {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        (avx2, avx2 && is_x86_feature_detected!("avx512f"))
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        (false, false)
    }
}

/// The version of NVIDIA's kernel module, as in 550.54.14.
fn kernel_module() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.split_whitespace().find(is_version).map(str::to_owned)
}

fn dotted((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}
