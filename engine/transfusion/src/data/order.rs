//! The order in which documents are visited, and which of them are kept for validation.
use super::source::{Shared, Subset};
use crate::error::{Error, Result};
use std::sync::Arc;
use transfusion_core::random::{Purpose, Stream};

/// Visits every one of `len` documents once in each epoch, in another order each time.
///
/// The permutation is a Feistel network (Luby & Rackoff 1988) over the smallest even number of bits
/// that holds `len`, walked until it lands inside: nothing is stored, and visit `n` is a function of
/// the seed and `n` alone, so a run resumes from its visit number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Order {
    seed: u64,
    len: u64,
    half: u32,
}

/// Rounds of the network. Four are enough for large halves; halves of two bits need more before every
/// place is equally likely.
const ROUNDS: u64 = 12;

impl Order {
    /// The order of `len` documents under `seed`.
    pub fn new(seed: u64, len: u64) -> Order {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Order { seed, len, half: bits.div_ceil(2) }
    }

    /// How many documents there are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The document of visit `n`; 0 where there is none.
    pub fn at(&self, n: u64) -> u64 {
        let Some(mut at) = n.checked_rem(self.len) else { return 0 };
        loop {
            at = self.permute(n / self.len, at);
            if at < self.len {
                return at;
            }
        }
    }

    fn permute(&self, epoch: u64, at: u64) -> u64 {
        let mask = (1u64 << self.half) - 1;
        let (mut left, mut right) = (at >> self.half, at & mask);
        for round in 0..ROUNDS {
            let random =
                Stream::new(self.seed, Purpose::Order, epoch.wrapping_mul(ROUNDS).wrapping_add(round));
            let word = u64::from(random.words(right as u32)[0]);
            (left, right) = (right, left ^ (word & mask));
        }
        (left << self.half) | right
    }
}

/// What is kept away from training, whatever the seed, to validate on.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Holdout {
    /// Nothing.
    Nothing,
    /// This share of the documents, spread by a hash of their numbers; of a text its end.
    Fraction(f64),
    /// As many documents from the end; of a text as many bytes.
    Last(u64),
}

impl Holdout {
    /// How many of `len` documents or bytes are kept; at least one of each side remains.
    ///
    /// # Errors
    /// [`Error::Config`] for a fraction outside of 0 to 1, [`Error::Data`] where either side is empty.
    pub(super) fn count(self, len: u64, what: &str) -> Result<u64> {
        let kept = match self {
            Holdout::Nothing => return Ok(0),
            Holdout::Last(n) => n,
            Holdout::Fraction(f) if f > 0.0 && f < 1.0 => ((len as f64 * f).round() as u64).max(1),
            Holdout::Fraction(f) => {
                return Err(Error::Config(format!("the validation fraction is {f}, not between 0 and 1")));
            }
        };
        if kept == 0 || kept >= len {
            return Err(Error::Data(format!(
                "{kept} of {len} {what} for validation leave one side empty; hold out less, or give more data"
            )));
        }
        Ok(kept)
    }

    /// Splits a source with an end into what is trained on and what is validated on.
    ///
    /// # Errors
    /// [`Error::Config`] for a fraction outside of 0 to 1; [`Error::Data`] where either side would be
    /// empty or the source has no end.
    pub fn split(self, source: Shared) -> Result<(Shared, Option<Shared>)> {
        let Some(len) = source.len() else {
            return Err(Error::Data(format!("{} has no end to hold out", source.describe())));
        };
        let kept = self.count(len, "documents")?;
        if kept == 0 {
            return Ok((source, None));
        }
        let mut indices: Vec<u64> = (0..len).collect();
        if matches!(self, Holdout::Fraction(_)) {
            let hash = |&i: &u64| Stream::new(0, Purpose::Order, i).words(0);
            indices.sort_by_cached_key(hash);
        }
        let mut validation = indices.split_off((len - kept) as usize);
        indices.sort_unstable();
        validation.sort_unstable();
        let train = Arc::new(Subset::new(source.clone(), indices));
        Ok((train, Some(Arc::new(Subset::new(source, validation)))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Document, Documents, Part, Source};

    #[test]
    fn an_epoch_visits_everything_once() {
        for len in [1, 2, 3, 4, 5, 16, 17, 100, 257, 1000] {
            let order = Order::new(9, len);
            let mut orders = Vec::new();
            for epoch in 0..3 {
                let visits: Vec<u64> = (0..len).map(|n| order.at(epoch * len + n)).collect();
                let mut sorted = visits.clone();
                sorted.sort_unstable();
                assert_eq!(sorted, (0..len).collect::<Vec<_>>());
                orders.push(visits);
            }
            assert!(len < 16 || (orders[0] != orders[1] && orders[1] != orders[2]));
        }
        assert_eq!(Order::new(9, 0).at(5), 0);
        for n in 0..100 {
            assert!(Order::new(9, u64::MAX).at(n) < u64::MAX);
        }
    }

    /// Every document is as likely as any other at every place: 4 sigma of a binomial.
    #[test]
    fn places_are_uniform() {
        let (len, trials) = (7, 7000);
        let mut counts = [[0; 7]; 7];
        for seed in 0..trials {
            for n in 0..len {
                counts[n as usize][Order::new(seed, len).at(n) as usize] += 1;
            }
        }
        let sigma = (trials as f64 * (1.0 / 7.0) * (6.0 / 7.0)).sqrt();
        for count in counts.as_flattened() {
            assert!((f64::from(*count) - 1000.0).abs() < 4.0 * sigma, "{counts:?}");
        }
    }

    fn numbers(n: u8) -> Shared {
        let number = |i| Document { parts: vec![Part::Text(vec![i])], stream: false };
        Arc::new(Documents::new((0..n).map(number).collect(), "numbers"))
    }

    fn all(source: &dyn Source) -> Vec<u8> {
        let one = |i| match &source.document(i).parts[0] {
            Part::Text(text) => text[0],
            Part::Image(_) => unreachable!(),
        };
        (0..source.len().unwrap()).map(one).collect()
    }

    #[test]
    fn holdout_splits_without_overlap() {
        let (train, validation) = Holdout::Last(3).split(numbers(10)).unwrap();
        assert_eq!(all(&*train), [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(all(&*validation.unwrap()), [7, 8, 9]);
        let (train, validation) = Holdout::Fraction(0.1).split(numbers(200)).unwrap();
        let (train, validation) = (all(&*train), all(&*validation.unwrap()));
        assert_eq!((train.len(), validation.len()), (180, 20));
        assert!(validation.iter().all(|i| !train.contains(i)));
        assert!(validation[0] < 60 && validation[19] > 140, "spread: {validation:?}");
        assert!(Holdout::Nothing.split(numbers(2)).unwrap().1.is_none());
        assert_eq!(all(&*Holdout::Fraction(0.01).split(numbers(2)).unwrap().1.unwrap()).len(), 1);
    }

    #[test]
    fn holdouts_that_leave_nothing_are_refused() {
        for (holdout, len) in [
            (Holdout::Last(0), 5),
            (Holdout::Last(5), 5),
            (Holdout::Fraction(0.5), 1),
            (Holdout::Fraction(0.0), 5),
            (Holdout::Fraction(1.0), 5),
            (Holdout::Fraction(f64::NAN), 5),
        ] {
            assert!(holdout.split(numbers(len)).is_err(), "{holdout:?} of {len}");
        }
    }
}
