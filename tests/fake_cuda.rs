//! A pretended NVIDIA driver for machines without a GPU: the library of `fake-cuda/libcuda.rs`, compiled when
//! a test first asks for it, and processes that find it in place of a real one.
use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Mutex,
};

/// Every name under which a driver's library might be looked for, here or on a machine that has one.
const NAMES: [&str; 2] = ["libcuda.so", "libcuda.so.1"];

/// What makes a test's process its own child.
const INSIDE: &str = "FAKE_CUDA_INSIDE";

/// A folder with a driver's library; `variant` is empty, `bare`, `old` or `plain`. `target` is the test's own folder
/// for files.
pub fn driver(target: &Path, variant: &str) -> PathBuf {
    static BUILDING: Mutex<()> = Mutex::new(());
    let _building = BUILDING.lock();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fake-cuda/libcuda.rs");
    let folder = target.join(format!("fake-cuda-{variant}"));
    let changed = |path: &Path| path.metadata().and_then(|m| m.modified()).ok();
    if NAMES.iter().all(|name| changed(&folder.join(name)) > changed(&source)) {
        return folder;
    }
    fs::create_dir_all(&folder).unwrap();
    let fresh = folder.join(format!("fresh-{}.so", std::process::id()));
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()));
    rustc.args([
        "--edition",
        "2024",
        "--crate-type",
        "cdylib",
        "--crate-name",
        "cuda",
        "--cap-lints",
        "allow",
    ]);
    rustc.args(["-C", "opt-level=1", "-C", "panic=abort", "-o"]).arg(&fresh).arg(&source);
    if !variant.is_empty() {
        rustc.args(["--cfg", variant]);
    }
    let out = rustc.output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    // Put in place whole, since tests of several processes come here at once.
    for name in NAMES {
        let copy = folder.join(format!("{name}-{}", std::process::id()));
        fs::copy(&fresh, &copy).unwrap();
        fs::rename(&copy, folder.join(name)).unwrap();
    }
    fs::remove_file(fresh).unwrap();
    folder
}

/// A folder with files that are no libraries, under which no driver is found, whatever the machine has.
pub fn no_driver(target: &Path) -> PathBuf {
    let folder = target.join("fake-cuda-none");
    fs::create_dir_all(&folder).unwrap();
    NAMES.iter().for_each(|name| fs::write(folder.join(name), "this is no library\n").unwrap());
    folder
}

/// Lets a process find the driver of this folder, in this condition: pairs as `("", "stub")` for
/// `FAKE_CUDA=stub`, `("_DEVICES", "2")` for `FAKE_CUDA_DEVICES=2`.
pub fn install<'a>(
    command: &'a mut Command,
    folder: &Path,
    condition: &[(&str, impl AsRef<OsStr>)],
) -> &'a mut Command {
    command.env("LD_LIBRARY_PATH", folder).env_remove("CUDA_VISIBLE_DEVICES");
    for (name, value) in condition {
        command.env(format!("FAKE_CUDA{name}"), value);
    }
    command
}

/// Runs the test of this name again in a process of its own that has this driver. There it answers true,
/// and any panic aborts; here it answers false, after the child has succeeded.
pub fn enter(test: &str, folder: &Path, condition: &[(&str, impl AsRef<OsStr>)]) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            print(panic);
            std::process::abort();
        }));
        return true;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(INSIDE, "1");
    let out = install(&mut child, folder, condition).output().unwrap();
    assert!(
        out.status.success() && said(&out).contains("1 passed"),
        "{test}: {}\n{}",
        out.status,
        said(&out)
    );
    false
}

/// Whether this is the child of [`enter`].
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Everything that a process printed.
pub fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}
