//! Attention as an implementation without fusion leaves it: scores, probabilities and their gradients all
//! stored in bf16. What the tolerance law measures the kernels by.
use super::{Attention, Problem};
use crate::tensor::{DType, Host, In, Spec};
use half::bf16;

/// What storing does to a number.
fn stored(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// Operands in f32.
fn widened(ins: &[Host]) -> Vec<Host> {
    let wide = |host: &Host| match host {
        Host::Bf16(_) => Host::from_f64(DType::F32, host.to_f64()),
        other => other.clone(),
    };
    ins.iter().map(wide).collect()
}

fn operands<'a>(specs: &[Spec], ins: &'a [Host]) -> Vec<In<'a>> {
    specs.iter().zip(ins).map(|(s, host)| In { shape: s.shape, data: host.view() }).collect()
}

fn floats(host: &Host) -> &[f32] {
    if let Host::F32(x) = host { x } else { &[] }
}

/// `o` and `lse`; `None` unless floats are stored in bf16.
pub(super) fn forward(op: &Attention, specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
    let wide = widened(ins);
    let views = operands(specs, &wide);
    let p = (specs[0].dtype == DType::Bf16).then(|| Problem::<f32>::new(op, &views))?;
    let (h, batch) = (op.heads, specs[0].shape.dims()[0]);
    let mut o = vec![0.0; batch * p.queries * h.q_columns()];
    let mut lse = vec![0.0; batch * h.heads * p.queries];
    for (b, head, i) in each(batch, h.heads, p.queries) {
        let (Some(slot), seen) = (p.slot(b), p.seen(b, i)) else { continue };
        if seen.is_empty() {
            continue;
        }
        let (q, k, v) = (p.q(b, head), p.kv(p.k, slot, head / h.group()), p.kv(p.v, slot, head / h.group()));
        let exact: Vec<f32> = seen.clone().map(|j| dot(q.row(i), k.row(j)) * p.scale()).collect();
        let scores: Vec<f32> = exact.iter().map(|&s| stored(s)).collect();
        let weigh = |scores: &[f32]| {
            let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            (top, scores.iter().map(|s| (s - top).exp()).sum::<f32>())
        };
        let (top, total) = weigh(&scores);
        let o = &mut o[((b * p.queries + i) * h.heads + head) * h.width..][..h.width];
        for (s, j) in scores.iter().zip(seen) {
            axpy(o, stored((s - top).exp() / total), v.row(j));
        }
        // The logarithm is stored in f32, of scores that no one stored.
        let (top, total) = weigh(&exact);
        lse[(b * h.heads + head) * p.queries + i] = top + total.ln();
    }
    Some(vec![Host::from_f64(DType::Bf16, o.into_iter().map(f64::from)), Host::F32(lse)])
}

/// `dqkv`, or `dq`, `dk` and `dv`, of the operands, `o`, `lse` and `do`; `None` unless floats are stored in
/// bf16.
pub(super) fn backward(op: &Attention, specs: &[Spec], ins: &[Host]) -> Option<Vec<Host>> {
    let wide = widened(ins);
    let views = operands(specs, &wide);
    let p = (specs[0].dtype == DType::Bf16).then(|| Problem::<f32>::new(op, &views))?;
    let (h, batch, at) = (op.heads, specs[0].shape.dims()[0], op.operands());
    let [o, lse, d] = [at, at + 1, at + 2].map(|i| floats(&wide[i]));
    let caches = if op.cached { specs[1].shape.dims()[0] } else { batch };
    let mut dq = vec![0.0; specs[0].shape.numel()];
    let [mut dk, mut dv] = [(); 2].map(|()| vec![0.0; caches * p.keys * h.kv_columns()]);
    for (b, head, i) in each(batch, h.heads, p.queries) {
        let Some(slot) = p.slot(b) else { continue };
        let (q, k, v) = (p.q(b, head), p.kv(p.k, slot, head / h.group()), p.kv(p.v, slot, head / h.group()));
        let row = ((b * p.queries + i) * h.heads + head) * h.width;
        let (o, d) = (&o[row..][..h.width], &d[row..][..h.width]);
        let (delta, lse) = (dot(o, d), lse[(b * h.heads + head) * p.queries + i]);
        let dq = &mut dq[(b * p.queries + i) * p.q.1 + head * h.width..][..h.width];
        for j in p.seen(b, i) {
            let weight = stored((stored(dot(q.row(i), k.row(j)) * p.scale()) - lse).exp());
            let ds = stored(weight * (stored(dot(d, v.row(j))) - delta) * p.scale());
            let row = (slot * p.keys + j) * h.kv_columns() + head / h.group() * h.width;
            axpy(dq, ds, k.row(j));
            axpy(&mut dk[row..][..h.width], ds, q.row(i));
            axpy(&mut dv[row..][..h.width], weight, d);
        }
    }
    let host = |x: &[f32]| Host::from_f64(DType::Bf16, x.iter().map(|&x| f64::from(x)));
    if op.cached {
        return Some(vec![host(&dq), host(&dk), host(&dv)]);
    }
    let rows = dq.chunks_mut(p.q.1).zip(dk.chunks(h.kv_columns()).zip(dv.chunks(h.kv_columns())));
    for (dqkv, (dk, dv)) in rows {
        let (_, kv) = dqkv.split_at_mut(h.q_columns());
        let (k, v) = kv.split_at_mut(h.kv_columns());
        k.copy_from_slice(dk);
        v.copy_from_slice(dv);
    }
    Some(vec![host(&dq)])
}

/// Every batch row, head and query.
fn each(batch: usize, heads: usize, queries: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..batch * heads * queries).map(move |n| (n / (heads * queries), n / queries % heads, n % queries))
}
