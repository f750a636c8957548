use super::*;
use std::collections::{HashMap, HashSet};

const SPLITS: [Split; 2] = [Split::Train, Split::HeldOut];

fn noisy(picture: &Picture, sigma: f32, case: u64) -> Picture {
    let random = Stream::new(1, Purpose::Test, case);
    let mut values = vec![0.0; picture.rgb().len()];
    picture.to_unit(&mut values);
    let mut noise = vec![0.0; values.len()];
    random.fill_normal(0, &mut noise);
    for (value, z) in values.iter_mut().zip(noise) {
        *value += 2.0 * sigma * z;
    }
    Picture::from_unit(SIDE, SIDE, &values).unwrap()
}

#[test]
fn a_quarter_of_the_kinds_is_held_out_evenly() {
    let held: Vec<Object> = Object::all().filter(|o| o.held_out()).collect();
    assert_eq!((Object::all().count(), held.len()), (48, 12));
    let tally = |key: &dyn Fn(&Object) -> String| {
        let mut counts = HashMap::new();
        for object in &held {
            *counts.entry(key(object)).or_insert(0) += 1;
        }
        let mut counts: Vec<i32> = counts.into_values().collect();
        counts.sort_unstable();
        counts
    };
    assert_eq!(tally(&|o| o.size.word().into()), [6, 6]);
    assert_eq!(tally(&|o| o.colour.word().into()), [2; 6]);
    assert_eq!(tally(&|o| o.shape.word().into()), [3; 4]);
    assert_eq!(tally(&|o| format!("{:?} {:?}", o.size, o.colour)), [1; 12]);
    assert_eq!(tally(&|o| format!("{:?} {:?}", o.colour, o.shape)), [1; 12]);
    assert_eq!(tally(&|o| format!("{:?} {:?}", o.size, o.shape)), [1, 1, 1, 1, 2, 2, 2, 2]);
}

#[test]
fn training_sees_no_kind_held_out_and_every_other_scene_has_one() {
    for (split, kinds) in [(Split::Train, 36), (Split::HeldOut, 48)] {
        let mut seen = HashSet::new();
        for index in 0..2000 {
            let scene = scene(5, split, index);
            assert_eq!(scene.objects().len() as u64, 1 + index % 2);
            let held_out = scene.objects().iter().filter(|o| o.held_out()).count();
            assert_eq!(held_out, usize::from(split == Split::HeldOut));
            seen.extend(scene.objects());
        }
        assert_eq!(seen.len(), kinds);
    }
}

#[test]
fn examples_are_a_function_of_seed_split_and_index() {
    assert_eq!(example(3, Split::Train, 77), example(3, Split::Train, 77));
    let differ = (0..20).filter(|&i| example(3, Split::Train, i) != example(4, Split::Train, i)).count();
    assert_eq!(differ, 20);
    let scene = scene(0, Split::Train, 1);
    let [a, b] = [1, 2].map(|d| scene.draw(&Stream::new(0, Purpose::Test, d)));
    assert_ne!(a, b, "the position is jittered");
}

#[test]
fn captions_are_plain_and_parse_back() {
    let object = |size, colour, shape| Object { size, colour, shape };
    let small = object(Size::Small, Colour::Red, Shape::Circle);
    let big = object(Size::Big, Colour::Blue, Shape::Square);
    assert_eq!(Scene::One(small).caption(), "a small circle in red");
    let pair = Scene::Two(big, Relation::LeftOf, small);
    assert_eq!(pair.caption(), "a big square in blue left of a small circle in red");
    for first in Object::all() {
        assert_eq!(Scene::parse(&Scene::One(first).caption()), Some(Scene::One(first)));
        for second in Object::all() {
            for &relation in Relation::ALL {
                let scene = Scene::Two(first, relation, second);
                assert_eq!(Scene::parse(&scene.caption()), Some(scene));
            }
        }
    }
    for wrong in [
        "",
        "a",
        "a small red",
        "a small circle in red above",
        "a small circle in red above a",
        "a small circle in red right of a small circle in red",
        "a small circle in red left a small circle in red",
        "a  small circle in red",
        "A small circle in red",
        "a red small circle",
        "a small circle in red above a small circle in red above a small circle in red",
        "a small pink circle",
        "a small circle in red a small circle in red",
    ] {
        assert_eq!(Scene::parse(wrong), None, "{wrong:?}");
    }
    assert_eq!(Scene::parse(" a small circle in red\n"), Some(Scene::One(small)));
}

#[test]
fn a_pair_fits_side_by_side() {
    // Its centres lie a quarter of the side from the rim and half of it apart, and move by up to 0.75.
    assert!(Size::Big.reach() + 0.75 <= SIDE as f32 / 4.0);
}

#[test]
fn the_reader_is_right_on_true_pictures_and_on_noisy_or_blurred_ones() {
    let right = |count: u64, spoil: &dyn Fn(&Picture, u64) -> Picture| {
        let read = |index: u64| {
            let (truth, picture) = example(11, SPLITS[index as usize / 2 % 2], index);
            Scene::read(&spoil(&picture, index)) == Some(truth)
        };
        (0..count).filter(|&index| read(index)).count()
    };
    assert!(right(300, &|picture, _| picture.clone()) >= 299);
    assert!(right(200, &|picture, index| noisy(picture, 0.05, index)) >= 198);
    assert!(right(100, &|picture, _| picture.square(24).square(SIDE)) >= 97);
}

#[test]
fn the_reader_refuses_what_is_no_scene() {
    assert_eq!(Scene::read(&Picture::filled(SIDE, SIDE, [255; 3])), None);
    assert_eq!(Scene::read(&Picture::filled(SIDE, SIDE - 1, [0; 3])), None);
    let grey = Picture::filled(SIDE, SIDE, [128; 3]);
    assert_eq!(Scene::read(&noisy(&grey, 0.0, 0)).map(|s| s.objects().len()), Some(1));
    let one = example(0, Split::Train, 0).1;
    let crowd = Picture::grid(&[one.square(16), one.square(16), one.square(16)], 2, 0);
    assert_eq!(Scene::read(&crowd), None);
}

#[test]
fn scores_keep_colour_and_shape_apart() {
    let scene = |caption: &str| Scene::parse(caption).unwrap();
    let truth = scene("a big circle in red above a small cross in green");
    let score = |read: Option<&str>| {
        let Score { objects, colours_right, shapes_right } = Score::of(&truth, read.map(scene).as_ref());
        [objects, colours_right, shapes_right]
    };
    assert_eq!(score(Some("a big circle in red above a small cross in green")), [2, 2, 2]);
    assert_eq!(score(Some("a small circle in red left of a small cross in blue")), [2, 1, 2]);
    assert_eq!(score(Some("a small cross in green above a big circle in red")), [2, 0, 0]);
    assert_eq!(score(Some("a small square in red")), [2, 1, 0]);
    assert_eq!(score(None), [2, 0, 0]);
    let one = scene("a big circle in red");
    assert_eq!(Score::of(&one, Some(&truth)), Score { objects: 2, colours_right: 1, shapes_right: 1 });
}
