//! The built-in pictures: one shape, or two in a relation, on white, each with the only English
//! sentence that describes it. A quarter of the kinds of objects is never trained on, so that what a
//! model draws from a held-out caption shows whether it has learned to combine.
use super::source::{Document, Part, Source};
use crate::picture::Picture;
use std::{fmt, sync::Arc};
use transfusion_core::random::{Purpose, Stream};

mod reader;

/// Pixels of a side of every built-in picture.
pub const SIDE: usize = 32;

macro_rules! attribute {
    ($(#[$doc:meta])* $name:ident { $($value:ident $word:literal),+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum $name {
            $(#[doc = concat!("\"", $word, "\"")] $value),+
        }

        impl $name {
            /// All values, in order.
            pub const ALL: &[$name] = &[$($name::$value),+];

            /// The word for it in a caption.
            pub fn word(self) -> &'static str {
                match self { $($name::$value => $word),+ }
            }

            fn parse(word: &str) -> Option<$name> {
                $name::ALL.iter().copied().find(|value| value.word() == word)
            }
        }
    };
}

attribute! {
    /// How large an object is.
    Size { Small "small", Big "big" }
}

attribute! {
    /// The colour of an object.
    Colour { Red "red", Green "green", Blue "blue", Yellow "yellow", Purple "purple", Black "black" }
}

attribute! {
    /// The outline of an object.
    Shape { Circle "circle", Square "square", Triangle "triangle", Cross "cross" }
}

attribute! {
    /// Where the first object is, seen from the second.
    Relation { Above "above", LeftOf "left of" }
}

impl Size {
    /// Half the height and width of an object, in pixels.
    fn reach(self) -> f32 {
        match self {
            Size::Small => 4.5,
            Size::Big => 7.0,
        }
    }
}

impl Colour {
    /// Red, green and blue.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Colour::Red => [225, 30, 35],
            Colour::Green => [20, 160, 60],
            Colour::Blue => [30, 75, 230],
            Colour::Yellow => [250, 205, 20],
            Colour::Purple => [160, 40, 190],
            Colour::Black => [20, 20, 20],
        }
    }
}

impl Shape {
    /// Whether a point is inside, in units of the object's reach from its centre; `y` points down.
    fn contains(self, x: f32, y: f32) -> bool {
        match self {
            Shape::Circle => x * x + y * y <= 1.0,
            Shape::Square => x.abs().max(y.abs()) <= 0.95,
            Shape::Triangle => y <= 0.9 && 2.0 * x.abs() <= (y + 1.0) * (2.0 / 1.9),
            Shape::Cross => x.abs().min(y.abs()) <= 0.32 && x.abs().max(y.abs()) <= 1.0,
        }
    }
}

/// One thing in a picture.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Object {
    /// How large.
    pub size: Size,
    /// Of which colour.
    pub colour: Colour,
    /// Of which shape.
    pub shape: Shape,
}

impl Object {
    /// Every kind of object.
    pub fn all() -> impl Iterator<Item = Object> {
        let sizes = Size::ALL.iter();
        sizes.flat_map(|&size| {
            let colours = Colour::ALL.iter();
            colours
                .flat_map(move |&colour| Shape::ALL.iter().map(move |&shape| Object { size, colour, shape }))
        })
    }

    /// Whether this kind is never trained on: 12 of the 48. Each colour lacks one shape in small and
    /// another in big, each shape lacks three colours, so every pair of attributes is trained on.
    pub fn held_out(self) -> bool {
        self.shape as usize == (self.colour as usize + 2 * self.size as usize) % Shape::ALL.len()
    }

    fn parse(words: &[&str]) -> Option<Object> {
        let &["a", size, shape, "in", colour] = words else { return None };
        Some(Object { size: Size::parse(size)?, colour: Colour::parse(colour)?, shape: Shape::parse(shape)? })
    }

    /// How much of each pixel the object covers, in `0..=1`, by 4 x 4 samples; pixels outside
    /// its bounds are not visited.
    fn cover(self, centre: [f32; 2], mut paint: impl FnMut(usize, f32)) {
        let reach = self.size.reach();
        let span = |c: f32| {
            let end = ((c + reach).ceil().max(0.0) as usize).min(SIDE);
            ((c - reach).max(0.0) as usize).min(end)..end
        };
        for y in span(centre[1]) {
            for x in span(centre[0]) {
                let inside = (0..16).filter(|s| {
                    let at =
                        |pixel: usize, sub: usize, c| (pixel as f32 + (sub as f32 + 0.5) / 4.0 - c) / reach;
                    self.shape.contains(at(x, s % 4, centre[0]), at(y, s / 4, centre[1]))
                });
                paint(y * SIDE + x, inside.count() as f32 / 16.0);
            }
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a {} {} in {}", self.size.word(), self.shape.word(), self.colour.word())
    }
}

/// What is in a picture.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Scene {
    /// One object, in the middle.
    One(Object),
    /// Two objects; the first is the upper or the left one.
    Two(Object, Relation, Object),
}

impl Scene {
    /// The objects in the order of the caption.
    pub fn objects(&self) -> Vec<Object> {
        match *self {
            Scene::One(object) => vec![object],
            Scene::Two(first, _, second) => vec![first, second],
        }
    }

    /// The relation of two objects.
    pub fn relation(&self) -> Option<Relation> {
        match *self {
            Scene::One(_) => None,
            Scene::Two(_, relation, _) => Some(relation),
        }
    }

    /// The sentence: "a small circle in red", "a big square in blue above a small cross in green".
    pub fn caption(&self) -> String {
        match self {
            Scene::One(object) => object.to_string(),
            Scene::Two(first, relation, second) => format!("{first} {} {second}", relation.word()),
        }
    }

    /// The scene that [`caption`](Self::caption) describes; `None` for any other text.
    pub fn parse(caption: &str) -> Option<Scene> {
        let words: Vec<&str> = caption.trim().split(' ').collect();
        let (first, rest) = words.split_at_checked(5)?;
        let first = Object::parse(first)?;
        let Some(split) = rest.len().checked_sub(5) else {
            return rest.is_empty().then_some(Scene::One(first));
        };
        let (relation, second) = rest.split_at(split);
        Some(Scene::Two(first, Relation::parse(&relation.join(" "))?, Object::parse(second)?))
    }

    /// Draws the scene with soft edges; the words of `jitter` move each object by up to 1.5 pixels in
    /// both directions where it is alone, and by up to 0.75 where there are two.
    pub fn draw(&self, jitter: &Stream) -> Picture {
        let objects = self.objects();
        let places: &[[f32; 2]] = match self.relation() {
            None => &[[16.0, 16.0]],
            Some(Relation::Above) => &[[16.0, 8.0], [16.0, 24.0]],
            Some(Relation::LeftOf) => &[[8.0, 16.0], [24.0, 16.0]],
        };
        let slack = 1.5 / objects.len() as f32;
        let mut picture = Picture::filled(SIDE, SIDE, [255; 3]);
        for (i, (object, place)) in objects.iter().zip(places).enumerate() {
            let moved =
                |axis: usize| place[axis] + slack * (2.0 * jitter.uniform((2 * i + axis) as u32) - 1.0);
            object.cover([moved(0), moved(1)], |at, cover| {
                let pixel = &mut picture.pixels_mut()[at];
                for (value, colour) in pixel.iter_mut().zip(object.colour.rgb()) {
                    *value = (f32::from(*value) * (1.0 - cover) + f32::from(colour) * cover).round() as u8;
                }
            });
        }
        picture
    }

    /// What a picture of [`SIDE`] x [`SIDE`] pixels shows, by fixed rules and no learning, so that it
    /// can judge what a model has drawn. `None` where there is no object or more than two.
    ///
    /// Every object gets the colour and the outline that come nearest, each by itself, so that one
    /// can be right where the other is wrong.
    pub fn read(picture: &Picture) -> Option<Scene> {
        reader::read(picture)
    }
}

/// How many attributes of a scene were found.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Score {
    /// Objects to be found; those beyond what there is count too, as wrong ones.
    pub objects: usize,
    /// Objects of the right colour.
    pub colours_right: usize,
    /// Objects of the right shape.
    pub shapes_right: usize,
}

impl Score {
    /// Compares object by object in the order of the caption; a missing object is wrong.
    pub fn of(truth: &Scene, read: Option<&Scene>) -> Score {
        let (truth, read) = (truth.objects(), read.map(Scene::objects).unwrap_or_default());
        let right =
            |same: fn(&Object, &Object) -> bool| truth.iter().zip(&read).filter(|(t, r)| same(t, r)).count();
        Score {
            objects: truth.len().max(read.len()),
            colours_right: right(|t, r| t.colour == r.colour),
            shapes_right: right(|t, r| t.shape == r.shape),
        }
    }
}

impl std::ops::AddAssign for Score {
    fn add_assign(&mut self, other: Score) {
        self.objects += other.objects;
        self.colours_right += other.colours_right;
        self.shapes_right += other.shapes_right;
    }
}

/// Which kinds of objects appear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Split {
    /// The 36 kinds that are trained on.
    Train,
    /// The 12 kinds that are not: one in every scene, beside any kind that is trained on.
    HeldOut,
}

/// Scene `index` of an endless list: even ones have one object, odd ones two.
pub fn scene(seed: u64, split: Split, index: u64) -> Scene {
    let random = Stream::new(seed, Purpose::Data, index);
    let pick = |element, held_out| {
        let kinds: Vec<Object> = Object::all().filter(|o| o.held_out() == held_out).collect();
        kinds[random.below(element, kinds.len() as u32) as usize]
    };
    let held_out = split == Split::HeldOut;
    if index.is_multiple_of(2) {
        return Scene::One(pick(0, held_out));
    }
    let relation = Relation::ALL[random.below(2, Relation::ALL.len() as u32) as usize];
    let first = random.below(3, 2) == 0;
    Scene::Two(pick(0, held_out && first), relation, pick(1, held_out && !first))
}

/// Scene `index` of the endless list, and its picture.
pub fn example(seed: u64, split: Split, index: u64) -> (Scene, Picture) {
    let scene = scene(seed, split, index);
    // The picture's words come from the other end of the numbers, away from those of the scene.
    let picture = scene.draw(&Stream::new(seed, Purpose::Data, !index));
    (scene, picture)
}

/// The examples as documents, caption first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shapes {
    /// Seed of the list.
    pub seed: u64,
    /// Which kinds of objects appear.
    pub split: Split,
    /// How many there are; `None` for no end.
    pub count: Option<u64>,
}

impl Source for Shapes {
    fn len(&self) -> Option<u64> {
        self.count
    }

    fn document(&self, index: u64) -> Document {
        let index = self.count.and_then(|count| index.checked_rem(count)).unwrap_or(index);
        let (scene, picture) = example(self.seed, self.split, index);
        let parts = vec![Part::Text(scene.caption().into_bytes()), Part::Image(Arc::new(picture))];
        Document { parts, stream: false }
    }

    fn describe(&self) -> String {
        let kinds = match self.split {
            Split::Train => "built-in shapes",
            Split::HeldOut => "built-in shapes of kinds never trained on",
        };
        self.count.map_or(kinds.into(), |count| format!("{count} {kinds}"))
    }
}

#[cfg(test)]
mod tests;
