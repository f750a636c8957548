//! Cross entropy as implementations leave it that store logits and their gradient in bf16, or their gradient alone. What
//! the tolerance law measures the kernels by.
use super::{inverse, used};
use crate::{
    op::Accumulation,
    tensor::{DType, Host, Spec},
};
use half::bf16;

/// What storing does to a number.
fn stored(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

fn floats(host: &Host) -> Vec<f32> {
    host.to_f64().into_iter().map(|x| x as f32).collect()
}

fn host(dtype: DType, x: &[f32]) -> Host {
    Host::from_f64(dtype, x.iter().map(|&x| f64::from(x)))
}

/// The operands that both passes share.
struct Operands {
    h: Vec<f32>,
    w: Vec<f32>,
    /// For each row, its target if it is in use.
    targets: Vec<Option<usize>>,
    inverse: f32,
    width: usize,
}

impl Operands {
    /// `None` unless floats are stored in bf16.
    fn new(specs: &[Spec], ins: &[Host]) -> Option<Operands> {
        let targets = ins[2].to_f64().into_iter().map(|t| used(t as i32, specs[1].shape.rows()));
        (specs[0].dtype == DType::Bf16).then(|| Operands {
            h: floats(&ins[0]),
            w: floats(&ins[1]),
            targets: targets.collect(),
            inverse: inverse(floats(&ins[3])[0]),
            width: specs[0].shape.last(),
        })
    }

    fn h(&self, row: usize) -> &[f32] {
        &self.h[row * self.width..][..self.width]
    }

    /// The logits of a row.
    fn logits(&self, row: usize) -> Vec<f32> {
        let dot = |w: &[f32]| self.h(row).iter().zip(w).map(|(a, b)| a * b).sum();
        self.w.chunks(self.width).map(dot).collect()
    }

    /// `dh` and `dw`, with logits and their gradient as they are `kept`.
    fn gradients(&self, lse: &[f32], scale: f32, kept: [fn(f32) -> f32; 2]) -> [Vec<f32>; 2] {
        let (mut dh, mut dw) = (vec![0.0; self.h.len()], vec![0.0; self.w.len()]);
        for (row, target) in self.targets.iter().enumerate() {
            let Some(target) = *target else { continue };
            for (v, z) in self.logits(row).into_iter().enumerate() {
                let hit = if v == target { 1.0 } else { 0.0 };
                let dz = kept[1](((kept[0](z) - lse[row]).exp() - hit) * scale);
                axpy(&mut dh[row * self.width..][..self.width], dz, &self.w[v * self.width..][..self.width]);
                axpy(&mut dw[v * self.width..][..self.width], dz, self.h(row));
            }
        }
        [dh, dw]
    }
}

fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// `loss` and `lse`.
pub(super) fn forward(specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
    let o = Operands::new(specs, ins)?;
    let mut lse = vec![0.0; o.targets.len()];
    let mut loss = 0.0;
    for (row, target) in o.targets.iter().enumerate() {
        if let Some(target) = *target {
            let z: Vec<f32> = o.logits(row).into_iter().map(stored).collect();
            let top = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            lse[row] = top + z.iter().map(|z| (z - top).exp()).sum::<f32>().ln();
            loss += lse[row] - z[target];
        }
    }
    Some(vec![Host::F32(vec![loss * o.inverse]), Host::F32(lse)])
}

/// `dh` and `dw`, of `h`, `w`, `targets`, `count`, `lse`, `dloss` and, where there is one, the accumulator.
pub(super) fn backward(specs: &[Spec], ins: &[Host], how: Accumulation) -> Option<Vec<Host>> {
    let o = Operands::new(specs, ins)?;
    let (lse, scale) = (floats(&ins[4]), floats(&ins[5])[0] * o.inverse);
    // Either may be near to the truth by chance, and is held against the other's chance: of each number, the one that is
    // farther away. So this measure is an envelope of both.
    let exact = o.gradients(&lse, scale, [|z| z, |dz| dz]);
    let both = o.gradients(&lse, scale, [stored, stored]);
    let one = o.gradients(&lse, scale, [|z| z, stored]);
    let [dh, mut dw] = [0, 1].map(|i| {
        let each = both[i].iter().zip(&one[i]).zip(&exact[i]);
        let farther = |((a, b), x): ((&f32, &f32), &f32)| if (a - x).abs() > (b - x).abs() { *a } else { *b };
        each.map(farther).collect::<Vec<f32>>()
    });
    if let Some(sum) = ins.get(6).filter(|_| how.is_added()) {
        axpy(&mut dw, 1.0, &floats(sum));
    }
    let dtype = specs.get(6).map_or(specs[1].dtype, |s| s.dtype);
    Some(vec![host(DType::Bf16, &dh), host(dtype, &dw)])
}
