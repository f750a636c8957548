//! Rows and columns of products, norms and losses that results do not depend on.
use super::{Hiding, Part, Secret};
use transfusion_core::{
    agreement::Application,
    tensor::{DType, Spec},
};

/// What results of an application of RMSNorm, a product or a cross entropy must not depend on.
pub(super) fn secret(case: &str, application: &Application) -> Option<Secret> {
    let (ins, outs) = (&application.specs, &application.op.infer(&application.specs).unwrap());
    let hidings = match application.op.name() {
        "rmsnorm" => rmsnorm(ins, outs),
        "rmsnorm_bwd" => rmsnorm_bwd(ins, outs),
        "linear" => linear(ins, outs),
        "linear_dx" => linear_dx(ins, outs),
        "linear_dw" => linear_dw(ins, outs),
        "cross_entropy" => cross_entropy(ins, &targets(application)),
        "cross_entropy_bwd" => cross_entropy_bwd(ins, outs, &targets(application)),
        _ => return None,
    };
    Some(Secret { case: case.into(), application: application.clone(), hidings })
}

fn hiding(what: String, poisoned: Vec<Part>, touched: Vec<Part>) -> Hiding {
    Hiding { what, operands: &[], poisoned, touched }
}

/// Row `r` of operand or result `i`.
fn row(i: usize, spec: Spec, r: usize) -> Part {
    let width = spec.shape.last();
    (i, r * width..(r + 1) * width)
}

/// Column `c` of operand or result `i`.
fn column(i: usize, spec: Spec, c: usize) -> Vec<Part> {
    let (rows, width) = (spec.shape.rows(), spec.shape.last());
    (0..rows).map(|r| (i, r * width + c..r * width + c + 1)).collect()
}

/// Everything of operand or result `i`.
fn all(i: usize, spec: Spec) -> Part {
    (i, 0..spec.shape.numel())
}

/// Two of `n` positions: one inside, the last.
fn some(n: usize) -> Vec<usize> {
    let mut some = vec![n / 2, n - 1];
    some.dedup();
    some
}

fn rmsnorm(ins: &[Spec], outs: &[Spec]) -> Vec<Hiding> {
    let rows = some(ins[0].shape.rows()).into_iter().map(|n| {
        hiding(format!("row {n} of x"), vec![row(0, ins[0], n)], vec![row(0, outs[0], n), (1, n..n + 1)])
    });
    let columns = some(ins[0].shape.last())
        .into_iter()
        .map(|c| hiding(format!("column {c} of w"), vec![(1, c..c + 1)], column(0, outs[0], c)));
    rows.chain(columns).collect()
}

fn rmsnorm_bwd(ins: &[Spec], outs: &[Spec]) -> Vec<Hiding> {
    let rows = some(ins[0].shape.rows()).into_iter().map(|n| {
        let poisoned = vec![row(0, ins[0], n), (2, n..n + 1), row(3, ins[3], n)];
        hiding(format!("row {n} of x, r and dy"), poisoned, vec![row(0, outs[0], n), all(1, outs[1])])
    });
    let columns = some(ins[0].shape.last())
        .into_iter()
        .map(|c| hiding(format!("column {c} of w"), vec![(1, c..c + 1)], vec![all(0, outs[0])]));
    let arrived = ins.get(4).filter(|&&arrived| arrived == ins[0]).map(|&arrived| {
        some(arrived.shape.rows()).into_iter().map(move |n| {
            hiding(format!("row {n} of what has arrived"), vec![row(4, arrived, n)], vec![row(0, outs[0], n)])
        })
    });
    rows.chain(columns).chain(arrived.into_iter().flatten()).collect()
}

fn linear(ins: &[Spec], outs: &[Spec]) -> Vec<Hiding> {
    // Heads before they turned are a result without elements.
    let outs = if outs.last().is_some_and(|last| last.shape.numel() == 0) { &outs[..1] } else { outs };
    let rows = some(ins[0].shape.rows()).into_iter().map(|n| {
        let touched = outs.iter().enumerate().map(|(o, spec)| row(o, *spec, n)).collect();
        hiding(format!("row {n} of x"), vec![row(0, ins[0], n)], touched)
    });
    // Heads turn in pairs of columns.
    let together = if ins.iter().any(|s| s.dtype == DType::I32) { 2 } else { 1 };
    let columns = some(ins[1].shape.rows() / together).into_iter().map(|m| {
        let (first, end) = (m * together, (m + 1) * together);
        // SwiGLU makes one column of two.
        let of = |(o, spec): (usize, &Spec), m| column(o, *spec, m * spec.shape.last() / ins[1].shape.rows());
        let touched = outs.iter().enumerate().flat_map(|out| (first..end).flat_map(move |m| of(out, m)));
        let poisoned = (first..end).map(|m| row(1, ins[1], m)).collect();
        hiding(format!("row {first} of w, {together}"), poisoned, touched.collect())
    });
    rows.chain(columns).collect()
}

fn linear_dx(ins: &[Spec], outs: &[Spec]) -> Vec<Hiding> {
    let rows = some(ins[0].shape.rows()).into_iter().map(|n| {
        let pre = ins.get(2).map(|pre| row(2, *pre, n));
        let poisoned = [row(0, ins[0], n)].into_iter().chain(pre).collect();
        hiding(format!("row {n} of dy, and of what is gated"), poisoned, vec![row(0, outs[0], n)])
    });
    // Of a gated column come those of gate and up.
    let each = outs[0].shape.last() / ins[1].shape.last();
    let columns = some(ins[1].shape.last()).into_iter().map(|k| {
        let touched = (k * each..(k + 1) * each).flat_map(|c| column(0, outs[0], c)).collect();
        hiding(format!("column {k} of w"), column(1, ins[1], k), touched)
    });
    rows.chain(columns).collect()
}

fn linear_dw(ins: &[Spec], outs: &[Spec]) -> Vec<Hiding> {
    let rows = some(ins[0].shape.last())
        .into_iter()
        .map(|m| hiding(format!("column {m} of dy"), column(0, ins[0], m), vec![row(0, outs[0], m)]));
    let columns = some(ins[1].shape.last())
        .into_iter()
        .map(|k| hiding(format!("column {k} of x"), column(1, ins[1], k), column(0, outs[0], k)));
    rows.chain(columns).collect()
}

/// Whether each row of an application of cross entropy has a target.
fn targets(Application { specs, ins, .. }: &Application) -> Vec<bool> {
    let vocabulary = specs[1].shape.rows() as f64;
    ins[2].to_f64().iter().map(|t| (0.0..vocabulary).contains(t)).collect()
}

/// Rows without a target, and one that has one, if there are such.
fn unused_and_used(used: &[bool]) -> (Vec<usize>, Option<usize>) {
    let rows = 0..used.len();
    (rows.clone().filter(|&n| !used[n]).collect(), rows.rev().find(|&n| used[n]))
}

fn cross_entropy(ins: &[Spec], used: &[bool]) -> Vec<Hiding> {
    let (unused, one) = unused_and_used(used);
    let rows = |rows: &[usize]| rows.iter().map(|&n| row(0, ins[0], n)).collect();
    let unused = (!unused.is_empty()).then(|| hiding("unused rows of h".into(), rows(&unused), vec![]));
    let one = one.map(|n| hiding(format!("row {n} of h"), rows(&[n]), vec![(0, 0..1), (1, n..n + 1)]));
    unused.into_iter().chain(one).collect()
}

fn cross_entropy_bwd(ins: &[Spec], outs: &[Spec], used: &[bool]) -> Vec<Hiding> {
    let (unused, one) = unused_and_used(used);
    let rows = |rows: &[usize]| rows.iter().flat_map(|&n| [row(0, ins[0], n), (4, n..n + 1)]).collect();
    let unused =
        (!unused.is_empty()).then(|| hiding("unused rows of h and lse".into(), rows(&unused), vec![]));
    let touched = |n| vec![row(0, outs[0], n), all(1, outs[1])];
    let one = one.map(|n| hiding(format!("row {n} of h and lse"), rows(&[n]), touched(n)));
    unused.into_iter().chain(one).collect()
}
