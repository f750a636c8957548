//! What a measurement ran on, and the most that it can do.
use crate::{
    error::{Error, Result},
    peak::{Peak, bandwidth, peak},
};
use std::{
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use transfusion_core::{
    cpu::Precision,
    device::cuda::{self, Gpu},
    launch::{Cost, Roofline},
};

/// A machine, and the version of the program.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// Processor, with its family and vector instructions, or GPU.
    pub device: String,
    /// Driver of a GPU.
    pub driver: Option<String>,
    /// What the system says about clocks.
    pub clocks: Option<String>,
    /// Threads of the CPU that compute.
    pub threads: usize,
    /// The commit of the working tree that this runs in, `-dirty` where it was edited.
    pub commit: Option<String>,
    /// Day, as 2026-11-23.
    pub date: String,
    /// The most that it can do.
    pub ceilings: Ceilings,
}

/// The most that a machine can do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ceilings {
    /// Multiply-adds in f32: measured on a CPU, of the data sheet or the clock on a GPU.
    pub f32: Peak,
    /// Products of bf16 numbers; on a CPU those in f32 if it has no instruction for them.
    pub bf16: Peak,
    /// Bytes/s to and from memory; 0 is unknown.
    pub bandwidth: f64,
}

impl Ceilings {
    /// That of products, of bf16 numbers if they are `narrow`.
    pub fn peak(&self, narrow: bool) -> Peak {
        if narrow { self.bf16 } else { self.f32 }
    }

    /// The least seconds for this, whose products are `narrow` or not; `None` where the bandwidth is unknown.
    pub fn seconds(&self, cost: Cost, narrow: bool) -> Option<f64> {
        let rate = self.peak(narrow).rate;
        let known = self.bandwidth > 0.0 && rate > 0.0;
        known.then(|| (cost.flops as f64 / rate).max(cost.bytes as f64 / self.bandwidth))
    }
}

impl Machine {
    /// This CPU with so many threads; 0 is one for each core. It is measured, for about a second.
    pub fn cpu(threads: usize) -> Machine {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { cores } else { threads };
        let [f32, bf16] =
            [Precision::F32, Precision::Bf16].map(|p| peak(threads, p, Duration::from_millis(200)));
        let ceilings = Ceilings { f32, bf16, bandwidth: bandwidth(threads) };
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let clocks = field(&info, "cpu MHz").map(|mhz| format!("{mhz} MHz"));
        Machine { device: cpu_name(&info), driver: None, clocks, threads, ceilings, ..Machine::here() }
    }

    /// A GPU, counted from 0.
    ///
    /// # Errors
    /// If there is none.
    pub fn gpu(ordinal: usize) -> Result<Machine> {
        let survey = cuda::survey();
        let Some((gpu, _)) = survey.gpus.get(ordinal) else {
            return Err(Error::peer(format!("there is no GPU {ordinal}")));
        };
        let cuda = survey.version.map(|(major, minor)| format!("CUDA {major}.{minor}"));
        let asked = smi(ordinal);
        let driver: Vec<String> = asked.first().cloned().into_iter().chain(cuda).collect();
        let clocks = match asked.get(1..3) {
            Some([sm, memory]) => format!("SM {sm}, memory {memory}"),
            _ => format!("SM up to {} MHz", gpu.clock / 1_000_000),
        };
        Ok(Machine {
            device: gpu.name.clone(),
            driver: Some(driver.join(", ")),
            clocks: Some(clocks),
            threads: 1,
            ceilings: gpu_ceilings(gpu),
            ..Machine::here()
        })
    }

    /// Whether it is the CPU.
    pub fn is_cpu(&self) -> bool {
        self.driver.is_none()
    }

    fn here() -> Machine {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Machine { commit: commit(), date: date(seconds), ..Machine::unknown() }
    }

    /// One of which nothing is known.
    pub(crate) fn unknown() -> Machine {
        Machine {
            device: String::new(),
            driver: None,
            clocks: None,
            threads: 1,
            commit: None,
            date: String::new(),
            ceilings: Ceilings::default(),
        }
    }
}

/// Those of a data sheet, where we have it, else what follows from clock and multiprocessors.
fn gpu_ceilings(gpu: &Gpu) -> Ceilings {
    let sheet = Roofline::ALL.into_iter().find(|r| gpu.name.contains(r.target.name));
    let (of, f32, bf16, bandwidth) = match sheet {
        Some(r) => ("data sheet", r.f32, r.target.peak, r.bandwidth),
        None => {
            let lanes = f64::from(gpu.sms) * gpu.clock as f64;
            ("clock", 256.0 * lanes, 1024.0 * lanes, 0.0)
        }
    };
    Ceilings { f32: Peak { rate: f32, of }, bf16: Peak { rate: bf16, of }, bandwidth }
}

/// Driver version and clocks, as `nvidia-smi` tells where it is installed.
fn smi(ordinal: usize) -> Vec<String> {
    let query = "--query-gpu=driver_version,clocks.sm,clocks.mem";
    let asked = Command::new("nvidia-smi")
        .args([query, "--format=csv,noheader", "-i", &ordinal.to_string()])
        .output();
    let told = asked.ok().filter(|out| out.status.success()).map(|out| out.stdout).unwrap_or_default();
    String::from_utf8_lossy(&told)
        .split(',')
        .map(|w| w.trim().to_string())
        .filter(|w| !w.is_empty())
        .collect()
}

/// The commit of the tree around the working directory, if that is ours.
fn commit() -> Option<String> {
    let git = |args: &[&str]| {
        let out = Command::new("git").args(args).output().ok().filter(|out| out.status.success())?;
        Some(String::from_utf8_lossy(&out.stdout).trim().to_string())
    };
    let top = git(&["rev-parse", "--show-toplevel"])?;
    let ours = std::path::Path::new(&top).join("engine/transfusion/Cargo.toml").is_file();
    ours.then(|| git(&["describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"])).flatten()
}

/// The day of a number of seconds since 1970, UTC (Howard Hinnant's `civil_from_days`).
fn date(seconds: u64) -> String {
    let days = (seconds / 86_400) as i64 + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let (day, month) = (day_of_year - (153 * shifted + 2) / 5 + 1, (shifted + 2) % 12 + 1);
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    let of =
        |line: &'a str| line.split_once(':').filter(|(key, _)| key.trim() == name).map(|(_, v)| v.trim());
    info.lines().find_map(of)
}

fn cpu_name(info: &str) -> String {
    let Some(name) = field(info, "model name") else { return std::env::consts::ARCH.into() };
    let part = |name| field(info, name).unwrap_or("?");
    let flags = part("flags");
    let has = |flag: &str| flags.split_whitespace().any(|f| f == flag);
    let vectors = match (has("avx512f"), has("avx2")) {
        (true, _) => ", AVX-512",
        (_, true) => ", AVX2",
        _ => "",
    };
    let vectors = if has("avx512_bf16") { format!("{vectors} with BF16") } else { vectors.into() };
    format!("{name} (family {}, model {}{vectors})", part("cpu family"), part("model"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, day) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (1_795_392_000, "2026-11-23"),
            (4_107_542_399, "2100-02-28"),
        ] {
            assert_eq!(date(seconds), day);
        }
    }

    #[test]
    fn processors_have_names() {
        let info = "model name\t: Fast\ncpu family\t: 25\nmodel\t\t: 17\nflags\t\t: fpu avx2 avx512f\n\nmodel name\t: Other\n";
        assert_eq!(cpu_name(info), "Fast (family 25, model 17, AVX-512)");
        let newer = info.replace("avx512f", "avx512f avx512_bf16");
        assert_eq!(cpu_name(&newer), "Fast (family 25, model 17, AVX-512 with BF16)");
        assert_eq!(cpu_name(""), std::env::consts::ARCH);
    }

    #[test]
    fn ceilings_are_found() {
        let m = Machine::cpu(2);
        assert!(m.ceilings.f32.rate > 1e8 && m.ceilings.bandwidth > 1e7, "{m:?}");
        let cost = Cost { flops: m.ceilings.f32.rate as u64, bytes: 0 };
        assert!((m.ceilings.seconds(cost, false).unwrap() - 1.0).abs() < 1e-6);
        assert_eq!(Ceilings::default().seconds(cost, false), None);
    }
}
