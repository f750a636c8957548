//! The directory of one training run: who may write to it, and where things lie in it.
//!
//! ```text
//! RUN/config.json   metrics.jsonl   report.html   summary.json   lock
//!     checkpoints/step-00000100/    samples/step-00000100.png
//! ```
use crate::error::{Error, Result};
use std::{
    ffi::OsStr,
    fmt,
    fs::{self, File, TryLockError},
    io::Write,
    path::{Path, PathBuf},
};

const LOCK: &str = "lock";

/// A run directory. While [`RunDir::create`] or [`RunDir::resume`] made it, no other process can.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// The lock of a run that is being written.
    _lock: Option<File>,
}

impl RunDir {
    /// Makes the directory of a new run and locks it.
    ///
    /// # Errors
    /// The directory holds something, or another process is writing to it.
    pub fn create(path: impl Into<PathBuf>) -> Result<RunDir> {
        let path = path.into();
        // Twice: strangers' folders get no lock file, and two processes may meet in an empty one.
        refuse_occupied(&path)?;
        let samples = path.join("samples");
        fs::create_dir_all(&path)
            .map_err(|e| failed(&path, format!("cannot be made: {e}; choose another --out")))?;
        let lock = lock(&path)?;
        refuse_occupied(&path)?;
        fs::create_dir(&samples).map_err(|e| failed(&samples, format!("cannot be made: {e}")))?;
        Ok(RunDir { path, _lock: Some(lock) })
    }

    /// Locks the directory of a run, to go on with it.
    ///
    /// # Errors
    /// There is no run, or another process is writing to it.
    pub fn resume(path: impl Into<PathBuf>) -> Result<RunDir> {
        let run = RunDir::open(path)?;
        Ok(RunDir { _lock: Some(lock(&run.path)?), ..run })
    }

    /// Looks at a run, whether or not it is being written.
    ///
    /// # Errors
    /// There is no run.
    pub fn open(path: impl Into<PathBuf>) -> Result<RunDir> {
        let run = RunDir { path: path.into(), _lock: None };
        if !run.config().is_file() {
            return Err(failed(run.path, "is no run: it has no config.json; give the --out of a training"));
        }
        Ok(run)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration of the run.
    pub fn config(&self) -> PathBuf {
        self.path.join("config.json")
    }

    /// One line per logged step: [`metrics`](crate::metrics).
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// The page to look at: [`report`](crate::report).
    pub fn report(&self) -> PathBuf {
        self.path.join("report.html")
    }

    /// The figures that the run is judged by.
    pub fn summary(&self) -> PathBuf {
        self.path.join("summary.json")
    }

    /// The folder of the checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// The checkpoint after `step` optimiser steps.
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.checkpoints().join(format!("step-{step:08}"))
    }

    /// The pictures sampled after `step` optimiser steps.
    pub fn sample(&self, step: u64) -> PathBuf {
        self.path.join("samples").join(format!("step-{step:08}.png"))
    }
}

/// A file error.
pub(crate) fn failed(path: impl Into<PathBuf>, why: impl fmt::Display) -> Error {
    Error::File { path: path.into(), why: why.to_string() }
}

/// Refuses what is no directory, or holds more than a lock.
fn refuse_occupied(path: &Path) -> Result<()> {
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    let listing = fs::read_dir(path)
        .map_err(|e| failed(path, format!("cannot be listed: {e}; choose another --out")))?;
    for entry in listing {
        let name = entry.map_err(|e| failed(path, format!("cannot be listed: {e}")))?.file_name();
        if name != LOCK {
            let name = name.display();
            let why = format!("is not empty (it holds {name}); pass --resume to go on, or another --out");
            return Err(failed(path, why));
        }
    }
    Ok(())
}

/// Locks a run, and leaves the process id for whoever finds it locked. The lock goes with the process.
fn lock(path: &Path) -> Result<File> {
    let at = path.join(LOCK);
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&at)
        .map_err(|e| failed(&at, format!("cannot be made: {e}; check the permissions")))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let holder = fs::read_to_string(&at).unwrap_or_default();
            let why = format!("process {} is writing to it; wait, or choose another --out", holder.trim());
            return Err(failed(path, why));
        }
        Err(TryLockError::Error(e)) => {
            return Err(failed(at, format!("cannot be locked: {e}; choose an --out on a local disk")));
        }
    }
    file.set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(|e| failed(&at, format!("cannot be written: {e}")))?;
    Ok(file)
}

/// Replaces a file as a whole: readers and crashes see the old one or the new one.
///
/// # Errors
/// Whatever the file system refuses; the old file is then untouched.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or(OsStr::new("")).to_owned();
    name.push(format!(".tmp-{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|e| {
        let _ = fs::remove_file(&temporary);
        failed(path, format!("cannot be written: {e}; check the free space and the permissions"))
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A folder that goes away with the test.
    pub(crate) struct Scratch(pub(crate) PathBuf);

    impl Scratch {
        pub(crate) fn new(name: &str) -> Scratch {
            let path = std::env::temp_dir().join(format!("transfusion-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Scratch(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_run_is_made_once_and_written_by_one() {
        let scratch = Scratch::new("run");
        let path = scratch.0.join("runs").join("first");
        let run = RunDir::create(&path).unwrap();
        assert!(RunDir::open(&path).unwrap_err().to_string().contains("no config.json"));
        write_atomic(&run.config(), b"{}").unwrap();
        let held = RunDir::resume(&path).unwrap_err().to_string();
        assert!(held.contains(&format!("process {} is writing", std::process::id())), "{held}");
        RunDir::open(&path).unwrap();
        let taken = RunDir::create(&path).unwrap_err().to_string();
        assert!(taken.contains("pass --resume") && taken.contains("first"), "{taken}");
        drop(run);
        let run = RunDir::resume(&path).unwrap();
        assert_eq!(run.checkpoint(100), path.join("checkpoints/step-00000100"));
        assert_eq!(run.sample(100), path.join("samples/step-00000100.png"));
        assert!(run.sample(100).parent().unwrap().is_dir());
    }

    #[test]
    fn strangers_folders_are_left_alone() {
        let scratch = Scratch::new("stranger");
        fs::write(scratch.0.join("thesis.tex"), "x").unwrap();
        assert!(RunDir::create(&scratch.0).unwrap_err().to_string().contains("it holds thesis.tex"));
        assert!(!scratch.0.join(LOCK).exists());
        assert!(RunDir::create(scratch.0.join("thesis.tex")).is_err());
        assert!(RunDir::create(scratch.0.join("thesis.tex").join("run")).is_err());
        // A run that died before its first file is no obstacle.
        fs::create_dir(scratch.0.join("dead")).unwrap();
        fs::write(scratch.0.join("dead").join(LOCK), "1\n").unwrap();
        RunDir::create(scratch.0.join("dead")).unwrap();
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let scratch = Scratch::new("atomic");
        let path = scratch.0.join("summary.json");
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        fs::create_dir(scratch.0.join("folder")).unwrap();
        for bad in ["folder", "none/file"] {
            assert!(write_atomic(&scratch.0.join(bad), b"x").unwrap_err().to_string().contains(bad));
        }
        assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 2);
    }
}
