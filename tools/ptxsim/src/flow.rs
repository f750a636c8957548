//! Control flow: where the paths of a branch meet, and what reaches a `wgmma`.

use crate::decode::{Draft, Flow};
use std::collections::HashSet;

/// The positions that may follow each one; `code.len()` is the end of the kernel.
fn successors(code: &[Draft], lists: &[u32], at: usize) -> Vec<usize> {
    let inst = &code[at].inst;
    let mut out = match &code[at].flow {
        Flow::Branch(..) => vec![inst.a as usize],
        Flow::Table(_, labels) => {
            lists[inst.list as usize..][..labels.len()].iter().map(|t| *t as usize).collect()
        }
        Flow::Exit => vec![code.len()],
        _ => return vec![at + 1],
    };
    if inst.guard != 0 {
        out.push(at + 1);
    }
    out
}

/// Stores the immediate post-dominator of every branch in its `b`.
pub(crate) fn join_branches(code: &mut [Draft], lists: &mut [u32]) {
    let next: Vec<Vec<usize>> = (0..code.len()).map(|at| successors(code, lists, at)).collect();
    let join = immediate_post_dominators(&next);
    for (at, draft) in code.iter_mut().enumerate() {
        if matches!(draft.flow, Flow::Branch(..) | Flow::Table(..)) {
            // A branch into an endless loop has none: it meets at the end, which nothing reaches.
            draft.inst.b = join[at].unwrap_or(next.len()) as u32;
        }
    }
}

/// By Cooper, Harvey and Kennedy, on the reversed graph. The node behind the last is the exit.
fn immediate_post_dominators(next: &[Vec<usize>]) -> Vec<Option<usize>> {
    let exit = next.len();
    let order = reverse_postorder(next);
    let mut number = vec![usize::MAX; exit + 1];
    for (n, at) in order.iter().enumerate() {
        number[*at] = n;
    }
    let mut join: Vec<Option<usize>> = vec![None; exit + 1];
    join[exit] = Some(exit);
    let mut changed = true;
    while changed {
        changed = false;
        for &at in order.iter().filter(|at| **at != exit) {
            let known = next[at].iter().copied().filter(|s| join[*s].is_some());
            let new = known.reduce(|a, b| common(&join, &number, a, b));
            changed |= new != join[at];
            join[at] = new;
        }
    }
    join
}

/// The nearest node on both chains of joins.
fn common(join: &[Option<usize>], number: &[usize], mut a: usize, mut b: usize) -> usize {
    while a != b {
        while number[a] > number[b] {
            a = join[a].unwrap_or(b);
        }
        while number[b] > number[a] {
            b = join[b].unwrap_or(a);
        }
    }
    a
}

/// The nodes from which the exit can be reached, the exit first.
fn reverse_postorder(next: &[Vec<usize>]) -> Vec<usize> {
    let exit = next.len();
    let mut previous = vec![Vec::new(); exit + 1];
    for (at, successors) in next.iter().enumerate() {
        successors.iter().for_each(|s| previous[*s].push(at));
    }
    let mut order = Vec::with_capacity(exit + 1);
    let mut seen = vec![false; exit + 1];
    let mut stack = vec![(exit, 0)];
    seen[exit] = true;
    while let Some((at, n)) = stack.pop() {
        match previous[at].get(n) {
            Some(&from) => {
                stack.push((at, n + 1));
                if !std::mem::replace(&mut seen[from], true) {
                    stack.push((from, 0));
                }
            }
            None => order.push(at),
        }
    }
    order.reverse();
    order
}

/// The `wgmma` that some path reaches with one of their registers written since the last `wgmma.fence`, or without
/// any fence at all.
pub(crate) fn unfenced_products(code: &[Draft], lists: &[u32]) -> HashSet<u32> {
    let registers = |d: &Draft| match d.flow {
        Flow::Product(n) => lists[d.inst.list as usize..][..n].to_vec(),
        _ => Vec::new(),
    };
    let watched: HashSet<u32> = code.iter().flat_map(registers).collect();
    let mut found = HashSet::new();
    if watched.is_empty() {
        return found;
    }
    // What may be written and not fenced before each instruction.
    let mut dirty: Vec<Option<HashSet<u32>>> = vec![None; code.len() + 1];
    dirty[0] = Some(watched.clone());
    let mut work = vec![0];
    while let Some(at) = work.pop() {
        let (Some(draft), Some(mut state)) = (code.get(at), dirty[at].clone()) else { continue };
        match draft.flow {
            Flow::ProductFence => state.clear(),
            Flow::Product(_) => {
                if registers(draft).iter().any(|r| state.contains(r)) {
                    found.insert(at as u32);
                }
            }
            _ => {
                let written = draft.uses.iter().filter(|u| u.write).map(|u| u.register);
                state.extend(written.filter(|r| watched.contains(r)));
            }
        }
        for next in successors(code, lists, at) {
            let grown = match &mut dirty[next] {
                Some(known) => {
                    let before = known.len();
                    known.extend(&state);
                    known.len() > before
                }
                none => {
                    *none = Some(state.clone());
                    true
                }
            };
            if grown {
                work.push(next);
            }
        }
    }
    found
}
