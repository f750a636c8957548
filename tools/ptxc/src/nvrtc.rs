//! NVRTC, NVIDIA's compiler as a library.
//!
//! The few functions are looked up in the very library that was chosen. Bindings that search by name (cudarc
//! asks for `libnvrtc.so` first) would take the one of an installed CUDA toolkit instead of the pinned one, and
//! cannot take one of another major version.
#![allow(unsafe_code)] // Calls into a C library; each block says why it may.

use crate::{
    Arch, Error, Result, Source, canonical,
    source::OPTIONS,
    wheel::{self, Cache},
};
use libloading::{Library, Symbol};
use std::{
    error::Error as _,
    ffi::{CStr, CString, OsStr, c_char, c_int, c_void},
    fs,
    path::{Path, PathBuf},
    ptr,
};

/// Where NVRTC comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The pinned wheel, fetched on first use. Only its output may be committed.
    Pinned,
    /// Whatever the loader finds under the name `libnvrtc.so`.
    System,
    /// A library that the user names.
    At(PathBuf),
}

impl Choice {
    /// What a user says on a command line or in the environment: nothing, `system`, or a path.
    pub fn from_user(text: Option<&OsStr>) -> Choice {
        match text {
            None => Choice::Pinned,
            Some(t) if t.is_empty() => Choice::Pinned,
            Some(t) if t == "system" => Choice::System,
            Some(path) => Choice::At(path.into()),
        }
    }
}

/// What a compilation gives.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The PTX, in its committed form.
    pub ptx: String,
    /// Warnings, with the files as they are on disk; empty as a rule.
    pub warnings: String,
}

/// A loaded NVRTC.
#[derive(Debug)]
pub struct Nvrtc {
    library: Library,
    _builtins: Option<Library>,
    version: (c_int, c_int),
}

const SUCCESS: c_int = 0;
const COMPILATION: c_int = 6;

type Program = *mut c_void;
type SizeOf = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type TextOf = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

impl Nvrtc {
    /// Loads NVRTC; the pinned one is fetched into `cache` if it is not there.
    ///
    /// # Errors
    /// [`Error::Library`] where the library cannot be loaded or is not NVRTC; those of [`Cache::get`].
    pub fn open(choice: &Choice, cache: &Cache) -> Result<Nvrtc> {
        match choice {
            Choice::Pinned => {
                let lib = cache.get(&wheel::NVRTC)?.join("nvidia/cuda_nvrtc/lib");
                Nvrtc::load(&lib.join("libnvrtc.so.12"))
            }
            Choice::System => {
                let names = ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"];
                let mut found = names.iter().map(|n| Nvrtc::load(Path::new(n)));
                found.find(Result::is_ok).unwrap_or_else(|| Nvrtc::load(Path::new(names[0])))
            }
            Choice::At(path) => Nvrtc::load(&fs::canonicalize(path).map_err(|e| {
                let why = e.to_string();
                Error::Library { path: path.clone(), why }
            })?),
        }
    }

    fn load(path: &Path) -> Result<Nvrtc> {
        let why = |e| Error::Library { path: path.into(), why: reason(e) };
        let builtins = builtins(path).map(load_library).transpose().map_err(why)?;
        let library = load_library(path.into()).map_err(why)?;
        let mut nvrtc = Nvrtc { library, _builtins: builtins, version: (0, 0) };
        let (mut major, mut minor) = (0, 0);
        let version: Symbol<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int> =
            nvrtc.symbol(c"nvrtcVersion").map_err(|e| match e {
                Error::Nvrtc { why, .. } => {
                    Error::Library { path: path.into(), why: format!("not NVRTC: {why}") }
                }
                e => e,
            })?;
        // SAFETY: the signature is that of nvrtc.h; both pointers live through the call.
        let status = unsafe { version(&mut major, &mut minor) };
        nvrtc.check("nvrtcVersion", status)?;
        nvrtc.version = (major, minor);
        Ok(nvrtc)
    }

    /// Major and minor version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles a source for one architecture.
    ///
    /// # Errors
    /// [`Error::Compile`] with NVRTC's log; [`Error::Nvrtc`] where NVRTC itself fails.
    pub fn compile(&self, source: &Source, arch: Arch) -> Result<Compiled> {
        let program = self.program(source)?;
        let status = self.run(&program, arch)?;
        let log = on_disk(source, &self.text(&program, c"nvrtcGetProgramLogSize", c"nvrtcGetProgramLog")?);
        if status == COMPILATION {
            return Err(Error::Compile { path: source.path.clone(), log });
        }
        self.check("nvrtcCompileProgram", status).map_err(|e| with_log(e, &log))?;
        let ptx = self.text(&program, c"nvrtcGetPTXSize", c"nvrtcGetPTX")?;
        Ok(Compiled {
            ptx: canonical::canonical(&ptx, arch, &source.stamp(arch, self.version)),
            warnings: log,
        })
    }

    fn program<'a>(&'a self, source: &Source) -> Result<Owned<'a>> {
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        let create: Symbol<Create> = self.symbol(c"nvrtcCreateProgram")?;
        let text = |t: &str| CString::new(t).map_err(|e| Error::source(&source.path, 0, e));
        let (code, name) = (text(&source.text)?, text(&source.unit())?);
        let texts = source.headers.iter().map(|h| text(&h.text)).collect::<Result<Vec<_>>>()?;
        let names = source.headers.iter().map(|h| text(&h.name)).collect::<Result<Vec<_>>>()?;
        let (texts, names) = (pointers(&texts), pointers(&names));
        let mut program = ptr::null_mut();
        let count = texts.len() as c_int;
        // SAFETY: the signature is that of nvrtc.h; NVRTC copies the strings, which live through the call.
        let status = unsafe {
            create(&mut program, code.as_ptr(), name.as_ptr(), count, texts.as_ptr(), names.as_ptr())
        };
        self.check("nvrtcCreateProgram", status)?;
        Ok(Owned { nvrtc: self, program })
    }

    fn run(&self, program: &Owned, arch: Arch) -> Result<c_int> {
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
        let compile: Symbol<Compile> = self.symbol(c"nvrtcCompileProgram")?;
        let mut options = vec![format!("--gpu-architecture={}", arch.compute())];
        options.extend(OPTIONS.map(String::from));
        let bad = |e| Error::Nvrtc { call: "nvrtcCompileProgram", why: format!("{e}") };
        let options =
            options.into_iter().map(|o| CString::new(o).map_err(bad)).collect::<Result<Vec<_>>>()?;
        let options = pointers(&options);
        // SAFETY: the signature is that of nvrtc.h; the program is live, the strings live through the call.
        Ok(unsafe { compile(program.program, options.len() as c_int, options.as_ptr()) })
    }

    /// A text that NVRTC hands out as a size and a copy.
    fn text(&self, program: &Owned, size: &'static CStr, copy: &'static CStr) -> Result<String> {
        let (size_of, text_of): (Symbol<SizeOf>, Symbol<TextOf>) = (self.symbol(size)?, self.symbol(copy)?);
        let mut bytes = 0;
        // SAFETY: the signatures are those of nvrtc.h; the program is live; the buffer has the size asked for.
        let buffer = unsafe {
            self.check("reading a size", size_of(program.program, &mut bytes))?;
            let mut buffer = vec![0u8; bytes];
            self.check("reading a text", text_of(program.program, buffer.as_mut_ptr().cast()))?;
            buffer
        };
        Ok(String::from_utf8_lossy(&buffer).trim_end_matches('\0').to_string())
    }

    fn symbol<T>(&self, name: &'static CStr) -> Result<Symbol<'_, T>> {
        // SAFETY: callers ask for the signature that nvrtc.h declares under this name.
        unsafe { self.library.get(name.to_bytes_with_nul()) }
            .map_err(|e| Error::Nvrtc { call: "looking up a function", why: reason(e) })
    }

    fn check(&self, call: &'static str, status: c_int) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        let words: Symbol<unsafe extern "C" fn(c_int) -> *const c_char> =
            self.symbol(c"nvrtcGetErrorString")?;
        // SAFETY: the signature is that of nvrtc.h, which promises a static string for every value.
        let why = unsafe { CStr::from_ptr(words(status)) }.to_string_lossy().into_owned();
        Err(Error::Nvrtc { call, why })
    }
}

/// A program of NVRTC, destroyed at the end of its life.
struct Owned<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
        if let Ok(destroy) = self.nvrtc.symbol::<Destroy>(c"nvrtcDestroyProgram") {
            // SAFETY: the signature is that of nvrtc.h; nothing uses the program after this.
            unsafe { destroy(&mut self.program) };
        }
    }
}

/// The library of built-in functions that NVRTC loads by name; from beside it, if it stands there: not every
/// release looks there itself.
fn builtins(path: &Path) -> Option<PathBuf> {
    let beside = fs::read_dir(path.parent()?).ok()?.flatten().map(|e| e.path());
    let name = |p: &PathBuf| p.file_name()?.to_str().map(|n| n.starts_with("libnvrtc-builtins.so"));
    beside.filter(|p| name(p) == Some(true)).max()
}

fn load_library(path: PathBuf) -> Result<Library, libloading::Error> {
    // SAFETY: runs the constructors of the library that the user chose or that the pinned hash vouches for.
    unsafe { Library::new(path) }
}

/// What the loader said; the error itself names only the call.
fn reason(e: libloading::Error) -> String {
    e.source().map_or(e.to_string(), |cause| cause.to_string())
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|s| s.as_ptr()).collect()
}

/// A log with the names that NVRTC knows replaced by the paths of the files, as `path:line` would be: NVRTC
/// writes `name(line): error: ...`.
fn on_disk(source: &Source, log: &str) -> String {
    let names = source.headers.iter().map(|h| (h.name.clone(), &h.path));
    let names: Vec<(String, &PathBuf)> = names.chain([(source.unit(), &source.path)]).collect();
    let line = |line: &str| {
        let found = names.iter().find_map(|(name, path)| {
            let rest = line.strip_prefix(name.as_str())?.strip_prefix('(')?;
            let (number, rest) = rest.split_once(')')?;
            Some(format!("{}:{number}{rest}", path.display()))
        });
        found.unwrap_or_else(|| line.to_string())
    };
    log.lines().map(line).collect::<Vec<_>>().join("\n").trim().to_string()
}

fn with_log(e: Error, log: &str) -> Error {
    match e {
        Error::Nvrtc { call, why } if !log.is_empty() => Error::Nvrtc { call, why: format!("{why}\n{log}") },
        e => e,
    }
}
