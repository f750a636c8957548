//! What `kernels-cu/{adamw,sum_squares,clip,ema}.cu` are launched with.
use super::super::prelude::*;
use super::AdamW;

/// Threads of a block.
const THREADS: u32 = 256;
/// Blocks that an SM holds at once, as the kernels' launch bounds promise.
const BLOCKS: u32 = 4;
/// Elements that a thread takes at once.
const SPAN: u32 = 4;

/// Elements of all of these, or the most that counts.
fn count<'a>(specs: impl Iterator<Item = &'a Spec>) -> u32 {
    let all: usize = specs.map(|s| s.shape.numel()).sum();
    u32::try_from(all).unwrap_or(u32::MAX)
}

/// As many blocks as the machine holds at once, if there are elements for them.
fn blocks(count: u32, span: u32, on: &Target) -> u32 {
    count.div_ceil(THREADS * span).min(on.sms * BLOCKS)
}

fn launch(entry: String, blocks: u32, args: Vec<Arg>) -> Launch {
    Launch::kernel(entry, [blocks, 1, 1], THREADS, 0, args)
}

fn only(kernels: Launch) -> Kernels {
    Kernels { scratch: vec![], launches: vec![kernels] }
}

/// Refuses what is not stored in f32.
fn singles(what: &str, specs: &[Spec]) -> Result<(), String> {
    match specs.iter().find(|s| s.dtype != DType::F32) {
        Some(s) => Err(format!("{what} are f32 for the kernels, not {s:?}; use f32, or the CPU device")),
        None => Ok(()),
    }
}

/// The name of a dtype that kernels read.
fn stored(s: Spec) -> Result<&'static str, String> {
    match s.dtype {
        DType::Bf16 | DType::F32 => Ok(s.dtype.name()),
        _ => Err(format!("no kernel reads {s:?}; use bf16 or f32, or the CPU device")),
    }
}

pub(super) fn adamw(h: &AdamW, states: usize, ins: &[Spec], on: &Target) -> Result<Kernels, String> {
    let numbers = ins.len() - 2;
    let (all, others) = ins.split_at(numbers);
    singles("schedule and scale", others)?;
    let types = |own: &[Spec]| own.iter().map(|s| s.dtype).collect::<Vec<_>>();
    let (each, first) = (states + 1, &all[..states + 1]);
    if let Some(own) = all.chunks(each).find(|own| types(own) != types(first)) {
        return Err(format!("{own:?} and {first:?} differ in types; move them one after the other"));
    }
    singles("master copies", &first[3..states])?;
    let narrow = |s: Spec, name| Ok::<_, String>(if stored(s)? == "bf16" { name } else { "" });
    let (moments, grad) = (narrow(first[1], "moments_")?, narrow(first[states], "grad_")?);
    let master = if states == 4 { "master_" } else { "" };
    let param = stored(first[0])?;
    if !(moments.is_empty() && grad.is_empty()) && (master.is_empty() || param != "bf16") {
        return Err("moments and gradients in bf16 are those of bf16 weights with master copies; \
                    use f32 for them, or the CPU device"
            .into());
    }
    let entry = format!("adamw_step_{master}{moments}{grad}{param}");
    let row = |(i, own): (usize, &[Spec])| {
        let outs = (0..states).map(|o| Arg::output(i * states + o));
        let absent = (states == 3).then_some(Arg::U64(0));
        let count = size(own[0].shape.numel())?;
        let rest = [Arg::input(i * each + states), Arg::U64(count.into())];
        Ok::<_, String>(outs.chain(absent).chain(rest).collect::<Vec<_>>())
    };
    let rows = all.chunks(each).enumerate().map(row).collect::<Result<Vec<_>, _>>()?;
    let tensors = rows.len() as u32;
    let mut args = vec![Arg::Table(rows.concat()), Arg::input(numbers), Arg::input(numbers + 1)];
    args.push(Arg::U32(tensors));
    args.extend([h.beta1, h.beta2, h.eps, h.weight_decay].map(|x| Arg::F32(x as f32)));
    Ok(only(launch(entry, blocks(count(all.iter().step_by(each)), SPAN, on), args)))
}

pub(super) fn sum_squares(ins: &[Spec], on: &Target) -> Result<Kernels, String> {
    let Some((&sum, xs)) = ins.split_first() else { return Ok(Kernels::default()) };
    let Some(&x) = xs.first() else { return Err("there is nothing to sum".into()) };
    singles("sums", &[sum])?;
    if let Some(other) = xs.iter().find(|other| other.dtype != x.dtype) {
        return Err(format!("{x:?} and {other:?} differ in type; sum their squares one after the other"));
    }
    let entry = format!("sum_squares_parts_{}", stored(x)?);
    let row = |(i, x): (usize, &Spec)| {
        let count = size(x.shape.numel())?;
        Ok::<_, String>([Arg::input(i + 1), Arg::U64(count.into())])
    };
    let rows = xs.iter().enumerate().map(row).collect::<Result<Vec<_>, _>>()?;
    let parts = blocks(count(xs.iter()), 16 / x.dtype.size() as u32, on);
    let args = vec![Arg::scratch(0), Arg::Table(rows.concat()), Arg::size(rows.len())?];
    let part_pass = launch(entry, parts, args);
    let args = vec![Arg::output(0), Arg::scratch(0), Arg::U32(parts)];
    let add_pass = launch("sum_squares_add_f32".into(), parts.min(1), args);
    Ok(Kernels { scratch: vec![parts as usize * 4], launches: vec![part_pass, add_pass] })
}

pub(super) fn clip(ins: &[Spec], max_norm: f64) -> Result<Kernels, String> {
    singles("sums", ins)?;
    let args = vec![Arg::output(0), Arg::output(1), Arg::input(0), Arg::F32(max_norm as f32)];
    Ok(only(Launch::kernel("clip_norm_f32", [1; 3], 32, 0, args)))
}

pub(super) fn ema(ins: &[Spec], pairs: usize, on: &Target) -> Result<Kernels, String> {
    let (all, others) = ins.split_at(2 * pairs);
    singles("decay and scale", others)?;
    let mut rows = Vec::new();
    for (i, pair) in all.chunks(2).enumerate() {
        singles("running means", &pair[..1])?;
        if pair[1].dtype != all[1].dtype {
            return Err(format!(
                "{:?} and {:?} differ in type; follow them one after the other",
                pair[1], all[1]
            ));
        }
        let count = size(pair[0].shape.numel())?;
        rows.extend([Arg::output(i), Arg::input(2 * i + 1), Arg::U64(count.into())]);
    }
    let entry = format!("ema_update_{}", stored(all[1])?);
    let blocks = blocks(count(all.iter().step_by(2)), SPAN, on);
    let numbers = [Arg::input(all.len()), Arg::input(all.len() + 1), Arg::size(pairs)?];
    let args = [Arg::Table(rows)].into_iter().chain(numbers).collect();
    Ok(only(launch(entry, blocks, args)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(kernels: &Kernels) -> (&str, u32, usize) {
        let [Launch::Kernel { entry, grid, args, .. }] = &kernels.launches[..] else { panic!("{kernels:?}") };
        (entry, grid[0], args.len())
    }

    #[test]
    fn the_entry_follows_the_weight_and_its_master_copy() {
        let h = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        let (p, f) = (Spec::new([3, 1000], DType::Bf16), Spec::new([3, 1000], DType::F32));
        let (schedule, scale) = (Spec::new([3], DType::F32), Spec::new([1], DType::F32));
        let on = Target::H200;
        let k = adamw(&h, 4, &[p, f, f, f, f, schedule, scale], &on).unwrap();
        assert_eq!(one(&k), ("adamw_step_master_bf16", 3, 8));
        let k = adamw(&h, 3, &[f, f, f, f, schedule, scale], &on).unwrap();
        assert_eq!(one(&k), ("adamw_step_f32", 3, 8));
        let large = Spec::new([1 << 25], DType::F32);
        let k = ema(&[large, large, scale, scale], 1, &on).unwrap();
        assert_eq!(one(&k), ("ema_update_f32", 132 * 4, 4));
        let why = adamw(&h, 3, &[p, p, f, f, schedule, scale], &on).unwrap_err();
        assert!(why.contains("f32"), "{why}");
        let why = adamw(&h, 3, &[f, f, f, f, p, f, f, f, schedule, scale], &on).unwrap_err();
        assert!(why.contains("differ in types"), "{why}");
    }

    #[test]
    fn a_row_of_a_table_is_what_the_kernel_reads() {
        let h = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        let (a, b) = (Spec::new([300], DType::F32), Spec::new([3000], DType::F32));
        let (schedule, scale) = (Spec::new([3], DType::F32), Spec::new([1], DType::F32));
        let on = Target::H200;
        let k = adamw(&h, 3, &[a, a, a, a, b, b, b, b, schedule, scale], &on).unwrap();
        let [Launch::Kernel { grid, args, .. }] = &k.launches[..] else { panic!("{k:?}") };
        let row = |i: usize, count| {
            let outs = (3 * i..3 * i + 3).map(Arg::output);
            outs.chain([Arg::U64(0), Arg::input(4 * i + 3), Arg::U64(count)])
        };
        let rows = row(0, 300).chain(row(1, 3000)).collect();
        assert_eq!(
            (grid[0], &args[..4]),
            (4, &[Arg::Table(rows), Arg::input(8), Arg::input(9), Arg::U32(2)][..])
        );
        let k = ema(&[a, a, b, b, scale, scale], 2, &on).unwrap();
        let [Launch::Kernel { args, .. }] = &k.launches[..] else { panic!("{k:?}") };
        let row = |i: usize, count| [Arg::output(i), Arg::input(2 * i + 1), Arg::U64(count)];
        assert_eq!(args[0], Arg::Table([row(0, 300), row(1, 3000)].concat()));
    }

    #[test]
    fn sums_have_a_part_for_each_block() {
        let (sum, x) = (Spec::new([1], DType::F32), Spec::new([2049], DType::Bf16));
        let k = sum_squares(&[sum, x], &Target::A100).unwrap();
        assert_eq!((k.scratch[0], k.launches.len()), (2 * 4, 2));
        let k = sum_squares(&[sum, x, x, x], &Target::A100).unwrap();
        assert_eq!((k.scratch[0], k.launches.len()), (4 * 4, 2));
        let Launch::Kernel { grid, args, .. } = &k.launches[0] else { panic!("{k:?}") };
        let rows = (1..4).flat_map(|i| [Arg::input(i), Arg::U64(2049)]).collect();
        assert_eq!((grid[0], &args[..]), (4, &[Arg::scratch(0), Arg::Table(rows), Arg::U32(3)][..]));
        assert!(sum_squares(&[sum, x, sum], &Target::A100).unwrap_err().contains("differ"));
        let wide = Spec::new([8], DType::F64);
        assert!(sum_squares(&[sum, wide], &Target::A100).unwrap_err().contains("bf16"));
    }
}
