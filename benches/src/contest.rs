//! The other side of one measurement: each of its variants has to agree with ours before it is timed, and the
//! fastest counts.
use crate::{
    error::{Error, Result},
    peer::{Peer, numbers},
    row::Row,
    statistics::{Pair, Schedule, Side, alternate, median},
};
use serde_json::Value;
use std::collections::BTreeMap;
use transfusion::sample::Cancel;

/// How the other side is asked about one measurement.
pub struct Opponent<'a> {
    /// The process.
    pub peer: &'a mut Peer,
    /// What may be fastest.
    pub variants: Vec<String>,
    /// What does something else, and is timed for comparison only.
    pub bounds: Vec<String>,
    /// Builds a variant, whose name is added, and tells what is to be judged.
    pub build: Value,
    /// How far that is from ours, relative.
    pub judge: &'a dyn Fn(&Value) -> Result<f64>,
    /// How far it may be.
    pub tolerance: f64,
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
}

impl Opponent<'_> {
    /// Builds a variant and holds it against ours; how far it is.
    fn build(&mut self, variant: &str) -> Result<f64> {
        let mut asked = self.build.clone();
        asked["variant"] = variant.into();
        let apart = (self.judge)(&self.peer.ask(asked)?)?;
        // What is compiled at the first calls is not timed.
        self.block(0.0)?;
        if apart <= self.tolerance {
            return Ok(apart);
        }
        let most = self.tolerance;
        Err(Error::peer(format!(
            "{variant}: its results are {apart:.1e} from ours, and {most:.0e} is allowed"
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

    /// The fastest variant, built last. One that is refused is left out with a note.
    fn choose(&mut self, note: &mut dyn FnMut(String), cancel: Cancel<'_>) -> Result<Chosen> {
        let (mut times, mut apart, mut first) = (BTreeMap::new(), 0.0, None);
        for variant in self.variants.clone() {
            cancel.check()?;
            let tried = self.build(&variant).and_then(|apart| Ok((apart, median(&self.block(self.trial)?))));
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
        for bound in self.bounds.clone() {
            cancel.check()?;
            match self.bound(&bound) {
                Ok(ms) => times.extend([(bound, ms)]),
                Err(Error::Peer { what, .. }) => note(format!("left out: {what}")),
                Err(e) => return Err(e),
            }
        }
        if times.len() > 1 {
            apart = self.build(&variant)?;
        }
        times.remove(&variant);
        Ok(Chosen { variant, apart, others: times })
    }
}

/// Measures ours, in turn with the fastest variant of the other side where there is one, into a row.
///
/// # Errors
/// What either side refuses; if no variant agrees with ours.
pub fn measure(
    row: Row,
    ours: Side<'_>,
    opponent: Option<Opponent<'_>>,
    schedule: Schedule,
    note: &mut dyn FnMut(String),
    cancel: Cancel<'_>,
) -> Result<Row> {
    let Some(mut opponent) = opponent else {
        return Ok(row.timed(&alternate(schedule, ours, None, cancel)?));
    };
    let chosen = opponent.choose(note, cancel)?;
    let pair = alternate(schedule, ours, Some(&mut |s| opponent.block(s)), cancel)?;
    Ok(chosen.into_row(row.timed(&pair), opponent.peer))
}

/// Measures the other side alone.
///
/// # Errors
/// As [`measure`].
pub fn alone(
    row: Row,
    mut opponent: Opponent<'_>,
    schedule: Schedule,
    note: &mut dyn FnMut(String),
    cancel: Cancel<'_>,
) -> Result<Row> {
    let chosen = opponent.choose(note, cancel)?;
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
            variants: variants.iter().map(|v| v.to_string()).collect(),
            bounds: vec!["bound".into()],
            build: json!({ "do": "build" }),
            judge: &judge,
            tolerance: 0.01,
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
        let left_out = notes.iter().filter(|n| n.starts_with("left out: ")).count();
        assert!(left_out == 2 && notes.iter().any(|n| n.contains("5.0e-1 from ours")), "{notes:?}");
        assert_eq!(measured(5.0, &["fast"]).0.unwrap().verdict.as_deref(), Some("slower"));
        assert_eq!(measured(4.0, &["fast"]).0.unwrap().verdict.as_deref(), Some("even"));
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
