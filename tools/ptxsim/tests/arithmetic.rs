//! Integer operations, conversions and IEEE arithmetic agree with the host bit by bit; approximations stay within
//! their bounds.

use std::error::Error;
use transfusion_ptxsim::{Access, Argument, Launch, Memory, MemoryId, Module, Options, Window, simulate};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Runs `op` with up to three operands of the given register types on each row of values; returns the bits.
fn run(op: &str, from: &[&str], to: &str, rows: &[[u64; 3]]) -> Result<Vec<u64>> {
    let register = |ty: &str| match ty {
        "b16" => "%h",
        "b32" => "%r",
        _ => "%rd",
    };
    let mut loads = String::new();
    let mut names = vec![format!("{}40", register(to))];
    for (n, ty) in from.iter().enumerate() {
        let name = format!("{}{}", register(ty), 30 + n);
        loads += &format!("ld.global.{ty} {name}, [%rd3+{}];\n", n * 8);
        names.push(name);
    }
    let (mnemonic, tail) = op.split_once(' ').unwrap_or((op, ""));
    let text = format!(
        ".version 7.8\n.target sm_80\n.address_size 64\n\
         .visible .entry test(.param .u64 values, .param .u64 result, .param .u32 count) {{\n\
         .reg .pred %p<4>; .reg .b16 %h<48>; .reg .b32 %r<48>; .reg .b64 %rd<48>;\n\
         ld.param.u64 %rd1, [values]; ld.param.u64 %rd4, [result]; ld.param.u32 %r4, [count];\n\
         mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x;\n\
         mad.lo.s32 %r1, %r2, %r3, %r1; setp.ge.u32 %p1, %r1, %r4; @%p1 ret;\n\
         mul.wide.u32 %rd2, %r1, 24; add.s64 %rd3, %rd1, %rd2;\n\
         mul.wide.u32 %rd5, %r1, 8; add.s64 %rd6, %rd4, %rd5;\n\
         {loads}{mnemonic} {}{tail};\nst.global.{to} [%rd6], {}40;\nret;\n}}\n",
        names.join(", "),
        register(to),
    );
    let module = Module::load(op, &text)?;
    let bytes: Vec<u8> = rows.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
    let mut memories = [Memory::from_bytes(&bytes), Memory::from_bytes(&vec![0; rows.len() * 8])];
    let window = |n: usize, name| Window {
        name,
        memory: MemoryId(n),
        start: 0,
        len: if n == 0 { bytes.len() } else { rows.len() * 8 },
        offset: 0,
        access: if n == 0 { Access::Read } else { Access::Write },
    };
    let launch = Launch {
        kernel: module.kernel("test")?,
        grid: [rows.len().div_ceil(96) as u32, 1, 1],
        block: [96, 1, 1],
        cluster: [1, 1, 1],
        shared: 0,
        cooperative: false,
        args: &[
            Argument::Window(window(0, "values")),
            Argument::Window(window(1, "result")),
            Argument::U32(rows.len() as u32),
        ],
    };
    let outcome = simulate(&mut memories, &launch, &Options::default())?;
    assert!(outcome.findings.is_empty(), "{op}: {:?}", outcome.findings);
    let (words, _) = memories[1].bytes().as_chunks::<8>();
    Ok(words.iter().map(|w| u64::from_le_bytes(*w)).collect())
}

/// Edge values of every width, as integers and as floats, and some without pattern.
fn values() -> Vec<u64> {
    let floats = [
        0.0f32,
        -0.0,
        1.0,
        -1.0,
        0.5,
        1.5,
        2.5,
        -2.5,
        3.0,
        1e-40,
        -1e-40,
        1e38,
        -3e38,
        65504.0,
        65520.0,
        1e-8,
        0.1,
        f32::MIN_POSITIVE,
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        2147483648.0,
        -2147483904.0,
        0.3333,
    ];
    let mut out: Vec<u64> = floats.iter().map(|f| f.to_bits().into()).collect();
    out.extend(floats.iter().map(|f| f64::from(*f).to_bits()));
    out.extend([0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 255, 256]);
    out.extend([
        0x7fff,
        0x8000,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 32,
        i64::MAX as u64,
        1 << 63,
    ]);
    let mut state = 12345u64;
    for _ in 0..40 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        out.push(state ^ state >> 29);
    }
    out
}

/// All pairs, each with a third value.
fn rows() -> Vec<[u64; 3]> {
    let v = values();
    let third = |n: usize| v[(n * 7 + 3) % v.len()];
    let pair = |n: usize| [v[n / v.len()], v[n % v.len()], third(n)];
    (0..v.len() * v.len()).map(pair).collect()
}

fn mask(ty: &str) -> u64 {
    match ty {
        "b16" => 0xffff,
        "b32" => 0xffff_ffff,
        _ => u64::MAX,
    }
}

fn check(op: &str, from: &[&str], to: &str, host: impl Fn(u64, u64, u64) -> u64) -> Result<()> {
    let rows = rows();
    for (row, got) in rows.iter().zip(run(op, from, to, &rows)?) {
        let want = host(row[0], row[1], row[2]) & mask(to);
        assert_eq!(got & mask(to), want, "{op} of {row:x?}");
    }
    Ok(())
}

#[test]
fn integers_agree_with_the_host() -> Result<()> {
    let (b2, b3): (&[&str], &[&str]) = (&["b32", "b32"], &["b32", "b32", "b32"]);
    let w2: &[&str] = &["b64", "b64"];
    let s = |x: u64| x as i32;
    let u = |x: u64| x as u32;
    check("add.s32", b2, "b32", |a, b, _| u(a).wrapping_add(u(b)).into())?;
    check("sub.u64", w2, "b64", |a, b, _| a.wrapping_sub(b))?;
    check("mul.lo.s32", b2, "b32", |a, b, _| u(a).wrapping_mul(u(b)).into())?;
    check("mul.hi.s32", b2, "b32", |a, b, _| ((i64::from(s(a)) * i64::from(s(b))) >> 32) as u64)?;
    check("mul.hi.u32", b2, "b32", |a, b, _| (u64::from(u(a)) * u64::from(u(b))) >> 32)?;
    check("mul.hi.u64", w2, "b64", |a, b, _| ((u128::from(a) * u128::from(b)) >> 64) as u64)?;
    check("mul.wide.s32", b2, "b64", |a, b, _| (i64::from(s(a)) * i64::from(s(b))) as u64)?;
    check("mul.wide.u16", &["b16", "b16"], "b32", |a, b, _| u64::from(a as u16) * u64::from(b as u16))?;
    check("mad.lo.s32", b3, "b32", |a, b, c| u(a).wrapping_mul(u(b)).wrapping_add(u(c)).into())?;
    check("div.s32", b2, "b32", |a, b, _| if s(b) == 0 { u64::MAX } else { s(a).wrapping_div(s(b)) as u64 })?;
    check("div.u64", w2, "b64", |a, b, _| a.checked_div(b).unwrap_or(u64::MAX))?;
    check("rem.s32", b2, "b32", |a, b, _| if s(b) == 0 { a } else { s(a).wrapping_rem(s(b)) as u64 })?;
    check("rem.u32", b2, "b32", |a, b, _| u64::from(u(a).checked_rem(u(b)).unwrap_or(u(a))))?;
    check("min.s32", b2, "b32", |a, b, _| s(a).min(s(b)) as u64)?;
    check("max.u64", w2, "b64", |a, b, _| a.max(b))?;
    check("abs.s32", &["b32"], "b32", |a, _, _| s(a).wrapping_abs() as u64)?;
    check("neg.s64", &["b64"], "b64", |a, _, _| a.wrapping_neg())?;
    check("sad.s32", b3, "b32", |a, b, c| u(c).wrapping_add(s(a).abs_diff(s(b))).into())?;
    check("add.u16", &["b16", "b16"], "b16", |a, b, _| a.wrapping_add(b))?;
    Ok(())
}

#[test]
fn bits_agree_with_the_host() -> Result<()> {
    let (b2, b3): (&[&str], &[&str]) = (&["b32", "b32"], &["b32", "b32", "b32"]);
    let u = |x: u64| x as u32;
    check("xor.b64", &["b64", "b64"], "b64", |a, b, _| a ^ b)?;
    check("not.b16", &["b16"], "b16", |a, _, _| !a)?;
    check("cnot.b32", &["b32"], "b32", |a, _, _| u64::from(u(a) == 0))?;
    check("shl.b32", b2, "b32", |a, b, _| if u(b) > 31 { 0 } else { a << u(b) })?;
    check("shl.b64", &["b64", "b32"], "b64", |a, b, _| a.checked_shl(u(b)).unwrap_or(0))?;
    check("shr.s32", b2, "b32", |a, b, _| (a as i32 >> u(b).min(31)) as u64)?;
    check("shr.u32", b2, "b32", |a, b, _| u(a).checked_shr(u(b)).unwrap_or(0).into())?;
    check("shr.s64", &["b64", "b32"], "b64", |a, b, _| (a as i64 >> u(b).min(63)) as u64)?;
    check("shr.u16", &["b16", "b32"], "b16", |a, b, _| (a as u16).checked_shr(u(b)).unwrap_or(0).into())?;
    let pair = |a: u64, b: u64| u64::from(u(b)) << 32 | u64::from(u(a));
    check("shf.l.wrap.b32", b3, "b32", |a, b, c| pair(a, b) << (u(c) & 31) >> 32)?;
    check("shf.r.clamp.b32", b3, "b32", |a, b, c| pair(a, b) >> u(c).min(32))?;
    check("popc.b64", &["b64"], "b32", |a, _, _| a.count_ones().into())?;
    check("clz.b32", &["b32"], "b32", |a, _, _| u(a).leading_zeros().into())?;
    check("brev.b32", &["b32"], "b32", |a, _, _| u(a).reverse_bits().into())?;
    check("bfind.u32", &["b32"], "b32", |a, _, _| u(a).checked_ilog2().map_or(u64::MAX, u64::from))?;
    let field = |p: u64, n: u64| -> u64 {
        let ones = if n & 255 >= 32 { u32::MAX } else { (1u32 << (n & 255)) - 1 };
        ones.checked_shl(u(p) & 255).unwrap_or(0).into()
    };
    check("bfe.u32", b3, "b32", |a, b, c| {
        (u(a).checked_shr(u(b) & 255).unwrap_or(0) & field(0, c) as u32).into()
    })?;
    check("bfi.b32 , 5", b3, "b32", |a, b, c| {
        let m = field(c, 5);
        b & !m | u64::from(u(a).checked_shl(u(c) & 255).unwrap_or(0)) & m
    })?;
    check("lop3.b32 , 0x96", b3, "b32", |a, b, c| a ^ b ^ c)?;
    check("lop3.b32 , 0xe8", b3, "b32", |a, b, c| a & b | a & c | b & c)?;
    check("prmt.b32", b3, "b32", |a, b, c| {
        let all = pair(a, b).to_le_bytes();
        (0..4).fold(0, |out, n| {
            let s = c >> (4 * n) & 15;
            let byte = all[s as usize & 7];
            let byte = if s & 8 != 0 { if byte & 128 != 0 { 255 } else { 0 } } else { byte };
            out | u64::from(byte) << (8 * n)
        })
    })?;
    Ok(())
}

/// Bits of an `f32` result; every NaN counts as the same.
fn bits(x: f32) -> u64 {
    if x.is_nan() { f32::NAN.to_bits().into() } else { x.to_bits().into() }
}

fn check_float(op: &str, operands: usize, host: impl Fn(f32, f32, f32) -> f32) -> Result<()> {
    let f = |x: u64| f32::from_bits(x as u32);
    let from = &["b32", "b32", "b32"][..operands];
    let rows = rows();
    for (row, got) in rows.iter().zip(run(op, from, "b32", &rows)?) {
        let want = bits(host(f(row[0]), f(row[1]), f(row[2])));
        assert_eq!(bits(f(got)), want, "{op} of {row:x?}");
    }
    Ok(())
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

#[test]
fn single_precision_agrees_with_the_host() -> Result<()> {
    check_float("add.f32", 2, |a, b, _| a + b)?;
    check_float("sub.rn.f32", 2, |a, b, _| a - b)?;
    check_float("mul.f32", 2, |a, b, _| a * b)?;
    check_float("mul.ftz.f32", 2, |a, b, _| flush(flush(a) * flush(b)))?;
    check_float("fma.rn.f32", 3, |a, b, c| a.mul_add(b, c))?;
    check_float("div.rn.f32", 2, |a, b, _| a / b)?;
    check_float("sqrt.rn.f32", 1, |a, _, _| a.sqrt())?;
    check_float("rcp.rn.f32", 1, |a, _, _| 1.0 / a)?;
    check_float("neg.f32", 1, |a, _, _| -a)?;
    check_float("abs.ftz.f32", 1, |a, _, _| flush(a).abs())?;
    check_float("cvt.rni.f32.f32", 1, |a, _, _| a.round_ties_even())?;
    check_float("cvt.sat.f32.f32", 1, |a, _, _| if a > 0.0 { a.min(1.0) } else { 0.0 })?;
    let signed = |a: f32| (a.is_sign_negative(), a);
    check_float("min.f32", 2, move |a, b, _| match (a.is_nan(), b.is_nan()) {
        (true, _) => b,
        (_, true) => a,
        _ if a == b => {
            if signed(a).0 {
                a
            } else {
                b
            }
        }
        _ => a.min(b),
    })?;
    check_float("max.NaN.f32", 2, |a, b, _| {
        if a.is_nan() || b.is_nan() {
            f32::NAN
        } else if a == b {
            if a.is_sign_positive() { a } else { b }
        } else {
            a.max(b)
        }
    })?;
    Ok(())
}

#[test]
fn double_precision_agrees_with_the_host() -> Result<()> {
    let same = |x: f64| if x.is_nan() { f64::NAN } else { x }.to_bits();
    type Host = fn(f64, f64, f64) -> f64;
    let cases: [(&str, usize, Host); 5] = [
        ("add.f64", 2, |a, b, _| a + b),
        ("mul.rn.f64", 2, |a, b, _| a * b),
        ("fma.rn.f64", 3, |a, b, c| a.mul_add(b, c)),
        ("div.rn.f64", 2, |a, b, _| a / b),
        ("sqrt.rn.f64", 1, |a, _, _| a.sqrt()),
    ];
    let rows = rows();
    for (op, operands, host) in cases {
        for (row, got) in rows.iter().zip(run(op, &["b64"; 3][..operands], "b64", &rows)?) {
            let [a, b, c] = row.map(f64::from_bits);
            assert_eq!(same(f64::from_bits(got)), same(host(a, b, c)), "{op} of {row:x?}");
        }
    }
    Ok(())
}

#[test]
fn conversions_agree_with_the_host() -> Result<()> {
    let f = |x: u64| f32::from_bits(x as u32);
    check("cvt.rn.f32.s32", &["b32"], "b32", |a, _, _| bits(a as i32 as f32))?;
    check("cvt.rn.f32.u64", &["b64"], "b32", |a, _, _| bits(a as f32))?;
    check("cvt.rn.f64.s64", &["b64"], "b64", |a, _, _| (a as i64 as f64).to_bits())?;
    check("cvt.rzi.s32.f32", &["b32"], "b32", |a, _, _| f(a) as i32 as u64)?;
    check("cvt.rni.u32.f32", &["b32"], "b32", |a, _, _| (f(a).round_ties_even() as u32).into())?;
    check("cvt.rmi.s32.f32", &["b32"], "b32", |a, _, _| f(a).floor() as i32 as u64)?;
    check("cvt.rpi.s64.f64", &["b64"], "b64", |a, _, _| f64::from_bits(a).ceil() as i64 as u64)?;
    check("cvt.s64.s32", &["b32"], "b64", |a, _, _| a as i32 as i64 as u64)?;
    check("cvt.u64.u32", &["b32"], "b64", |a, _, _| a & 0xffff_ffff)?;
    check("cvt.s32.s8", &["b32"], "b32", |a, _, _| a as i8 as u64)?;
    check("cvt.u32.u64", &["b64"], "b32", |a, _, _| a)?;
    check("cvt.s32.s16", &["b16"], "b32", |a, _, _| a as i16 as u64)?;
    check("cvt.u16.u32", &["b32"], "b16", |a, _, _| a)?;
    check("cvt.f32.bf16", &["b16"], "b32", |a, _, _| (a & 0xffff) << 16)?;
    let rows = rows();
    for (row, got) in rows.iter().zip(run("cvt.rn.f32.f64", &["b64"], "b32", &rows)?) {
        assert_eq!(bits(f(got)), bits(f64::from_bits(row[0]) as f32), "{row:x?}");
    }
    Ok(())
}

/// The nearest of all finite values of a 16-bit format, by trying them, with ties to even.
fn nearest(x: f32, decode: impl Fn(u16) -> f32, infinity: u16) -> u16 {
    let sign = if x.is_sign_negative() { 0x8000 } else { 0 };
    let a = f64::from(x.abs());
    let step = f64::from(decode(infinity - 1)) - f64::from(decode(infinity - 2));
    if a >= f64::from(decode(infinity - 1)) + step / 2.0 {
        return sign | infinity;
    }
    let above = (0..infinity).collect::<Vec<_>>().partition_point(|b| f64::from(decode(*b)) < a) as u16;
    let candidates = [above.saturating_sub(1), above.min(infinity - 1)];
    let distance = |b: u16| (f64::from(decode(b)) - a).abs();
    let [low, high] = candidates;
    let best = if distance(low) < distance(high) || distance(low) == distance(high) && low % 2 == 0 {
        low
    } else {
        high
    };
    sign | best
}

/// Half precision by its definition.
fn half(bits: u16) -> f32 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f32::from(bits & 1023));
    let magnitude = if exponent == 0 {
        fraction * 2f32.powi(-24)
    } else {
        (1024.0 + fraction) * 2f32.powi(exponent - 25)
    };
    if bits & 0x8000 != 0 { -magnitude } else { magnitude }
}

#[test]
fn sixteen_bit_floats_round_to_nearest_even() -> Result<()> {
    let rows: Vec<[u64; 3]> = values().into_iter().map(|v| [v & 0xffff_ffff, 0, 0]).collect();
    let brain = |b: u16| f32::from_bits(u32::from(b) << 16);
    let bf16 = run("cvt.rn.bf16.f32", &["b32"], "b16", &rows)?;
    let f16 = run("cvt.rn.f16.f32", &["b32"], "b16", &rows)?;
    for (n, row) in rows.iter().enumerate() {
        let x = f32::from_bits(row[0] as u32);
        if x.is_nan() {
            assert_eq!((bf16[n], f16[n]), (0x7fff, 0x7fff));
            continue;
        }
        assert_eq!(bf16[n] as u16, nearest(x, brain, 0x7f80), "bf16 of {x}");
        assert_eq!(f16[n] as u16, nearest(x, half, 0x7c00), "f16 of {x}");
    }
    let all: Vec<[u64; 3]> = (0..0x7c00).map(|b| [b, 0, 0]).collect();
    for (n, got) in run("cvt.f32.f16", &["b16"], "b32", &all)?.iter().enumerate() {
        assert_eq!(f32::from_bits(*got as u32), half(n as u16));
    }
    // The first source goes to the high half.
    let pair = run("cvt.rn.bf16x2.f32", &["b32", "b32"], "b32", &[[0x3f80_0000, 0x4000_0000, 0]])?;
    assert_eq!(pair, [0x3f80_4000]);
    Ok(())
}

#[test]
fn fused_half_operations_round_once() -> Result<()> {
    // 1 + 2^-8 squared plus a little: the exact result lies just above a tie, which two roundings would miss.
    let a = 0x3f81u64;
    let c = 0x3700u64;
    let exact = f64::from(f32::from_bits(0x3f81_0000)).powi(2) + f64::from(f32::from_bits(0x3700_0000));
    let got = run("fma.rn.bf16", &["b16", "b16", "b16"], "b16", &[[a, a, c]])?[0];
    let value = f64::from(f32::from_bits((got as u32) << 16));
    let ulp = 2f64.powi(-7);
    assert!((value - exact).abs() <= ulp / 2.0, "{value} for {exact}");
    let relu = run("fma.rn.relu.bf16x2", &["b32", "b32", "b32"], "b32", &[[0xbf80_3f80, 0x3f80_3f80, 0]])?;
    assert_eq!(relu, [0x0000_3f80]);
    Ok(())
}

#[test]
fn approximations_are_close() -> Result<()> {
    type Host = fn(f64) -> f64;
    let cases: [(&str, Host, f32, f32, f64); 7] = [
        ("ex2.approx.f32", |x| x.exp2(), -140.0, 127.9, 2.5e-7),
        ("ex2.approx.ftz.f32", |x| x.exp2(), -125.0, 127.9, 2.5e-7),
        ("lg2.approx.f32", |x| x.log2(), 1e-30, 1e30, 2.5e-7),
        ("rsqrt.approx.f32", |x| 1.0 / x.sqrt(), 1e-30, 1e30, 2.5e-7),
        ("sin.approx.f32", |x| x.sin(), -3.0, 3.0, 2.5e-7),
        ("cos.approx.f32", |x| x.cos(), -1.5, 1.5, 5e-7),
        ("tanh.approx.f32", |x| x.tanh(), -9.0, 9.0, 2.5e-7),
    ];
    for (op, host, low, high, bound) in cases {
        let at = |t: f64| {
            let (low, high) = (f64::from(low), f64::from(high));
            (if low > 0.0 { low * (high / low).powf(t) } else { low + (high - low) * t }) as f32
        };
        let rows: Vec<[u64; 3]> =
            (0..4000).map(|n| [at(f64::from(n) / 3999.0).to_bits().into(), 0, 0]).collect();
        for (row, got) in rows.iter().zip(run(op, &["b32"], "b32", &rows)?) {
            let (x, got) = (f32::from_bits(row[0] as u32), f64::from(f32::from_bits(got as u32)));
            let want = host(x.into());
            // Near a zero of the function the bound is absolute.
            let scale =
                if op.starts_with("ex2") { want.abs().max(2f64.powi(-126)) } else { want.abs().max(0.1) };
            assert!((got - want).abs() <= bound * scale, "{op} of {x}: {got} for {want}");
        }
    }
    let special = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0, 200.0, -200.0];
    let rows: Vec<[u64; 3]> = special.iter().map(|x| [x.to_bits().into(), 0, 0]).collect();
    let got = run("ex2.approx.ftz.f32", &["b32"], "b32", &rows)?;
    let got: Vec<f32> = got.into_iter().map(|x| f32::from_bits(x as u32)).collect();
    assert_eq!((got[0], got[1], got[3], got[4], got[5]), (f32::INFINITY, 0.0, 1.0, f32::INFINITY, 0.0));
    assert!(got[2].is_nan());
    Ok(())
}
