//! Two sides in turn, A B A B, and what may be concluded: a difference counts only where it is larger than what
//! a side differs from itself by, A against A, and in nearly every round.
use crate::error::{Error, Result};
use std::time::Duration;
use transfusion::sample::Cancel;

/// How long both sides rest before a block, so that threads of the other one that still look for work fall asleep.
const REST: Duration = Duration::from_millis(60);

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Blocks of each side.
    pub rounds: usize,
    /// Of a block.
    pub seconds: f64,
}

/// The middle of some numbers; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (n, half) = (sorted.len(), sorted.len() / 2);
    match n {
        0 => 0.0,
        _ if n % 2 == 1 => sorted[half],
        _ => (sorted[half - 1] + sorted[half]) / 2.0,
    }
}

/// The median of every block of a side, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Blocks(pub Vec<f64>);

impl Blocks {
    /// The median of the blocks.
    pub fn median(&self) -> f64 {
        median(&self.0)
    }

    /// How much two of the blocks differ: the median over all pairs of the larger over the smaller, less 1. One block
    /// that something else disturbed does not decide it.
    pub fn spread(&self) -> f64 {
        let apart = |(i, a): (usize, &f64)| {
            self.0[i + 1..].iter().map(|b| (a / b).max(b / a) - 1.0).collect::<Vec<_>>()
        };
        median(&self.0.iter().enumerate().flat_map(apart).collect::<Vec<_>>())
    }
}

/// What a comparison found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Ours takes less time.
    Faster,
    /// Ours takes more time.
    Slower,
    /// The difference is no larger than what a side differs from itself by.
    Even,
}

impl Verdict {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Faster => "faster",
            Verdict::Slower => "slower",
            Verdict::Even => "even",
        }
    }
}

/// Two sides that were measured in turn.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pair {
    /// Ours.
    pub ours: Blocks,
    /// Theirs; empty if there is none.
    pub theirs: Blocks,
}

impl Pair {
    /// How many times as long theirs takes, round by round, from the least.
    fn ratios(&self) -> Vec<f64> {
        let mut ratios: Vec<f64> = self.ours.0.iter().zip(&self.theirs.0).map(|(a, b)| b / a).collect();
        ratios.sort_by(f64::total_cmp);
        ratios
    }

    /// How many times as long theirs takes: the median over the rounds.
    pub fn speedup(&self) -> f64 {
        median(&self.ratios())
    }

    /// What the ratios allow to say: a difference is one if three rounds in four show it, larger than what either
    /// side differs from itself by.
    pub fn verdict(&self) -> Verdict {
        let (ratios, bound) = (self.ratios(), 1.0 + self.ours.spread().max(self.theirs.spread()));
        let Some(last) = ratios.len().checked_sub(1) else { return Verdict::Even };
        let (low, high) = (ratios[last / 4], ratios[last - last / 4]);
        if low > bound {
            Verdict::Faster
        } else if high * bound < 1.0 {
            Verdict::Slower
        } else {
            Verdict::Even
        }
    }
}

/// Something that is measured in blocks: milliseconds of everything done in about so many seconds.
pub type Side<'a> = &'a mut dyn FnMut(f64) -> Result<Vec<f64>>;

/// Measures both sides in turn, ours first; `theirs` may be none.
///
/// # Errors
/// What a side returns, a block without a time, and [`transfusion::Error::Cancelled`].
pub fn alternate(
    schedule: Schedule,
    ours: Side<'_>,
    mut theirs: Option<Side<'_>>,
    cancel: Cancel<'_>,
) -> Result<Pair> {
    let mut pair = Pair::default();
    for _ in 0..schedule.rounds {
        if theirs.is_some() {
            std::thread::sleep(REST);
        }
        pair.ours.0.push(block(schedule.seconds, ours, cancel)?);
        if let Some(theirs) = &mut theirs {
            std::thread::sleep(REST);
            pair.theirs.0.push(block(schedule.seconds, theirs, cancel)?);
        }
    }
    Ok(pair)
}

fn block(seconds: f64, side: Side<'_>, cancel: Cancel<'_>) -> Result<f64> {
    cancel.check()?;
    let times = side(seconds)?;
    match median(&times) {
        ms if ms > 0.0 && ms.is_finite() => Ok(ms),
        ms => Err(Error::peer(format!("a block of {} times has the median {ms} ms", times.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(ours: &[f64], theirs: &[f64]) -> Pair {
        Pair { ours: Blocks(ours.to_vec()), theirs: Blocks(theirs.to_vec()) }
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), 3.0);
    }

    #[test]
    fn a_win_inside_the_noise_is_not_called_one() {
        assert_eq!(pair(&[10.0, 10.1, 9.9], &[20.0, 20.2, 19.8]).verdict(), Verdict::Faster);
        assert_eq!(pair(&[20.0, 20.2], &[10.0, 10.0]).verdict(), Verdict::Slower);
        // Five per cent, where ours alone moves by six.
        let noisy = pair(&[10.0, 10.6, 10.0], &[10.5, 11.1, 10.5]);
        assert!((noisy.speedup() - 1.05).abs() < 0.01 && (noisy.ours.spread() - 0.06).abs() < 1e-9);
        assert_eq!(noisy.verdict(), Verdict::Even);
        // The same where only theirs moves.
        assert_eq!(pair(&[10.0, 10.0, 10.0], &[10.5, 11.3, 10.5]).verdict(), Verdict::Even);
        assert_eq!(pair(&[10.0, 10.0, 10.0], &[10.5, 10.5, 10.5]).verdict(), Verdict::Faster);
    }

    #[test]
    fn ratios_are_those_of_a_round() {
        // The machine slows down by half in between: the ratio of neighbours stays.
        let drifting = pair(&[10.0, 15.0, 15.0], &[20.0, 30.0, 30.0]);
        assert_eq!(drifting.speedup(), 2.0);
        assert!((drifting.ours.spread() - 0.5).abs() < 1e-12);
        assert_eq!(drifting.verdict(), Verdict::Faster);
    }

    #[test]
    fn one_disturbed_block_decides_nothing() {
        let quiet = [10.0, 10.1, 10.0, 10.1, 10.0];
        let with = |block: usize, ms: f64, of: [f64; 5]| {
            let mut blocks = of;
            blocks[block] = ms;
            blocks
        };
        let twice = quiet.map(|ms| 2.0 * ms);
        assert_eq!(pair(&quiet, &with(3, 740.0, twice)).verdict(), Verdict::Faster);
        assert_eq!(pair(&with(2, 20.0, quiet), &twice).verdict(), Verdict::Faster);
        assert_eq!(pair(&with(2, 740.0, twice), &quiet).verdict(), Verdict::Slower);
        // Nor does one lucky round.
        assert_eq!(pair(&quiet, &with(1, 90.0, quiet)).verdict(), Verdict::Even);
        let two = with(1, 21.0, with(2, 20.0, quiet));
        assert_eq!(pair(&two, &twice).verdict(), Verdict::Even, "two rounds in five are too many");
    }

    #[test]
    fn sides_take_turns() {
        let order = std::cell::RefCell::new(Vec::new());
        let schedule = Schedule { rounds: 3, seconds: 0.25 };
        let side = |name: char, ms: f64| {
            let order = &order;
            move |seconds: f64| {
                assert_eq!(seconds, 0.25);
                order.borrow_mut().push(name);
                Ok(vec![ms, 100.0 * ms, ms])
            }
        };
        let (mut a, mut b) = (side('A', 2.0), side('B', 3.0));
        let found = alternate(schedule, &mut a, Some(&mut b), Cancel(None)).unwrap();
        assert_eq!(order.borrow().iter().collect::<String>(), "ABABAB");
        assert_eq!(found, pair(&[2.0; 3], &[3.0; 3]));
        let alone = alternate(schedule, &mut side('A', 2.0), None, Cancel(None)).unwrap();
        assert_eq!((alone.theirs.0.len(), alone.ours.0.len()), (0, 3));
    }

    #[test]
    fn no_time_is_an_error_and_a_set_flag_ends_it() {
        let schedule = Schedule { rounds: 2, seconds: 0.0 };
        for times in [vec![], vec![0.0], vec![f64::NAN]] {
            assert!(alternate(schedule, &mut |_| Ok(times.clone()), None, Cancel(None)).is_err());
        }
        let stop = std::sync::atomic::AtomicBool::new(true);
        let stopped = alternate(schedule, &mut |_| Ok(vec![1.0]), None, Cancel(Some(&stop)));
        assert!(matches!(stopped, Err(Error::Engine(transfusion::Error::Cancelled))));
    }
}
