//! Which sectors of global memory a launch touches at all.

use std::collections::HashMap;

/// Bytes of a sector.
const SECTOR: u64 = 32;
/// Words of a page, each of 64 sectors.
const WORDS: usize = 64;

/// A set of sectors, a bit each, in pages.
#[derive(Default)]
pub(crate) struct Sectors {
    places: HashMap<u64, usize>,
    pages: Vec<[u64; WORDS]>,
    /// The last page that was asked for, and its place.
    last: Option<(u64, usize)>,
}

impl Sectors {
    fn page(&mut self, number: u64) -> &mut [u64; WORDS] {
        let place = match self.last {
            Some((last, place)) if last == number => place,
            _ => *self.places.entry(number).or_insert_with(|| {
                self.pages.push([0; WORDS]);
                self.pages.len() - 1
            }),
        };
        self.last = Some((number, place));
        &mut self.pages[place]
    }

    /// Those that `bytes` bytes from `address` on lie in.
    pub(crate) fn mark(&mut self, address: u64, bytes: u64) {
        for sector in address / SECTOR..(address + bytes).div_ceil(SECTOR) {
            let (word, bit) = (sector / 64, sector % 64);
            self.page(word / WORDS as u64)[word as usize % WORDS] |= 1 << bit;
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (&number, &place) in &other.places {
            self.page(number).iter_mut().zip(&other.pages[place]).for_each(|(a, b)| *a |= b);
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.pages.iter().flatten().map(|word| u64::from(word.count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_counts_once() {
        let mut some = Sectors::default();
        some.mark(31, 2);
        some.mark(0, 64);
        some.mark(1 << 40, 1);
        some.mark(64, 0);
        assert_eq!(some.count(), 3);
        let mut others = Sectors::default();
        others.mark(40, 4);
        others.mark(WORDS as u64 * 64 * SECTOR - 1, 2);
        some.add(&others);
        assert_eq!(some.count(), 5);
    }
}
