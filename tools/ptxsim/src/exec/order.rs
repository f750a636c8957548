//! Order between blocks: what they tell each other through words in global memory.
//!
//! A block counts epochs; each ends when the block publishes what it did so far, by a release or a fence. A word keeps
//! what was released to it, and who acquires the word knows of it. A write is known if its epoch was published. All
//! threads of a block, or of a cluster, count as one: barriers between them are their own concern.

use super::Machine;
use std::collections::HashMap;
use std::sync::Mutex;

/// The epoch of a bulk store that is not done: nobody knows of it.
pub(crate) const UNDER_WAY: u32 = u32::MAX;

/// How many epochs of each cluster are known.
#[derive(Clone, Default)]
pub(crate) struct Seen(HashMap<u32, u32>);

impl Seen {
    /// Whether what a cluster wrote in this epoch is known.
    pub(crate) fn knows(&self, cluster: u32, epoch: u32) -> bool {
        self.0.get(&cluster).is_some_and(|&epochs| epoch < epochs)
    }

    fn join(&mut self, other: &Seen) {
        for (&cluster, &epochs) in &other.0 {
            let mine = self.0.entry(cluster).or_default();
            *mine = (*mine).max(epochs);
        }
    }
}

/// What was released to words of global memory, by where they lie.
#[derive(Default)]
pub(crate) struct Words(Mutex<HashMap<usize, Seen>>);

impl Words {
    fn with<T>(&self, f: impl FnOnce(&mut HashMap<usize, Seen>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

/// Where a cluster stands; kept in its first block.
#[derive(Default)]
pub(crate) struct Standing {
    pub(crate) epoch: u32,
    pub(crate) seen: Seen,
    /// What relaxed loads have found, for the next fence.
    heard: Seen,
    /// What the last fence published, for relaxed stores.
    fenced: Seen,
}

impl Standing {
    /// Ends an epoch; returns all that is known.
    fn publish(&mut self, cluster: u32) -> Seen {
        self.epoch += 1;
        self.seen.0.insert(cluster, self.epoch);
        self.seen.clone()
    }
}

impl Machine<'_> {
    /// Before a word is written that other blocks may wait for; `strong` where that is a release.
    pub(crate) fn release(&mut self, word: *const u8, strong: bool) {
        let cluster = self.ctas[0].cluster;
        let standing = &mut self.ctas[0].standing;
        let told = if strong { standing.publish(cluster) } else { standing.fenced.clone() };
        if !told.0.is_empty() {
            self.run.words.with(|words| words.entry(word as usize).or_default().join(&told));
        }
    }

    /// After a word was read that other blocks may have written; `strong` where that is an acquire.
    pub(crate) fn acquire(&mut self, word: *const u8, strong: bool) {
        let standing = &mut self.ctas[0].standing;
        let to = if strong { &mut standing.seen } else { &mut standing.heard };
        self.run.words.with(|words| words.get(&(word as usize)).into_iter().for_each(|told| to.join(told)));
    }

    /// A fence of the device: makes what was heard known, and what is known ready to be told.
    pub(crate) fn fence(&mut self) {
        let cluster = self.ctas[0].cluster;
        let standing = &mut self.ctas[0].standing;
        let heard = std::mem::take(&mut standing.heard);
        standing.seen.join(&heard);
        standing.fenced = standing.publish(cluster);
    }
}
