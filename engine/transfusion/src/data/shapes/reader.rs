//! Reading a scene off a picture: ink, connected regions, nearest colour, nearest outline.
use super::{Colour, Object, Relation, SIDE, Scene, Shape, Size};
use crate::picture::Picture;

/// Distance from white, of 442 to black, at which a pixel is ink. The palest pure colour, yellow, is
/// 240 away; noise of a twentieth of the range reaches 110 once in a million pixels.
const INK: f32 = 110.0;
/// Pixels below which a region is a speck; the smallest object covers 30.
const SPECK: usize = 12;

type Pixel = [f32; 3];

/// Connected pixels of ink and their rim.
struct Region {
    pixels: Vec<usize>,
}

pub(super) fn read(picture: &Picture) -> Option<Scene> {
    if (picture.width(), picture.height()) != (SIDE, SIDE) {
        return None;
    }
    let white_minus = |p: &[u8; 3]| p.map(|v| 255.0 - f32::from(v));
    let ink: Vec<Pixel> = picture.pixels().iter().map(white_minus).collect();
    let seen: Vec<([f32; 2], Object)> = regions(&ink).iter().map(|region| region.object(&ink)).collect();
    match seen[..] {
        [(_, object)] => Some(Scene::One(object)),
        [(a, first), (b, second)] => {
            let (dx, dy) = (b[0] - a[0], b[1] - a[1]);
            let (relation, ahead) = match dy.abs() > dx.abs() {
                true => (Relation::Above, dy > 0.0),
                false => (Relation::LeftOf, dx > 0.0),
            };
            let (first, second) = if ahead { (first, second) } else { (second, first) };
            Some(Scene::Two(first, relation, second))
        }
        _ => None,
    }
}

fn regions(ink: &[Pixel]) -> Vec<Region> {
    let mut free: Vec<bool> = ink.iter().map(|p| dot(p, p) > INK * INK).collect();
    let mut found = Vec::new();
    for start in 0..free.len() {
        let mut pixels = Vec::new();
        let mut open = vec![start];
        while let Some(at) = open.pop() {
            if std::mem::replace(&mut free[at], false) {
                pixels.push(at);
                open.extend(neighbours(at));
            }
        }
        if pixels.len() >= SPECK {
            pixels.extend(pixels.clone().into_iter().flat_map(neighbours));
            pixels.sort_unstable();
            pixels.dedup();
            found.push(Region { pixels });
        }
    }
    found
}

/// The up to eight pixels around one.
fn neighbours(at: usize) -> impl Iterator<Item = usize> {
    let (x, y) = (at % SIDE, at / SIDE);
    let near = |c: usize| c.saturating_sub(1)..(c + 2).min(SIDE);
    near(y).flat_map(move |v| near(x).map(move |u| v * SIDE + u)).filter(move |&n| n != at)
}

impl Region {
    /// The object that comes nearest, and where it is.
    fn object(&self, ink: &[Pixel]) -> ([f32; 2], Object) {
        let colour = self.colour(ink);
        let mut cover = vec![0.0; SIDE * SIDE];
        for &at in &self.pixels {
            cover[at] = share(&ink[at], colour).clamp(0.0, 1.0);
        }
        let centre = centroid(&cover);
        let kinds = Size::ALL.iter().flat_map(|&size| Shape::ALL.iter().map(move |&shape| (size, shape)));
        let fits = kinds.map(|(size, shape)| {
            let object = Object { size, colour, shape };
            (object, overlap(object, centre, &cover))
        });
        let best = fits.max_by(|a, b| a.1.total_cmp(&b.1));
        (
            centre,
            best.map_or(Object { size: Size::Small, colour, shape: Shape::Circle }, |(object, _)| object),
        )
    }

    /// The colour whose mixtures with white come nearest to the region's pixels.
    fn colour(&self, ink: &[Pixel]) -> Colour {
        let error = |colour: Colour| -> f32 {
            let pure = against_white(colour);
            let residue = |p: &Pixel| {
                let share = share(p, colour).clamp(0.0, 1.1);
                let rest: Pixel = std::array::from_fn(|c| p[c] - share * pure[c]);
                dot(&rest, &rest)
            };
            self.pixels.iter().map(|&at| residue(&ink[at])).sum()
        };
        let colours = Colour::ALL.iter().copied();
        colours.min_by(|&a, &b| error(a).total_cmp(&error(b))).unwrap_or(Colour::Black)
    }
}

/// Overlap over union of an object laid on the measured cover so that their centres of mass agree.
fn overlap(object: Object, centre: [f32; 2], cover: &[f32]) -> f32 {
    let middle = [SIDE as f32 / 2.0; 2];
    let mut template = vec![0.0; SIDE * SIDE];
    object.cover(middle, |at, share| template[at] = share);
    let mass = centroid(&template);
    let (mut both, mut own) = (0.0, 0.0);
    object.cover([0, 1].map(|axis| centre[axis] + middle[axis] - mass[axis]), |at, share| {
        both += share.min(cover[at]);
        own += share;
    });
    both / (own + cover.iter().sum::<f32>() - both)
}

fn centroid(cover: &[f32]) -> [f32; 2] {
    let (mut total, mut x, mut y) = (f32::MIN_POSITIVE, 0.0, 0.0);
    for (at, share) in cover.iter().enumerate() {
        total += share;
        x += share * ((at % SIDE) as f32 + 0.5);
        y += share * ((at / SIDE) as f32 + 0.5);
    }
    [x / total, y / total]
}

/// How much of `colour` a pixel holds, by least squares.
fn share(pixel: &Pixel, colour: Colour) -> f32 {
    let pure = against_white(colour);
    dot(pixel, &pure) / dot(&pure, &pure)
}

fn against_white(colour: Colour) -> Pixel {
    colour.rgb().map(|v| 255.0 - f32::from(v))
}

fn dot(a: &Pixel, b: &Pixel) -> f32 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}
