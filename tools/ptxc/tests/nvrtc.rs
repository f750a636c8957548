//! What needs the pinned tools. The tests do not fetch them: where `ptxc check` and `ptxc report` never ran, they
//! say so in one line, and fail if REQUIRE_NVRTC=1.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};
use transfusion_ptxc::{
    Arch, Error, Nvrtc, Source, Tree, canonical,
    nvrtc::Choice,
    ptxas::Ptxas,
    wheel::{self, Cache, Wheel},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The cache of the tree, if it has this wheel.
fn cache(wheel: &Wheel) -> Option<Cache> {
    let dir = root().join(".cache/ptxc");
    if dir.join(format!("{}-{}", wheel.package, wheel.version)).is_dir() {
        return Some(Cache::new(dir));
    }
    let required = std::env::var_os("REQUIRE_NVRTC").is_some_and(|v| v == "1");
    assert!(!required, "REQUIRE_NVRTC=1, and {} is not in {}", wheel.package, dir.display());
    println!("left out: {} is not in {}; run `ptxc check` and `ptxc report`", wheel.package, dir.display());
    None
}

fn nvrtc() -> Option<Nvrtc> {
    Some(Nvrtc::open(&Choice::Pinned, &cache(&wheel::NVRTC)?).unwrap())
}

/// A folder of its own for one test.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Place {
        let dir =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("nvrtc-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Place(dir)
    }

    fn write(&self, file: &str, text: &str) -> PathBuf {
        let path = self.0.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn source(&self, text: &str) -> Source {
        Source::read(&self.write("kernel.cu", text), "kernel", &[]).unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const KERNEL: &str = "// entry  grid  block  shared  arguments\n// twice_f32  N/64  64  256  y | x | N\n\
    #include \"two.cuh\"\nnamespace { __constant__ float table[1] = { TWO }; }\n\
    extern \"C\" __global__ void __launch_bounds__(64) twice_f32(float* y, const float* x, unsigned N) {\n\
    __shared__ float s[64]; s[threadIdx.x] = x[threadIdx.x]; __syncthreads();\n\
    y[threadIdx.x] = table[0] * s[threadIdx.x ^ 1] + N; }\n";

#[test]
fn the_same_bytes_wherever_the_tree_lies() {
    let Some(nvrtc) = nvrtc() else { return };
    let compile = |name| {
        let place = Place::new(name);
        place.write("two.cuh", "#define TWO 2.0f\n");
        nvrtc.compile(&place.source(KERNEL), Arch::Sm80).unwrap().ptx
    };
    let (a, b) = (compile("here"), compile("there"));
    assert_eq!(a, b);
    assert!(a.starts_with(canonical::STAMP) && a.lines().nth(1) == Some(".version 7.0"), "{a}");
    assert!(
        !a.contains("CL-")
            && !a.contains("Cuda compilation tools")
            && !a.contains(env!("CARGO_TARGET_TMPDIR"))
    );
}

#[test]
fn a_broken_kernel_is_refused_by_file_and_line() {
    let Some(nvrtc) = nvrtc() else { return };
    let place = Place::new("broken");
    let header = place.write("two.cuh", "\n\nfloat TWO = nothing;\n");
    let source = place.source(&KERNEL.replace("+ N;", "+ M;"));
    let error = nvrtc.compile(&source, Arch::Sm80).unwrap_err();
    let Error::Compile { path, log } = &error else { panic!("{error}") };
    assert_eq!(*path, source.path);
    let header = fs::canonicalize(header).unwrap();
    assert!(log.contains(&format!("{}:3: error", header.display())), "{log}");
    assert!(log.contains(&format!("{}:7: error: identifier \"M\" is undefined", path.display())), "{log}");
}

#[test]
fn warnings_are_handed_on() {
    let Some(nvrtc) = nvrtc() else { return };
    let place = Place::new("warning");
    let source = place.source("extern \"C\" __global__ void f(float* y) {\n  int unused;\n  y[0] = 1; }\n");
    let compiled = nvrtc.compile(&source, Arch::Sm80).unwrap();
    assert!(
        compiled.warnings.starts_with(&format!("{}:2: warning", source.path.display())),
        "{}",
        compiled.warnings
    );
}

#[test]
fn a_library_that_is_not_nvrtc_is_refused() {
    let none = Cache::new("/nowhere");
    let open = |path: &str| Nvrtc::open(&Choice::from_user(Some(OsStr::new(path))), &none).unwrap_err();
    let error = open("/nowhere/libnvrtc.so");
    assert!(
        matches!(&error, Error::Library { path, why } if path.ends_with("libnvrtc.so") && why.contains("No such file"))
    );
    assert!(error.hint().unwrap().contains("TRANSFUSION_NVRTC"));

    let place = Place::new("library");
    let text = place.write("libnvrtc.so.12", "no library");
    let error = open(text.to_str().unwrap());
    assert!(matches!(&error, Error::Library { why, .. } if why.contains("file too short")), "{error}");

    let other = ["/lib/x86_64-linux-gnu/libm.so.6", "/lib64/libm.so.6", "/usr/lib/libm.so.6"];
    let Some(other) = other.into_iter().find(|p| Path::new(p).exists()) else { return };
    let error = open(other);
    assert!(matches!(&error, Error::Library { why, .. } if why.starts_with("not NVRTC")), "{error}");
}

#[test]
fn the_named_library_is_the_one_that_is_used() {
    let Some(cache) = cache(&wheel::NVRTC) else { return };
    let lib = cache.get(&wheel::NVRTC).unwrap().join("nvidia/cuda_nvrtc/lib/libnvrtc.so.12");
    let named = Nvrtc::open(&Choice::At(lib), &Cache::new("/nowhere")).unwrap();
    assert_eq!(named.version(), (12, 4));
    let place = Place::new("named");
    place.write("two.cuh", "#define TWO 2.0f\n");
    assert!(named.compile(&place.source(KERNEL), Arch::Sm90a).is_ok());
}

#[test]
fn building_checking_and_reporting_a_tree() {
    let Some(nvrtc) = nvrtc() else { return };
    let Some(tools) = cache(&wheel::PTXAS) else { return };
    let ptxas = Ptxas::open(&tools).unwrap();
    let place = Place::new("tree");
    place.write("kernels-cu/common/two.cuh", "#define TWO 2.0f\n");
    place.write("kernels-cu/twice.cu", KERNEL);
    let three = KERNEL.replace("twice", "thrice").replace("// entry", "// Target  sm_80 sm_90a\n// entry");
    place.write("kernels-cu/ladder/thrice/first.cu", &three);
    let tree = Tree::new(&place.0);
    let built = tree.build(&nvrtc, &[]).unwrap();
    assert_eq!((built.written.len(), built.removed.len()), (4, 0));
    assert_eq!(tree.check(&nvrtc), Ok(3));
    assert!(tree.build(&nvrtc, &[]).unwrap().written.is_empty());

    assert!(tree.write_report(&ptxas).unwrap());
    assert_eq!(tree.check_report(&ptxas), Ok(()));
    let table = fs::read_to_string(tree.report_path()).unwrap();
    assert!(table.contains("| sm_90a | ladder/thrice/first | thrice_f32 |"), "{table}");
    fs::write(tree.report_path(), table.replace("| 256 |", "| 255 |")).unwrap();
    assert!(matches!(tree.check_report(&ptxas), Err(Error::Stale { .. })));

    // An edit by hand keeps the stamp; only a compiler finds it.
    let file = place.0.join("ptx/sm_80/twice.ptx");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("bar.sync", "bar.warp.sync")).unwrap();
    assert_eq!(tree.verify(), Ok(3));
    let error = tree.check(&nvrtc).unwrap_err().to_string();
    assert!(error.contains("ptx/sm_80/twice.ptx:") && error.contains("committed `bar.warp.sync"), "{error}");

    fs::remove_dir_all(place.0.join("kernels-cu/ladder")).unwrap();
    let built = tree.build(&nvrtc, &[]).unwrap();
    assert_eq!((built.written.len(), built.removed.len()), (1, 2), "the list never named the ladder");
    assert_eq!(tree.check(&nvrtc), Ok(1));

    // Nothing is written when anything is refused.
    place.write("kernels-cu/other.cu", &KERNEL.replace("twice", "other").replace("64  256", "64  0"));
    place.write("kernels-cu/twice.cu", &KERNEL.replace("+ N;", "- N;"));
    let error = tree.build(&nvrtc, &[]).unwrap_err().to_string();
    assert!(
        error.contains("other.cu:2: other_f32 has 0 bytes of static shared memory here and 256"),
        "{error}"
    );
    assert!(!place.0.join("ptx/sm_80/other.ptx").exists());
    assert!(tree.build(&nvrtc, &["twice".into()]).is_ok(), "one kernel can be built alone");
    assert!(matches!(tree.build(&nvrtc, &["twin".into()]), Err(Error::Source { .. })));
}

#[test]
fn spills_are_refused() {
    let (Some(nvrtc), Some(tools)) = (nvrtc(), cache(&wheel::PTXAS)) else { return };
    let place = Place::new("spill");
    // 96 values live at once in a block that leaves 32 registers to a thread.
    let text = "// entry  grid  block  shared  arguments\n// hoard_f32  1  1024  0  y | x\n\
        extern \"C\" __global__ void __launch_bounds__(1024, 2) hoard_f32(float* y, const float* x) {\n\
        float v[96];\n#pragma unroll\nfor (int i = 0; i < 96; i++) v[i] = x[i * 1024 + threadIdx.x];\n__syncthreads();\n\
        #pragma unroll\nfor (int i = 0; i < 96; i++) y[i * 1024 + threadIdx.x] = v[i] * v[95 - i]; }\n";
    place.write("kernels-cu/hoard.cu", text);
    let tree = Tree::new(&place.0);
    tree.build(&nvrtc, &[]).unwrap();
    let error = tree.report(&Ptxas::open(&tools).unwrap()).unwrap_err();
    assert!(matches!(&error, Error::Ptxas { why, .. } if why.starts_with("hoard_f32 spills ")), "{error}");
}

/// Instructions, the architecture that has them, and the version below which ptxas does not know them.
const NEWER: [(Arch, &str, (u32, u32)); 32] = [
    (Arch::Sm80, "ld.global.nc.v4.u32 {%r1,%r2,%r3,%r4}, [%d1];", (7, 0)),
    (Arch::Sm80, "cp.async.cg.shared.global [%r1], [%d1], 16;", (7, 0)),
    (Arch::Sm80, "cvt.rn.bf16x2.f32 %r1, %f2, %f3;", (7, 0)),
    (Arch::Sm80, "mbarrier.test_wait.parity.shared.b64 %p1, [%r1], %r2;", (7, 1)),
    (Arch::Sm80, "cvt.f32.bf16 %f1, %h1;", (7, 1)),
    (
        Arch::Sm80,
        "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1,%f2,%f3,%f4},{%r1,%r2},{%r3,%r4},\
         {%f1,%f2,%f3,%f4},%r5,0x0;",
        (7, 1),
    ),
    (Arch::Sm80, "ld.global.L1::no_allocate.u32 %r1, [%d1];", (7, 4)),
    (Arch::Sm80, "ld.global.L2::128B.u32 %r1, [%d1];", (7, 4)),
    (Arch::Sm80, "createpolicy.fractional.L2::evict_first.b64 %d2, 1.0;", (7, 4)),
    (Arch::Sm80, "discard.global.L2 [%d1], 128;", (7, 4)),
    (Arch::Sm80, "fence.proxy.alias;", (7, 5)),
    (Arch::Sm80, "bmsk.clamp.b32 %r1, %r2, %r3;", (7, 6)),
    (Arch::Sm80, "szext.clamp.u32 %r1, %r2, %r3;", (7, 6)),
    (Arch::Sm80, "mov.u32 %r1, %reserved_smem_offset_begin;", (7, 6)),
    (Arch::Sm80, "isspacep.param %p1, %d1;", (7, 7)),
    (Arch::Sm80, "cvta.param.u64 %d1, %d2;", (7, 7)),
    (Arch::Sm80, "cvta.to.param.u64 %d1, %d2;", (7, 7)),
    (Arch::Sm80, "ld.shared::cta.u32 %r1, [%r2];", (7, 8)),
    (Arch::Sm80, "barrier.cta.sync 0;", (7, 8)),
    (Arch::Sm90a, "wgmma.fence.sync.aligned;", (8, 0)),
    (
        Arch::Sm90a,
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r1], %r2, [%r3];",
        (8, 1),
    ),
    (
        Arch::Sm90a,
        "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.inc.u32 [%r1], %r2, [%r3];",
        (8, 1),
    ),
    (Arch::Sm90a, "multimem.ld_reduce.relaxed.sys.global.add.f32 %f1, [%d1];", (8, 1)),
    (Arch::Sm90a, "red.global.v4.f32.add [%d1], {%f1,%f2,%f3,%f4};", (8, 1)),
    (Arch::Sm90a, "atom.global.v2.f32.add {%f1,%f2}, [%d1], {%f3,%f4};", (8, 1)),
    (Arch::Sm90a, "tensormap.replace.tile.global_address.global.b1024.b64 [%d1], %d2;", (8, 3)),
    (Arch::Sm90a, "fence.proxy.tensormap::generic.release.gpu;", (8, 3)),
    (Arch::Sm80, ".pragma \"used_bytes_mask 0xfff\"; ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%d1];", (8, 3)),
    (
        Arch::Sm90a,
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%f1,%f2,%f3,%f4},{%r1,%r2,%r3,%r4},{%r5,%r6},\
         {%f1,%f2,%f3,%f4};",
        (8, 4),
    ),
    (
        Arch::Sm90a,
        "mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e5m2.f32 {%f1,%f2,%f3,%f4},{%r1,%r2,%r3,%r4},{%r5,%r6},\
         {%f1,%f2,%f3,%f4};",
        (8, 4),
    ),
    (Arch::Sm90a, "mov.u32 %r1, %aggr_smem_size;", (8, 1)),
    (Arch::Sm90a, "mov.b128 %q, {%d1, %d2};", (8, 3)),
];

#[test]
fn the_version_is_the_lowest_that_ptxas_takes() {
    let Some(tools) = cache(&wheel::PTXAS) else { return };
    let ptxas = Ptxas::open(&tools).unwrap();
    let place = Place::new("version");
    for (arch, code, (major, minor)) in NEWER {
        let code = if code.contains("%q") { format!(".reg .b128 %q; {code}") } else { code.to_string() };
        let raw = format!(
            ".version 8.4\n.target {arch}\n.address_size 64\n.visible .entry f()\n{{\n.reg .b16 %h<9>; .reg .b32 %r<9>;\n\
             .reg .b64 %d<9>; .reg .f32 %f<9>; .reg .pred %p<3>;\n{code}\nret;\n}}\n"
        );
        let text = canonical::canonical(&raw, arch, "0");
        let version = format!(".version {major}.{minor}\n");
        assert!(text.contains(&version), "{code}: {text}");
        let taken = ptxas.assemble(&place.write("f.ptx", &text), arch);
        assert!(taken.is_ok(), "{code}: {taken:?}");
        let floor = arch.floor();
        if (major, minor) == (floor.0, floor.1) {
            continue;
        }
        let below =
            if minor > 0 { format!(".version {major}.{}\n", minor - 1) } else { ".version 7.8\n".into() };
        let path = place.write("f.ptx", &text.replace(&version, &below));
        assert!(
            matches!(ptxas.assemble(&path, arch), Err(Error::Ptxas { .. })),
            "{code} is known to {below}"
        );
    }
}
