//! The pinned CUDA tools: wheels of PyPI, verified by SHA-256, unpacked into a cache folder.
//!
//! Python fetches and unpacks them (`pip download`, `zipfile`). An HTTPS client in Rust would cost some thirty
//! crates and a TLS library that wants a C compiler, for something that only authors of kernels do once; pip
//! knows proxies and mirrors as well. Nothing trusts it: the hash is taken here, of the file that is unpacked.
//!
//! The wheels are proprietary. They stay in the cache, which git ignores, and nothing out of them is shipped.
use crate::{Error, Result, source::hex};
use sha2::{Digest, Sha256};
use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

/// A wheel of PyPI, by hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wheel {
    /// Name on PyPI.
    pub package: &'static str,
    /// Version.
    pub version: &'static str,
    /// File name.
    pub file: &'static str,
    /// SHA-256 of the file.
    pub sha256: &'static str,
}

/// The compiler, 25 MB.
pub const NVRTC: Wheel = Wheel {
    package: "nvidia-cuda-nvrtc-cu12",
    version: "12.4.127",
    file: "nvidia_cuda_nvrtc_cu12-12.4.127-py3-none-manylinux2014_x86_64.whl",
    sha256: "a178759ebb095827bd30ef56598ec182b85547f1508941a3d560eb7ea1fbf338",
};

/// The assembler, 22 MB.
pub const PTXAS: Wheel = Wheel {
    package: "nvidia-cuda-nvcc-cu12",
    version: "12.4.131",
    file: "nvidia_cuda_nvcc_cu12-12.4.131-py3-none-manylinux2014_x86_64.whl",
    sha256: "e4c9a35435c3b0e36c6397c5696334c9ea6650e524736cbd1c5d345ea099bb04",
};

/// The disassembler, 4 MB.
pub const NVDISASM: Wheel = Wheel {
    package: "nvidia-cuda-nvdisasm",
    version: "13.2.86",
    file: "nvidia_cuda_nvdisasm-13.2.86-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    sha256: "53606e719ecae07a2335f95902d5a1393a0cc1c317499ee7ffcf628a44385f2c",
};

/// A folder of unpacked wheels.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
    python: PathBuf,
}

impl Cache {
    /// The cache at `dir`, which is made when something is put into it.
    pub fn new(dir: impl Into<PathBuf>) -> Cache {
        Cache { dir: dir.into(), python: "python3".into() }
    }

    /// Fetches with this Python instead of `python3`.
    pub fn with_python(self, python: impl Into<PathBuf>) -> Cache {
        Cache { python: python.into(), ..self }
    }

    /// The folder of a wheel, fetched first if it is not there: either complete and verified, or an error.
    /// A wheel that someone put into the cache by hand is used instead of the network.
    ///
    /// # Errors
    /// [`Error::Platform`], [`Error::Python`], [`Error::Download`], [`Error::Hash`], [`Error::File`].
    pub fn get(&self, wheel: &Wheel) -> Result<PathBuf> {
        let home = self.dir.join(format!("{}-{}", wheel.package, wheel.version));
        if home.is_dir() {
            return Ok(home);
        }
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            let here = format!("{} {}", std::env::consts::OS, std::env::consts::ARCH);
            return Err(Error::Platform { here });
        }
        let work = Work::new(&self.dir)?;
        let given = self.dir.join(wheel.file);
        let file = if given.is_file() { given.clone() } else { self.download(wheel, &work.0)? };
        verify(&file, wheel.sha256)?;
        let unpacked = work.0.join("unpacked");
        self.unpack(&file, &unpacked)?;
        match fs::rename(&unpacked, &home) {
            Err(_) if home.is_dir() => Ok(home), // another process was faster
            Err(e) => Err(Error::file(home, e)),
            Ok(()) => Ok(home),
        }
    }

    fn download(&self, wheel: &Wheel, work: &Path) -> Result<PathBuf> {
        let list = work.join("requirements.txt");
        let line = format!("{}=={} --hash=sha256:{}\n", wheel.package, wheel.version, wheel.sha256);
        fs::write(&list, line).map_err(|e| Error::file(&list, e))?;
        let mut pip = Command::new(&self.python);
        pip.args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--require-hashes",
            "--only-binary=:all:",
        ])
        .args(["--disable-pip-version-check", "--no-input", "--platform", "manylinux2014_x86_64", "--dest"])
        .arg(work)
        .arg("--requirement")
        .arg(&list);
        self.run(pip, |why| match why.contains("No module named") {
            true => Error::Python { why },
            false => Error::Download { wheel: wheel.file.into(), at: self.dir.join(wheel.file), why },
        })?;
        Ok(work.join(wheel.file))
    }

    fn unpack(&self, file: &Path, into: &Path) -> Result<()> {
        let mut zip = Command::new(&self.python);
        zip.args(["-m", "zipfile", "-e"]).arg(file).arg(into);
        self.run(zip, |why| Error::file(file, why))
    }

    fn run(&self, mut command: Command, failed: impl FnOnce(String) -> Error) -> Result<()> {
        let missing = |e: io::Error| Error::Python { why: format!("{}: {e}", self.python.display()) };
        let out = command.output().map_err(missing)?;
        if out.status.success() {
            return Ok(());
        }
        let why = reason(&String::from_utf8_lossy(&out.stderr));
        Err(failed(if why.is_empty() { out.status.to_string() } else { why }))
    }
}

/// What a failed command said: its last line, behind the last warning, where pip names what is wrong with the
/// network.
fn reason(stderr: &str) -> String {
    let lines = || stderr.lines().map(str::trim).filter(|l| !l.is_empty());
    let warning = lines().rfind(|l| l.starts_with("WARNING"));
    let last = lines().next_back().filter(|l| Some(*l) != warning);
    let short = |l: &str| l.chars().take(300).collect::<String>();
    warning.into_iter().chain(last).map(short).collect::<Vec<_>>().join("\n  ")
}

/// Refuses, and removes, a file with another hash.
fn verify(path: &Path, want: &str) -> Result<()> {
    let found = sha256(path).map_err(|e| Error::file(path, e))?;
    if found == want {
        return Ok(());
    }
    fs::remove_file(path).map_err(|e| Error::file(path, e))?;
    Err(Error::Hash { path: path.into(), want: want.into(), found })
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    let (mut hash, mut chunk) = (Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&chunk[..n]),
        }
    }
}

/// A folder for one fetch, gone when the fetch ends; one that a killed process left is removed by the next.
struct Work(PathBuf);

impl Work {
    const PREFIX: &str = "fetch-";

    fn new(cache: &Path) -> Result<Work> {
        fs::create_dir_all(cache).map_err(|e| Error::file(cache, e))?;
        Work::sweep(cache);
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = cache.join(format!("{}{}-{count}", Work::PREFIX, std::process::id()));
        fs::create_dir(&path).map_err(|e| Error::file(&path, e))?;
        Ok(Work(path))
    }

    fn sweep(cache: &Path) {
        for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let owner = name.to_str().and_then(|n| n.strip_prefix(Work::PREFIX)?.split('-').next());
            if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_a_failed_command() {
        assert_eq!(reason(""), "");
        assert_eq!(reason("a\nb\n\n"), "b");
        assert_eq!(
            reason("WARNING: refused\nWARNING: again\nERROR: x\nERROR: none\n"),
            "WARNING: again\n  ERROR: none"
        );
        assert_eq!(reason("WARNING: only\n"), "WARNING: only");
        assert_eq!(reason(&"é".repeat(400)).chars().count(), 300);
    }
}
