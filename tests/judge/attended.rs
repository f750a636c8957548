//! Keys and queries that do not see each other.
use super::{Hiding, Part, Secret};
use transfusion_core::{
    agreement::{self, Application},
    cases::Case,
    ops::{Heads, Rotary},
    tensor::DType,
};

/// An attention with its mask.
struct Attended {
    name: String,
    heads: Heads,
    batch: usize,
    queries: usize,
    keys: usize,
    /// Of how many caches, and which one each batch row reads; `None` where rows hold their own keys.
    slots: Option<(usize, Vec<i32>)>,
    /// Whether heads turn before they attend.
    turned: bool,
    /// The keys that each query sees.
    start: Vec<i32>,
    end: Vec<i32>,
}

/// What the results of attention and of its gradient must not depend on, for heads of these widths.
pub(super) fn secrets(widths: &[usize]) -> Vec<Secret> {
    widths.iter().copied().flat_map(all).flat_map(|a| a.secrets()).collect()
}

fn all(width: usize) -> Vec<Attended> {
    let heads = |heads, kv_heads| Heads { heads, kv_heads, width };
    let packed = |name: &str, heads, batch, t: usize, sees: &dyn Fn(i32) -> (i32, i32)| {
        let (start, end) = (0..batch * t).map(|n| sees((n % t) as i32)).unzip();
        let name = format!("{name}, heads of {width}");
        Attended { name, heads, batch, queries: t, keys: t, slots: None, turned: false, start, end }
    };
    let cached =
        |name: &str, heads, queries: usize, keys, caches, slots: &[i32], sees: &dyn Fn(i32) -> (i32, i32)| {
            let (start, end) = (0..slots.len() * queries).map(|n| sees(n as i32)).unzip();
            let (name, slots) = (format!("{name}, heads of {width}"), slots.to_vec());
            let (batch, slots) = (slots.len(), Some((caches, slots)));
            Attended { name, heads, batch, queries, keys, slots, turned: false, start, end }
        };
    // Documents of 40, 1 and the rest, with an image each but in the second.
    let documents = |i: i32| match i {
        5..30 => (0, 30),
        0..40 => (0, i + 1),
        40 => (40, 41),
        60..85 => (41, 85),
        _ => (41, i + 1),
    };
    vec![
        packed("causal", heads(2, 1), 1, 139, &|i| (0, i + 1)),
        Attended { turned: true, ..packed("documents with images, turned", heads(2, 1), 2, 117, &documents) },
        // The first 64 see what others see in part.
        packed("any intervals", heads(2, 2), 1, 131, &|i| {
            if i < 64 { (0, 131) } else { ((i * 37) % 131 - 9, (i * 53) % 131 + 9) }
        }),
        // Whole tiles of keys that a query among those who see them does not see.
        packed("every other query", heads(1, 1), 1, 200, &|i| (0, if i % 2 == 0 { 60 } else { 200 })),
        cached("one query", heads(4, 2), 1, 150, 4, &[3, -1, 0, 4], &|i| (i, 147 - i)),
        cached("one query of a head", heads(2, 2), 1, 131, 3, &[2, 0], &|i| (i * 64, 129 - i)),
        cached("queries of one cache", heads(2, 1), 9, 200, 3, &[2, 2, -1, 0], &|i| {
            (i % 7 * 5, 180 + i % 11)
        }),
    ]
}

impl Attended {
    fn secrets(self) -> Vec<Secret> {
        let case = self.case();
        let all = agreement::applications(&case, DType::Bf16, &mut agreement::cpu(1).unwrap()).unwrap();
        let own = all.into_iter().filter(|a| a.op.name().starts_with("attention"));
        own.map(|application| Secret {
            case: format!("{case:?}"),
            hidings: match application.op.name() {
                "attention" => self.forward(),
                _ => self.backward(&application),
            },
            application,
        })
        .collect()
    }

    fn case(&self) -> Case {
        let h = self.heads;
        let mask = [self.batch, self.queries];
        let turned = self.turned;
        let case = match &self.slots {
            None => Case::new("attention", &self.name, move |g, x| {
                let qkv = match turned {
                    true => g.rotary(x[0], Rotary { positions: x[3], heads: h, theta: 1e4 }),
                    false => x[0].into(),
                };
                vec![g.attention(qkv, x[1], x[2], h)]
            })
            .normal([self.batch, self.queries, h.packed_width()]),
            Some((caches, slots)) => Case::new("attention", &self.name, move |g, x| {
                vec![g.attention_cached(x[0], x[1], x[2], x[3], x[4], x[5], h)]
            })
            .normal([self.batch, self.queries, h.q_columns()])
            .normal([*caches, self.keys, h.kv_columns()])
            .normal([*caches, self.keys, h.kv_columns()])
            .ints([self.batch], slots),
        };
        let case = case.ints(mask, &self.start).ints(mask, &self.end);
        let rows = self.batch * self.queries;
        let positions: Vec<i32> = (0..rows as i32).collect();
        if turned { case.ints([rows], &positions) } else { case }
    }

    /// Keys are poisoned: as seen by no query of a row, whole, by key or value alone, of one head.
    fn forward(&self) -> Vec<Hiding> {
        let of = |operands: &'static [&'static str]| {
            let each = self.hidden_keys().into_iter();
            each.map(move |(what, keys)| self.keys_forward(what, &keys, operands))
        };
        of(&["k", "v"]).chain(of(&["k"]).take(1)).chain(of(&["v"]).take(1)).collect()
    }

    fn keys_forward(
        &self,
        what: String,
        keys: &dyn Fn(Key) -> bool,
        operands: &'static [&'static str],
    ) -> Hiding {
        let [by_key, by_value] = ["k", "v"].map(|name| operands.contains(&name));
        let (mut poisoned, mut touched) = (vec![], vec![]);
        for key in self.all_keys().filter(|k| keys(*k)) {
            poisoned.extend(by_key.then(|| self.key(key)));
            poisoned.extend(by_value.then(|| self.value(key)));
        }
        for query in self.all_queries() {
            if self.seen_by(query).any(keys) {
                touched.push(self.o(query));
                touched.extend(by_key.then(|| self.lse(query)));
            }
        }
        Hiding { what: format!("{} {what}", operands.join(", ")), operands, poisoned, touched }
    }

    fn backward(&self, a: &Application) -> Vec<Hiding> {
        let last = a.specs.len() - 1 - usize::from(self.turned);
        let keys = self.hidden_keys().into_iter();
        let mut all: Vec<Hiding> =
            keys.map(|(what, keys)| self.keys_backward(format!("keys and values {what}"), &keys)).collect();
        for by_all in [true, false] {
            let queries = self.hidden_queries().into_iter();
            all.extend(queries.map(|(what, queries)| self.queries_backward(what, &queries, last, by_all)));
        }
        all
    }

    fn keys_backward(&self, what: String, keys: &dyn Fn(Key) -> bool) -> Hiding {
        let (mut poisoned, mut touched) = (vec![], vec![]);
        for key in self.all_keys().filter(|k| keys(*k)) {
            poisoned.extend([self.key(key), self.value(key)]);
            if self.all_queries().any(|q| self.sees(q, key)) {
                touched.extend([self.key(key), self.value(key)]);
            }
        }
        let seeing = self.all_queries().filter(|q| self.seen_by(*q).any(keys));
        touched.extend(seeing.map(|q| self.query(q)));
        Hiding { what, operands: &[], poisoned, touched }
    }

    /// `last` is the position of do; before it stand o and lse. Either all that a query has is poisoned, or do alone.
    fn queries_backward(
        &self,
        what: String,
        queries: &dyn Fn(Query) -> bool,
        last: usize,
        by_all: bool,
    ) -> Hiding {
        let (mut poisoned, mut touched) = (vec![], vec![]);
        for query in self.all_queries().filter(|q| queries(*q)) {
            let (o, lse) = (self.o(query).1, self.lse(query).1);
            if by_all {
                poisoned.extend([self.query(query), (last - 2, o.clone()), (last - 1, lse)]);
            }
            poisoned.push((last, o));
            if self.seen_by(query).next().is_some() {
                touched.push(self.query(query));
            }
        }
        for key in self.all_keys() {
            if self.all_queries().any(|q| queries(q) && self.sees(q, key)) {
                touched.extend([self.key(key), self.value(key)]);
            }
        }
        let of = if by_all { "q, o, lse, do" } else { "do" };
        Hiding { what: format!("{of} {what}"), operands: &[], poisoned, touched }
    }

    /// Sets of keys: what a query does not see, and one head.
    fn hidden_keys(&self) -> Vec<Named<'_, Key>> {
        let mut all: Vec<Named<'_, Key>> = vec![];
        for query in self.some_queries() {
            let what = format!("that query {} of row {} does not see", query.i, query.b);
            let hidden =
                move |k: Key| !(self.slot(query.b) == Some(k.slot) && self.interval(query).contains(&k.j));
            all.push((what, Box::new(hidden)));
        }
        all.push(("of head 0".into(), Box::new(|k| k.head == 0)));
        all
    }

    /// Sets of queries: what does not see a key, and one head.
    fn hidden_queries(&self) -> Vec<Named<'_, Query>> {
        let mut all: Vec<Named<'_, Query>> = vec![];
        for (slot, j) in self.some_keys() {
            let what = format!("of queries that do not see key {j} of row {slot}");
            let hidden = move |q: Query| !(self.slot(q.b) == Some(slot) && self.interval(q).contains(&j));
            all.push((what, Box::new(hidden)));
        }
        all.push(("of head 0".into(), Box::new(|q| q.head == 0)));
        all
    }

    /// Queries that see something, from the first rows to the last.
    fn some_queries(&self) -> Vec<Query> {
        let all: Vec<Query> =
            self.all_queries().filter(|q| q.head == 0 && !self.interval(*q).is_empty()).collect();
        let all: Vec<Query> = all.into_iter().filter(|q| self.slot(q.b).is_some()).collect();
        [all.len() / 4, all.len() - 1].map(|n| all[n]).into()
    }

    /// Keys that somebody sees, as cache and position.
    fn some_keys(&self) -> Vec<(usize, usize)> {
        let seen = |k: &Key| k.head == 0 && self.all_queries().any(|q| self.sees(q, *k));
        let all: Vec<(usize, usize)> = self.all_keys().filter(seen).map(|k| (k.slot, k.j)).collect();
        [all.len() / 2, all.len() - 1].map(|n| all[n]).into()
    }
}

/// A set of `T` and what it is.
type Named<'a, T> = (String, Box<dyn Fn(T) -> bool + 'a>);

/// A query of a head.
#[derive(Clone, Copy)]
struct Query {
    b: usize,
    i: usize,
    head: usize,
}

/// A key of a head of keys.
#[derive(Clone, Copy)]
struct Key {
    slot: usize,
    j: usize,
    head: usize,
}

/// Who sees whom.
impl Attended {
    fn all_queries(&self) -> impl Iterator<Item = Query> + '_ {
        let (h, t) = (self.heads.heads, self.queries);
        (0..self.batch * t * h).map(move |n| Query { b: n / (t * h), i: n / h % t, head: n % h })
    }

    fn all_keys(&self) -> impl Iterator<Item = Key> + '_ {
        let (h, t) = (self.heads.kv_heads, self.keys);
        let slots = self.slots.as_ref().map_or(self.batch, |(caches, _)| *caches);
        (0..slots * t * h).map(move |n| Key { slot: n / (t * h), j: n / h % t, head: n % h })
    }

    /// The keys that a batch row reads.
    fn slot(&self, b: usize) -> Option<usize> {
        let Some((caches, slots)) = &self.slots else { return Some(b) };
        usize::try_from(slots[b]).ok().filter(|slot| slot < caches)
    }

    fn interval(&self, q: Query) -> std::ops::Range<usize> {
        let clamp = |x: i32| usize::try_from(x).unwrap_or(0).min(self.keys);
        let at = q.b * self.queries + q.i;
        clamp(self.start[at])..clamp(self.end[at])
    }

    fn seen_by(&self, q: Query) -> impl Iterator<Item = Key> + '_ {
        let head = q.head / (self.heads.heads / self.heads.kv_heads);
        let slot = self.slot(q.b);
        slot.into_iter().flat_map(move |slot| self.interval(q).map(move |j| Key { slot, j, head }))
    }

    fn sees(&self, q: Query, k: Key) -> bool {
        let head = q.head / (self.heads.heads / self.heads.kv_heads);
        self.slot(q.b) == Some(k.slot) && head == k.head && self.interval(q).contains(&k.j)
    }
}

/// Where things lie among operands and, as far as they have gradients, results.
impl Attended {
    /// `width` elements: of head `head` in row `row` of rows of `stride`, behind `before` columns.
    fn part(&self, which: usize, row: usize, stride: usize, before: usize, head: usize) -> Part {
        let first = row * stride + before + head * self.heads.width;
        (which, first..first + self.heads.width)
    }

    fn query(&self, q: Query) -> Part {
        let stride = if self.slots.is_some() { self.heads.q_columns() } else { self.heads.packed_width() };
        self.part(0, q.b * self.queries + q.i, stride, 0, q.head)
    }

    fn key(&self, k: Key) -> Part {
        let (row, h) = (k.slot * self.keys + k.j, self.heads);
        match self.slots {
            Some(_) => self.part(1, row, h.kv_columns(), 0, k.head),
            None => self.part(0, row, h.packed_width(), h.q_columns(), k.head),
        }
    }

    fn value(&self, k: Key) -> Part {
        let (row, h) = (k.slot * self.keys + k.j, self.heads);
        match self.slots {
            Some(_) => self.part(2, row, h.kv_columns(), 0, k.head),
            None => self.part(0, row, h.packed_width(), h.q_columns() + h.kv_columns(), k.head),
        }
    }

    fn o(&self, q: Query) -> Part {
        self.part(0, q.b * self.queries + q.i, self.heads.q_columns(), 0, q.head)
    }

    fn lse(&self, q: Query) -> Part {
        let at = (q.b * self.heads.heads + q.head) * self.queries + q.i;
        (1, at..at + 1)
    }
}
