//! Documents packed into rows of one fixed shape: every tensor that a training step reads.
mod prefetch;

pub use prefetch::Prefetcher;

use crate::{
    data::{Document, Order, Part, Shared},
    error::{Error, Result},
    picture::Picture,
};
use std::sync::Arc;
use transfusion_core::random::{Purpose, Stream, halves};

/// The tokens that are no bytes. Bytes are 0 to 255.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tokens {
    /// Begins a document.
    pub bos: i32,
    /// Ends a document.
    pub eos: i32,
    /// Begins an image.
    pub boi: i32,
    /// Ends an image.
    pub eoi: i32,
    /// Stands for nothing; the packer leaves unused positions at -1 instead.
    pub pad: i32,
}

impl Tokens {
    /// The five tokens behind a vocabulary of `vocabulary` others: 256 for bytes.
    pub fn behind(vocabulary: u32) -> Tokens {
        let [bos, eos, boi, eoi, pad] = [0, 1, 2, 3, 4].map(|i| vocabulary as i32 + i);
        Tokens { bos, eos, boi, eoi, pad }
    }

    fn check(&self) -> Result<()> {
        let mut ids = [self.bos, self.eos, self.boi, self.eoi, self.pad];
        ids.sort_unstable();
        if ids[0] < 256 || ids.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Error::Config(format!(
                "special tokens {ids:?} must differ and follow the bytes' 256"
            )));
        }
        Ok(())
    }
}

/// The shape of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Rows, B.
    pub rows: usize,
    /// Positions of a row, T.
    pub positions: usize,
    /// Room for positions that carry text loss, R.
    pub text_rows: usize,
    /// Room for images, I.
    pub images: usize,
    /// Side of an image in pixels, S.
    pub resolution: usize,
    /// Side of a patch in pixels, k.
    pub patch: usize,
    /// Values of a pixel.
    pub channels: usize,
}

impl Geometry {
    /// Patches of an image, P.
    pub fn patches(&self) -> usize {
        (self.resolution / self.patch.max(1)).pow(2)
    }

    /// Values of an image.
    pub fn values(&self) -> usize {
        self.resolution * self.resolution * self.channels
    }

    /// Refuses a shape into which no document fits.
    ///
    /// # Errors
    /// [`Error::Config`], naming the value.
    pub fn check(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::Config(why));
        let &Geometry { rows, positions, text_rows, images, resolution, patch, channels } = self;
        if rows == 0 || positions < 3 || text_rows < 2 {
            return refuse(format!(
                "{rows} rows of {positions} positions, {text_rows} of text, hold no document"
            ));
        }
        if rows.saturating_mul(positions) > i32::MAX as usize {
            return refuse(format!("{rows} rows of {positions} positions are too many to number in 32 bits"));
        }
        if images == 0 {
            return Ok(());
        }
        if patch == 0 || resolution == 0 || !resolution.is_multiple_of(patch) {
            return refuse(format!("a resolution of {resolution} is not made of patches of {patch}"));
        }
        if channels != 3 {
            return refuse(format!("pictures have 3 channels, not {channels}"));
        }
        if self.patches() + 4 > positions {
            let need = self.patches() + 4;
            return refuse(format!("an image needs {need} positions of a row, which has {positions}"));
        }
        Ok(())
    }
}

/// The tensors of a step. Rows of the batch are numbered `b T + position`; unused indices are -1.
#[derive(Clone, PartialEq, Debug)]
pub struct Batch {
    /// Its shape.
    pub geometry: Geometry,
    /// `[B, T]`: the tokens; -1 for patches and for positions without a document.
    pub tokens: Vec<i32>,
    /// `[B, T]`: the place in its document, for RoPE.
    pub positions: Vec<i32>,
    /// `[B, T]`: the first position of the row that this one sees. Never decreases along a row.
    pub row_start: Vec<i32>,
    /// `[B, T]`: behind the last position that this one sees. Never decreases along a row, and equals
    /// `row_start` where there is no document.
    pub row_end: Vec<i32>,
    /// `[R]`: the rows that carry text loss.
    pub text_rows: Vec<i32>,
    /// `[R]`: the token that each of those is to predict.
    pub targets: Vec<i32>,
    /// `[I, S, S, 3]`: the clean images, in `[-1, 1]`.
    pub images: Vec<f32>,
    /// `[I, P]`: the row of every patch, in raster order.
    pub image_rows: Vec<i32>,
    /// `[I]`: the noise level, from 0 to the number of steps of the schedule.
    pub times: Vec<f32>,
    /// `[I, 4]`: a, b, c, d of `x_t = a x_0 + b noise` and `target = c x_0 + d noise`.
    pub coefficients: Vec<f32>,
    /// `[I, 3]`: what the noise is keyed by: the low and high word of the visit, and which image of its
    /// document it is.
    pub noise_keys: Vec<i32>,
    /// `[I]`: 1 for an image, 0 for none.
    pub image_weights: Vec<f32>,
    /// Positions that carry text loss.
    pub text_count: usize,
    /// Images.
    pub image_count: usize,
    /// Documents.
    pub documents: usize,
    /// Documents of which something was left out, as they are longer than a row.
    pub cut: usize,
}

impl Batch {
    /// An empty batch.
    pub fn new(geometry: Geometry) -> Batch {
        let (n, r, i) = (geometry.rows * geometry.positions, geometry.text_rows, geometry.images);
        Batch {
            geometry,
            tokens: vec![-1; n],
            positions: vec![0; n],
            row_start: vec![0; n],
            row_end: vec![0; n],
            text_rows: vec![-1; r],
            targets: vec![-1; r],
            images: vec![0.0; i * geometry.values()],
            image_rows: vec![-1; i * geometry.patches()],
            times: vec![0.0; i],
            coefficients: vec![0.0; i * 4],
            noise_keys: vec![0; i * 3],
            image_weights: vec![0.0; i],
            text_count: 0,
            image_count: 0,
            documents: 0,
            cut: 0,
        }
    }

    /// Positions that hold a document.
    pub fn used(&self) -> usize {
        self.row_start.iter().zip(&self.row_end).filter(|(start, end)| start < end).count()
    }

    fn clear(&mut self) {
        for ids in [&mut self.tokens, &mut self.text_rows, &mut self.targets, &mut self.image_rows] {
            ids.fill(-1);
        }
        for numbers in [&mut self.positions, &mut self.row_start, &mut self.row_end, &mut self.noise_keys] {
            numbers.fill(0);
        }
        for values in [&mut self.images, &mut self.times, &mut self.coefficients, &mut self.image_weights] {
            values.fill(0.0);
        }
        (self.text_count, self.image_count, self.documents, self.cut) = (0, 0, 0, 0);
    }

    fn has_room(&self, layout: &Layout) -> bool {
        self.text_count + layout.targets.len() <= self.geometry.text_rows
            && self.image_count + layout.images.len() <= self.geometry.images
    }

    /// Lays a document from position `start` of row `row`.
    fn place(&mut self, row: usize, start: usize, layout: &Layout) {
        let base = row * self.geometry.positions + start;
        for (i, &token) in layout.tokens.iter().enumerate() {
            self.tokens[base + i] = token;
            self.positions[base + i] = i as i32;
            self.row_start[base + i] = start as i32;
            self.row_end[base + i] = (start + i + 1) as i32;
        }
        for &(at, target) in &layout.targets {
            self.text_rows[self.text_count] = (base + at) as i32;
            self.targets[self.text_count] = target;
            self.text_count += 1;
        }
        for image in &layout.images {
            let end = (start + image.at + self.geometry.patches()) as i32;
            self.row_end[base + image.at..][..self.geometry.patches()].fill(end);
            self.place_image(base + image.at, image);
        }
        self.documents += 1;
        self.cut += usize::from(layout.cut);
    }

    /// Puts an image, whose first patch is row `first` of the batch, into the next free slot.
    fn place_image(&mut self, first: usize, image: &Placed) {
        let (slot, patches, values) = (self.image_count, self.geometry.patches(), self.geometry.values());
        let pixels = &mut self.images[slot * values..][..values];
        let side = self.geometry.resolution;
        if (image.picture.width(), image.picture.height()) == (side, side) {
            image.picture.to_unit(pixels);
        } else {
            image.picture.square(side).to_unit(pixels);
        }
        for (p, row) in self.image_rows[slot * patches..][..patches].iter_mut().enumerate() {
            *row = (first + p) as i32;
        }
        self.times[slot] = image.time;
        self.coefficients[slot * 4..][..4].copy_from_slice(&image.coefficients);
        self.noise_keys[slot * 3..][..3].copy_from_slice(&image.noise_key);
        self.image_weights[slot] = 1.0;
        self.image_count += 1;
    }

    /// Lets the positions of row `row` from `used` on see nothing.
    fn close(&mut self, row: usize, used: usize) {
        let unused = row * self.geometry.positions + used..(row + 1) * self.geometry.positions;
        self.row_start[unused.clone()].fill(used as i32);
        self.row_end[unused].fill(used as i32);
    }
}

/// Which of text and image comes first in a document of one text and one image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PairOrder {
    /// The image with probability [`PackOptions::image_first`].
    Random,
    /// The text: images from captions.
    CaptionFirst,
    /// The image: captions of images.
    ImageFirst,
    /// As in the source.
    AsGiven,
}

/// The noise level of images.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Times {
    /// Uniform.
    Random,
    /// Always this one, in steps of the schedule.
    Fixed(f32),
}

/// How documents become rows.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PackOptions {
    /// Which of text and image comes first in a pair.
    pub order: PairOrder,
    /// Probability that the image comes first.
    pub image_first: f32,
    /// Probability that a document loses what precedes its first image.
    pub condition_drop: f32,
    /// Noise levels.
    pub times: Times,
    /// Steps of the noise schedule.
    pub steps: u32,
    /// The highest noise level of the image of a pair that comes first, so that its caption has
    /// something to describe.
    pub image_first_limit: u32,
    /// Whether noise levels are drawn from all numbers instead of whole ones.
    pub continuous_time: bool,
    /// Whether documents are visited in another order each epoch.
    pub shuffle: bool,
}

impl Default for PackOptions {
    /// The paper's recipe: captions first in 80 % of the pairs, 1000 steps, images first up to 500;
    /// and a condition dropped in 10 %.
    fn default() -> Self {
        PackOptions {
            order: PairOrder::Random,
            image_first: 0.2,
            condition_drop: 0.1,
            times: Times::Random,
            steps: 1000,
            image_first_limit: 500,
            continuous_time: false,
            shuffle: true,
        }
    }
}

impl PackOptions {
    /// For evaluation: every document once, in order and whole, at one noise level.
    pub fn evaluation(order: PairOrder, time: f32) -> PackOptions {
        PackOptions {
            order,
            times: Times::Fixed(time),
            condition_drop: 0.0,
            shuffle: false,
            ..PackOptions::default()
        }
    }

    fn check(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::Config(why));
        let share = 0.0..=1.0;
        if !share.contains(&self.image_first) || !share.contains(&self.condition_drop) {
            let (first, drop) = (self.image_first, self.condition_drop);
            return refuse(format!("image_first {first} and condition_drop {drop} must lie in 0 to 1"));
        }
        if self.image_first_limit == 0 || self.image_first_limit > self.steps {
            let (limit, steps) = (self.image_first_limit, self.steps);
            return refuse(format!("the noise limit {limit} must lie in 1 to the schedule's {steps} steps"));
        }
        if let Times::Fixed(t) = self.times
            && !(0.0..=self.steps as f32).contains(&t)
        {
            return refuse(format!(
                "the noise level {t} must lie in 0 to the schedule's {} steps",
                self.steps
            ));
        }
        Ok(())
    }
}

/// Packs the documents of a source into batches.
///
/// Visit `n` is the document that [`Order`] names for it, and everything random about it is keyed by
/// the seed and `n`. The visit to come is all the state there is.
pub struct Packer {
    source: Shared,
    order: Option<Order>,
    seed: u64,
    cursor: u64,
    end: u64,
    tokens: Tokens,
    geometry: Geometry,
    options: PackOptions,
    /// Of the last document that was laid out: the next one takes its room.
    layout: Layout,
}

/// A document as it will stand in a row.
#[derive(Default)]
struct Layout {
    /// -1 for patches.
    tokens: Vec<i32>,
    /// Positions that carry loss, with what they predict.
    targets: Vec<(usize, i32)>,
    images: Vec<Placed>,
    cut: bool,
}

impl Layout {
    fn clear(&mut self) {
        self.tokens.clear();
        self.targets.clear();
        self.images.clear();
        self.cut = false;
    }
}

struct Placed {
    /// Position of the first patch in the document.
    at: usize,
    picture: Arc<Picture>,
    time: f32,
    coefficients: [f32; 4],
    noise_key: [i32; 3],
}

/// What of a document is shown, in which order.
struct Arranged {
    parts: Vec<Part>,
    stream: bool,
    /// The highest noise level.
    limit: u32,
    /// Whether its text carries no loss, as it lost its condition.
    mute: bool,
    cut: bool,
}

impl Packer {
    /// A packer that begins at visit 0 and never ends.
    ///
    /// # Errors
    /// [`Error::Config`] for a shape, tokens or options without meaning, [`Error::Data`] for a source
    /// without documents.
    pub fn new(
        source: Shared,
        tokens: Tokens,
        geometry: Geometry,
        options: PackOptions,
        seed: u64,
    ) -> Result<Packer> {
        tokens.check()?;
        geometry.check()?;
        options.check()?;
        if source.is_empty() {
            return Err(Error::Data(format!("{}: there is no document to pack", source.describe())));
        }
        let order = source.len().filter(|_| options.shuffle).map(|len| Order::new(seed, len));
        let (end, layout) = (u64::MAX, Layout::default());
        Ok(Packer { source, order, seed, cursor: 0, end, tokens, geometry, options, layout })
    }

    /// Ends before visit `end`: from there on, batches come back empty.
    pub fn until(self, end: u64) -> Packer {
        Packer { end, ..self }
    }

    /// The next visit.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// Continues with visit `cursor`.
    pub fn seek(&mut self, cursor: u64) {
        self.cursor = cursor;
    }

    /// Fills a batch with the next documents, each in the first row that has room behind the document
    /// before it. One that does not fit any more is the first of the next batch. `coefficients` gives
    /// a, b, c, d for a noise level.
    pub fn fill(&mut self, batch: &mut Batch, coefficients: &dyn Fn(f32) -> [f32; 4]) {
        if batch.geometry == self.geometry {
            batch.clear();
        } else {
            *batch = Batch::new(self.geometry);
        }
        let mut layout = std::mem::take(&mut self.layout);
        let mut is_next = false;
        for row in 0..self.geometry.rows {
            let mut used = 0;
            while self.cursor < self.end {
                if !is_next {
                    self.lay_out(&mut layout, coefficients);
                }
                let end = used + layout.tokens.len();
                is_next = end > self.geometry.positions || !batch.has_room(&layout);
                if is_next {
                    break;
                }
                batch.place(row, used, &layout);
                used = end;
                self.cursor += 1;
            }
            batch.close(row, used);
        }
        self.layout = layout;
    }

    fn stream(&self, purpose: Purpose) -> Stream {
        Stream::new(self.seed, purpose, self.cursor)
    }

    /// The document of the visit at the cursor.
    fn lay_out(&self, layout: &mut Layout, coefficients: &dyn Fn(f32) -> [f32; 4]) {
        let index = self.order.map_or(self.cursor, |order| order.at(self.cursor));
        let arranged = self.cut(self.arrange(self.source.document(index)));
        layout.clear();
        layout.cut = arranged.cut;
        if !arranged.stream {
            layout.tokens.push(self.tokens.bos);
        }
        for part in arranged.parts {
            match part {
                Part::Text(text) => layout.tokens.extend(text.into_iter().map(i32::from)),
                Part::Image(picture) => {
                    let time = self.time(layout.images.len(), arranged.limit);
                    self.push_image(layout, picture, time, coefficients(time));
                }
            }
        }
        // Where we ran out of room is no place to stop.
        if !arranged.stream && !arranged.cut {
            layout.tokens.push(self.tokens.eos);
        }
        if !arranged.mute {
            let Layout { tokens, targets, .. } = &mut *layout;
            targets.extend(self.targets(tokens));
        }
        if arranged.stream {
            layout.tokens.pop();
        }
    }

    fn push_image(&self, layout: &mut Layout, picture: Arc<Picture>, time: f32, coefficients: [f32; 4]) {
        let [low, high] = halves(self.cursor).map(u32::cast_signed);
        let noise_key = [low, high, layout.images.len() as i32];
        let at = layout.tokens.len() + 1;
        layout.tokens.push(self.tokens.boi);
        layout.tokens.extend(std::iter::repeat_n(-1, self.geometry.patches()));
        layout.tokens.push(self.tokens.eoi);
        layout.images.push(Placed { at, picture, time, coefficients, noise_key });
    }

    /// BOS, text and EOI predict what follows; BOI and patches predict no token, so EOI is never
    /// predicted.
    fn targets(&self, tokens: &[i32]) -> impl Iterator<Item = (usize, i32)> {
        let (pairs, boi) = (tokens.windows(2).enumerate(), self.tokens.boi);
        pairs.filter(move |(_, pair)| pair[0] != -1 && pair[0] != boi).map(|(at, pair)| (at, pair[1]))
    }

    fn time(&self, image: usize, limit: u32) -> f32 {
        let random = self.stream(Purpose::Time);
        match self.options.times {
            Times::Fixed(time) => time,
            Times::Random if self.options.continuous_time => {
                (1.0 - random.uniform(image as u32)) * limit as f32
            }
            Times::Random => (random.below(image as u32, limit) + 1) as f32,
        }
    }

    /// Puts a pair in order and drops the condition where the visit's random numbers say so.
    fn arrange(&self, document: Document) -> Arranged {
        let Document { mut parts, stream } = document;
        parts.retain(|part| !matches!(part, Part::Text(text) if text.is_empty()));
        let random = self.stream(Purpose::Drop);
        let mut limit = self.options.steps;
        if let [a, b] = &parts[..]
            && is_image(a) != is_image(b)
        {
            let image_first = match self.options.order {
                PairOrder::Random => random.uniform(1) < self.options.image_first,
                PairOrder::CaptionFirst => false,
                PairOrder::ImageFirst => true,
                PairOrder::AsGiven => is_image(a),
            };
            parts.sort_by_key(|part| is_image(part) != image_first);
            if image_first {
                limit = self.options.image_first_limit;
            }
        }
        let condition = parts.iter().position(is_image).unwrap_or(0);
        let mute = condition > 0 && random.uniform(0) < self.options.condition_drop;
        if mute {
            parts.drain(..condition);
        }
        // A single byte has nothing to predict but its end.
        let stream = stream && (parts.iter().any(is_image) || text_length(&parts) > 1);
        Arranged { parts, stream, limit, mute, cut: false }
    }

    /// Leaves out what an empty row has no room for: images from the end, with all that follows them,
    /// then the end of the text.
    fn cut(&self, mut document: Arranged) -> Arranged {
        let Geometry { positions, text_rows, images: slots, .. } = self.geometry;
        // BOS and EOS take two positions and one target more than there is text; a stream has neither,
        // and its last token is only a target.
        let (positions, text_rows) = match document.stream {
            true => (positions + 1, text_rows + 1),
            false => (positions - 2, text_rows - 1),
        };
        let span = self.geometry.patches() + 2;
        let most = slots.min(positions / span).min(text_rows);
        let mut places = document.parts.iter().enumerate().filter(|(_, part)| is_image(part));
        if let Some((first, _)) = places.nth(most) {
            document.parts.truncate(first);
            document.cut = true;
        }
        let images = document.parts.iter().filter(|part| is_image(part)).count();
        let mut room = (positions - images * span).min(text_rows - images);
        for part in &mut document.parts {
            if let Part::Text(text) = part {
                document.cut |= text.len() > room;
                text.truncate(room);
                room -= text.len();
            }
        }
        document
    }
}

fn is_image(part: &Part) -> bool {
    matches!(part, Part::Image(_))
}

fn text_length(parts: &[Part]) -> usize {
    let length = |part: &Part| if let Part::Text(text) = part { text.len() } else { 0 };
    parts.iter().map(length).sum()
}

#[cfg(test)]
mod tests;
