//! ptxas, NVIDIA's assembler, and nvdisasm: what a GPU makes of the PTX.
//!
//! Their wheels hold programs, not libraries. Nothing that they write is kept: the driver assembles the PTX
//! again where it runs.
use crate::{
    Arch, Error, Result,
    wheel::{self, Cache, Wheel},
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The pinned assembler.
#[derive(Clone, Debug)]
pub struct Ptxas {
    program: PathBuf,
}

/// What an entry uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Its name.
    pub entry: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Static shared memory of a block, bytes.
    pub shared: u32,
    /// Stack of a thread, bytes.
    pub stack: u32,
    /// Bytes that registers are stored to, since there are too few.
    pub spill_stores: u32,
    /// Bytes that registers are loaded from.
    pub spill_loads: u32,
}

impl Ptxas {
    /// The pinned ptxas, fetched into `cache` if it is not there.
    ///
    /// # Errors
    /// Those of [`Cache::get`].
    pub fn open(cache: &Cache) -> Result<Ptxas> {
        Ok(Ptxas { program: program(cache, &wheel::PTXAS, "nvidia/cuda_nvcc/bin/ptxas")? })
    }

    /// Assembles a module and tells what its entries use, in the order of their names.
    ///
    /// # Errors
    /// [`Error::Ptxas`] where ptxas refuses the module or warns about it.
    pub fn assemble(&self, ptx: &Path, arch: Arch) -> Result<Vec<Usage>> {
        self.run(ptx, arch, Path::new("/dev/null"))
    }

    /// Assembles a module and disassembles the machine code.
    ///
    /// # Errors
    /// [`Error::Ptxas`], [`Error::File`], and those of [`Cache::get`].
    pub fn sass(&self, cache: &Cache, ptx: &Path, arch: Arch) -> Result<String> {
        let nvdisasm = program(cache, &wheel::NVDISASM, "nvidia/cu13/bin/nvdisasm")?;
        let cubin = std::env::temp_dir().join(format!("ptxc-{}.cubin", std::process::id()));
        let out = self.run(ptx, arch, &cubin).and_then(|_| {
            Command::new(&nvdisasm).arg("-c").arg(&cubin).output().map_err(|e| Error::file(&nvdisasm, e))
        });
        let _ = fs::remove_file(&cubin);
        let out = out?;
        match out.status.success() {
            true => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
            false => Err(Error::file(&nvdisasm, String::from_utf8_lossy(&out.stderr).trim())),
        }
    }

    fn run(&self, ptx: &Path, arch: Arch, cubin: &Path) -> Result<Vec<Usage>> {
        let mut ptxas = Command::new(&self.program);
        ptxas.args(["-v", "-warn-spills"]).arg(format!("-arch={arch}")).arg(ptx).arg("-o").arg(cubin);
        let out = ptxas.output().map_err(|e| Error::file(&self.program, e))?;
        let log = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        let bad = |why: String| Error::Ptxas { path: ptx.into(), why };
        if !out.status.success() {
            return Err(bad(log));
        }
        match warnings(&log) {
            w if w.is_empty() => usages(&log).map_err(bad),
            w => Err(bad(w.join("\n"))),
        }
    }
}

/// What ptxas complains about: warnings, and the advisories `(C75xx)` about wgmma and setmaxnreg, which it
/// calls information. Spills are counted apart.
fn warnings(log: &str) -> Vec<&str> {
    let complaint =
        |l: &&str| l.contains("warning") || l.contains("(C75") || l.contains("Potential Performance Loss");
    log.lines().filter(complaint).filter(|l| !l.contains("Registers are spilled")).collect()
}

/// Reads the listing of `-v`.
fn usages(log: &str) -> Result<Vec<Usage>, String> {
    let mut found: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let entry = rest.split('\'').next().unwrap_or_default().to_string();
            found.push(Usage { entry, ..Usage::default() });
        }
        let Some(last) = found.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            last.stack = before(line, " bytes stack frame")?;
            last.spill_stores = before(line, " bytes spill stores")?;
            last.spill_loads = before(line, " bytes spill loads")?;
        }
        if line.contains(" registers") && line.contains("Used ") {
            last.registers = before(line, " registers")?;
            last.shared = if line.contains(" bytes smem") { before(line, " bytes smem")? } else { 0 };
        }
    }
    if let Some(silent) = found.iter().find(|u| u.registers == 0) {
        return Err(format!("no register count of {} in the listing", silent.entry));
    }
    found.sort_by(|a, b| a.entry.cmp(&b.entry));
    Ok(found)
}

/// The number that stands before these words.
fn before(line: &str, words: &str) -> Result<u32, String> {
    let number = line.split_once(words).and_then(|(head, _)| head.rsplit(' ').next()?.parse().ok());
    number.ok_or_else(|| format!("no number before `{}` in `{line}`", words.trim()))
}

/// A program of a wheel. Unpacking a zip forgets that files may be run.
fn program(cache: &Cache, wheel: &Wheel, path: &str) -> Result<PathBuf> {
    let program = cache.get(wheel)?.join(path);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let set = fs::set_permissions(&program, fs::Permissions::from_mode(0o755));
        set.map_err(|e| Error::file(&program, e))?;
    }
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
ptxas info    : 20 bytes gmem
ptxas info    : Compiling entry function 'g' for 'sm_80'
ptxas info    : Function properties for g
    32 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, 32 bytes cumulative stack size, 1024 bytes smem, 388 bytes cmem[0]
ptxas info    : Compiling entry function 'f' for 'sm_80'
ptxas info    : Function properties for f
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, 384 bytes cmem[0]
";

    #[test]
    fn the_listing_is_read() {
        let [f, g] = &usages(LOG).unwrap()[..] else { panic!() };
        assert_eq!((f.entry.as_str(), f.registers, f.shared, f.stack), ("f", 14, 0, 0));
        assert_eq!((g.entry.as_str(), g.registers, g.shared, g.stack), ("g", 168, 1024, 32));
        assert_eq!((g.spill_stores, g.spill_loads), (4, 8));
        assert!(warnings(LOG).is_empty());
    }

    #[test]
    fn a_listing_without_a_count_is_no_listing() {
        let cut = LOG.replace("Used 14 registers", "Used some");
        assert_eq!(usages(&cut).unwrap_err(), "no register count of f in the listing");
        let odd = LOG.replace("4 bytes spill stores", "no bytes spill stores");
        assert!(usages(&odd).unwrap_err().starts_with("no number before `bytes spill stores`"));
    }

    #[test]
    fn advisories_about_wgmma_are_warnings() {
        for line in [
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",
            "ptxas warning : (C7508) setmaxnreg ignored to maintain minimum register requirement",
            "ptxas info    : (C7599) an advisory of a later release",
            "ptxas warning : Value of threads per SM for entry f is out of range",
        ] {
            assert_eq!(warnings(&format!("{LOG}{line}\n")), [line]);
        }
    }
}
