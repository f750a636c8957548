//! What `kernels-cu/rmsnorm.cu` is launched with.
use super::super::prelude::*;
use super::RmsNormBwd;

/// Threads of a block.
const THREADS: u32 = 256;
/// Blocks that an SM holds at once, as the kernels' launch bounds promise.
const FORWARD_BLOCKS: u32 = 4;
const BACKWARD_BLOCKS: u32 = 2;

/// How rows are shared out.
struct Layout {
    /// Variant and dtype, as entries end in them.
    suffix: String,
    rows: u32,
    width: u32,
    /// Rows that a block holds at once.
    together: u32,
}

impl Layout {
    fn new(x: Spec, w: Spec) -> Result<Layout, String> {
        let vector = match x.dtype {
            DType::Bf16 => 8,
            DType::F32 => 4,
            _ => return Err(format!("no kernel normalises {x:?}; use bf16 or f32, or the CPU device")),
        };
        if w.dtype != x.dtype {
            return Err(format!("the scale {w:?} should be of the dtype of {x:?}; cast it"));
        }
        let width = size(x.shape.last())?;
        if !width.is_multiple_of(8) {
            return Err(format!("rows of {width} are no multiple of 8; pad them, or use the CPU device"));
        }
        let (narrow, wide) = (32 * 4 * vector, THREADS * 4 * vector);
        let (variant, together) = match width {
            _ if width <= narrow => ("narrow", THREADS / 32),
            _ if width <= wide => ("wide", 1),
            _ => return Err(format!("rows of {width} exceed the kernel's {wide}; use the CPU device")),
        };
        let suffix = format!("{variant}_{}", x.dtype.name());
        Ok(Layout { suffix, rows: size(x.shape.rows())?, width, together })
    }

    /// As many blocks as the machine holds at once, if there are rows for them.
    fn blocks(&self, per_sm: u32, on: &Target) -> u32 {
        self.rows.div_ceil(self.together).clamp(1, on.sms * per_sm)
    }
}

pub(super) fn forward(ins: &[Spec], eps: f64, on: &Target) -> Result<Kernels, String> {
    let rows = Layout::new(ins[0], ins[1])?;
    let args = vec![
        Arg::output(0),
        Arg::output(1),
        Arg::input(0),
        Arg::input(1),
        Arg::U32(rows.rows),
        Arg::U32(rows.width),
        Arg::F32(eps as f32),
    ];
    let grid = [rows.blocks(FORWARD_BLOCKS, on), 1, 1];
    let entry = format!("rmsnorm_fwd_{}", rows.suffix);
    Ok(Kernels { scratch: vec![], launches: vec![Launch::kernel(entry, grid, THREADS, 0, args)] })
}

pub(super) fn backward(op: &RmsNormBwd, ins: &[Spec], outs: &[Spec], on: &Target) -> Result<Kernels, String> {
    let rows = Layout::new(ins[0], ins[1])?;
    let dw = outs[1].dtype;
    if !matches!(dw, DType::Bf16 | DType::F32) {
        return Err(format!("no kernel sums into {}; use f32", dw.name()));
    }
    let parts = rows.blocks(BACKWARD_BLOCKS, on);
    let row_bytes = rows.width * 4;
    // Warps that share a block add their parts of dw in shared memory.
    let shared = if rows.together == 1 { 0 } else { rows.together * row_bytes };
    let (count, width) = (Arg::U32(parts), Arg::U32(rows.width));
    let args = vec![
        Arg::output(0),
        Arg::scratch(0),
        Arg::input(0),
        Arg::input(1),
        Arg::input(2),
        Arg::input(3),
        // An operand that is not there is named all the same, and not read.
        Arg::input(op.arrived_at().unwrap_or(3)),
        Arg::U32(rows.rows),
        width.clone(),
        Arg::U32(op.arrived.into()),
    ];
    let entry = format!("rmsnorm_bwd_{}", rows.suffix);
    let rows_pass = Launch::kernel(entry, [parts, 1, 1], THREADS, shared, args);
    let args = vec![Arg::output(1), Arg::scratch(0), count, width, Arg::U32(op.sum.is_added().into())];
    let entry = format!("rmsnorm_bwd_sum_{}", dw.name());
    let sum_pass = Launch::kernel(entry, [rows.width.div_ceil(32), 1, 1], THREADS, 0, args);
    Ok(Kernels { scratch: vec![parts as usize * row_bytes as usize], launches: vec![rows_pass, sum_pass] })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs(n: usize, c: usize, dtype: DType) -> [Spec; 2] {
        [Spec::new([n, c], dtype), Spec::new([c], dtype)]
    }

    fn launches(kernels: &Kernels) -> Vec<(&str, u32, u32)> {
        kernels
            .launches
            .iter()
            .map(|l| match l {
                Launch::Kernel { entry, grid, shared, .. } => (entry.as_str(), grid[0], *shared),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn rows_go_to_warps_or_blocks() {
        let on = Target::H200;
        let at = |n, c, dtype| forward(&specs(n, c, dtype), 1e-5, &on).unwrap();
        assert_eq!(launches(&at(17, 1024, DType::Bf16)), [("rmsnorm_fwd_narrow_bf16", 3, 0)]);
        assert_eq!(launches(&at(17, 1032, DType::Bf16)), [("rmsnorm_fwd_wide_bf16", 17, 0)]);
        assert_eq!(launches(&at(1 << 20, 512, DType::F32)), [("rmsnorm_fwd_narrow_f32", 528, 0)]);
        assert_eq!(launches(&at(1 << 20, 520, DType::F32)), [("rmsnorm_fwd_wide_f32", 528, 0)]);
    }

    #[test]
    fn backward_sums_the_parts_of_its_blocks() {
        let [x, w] = specs(100, 768, DType::Bf16);
        let r = Spec::new([100], DType::F32);
        let sum = Spec::new([768], DType::F32);
        let op = RmsNormBwd { arrived: false, sum: Accumulation::Added };
        let k = backward(&op, &[x, w, r, x, sum], &[x, sum], &Target::H200).unwrap();
        assert_eq!(k.scratch, [13 * 768 * 4]);
        assert_eq!(
            launches(&k),
            [("rmsnorm_bwd_narrow_bf16", 13, 8 * 768 * 4), ("rmsnorm_bwd_sum_f32", 24, 0)]
        );
    }

    #[test]
    fn refusals_name_the_remedy() {
        let refused = |ins: &[Spec]| forward(ins, 1e-5, &Target::H200).unwrap_err();
        assert!(refused(&specs(3, 12, DType::Bf16)).contains("pad"));
        assert!(refused(&specs(3, 8200, DType::Bf16)).contains("CPU"));
        assert!(refused(&specs(3, 8, DType::F64)).contains("bf16"));
        let [x, _] = specs(3, 8, DType::Bf16);
        assert!(refused(&[x, Spec::new([8], DType::F32)]).contains("cast"));
    }
}
