//! The batches of the next step, packed on a thread of its own while a step runs.
use super::{Batch, Packer};
use crate::error::{Error, Result};
use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{Builder, JoinHandle},
};

/// Packs one step ahead. Batches arrive in the packer's order, whatever the threads do; dropped, it ends its thread.
#[derive(Debug)]
pub struct Prefetcher {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
    /// What was handed out last.
    current: Vec<Batch>,
}

/// The batches of a step and the visit behind them, or what became of the thread.
type Packed = std::result::Result<(Vec<Batch>, u64), String>;

/// Where the two threads meet.
#[derive(Debug, Default)]
struct Desk {
    on_it: Mutex<OnIt>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct OnIt {
    /// Batches to be packed anew.
    empty: Option<Vec<Batch>>,
    packed: Option<Packed>,
    closed: bool,
}

impl Desk {
    fn look(&self) -> MutexGuard<'_, OnIt> {
        self.on_it.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `find` finds, as soon as it does.
    fn wait<R>(&self, mut find: impl FnMut(&mut OnIt) -> Option<R>) -> R {
        let mut on_it = self.look();
        loop {
            if let Some(found) = find(&mut on_it) {
                self.changed.notify_all();
                return found;
            }
            on_it = self.changed.wait(on_it).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn put(&self, change: impl FnOnce(&mut OnIt)) {
        change(&mut self.look());
        self.changed.notify_all();
    }
}

impl Prefetcher {
    /// Goes on where `packer` stands, with so many micro-batches to a step. `coefficients` as in [`Packer::fill`].
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(
        mut packer: Packer,
        micro_batches: usize,
        coefficients: impl Fn(f32) -> [f32; 4] + Send + 'static,
    ) -> Result<Prefetcher> {
        let empty = || vec![Batch::new(packer.geometry); micro_batches];
        let (current, desk) = (empty(), Arc::new(Desk::default()));
        desk.look().empty = Some(empty());
        let theirs = desk.clone();
        let work = move || {
            // An empty desk that is closed ends it.
            let next =
                |on_it: &mut OnIt| if on_it.closed { Some(None) } else { on_it.empty.take().map(Some) };
            while let Some(mut batches) = theirs.wait(next) {
                let fill = || batches.iter_mut().for_each(|batch| packer.fill(batch, &coefficients));
                let filled = catch_unwind(AssertUnwindSafe(fill));
                let packed = filled.map(|()| (batches, packer.cursor())).map_err(|panic| fallen(&*panic));
                let fell = packed.is_err();
                theirs.put(|on_it| on_it.packed = Some(packed));
                if fell {
                    return;
                }
            }
        };
        let thread = Builder::new().name("transfusion-data".into()).spawn(work);
        let thread = thread
            .map_err(|e| Error::Training(format!("the thread that packs batches cannot start: {e}")))?;
        Ok(Prefetcher { desk, thread: Some(thread), current })
    }

    /// The batches of the next step, and the visit that the step behind it begins with. Packing of that one begins.
    ///
    /// # Errors
    /// If the source of the documents panicked over these.
    pub fn advance(&mut self) -> Result<(&[Batch], u64)> {
        let current = &mut self.current;
        let cursor = self.desk.wait(|on_it| match on_it.packed.take()? {
            Ok((batches, cursor)) => {
                on_it.empty = Some(std::mem::replace(current, batches));
                Some(Ok(cursor))
            }
            Err(why) => {
                on_it.packed = Some(Err(why.clone()));
                Some(Err(Error::Data(why)))
            }
        })?;
        Ok((&self.current, cursor))
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        self.desk.put(|on_it| on_it.closed = true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What a panic said.
fn fallen(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    format!("the source of the documents panicked: {}", text.unwrap_or("it did not say why"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        batch::{Geometry, PackOptions, Tokens},
        data::{Document, Part, Source},
    };
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        time::{Duration, Instant},
    };

    const GEOMETRY: Geometry =
        Geometry { rows: 2, positions: 16, text_rows: 32, images: 0, resolution: 8, patch: 8, channels: 3 };

    /// Letters, of which number `fall` panics; counts what it was asked for.
    struct Letters {
        fall: u64,
        asked: AtomicU64,
    }

    impl Source for Letters {
        fn len(&self) -> Option<u64> {
            None
        }
        fn document(&self, index: u64) -> Document {
            self.asked.fetch_add(1, Ordering::Relaxed);
            assert!(index < self.fall, "there is no letter {index}");
            let text = vec![b'a' + (index % 26) as u8; 1 + (index % 7) as usize];
            Document { parts: vec![Part::Text(text)], stream: false }
        }
        fn describe(&self) -> String {
            "letters".into()
        }
    }

    fn letters(fall: u64) -> Arc<Letters> {
        Arc::new(Letters { fall, asked: AtomicU64::new(0) })
    }

    fn packer(source: &Arc<Letters>) -> Packer {
        Packer::new(source.clone(), Tokens::behind(256), GEOMETRY, PackOptions::default(), 3).unwrap()
    }

    fn start(packer: Packer) -> Prefetcher {
        Prefetcher::start(packer, 3, |_| [0.0; 4]).unwrap()
    }

    /// Every step of a packer on this thread: its batches, and the visit behind them.
    fn steps(mut packer: Packer) -> impl Iterator<Item = (Vec<Batch>, u64)> {
        std::iter::repeat_with(move || {
            let mut batches = vec![Batch::new(GEOMETRY); 3];
            batches.iter_mut().for_each(|b| packer.fill(b, &|_| [0.0; 4]));
            (batches, packer.cursor())
        })
    }

    #[test]
    fn batches_arrive_as_if_packed_when_they_are_needed() {
        let source = letters(u64::MAX);
        let mut ahead = start(packer(&source));
        let mut stops = vec![0];
        for (i, (want, behind)) in steps(packer(&source)).take(12).enumerate() {
            // Sometimes the packing is waited for, sometimes it waits.
            std::thread::sleep(Duration::from_millis(i as u64 % 3));
            let (have, cursor) = ahead.advance().unwrap();
            assert!(have == want && cursor == behind, "step {i}");
            stops.push(cursor);
        }
        // From the visit behind any step it goes on with the next.
        for (i, at) in stops.iter().enumerate().skip(1) {
            let mut resumed = packer(&source);
            resumed.seek(*at);
            let (want, _) = steps(packer(&source)).nth(i).unwrap();
            assert!(start(resumed).advance().unwrap().0 == want, "resumed behind step {i}");
        }
    }

    #[test]
    fn the_next_step_is_packed_while_one_runs() {
        let [source, alone] = [letters(u64::MAX), letters(u64::MAX)];
        steps(packer(&alone)).next();
        let of_one_step = alone.asked.load(Ordering::Relaxed);
        let mut ahead = start(packer(&source));
        ahead.advance().unwrap();
        let since = Instant::now();
        while source.asked.load(Ordering::Relaxed) <= of_one_step {
            assert!(since.elapsed() < Duration::from_secs(60), "nothing is packed ahead");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_source_that_panics_is_an_error_of_the_step_that_needs_it() {
        let source = letters(40);
        let all = steps(packer(&letters(u64::MAX)));
        let sound = all.take_while(|(_, behind)| *behind < 40).count();
        assert!(sound > 1);
        let mut ahead = start(packer(&source));
        for step in 0..sound {
            ahead.advance().unwrap_or_else(|e| panic!("step {step}: {e}"));
        }
        for _ in 0..2 {
            let why = ahead.advance().unwrap_err().to_string();
            assert!(why.contains("panicked: there is no letter 40"), "{why}");
        }
    }

    #[test]
    fn dropped_it_leaves_no_thread() {
        for advances in 0..3 {
            let source = letters(if advances == 2 { 5 } else { u64::MAX });
            let mut ahead = start(packer(&source));
            for _ in 0..advances {
                let _ = ahead.advance();
            }
            drop(ahead);
            assert_eq!(Arc::strong_count(&source), 1, "after {advances} steps");
        }
    }
}
