//! Sampling: the paper's loop over one cache. Text until BOI; then noise is appended and denoised in
//! place; a pass over the clean image commits its keys and values; EOI; text again.
//!
//! Several sequences advance together, grouped by what each needs next. Every random number is keyed
//! by the seed and the sequence, so what a sequence yields does not depend on its company.
use crate::{
    batch::Tokens,
    config::Objective,
    data::Part,
    diffusion::{self, Sampler},
    engine::{Engine, Program, no_images},
    error::{Error, Result},
    model::{Extend, ImagePass},
    picture::Picture,
    train::seed_words,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use transfusion_core::{
    device::Place,
    op::Kind,
    ops::SamplerStep,
    random::{Purpose, Stream, halves},
    tensor::{View, ViewMut},
};

/// What is wanted after the prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    /// One image.
    Image,
    /// Text up to the end of the document.
    Text,
    /// Whatever the model chooses, up to the end of the document.
    #[default]
    Any,
}

/// How to sample.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleOptions {
    /// What is wanted.
    pub goal: Goal,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale; 1 is none.
    pub guidance: f32,
    /// How images are denoised.
    pub sampler: Sampler,
    /// The implied clean image is clipped to plus or minus this.
    pub clip: f32,
    /// Noise level to start from; 1000 is all but noise.
    pub start: f32,
    /// Softens (above 1) or sharpens (below 1) the choice of tokens; 0 always takes the likeliest.
    pub temperature: f32,
    /// Only the likeliest so many tokens; 0 is all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability.
    pub top_p: f32,
    /// Most text tokens after the prompt.
    pub max_text: usize,
    /// Most images after the prompt.
    pub max_images: usize,
    /// Of all random numbers.
    pub seed: u64,
}

impl Default for SampleOptions {
    fn default() -> SampleOptions {
        SampleOptions {
            goal: Goal::Any,
            steps: 50,
            guidance: 3.0,
            sampler: Sampler::Ddim,
            clip: 1.0,
            start: diffusion::STEPS as f32,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            max_text: 256,
            max_images: 4,
            seed: 0,
        }
    }
}

impl SampleOptions {
    /// Refuses what cannot be sampled with.
    ///
    /// # Errors
    /// Names the option, its value and what is allowed.
    pub fn check(&self, objective: Option<Objective>) -> Result<()> {
        let refuse = |what: String| Err(Error::Config(what));
        if self.steps == 0 || self.steps > 10_000 {
            return refuse(format!("steps is {}; it must be between 1 and 10000", self.steps));
        }
        for (name, value, high) in
            [("max_text", self.max_text, 1 << 20), ("max_images", self.max_images, 1024)]
        {
            if value > high {
                return refuse(format!("{name} is {value}; it must be at most {high}"));
            }
        }
        for (name, value, high) in [
            ("guidance", self.guidance, 1e4),
            ("temperature", self.temperature, 1e4),
            ("top_p", self.top_p, 1.0),
            ("start", self.start, diffusion::STEPS as f32),
        ] {
            if !(0.0..=high).contains(&value) {
                return refuse(format!("{name} is {value}; it must be between 0 and {high}"));
            }
        }
        match objective {
            Some(o) if !self.sampler.serves(o) => {
                let name = |s: Sampler| Sampler::ALL.iter().find(|(_, x)| *x == s).map_or("?", |(n, _)| n);
                let fit: Vec<&str> =
                    Sampler::ALL.iter().filter(|(_, s)| s.serves(o)).map(|(n, _)| *n).collect();
                let fit = fit.join(", ");
                refuse(format!("sampler {} does not serve objective {o:?}; use {fit}", name(self.sampler)))
            }
            _ => Ok(()),
        }
    }
}

/// What happens while sampling.
#[derive(Clone, Debug)]
pub enum Event {
    /// A sequence got a token.
    Token {
        /// Which sequence.
        sequence: usize,
        /// The token.
        token: i32,
    },
    /// The images being denoised took a step.
    Denoised {
        /// Steps done.
        step: usize,
        /// Of so many.
        of: usize,
    },
    /// A sequence got an image.
    Image {
        /// Which sequence.
        sequence: usize,
    },
}

/// A program that was asked to stop says so with [`Error::Cancelled`].
#[derive(Clone, Copy, Debug)]
pub struct Cancel<'a>(pub Option<&'a AtomicBool>);

impl Cancel<'_> {
    /// # Errors
    /// [`Error::Cancelled`] once the flag is set.
    pub fn check(self) -> Result<()> {
        match self.0 {
            Some(flag) if flag.load(Ordering::Relaxed) => Err(Error::Cancelled),
            _ => Ok(()),
        }
    }
}

/// Continues every prompt; what follows each, in order. `observe` sees what happens, and a set
/// `cancel` flag ends it with [`Error::Cancelled`].
///
/// # Errors
/// If an option makes no sense for this model, a prompt holds a picture of another size, or the device
/// fails.
pub fn sample(
    engine: &mut Engine,
    prompts: &[Vec<Part>],
    options: &SampleOptions,
    observe: &mut dyn FnMut(Event),
    cancel: Cancel<'_>,
) -> Result<Vec<Vec<Part>>> {
    options.check(engine.config().image().map(|i| i.objective))?;
    if prompts.is_empty() {
        return Ok(vec![]);
    }
    let mut run = Run::new(engine, prompts, options, observe, cancel)?;
    let done = run.all();
    run.engine.close_sampling();
    done?;
    Ok(run.sequences.into_iter().map(Sequence::finish).collect())
}

/// Something that goes into the cache.
#[derive(Clone, Debug)]
enum Item {
    Token(i32),
    Image(Arc<Picture>),
}

/// What a sequence does once its pending items are cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Text,
    Image,
    Done,
}

struct Sequence {
    pending: VecDeque<Item>,
    mode: Mode,
    /// Positions used in its slot.
    length: usize,
    parts: Vec<Part>,
    text: Vec<u8>,
    tokens: usize,
    images: usize,
}

impl Sequence {
    fn end_text(&mut self) {
        if !self.text.is_empty() {
            self.parts.push(Part::Text(std::mem::take(&mut self.text)));
        }
    }

    fn finish(mut self) -> Vec<Part> {
        self.end_text();
        self.parts
    }
}

struct Run<'a> {
    engine: &'a mut Engine,
    options: &'a SampleOptions,
    observe: &'a mut dyn FnMut(Event),
    cancel: Cancel<'a>,
    tokens: Tokens,
    sequences: Vec<Sequence>,
    /// Patches of an image, its side, its channels; zero in a model of text alone.
    patches: usize,
    side: usize,
    channels: usize,
    /// Text tokens end here: ids beyond are not text.
    bytes: i32,
    capacity: usize,
    kept: Kept,
}

/// What steps write and read, kept from one to the next.
#[derive(Default)]
struct Kept {
    /// The sequences of the step.
    chosen: Vec<usize>,
    rows: Vec<TextRow>,
    /// The tokens of the rows, one row behind the other.
    tokens: Vec<i32>,
    ids: Vec<i32>,
    positions: Vec<i32>,
    row_end: Vec<i32>,
    slots: Vec<i32>,
    last: Vec<i32>,
    logits: Vec<f32>,
    ranked: Vec<(i32, f32)>,
}

impl<'a> Run<'a> {
    fn new(
        engine: &'a mut Engine,
        prompts: &[Vec<Part>],
        options: &'a SampleOptions,
        observe: &'a mut dyn FnMut(Event),
        cancel: Cancel<'a>,
    ) -> Result<Run<'a>> {
        let config = engine.config();
        let tokens = config.tokens();
        let (patches, side, channels) =
            config.image().map_or((0, 0, 0), |i| (i.patches(), i.size, i.channels));
        let wants_images = options.goal == Goal::Image || prompts.iter().flatten().any(is_image);
        if wants_images && patches == 0 {
            return Err(no_images());
        }
        if patches > 0 && channels != 3 {
            return Err(Error::Config(format!(
                "this model draws latents of {channels} channels; pictures need image.channels 3"
            )));
        }
        let sequences: Vec<Sequence> =
            prompts.iter().map(|parts| prompt(parts, options, tokens, side)).collect::<Result<_>>()?;
        let longest = sequences.iter().map(|s| cached_length(&s.pending, patches)).max().unwrap_or(0);
        let room = config.max_position_embeddings;
        if longest > room {
            return Err(Error::Data(format!(
                "a prompt takes {longest} positions, and this model is meant for {room}; shorten it"
            )));
        }
        let new_images = match options.goal {
            Goal::Text => 0,
            Goal::Image => 1,
            Goal::Any => options.max_images.max(1),
        };
        let new_text = if options.goal == Goal::Image { 0 } else { options.max_text };
        let capacity = (longest + new_text + new_images * (patches + 2) + 2).max(patches + 2);
        let bytes = 256.min(config.vocab_size as i32);
        Ok(Run {
            engine,
            options,
            observe,
            cancel,
            tokens,
            sequences,
            patches,
            side,
            channels,
            bytes,
            capacity: capacity.next_multiple_of(16),
            kept: Kept::default(),
        })
    }

    /// Until every sequence is done.
    fn all(&mut self) -> Result<()> {
        let mut chosen = std::mem::take(&mut self.kept.chosen);
        loop {
            self.cancel.check()?;
            if self.select(&mut chosen, |s| matches!(s.pending.front(), Some(Item::Token(_)))) {
                self.extend_text(&chosen)?;
            } else if self.select(&mut chosen, |s| matches!(s.pending.front(), Some(Item::Image(_)))) {
                self.commit(&chosen)?;
            } else if self.select(&mut chosen, |s| s.pending.is_empty() && s.mode == Mode::Image) {
                self.draw(&chosen)?;
            } else {
                return Ok(());
            }
        }
    }

    /// The sequences that are not done and of which `what` holds; whether there is one.
    fn select(&self, chosen: &mut Vec<usize>, what: impl Fn(&Sequence) -> bool) -> bool {
        chosen.clear();
        let all = self.sequences.iter().enumerate();
        chosen.extend(all.filter(|(_, s)| s.mode != Mode::Done && what(s)).map(|(i, _)| i));
        !chosen.is_empty()
    }

    fn guided(&self) -> bool {
        self.options.guidance != 1.0
    }

    fn extend(&self, rows: usize, positions: usize) -> Extend {
        let slots = self.sequences.len() * if self.guided() { 2 } else { 1 };
        Extend {
            rows: rows.next_power_of_two(),
            positions: positions.next_power_of_two(),
            slots,
            capacity: self.capacity,
            ema: self.engine.has_ema(),
        }
    }

    /// Caches the text at the front of these sequences and lets those that have nothing more pending
    /// choose their next token.
    fn extend_text(&mut self, chosen: &[usize]) -> Result<()> {
        const LONGEST: usize = 128;
        let Kept { rows, tokens, .. } = &mut self.kept;
        rows.clear();
        tokens.clear();
        for &i in chosen {
            let (s, first) = (&mut self.sequences[i], tokens.len());
            while let (Some(Item::Token(t)), true) = (s.pending.front(), tokens.len() - first < LONGEST) {
                tokens.push(*t);
                s.pending.pop_front();
            }
            rows.push(TextRow { slot: i, at: s.length, tokens: first..tokens.len() });
            s.length += tokens.len() - first;
        }
        self.run_text()?;
        let vocabulary = self.engine.config().vocab_size;
        let logits = std::mem::take(&mut self.kept.logits);
        for (row, logits) in chosen.iter().zip(logits.chunks(vocabulary)) {
            let s = &self.sequences[*row];
            if s.pending.is_empty() && s.mode == Mode::Text {
                self.choose(*row, logits);
            }
        }
        self.kept.logits = logits;
        Ok(())
    }

    /// Runs the text program over the kept rows of tokens; leaves the logits after each row's last token.
    fn run_text(&mut self) -> Result<()> {
        let longest = self.kept.rows.iter().map(|r| r.tokens.len()).max().unwrap_or(1);
        let e = self.extend(self.kept.rows.len(), longest);
        let n = e.rows * e.positions;
        let Kept { rows, tokens, ids, positions, row_end, slots, last, logits, .. } = &mut self.kept;
        [&mut *ids, &mut *positions].into_iter().for_each(|all| refill(all, n, -1));
        [&mut *slots, &mut *last].into_iter().for_each(|all| refill(all, e.rows, -1));
        refill(row_end, n, 0);
        for (r, row) in rows.iter().enumerate() {
            slots[r] = row.slot as i32;
            last[r] = (r * e.positions + row.tokens.len() - 1) as i32;
            for (j, id) in tokens[row.tokens.clone()].iter().enumerate() {
                let at = r * e.positions + j;
                ids[at] = *id;
                positions[at] = (row.at + j) as i32;
                row_end[at] = positions[at] + 1;
            }
        }
        let plan = self.engine.open(Program::Text(e))?;
        for (name, values) in [
            ("tokens", ids),
            ("positions", positions),
            ("row_end", row_end),
            ("slots", slots),
            ("last", last),
        ] {
            self.engine.ints(plan, name, values)?;
        }
        self.engine.run(plan)?;
        refill(logits, e.rows * self.engine.config().vocab_size, 0.0);
        self.engine.output(plan, "logits", logits)
    }

    /// A sequence's next token, and what follows from it.
    fn choose(&mut self, i: usize, logits: &[f32]) {
        let t = self.tokens;
        let images_left = self.sequences[i].images < self.options.max_images && self.patches > 0;
        let may_draw = self.options.goal == Goal::Any && images_left;
        let allowed = |id: i32| id < self.bytes || id == t.eos || (id == t.boi && may_draw);
        let stream = Stream::new(self.options.seed, Purpose::Token, i as u64);
        let s = &mut self.sequences[i];
        let u = stream.uniform(s.tokens as u32);
        let Some(token) = pick(logits, allowed, self.options, u, &mut self.kept.ranked) else {
            s.mode = Mode::Done;
            return;
        };
        s.tokens += 1;
        if token == t.eos {
            s.mode = Mode::Done;
        } else if token == t.boi {
            s.end_text();
            s.mode = Mode::Image;
            s.pending.push_back(Item::Token(token));
        } else {
            s.text.push(token as u8);
            s.pending.push_back(Item::Token(token));
            if s.tokens >= self.options.max_text {
                s.mode = Mode::Done;
            }
        }
        (self.observe)(Event::Token { sequence: i, token });
    }

    /// Caches the clean pictures at the front of these sequences.
    fn commit(&mut self, chosen: &[usize]) -> Result<()> {
        let numel = self.side * self.side * self.channels;
        let rows: Vec<(usize, usize)> = chosen.iter().map(|&i| (i, self.sequences[i].length)).collect();
        let e = self.extend(rows.len(), self.patches);
        let mut pictures = vec![0.0; e.rows * numel];
        for (&i, into) in chosen.iter().zip(pictures.chunks_mut(numel)) {
            if let Some(Item::Image(picture)) = self.sequences[i].pending.pop_front() {
                picture.to_unit(into);
            }
            self.sequences[i].length += self.patches;
        }
        let plan = self.open_images(e, ImagePass::Commit, e.rows, &rows)?;
        self.write_state("picture", e.rows, &pictures)?;
        self.engine.floats(plan, "times", &vec![0.0; e.rows])?;
        self.engine.run(plan)
    }

    /// Draws an image at the end of these sequences and leaves it pending, to be committed.
    fn draw(&mut self, chosen: &[usize]) -> Result<()> {
        let numel = self.side * self.side * self.channels;
        let images = chosen.len().next_power_of_two();
        let rows = self.rows_to_denoise(chosen, images)?;
        let e = self.extend(rows.len(), self.patches);
        let guided = self.guided();
        let plan = self.open_images(e, ImagePass::Denoise { guided }, images, &rows)?;
        let objective = self.engine.config().image().map_or(Objective::X0, |i| i.objective);
        let o = self.options;
        let [_, start, ..] = diffusion::coefficients(objective, o.start);
        let mut x = vec![0.0; images * numel];
        for (&i, x) in chosen.iter().zip(x.chunks_mut(numel)) {
            let first = (self.sequences[i].images * numel.next_multiple_of(4)) as u32;
            Stream::new(o.seed, Purpose::Noise, i as u64).fill_normal(first, x);
            x.iter_mut().for_each(|x| *x *= start);
        }
        self.write_state("picture", images, &x)?;
        self.write_state("memory", images, &vec![0.0; images * numel])?;
        self.engine.ints(plan, "seed", &seed_words(o.seed))?;
        let all = diffusion::evaluations(o.sampler, objective, o.steps, o.guidance, o.clip, o.start);
        let (mut keys, mut times) = (vec![[0; 3]; images], vec![0.0; e.rows]);
        let mut rows = vec![[0.0; SamplerStep::WIDTH]; images];
        for (step, evaluation) in all.iter().enumerate() {
            self.cancel.check()?;
            for (r, key) in keys.iter_mut().enumerate() {
                let i = chosen.get(r).copied().unwrap_or(0);
                let drawn = self.sequences[i].images as u64;
                let [low, high] = halves(i as u64 | drawn << 40).map(u32::cast_signed);
                *key = [low, high, step as i32];
            }
            times.fill(evaluation.t);
            rows.fill(evaluation.step.row());
            self.engine.ints(plan, "keys", keys.as_flattened())?;
            self.engine.floats(plan, "times", &times)?;
            self.engine.floats(plan, "steps", rows.as_flattened())?;
            self.engine.run(plan)?;
            (self.observe)(Event::Denoised { step: step + 1, of: all.len() });
        }
        let name = state_name("picture", images);
        self.engine.device().read(Place::State(Kind::Cache, &name), ViewMut::F32(&mut x))?;
        for (&i, x) in chosen.iter().zip(x.chunks(numel)) {
            self.finish_image(i, x)?;
        }
        Ok(())
    }

    /// Slot and first position of every row: those of the sequences, then with guidance their twins
    /// without a condition, which hold BOS and BOI alone.
    fn rows_to_denoise(&mut self, chosen: &[usize], images: usize) -> Result<Vec<(usize, usize)>> {
        let mut rows: Vec<(usize, usize)> = chosen.iter().map(|&i| (i, self.sequences[i].length)).collect();
        if !self.guided() {
            return Ok(rows);
        }
        let n = self.sequences.len();
        self.kept.tokens = vec![self.tokens.bos, self.tokens.boi];
        self.kept.rows = chosen.iter().map(|&i| TextRow { slot: n + i, at: 0, tokens: 0..2 }).collect();
        self.run_text()?;
        rows.resize(images, (usize::MAX, 0));
        rows.extend(chosen.iter().map(|&i| (n + i, 2)));
        rows.resize(2 * images, (usize::MAX, 0));
        Ok(rows)
    }

    fn finish_image(&mut self, i: usize, x: &[f32]) -> Result<()> {
        let picture = Picture::from_unit(self.side, self.side, x)
            .ok_or_else(|| Error::Config("the image is no picture".into()))?;
        let picture = Arc::new(picture);
        let (goal, eoi) = (self.options.goal, self.tokens.eoi);
        let s = &mut self.sequences[i];
        s.parts.push(Part::Image(picture.clone()));
        s.images += 1;
        if goal == Goal::Image {
            s.mode = Mode::Done;
        } else {
            s.mode = Mode::Text;
            s.pending.extend([Item::Image(picture), Item::Token(eoi)]);
        }
        (self.observe)(Event::Image { sequence: i });
        Ok(())
    }

    /// Opens an image program and writes where its rows go: slot and first position of each; a slot
    /// that is none idles.
    fn open_images(
        &mut self,
        e: Extend,
        pass: ImagePass,
        images: usize,
        rows: &[(usize, usize)],
    ) -> Result<transfusion_core::device::PlanId> {
        let p = self.patches;
        let e = Extend { positions: p, ..e };
        let (mut slots, mut positions, mut row_end) =
            (vec![-1; e.rows], vec![-1; e.rows * p], vec![0; e.rows * p]);
        for (r, &(slot, at)) in rows.iter().enumerate().filter(|(_, (slot, _))| *slot != usize::MAX) {
            slots[r] = slot as i32;
            for j in 0..p {
                positions[r * p + j] = (at + j) as i32;
                row_end[r * p + j] = (at + p) as i32;
            }
        }
        let copies: Vec<i32> =
            (0..e.rows).flat_map(|r| (0..p).map(move |j| (r % images * p + j) as i32)).collect();
        let plan = self.engine.open(Program::Image(e, pass))?;
        for (name, values) in
            [("slots", &slots), ("positions", &positions), ("row_end", &row_end), ("copies", &copies)]
        {
            self.engine.ints(plan, name, values)?;
        }
        Ok(plan)
    }

    fn write_state(&mut self, what: &str, images: usize, values: &[f32]) -> Result<()> {
        let name = state_name(what, images);
        Ok(self.engine.device().write(Place::State(Kind::Cache, &name), View::F32(values))?)
    }
}

/// Some of the kept tokens, which go to a slot from a position on.
struct TextRow {
    slot: usize,
    at: usize,
    tokens: Range<usize>,
}

/// Makes a buffer `n` times `value`.
fn refill<T: Clone>(buffer: &mut Vec<T>, n: usize, value: T) {
    buffer.clear();
    buffer.resize(n, value);
}

/// The name of a state that holds images being drawn.
fn state_name(what: &str, images: usize) -> String {
    format!("{what}.{images}")
}

fn is_image(part: &Part) -> bool {
    matches!(part, Part::Image(_))
}

/// A prompt as items, and what follows it.
fn prompt(parts: &[Part], options: &SampleOptions, t: Tokens, side: usize) -> Result<Sequence> {
    let goal = options.goal;
    let mut pending = VecDeque::from([Item::Token(t.bos)]);
    for part in parts {
        match part {
            Part::Text(bytes) => pending.extend(bytes.iter().map(|b| Item::Token(i32::from(*b)))),
            Part::Image(picture) => {
                let (w, h) = (picture.width(), picture.height());
                if w != side || h != side {
                    return Err(Error::Data(format!(
                        "a prompt's picture is {w}x{h}; this model wants {side}x{side}"
                    )));
                }
                let image = Item::Image(picture.clone());
                pending.extend([Item::Token(t.boi), image, Item::Token(t.eoi)]);
            }
        }
    }
    let mode = if goal == Goal::Image { Mode::Image } else { Mode::Text };
    if goal == Goal::Image {
        pending.push_back(Item::Token(t.boi));
    }
    let text = Vec::with_capacity(if goal == Goal::Image { 0 } else { options.max_text });
    Ok(Sequence { pending, mode, length: 0, parts: vec![], text, tokens: 0, images: 0 })
}

/// Positions that pending items take in the cache.
fn cached_length(pending: &VecDeque<Item>, patches: usize) -> usize {
    pending.iter().map(|i| if matches!(i, Item::Image(_)) { patches } else { 1 }).sum()
}

/// The token for a uniform number `u`, among those allowed; none if nothing is allowed. `ranked` is room to work.
fn pick(
    logits: &[f32],
    allowed: impl Fn(i32) -> bool,
    o: &SampleOptions,
    u: f32,
    ranked: &mut Vec<(i32, f32)>,
) -> Option<i32> {
    ranked.clear();
    ranked.extend(logits.iter().enumerate().map(|(i, l)| (i as i32, *l)).filter(|(i, _)| allowed(*i)));
    ranked.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let best = ranked.first()?.1;
    if o.temperature == 0.0 {
        return ranked.first().map(|(i, _)| *i);
    }
    if o.top_k > 0 {
        ranked.truncate(o.top_k);
    }
    let weight = |l: f32| f64::from((l - best) / o.temperature).exp();
    let total: f64 = ranked.iter().map(|(_, l)| weight(*l)).sum();
    let mut kept = 0.0;
    let nucleus = ranked.iter().position(|(_, l)| {
        kept += weight(*l);
        kept >= total * f64::from(o.top_p)
    });
    ranked.truncate(nucleus.map_or(ranked.len(), |n| n + 1));
    let mut left = f64::from(u) * ranked.iter().map(|(_, l)| weight(*l)).sum::<f64>();
    let chosen = ranked.iter().find(|(_, l)| {
        left -= weight(*l);
        left < 0.0
    });
    chosen.or(ranked.last()).map(|(i, _)| *i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_picked_by_probability() {
        let logits = [1.0, 3.0, 2.0, f32::NEG_INFINITY];
        let o = SampleOptions::default();
        let any = |_| true;
        let pick =
            |allowed: &dyn Fn(i32) -> bool, o: &SampleOptions, u| pick(&logits, allowed, o, u, &mut vec![]);
        let greedy = SampleOptions { temperature: 0.0, ..o.clone() };
        assert_eq!(pick(&any, &greedy, 0.99), Some(1));
        assert_eq!(pick(&|i| i != 1, &greedy, 0.0), Some(2));
        assert_eq!(pick(&|_| false, &o, 0.5), None);
        let mut counts = [0; 4];
        (0..10_000).for_each(|i| counts[pick(&any, &o, i as f32 / 10_000.0).unwrap() as usize] += 1);
        for (count, want) in counts.iter().zip([0.0900, 0.6652, 0.2447, 0.0]) {
            assert!((f64::from(*count) / 10_000.0 - want).abs() < 2e-3, "{counts:?}");
        }
        let top = SampleOptions { top_k: 1, ..o.clone() };
        assert_eq!(pick(&any, &top, 0.99), Some(1));
        let nucleus = SampleOptions { top_p: 0.9, ..o };
        assert_eq!(pick(&any, &nucleus, 0.9999), Some(2));
    }
}
