//! Register allocation: thousands of virtual registers into as few rows as are alive at once.
//!
//! Liveness per thread suffices although a warp executes both sides of a branch: writes touch only the lanes that
//! are active, so that a row may hold different virtual registers in different lanes.

use crate::decode::{Draft, Flow};
use crate::kernel::Special;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Where an instruction names a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    D,
    A,
    B,
    C,
    /// An index into the kernel's lists.
    List(u32),
}

/// A register that an instruction reads or writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Use {
    pub(crate) place: Place,
    pub(crate) register: u32,
    pub(crate) write: bool,
}

/// What a virtual register holds.
#[derive(Clone, Copy, Debug)]
enum Content {
    Computed,
    Constant(u64),
    Special(Special),
}

/// A register before allocation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Virtual {
    pub(crate) wide: bool,
    content: Content,
}

impl Virtual {
    pub(crate) fn register(wide: bool) -> Self {
        Self { wide, content: Content::Computed }
    }

    pub(crate) fn constant(wide: bool, value: u64) -> Self {
        Self { wide, content: Content::Constant(value) }
    }

    pub(crate) fn special(special: Special) -> Self {
        Self { wide: false, content: Content::Special(special) }
    }
}

/// The outcome.
pub(crate) struct Allocation {
    pub(crate) rows: u32,
    pub(crate) constants: Vec<(u32, bool, u64)>,
    pub(crate) specials: Vec<(u32, Special)>,
    /// Rows that each instruction touches.
    pub(crate) touches: Vec<Vec<u32>>,
}

/// Replaces the virtual registers of the code and its lists by rows.
pub(crate) fn allocate(code: &mut [Draft], lists: &mut [u32], virtuals: &[Virtual]) -> Allocation {
    let ranges = live_ranges(code, lists, virtuals);
    let mut rows = Rows::default();
    let map = assign(&ranges, virtuals, &mut rows);
    let mut touches = Vec::with_capacity(code.len());
    for draft in code.iter_mut() {
        let mut touched = Vec::new();
        for u in &draft.uses {
            let row = map[u.register as usize];
            match u.place {
                Place::D => draft.inst.d = row,
                Place::A => draft.inst.a = row,
                Place::B => draft.inst.b = row,
                Place::C => draft.inst.c = row,
                Place::List(n) => lists[n as usize] = row,
            }
            // A product may follow another on the same registers.
            if !matches!(draft.flow, Flow::Product(_)) {
                touched.push(row);
                if virtuals[u.register as usize].wide {
                    touched.push(row + 1);
                }
            }
        }
        touches.push(touched);
    }
    let mut allocation = Allocation { rows: rows.count + 2, constants: vec![], specials: vec![], touches };
    for (v, row) in virtuals.iter().zip(&map) {
        match v.content {
            Content::Constant(value) => allocation.constants.push((*row, v.wide, value)),
            Content::Special(special) => allocation.specials.push((*row, special)),
            Content::Computed => {}
        }
    }
    allocation
}

/// The positions over which a virtual register is alive; reads of instruction `n` are at `2 n`, writes at `2 n + 1`.
#[derive(Clone, Copy)]
struct Range {
    first: usize,
    last: usize,
}

impl Range {
    const EMPTY: Self = Self { first: usize::MAX, last: 0 };

    fn include(&mut self, at: usize) {
        self.first = self.first.min(at);
        self.last = self.last.max(at);
    }
}

fn live_ranges(code: &[Draft], lists: &[u32], virtuals: &[Virtual]) -> Vec<Range> {
    let blocks = Blocks::new(code, lists);
    let (entry, exit) = blocks.liveness(code, virtuals.len());
    let mut ranges = vec![Range::EMPTY; virtuals.len()];
    for (b, (first, end)) in blocks.spans.iter().enumerate() {
        entry[b].each(|v| ranges[v].include(2 * first));
        exit[b].each(|v| ranges[v].include(2 * end - 1));
    }
    let waits: Vec<usize> =
        code.iter().enumerate().filter(|(_, d)| d.flow == Flow::ProductWait).map(|(n, _)| n).collect();
    for (n, draft) in code.iter().enumerate() {
        for u in &draft.uses {
            let range = &mut ranges[u.register as usize];
            range.include(2 * n + usize::from(u.write));
            if let (Flow::Product(_), Place::List(_)) = (&draft.flow, u.place) {
                // The registers of a product are in use until it is waited for.
                range.include(2 * waits.iter().copied().find(|w| *w > n).unwrap_or(n) + 1);
            }
        }
    }
    ranges
}

/// A set of virtual registers.
#[derive(Clone, PartialEq, Eq)]
struct Set(Vec<u64>);

impl Set {
    fn new(len: usize) -> Self {
        Self(vec![0; len.div_ceil(64)])
    }

    fn insert(&mut self, v: u32) {
        self.0[v as usize / 64] |= 1 << (v % 64);
    }

    fn has(&self, v: u32) -> bool {
        self.0[v as usize / 64] >> (v % 64) & 1 != 0
    }

    fn each(&self, mut f: impl FnMut(usize)) {
        for (n, word) in self.0.iter().enumerate() {
            let mut rest = *word;
            while rest != 0 {
                f(n * 64 + rest.trailing_zeros() as usize);
                rest &= rest - 1;
            }
        }
    }
}

/// Basic blocks.
struct Blocks {
    /// First and end position.
    spans: Vec<(usize, usize)>,
    next: Vec<Vec<usize>>,
}

impl Blocks {
    fn new(code: &[Draft], lists: &[u32]) -> Self {
        let targets = |d: &Draft| match &d.flow {
            Flow::Branch(..) => vec![d.inst.a as usize],
            Flow::Table(_, labels) => {
                lists[d.inst.list as usize..][..labels.len()].iter().map(|t| *t as usize).collect()
            }
            _ => Vec::new(),
        };
        let mut leads = vec![false; code.len() + 1];
        leads[0] = true;
        for (n, draft) in code.iter().enumerate() {
            if matches!(draft.flow, Flow::Branch(..) | Flow::Table(..) | Flow::Exit) {
                leads[n + 1] = true;
                targets(draft).into_iter().for_each(|t| leads[t] = true);
            }
        }
        let starts: Vec<usize> = (0..code.len()).filter(|n| leads[*n]).collect();
        let end = |b: usize| starts.get(b + 1).copied().unwrap_or(code.len());
        let spans: Vec<_> = starts.iter().enumerate().map(|(b, s)| (*s, end(b))).collect();
        let block_at = |position: usize| starts.binary_search(&position).ok();
        let next = spans.iter().map(|(_, end)| {
            let last = &code[end - 1];
            let falls = match last.flow {
                Flow::Branch(..) | Flow::Table(..) | Flow::Exit => last.inst.guard != 0,
                _ => true,
            };
            let mut out: Vec<usize> = targets(last).into_iter().filter_map(block_at).collect();
            out.extend(block_at(*end).filter(|_| falls));
            out
        });
        let next = next.collect();
        Self { spans, next }
    }

    /// The registers alive at the start and at the end of each block.
    fn liveness(&self, code: &[Draft], registers: usize) -> (Vec<Set>, Vec<Set>) {
        let count = self.spans.len();
        let (mut reads, mut kills) = (vec![Set::new(registers); count], vec![Set::new(registers); count]);
        for (b, (first, end)) in self.spans.iter().enumerate() {
            for draft in &code[*first..*end] {
                for u in draft.uses.iter().filter(|u| !u.write && !kills[b].has(u.register)) {
                    reads[b].insert(u.register);
                }
                // A guarded write leaves the old value in some lanes.
                for u in draft.uses.iter().filter(|u| u.write && draft.inst.guard == 0) {
                    kills[b].insert(u.register);
                }
            }
        }
        let (mut entry, mut exit) = (reads.clone(), vec![Set::new(registers); count]);
        let mut changed = true;
        while changed {
            changed = false;
            for b in (0..count).rev() {
                for word in 0..exit[b].0.len() {
                    let out = self.next[b].iter().fold(0, |all, s| all | entry[*s].0[word]);
                    let alive = reads[b].0[word] | out & !kills[b].0[word];
                    changed |= out != exit[b].0[word] || alive != entry[b].0[word];
                    (exit[b].0[word], entry[b].0[word]) = (out, alive);
                }
            }
        }
        (entry, exit)
    }
}

/// Rows handed out so far, and those that are free again: narrow ones and aligned pairs.
#[derive(Default)]
struct Rows {
    count: u32,
    narrow: Vec<u32>,
    wide: Vec<u32>,
}

impl Rows {
    fn take(&mut self, wide: bool) -> u32 {
        let free = if wide { &mut self.wide } else { &mut self.narrow };
        if let Some(row) = free.pop() {
            return row;
        }
        if wide && self.count % 2 == 1 {
            self.narrow.push(self.count);
            self.count += 1;
        }
        self.count += if wide { 2 } else { 1 };
        self.count - if wide { 2 } else { 1 }
    }

    fn give(&mut self, row: u32, wide: bool) {
        if wide { self.wide.push(row) } else { self.narrow.push(row) }
    }
}

/// Linear scan: the rows of all virtual registers. Constants and special registers keep theirs.
fn assign(ranges: &[Range], virtuals: &[Virtual], rows: &mut Rows) -> Vec<u32> {
    let mut map = vec![0; virtuals.len()];
    for (v, register) in virtuals.iter().enumerate() {
        if !matches!(register.content, Content::Computed) {
            map[v] = rows.take(register.wide);
        }
    }
    let computed =
        |v: &usize| matches!(virtuals[*v].content, Content::Computed) && ranges[*v].first != usize::MAX;
    let mut order: Vec<usize> = (0..virtuals.len()).filter(computed).collect();
    order.sort_by_key(|v| ranges[*v].first);
    let mut alive: BinaryHeap<Reverse<(usize, bool, u32)>> = BinaryHeap::new();
    for v in order {
        while let Some(Reverse((end, wide, row))) = alive.peek().copied() {
            if end >= ranges[v].first {
                break;
            }
            rows.give(row, wide);
            alive.pop();
        }
        map[v] = rows.take(virtuals[v].wide);
        alive.push(Reverse((ranges[v].last, virtuals[v].wide, map[v])));
    }
    map
}
