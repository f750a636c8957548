//! The compiled kernels of transfusion: PTX text by architecture, and what launching an entry must know.
//!
//! ```
//! for module in transfusion_ptx::modules() {
//!     for entry in module.entries()? {
//!         println!("{} {} {}", module.arch, entry.name, entry.param_bytes());
//!     }
//! }
//! # Ok::<(), transfusion_ptx::Error>(())
//! ```
//!
//! [`find`] picks the kernel for a machine: PTX for `sm_90a` runs on Hopper alone, PTX for `sm_80` on Ampere and
//! everything after it. A text compiled at run time is a [`Module`] like any other.
mod modules;
mod scan;

pub use scan::Error;
use std::borrow::Cow;

/// The architecture whose PTX every newer one runs.
pub const BASE: &str = "sm_80";

/// One PTX text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// What it is compiled for: `sm_80`, `sm_90a`.
    pub arch: Cow<'static, str>,
    /// Path of its source below `kernels-cu/`, without `.cu`: `rmsnorm`.
    pub stem: Cow<'static, str>,
    /// The text, as the driver takes it.
    pub text: Cow<'static, str>,
}

/// An entry of a module: how it may be launched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name, as the driver looks it up.
    pub name: String,
    /// Line of the text, from 1.
    pub line: usize,
    /// Its parameters, in order.
    pub params: Vec<Param>,
    /// The most threads a block may have, from `.maxntid` or `.reqntid`.
    pub max_threads: Option<u32>,
    /// The very shape a block must have, from `.reqntid`.
    pub block: Option<[u32; 3]>,
    /// The very shape a cluster must have, from `.reqnctapercluster`.
    pub cluster: Option<[u32; 3]>,
    /// Shared memory that every block has before any that the launch asks for, bytes: the static variables,
    /// rounded up to the alignment of the dynamic array where there is one.
    pub static_shared: u32,
}

impl Entry {
    /// Size of the parameter buffer: where the last parameter ends, bytes.
    pub fn param_bytes(&self) -> u32 {
        self.params.last().map_or(0, |p| p.offset + p.size)
    }
}

/// A parameter: its place in the parameter buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    /// First byte.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// Alignment, bytes.
    pub align: u32,
    /// What it holds.
    pub kind: Kind,
}

/// What a parameter holds, as far as PTX says it. Pointers are `U64`; signed and untyped integers are those
/// of their width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 8 bits.
    U8,
    /// 16 bits, also of half-precision floats.
    U16,
    /// 32 bits.
    U32,
    /// 64 bits, or an address.
    U64,
    /// Single precision.
    F32,
    /// Double precision.
    F64,
    /// A structure by value, such as a tensor map of 128 bytes.
    Bytes,
}

impl Module {
    /// A module that is not part of this crate, such as a kernel compiled at run time.
    pub fn new(arch: impl Into<String>, stem: impl Into<String>, text: impl Into<String>) -> Module {
        Module { arch: arch.into().into(), stem: stem.into().into(), text: text.into().into() }
    }

    /// A module of a text that lies in the program.
    pub const fn from_static(arch: &'static str, stem: &'static str, text: &'static str) -> Module {
        Module { arch: Cow::Borrowed(arch), stem: Cow::Borrowed(stem), text: Cow::Borrowed(text) }
    }

    /// Every entry of the module, in the order of the text.
    ///
    /// # Errors
    /// With the line, where a declaration is not PTX.
    pub fn entries(&self) -> Result<Vec<Entry>, Error> {
        scan::entries(&self.text)
    }

    /// The entry of this name, if the module has it.
    ///
    /// # Errors
    /// Those of [`Module::entries`].
    pub fn entry(&self, name: &str) -> Result<Option<Entry>, Error> {
        if !self.text.contains(name) {
            return Ok(None);
        }
        Ok(self.entries()?.into_iter().find(|e| e.name == name))
    }
}

/// The modules of this crate, by architecture and stem.
pub fn modules() -> &'static [Module] {
    modules::MODULES
}

/// The kernel of this name for a machine of architecture `arch`: compiled for that architecture where there
/// is one, for [`BASE`] otherwise. `None` where there is no such kernel, or the machine is older than `BASE`.
pub fn find(arch: &str, entry: &str) -> Option<(&'static Module, Entry)> {
    find_in(modules(), arch, entry)
}

fn find_in<'a>(modules: &'a [Module], arch: &str, entry: &str) -> Option<(&'a Module, Entry)> {
    let exact = modules.iter().filter(|m| m.arch == arch);
    let base = modules.iter().filter(|m| m.arch == BASE && arch != BASE && runs_base(arch));
    exact.chain(base).find_map(|m| Some((m, m.entry(entry).ok()??)))
}

/// Whether a machine of this architecture runs PTX for [`BASE`].
fn runs_base(arch: &str) -> bool {
    let number = |a: &str| a.strip_prefix("sm_")?.trim_end_matches(['a', 'f']).parse::<u32>().ok();
    number(arch) >= number(BASE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn module(arch: &str, stem: &str, entries: &[&str]) -> Module {
        let text: String = entries.iter().map(|e| format!(".visible .entry {e}()\n{{\nret;\n}}\n")).collect();
        Module::new(arch, stem, text)
    }

    #[test]
    fn every_module_is_scanned_and_no_entry_stands_twice() {
        let mut seen = HashSet::new();
        for m in modules() {
            let entries = m.entries().unwrap_or_else(|e| panic!("{}/{}: {e}", m.arch, m.stem));
            assert!(!entries.is_empty(), "{}/{} has no entry", m.arch, m.stem);
            for e in entries {
                let (found, same) = find(&m.arch, &e.name).unwrap();
                assert_eq!((found, &same), (m, &e));
                assert!(seen.insert((&m.arch, e.name.clone())), "{} stands twice for {}", e.name, m.arch);
            }
        }
    }

    #[test]
    fn every_module_says_its_architecture() {
        for m in modules() {
            assert!(m.text.lines().any(|l| l == format!(".target {}", m.arch)), "{}/{}", m.arch, m.stem);
        }
    }

    #[test]
    fn hopper_falls_back_and_ampere_does_not_climb() {
        let all = [module("sm_80", "a", &["f", "g"]), module("sm_90a", "b", &["g", "h"])];
        let arch = |arch, entry| find_in(&all, arch, entry).map(|(m, _)| m.arch.as_ref());
        assert_eq!(arch("sm_90a", "f"), Some("sm_80"));
        assert_eq!(arch("sm_90a", "g"), Some("sm_90a"));
        assert_eq!(arch("sm_80", "g"), Some("sm_80"));
        assert_eq!(arch("sm_80", "h"), None);
        assert_eq!(arch("sm_100a", "g"), Some("sm_80"));
        assert_eq!(arch("sm_100a", "h"), None);
        assert_eq!(arch("sm_75", "f"), None);
        assert_eq!(arch("whatever", "f"), None);
    }

    #[test]
    fn a_name_is_matched_whole_and_the_ladder_is_left_out() {
        let all = [module("sm_80", "linear", &["linear_nt_bf16"])];
        assert!(find_in(&all, "sm_80", "linear_nt").is_none());
        assert!(find_in(&all, "sm_80", "linear_nt_bf16").is_some());
        assert!(modules().iter().all(|m| !m.stem.starts_with("ladder/")));
    }
}
