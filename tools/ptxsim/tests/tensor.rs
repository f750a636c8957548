//! Tensor-core and bulk-copy instructions give the results of their definitions.

mod common;

use common::{Bench, Result, bf16, bf16_bytes, bytes_of, kernel, schedules, small, words};
use transfusion_ptxsim::*;

/// The address of 16 bytes per thread behind `base`, in `to`.
fn per_thread(base: &str, bytes: u32, to: &str) -> String {
    format!("mul.wide.u32 %rd20, %r1, {bytes}; add.s64 {to}, {base}, %rd20;")
}

fn bits(x: f32) -> u32 {
    x.to_bits()
}

/// `a[m][k] b[n][k]` summed over k, exactly.
fn product(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
    let entry = |i: usize, j: usize| (0..k).map(|q| a[i * k + q] * b[j * k + q]).sum();
    (0..m * n).map(|e| entry(e / n, e % n)).collect()
}

#[test]
fn ldmatrix_mma_and_stmatrix_agree_with_a_product() -> Result<()> {
    // C[16][8] = A[16][16] B[8][16]: A by four matrices, B by two, C rounded to bf16 and stored by stmatrix.
    let body = "
        mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; ld.param.u64 %rd3, [c];
        mov.u32 %r2, tile; shl.b32 %r3, %r1, 4; add.s32 %r4, %r2, %r3;
        mul.wide.u32 %rd4, %r1, 16; add.s64 %rd5, %rd1, %rd4; add.s64 %rd6, %rd2, %rd4; add.s64 %rd7, %rd3, %rd4;
        cp.async.cg.shared.global [%r4], [%rd5], 16;
        setp.lt.u32 %p1, %r1, 16; @%p1 cp.async.cg.shared.global [%r4+512], [%rd6], 16;
        cp.async.wait_all; bar.warp.sync -1;
        and.b32 %r5, %r1, 15; shr.u32 %r6, %r1, 4; shl.b32 %r5, %r5, 5; shl.b32 %r6, %r6, 4;
        add.s32 %r7, %r5, %r6; add.s32 %r7, %r7, %r2;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r7];
        and.b32 %r8, %r1, 7; shl.b32 %r8, %r8, 5; shr.u32 %r9, %r1, 3; and.b32 %r9, %r9, 1; shl.b32 %r9, %r9, 4;
        add.s32 %r8, %r8, %r9; add.s32 %r8, %r8, %r2;
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r14, %r15}, [%r8+512];
        mov.f32 %f0, 0f00000000;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r10,%r11,%r12,%r13}, {%r14,%r15}, {%f0,%f0,%f0,%f0};
        cvt.rn.bf16x2.f32 %r20, %f2, %f1; cvt.rn.bf16x2.f32 %r21, %f4, %f3;
        and.b32 %r22, %r1, 15; shl.b32 %r22, %r22, 4; add.s32 %r22, %r22, %r2;
        stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r22+1024], {%r20, %r21};
        bar.warp.sync -1; @!%p1 ret;
        ld.shared.v4.u32 {%r30, %r31, %r32, %r33}, [%r4+1024]; st.global.v4.u32 [%rd7], {%r30, %r31, %r32, %r33};";
    let text = kernel(&["a", "b", "c"], ".shared .align 128 .b8 tile[2048];", body);
    let (a, b) = (small(1, 256), small(2, 128));
    for options in schedules() {
        let mut memory =
            [Memory::from_bytes(&bf16_bytes(&a)), Memory::from_bytes(&bf16_bytes(&b)), Memory::new(256)];
        let mut bench = Bench::new(&text, &["a", "b", "c"]);
        bench.options = options;
        let outcome = bench.run(&mut memory)?;
        assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
        assert_eq!(outcome.counters.total.tensor_flops, 2 * 16 * 8 * 16);
        let want: Vec<f32> = product(&a, &b, 16, 8, 16);
        for (got, want) in memory[2].bytes().as_chunks::<2>().0.iter().zip(want) {
            let got = f32::from_bits(u32::from(u16::from_le_bytes(*got)) << 16);
            assert!((got - want).abs() <= want.abs() / 256.0, "{got} for {want}");
        }
    }
    Ok(())
}

/// Runs an `mma` whose fragments come word by word from memory, and returns the accumulators by lane.
fn mma(op: &str, a: &[Vec<u32>], b: &[Vec<u32>]) -> Result<Vec<[f32; 4]>> {
    let (na, nb) = (a.len(), b.len());
    let mut body =
        "mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [in]; ld.param.u64 %rd2, [out]; mov.f32 %f0, 0f00000000;"
            .to_string();
    body += &per_thread("%rd1", (na + nb) as u32 * 4, "%rd3");
    let name = |n: usize| format!("%r{}", 10 + n);
    for n in 0..na + nb {
        body += &format!("ld.global.u32 {}, [%rd3+{}];", name(n), n * 4);
    }
    let list = |r: std::ops::Range<usize>| r.map(name).collect::<Vec<_>>().join(",");
    body += &format!(
        "{op} {{%f1,%f2,%f3,%f4}}, {{{}}}, {{{}}}, {{%f0,%f0,%f0,%f0}};",
        list(0..na),
        list(na..na + nb)
    );
    body += &per_thread("%rd2", 16, "%rd4");
    body += "st.global.v4.f32 [%rd4], {%f1,%f2,%f3,%f4};";
    let text = kernel(&["in", "out"], "", &body);
    let input: Vec<u8> =
        (0..32).flat_map(|l| a.iter().chain(b).map(move |w| w[l])).flat_map(u32::to_le_bytes).collect();
    let mut memory = [Memory::from_bytes(&input), Memory::new(512)];
    let outcome = Bench::new(&text, &["in", "out"]).run(&mut memory)?;
    assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
    let words = words(&memory[1]);
    Ok(words.as_chunks::<4>().0.iter().map(|w| w.map(f32::from_bits)).collect())
}

#[test]
fn fragments_lie_where_the_manual_says() -> Result<()> {
    // m16n8k8 of tf32 and of bf16, by the element that each lane should hold.
    let (a, b) = (small(3, 128), small(4, 64));
    let want = product(&a, &b, 16, 8, 8);
    let check = |got: Vec<[f32; 4]>| {
        for (lane, c) in got.into_iter().enumerate() {
            let (g, t) = (lane / 4, 2 * (lane % 4));
            let at = |row: usize, column: usize| want[row * 8 + column];
            assert_eq!(c, [at(g, t), at(g, t + 1), at(g + 8, t), at(g + 8, t + 1)], "lane {lane}");
        }
    };
    let lanes = |f: &dyn Fn(usize, usize) -> u32| (0..32).map(|l| f(l / 4, l % 4)).collect::<Vec<_>>();
    let (ea, eb) = (|r: usize, k: usize| bits(a[r * 8 + k]), |n: usize, k: usize| bits(b[n * 8 + k]));
    check(mma(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        &[
            lanes(&|g, t| ea(g, t)),
            lanes(&|g, t| ea(g + 8, t)),
            lanes(&|g, t| ea(g, t + 4)),
            lanes(&|g, t| ea(g + 8, t + 4)),
        ],
        &[lanes(&|g, t| eb(g, t)), lanes(&|g, t| eb(g, t + 4))],
    )?);
    let pair = |x: f32, y: f32| {
        u32::from(u16::from_le_bytes(bf16(x))) | u32::from(u16::from_le_bytes(bf16(y))) << 16
    };
    check(mma(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32",
        &[
            lanes(&|g, t| pair(a[g * 8 + 2 * t], a[g * 8 + 2 * t + 1])),
            lanes(&|g, t| pair(a[(g + 8) * 8 + 2 * t], a[(g + 8) * 8 + 2 * t + 1])),
        ],
        &[lanes(&|g, t| pair(b[g * 8 + 2 * t], b[g * 8 + 2 * t + 1]))],
    )?);
    Ok(())
}

/// A kernel that loads a tile through a tensor map, dumps shared memory as it lies, and stores the tile elsewhere.
fn tile_kernel(dimensions: usize) -> String {
    let names = ["%r10", "%r11", "%r12", "%r13", "%r14"];
    let coordinates = names[..dimensions].join(", ");
    let reads: String = (0..dimensions).map(|d| format!("ld.param.u32 {}, [at{d}];", names[d])).collect();
    let at: String = (0..dimensions).map(|d| format!(", .param .u32 at{d}")).collect();
    let body = format!(
        ".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry test(.param .align 64 .b8 from[128], \
         .param .align 64 .b8 to[128], .param .u64 dump, .param .u32 bytes{at})\n{{\n\
         .reg .pred %p<4>; .reg .b32 %r<32>; .reg .b64 %rd<16>;\n\
         .shared .align 1024 .b8 tile[4096]; .shared .align 8 .b64 bar;\n{reads}
         mov.u32 %r1, %tid.x; mov.u32 %r2, tile; mov.u32 %r3, bar; setp.ne.u32 %p1, %r1, 0;
         ld.param.u32 %r4, [bytes]; ld.param.u64 %rd3, [dump];
         mov.b64 %rd1, from; mov.b64 %rd5, to; cvta.param.u64 %rd6, %rd5;
         @!%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
         @!%p1 fence.mbarrier_init.release.cluster;
         bar.sync 0;
         @!%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], %r4;
         @!%p1 cp.async.bulk.tensor.{dimensions}d.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1, {{{coordinates}}}], [%r3];
         WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0; @!%p2 bra WAIT;
         shl.b32 %r5, %r1, 4;
         COPY: setp.ge.u32 %p3, %r5, %r4; @%p3 bra DONE;
         add.s32 %r6, %r2, %r5; cvt.u64.u32 %rd2, %r5; add.s64 %rd4, %rd3, %rd2;
         ld.shared.v4.u32 {{%r20, %r21, %r22, %r23}}, [%r6]; st.global.v4.u32 [%rd4], {{%r20, %r21, %r22, %r23}};
         add.s32 %r5, %r5, 512; bra COPY;
         DONE: @%p1 bra END;
         cp.async.bulk.tensor.{dimensions}d.global.shared::cta.bulk_group [%rd6, {{{coordinates}}}], [%r2];
         cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
         END: ret;\n}}\n"
    );
    body
}

/// Where element `(row, column)` of a tile with rows of `width` 16-bit elements lies in shared memory.
fn swizzled(swizzle: Swizzle, byte: usize) -> usize {
    let (row, mask) = match swizzle {
        Swizzle::None => return byte,
        Swizzle::Bytes32 => (byte >> 7 & 1, 1),
        Swizzle::Bytes64 => (byte >> 7 & 3, 3),
        Swizzle::Bytes128 => (byte >> 7 & 7, 7),
    };
    byte ^ (row & mask) << 4
}

#[test]
fn tiles_are_swizzled_and_clipped() -> Result<()> {
    // 20 rows of 72 elements; the tile hangs over both ends.
    let (rows, columns) = (20i64, 72i64);
    let source: Vec<u16> = (0..rows * columns).map(|n| n as u16 + 1).collect();
    let bytes: Vec<u8> = source.iter().flat_map(|v| v.to_le_bytes()).collect();
    for (swizzle, width) in
        [(Swizzle::None, 32), (Swizzle::Bytes32, 16), (Swizzle::Bytes64, 32), (Swizzle::Bytes128, 64)]
    {
        for (x0, y0) in [(0, 0), (48, 12), (-8, -2), (16, 5)] {
            let height = 16i64;
            let tile = (height * width * 2) as usize;
            let window = |name, memory, access| Window {
                name,
                memory: MemoryId(memory),
                start: 0,
                len: bytes.len(),
                offset: 0,
                access,
            };
            let map = |window| {
                Argument::TensorMap(TensorMap {
                    window,
                    element: 2,
                    format: Format::Integer,
                    extents: vec![columns as u64, rows as u64],
                    strides: vec![columns as u64 * 2],
                    tile: vec![width as u32, height as u32],
                    swizzle,
                })
            };
            let dump = Window {
                name: "dump",
                memory: MemoryId(2),
                start: 0,
                len: tile,
                offset: 0,
                access: Access::Write,
            };
            let args = [
                map(window("from", 0, Access::Read)),
                map(window("to", 1, Access::Write)),
                Argument::Window(dump),
                Argument::U32(tile as u32),
                Argument::U32(x0 as i32 as u32),
                Argument::U32(y0 as i32 as u32),
            ];
            let text = tile_kernel(2);
            for options in schedules() {
                let mut memory = [Memory::from_bytes(&bytes), Memory::new(bytes.len()), Memory::new(tile)];
                let mut bench = Bench::new(&text, &[]);
                bench.options = options;
                let outcome = bench.run_with(&args, &mut memory)?;
                assert!(outcome.findings.is_empty(), "{swizzle:?} {:?}", outcome.findings);
                let word = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
                for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
                    let (gy, gx) = (y0 + y, x0 + x);
                    let inside = (0..rows).contains(&gy) && (0..columns).contains(&gx);
                    let want = if inside { source[(gy * columns + gx) as usize] } else { 0 };
                    let at = swizzled(swizzle, ((y * width + x) * 2) as usize);
                    assert_eq!(word(memory[2].bytes(), at), want, "{swizzle:?} ({x0},{y0}) at ({y},{x})");
                    if inside {
                        let at = ((gy * columns + gx) * 2) as usize;
                        assert_eq!(word(memory[1].bytes(), at), want);
                        assert!(memory[1].is_initialised(at..at + 2));
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn tiles_have_up_to_five_dimensions() -> Result<()> {
    let extents = [16usize, 3, 4, 2, 3];
    let source: Vec<u16> = (0..extents.iter().product::<usize>()).map(|n| n as u16).collect();
    let bytes: Vec<u8> = source.iter().flat_map(|v| v.to_le_bytes()).collect();
    let (start, size) = ([8usize, 1, 2, 0, 1], [8usize, 2, 2, 2, 2]);
    for dimensions in 3..=5 {
        let used = &extents[..dimensions];
        let strides: Vec<u64> =
            (1..dimensions).map(|d| extents[..d].iter().product::<usize>() as u64 * 2).collect();
        let tile = size[..dimensions].iter().product::<usize>() * 2;
        let map = |name, memory| {
            Argument::TensorMap(TensorMap {
                window: Window {
                    name,
                    memory: MemoryId(memory),
                    start: 0,
                    len: bytes.len(),
                    offset: 0,
                    access: Access::ReadWrite,
                },
                element: 2,
                format: Format::Integer,
                extents: used.iter().map(|e| *e as u64).collect(),
                strides: strides.clone(),
                tile: size[..dimensions].iter().map(|s| *s as u32).collect(),
                swizzle: Swizzle::None,
            })
        };
        let dump = Window {
            name: "dump",
            memory: MemoryId(2),
            start: 0,
            len: tile,
            offset: 0,
            access: Access::Write,
        };
        let mut args = vec![map("from", 0), map("to", 1), Argument::Window(dump), Argument::U32(tile as u32)];
        args.extend(start[..dimensions].iter().map(|s| Argument::U32(*s as u32)));
        let mut memory = [Memory::from_bytes(&bytes), Memory::new(bytes.len()), Memory::new(tile)];
        let outcome = Bench::new(&tile_kernel(dimensions), &[]).run_with(&args, &mut memory)?;
        assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
        for (n, got) in memory[2].bytes().as_chunks::<2>().0.iter().enumerate() {
            let (mut rest, mut at, mut step) = (n, 0, 1);
            for d in 0..dimensions {
                at += (start[d] + rest % size[d]) * step;
                rest /= size[d];
                step *= extents[d];
            }
            assert_eq!(u16::from_le_bytes(*got), source[at], "{dimensions} dimensions, element {n}");
            assert_eq!(memory[1].bytes()[at * 2..at * 2 + 2], *got);
        }
    }
    Ok(())
}

/// The byte of element (row, k).
type Offset = Box<dyn Fn(usize, usize) -> usize>;

/// Memory images of `x[rows][16]` as `wgmma` wants it: bytes, and the descriptor's leading and stride offsets.
fn operand(x: &[f32], rows: usize, swizzle: Swizzle, k_major: bool) -> (Vec<u8>, u64, u64) {
    let span = match swizzle {
        Swizzle::None => 16,
        Swizzle::Bytes32 => 32,
        Swizzle::Bytes64 => 64,
        Swizzle::Bytes128 => 128,
    };
    let mut bytes = vec![0; 32 * 1024];
    // Offsets of element (row, k) by the canonical layouts.
    let (leading, stride, at): (usize, usize, Offset) = if k_major {
        if swizzle == Swizzle::None {
            (
                rows / 8 * 128,
                128,
                Box::new(move |r, k| r / 8 * 128 + k / 8 * (rows / 8 * 128) + r % 8 * 16 + k % 8 * 2),
            )
        } else {
            (16, span * 8, Box::new(move |r, k| r / 8 * span * 8 + r % 8 * span + k * 2))
        }
    } else {
        let per_row = span / 2;
        if swizzle == Swizzle::None {
            (128, 256, Box::new(move |r, k| r / 8 * 256 + k / 8 * 128 + k % 8 * 16 + r % 8 * 2))
        } else {
            let block = span * 16;
            (
                block,
                span * 8,
                Box::new(move |r, k| r / per_row * block + k / 8 * span * 8 + k % 8 * span + r % per_row * 2),
            )
        }
    };
    for r in 0..rows {
        for k in 0..16 {
            let to = swizzled(swizzle, at(r, k));
            bytes[to..to + 2].copy_from_slice(&bf16(x[r * 16 + k]));
        }
    }
    (bytes, leading as u64, stride as u64)
}

/// One `wgmma` of 64 by `n` by 16; A in registers if `a_image` is none. Returns the product.
fn wgmma(
    n: usize,
    a: &[f32],
    b: &[f32],
    swizzle: Swizzle,
    major: (bool, bool),
    registers: bool,
) -> Result<Vec<f32>> {
    let (image_a, lead_a, stride_a) = operand(a, 64, swizzle, major.0);
    let (image_b, lead_b, stride_b) = operand(b, n, swizzle, major.1);
    let mode = match swizzle {
        Swizzle::None => 0u64,
        Swizzle::Bytes128 => 1,
        Swizzle::Bytes64 => 2,
        Swizzle::Bytes32 => 3,
    };
    let descriptor = |lead: u64, stride: u64| (lead >> 4) << 16 | (stride >> 4) << 32 | mode << 62;
    let sums: Vec<String> = (0..n / 2).map(|r| format!("%f{r}")).collect();
    let clear: String = sums.iter().map(|r| format!("mov.f32 {r}, 0f00000000;")).collect();
    let store: String =
        sums.iter().enumerate().map(|(r, f)| format!("st.global.f32 [%rd5+{}], {f};", r * 4)).collect();
    let (left, transposes) = if registers {
        ("{%r40, %r41, %r42, %r43}".to_string(), format!("{}", u8::from(!major.1)))
    } else {
        ("%rd10".to_string(), format!("{}, {}", u8::from(!major.0), u8::from(!major.1)))
    };
    // Warp w holds rows 16 w + g and + 8, as the fragment of mma.
    let fragment = "and.b32 %r30, %r1, 31; shr.u32 %r31, %r1, 5; shr.u32 %r32, %r30, 2; and.b32 %r33, %r30, 3;
        mad.lo.s32 %r34, %r31, 16, %r32; mul.lo.s32 %r34, %r34, 32; mad.lo.s32 %r34, %r33, 4, %r34;
        cvt.u64.u32 %rd12, %r34; add.s64 %rd13, %rd4, %rd12;
        ld.global.u32 %r40, [%rd13]; ld.global.u32 %r41, [%rd13+256]; ld.global.u32 %r42, [%rd13+16]; ld.global.u32 %r43, [%rd13+272];";
    let body = format!(
        "mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; ld.param.u64 %rd3, [c]; ld.param.u64 %rd4, [plain];
         mov.u32 %r2, left; mov.u32 %r3, right; shl.b32 %r4, %r1, 4; {clear} {fragment}
         COPY: add.s32 %r5, %r2, %r4; add.s32 %r6, %r3, %r4; cvt.u64.u32 %rd6, %r4; add.s64 %rd7, %rd1, %rd6; add.s64 %rd8, %rd2, %rd6;
         cp.async.cg.shared.global [%r5], [%rd7], 16; cp.async.cg.shared.global [%r6], [%rd8], 16;
         add.s32 %r4, %r4, 2048; setp.lt.u32 %p1, %r4, 32768; @%p1 bra COPY;
         cp.async.wait_all; fence.proxy.async.shared::cta; bar.sync 0;
         shr.u32 %r7, %r2, 4; cvt.u64.u32 %rd9, %r7; or.b64 %rd10, %rd9, {};
         shr.u32 %r7, %r3, 4; cvt.u64.u32 %rd9, %r7; or.b64 %rd11, %rd9, {};
         setp.eq.u32 %p2, %r1, %r1;
         wgmma.fence.sync.aligned;
         wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{}}}, {left}, %rd11, %p2, 1, 1, {transposes};
         wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
         mul.wide.u32 %rd6, %r1, {}; add.s64 %rd5, %rd3, %rd6; {store}",
        descriptor(lead_a, stride_a) as i64,
        descriptor(lead_b, stride_b) as i64,
        sums.join(","),
        n * 2,
    );
    let shared = ".shared .align 1024 .b8 left[32768]; .shared .align 1024 .b8 right[32768];";
    let names = ["a", "b", "c", "plain"];
    let text = kernel(&names, shared, &body);
    let mut memory = [
        Memory::from_bytes(&image_a),
        Memory::from_bytes(&image_b),
        Memory::new(64 * n * 4),
        Memory::from_bytes(&bf16_bytes(a)),
    ];
    let outcome = Bench::new(&text, &names).block(128).run(&mut memory)?;
    assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
    let words = words(&memory[2]);
    let mut c = vec![0.0; 64 * n];
    for (at, word) in words.iter().enumerate() {
        let (thread, r) = (at / (n / 2), at % (n / 2));
        let (lane, row) = (thread % 32, thread / 32 * 16);
        let row = row + lane / 4 + r % 4 / 2 * 8;
        c[row * n + r / 4 * 8 + lane % 4 * 2 + r % 2] = f32::from_bits(*word);
    }
    Ok(c)
}

#[test]
fn wgmma_reads_every_layout() -> Result<()> {
    for n in [8, 64, 128, 256] {
        let (a, b) = (small(5, 64 * 16), small(6, n * 16));
        let want = product(&a, &b, 64, n, 16);
        for swizzle in [Swizzle::None, Swizzle::Bytes32, Swizzle::Bytes64, Swizzle::Bytes128] {
            for major in [(true, true), (false, true), (true, false), (false, false)] {
                // A block of a transposed matrix is as wide as the swizzle span.
                if n == 8 && !major.1 && swizzle != Swizzle::None {
                    continue;
                }
                let got = wgmma(n, &a, &b, swizzle, major, false)?;
                assert!(got == want, "n {n}, {swizzle:?}, k-major {major:?}");
            }
        }
        let got = wgmma(n, &a, &b, Swizzle::Bytes128, (true, true), true)?;
        assert!(got == want, "n {n}, A in registers");
    }
    Ok(())
}

#[test]
fn a_cluster_shares_a_multicast_tile() -> Result<()> {
    // Block 0 loads for both; each adds its rank and hands the sum to the other through its shared memory.
    let body = "
        mov.u32 %r1, %tid.x; mov.u32 %r2, tile; mov.u32 %r3, bar; setp.ne.u32 %p1, %r1, 0;
        ld.param.u64 %rd1, [in]; ld.param.u64 %rd2, [out]; mov.u32 %r4, %cluster_ctarank;
        @!%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
        fence.mbarrier_init.release.cluster;
        @!%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 128;
        barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
        setp.ne.u32 %p2, %r4, 0; or.pred %p3, %p1, %p2; mov.u16 %h1, 3;
        @!%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r2], [%rd1], 128, [%r3], %h1;
        WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r3], 0; @!%p4 bra WAIT;
        shl.b32 %r5, %r1, 2; add.s32 %r6, %r2, %r5; ld.shared.u32 %r7, [%r6]; add.s32 %r7, %r7, %r4;
        xor.b32 %r8, %r4, 1; mapa.shared::cluster.u32 %r9, %r6, %r8; st.shared::cluster.u32 [%r9+128], %r7;
        barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
        ld.shared.u32 %r10, [%r6+128]; mad.lo.s32 %r11, %r4, 32, %r1; mul.wide.u32 %rd3, %r11, 4; add.s64 %rd4, %rd2, %rd3;
        st.global.u32 [%rd4], %r10;";
    let text = kernel(&["in", "out"], ".shared .align 128 .b8 tile[256]; .shared .align 8 .b64 bar;", body);
    for options in schedules() {
        let input: Vec<u8> = (0..32u32).flat_map(|v| (v * 10).to_le_bytes()).collect();
        let mut memory = [Memory::from_bytes(&input), Memory::new(256)];
        let mut bench = Bench::new(&text, &["in", "out"]).grid(2);
        (bench.cluster, bench.options) = (2, options);
        let outcome = bench.run(&mut memory)?;
        assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
        let want: Vec<u32> = (0..64).map(|n| n % 32 * 10 + if n < 32 { 1 } else { 0 }).collect();
        assert_eq!(words(&memory[1]), want);
    }
    Ok(())
}

/// What is found when thread 0 of each of two blocks arrives at the mbarrier of both, `ready` before it and `end` behind
/// it, and waits for both by a wait of this scope.
fn arrive_at_both(ready: &str, scope: &str, end: &str) -> Result<Vec<String>> {
    let body = format!(
        "
        mov.u32 %r1, %tid.x; mov.u32 %r3, bar; mov.u32 %r4, %cluster_ctarank; setp.ne.u32 %p1, %r1, 0;
        mov.u32 %r6, word; ld.param.u64 %rd2, [out]; mul.wide.u32 %rd3, %r4, 4; add.s64 %rd4, %rd2, %rd3;
        @%p1 bra READY;
        mbarrier.init.shared::cta.b64 [%r3], 2;
        fence.mbarrier_init.release.cluster;
        READY: {ready}
        @%p1 bra END;
        xor.b32 %r8, %r4, 1; mapa.shared::cluster.u32 %r9, %r6, %r8; st.shared::cluster.u32 [%r9], %r4;
        mapa.shared::cluster.u32 %r9, %r3, %r8; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r9];
        mbarrier.arrive.release.cta.shared::cta.b64 _, [%r3];
        WAIT: mbarrier.try_wait.parity.acquire.{scope}.shared::cta.b64 %p4, [%r3], 0; @!%p4 bra WAIT;
        ld.shared.u32 %r10, [%r6]; st.global.u32 [%rd4], %r10;
        END: {end}"
    );
    let text = kernel(&["out"], ".shared .align 4 .b32 word; .shared .align 8 .b64 bar;", &body);
    let mut found = vec![];
    for options in schedules() {
        let mut bench = Bench::new(&text, &["out"]).grid(2);
        (bench.cluster, bench.options) = (2, options);
        found.extend(bench.run(&mut [Memory::new(8)])?.findings.into_iter().map(|f| f.message));
    }
    Ok(found)
}

#[test]
fn blocks_of_a_cluster_meet_before_and_after() -> Result<()> {
    let meet = "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;";
    assert_eq!(arrive_at_both(meet, "cluster", meet)?, Vec::<String>::new());
    // What is awaited needs no meeting at the end.
    assert_eq!(arrive_at_both(meet, "cluster", "")?, Vec::<String>::new());
    let named =
        |found: Vec<String>, what: &str| assert!(found.iter().any(|f| f.contains(what)), "{what}: {found:?}");
    named(arrive_at_both("bar.sync 0;", "cluster", meet)?, "mbarrier.init");
    named(arrive_at_both(meet, "cta", meet)?, "not ordered after");
    named(arrive_at_both(meet, "cta", "")?, "may have exited");
    Ok(())
}

#[test]
fn bulk_stores_can_add() -> Result<()> {
    let body = "
        mov.u32 %r1, %tid.x; mov.u32 %r2, tile; ld.param.u64 %rd1, [out]; shl.b32 %r3, %r1, 2; add.s32 %r4, %r2, %r3;
        cvt.rn.f32.u32 %f1, %r1; st.shared.f32 [%r4], %f1; fence.proxy.async.shared::cta; bar.warp.sync -1;
        setp.ne.u32 %p1, %r1, 0; @%p1 ret;
        cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [%r2], 128;
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;";
    let text = kernel(&["out"], ".shared .align 128 .b8 tile[128];", body);
    let mut memory = [Memory::from_bytes(&1f32.to_le_bytes().repeat(32))];
    let outcome = Bench::new(&text, &["out"]).grid(3).run(&mut memory)?;
    assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
    let want: Vec<u32> = (0..32).map(|l| bits(1.0 + 3.0 * l as f32)).collect();
    assert_eq!(words(&memory[0]), want);
    assert_eq!((outcome.counters.read_sectors, outcome.counters.written_sectors), (4, 4));
    Ok(())
}

#[test]
fn a_bulk_store_that_has_read_is_not_there_yet() -> Result<()> {
    let begin = "
        mov.u32 %r1, %tid.x; mov.u32 %r2, tile; ld.param.u64 %rd1, [to]; ld.param.u64 %rd2, [seen];
        setp.ne.u32 %p1, %r1, 0; @%p1 ret;
        mov.u32 %r3, 7; mov.u32 %r4, 9;
        st.shared.v4.u32 [%r2], {%r3, %r3, %r3, %r3}; fence.proxy.async.shared::cta;
        cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 16;
        cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;
        st.shared.v4.u32 [%r2], {%r4, %r4, %r4, %r4};
        ld.global.u32 %r5, [%rd1]; st.global.u32 [%rd2], %r5;";
    let end = "cp.async.bulk.wait_group 0; ld.global.u32 %r5, [%rd1]; st.global.u32 [%rd2+4], %r5;";
    // Without the second wait it is there when the block has ended.
    for (body, seen) in [(format!("{begin}{end}"), [5, 7]), (begin.to_string(), [5, 0])] {
        let text = kernel(&["to", "seen"], ".shared .align 128 .b8 tile[16];", &body);
        let mut memory = [Memory::from_bytes(&bytes_of(&[5; 4])), Memory::from_bytes(&[0; 8])];
        let outcome = Bench::new(&text, &["to", "seen"]).run(&mut memory)?;
        assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
        assert_eq!((words(&memory[0]), words(&memory[1])), (vec![7; 4], seen.to_vec()));
    }
    Ok(())
}
