//! A tree with `kernels-cu/` and `ptx/`: what is compiled into what, and whether the two belong together.
use crate::{
    Arch, Contract, Error, Nvrtc, Result, Source, canonical,
    ptxas::{Ptxas, Usage},
    source::COMPILER,
};
use std::{
    fs,
    path::{Path, PathBuf},
};
use transfusion_ptx::Module;

/// The folder of headers, which are not compiled by themselves.
const COMMON: &str = "common";

/// The folder of versions kept for learning, which are compiled and checked like the others, but embedded in no
/// program.
const LADDER: &str = "ladder/";

/// A tree with kernels.
#[derive(Clone, Debug)]
pub struct Tree {
    root: PathBuf,
}

/// One PTX file of a tree, and what it is compiled from.
#[derive(Clone, Debug)]
pub struct Output {
    /// The file.
    pub path: PathBuf,
    /// Its source.
    pub source: Source,
    /// Its architecture.
    pub arch: Arch,
}

impl Output {
    fn compile(&self, nvrtc: &Nvrtc) -> Result<(String, String)> {
        let compiled = nvrtc.compile(&self.source, self.arch)?;
        self.hold(&compiled.ptx)?;
        Ok((compiled.ptx, compiled.warnings))
    }

    /// Holds the contract of the source against a PTX text.
    fn hold(&self, ptx: &str) -> Result<()> {
        let Source { path, text, stem, .. } = &self.source;
        let module = Module::new(self.arch.name(), stem.as_str(), ptx);
        Contract::read(path, text)?.hold(path, text, self.arch, &module)
    }
}

/// What a build did.
#[derive(Clone, Debug, Default)]
pub struct Built {
    /// Files that were written, with new contents.
    pub written: Vec<PathBuf>,
    /// Files that were removed, since nothing compiles to them.
    pub removed: Vec<PathBuf>,
    /// Warnings of the compiler.
    pub warnings: Vec<String>,
}

impl Tree {
    /// The tree at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Tree {
        Tree { root: root.into() }
    }

    /// Folder of the sources.
    pub fn kernels(&self) -> PathBuf {
        self.root.join("kernels-cu")
    }

    /// Folder of the PTX.
    pub fn ptx(&self) -> PathBuf {
        self.root.join("ptx")
    }

    /// Where headers are looked for, beside the including file.
    pub fn include(&self) -> Vec<PathBuf> {
        vec![self.kernels(), self.kernels().join(COMMON)]
    }

    /// Every kernel source, by stem. None where there is no `kernels-cu/`.
    ///
    /// # Errors
    /// Those of [`Source::read`].
    pub fn sources(&self) -> Result<Vec<Source>> {
        let files = files(&self.kernels(), "cu", &[&self.kernels().join(COMMON)])?;
        let include = self.include();
        files.iter().map(|(stem, path)| Source::read(path, stem, &include)).collect()
    }

    /// Every PTX file that there should be.
    ///
    /// # Errors
    /// Those of [`Source::read`].
    pub fn outputs(&self) -> Result<Vec<Output>> {
        let mut outputs = Vec::new();
        for source in self.sources()? {
            for &arch in &source.targets {
                let path = self.ptx().join(arch.name()).join(format!("{}.ptx", source.stem));
                outputs.push(Output { path, source: source.clone(), arch });
            }
        }
        Ok(outputs)
    }

    /// Compiles sources and writes what has changed: those named by stem, or all if none is named. With all,
    /// files that nothing compiles to are removed. Nothing is written unless everything compiles and keeps
    /// its contract.
    ///
    /// # Errors
    /// [`Error::Library`] for a compiler other than the pinned version; [`Error::Compile`];
    /// [`Error::Source`], also for a broken contract or an unknown stem; [`Error::File`].
    pub fn build(&self, nvrtc: &Nvrtc, stems: &[String]) -> Result<Built> {
        require_pinned(nvrtc)?;
        let outputs = self.outputs()?;
        if let Some(unknown) = stems.iter().find(|s| outputs.iter().all(|o| o.source.stem != **s)) {
            return Err(Error::source(self.kernels().join(format!("{unknown}.cu")), 0, "no such kernel"));
        }
        let chosen = |o: &&Output| stems.is_empty() || stems.contains(&o.source.stem);
        let mut built = Built::default();
        let mut texts = Vec::new();
        for output in outputs.iter().filter(chosen) {
            let (ptx, warnings) = output.compile(nvrtc)?;
            texts.push((output.path.clone(), ptx));
            built.warnings.extend(Some(warnings).filter(|w| !w.is_empty()));
        }
        for (path, text) in texts {
            built.written.extend(write(&path, &text)?.then_some(path));
        }
        for (_, _, path) in self.present()?.into_iter().filter(|_| stems.is_empty()) {
            if outputs.iter().all(|o| o.path != path) {
                fs::remove_file(&path).map_err(|e| Error::file(&path, e))?;
                built.removed.push(path);
            }
        }
        let list = self.list_path();
        built.written.extend(write(&list, &self.list()?)?.then_some(list));
        Ok(built)
    }

    /// Whether the committed PTX has the stamps of its sources and keeps their contracts, and the list of
    /// modules names every file. Needs no compiler.
    ///
    /// # Errors
    /// [`Error::Stale`] with a line for every file; [`Error::Source`] for a broken contract.
    pub fn verify(&self) -> Result<usize> {
        let outputs = self.outputs()?;
        let mut stale = Vec::new();
        for output in &outputs {
            match fs::read_to_string(&output.path) {
                Ok(text) => {
                    match canonical::stamp(&text) == Some(&output.source.stamp(output.arch, COMPILER)) {
                        true => output.hold(&text)?,
                        false => stale.push(format!("{}: its source has changed", self.short(&output.path))),
                    }
                }
                Err(_) => stale.push(format!("{}: missing", self.short(&output.path))),
            }
        }
        for (_, _, path) in self.present()? {
            if outputs.iter().all(|o| o.path != path) {
                stale.push(format!("{}: nothing compiles to it", self.short(&path)));
            }
        }
        if fs::read_to_string(self.list_path()).ok().as_ref() != Some(&self.list()?) {
            stale.push(format!("{}: not the list of the files", self.short(&self.list_path())));
        }
        if stale.is_empty() { Ok(outputs.len()) } else { Err(Error::Stale { files: stale }) }
    }

    /// [`Tree::verify`], and compiles everything and compares the bytes.
    ///
    /// # Errors
    /// [`Error::Stale`] with the first line that differs of every file; those of [`Tree::build`].
    pub fn check(&self, nvrtc: &Nvrtc) -> Result<usize> {
        require_pinned(nvrtc)?;
        let count = self.verify()?;
        let mut stale = Vec::new();
        for output in self.outputs()? {
            let (fresh, _) = output.compile(nvrtc)?;
            let committed = fs::read_to_string(&output.path).map_err(|e| Error::file(&output.path, e))?;
            stale.extend(difference(&committed, &fresh).map(|d| format!("{}:{d}", self.short(&output.path))));
        }
        if stale.is_empty() { Ok(count) } else { Err(Error::Stale { files: stale }) }
    }

    /// The table of what ptxas makes of every committed module, as `ptx/REPORT.md` holds it.
    ///
    /// # Errors
    /// [`Error::Ptxas`] for a module that ptxas refuses or warns about, that spills, or whose static shared
    /// memory is not what the PTX declares.
    pub fn report(&self, ptxas: &Ptxas) -> Result<String> {
        let mut table = String::from(REPORT_HEAD);
        for (arch, stem, path) in self.present()? {
            let text = fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
            let module = Module::new(arch.name(), stem.as_str(), text);
            for u in ptxas.assemble(&path, arch)? {
                hold_usage(&path, &module, &u)?;
                let Usage { entry, registers, shared, stack, .. } = u;
                table
                    .push_str(&format!("| {arch} | {stem} | {entry} | {registers} | {shared} | {stack} |\n"));
            }
        }
        Ok(table)
    }

    /// Writes the table; whether it has changed.
    ///
    /// # Errors
    /// Those of [`Tree::report`].
    pub fn write_report(&self, ptxas: &Ptxas) -> Result<bool> {
        write(&self.report_path(), &self.report(ptxas)?)
    }

    /// Compares the table with the committed one.
    ///
    /// # Errors
    /// [`Error::Stale`] with the first line that differs; those of [`Tree::report`].
    pub fn check_report(&self, ptxas: &Ptxas) -> Result<()> {
        let fresh = self.report(ptxas)?;
        let committed = fs::read_to_string(self.report_path()).unwrap_or_default();
        match difference(&committed, &fresh) {
            None => Ok(()),
            Some(d) => Err(Error::Stale { files: vec![format!("{}:{d}", self.short(&self.report_path()))] }),
        }
    }

    /// Where the table is.
    pub fn report_path(&self) -> PathBuf {
        self.ptx().join("REPORT.md")
    }

    /// The PTX files that are there: architecture, stem, path.
    fn present(&self) -> Result<Vec<(Arch, String, PathBuf)>> {
        let mut found = Vec::new();
        for arch in Arch::ALL {
            let files = files(&self.ptx().join(arch.name()), "ptx", &[])?;
            found.extend(files.into_iter().map(|(stem, path)| (arch, stem, path)));
        }
        Ok(found)
    }

    fn list_path(&self) -> PathBuf {
        self.ptx().join("src/modules.rs")
    }

    /// The module of the crate `transfusion-ptx` that embeds the files that are there, but for the ladder.
    fn list(&self) -> Result<String> {
        let mut text = String::from(LIST_HEAD);
        for (arch, stem, _) in self.present()?.into_iter().filter(|(_, stem, _)| !stem.starts_with(LADDER)) {
            let file = format!("../{arch}/{stem}.ptx");
            text.push_str(&format!(
                "    Module::from_static(\"{arch}\", \"{stem}\", include_str!(\"{file}\")),\n"
            ));
        }
        text.push_str("];\n");
        Ok(text)
    }

    /// A path as seen from the root.
    fn short(&self, path: &Path) -> String {
        path.strip_prefix(&self.root).unwrap_or(path).display().to_string()
    }
}

const LIST_HEAD: &str = "\
//! Every file under `ptx/` but the ladder. Written by `ptxc build`.
use crate::Module;

#[rustfmt::skip]
pub(crate) const MODULES: &[Module] = &[
";

const REPORT_HEAD: &str = "\
# What ptxas makes of the kernels

Written by `ptxc report` with ptxas 12.4.131, each module assembled for its own architecture. Shared memory is
what a block has before the dynamic part; the stack holds arrays that are indexed by a variable. None spills:
`ptxc report` refuses that, and every warning.

| arch | module | entry | registers | static shared, bytes | stack, bytes |
|---|---|---|---:|---:|---:|
";

fn hold_usage(path: &Path, module: &Module, usage: &Usage) -> Result<()> {
    let bad = |why: String| Error::Ptxas { path: path.into(), why };
    let Usage { entry, shared, spill_stores, spill_loads, .. } = usage;
    if spill_stores + spill_loads > 0 {
        let advice = "use fewer registers or allow more with __launch_bounds__";
        return Err(bad(format!("{entry} spills {spill_stores} bytes and loads {spill_loads}; {advice}")));
    }
    let declared = module.entry(entry).map_err(|e| bad(e.to_string()))?.map(|e| e.static_shared);
    match declared == Some(*shared) {
        true => Ok(()),
        false => Err(bad(format!(
            "{entry} has {shared} bytes of static shared memory; the PTX declares {declared:?}"
        ))),
    }
}

fn require_pinned(nvrtc: &Nvrtc) -> Result<()> {
    let (version, (major, minor)) = (nvrtc.version(), COMPILER);
    match version == COMPILER {
        true => Ok(()),
        false => Err(Error::Library {
            path: "NVRTC".into(),
            why: format!(
                "version {}.{}; the PTX under ptx/ comes from {major}.{minor}",
                version.0, version.1
            ),
        }),
    }
}

/// Files below a folder with this extension, by stem; none where there is no such folder.
fn files(dir: &Path, extension: &str, leave_out: &[&Path]) -> Result<Vec<(String, PathBuf)>> {
    let (mut found, mut open) = (Vec::new(), vec![(String::new(), dir.to_path_buf())]);
    while let Some((prefix, dir)) = open.pop() {
        if leave_out.contains(&dir.as_path()) || !dir.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&dir).map_err(|e| Error::file(&dir, e))? {
            let path = entry.map_err(|e| Error::file(&dir, e))?.path();
            let name = |n: Option<&std::ffi::OsStr>| {
                n.and_then(|n| n.to_str())
                    .map(|n| format!("{prefix}{n}"))
                    .ok_or(Error::file(&path, "not UTF-8"))
            };
            if path.is_dir() {
                open.push((name(path.file_name())? + "/", path));
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push((name(path.file_stem())?, path));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Writes a file if that changes it; whether it did. The old contents stay whole until the new ones are.
fn write(path: &Path, text: &str) -> Result<bool> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(false);
    }
    let fresh = path.with_extension(format!("tmp-{}", std::process::id()));
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir).map_err(|e| Error::file(dir, e))?;
    fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, path)).map_err(|e| Error::file(path, e))?;
    Ok(true)
}

/// The first line that differs: `line: committed ..., compiled ...`.
fn difference(committed: &str, fresh: &str) -> Option<String> {
    if committed == fresh {
        return None;
    }
    let (mut old, mut new) = (committed.split('\n'), fresh.split('\n'));
    let end = "the end of the file";
    for line in 1.. {
        let pair = (old.next(), new.next());
        match pair {
            (None, None) => break,
            (a, b) if a == b => {}
            (a, b) => {
                let (a, b) = (a.map_or(end, str::trim), b.map_or(end, str::trim));
                return Some(format!("{line}: committed `{a}`, now `{b}`"));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_shown_by_its_first_line() {
        assert_eq!(difference("a\nb\n", "a\nb\n"), None);
        assert_eq!(difference("a\nb\n", "a\n c\n"), Some("2: committed `b`, now `c`".into()));
        assert_eq!(difference("a\n", "a\nb"), Some("2: committed ``, now `b`".into()));
        assert_eq!(difference("a", "a\nb"), Some("2: committed `the end of the file`, now `b`".into()));
    }
}
