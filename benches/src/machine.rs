//! What a measurement ran on, and the most that it can do.
use crate::error::{Error, Result};
use std::{
    hint::black_box,
    process::Command,
    sync::Barrier,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use transfusion_core::{
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
    /// Multiply-adds in f32, FLOP/s: measured on a CPU, of the data sheet or the clock on a GPU.
    pub f32: f64,
    /// Products in bf16, FLOP/s; on a CPU those of f32, which do them.
    pub bf16: f64,
    /// Bytes/s to and from memory; 0 is unknown.
    pub bandwidth: f64,
}

impl Ceilings {
    /// The rate of a type's products.
    pub fn rate(&self, bf16: bool) -> f64 {
        if bf16 { self.bf16 } else { self.f32 }
    }

    /// The least seconds for this; `None` where the bandwidth is unknown.
    pub fn seconds(&self, cost: Cost, bf16: bool) -> Option<f64> {
        let known = self.bandwidth > 0.0 && self.rate(bf16) > 0.0;
        known.then(|| (cost.flops as f64 / self.rate(bf16)).max(cost.bytes as f64 / self.bandwidth))
    }
}

impl Machine {
    /// This CPU with so many threads; 0 is one for each core. It is measured, for about half a second.
    pub fn cpu(threads: usize) -> Machine {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { cores } else { threads };
        let f32 = peak(threads, Duration::from_millis(200));
        let ceilings = Ceilings { f32, bf16: f32, bandwidth: bandwidth(threads) };
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
    match sheet {
        Some(r) => Ceilings { f32: r.f32, bf16: r.target.peak, bandwidth: r.bandwidth },
        None => {
            let lanes = f64::from(gpu.sms) * gpu.clock as f64;
            Ceilings { f32: 256.0 * lanes, bf16: 1024.0 * lanes, bandwidth: 0.0 }
        }
    }
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
    format!("{name} (family {}, model {}{vectors})", part("cpu family"), part("model"))
}

/// What `threads` threads do at once, added up: each calls `work` again and again for a while, the best piece
/// counting, in units of `work` a second.
fn together<W>(threads: usize, time: Duration, make: impl Fn() -> W + Sync) -> f64
where
    W: FnMut() -> f64,
{
    let ready = Barrier::new(threads);
    let one = || {
        let mut work = make();
        work();
        ready.wait();
        let (begin, mut best) = (Instant::now(), 0.0f64);
        while begin.elapsed() < time {
            let start = Instant::now();
            let done = work();
            best = best.max(done / start.elapsed().as_secs_f64());
        }
        best
    };
    std::thread::scope(|s| {
        let all: Vec<_> = (0..threads).map(|_| s.spawn(one)).collect();
        all.into_iter().map(|t| t.join().unwrap_or(0.0)).sum()
    })
}

/// Multiply-adds in registers, FLOP/s of all threads.
pub fn peak(threads: usize, time: Duration) -> f64 {
    together(threads, time, || || pulp::Arch::new().dispatch(MultiplyAdds))
}

/// Independent sums: enough to hide the latency of two units.
const SUMS: usize = 16;
/// Rounds of a piece: a fraction of a millisecond.
const ROUNDS: usize = 20_000;

struct MultiplyAdds;

impl pulp::WithSimd for MultiplyAdds {
    /// FLOP done.
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) -> f64 {
        let x = simd.splat_f32s(black_box(0.999));
        let y = simd.splat_f32s(black_box(1e-3));
        let mut sums = [simd.splat_f32s(1.0); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = simd.mul_add_f32s(*sum, x, y);
            }
        }
        let total = sums.into_iter().fold(simd.splat_f32s(0.0), |a, b| simd.add_f32s(a, b));
        black_box(simd.reduce_sum_f32s(total));
        (2 * SUMS * ROUNDS * S::F32_LANES) as f64
    }
}

/// Bytes/s read and written by a copy of more than any cache holds.
fn bandwidth(threads: usize) -> f64 {
    const BYTES: usize = 128 << 20;
    let bytes = BYTES / threads;
    together(threads, Duration::from_millis(150), || {
        let (from, mut to) = (vec![1u8; bytes], vec![0u8; bytes]);
        move || {
            to.copy_from_slice(black_box(&from));
            black_box(&mut to);
            2.0 * bytes as f64
        }
    })
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
        assert_eq!(cpu_name(""), std::env::consts::ARCH);
    }

    #[test]
    fn ceilings_are_found() {
        let m = Machine::cpu(2);
        assert!(m.ceilings.f32 > 1e8 && m.ceilings.bandwidth > 1e7, "{m:?}");
        let cost = Cost { flops: m.ceilings.f32 as u64, bytes: 0 };
        assert!((m.ceilings.seconds(cost, false).unwrap() - 1.0).abs() < 1e-6);
        assert_eq!(Ceilings::default().seconds(cost, false), None);
    }
}
