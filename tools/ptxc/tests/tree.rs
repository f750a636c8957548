//! The committed PTX against its sources, without a compiler.
use std::{
    fs,
    path::{Path, PathBuf},
};
use transfusion_ptx::Module;
use transfusion_ptxc::{Arch, Error, Source, Tree, source::COMPILER};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A copy of a small tree, for one test.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Place {
        let dir =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("tree-{name}-{}", std::process::id()));
        let place = Place(dir);
        place.write("kernels-cu/common/pair.cuh", "#pragma once\n#include \"one.cuh\"\n");
        place.write("kernels-cu/common/one.cuh", "#define ONE 1\n");
        place.write("kernels-cu/op.cu", KERNEL);
        place.write("ptx/src/modules.rs", LIST);
        place.write("ptx/sm_80/op.ptx", &place.ptx());
        place
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    fn write(&self, file: &str, text: &str) {
        let path = self.path(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path(file)).unwrap()
    }

    fn tree(&self) -> Tree {
        Tree::new(&self.0)
    }

    fn source(&self) -> Source {
        Source::read(&self.path("kernels-cu/op.cu"), "op", &self.tree().include()).unwrap()
    }

    fn stamp(&self) -> String {
        self.source().stamp(Arch::Sm80, COMPILER)
    }

    fn ptx(&self) -> String {
        format!("// sha256 of source, includes and flags: {}\n{PTX}", self.stamp())
    }

    fn stale(&self) -> Vec<String> {
        match self.tree().verify() {
            Err(Error::Stale { files }) => files,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const KERNEL: &str = "// An op.\n// entry  grid  block  shared  arguments\n// op_bf16  N  64  0  y | x | N\n\
    #include \"pair.cuh\"\nextern \"C\" __global__ void __launch_bounds__(64)\n\
    op_bf16(float* y, const float* x, unsigned N) {}\n";

const PTX: &str = ".version 7.0\n.target sm_80\n.visible .entry op_bf16(.param .u64 a, .param .u64 b, .param .u32 c)\n\
    .maxntid 64, 1, 1\n{\nret;\n}\n";

const LIST: &str = "//! Every file under `ptx/` but the ladder. Written by `ptxc build`.\nuse crate::Module;\n\n#[rustfmt::skip]\n\
    pub(crate) const MODULES: &[Module] = &[\n    \
    Module::from_static(\"sm_80\", \"op\", include_str!(\"../sm_80/op.ptx\")),\n];\n";

#[test]
fn the_committed_ptx_belongs_to_its_sources() {
    let tree = Tree::new(root());
    if let Err(e) = tree.verify() {
        panic!("{e}\n{}", e.hint().unwrap_or_default());
    }
}

#[test]
fn the_crate_embeds_all_but_the_ladder_and_the_table_has_every_entry() {
    let outputs = Tree::new(root()).outputs().unwrap();
    let modules = transfusion_ptx::modules();
    let ladder = outputs.iter().filter(|o| o.source.stem.starts_with("ladder/")).count();
    assert_eq!(modules.len() + ladder, outputs.len());
    let table = fs::read_to_string(Tree::new(root()).report_path()).unwrap();
    let mut rows = table.lines().filter(|l| l.starts_with("| sm_"));
    let mut count = 0;
    for o in outputs {
        let (arch, stem) = (o.arch.name(), o.source.stem.as_str());
        let module = Module::new(arch, stem, fs::read_to_string(&o.path).unwrap());
        assert_eq!(modules.contains(&module), !stem.starts_with("ladder/"), "{stem}");
        for entry in module.entries().unwrap() {
            let row = format!("| {} | {} | {} |", module.arch, module.stem, entry.name);
            assert!(rows.clone().any(|r| r.starts_with(&row)), "{row} is missing: run `ptxc report`");
            count += 1;
        }
    }
    assert_eq!(
        rows.by_ref().count(),
        count,
        "the table has rows of entries that are gone: run `ptxc report`"
    );
}

#[test]
fn an_empty_tree_is_complete_once_built() {
    let place = Place::new("empty");
    fs::remove_dir_all(place.path("kernels-cu")).unwrap();
    fs::remove_dir_all(place.path("ptx/sm_80")).unwrap();
    let list = place.read("ptx/src/modules.rs");
    let without: Vec<&str> = list.lines().filter(|l| !l.contains("from_static")).collect();
    place.write("ptx/src/modules.rs", &(without.join("\n") + "\n"));
    assert_eq!(place.tree().verify(), Ok(0));
}

#[test]
fn a_tree_that_belongs_together_passes() {
    assert_eq!(Place::new("good").tree().verify(), Ok(1));
}

#[test]
fn a_changed_source_or_include_is_found() {
    let changed = "ptx/sm_80/op.ptx: its source has changed";
    for file in ["kernels-cu/op.cu", "kernels-cu/common/pair.cuh", "kernels-cu/common/one.cuh"] {
        let place = Place::new("changed");
        let before = place.stamp();
        place.write(file, &(place.read(file) + "\n"));
        assert_ne!(place.stamp(), before, "{file}");
        assert_eq!(place.stale(), [changed], "{file}");
    }
    let place = Place::new("unrelated");
    place.write("kernels-cu/common/other.cuh", "");
    assert_eq!(place.tree().verify(), Ok(1));
}

#[test]
fn the_stamp_knows_architecture_compiler_and_name() {
    let place = Place::new("stamp");
    let source = place.source();
    let stamp = source.stamp(Arch::Sm80, COMPILER);
    assert_eq!(stamp, place.source().stamp(Arch::Sm80, COMPILER));
    assert_ne!(stamp, source.stamp(Arch::Sm90a, COMPILER));
    assert_ne!(stamp, source.stamp(Arch::Sm80, (13, 0)));
    let renamed = Source { stem: "po".into(), ..source.clone() };
    assert_ne!(stamp, renamed.stamp(Arch::Sm80, COMPILER));
    // The same characters with a boundary elsewhere.
    let mut moved = source.clone();
    let first = moved.headers[0].text.remove(0);
    moved.headers[0].name.push(first);
    assert_ne!(stamp, moved.stamp(Arch::Sm80, COMPILER));
}

#[test]
fn missing_extra_and_unlisted_files_are_found() {
    let place = Place::new("missing");
    fs::remove_file(place.path("ptx/sm_80/op.ptx")).unwrap();
    assert_eq!(place.stale()[0], "ptx/sm_80/op.ptx: missing");

    let place = Place::new("extra");
    place.write("ptx/sm_90a/gone.ptx", &place.ptx());
    let found = place.stale();
    assert_eq!(
        found,
        ["ptx/sm_90a/gone.ptx: nothing compiles to it", "ptx/src/modules.rs: not the list of the files"]
    );

    let place = Place::new("unlisted");
    place.write("ptx/src/modules.rs", &LIST.replace("\"op\"", "\"po\""));
    assert_eq!(place.stale(), ["ptx/src/modules.rs: not the list of the files"]);
}

#[test]
fn a_broken_contract_is_found() {
    let place = Place::new("contract");
    place.write("ptx/sm_80/op.ptx", &place.ptx().replace(".maxntid 64", ".maxntid 32"));
    let error = place.tree().verify().unwrap_err();
    assert!(error.to_string().ends_with("op.cu:3: op_bf16 has 64 threads here and 32 in the PTX"), "{error}");
}

#[test]
fn a_file_says_what_it_is_compiled_for() {
    let place = Place::new("target");
    let targets = |line: &str| {
        place.write("kernels-cu/op.cu", &format!("// An op.\n{line}\n{KERNEL}"));
        Source::read(&place.path("kernels-cu/op.cu"), "op", &place.tree().include()).map(|s| s.targets)
    };
    assert_eq!(targets("//"), Ok(vec![Arch::Sm80]));
    assert_eq!(targets("// Target  sm_90a"), Ok(vec![Arch::Sm90a]));
    assert_eq!(targets("// Target  sm_80 sm_90a sm_80"), Ok(vec![Arch::Sm80, Arch::Sm90a]));
    let error = targets("// Target  sm_90").unwrap_err().to_string();
    assert!(error.ends_with("op.cu:2: unknown target sm_90; known are sm_80, sm_90a"), "{error}");
}

#[test]
fn includes_are_found_beside_the_file_and_in_common() {
    let place = Place::new("found");
    let names = |text: &str| {
        place.write("kernels-cu/op.cu", text);
        place.source().headers.into_iter().map(|h| h.name).collect::<Vec<_>>()
    };
    assert_eq!(names("  #  include \"common/one.cuh\"\n"), ["common/one.cuh"]);
    assert_eq!(names("#include \"pair.cuh\"\n#include \"one.cuh\"\n"), ["pair.cuh", "one.cuh"]);
}

#[test]
fn includes_that_cannot_be_stamped_are_refused_by_line() {
    let place = Place::new("include");
    let refused = |text: &str| {
        place.write("kernels-cu/op.cu", text);
        match Source::read(&place.path("kernels-cu/op.cu"), "op", &place.tree().include()) {
            Err(Error::Source { path, line, why }) => (path.file_name().unwrap().to_os_string(), line, why),
            other => panic!("{other:?}"),
        }
    };
    let (file, line, why) = refused("\n#include <cuda_bf16.h>\n");
    assert!(file == "op.cu" && line == 2 && why.starts_with("only #include \"...\""), "{why}");
    let (file, line, why) = refused("#include \"none.cuh\"\n");
    assert!(file == "op.cu" && line == 1 && why.starts_with("none.cuh is neither beside"), "{why}");
    let (file, line, why) = refused("#include \"common/one.cuh\"\n#include \"pair.cuh\"\n");
    let one_name = "one.cuh is already included as common/one.cuh; use one name";
    assert_eq!((file.to_str(), line, why.as_str()), (Some("pair.cuh"), 2, one_name));
    place.write("kernels-cu/one.cuh", "");
    let (file, line, why) = refused("#include \"one.cuh\"\n#include \"pair.cuh\"\n");
    assert!(file == "pair.cuh" && line == 2 && why.starts_with("one.cuh means "), "{why}");
}
