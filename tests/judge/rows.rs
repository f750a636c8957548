//! Rows and columns of products and norms that results do not depend on.
use super::{Hiding, Part, Question, Secret};
use transfusion_core::tensor::Spec;

/// What results of an application of RMSNorm or a product must not depend on.
pub(super) fn secret(question: &Question) -> Option<Secret> {
    let (ins, outs) = (&question.application.specs, &question.expected.outs);
    let hidings = match question.application.op.name() {
        "rmsnorm" => rmsnorm(ins, outs),
        "rmsnorm_bwd" => rmsnorm_bwd(ins, outs),
        "linear" => linear(ins, outs),
        "linear_dx" => linear_dx(ins, outs),
        "linear_dw" => linear_dw(ins, outs),
        _ => return None,
    };
    let (case, application) = (question.case.clone(), question.application.clone());
    Some(Secret { case, application, hidings })
}

fn hiding(what: String, poisoned: Vec<Part>, touched: Vec<Part>) -> Hiding {
    Hiding { what, poisoned, touched }
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
    rows.chain(columns).collect()
}

fn linear(ins: &[Spec], outs: &[Spec]) -> Vec<Hiding> {
    let rows = some(ins[0].shape.rows()).into_iter().map(|n| {
        let touched = outs.iter().enumerate().map(|(o, spec)| row(o, *spec, n)).collect();
        hiding(format!("row {n} of x"), vec![row(0, ins[0], n)], touched)
    });
    let columns = some(ins[1].shape.rows()).into_iter().map(|m| {
        // SwiGLU makes one column of two.
        let of = |(o, spec): (usize, &Spec)| column(o, *spec, m * spec.shape.last() / ins[1].shape.rows());
        let touched = outs.iter().enumerate().flat_map(of).collect();
        hiding(format!("row {m} of w"), vec![row(1, ins[1], m)], touched)
    });
    rows.chain(columns).collect()
}

fn linear_dx(ins: &[Spec], outs: &[Spec]) -> Vec<Hiding> {
    let rows = some(ins[0].shape.rows())
        .into_iter()
        .map(|n| hiding(format!("row {n} of dy"), vec![row(0, ins[0], n)], vec![row(0, outs[0], n)]));
    let columns = some(ins[1].shape.last())
        .into_iter()
        .map(|k| hiding(format!("column {k} of w"), column(1, ins[1], k), column(0, outs[0], k)));
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
