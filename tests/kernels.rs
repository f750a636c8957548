//! Every kernel that is shipped, in the simulator, and the simulator as a device.
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};
use transfusion_core::{
    agreement::{self, Application},
    cases::Case,
    launch::{Launch, Operand, Target},
    ops::Heads,
    tensor::DType,
};
use transfusion_ptx::Module;
use transfusion_ptxsim::SimDevice;
use transfusion_tests::judge::{Exam, arch, faults, simulator};

#[test]
fn every_module_decodes() {
    for module in transfusion_ptx::modules() {
        let file = format!("{}/{}.ptx", module.arch, module.stem);
        let decoded = transfusion_ptxsim::Module::load(&file, &module.text).unwrap_or_else(|e| panic!("{e}"));
        for entry in module.entries().unwrap() {
            decoded.kernel(&entry.name).unwrap_or_else(|e| panic!("{file}: {e}"));
        }
    }
}

/// Runs the first half of a module's exam on the shipped kernels: on many different shapes of each op and its
/// gradient, and every entry of the module.
fn agree(stem: &str) {
    let exam = Exam::new(stem);
    let launched = Arc::new(Mutex::new(BTreeSet::new()));
    let seen = launched.clone();
    let done = move |m: &SimDevice| seen.lock().unwrap().extend(m.counters().keys().cloned());
    let faults: Vec<String> = exam.disagreements(&[], done).collect();
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults[..faults.len().min(5)].join("\n"));
    let helps = |op: &str| transfusion_ptx::modules().iter().any(|m| of(op, &m.stem) && !of(stem, &m.stem));
    for (op, shapes) in exam.shapes().into_iter().filter(|(op, _)| !helps(op)) {
        assert!(shapes >= 30, "{shapes} shapes of {op}");
    }
    let launched = launched.lock().unwrap();
    for module in transfusion_ptx::modules().iter().filter(|m| m.arch == arch(stem) && of(&m.stem, stem)) {
        let left: Vec<String> = module.entries().unwrap().into_iter().map(|e| e.name).collect();
        let left: Vec<&String> = left.iter().filter(|name| !launched.contains(*name)).collect();
        assert!(left.is_empty(), "no case launches {left:?}");
    }
}

/// Whether a module has kernels of this one's ops: some have further ones in files of their own.
fn of(module: &str, stem: &str) -> bool {
    module.strip_prefix(stem).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
}

fn keep(exam: &Exam) {
    let leaks: Vec<String> = exam.leaks(&[]).collect();
    assert!(leaks.is_empty(), "{} leaks:\n{}", leaks.len(), leaks[..leaks.len().min(5)].join("\n"));
}

/// A test for each module.
macro_rules! modules {
    ($($stem:ident)*) => {
        $(#[test]
        fn $stem() {
            agree(stringify!($stem));
        })*

        #[test]
        fn every_module_is_examined() {
            for module in transfusion_ptx::modules() {
                let examined = |stem: &&str| of(&module.stem, stem) && module.arch == arch(stem);
                assert!([$(stringify!($stem)),*].iter().any(examined), "{}", module.stem);
            }
        }
    };
}

modules! {
    adamw add attention attention_wgmma cache_append cast clip cross_entropy cross_entropy_wgmma ema fill gather_rows linear
    linear_wgmma mse patchify q_sample qk_norm rmsnorm rope sampler_update scatter_rows sum_squares swiglu time_embedding
}

#[test]
fn rmsnorm_keeps() {
    keep(&Exam::new("rmsnorm"));
}

#[test]
fn linear_keeps() {
    keep(&Exam::new("linear"));
}

#[test]
fn linear_wgmma_keeps() {
    keep(&Exam::new("linear_wgmma"));
}

#[test]
fn cross_entropy_keeps() {
    keep(&Exam::new("cross_entropy"));
}

#[test]
fn cross_entropy_wgmma_keeps() {
    keep(&Exam::new("cross_entropy_wgmma"));
}

#[test]
fn attention_keeps() {
    keep(&Exam::new("attention"));
}

#[test]
fn attention_wgmma_keeps() {
    keep(&Exam::new("attention_wgmma"));
}

/// Without its order dq is added up as tiles of keys come; and nearly the same.
#[test]
fn attention_wgmma_adds_without_an_order() {
    let heads = Heads { heads: 2, kv_heads: 1, width: 64 };
    let case = Case::new("attention", "", move |g, x| {
        g.unordered = true;
        vec![g.attention(x[0], x[1], x[2], heads)]
    });
    let (start, end): (Vec<i32>, Vec<i32>) = (0..400).map(|i| (i / 150 * 100, i + 1)).unzip();
    let case = case.normal([1, 400, heads.packed_width()]).ints([1, 400], &start).ints([1, 400], &end);
    let all = agreement::applications(&case, DType::Bf16, &mut agreement::cpu(1).unwrap()).unwrap();
    let gradient = all.into_iter().find(|a| a.op.name() == "attention_bwd").unwrap();
    let plan = gradient.plan(Some(&Target::H200)).unwrap();
    let zeros = |l: &Launch| matches!(l, Launch::Fill { what: Operand::Scratch(4), byte: 0 });
    assert!(plan.steps[0].launches.iter().any(zeros), "sums begin with zeros: {:?}", plan.steps[0].launches);
    let expected = gradient.expected(&mut agreement::cpu(1).unwrap()).unwrap();
    for schedule in 0..4 {
        let have = gradient.run(&mut simulator(Target::H200, schedule, &[])).unwrap();
        let worst = expected.compare(&have);
        assert!(worst.iter().all(|w| w.holds()), "{worst:?}");
    }
}

/// What is not finite anywhere sends one pass back to two, and may change no bit elsewhere.
#[test]
fn attention_wgmma_has_the_same_bits_in_one_pass_and_in_two() {
    let heads = Heads { heads: 3, kv_heads: 1, width: 64 };
    let case = Case::new("attention", "", move |g, x| vec![g.attention(x[0], x[1], x[2], heads)]);
    // Windows that begin in the second half of a tile of keys.
    let (start, end): (Vec<i32>, Vec<i32>) = (0..900).map(|i| (64 + i / 64 * 32, 200 + i)).unzip();
    let case = case.normal([1, 900, heads.packed_width()]).ints([1, 900], &start).ints([1, 900], &end);
    let all = agreement::applications(&case, DType::Bf16, &mut agreement::cpu(1).unwrap()).unwrap();
    let gradient = all.into_iter().find(|a| a.op.name() == "attention_bwd").unwrap();
    let little = Target { shared: 155 << 10, ..Target::H200 };
    let [once, twice] = [Target::H200, little].map(|on| gradient.run(&mut simulator(on, 0, &[])).unwrap());
    assert_eq!(once[0].view().bytes(), twice[0].view().bytes());
}

/// RMSNorm of so many rows of 8.
fn norm(rows: usize) -> Application {
    let case = Case::new("rmsnorm", "", |g, x| vec![g.rmsnorm(x[0], x[1], 1e-5)]);
    let case = case.normal([rows, 8]).normal([8]).without_gradient();
    let all = agreement::applications(&case, DType::Bf16, &mut agreement::cpu(1).unwrap()).unwrap();
    all.into_iter().find(|a| a.op.name() == "rmsnorm").unwrap()
}

/// One whose y has 256 bytes, so that the arena goes on right behind it.
fn application() -> Application {
    norm(16)
}

#[test]
fn results_without_bytes_are_fetched() {
    let empty = norm(0);
    let results = empty.run(&mut simulator(Target::A100, 0, &[])).unwrap();
    assert!(results.iter().all(|r| r.view().is_empty()), "{results:?}");
    assert_eq!(results.len(), empty.run(&mut agreement::cpu(1).unwrap()).unwrap().len());
}

/// What the device says of a kernel whose threads 0 to 15 each do this with %y, %r and %x, which point to
/// their rows, and which stands in for the shipped one.
fn say(body: &str) -> Result<(), String> {
    let text = format!(
        "
.version 7.0
.target sm_80
.address_size 64
.visible .entry rmsnorm_fwd_narrow_bf16(
    .param .u64 y, .param .u64 r, .param .u64 x, .param .u64 w, .param .u32 rows, .param .u32 width, .param .f32 eps)
.maxntid 256, 1, 1
{{
    .reg .pred %p<4>;
    .reg .b32 %t, %u, %v<4>;
    .reg .b64 %y, %r, %x, %a;
    mov.u32 %t, %tid.x;
    mov.u32 %u, %ctaid.x;
    mov.u32 %v0, 0;
    setp.ne.u32 %p0, %u, 0;
    setp.gt.u32 %p1, %t, 15;
    or.pred %p0, %p0, %p1;
    @%p0 bra $end;
    ld.param.u64 %y, [y];
    ld.param.u64 %r, [r];
    ld.param.u64 %x, [x];
    cvta.to.global.u64 %y, %y;
    cvta.to.global.u64 %r, %r;
    cvta.to.global.u64 %x, %x;
    mul.wide.u32 %a, %t, 16;
    add.s64 %y, %y, %a;
    add.s64 %x, %x, %a;
    mul.wide.u32 %a, %t, 4;
    add.s64 %r, %r, %a;
    {body}
$end:
    ret;
}}
"
    );
    let mut machine = simulator(Target::A100, 0, &[Module::new("sm_80", "own", text)]);
    application().run(&mut machine).map(drop).map_err(|e| e.to_string())
}

const WRITE_Y: &str = "st.global.v4.u32 [%y], {%v0, %v0, %v0, %v0};";
const WRITE_R: &str = "st.global.u32 [%r], %v0;";

#[test]
fn a_step_that_writes_all_results_and_nothing_else_is_no_fault() {
    assert_eq!(say(&format!("{WRITE_Y} {WRITE_R}")), Ok(()));
}

#[test]
fn a_byte_left_unwritten_is_named() {
    let but_the_last = format!("setp.lt.u32 %p2, %t, 15; @%p2 {WRITE_Y} {WRITE_R}");
    let said = say(&but_the_last).unwrap_err();
    assert!(said.contains("rmsnorm leaves byte 240 of out 0 unwritten"), "{said}");
    let half = format!("{WRITE_Y} st.global.u16 [%r], 0;").replace("], 0", "], %h");
    let said = say(&format!(".reg .b16 %h; mov.u16 %h, 0; {half}")).unwrap_err();
    assert!(said.contains("rmsnorm leaves byte 2 of out 1 unwritten"), "{said}");
}

#[test]
fn a_write_to_an_operand_that_is_only_read_is_named() {
    let said = say(&format!("{WRITE_Y} {WRITE_R} st.global.u32 [%x+4], %v0;")).unwrap_err();
    assert!(said.contains("access denied") && said.contains("`in 0` byte 4"), "{said}");
}

#[test]
fn the_neighbour_in_the_arena_is_out_of_bounds() {
    let plan = application().plan(Some(&Target::A100)).unwrap();
    let [y, r] = plan.steps[0].outs[..] else { panic!("two results") };
    assert_eq!((y.segment, y.offset + 256), (r.segment, r.offset), "r lies right behind y");
    let said = say(&format!("{WRITE_Y} {WRITE_R} st.global.u32 [%y+16], %v0;")).unwrap_err();
    assert!(said.contains("out of bounds") && said.contains("`out 0` byte 256"), "{said}");
    let said = say(&format!("{WRITE_Y} {WRITE_R} st.global.u32 [%r+-4], %v0;")).unwrap_err();
    assert!(said.contains("out of bounds") && said.contains("`out 1` byte -4"), "{said}");
    let said = say(&format!("{WRITE_Y} {WRITE_R} ld.global.u32 %v1, [%x+16];")).unwrap_err();
    assert!(said.contains("out of bounds") && said.contains("`in 0` byte 256"), "{said}");
}

#[test]
fn a_result_holds_nothing_before_it_is_written() {
    let said = say(&format!("ld.global.u32 %v0, [%y]; {WRITE_Y} {WRITE_R}")).unwrap_err();
    assert!(said.contains("uninitialised") && said.contains("`out 0` byte 0"), "{said}");
}

#[test]
fn the_exam_sees_what_is_wrong() {
    let text = &transfusion_ptx::find("sm_80", "rmsnorm_fwd_narrow_bf16").unwrap().0.text;
    let wrong = text.replace("sqrt.rn.f32", "rcp.rn.f32");
    assert_ne!(&wrong, text);
    let found = faults("rmsnorm", &[Module::new("sm_80", "rmsnorm", wrong)]);
    assert!(found.iter().any(|f| f.contains("value: ")), "{found:?}");
}
