//! The other side of one measurement: each of its variants has to agree with ours before it is timed, and the
//! fastest of a class, which computes in one precision, counts.
use crate::{
    error::{Error, Result},
    floats::{Floats, Tolerance},
    peer::{Peer, numbers},
    row::{Row, Versus},
    statistics::{Pair, Schedule, Side, alternate, median},
};
use serde_json::Value;
use std::collections::BTreeMap;
use transfusion::sample::Cancel;

/// Variants of the other side that compute in one precision.
#[derive(Clone, Debug, PartialEq)]
pub struct Class {
    /// `f32`, `medium` (PyTorch may round the factors of products), `bf16`.
    pub name: String,
    /// What may be fastest.
    pub variants: Vec<String>,
    /// How far their results may be from ours, relative.
    pub tolerance: f64,
}

impl Class {
    /// The classes of an answer, in order, of which none is empty; only the variants of [`Peer::only`] where it names
    /// some.
    ///
    /// # Errors
    /// If the answer has none, or none of the variants that are asked for.
    pub fn told(answer: &Value, peer: &Peer, ours: Floats, tolerance: Tolerance) -> Result<Vec<Class>> {
        let told = serde_json::from_value::<Vec<(String, Vec<String>)>>(answer["classes"].clone());
        let told = told.map_err(|e| Error::peer(format!("the answer has no classes ({e}): {answer}")))?;
        let mut classes: Vec<Class> = Vec::new();
        for (name, mut variants) in told.iter().cloned() {
            variants.retain(|v| peer.only.is_empty() || peer.only.contains(v));
            let tolerance = tolerance.of([ours, Floats::of_class(&name)]);
            if !variants.is_empty() {
                classes.push(Class { name, variants, tolerance });
            }
        }
        if classes.is_empty() && !peer.only.is_empty() {
            let known: Vec<String> = told.into_iter().flat_map(|(_, variants)| variants).collect();
            return Err(Error::peer(format!("PyTorch has no variant {:?} here", peer.only.join("; ")))
                .with_remedy(format!("the variants are: {}", known.join("; "))));
        }
        Ok(classes)
    }
}

/// How the other side is asked about one measurement.
pub struct Opponent<'a> {
    /// The process.
    pub peer: &'a mut Peer,
    /// What it computes in: the first is what ours is compared with, beside which the others are told.
    pub classes: Vec<Class>,
    /// What does something else, and is timed for comparison only.
    pub bounds: Vec<String>,
    /// Builds a variant, whose name is added, and tells what is to be judged.
    pub build: Value,
    /// How far that is from ours, relative.
    pub judge: &'a dyn Fn(&Value) -> Result<f64>,
    /// Times what was built last, for seconds that are added.
    pub time: Value,
    /// Seconds that each variant is tried for.
    pub trial: f64,
}

/// The variant that was fastest.
#[derive(Clone, Debug, Default, PartialEq)]
struct Chosen {
    variant: String,
    /// How far from ours, relative.
    apart: f64,
    /// Milliseconds of the others.
    others: BTreeMap<String, f64>,
}

impl Chosen {
    fn into_row(self, row: Row, peer: &Peer) -> Row {
        Row {
            torch: Some(peer.version.clone()),
            torch_variant: Some(self.variant),
            others: self.others,
            apart: Some(self.apart),
            ..row
        }
    }

    fn versus(self, pair: &Pair) -> Versus {
        Versus {
            variant: self.variant,
            ms: pair.theirs.median(),
            spread: pair.theirs.spread(),
            speedup: pair.speedup(),
            verdict: pair.verdict().name().into(),
            apart: self.apart,
            others: self.others,
        }
    }
}

impl Opponent<'_> {
    /// Builds a variant and holds it against ours; how far it is.
    fn build(&mut self, variant: &str, tolerance: f64) -> Result<f64> {
        let mut asked = self.build.clone();
        asked["variant"] = variant.into();
        let apart = (self.judge)(&self.peer.ask(asked)?)?;
        // What is compiled at the first calls is not timed.
        self.block(0.0)?;
        if apart <= tolerance {
            return Ok(apart);
        }
        Err(Error::peer(format!(
            "{variant}: its results are {apart:.1e} from ours, and {tolerance:.0e} is allowed"
        )))
    }

    fn bound(&mut self, variant: &str) -> Result<f64> {
        let mut asked = self.build.clone();
        asked["variant"] = variant.into();
        self.peer.ask(asked)?;
        self.block(0.0)?;
        Ok(median(&self.block(self.trial)?))
    }

    fn block(&mut self, seconds: f64) -> Result<Vec<f64>> {
        let mut asked = self.time.clone();
        asked["seconds"] = seconds.into();
        numbers(&self.peer.ask(asked)?, "ms")
    }

    /// The fastest variant of a class, built last. One that is refused is left out with a note.
    fn choose(&mut self, class: &Class, note: &mut dyn FnMut(String), cancel: Cancel<'_>) -> Result<Chosen> {
        let (mut times, mut apart, mut first, mut last) = (BTreeMap::new(), 0.0, None, String::new());
        for variant in class.variants.clone() {
            cancel.check()?;
            last.clone_from(&variant);
            let built = self.build(&variant, class.tolerance);
            let tried = built.and_then(|apart| Ok((apart, median(&self.block(self.trial)?))));
            match tried {
                Ok((far, ms)) => {
                    note(format!("PyTorch, {variant}: {ms:.4} ms"));
                    apart = far;
                    times.insert(variant, ms);
                }
                Err(Error::Peer { what, .. }) => {
                    note(format!("left out: {what}"));
                    first.get_or_insert(what);
                }
                Err(e) => return Err(e),
            }
        }
        let Some(variant) = times.iter().min_by(|a, b| a.1.total_cmp(b.1)).map(|(v, _)| v.clone()) else {
            let why = first.unwrap_or_else(|| "it has none".into());
            return Err(Error::peer(format!("no variant of PyTorch can be measured: {why}")));
        };
        for bound in std::mem::take(&mut self.bounds) {
            cancel.check()?;
            last.clone_from(&bound);
            match self.bound(&bound) {
                Ok(ms) => times.extend([(bound, ms)]),
                Err(Error::Peer { what, .. }) => note(format!("left out: {what}")),
                Err(e) => return Err(e),
            }
        }
        if last != variant {
            apart = self.build(&variant, class.tolerance)?;
        }
        times.remove(&variant);
        Ok(Chosen { variant, apart, others: times })
    }
}

/// Measures ours, in turn with the fastest variant of the other side's first class where there is one, into a row;
/// then in turn with the fastest of every other class.
///
/// # Errors
/// What either side refuses; if no variant of the first class agrees with ours.
pub fn measure(
    row: Row,
    ours: Side<'_>,
    opponent: Option<Opponent<'_>>,
    schedule: Schedule,
    note: &mut dyn FnMut(String),
    cancel: Cancel<'_>,
) -> Result<Row> {
    let Some((mut opponent, first, more)) = opponent.and_then(split) else {
        return Ok(row.timed(&alternate(schedule, ours, None, cancel)?));
    };
    let chosen = opponent.choose(&first, note, cancel)?;
    let pair = alternate(schedule, ours, Some(&mut |s| opponent.block(s)), cancel)?;
    let mut row = chosen.into_row(row.timed(&pair), opponent.peer);
    for class in more {
        match opponent.choose(&class, note, cancel) {
            Ok(chosen) => {
                let pair = alternate(schedule, ours, Some(&mut |s| opponent.block(s)), cancel)?;
                row.peers.insert(class.name, chosen.versus(&pair));
            }
            Err(Error::Peer { what, .. }) => note(format!("left out: {}: {what}", class.name)),
            Err(e) => return Err(e),
        }
    }
    Ok(row)
}

/// An opponent, its first class, and the others.
fn split(mut opponent: Opponent<'_>) -> Option<(Opponent<'_>, Class, Vec<Class>)> {
    let mut classes = std::mem::take(&mut opponent.classes).into_iter();
    let first = classes.next()?;
    Some((opponent, first, classes.collect()))
}

/// Measures the first class of the other side alone.
///
/// # Errors
/// As [`measure`].
pub fn alone(
    row: Row,
    opponent: Opponent<'_>,
    schedule: Schedule,
    note: &mut dyn FnMut(String),
    cancel: Cancel<'_>,
) -> Result<Row> {
    let Some((mut opponent, first, _)) = split(opponent) else { return Ok(row) };
    let chosen = opponent.choose(&first, note, cancel)?;
    let theirs = alternate(schedule, &mut |s| opponent.block(s), None, cancel)?.ours;
    let row = row.timed(&Pair { theirs, ..Pair::default() });
    Ok(chosen.into_row(row, opponent.peer))
}

/// The largest difference of two lists over the largest number of the first.
pub fn apart(ours: &[f64], theirs: &[f64]) -> f64 {
    if ours.len() != theirs.len() {
        return f64::INFINITY;
    }
    let worst = |m: f64, x: f64| if x > m || x.is_nan() { x } else { m };
    let scale = ours.iter().map(|x| x.abs()).fold(1e-30, f64::max);
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs() / scale).fold(0.0, worst)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::{folder::Folder, machine::Machine, peer::pretended};
    use serde_json::json;

    const SCHEDULE: Schedule = Schedule { rounds: 3, seconds: 0.0 };

    fn class(name: &str, variants: &[&str]) -> Class {
        let variants = variants.iter().map(|v| v.to_string()).collect();
        Class { name: name.into(), variants, tolerance: 0.01 }
    }

    /// Four variants - one slow, one fast, one whose results are wrong, one that is refused - and a bound. The time
    /// asked for is that of what was built last, which the script remembers.
    fn measured(ours: f64, variants: &[&str]) -> (Result<Row>, Vec<String>) {
        let folder = Folder::new().unwrap();
        let mut peer = pretended::peer(
            &folder,
            &[
                (r#""variant":"slow""#, r#"!now=8; echo "{\"apart\": 0.001}""#),
                (r#""variant":"fast""#, r#"!now=4; echo "{\"apart\": 0.002}""#),
                (r#""variant":"wrong""#, r#"!now=1; echo "{\"apart\": 0.5}""#),
                (r#""variant":"nothing""#, r#"{"error": "NotImplementedError: on this machine"}"#),
                (r#""variant":"bound""#, r#"!now=2; echo "{\"apart\": null}""#),
                (r#""do":"time""#, r#"!echo "{\"ms\": [$now, $now.0, $now]}""#),
            ],
        );
        let judge = |told: &Value| Ok(told["apart"].as_f64().unwrap_or(f64::INFINITY));
        let opponent = Opponent {
            peer: &mut peer,
            classes: vec![
                class("f32", variants),
                class("medium", &["slow", "wrong"]),
                class("bf16", &["wrong"]),
            ],
            bounds: vec!["bound".into()],
            build: json!({ "do": "build" }),
            judge: &judge,
            time: json!({ "do": "time" }),
            trial: 0.0,
        };
        let mut notes = Vec::new();
        let row = Row::new(&Machine::unknown(), "ops", "it");
        let mut note = |text| notes.push(text);
        let row = measure(row, &mut |_| Ok(vec![ours]), Some(opponent), SCHEDULE, &mut note, Cancel(None));
        (row, notes)
    }

    #[test]
    fn the_fastest_variant_that_agrees_counts() {
        let (row, notes) = measured(2.0, &["slow", "fast", "wrong", "nothing"]);
        let row = row.unwrap();
        assert_eq!((row.torch_variant.as_deref(), row.torch.as_deref()), (Some("fast"), Some("9.9")));
        assert_eq!((row.ms, row.torch_ms, row.speedup), (Some(2.0), Some(4.0), Some(2.0)));
        assert_eq!((row.verdict.as_deref(), row.apart), (Some("faster"), Some(0.002)));
        assert_eq!(row.others, BTreeMap::from([("bound".into(), 2.0), ("slow".into(), 8.0)]));
        let medium = &row.peers["medium"];
        assert_eq!((medium.variant.as_str(), medium.ms, medium.speedup), ("slow", 8.0, 4.0));
        assert_eq!(row.peers.len(), 1, "no variant in bf16 agrees");
        let left_out = notes.iter().filter(|n| n.starts_with("left out: ")).count();
        assert!(left_out == 5 && notes.iter().any(|n| n.contains("5.0e-1 from ours")), "{notes:?}");
        assert_eq!(measured(5.0, &["fast"]).0.unwrap().verdict.as_deref(), Some("slower"));
        assert_eq!(measured(4.0, &["fast"]).0.unwrap().verdict.as_deref(), Some("even"));
    }

    #[test]
    fn classes_are_told_and_some_may_be_asked_for() {
        let folder = Folder::new().unwrap();
        let mut peer = pretended::peer(&folder, &[]);
        let answer = json!({ "classes": [["f32", ["a", "b"]], ["medium", ["a m"]], ["bf16", []]] });
        let ours = Floats::of_class("medium");
        let tolerance = Tolerance { f32: 1.0, rounded: 2.0, bf16: 3.0 };
        let told = |peer: &Peer| Class::told(&answer, peer, ours, tolerance);
        let names = |classes: &[Class]| classes.iter().map(|c| c.variants.join(",")).collect::<Vec<_>>();
        let all = told(&peer).unwrap();
        assert_eq!(names(&all), ["a,b", "a m"]);
        assert_eq!(all[0].tolerance, 2.0, "ours rounds");
        peer.only = vec!["b".into()];
        assert_eq!(names(&told(&peer).unwrap()), ["b"]);
        peer.only = vec!["c".into()];
        let why = told(&peer).unwrap_err();
        assert!(
            matches!(&why, Error::Peer { what, remedy: Some(remedy) }
            if what.contains("\"c\"") && remedy.contains("a; b; a m")),
            "{why}"
        );
        assert!(Class::told(&json!({}), &peer, ours, tolerance).is_err());
    }

    #[test]
    fn without_a_variant_that_agrees_nothing_is_said() {
        let (row, _) = measured(2.0, &["wrong", "nothing"]);
        assert!(row.unwrap_err().to_string().contains("no variant of PyTorch can be measured: wrong"));
    }

    #[test]
    fn differences_are_relative_to_the_largest() {
        assert_eq!(apart(&[1.0, -4.0], &[1.0, -4.0]), 0.0);
        assert_eq!(apart(&[1.0, -4.0], &[2.0, -4.0]), 0.25);
        assert_eq!(apart(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert!(apart(&[1.0], &[f64::NAN]).is_nan());
    }
}
