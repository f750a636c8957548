//! Divergence and reconvergence, schedules, blocks that wait for each other, what is refused, what is counted.

mod common;

use common::{Bench, Result, bytes_of, kernel, schedules, words};
use transfusion_ptxsim::*;

const OUT: &str =
    "mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [out]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;";

/// Runs a body that leaves its result in `%r2`, under all schedules; returns the words.
fn results(body: &str, threads: u32) -> Result<Vec<u32>> {
    let text = kernel(&["out"], "", &format!("{OUT}\n{body}\nst.global.u32 [%rd3], %r2;"));
    let mut all = Vec::new();
    for options in schedules() {
        let mut memory = [Memory::new(threads as usize * 4)];
        let mut bench = Bench::new(&text, &["out"]).block(threads);
        bench.options = options;
        let outcome = bench.run(&mut memory)?;
        assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
        all.push(words(&memory[0]));
    }
    assert!(all.iter().all(|w| *w == all[0]), "schedules disagree");
    Ok(all.remove(0))
}

#[test]
fn nested_branches_meet_again() -> Result<()> {
    // The ballots see exactly the lanes that should be together.
    let got = results(
        "and.b32 %r3, %r1, 1; setp.eq.u32 %p1, %r3, 0; setp.lt.u32 %p2, %r1, 8;
         mov.u32 %r2, 0;
         @%p1 bra EVEN;
         add.s32 %r2, %r2, 1;
         bra.uni JOIN;
         EVEN: @!%p2 bra HIGH;
         activemask.b32 %r4; popc.b32 %r4, %r4; mad.lo.s32 %r2, %r4, 100, %r2;
         bra.uni INNER;
         HIGH: activemask.b32 %r4; popc.b32 %r4, %r4; mad.lo.s32 %r2, %r4, 10, %r2;
         INNER: activemask.b32 %r5; popc.b32 %r5, %r5; mad.lo.s32 %r2, %r5, 1000, %r2;
         JOIN: activemask.b32 %r6; popc.b32 %r6, %r6; mad.lo.s32 %r2, %r6, 100000, %r2;",
        32,
    )?;
    for (lane, value) in got.into_iter().enumerate() {
        let branch = match (lane % 2, lane < 8) {
            (1, _) => 1,
            (_, true) => 16_400,
            (_, false) => 16_120,
        };
        assert_eq!(value, 3_200_000 + branch, "lane {lane}");
    }
    Ok(())
}

#[test]
fn loops_with_different_trip_counts_meet_behind_the_loop() -> Result<()> {
    let got = results(
        "mov.u32 %r2, 0; mov.u32 %r3, 0;
         LOOP: add.s32 %r2, %r2, %r3; add.s32 %r3, %r3, 1;
         setp.le.u32 %p1, %r3, %r1; @%p1 bra LOOP;
         activemask.b32 %r4; popc.b32 %r4, %r4; mad.lo.s32 %r2, %r4, 10000, %r2;",
        48,
    )?;
    for (thread, value) in got.into_iter().enumerate() {
        let thread = thread as u32;
        let lanes = if thread < 32 { 32 } else { 16 };
        assert_eq!(value, lanes * 10_000 + thread * (thread + 1) / 2);
    }
    Ok(())
}

#[test]
fn threads_that_exit_early_are_not_waited_for() -> Result<()> {
    let text = kernel(
        &["out"],
        ".shared .align 4 .b8 tile[256];",
        &format!(
            "{OUT}
             setp.ge.u32 %p1, %r1, 40; @%p1 ret;
             mov.u32 %r4, tile; mad.lo.s32 %r5, %r1, 4, %r4; st.shared.u32 [%r5], %r1;
             bar.sync 0;
             mov.u32 %r6, 39; sub.s32 %r6, %r6, %r1; mad.lo.s32 %r6, %r6, 4, %r4; ld.shared.u32 %r2, [%r6];
             st.global.u32 [%rd3], %r2;"
        ),
    );
    for options in schedules() {
        let mut memory = [Memory::new(160)];
        let mut bench = Bench::new(&text, &["out"]).block(96);
        bench.options = options;
        let outcome = bench.run(&mut memory)?;
        assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
        assert_eq!(words(&memory[0]), (0..40).rev().collect::<Vec<u32>>());
    }
    Ok(())
}

#[test]
fn guards_leave_other_lanes_alone() -> Result<()> {
    let got = results(
        "mov.u32 %r2, 7; setp.gt.u32 %p1, %r1, 9; @%p1 mov.u32 %r2, 8; setp.eq.u32 %p2|%p3, %r1, 3;
         @%p2 add.s32 %r2, %r2, 100; @!%p3 add.s32 %r2, %r2, 1000;",
        32,
    )?;
    for (lane, value) in got.into_iter().enumerate() {
        let base = if lane > 9 { 8 } else { 7 };
        assert_eq!(value, if lane == 3 { base + 1100 } else { base });
    }
    Ok(())
}

#[test]
fn predicates_take_constants() -> Result<()> {
    let got = results(
        "mov.pred %p1, -1; mov.pred %p2, 0; setp.lt.u32 %p3, %r1, 4; @%p3 mov.pred %p2, %p1;
         selp.u32 %r2, 1, 0, %p2;",
        32,
    )?;
    assert_eq!(got, (0..32).map(|l| u32::from(l < 4)).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn a_jump_table_goes_to_each_label() -> Result<()> {
    let got = results(
        "and.b32 %r3, %r1, 3; mov.u32 %r2, 0;
         brx.idx %r3, {A, B, A, C};
         A: mov.u32 %r2, 10; bra.uni END;
         B: mov.u32 %r2, 20; bra.uni END;
         C: mov.u32 %r2, 30;
         END: activemask.b32 %r4; popc.b32 %r4, %r4; add.s32 %r2, %r2, %r4;",
        32,
    )?;
    assert_eq!(got[..4], [42, 52, 42, 62]);
    Ok(())
}

#[test]
fn warp_exchanges_agree_with_their_definition() -> Result<()> {
    let lanes = 0..32u32;
    let shuffle = |how: &str| results(&format!("shfl.sync.{how}, -1;"), 32);
    assert_eq!(shuffle("bfly.b32 %r2, %r1, 5, 31")?, lanes.clone().map(|l| l ^ 5).collect::<Vec<_>>());
    assert_eq!(shuffle("idx.b32 %r2, %r1, 9, 31")?, vec![9; 32]);
    let down = |l| if l + 3 < 32 { l + 3 } else { l };
    assert_eq!(shuffle("down.b32 %r2, %r1, 3, 31")?, lanes.clone().map(down).collect::<Vec<_>>());
    assert_eq!(
        shuffle("up.b32 %r2, %r1, 3, 0")?,
        lanes.clone().map(|l| if l >= 3 { l - 3 } else { l }).collect::<Vec<_>>()
    );
    // Segments of eight lanes.
    let within = |l: u32| if l % 8 >= 2 { l - 2 } else { l };
    assert_eq!(shuffle("up.b32 %r2, %r1, 2, 0x1800")?, lanes.clone().map(within).collect::<Vec<_>>());
    assert_eq!(results("redux.sync.add.s32 %r2, %r1, -1;", 32)?, vec![496; 32]);
    let ballot = "setp.lt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r2, %p1, -1;";
    assert_eq!(results(ballot, 32)?, vec![31; 32]);
    let matched = results("and.b32 %r3, %r1, 1; match.any.sync.b32 %r2, %r3, -1;", 32)?;
    assert_eq!(matched[..2], [0x5555_5555, 0xaaaa_aaaa]);
    let elect = results("elect.sync %r3|%p1, -1; selp.u32 %r2, 1, 0, %p1;", 32)?;
    assert_eq!(elect.iter().sum::<u32>(), elect[0]);
    Ok(())
}

#[test]
fn generic_addresses_reach_every_space() -> Result<()> {
    let text = kernel(
        &["out"],
        ".shared .align 4 .b8 tile[128]; .local .align 4 .b8 stack[16];",
        &format!(
            "{OUT}
             mov.u64 %rd4, tile; cvta.shared.u64 %rd5, %rd4; add.s64 %rd5, %rd5, %rd2; st.u32 [%rd5], %r1;
             mov.u64 %rd6, stack; cvta.local.u64 %rd7, %rd6; st.u32 [%rd7+4], %r1;
             ld.u32 %r3, [%rd5]; ld.u32 %r4, [%rd7+4]; cvta.global.u64 %rd8, %rd3;
             add.s32 %r5, %r3, %r4; st.u32 [%rd8], %r5;"
        ),
    );
    let mut memory = [Memory::new(128)];
    let outcome = Bench::new(&text, &["out"]).run(&mut memory)?;
    assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
    assert_eq!(words(&memory[0]), (0..32).map(|l| 2 * l).collect::<Vec<u32>>());
    Ok(())
}

/// Each block waits for the one before it through a flag in global memory.
const CHAIN: &str = "mov.u32 %r1, %ctaid.x; mov.u32 %r9, %tid.x; setp.ne.u32 %p3, %r9, 0; @%p3 ret;
    ld.param.u64 %rd1, [flags];
    mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
    setp.eq.u32 %p1, %r1, 0; mov.u32 %r2, 0;
    @%p1 bra READY;
    WAIT: ld.acquire.gpu.global.u32 %r2, [%rd3+-4]; setp.eq.u32 %p2, %r2, 0; @%p2 bra WAIT;
    READY: add.s32 %r2, %r2, 1; st.release.gpu.global.u32 [%rd3], %r2;";

#[test]
fn blocks_of_a_cooperative_launch_wait_for_each_other() -> Result<()> {
    let text = kernel(&["flags"], "", CHAIN);
    for options in schedules() {
        let mut memory = [Memory::from_bytes(&[0; 32])];
        let mut bench = Bench::new(&text, &["flags"]).grid(8);
        (bench.cooperative, bench.options) = (true, options);
        let outcome = bench.run(&mut memory)?;
        assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
        assert_eq!(words(&memory[0]), (1..=8).collect::<Vec<u32>>());
    }
    // Without the promise that all run together, a block that starts first waits for ever.
    let mut bench = Bench::new(&text, &["flags"]).grid(8);
    bench.options.schedule.order = Order::Reversed;
    bench.options.patience = 100_000;
    let outcome = bench.run(&mut [Memory::from_bytes(&[0; 32])])?;
    assert!(outcome.findings.iter().any(|f| f.kind == FindingKind::Deadlock), "{:?}", outcome.findings);
    Ok(())
}

#[test]
fn a_loop_that_never_ends_is_given_up_although_it_stores() -> Result<()> {
    let text = kernel(&["out"], "", "ld.param.u64 %rd1, [out]; AGAIN: st.global.u32 [%rd1], 1; bra AGAIN;");
    let mut bench = Bench::new(&text, &["out"]).grid(1);
    bench.options.patience = 1_000;
    bench.options.limit = 100_000;
    let outcome = bench.run(&mut [Memory::new(4)])?;
    let found = outcome.findings.iter().find(|f| f.kind == FindingKind::Deadlock);
    assert!(found.is_some_and(|f| f.message.contains("still running")), "{:?}", outcome.findings);
    Ok(())
}

#[test]
fn host_threads_share_a_grid() -> Result<()> {
    let text = kernel(
        &["out"],
        "",
        "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %tid.x; mad.lo.s32 %r3, %r1, 64, %r2; ld.param.u64 %rd1, [out];
         mul.wide.u32 %rd2, %r3, 4; add.s64 %rd3, %rd1, %rd2; st.global.u32 [%rd3], %r3;",
    );
    let mut memory = [Memory::new(64 * 256 * 4)];
    let mut bench = Bench::new(&text, &["out"]).grid(256).block(64);
    bench.options.threads = 4;
    let outcome = bench.run(&mut memory)?;
    assert!(outcome.findings.is_empty());
    assert_eq!(outcome.counters.total.thread_instructions, 256 * 64 * 8);
    assert_eq!(words(&memory[0]), (0..64 * 256).collect::<Vec<u32>>());
    Ok(())
}

#[test]
fn traffic_and_bank_conflicts_are_counted() -> Result<()> {
    let count = |body: &str| -> Result<Counts> {
        let text = kernel(&["data"], ".shared .align 128 .b8 tile[8192];", body);
        let mut memory = [Memory::from_bytes(&[0; 8192])];
        let outcome = Bench::new(&text, &["data"]).run(&mut memory)?;
        assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
        Ok(outcome.counters.total)
    };
    let shared = |stride: u32, ty: &str, values: &str| {
        count(&format!(
            "mov.u32 %r1, %tid.x; mov.u32 %r2, tile; mad.lo.s32 %r3, %r1, {stride}, %r2; st.shared.{ty} [%r3], {values};"
        ))
    };
    let conflicts = |c: Counts| (c.shared_wavefronts, c.bank_conflicts);
    assert_eq!(conflicts(shared(4, "u32", "%r1")?), (1, 0));
    assert_eq!(conflicts(shared(8, "u32", "%r1")?), (2, 1));
    assert_eq!(conflicts(shared(128, "u32", "%r1")?), (32, 31));
    assert_eq!(conflicts(shared(132, "u32", "%r1")?), (1, 0));
    assert_eq!(conflicts(shared(8, "v2.u32", "{%r1, %r1}")?), (2, 0));
    assert_eq!(conflicts(shared(16, "v4.u32", "{%r1, %r1, %r1, %r1}")?), (4, 0));
    assert_eq!(conflicts(shared(128, "v4.u32", "{%r1, %r1, %r1, %r1}")?), (32, 28));
    let global = |stride: u32| {
        count(&format!(
            "mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [data]; mul.wide.u32 %rd2, %r1, {stride}; add.s64 %rd3, %rd1, %rd2; ld.global.u32 %r2, [%rd3];"
        ))
    };
    for (stride, sectors) in [(4, 4), (8, 8), (32, 32), (128, 32), (0, 1)] {
        let c = global(stride)?;
        assert_eq!((c.global_bytes, c.global_sectors), (128, sectors), "stride {stride}");
    }
    Ok(())
}

#[test]
fn what_a_launch_touches_counts_once() -> Result<()> {
    let touched = |stride: u32, blocks: u32, access: &str| -> Result<[u64; 3]> {
        let body = format!(
            "mov.u32 %r1, %tid.x; mov.u32 %r2, tile; ld.param.u64 %rd1, [data]; mul.wide.u32 %rd2, %r1, {stride}; \
             add.s64 %rd3, %rd1, %rd2; shl.b32 %r3, %r1, 4; add.s32 %r4, %r2, %r3; {access}"
        );
        let text = kernel(&["data"], ".shared .align 128 .b8 tile[512];", &body);
        let outcome = Bench::new(&text, &["data"]).grid(blocks).run(&mut [Memory::from_bytes(&[0; 8192])])?;
        assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
        let c = outcome.counters;
        Ok([c.total.global_sectors, c.read_sectors, c.written_sectors])
    };
    assert_eq!(touched(4, 3, "ld.global.u32 %r5, [%rd3];")?, [12, 4, 0]);
    assert_eq!(touched(64, 3, "ld.global.u32 %r5, [%rd3];")?, [96, 32, 0]);
    assert_eq!(touched(4, 1, "st.global.u32 [%rd3], %r1;")?, [4, 0, 4]);
    assert_eq!(touched(128, 1, "st.global.u32 [%rd3], %r1;")?, [32, 0, 32]);
    assert_eq!(touched(4, 2, "red.global.add.u32 [%rd3], %r1;")?, [8, 4, 4]);
    let copy = "cp.async.cg.shared.global [%r4], [%rd3], 16; cp.async.commit_group; cp.async.wait_group 0;";
    assert_eq!(touched(16, 2, copy)?, [32, 16, 0]);
    Ok(())
}

#[test]
fn splits_are_counted_where_they_happen() -> Result<()> {
    let text = kernel(
        &[],
        "",
        "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 8;\n@%p1 bra A;\nmov.u32 %r2, 1;\nA: mov.u32 %r3, 2;",
    );
    let outcome = Bench::new(&text, &[]).block(64).run(&mut [])?;
    assert_eq!(outcome.counters.total.splits, 1);
    let at = outcome.counters.lines.values().filter(|c| c.splits > 0).count();
    assert_eq!(at, 1);
    assert!(outcome.counters.to_string().contains("branches that split a warp"));
    Ok(())
}

#[test]
fn unknown_forms_are_refused_by_line() {
    let cases = [
        ("frobnicate.u32 %r1, %r2;", "frobnicate"),
        ("add.sat.f32 %f1, %f2, %f3;", "sat"),
        ("add.rz.f32 %f1, %f2, %f3;", "rz"),
        (
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1,%r2,%r3,%r4};",
            "mma",
        ),
        ("ld.global.u32 %r1, [%nope];", "nope"),
        ("bra NOWHERE;", "NOWHERE"),
        ("add.u32 %r1, %r2;", "operands"),
        ("mov.u32 %r1, %r2", "expected"),
        ("ld.shared.v4.u32 {%r1, %r2}, [%r3];", "length"),
        ("@%r1 mov.u32 %r1, %r2;", "predicate"),
    ];
    for (statement, hint) in cases {
        let text = kernel(&[], "", &format!("mov.u32 %r1, 0;\n{statement}\n"));
        let line = text.lines().position(|l| l == statement).map_or(0, |n| n as u32 + 1);
        let error = match Module::load("bad.ptx", &text) {
            Ok(_) => panic!("`{statement}` was accepted"),
            Err(e) => e,
        };
        assert!(error.line.abs_diff(line) <= 1, "{error}, expected line {line}");
        assert!(error.to_string().starts_with("bad.ptx:"), "{error}");
        assert!(error.why.contains(hint), "{error} lacks `{hint}`");
    }
    for text in
        [".version", ".visible .entry f(", "\"", ".entry f() { .reg .b32 %r<2>;", "/*", ".func x() {}", "}"]
    {
        assert!(Module::load("bad.ptx", text).is_err(), "{text}");
    }
}

#[test]
fn launches_that_do_not_fit_are_refused() -> Result<()> {
    let text = kernel(&["out"], ".shared .b8 tile[1024];", "").replace("\n{", "\n.maxntid 64, 1, 1\n{");
    let module = Module::load("test.ptx", &text)?;
    let out =
        |len| Window { name: "out", memory: MemoryId(0), start: 0, len, offset: 0, access: Access::Write };
    let good = [Argument::Window(out(16))];
    let launch = |args: &[Argument<'_>], block: [u32; 3], grid: [u32; 3], shared: u32, limit: u32| {
        let kernel = module.kernel("test").map_err(|e| e.to_string())?;
        let launch = Launch { kernel, grid, block, cluster: [1, 1, 1], shared, cooperative: false, args };
        let options = Options { shared_limit: limit, ..Options::default() };
        simulate(&mut [Memory::new(16)], &launch, &options).map(|_| ()).map_err(|e| e.to_string())
    };
    let (block, grid) = ([64, 1, 1], [1, 1, 1]);
    assert_eq!(launch(&good, block, grid, 0, 1024), Ok(()));
    let refusals = [
        (launch(&[], block, grid, 0, 1024), "takes 1 arguments, 0 given"),
        (launch(&[Argument::U32(1)], block, grid, 0, 1024), "has 8 bytes, the argument 4"),
        (launch(&[Argument::Window(out(17))], block, grid, 0, 1024), "do not fit a memory of 16"),
        (launch(&good, [65, 1, 1], grid, 0, 1024), "at most 64"),
        (launch(&good, [0, 1, 1], grid, 0, 1024), "extent of zero"),
        (launch(&good, block, [0, 1, 1], 0, 1024), "extent of zero"),
        (launch(&good, block, grid, 16, 1024), "bytes of shared memory"),
    ];
    for (refusal, hint) in refusals {
        assert!(refusal.as_ref().is_err_and(|e| e.contains(hint)), "{refusal:?} lacks `{hint}`");
    }
    assert!(module.kernel("tset").is_err_and(|e| e.to_string().contains("the module has test")));
    Ok(())
}

#[test]
fn findings_name_operand_byte_line_and_thread() -> Result<()> {
    let body = format!("{OUT}\n.loc 1 77 3\nst.global.u32 [%rd3+64], %r1;");
    let text =
        kernel(&["out"], "", &body).replace(".address_size 64", ".address_size 64\n.file 1 \"kernel.cu\"");
    let mut memory = [Memory::new(128)];
    let outcome = Bench::new(&text, &["out"]).run(&mut memory)?;
    let [finding] = &outcome.findings[..] else { panic!("{:?}", outcome.findings) };
    let line = text.lines().position(|l| l.contains("[%rd3+64]")).map_or(0, |n| n as u32 + 1);
    assert_eq!((finding.line, finding.thread, finding.count), (line, 16, 16));
    assert_eq!(finding.place, Place::Operand { name: "out".into(), offset: 128 });
    assert_eq!(finding.source, Some(("kernel.cu".into(), 77)));
    let shown = finding.to_string();
    assert!(shown.contains("`out` byte 128") && shown.contains("[kernel.cu:77]"), "{shown}");
    Ok(())
}

#[test]
fn memory_knows_what_was_written() -> Result<()> {
    let mut memory = Memory::new(64);
    assert!(!memory.is_initialised(0..1));
    memory.write(8, &bytes_of(&[1, 2]));
    assert!(memory.is_initialised(8..16) && !memory.is_initialised(8..17));
    memory.forget(12..13);
    assert!(!memory.is_initialised(8..16));
    let text =
        kernel(&["out"], "", &format!("{OUT} setp.gt.u32 %p1, %r1, 3; @%p1 ret; st.global.u32 [%rd3], %r1;"));
    let mut memories = [memory];
    Bench::new(&text, &["out"]).run(&mut memories)?;
    assert!(memories[0].is_initialised(0..16));
    Ok(())
}

/// Blocks that take numbers as they begin, each of which waits until a word counts to its number plus `late`, and adds
/// its number to three times a sum.
fn in_turn(late: u32) -> String {
    let body = format!(
        "
        mov.u32 %r0, %tid.x; setp.ne.u32 %p1, %r0, 0; @%p1 ret;
        ld.param.u64 %rd1, [words]; atom.global.add.u32 %r1, [%rd1], 1; add.u32 %r2, %r1, {late};
        $wait: ld.acquire.gpu.global.u32 %r3, [%rd1+4]; setp.ne.u32 %p2, %r3, %r2; @%p2 bra $wait;
        ld.global.u32 %r4, [%rd1+8]; mad.lo.u32 %r4, %r4, 3, %r1; st.global.u32 [%rd1+8], %r4;
        red.release.gpu.global.add.u32 [%rd1+4], 1;"
    );
    kernel(&["words"], "", &body)
}

#[test]
fn blocks_wait_for_those_that_began_before() -> Result<()> {
    let text = in_turn(0);
    let want = (0..40).fold(0u32, |sum, n| sum.wrapping_mul(3).wrapping_add(n));
    for (threads, together) in [(1, 1), (1, 4), (3, 1), (2, 3)] {
        for options in schedules() {
            let mut bench = Bench::new(&text, &["words"]).grid(40);
            bench.options = Options { threads, together, patience: 1_000_000, ..options };
            let mut memory = [Memory::from_bytes(&[0; 12])];
            let outcome = bench.run(&mut memory)?;
            assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
            assert_eq!(words(&memory[0]), [40, 40, want]);
        }
    }
    Ok(())
}

#[test]
fn blocks_that_wait_for_nobody_are_stuck_on_any_number_of_threads() -> Result<()> {
    let text = in_turn(1);
    for (threads, together) in [(1, 1), (1, 2), (2, 1), (3, 2)] {
        let mut bench = Bench::new(&text, &["words"]).grid(4);
        bench.options = Options { threads, together, patience: 5_000, ..Options::default() };
        let outcome = bench.run(&mut [Memory::from_bytes(&[0; 12])])?;
        assert!(outcome.findings.iter().any(|f| f.kind == FindingKind::Deadlock), "{:?}", outcome.findings);
    }
    Ok(())
}
