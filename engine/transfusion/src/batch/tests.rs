use super::*;
use crate::data::{Documents, Source, shapes};

const TOKENS: Tokens = Tokens { bos: 256, eos: 257, boi: 258, eoi: 259, pad: 260 };
const BOS: i32 = TOKENS.bos;
const EOS: i32 = TOKENS.eos;
const BOI: i32 = TOKENS.boi;
const EOI: i32 = TOKENS.eoi;

/// Rows of 16 positions; an image of 2 x 2 pixels is 4 patches.
fn geometry(rows: usize) -> Geometry {
    Geometry {
        rows,
        positions: 16,
        text_rows: 16 * rows,
        images: 3 * rows,
        resolution: 2,
        patch: 1,
        channels: 3,
    }
}

fn text(text: &str) -> Part {
    Part::Text(text.into())
}

fn image(grey: u8) -> Part {
    Part::Image(Arc::new(Picture::filled(2, 2, [grey; 3])))
}

fn document(parts: &[Part]) -> Document {
    Document { parts: parts.to_vec(), stream: false }
}

fn stream(bytes: &str) -> Document {
    Document { parts: vec![text(bytes)], stream: true }
}

fn as_given() -> PackOptions {
    PackOptions { order: PairOrder::AsGiven, condition_drop: 0.0, shuffle: false, ..PackOptions::default() }
}

fn packer(documents: &[Document], geometry: Geometry, options: PackOptions) -> Packer {
    let source = Arc::new(Documents::new(documents.to_vec(), "test"));
    let end = documents.len() as u64;
    Packer::new(source, TOKENS, geometry, options, 7).unwrap().until(end)
}

fn schedule(t: f32) -> [f32; 4] {
    [1.0 - t / 1000.0, t / 1000.0, 0.0, 1.0]
}

fn fill(packer: &mut Packer) -> Batch {
    let mut batch = Batch::new(packer.geometry);
    packer.fill(&mut batch, &schedule);
    batch
}

fn pack(documents: &[Document], geometry: Geometry, options: PackOptions) -> Batch {
    fill(&mut packer(documents, geometry, options))
}

/// The used text rows and what they predict.
fn losses(batch: &Batch) -> Vec<(i32, i32)> {
    let n = batch.text_count;
    assert!(batch.text_rows[n..].iter().chain(&batch.targets[n..]).all(|&i| i == -1));
    batch.text_rows.iter().copied().zip(batch.targets.iter().copied()).take(n).collect()
}

#[test]
fn a_caption_and_its_image() {
    let options = PackOptions { times: Times::Fixed(250.0), ..as_given() };
    let batch = pack(&[document(&[text("ab"), image(255)])], geometry(1), options);
    let (a, b) = (97, 98);
    assert_eq!(batch.tokens, [BOS, a, b, BOI, -1, -1, -1, -1, EOI, EOS, -1, -1, -1, -1, -1, -1]);
    assert_eq!(batch.positions, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0]);
    assert_eq!(batch.row_start, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 10, 10, 10, 10, 10]);
    assert_eq!(batch.row_end, [1, 2, 3, 4, 8, 8, 8, 8, 9, 10, 10, 10, 10, 10, 10, 10]);
    assert_eq!(batch.text_rows, [0, 1, 2, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1]);
    assert_eq!(batch.targets, [a, b, BOI, EOS, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1]);
    assert_eq!(batch.images, [[1.0; 12], [0.0; 12], [0.0; 12]].concat());
    assert_eq!(batch.image_rows, [4, 5, 6, 7, -1, -1, -1, -1, -1, -1, -1, -1]);
    assert_eq!(batch.times, [250.0, 0.0, 0.0]);
    assert_eq!(batch.coefficients, [0.75, 0.25, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    assert_eq!(batch.noise_keys, [0; 9]);
    assert_eq!(batch.image_weights, [1.0, 0.0, 0.0]);
    assert_eq!((batch.text_count, batch.image_count, batch.documents, batch.cut), (4, 1, 1, 0));
}

#[test]
fn packed_documents_and_their_keys() {
    let documents =
        [document(&[text("a")]), document(&[image(0), text("b"), image(255)]), document(&[text("cde")])];
    let wide = Geometry { positions: 20, text_rows: 40, ..geometry(2) };
    let mut packer = packer(&documents, wide, as_given());
    packer.seek(1 << 32);
    packer.end = u64::MAX;
    let batch = fill(&mut packer);
    // Visit 2^32 is document 1; it and document 2 fill 15 + 5 positions.
    let [b, c, d, e] = [98, 99, 100, 101];
    let first = [BOS, BOI, -1, -1, -1, -1, EOI, b, BOI, -1, -1, -1, -1, EOI, EOS, BOS, c, d, e, EOS];
    assert_eq!(batch.tokens[..20], first);
    assert_eq!(batch.positions[..20], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0, 1, 2, 3, 4]);
    assert_eq!(batch.row_start[..20], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 15, 15, 15, 15, 15]);
    assert_eq!(batch.row_end[..20], [1, 2, 6, 6, 6, 6, 7, 8, 9, 13, 13, 13, 13, 14, 15, 16, 17, 18, 19, 20]);
    let row = [(0, BOI), (6, b), (7, BOI), (13, EOS), (15, c), (16, d), (17, e), (18, EOS)];
    assert_eq!(losses(&batch)[..8], row);
    assert_eq!(batch.image_rows[..12], [2, 3, 4, 5, 9, 10, 11, 12, 25, 26, 27, 28]);
    assert_eq!(batch.noise_keys[..12], [0, 1, 0, 0, 1, 1, 3, 1, 0, 3, 1, 1]);
    assert_eq!(packer.cursor(), (1 << 32) + 4);
}

#[test]
fn a_stream_has_neither_beginning_nor_end() {
    let batch = pack(&[stream("0123456789abcdefg")], geometry(1), as_given());
    let bytes: Vec<i32> = "0123456789abcdefg".bytes().map(i32::from).collect();
    assert_eq!(batch.tokens, bytes[..16]);
    assert_eq!(batch.targets, bytes[1..]);
    assert_eq!(batch.text_rows, (0..16).collect::<Vec<_>>());
    assert_eq!(batch.row_end, (1..17).collect::<Vec<_>>());
    let short = pack(&[stream("xy"), stream("z"), stream("")], geometry(1), as_given());
    assert_eq!(short.tokens[..7], [120, BOS, 122, EOS, BOS, EOS, -1]);
    assert_eq!(losses(&short), [(0, 121), (1, 122), (2, EOS), (4, EOS)]);
}

#[test]
fn a_dropped_condition_leaves_the_image_and_no_text_loss() {
    let options = PackOptions { condition_drop: 1.0, ..as_given() };
    let pair = document(&[text("ab"), image(1)]);
    let batch = pack(std::slice::from_ref(&pair), geometry(1), options);
    assert_eq!(batch.tokens[..9], [BOS, BOI, -1, -1, -1, -1, EOI, EOS, -1]);
    assert_eq!(batch.positions[..9], [0, 1, 2, 3, 4, 5, 6, 7, 0]);
    assert_eq!((batch.text_count, batch.image_count), (0, 1));
    for kept in [document(&[text("abc")]), document(&[image(1), text("abc")]), stream("abcd")] {
        assert!(pack(&[kept], geometry(1), options).text_count > 2);
    }
}

#[test]
fn pairs_come_in_the_order_that_is_asked_for() {
    let pairs = [document(&[text("ab"), image(1)]), document(&[image(1), text("ab")])];
    for pair in &pairs {
        for (order, second) in [(PairOrder::CaptionFirst, 97), (PairOrder::ImageFirst, BOI)] {
            let batch = pack(std::slice::from_ref(pair), geometry(1), PackOptions::evaluation(order, 0.0));
            assert_eq!((batch.tokens[1], batch.times[0]), (second, 0.0));
        }
    }
    let interleaved = document(&[text("a"), image(1), text("b")]);
    let batch = pack(&[interleaved], geometry(1), PackOptions::evaluation(PairOrder::ImageFirst, 9.0));
    assert_eq!(batch.tokens[1], 97);
}

#[test]
fn long_documents_are_cut_and_counted() {
    let cut = |document: Document| {
        let batch = pack(&[document], geometry(1), as_given());
        assert_eq!((batch.cut, batch.documents), (1, 1));
        batch
    };
    let long = "x".repeat(100);
    // 14 bytes and BOS; no EOS, as this is not the end.
    let batch = cut(document(&[text(&long)]));
    assert_eq!((batch.tokens[14], batch.tokens[15], batch.text_count), (120, -1, 14));
    // The caption gives way to its image.
    let batch = cut(document(&[text(&long), image(1)]));
    assert_eq!(batch.tokens[8..], [120, BOI, -1, -1, -1, -1, EOI, -1]);
    assert_eq!(losses(&batch)[8], (8, BOI));
    // Two images fit; the third goes with what follows it.
    let batch = cut(document(&[image(1), text("a"), image(2), text("b"), image(3), text("c")]));
    assert_eq!((batch.image_count, batch.tokens[14], batch.tokens[15]), (2, 98, -1));
    assert_eq!(batch.tokens[1], BOI);
    let few_targets = Geometry { text_rows: 4, ..geometry(1) };
    let batch =
        pack(&[document(&[text(&long)]), document(&[text(&long), image(1)])], few_targets, as_given());
    assert_eq!((batch.text_count, batch.documents), (3, 1));
    let no_images = Geometry { images: 0, ..geometry(1) };
    let batch = pack(&[document(&[text("a"), image(1), text("b")])], no_images, as_given());
    assert_eq!((losses(&batch), batch.cut), (vec![(0, 97)], 1));
}

#[test]
fn what_does_not_fit_is_carried_over() {
    let documents: Vec<Document> = ["aaaaaa", "bbbbbb", "cccccc", "d"].map(|t| document(&[text(t)])).into();
    let mut small = packer(&documents, geometry(1), as_given());
    let first = fill(&mut small);
    assert_eq!((first.documents, small.cursor()), (2, 2));
    let second = fill(&mut small);
    assert_eq!((second.documents, second.tokens[1], second.tokens[9]), (2, 99, 100));
    assert_eq!(fill(&mut small).documents, 0);
    // Text or images without room left end the batch, even where there are rows.
    let tight = Geometry { text_rows: 10, ..geometry(3) };
    let batch = pack(&documents, tight, as_given());
    assert_eq!((batch.documents, batch.text_count), (1, 7));
    let pairs = vec![document(&[text("a"), image(1)]); 4];
    let batch = pack(&pairs, Geometry { images: 2, ..geometry(4) }, as_given());
    assert_eq!((batch.documents, batch.image_count), (2, 2));
    assert!(batch.row_end[32..].iter().chain(&batch.row_start[32..]).all(|&i| i == 0));
}

/// Documents of all kinds, of lengths from nothing to more than a row.
struct Anything;

impl Source for Anything {
    fn len(&self) -> Option<u64> {
        None
    }

    fn document(&self, index: u64) -> Document {
        let random = Stream::new(1, Purpose::Test, index);
        let part = |i: u32| match random.below(3 * i, 3) {
            0 => image(random.word(3 * i + 1) as u8),
            1 => text(&"t".repeat(random.below(3 * i + 1, 6) as usize)),
            _ => text(&"t".repeat(random.below(3 * i + 1, 30) as usize)),
        };
        let parts = (1..random.below(0, 6)).map(part).collect();
        Document { parts, stream: random.below(1, 5) == 0 }
    }

    fn describe(&self) -> String {
        "anything".into()
    }
}

fn anything(geometry: Geometry) -> Packer {
    Packer::new(Arc::new(Anything), TOKENS, geometry, PackOptions::default(), 3).unwrap()
}

/// What each position of a row may see, from the tokens and positions alone.
fn visible(tokens: &[i32], positions: &[i32], patch: &[bool]) -> Vec<Vec<usize>> {
    let used = |i: usize| tokens[i] != -1 || patch[i];
    let opening = |i: usize| (0..=i).rev().find(|&j| positions[j] == 0).unwrap();
    let last = |i: usize| (i..tokens.len()).take_while(|&j| patch[j] == patch[i]).last().unwrap();
    let sees = |i: usize| match (used(i), patch[i]) {
        (false, _) => Vec::new(),
        (true, false) => (opening(i)..=i).collect(),
        (true, true) => (opening(i)..=last(i)).collect(),
    };
    (0..tokens.len()).map(sees).collect()
}

#[test]
fn masks_show_what_they_should_in_random_batches() {
    let geometry = Geometry { positions: 40, text_rows: 70, images: 5, ..geometry(3) };
    let mut packer = anything(geometry);
    let mut batch = Batch::new(geometry);
    let (mut cut, mut full) = (0, 0);
    for _ in 0..200 {
        packer.fill(&mut batch, &schedule);
        let mut patch = vec![false; batch.tokens.len()];
        for &row in batch.image_rows.iter().filter(|&&row| row >= 0) {
            assert!(!std::mem::replace(&mut patch[row as usize], true) && batch.tokens[row as usize] == -1);
        }
        for row in 0..3 {
            let of = row * 40..(row + 1) * 40;
            let (start, end) = (&batch.row_start[of.clone()], &batch.row_end[of.clone()]);
            assert!(start.is_sorted() && end.is_sorted());
            let want = visible(&batch.tokens[of.clone()], &batch.positions[of.clone()], &patch[of.clone()]);
            for (i, want) in want.iter().enumerate() {
                assert_eq!(*want, (start[i] as usize..end[i] as usize).collect::<Vec<_>>(), "{row} {i}");
            }
        }
        for (row, target) in losses(&batch) {
            let (at, follows) = (row as usize, batch.tokens.get(row as usize + 1));
            assert!(batch.tokens[at] != -1 && batch.tokens[at] != BOI && target != EOI && target != BOS);
            let last_of_stream = batch.positions.get(at + 1).is_none_or(|&p| p == 0);
            assert!(follows == Some(&target) || last_of_stream, "{row} predicts {target}");
        }
        cut += batch.cut;
        full += usize::from(batch.image_count == 5);
    }
    assert!(cut > 50 && full > 20, "{cut} documents cut, {full} batches with all images");
}

#[test]
fn four_batches_of_one_row_are_one_batch_of_four() {
    let one = Geometry { positions: 40, text_rows: 40, images: 10, ..geometry(1) };
    let four = Geometry { rows: 4, text_rows: 160, images: 40, ..one };
    let (mut single, mut quadruple) = (anything(one), anything(four));
    for _ in 0..50 {
        let all = fill(&mut quadruple);
        let (mut texts, mut images) = (0, 0);
        for row in 0..4 {
            let part = fill(&mut single);
            let of = row * 40..(row + 1) * 40;
            for (a, b) in [
                (&part.tokens, &all.tokens),
                (&part.positions, &all.positions),
                (&part.row_start, &all.row_start),
                (&part.row_end, &all.row_end),
            ] {
                assert_eq!(a[..], b[of.clone()]);
            }
            let (n, i) = (part.text_count, part.image_count);
            let shifted: Vec<(i32, i32)> =
                losses(&part).iter().map(|(r, t)| (r + of.start as i32, *t)).collect();
            assert_eq!(shifted, losses(&all)[texts..texts + n]);
            assert_eq!(part.noise_keys[..3 * i], all.noise_keys[3 * images..3 * (images + i)]);
            assert_eq!(part.times[..i], all.times[images..images + i]);
            assert_eq!(part.images[..12 * i], all.images[12 * images..12 * (images + i)]);
            (texts, images) = (texts + n, images + i);
        }
        assert_eq!((texts, images), (all.text_count, all.image_count));
        assert_eq!(single.cursor(), quadruple.cursor());
    }
}

#[test]
fn the_cursor_is_all_the_state() {
    let documents: Vec<Document> =
        (0..7).map(|i| document(&[text(&"ab"[..1 + i % 2]), image(i as u8)])).collect();
    let source: Shared = Arc::new(Documents::new(documents, "test"));
    let packer =
        |seed| Packer::new(source.clone(), TOKENS, geometry(2), PackOptions::default(), seed).unwrap();
    let mut run = packer(5);
    let mut batches = Vec::new();
    for _ in 0..20 {
        batches.push((run.cursor(), fill(&mut run)));
    }
    for (cursor, batch) in batches.iter().rev() {
        let mut resumed = packer(5);
        resumed.seek(*cursor);
        assert_eq!(fill(&mut resumed), *batch);
    }
    assert_ne!(fill(&mut packer(6)), batches[0].1);
    // A batch of another shape is replaced.
    let mut other = Batch::new(geometry(1));
    packer(5).fill(&mut other, &schedule);
    assert_eq!(other, batches[0].1);
}

/// Over many pairs: how often the image comes first, how often the condition is dropped, and the times.
#[test]
fn drops_orders_and_times_follow_their_probabilities() {
    for continuous_time in [false, true] {
        let source: Shared = Arc::new(Documents::new(vec![document(&[text("ab"), image(1)])], "pair"));
        let options = PackOptions { continuous_time, ..PackOptions::default() };
        // Too narrow for two documents, even of the shortest.
        let narrow = Geometry { positions: 15, ..geometry(500) };
        let mut packer = Packer::new(source, TOKENS, narrow, options, 11).unwrap();
        let (mut image_first, mut dropped, mut caption_first) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..20 {
            let batch = fill(&mut packer);
            assert_eq!(batch.documents, 500);
            for row in 0..500 {
                let tokens = &batch.tokens[row * 15..][..9];
                let kind = match (tokens[1], tokens[7]) {
                    (BOI, EOS) => &mut dropped,
                    (BOI, _) => &mut image_first,
                    _ => &mut caption_first,
                };
                kind.push(batch.times[row]);
            }
        }
        let n = 10_000.0f64;
        let near = |count: usize, p: f64| (count as f64 - n * p).abs() < 4.0 * (n * p * (1.0 - p)).sqrt();
        assert!(near(image_first.len(), 0.2) && near(dropped.len(), 0.08), "{}", dropped.len());
        for (times, limit) in [(image_first, 500.0), (dropped, 1000.0), (caption_first, 1000.0)] {
            let whole = times.iter().filter(|t| t.fract() == 0.0).count();
            assert!(if continuous_time { whole < times.len() / 10 } else { whole == times.len() });
            let least = if continuous_time { f32::MIN_POSITIVE } else { 1.0 };
            assert!(times.iter().all(|&t| (least..=limit).contains(&t)));
            let mean = times.iter().map(|&t| f64::from(t)).sum::<f64>() / times.len() as f64;
            let sigma = f64::from(limit) / 12f64.sqrt() / (times.len() as f64).sqrt();
            assert!((mean - f64::from(limit) / 2.0).abs() < 4.0 * sigma + 0.5, "{mean} of {limit}");
            for quarter in 0..4 {
                let (low, high) = (limit * quarter as f32 / 4.0, limit * (quarter + 1) as f32 / 4.0);
                let inside = times.iter().filter(|&&t| t > low && t <= high).count() as f64;
                let n = times.len() as f64;
                assert!((inside - n / 4.0).abs() < 4.0 * (n * 3.0 / 16.0).sqrt(), "{inside} of {n}");
            }
        }
    }
}

#[test]
fn the_built_in_pictures_are_packed_whole() {
    let geometry = Geometry {
        rows: 4,
        positions: 96,
        text_rows: 384,
        images: 12,
        resolution: 32,
        patch: 8,
        channels: 3,
    };
    let source: Shared = Arc::new(shapes::Shapes { seed: 1, split: shapes::Split::Train, count: None });
    let options = PackOptions::evaluation(PairOrder::CaptionFirst, 500.0);
    let batch = fill(&mut Packer::new(source, Tokens::behind(256), geometry, options, 0).unwrap());
    assert!(batch.documents >= 4 && batch.cut == 0 && batch.image_count == batch.documents);
    let (scene, picture) = shapes::example(1, shapes::Split::Train, 0);
    let caption: Vec<i32> = scene.caption().bytes().map(i32::from).collect();
    assert_eq!(batch.tokens[1..=caption.len()], caption);
    let mut pixels = vec![0.0; geometry.values()];
    picture.to_unit(&mut pixels);
    assert_eq!(batch.images[..pixels.len()], pixels);
}

#[test]
fn what_has_no_meaning_is_refused() {
    let good = geometry(1);
    let source = || -> Shared { Arc::new(Documents::new(vec![stream("ab")], "test")) };
    for geometry in [
        Geometry { rows: 0, ..good },
        Geometry { positions: 2, ..good },
        Geometry { positions: 7, ..good },
        Geometry { text_rows: 1, ..good },
        Geometry { patch: 0, ..good },
        Geometry { resolution: 3, patch: 2, ..good },
        Geometry { channels: 4, ..good },
        Geometry { rows: usize::MAX, ..good },
    ] {
        assert!(Packer::new(source(), TOKENS, geometry, as_given(), 0).is_err(), "{geometry:?}");
    }
    for options in [
        PackOptions { image_first: 1.5, ..as_given() },
        PackOptions { condition_drop: f32::NAN, ..as_given() },
        PackOptions { image_first_limit: 0, ..as_given() },
        PackOptions { image_first_limit: 1001, ..as_given() },
        PackOptions::evaluation(PairOrder::AsGiven, 1000.5),
        PackOptions::evaluation(PairOrder::AsGiven, -1.0),
    ] {
        assert!(Packer::new(source(), TOKENS, good, options, 0).is_err(), "{options:?}");
    }
    for tokens in [Tokens { boi: 255, ..TOKENS }, Tokens { eoi: 256, ..TOKENS }] {
        assert!(Packer::new(source(), tokens, good, as_given(), 0).is_err());
    }
    let empty = Arc::new(Documents::new(Vec::new(), "nothing"));
    assert!(Packer::new(empty, TOKENS, good, as_given(), 0).is_err());
}
