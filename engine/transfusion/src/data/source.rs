//! A source of documents, and sources made of other sources.
use super::order::Order;
use crate::picture::Picture;
use std::sync::Arc;

/// A piece of a document.
#[derive(Clone, PartialEq, Debug)]
pub enum Part {
    /// Text, as bytes.
    Text(Vec<u8>),
    /// A picture.
    Image(Arc<Picture>),
}

/// Text and pictures in reading order.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct Document {
    /// The pieces.
    pub parts: Vec<Part>,
    /// Whether this is a window of a longer text, which neither begins nor ends here.
    pub stream: bool,
}

/// Numbered documents.
pub trait Source: Send + Sync {
    /// How many documents there are; `None` where there is no end to them.
    fn len(&self) -> Option<u64>;

    /// Document `index`, always the same one; beyond the end the numbers start over.
    fn document(&self, index: u64) -> Document;

    /// What this is, for a person.
    fn describe(&self) -> String;

    /// Whether there is no document at all.
    fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }
}

/// A source as it is handed around.
pub type Shared = Arc<dyn Source>;

/// Documents held in memory.
pub struct Documents {
    documents: Vec<Document>,
    name: String,
}

impl Documents {
    /// The documents of `name`.
    pub fn new(documents: Vec<Document>, name: impl Into<String>) -> Documents {
        Documents { documents, name: name.into() }
    }
}

impl Source for Documents {
    fn len(&self) -> Option<u64> {
        Some(self.documents.len() as u64)
    }

    fn document(&self, index: u64) -> Document {
        let at = index.checked_rem(self.documents.len() as u64).unwrap_or(0);
        self.documents.get(at as usize).cloned().unwrap_or_default()
    }

    fn describe(&self) -> String {
        format!("{} documents of {}", self.documents.len(), self.name)
    }
}

/// Some documents of a source, in a given order.
pub struct Subset {
    source: Shared,
    indices: Vec<u64>,
}

impl Subset {
    /// The documents of `source` that `indices` name.
    pub fn new(source: Shared, indices: Vec<u64>) -> Subset {
        Subset { source, indices }
    }
}

impl Source for Subset {
    fn len(&self) -> Option<u64> {
        Some(self.indices.len() as u64)
    }

    fn document(&self, index: u64) -> Document {
        let at = index.checked_rem(self.indices.len() as u64).unwrap_or(0);
        self.indices.get(at as usize).map(|&i| self.source.document(i)).unwrap_or_default()
    }

    fn describe(&self) -> String {
        format!("{} of {}", self.indices.len(), self.source.describe())
    }
}

/// Several sources as one. Sources with an end are joined, so that each of their documents is as
/// likely as any other. Where there are sources without end, they and the joined ones take turns.
pub struct Mixture {
    endless: Vec<Shared>,
    joined: Vec<Shared>,
    /// Where each joined source ends.
    ends: Vec<u64>,
    order: Order,
}

impl Mixture {
    /// The mixture of `sources`; `seed` shuffles what is joined where it takes turns with others.
    pub fn new(sources: Vec<Shared>, seed: u64) -> Mixture {
        let (endless, joined): (Vec<_>, Vec<_>) = sources.into_iter().partition(|s| s.len().is_none());
        let lengths = joined.iter().filter_map(|s| s.len());
        let ends: Vec<u64> = lengths
            .scan(0u64, |end, n| {
                *end += n;
                Some(*end)
            })
            .collect();
        let order = Order::new(seed, ends.last().copied().unwrap_or(0));
        Mixture { endless, joined, ends, order }
    }

    fn joined_document(&self, index: u64) -> Document {
        let index = index.checked_rem(self.order.len()).unwrap_or(0);
        let which = self.ends.partition_point(|&end| end <= index);
        let start = which.checked_sub(1).map_or(0, |before| self.ends[before]);
        self.joined.get(which).map(|s| s.document(index - start)).unwrap_or_default()
    }
}

impl Source for Mixture {
    fn len(&self) -> Option<u64> {
        self.endless.is_empty().then_some(self.order.len())
    }

    fn document(&self, index: u64) -> Document {
        let turns = (self.endless.len() + usize::from(!self.order.is_empty())) as u64;
        match self.endless.get(index.checked_rem(turns).unwrap_or(0) as usize) {
            Some(source) => source.document(index / turns),
            None if self.endless.is_empty() => self.joined_document(index),
            None => self.joined_document(self.order.at(index / turns)),
        }
    }

    fn describe(&self) -> String {
        let all = self.endless.iter().chain(&self.joined);
        all.map(|s| s.describe()).collect::<Vec<_>>().join(" + ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letters(text: &str) -> Shared {
        let letter = |b: u8| Document { parts: vec![Part::Text(vec![b])], stream: false };
        Arc::new(Documents::new(text.bytes().map(letter).collect(), "letters"))
    }

    /// The letters of one source, over and over.
    struct Endless(Shared);

    impl Source for Endless {
        fn len(&self) -> Option<u64> {
            None
        }
        fn document(&self, index: u64) -> Document {
            self.0.document(index)
        }
        fn describe(&self) -> String {
            "endless".into()
        }
    }

    fn spell(source: &dyn Source, count: u64) -> String {
        let letter = |i| match &source.document(i).parts[..] {
            [Part::Text(text)] => text[0] as char,
            other => panic!("{other:?}"),
        };
        (0..count).map(letter).collect()
    }

    #[test]
    fn finite_sources_are_joined() {
        let mixture = Mixture::new(vec![letters("abc"), letters(""), letters("de")], 1);
        assert_eq!(mixture.len(), Some(5));
        assert_eq!(spell(&mixture, 7), "abcdeab");
        assert_eq!(
            mixture.describe(),
            "3 documents of letters + 0 documents of letters + 2 documents of letters"
        );
    }

    #[test]
    fn endless_sources_take_turns_with_the_joined_ones() {
        let sources = vec![letters("abc"), Arc::new(Endless(letters("XYZ"))), letters("de")];
        let mixture = Mixture::new(sources, 1);
        assert_eq!(mixture.len(), None);
        let text = spell(&mixture, 20);
        let (even, odd): (Vec<_>, Vec<_>) = text.char_indices().partition(|(i, _)| i % 2 == 0);
        assert_eq!(even.into_iter().map(|(_, c)| c).collect::<String>(), "XYZXYZXYZX");
        for epoch in odd.chunks(5) {
            let mut seen: Vec<char> = epoch.iter().map(|&(_, c)| c).collect();
            seen.sort_unstable();
            assert_eq!(seen.into_iter().collect::<String>(), "abcde");
        }
    }

    #[test]
    fn empty_sources_give_empty_documents() {
        for source in [Mixture::new(vec![], 0), Mixture::new(vec![letters("")], 0)] {
            assert!(source.is_empty());
            assert_eq!(source.document(3), Document::default());
        }
        let subset = Subset::new(letters("abc"), vec![2, 0]);
        assert_eq!(spell(&subset, 3), "cac");
        assert_eq!(Subset::new(letters("abc"), vec![]).document(0), Document::default());
    }
}
