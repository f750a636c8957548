//! The committed form of a PTX text: the same bytes on every machine, loadable by the oldest driver possible.
use crate::arch::{Arch, Version};

/// What precedes the stamp on the first line.
pub const STAMP: &str = "// sha256 of source, includes and flags: ";

/// What needs more than the floor of its architecture: a part of an opcode, and the first `.version` with
/// it (PTX ISA manual, "PTX ISA Notes" of each instruction). ptxas holds the outcome against the text: a
/// missing line here is an error of `ptxc report`, never a module that does not load.
const NEEDS: [(&str, Version); 30] = [
    (".level::", Version(7, 4)),
    (".L1::", Version(7, 4)),
    (".L2::", Version(7, 4)),
    ("createpolicy", Version(7, 4)),
    ("applypriority", Version(7, 4)),
    ("discard.", Version(7, 4)),
    ("mbarrier.test_wait.parity", Version(7, 1)),
    ("mma.sp", Version(7, 1)),
    ("bmsk", Version(7, 6)),
    ("szext", Version(7, 6)),
    ("isspacep.param", Version(7, 7)),
    ("cvta.param", Version(7, 7)),
    ("cvta.to.param", Version(7, 7)),
    ("mbarrier.try_wait", Version(7, 8)),
    ("stmatrix", Version(7, 8)),
    ("griddepcontrol", Version(7, 8)),
    ("barrier.cluster", Version(7, 8)),
    (".shared::", Version(7, 8)),
    (".clusterid", Version(7, 8)),
    ("wgmma", Version(8, 0)),
    ("setmaxnreg", Version(8, 0)),
    ("elect.sync", Version(8, 0)),
    ("cp.async.bulk", Version(8, 0)),
    ("cp.reduce.async.bulk", Version(8, 0)),
    ("multimem", Version(8, 1)),
    ("st.async", Version(8, 1)),
    ("red.async", Version(8, 1)),
    ("wgmma.mma_async.sp", Version(8, 2)),
    ("tensormap.replace", Version(8, 3)),
    (".b128", Version(8, 3)),
];

/// The committed form of what NVRTC wrote: the stamp first, no comment that names a build of the compiler,
/// the lowest `.version` that the instructions need, line feeds only, one at the end.
pub fn canonical(ptx: &str, arch: Arch, stamp: &str) -> String {
    let version = lowest(ptx, arch);
    let mut out = format!("{STAMP}{stamp}\n");
    let body = ptx.lines().skip_while(|l| l.trim().is_empty() || l.trim_start().starts_with("//"));
    for line in body {
        match line.trim_start().starts_with(".version") {
            true => out.push_str(&format!(".version {version}")),
            false => out.push_str(line.trim_end()),
        }
        out.push('\n');
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

/// The stamp of a committed text, if its first line is one.
pub fn stamp(ptx: &str) -> Option<&str> {
    ptx.lines().next()?.strip_prefix(STAMP)
}

/// The lowest `.version` that knows everything in the text.
fn lowest(ptx: &str, arch: Arch) -> Version {
    let code = || ptx.lines().map(|l| l.split("//").next().unwrap_or_default());
    let needed = NEEDS.iter().filter(|(part, _)| code().any(|l| l.contains(part))).map(|(_, v)| *v);
    needed.fold(arch.floor(), Version::max)
}
