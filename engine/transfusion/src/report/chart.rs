//! Curves and bars as SVG, drawn by hand.
//!
//! A chart is 480 units wide whatever the screen, colours are classes of the style sheet, and every
//! mark tells its value when pointed at.
use super::escape;
use std::fmt::Write;

/// Size of the drawing, and of the plot in it: room for tick labels on the left and below.
const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 270.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 458.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 234.0;
/// Colours in the style sheet.
const COLOURS: usize = 6;
/// The most points of one line; more are averaged, for a page of bounded size.
const POINTS: usize = 400;
/// The largest number that is drawn.
const HUGE: f64 = 1e30;

/// How a value becomes a height.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scale {
    /// Proportionally.
    Linear,
    /// By its logarithm.
    Log,
}

/// How a series is drawn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A line through every point.
    Line,
    /// A faint line through every point and a strong one through their running average.
    Smoothed,
    /// A line and a mark on every point: for the few points of a validation.
    Marked,
    /// A dashed line: a baseline to compare with.
    Dashed,
}

/// Points `(step, value)` under one name, by ascending step.
#[derive(Clone, Debug)]
pub struct Series {
    /// What the legend calls it.
    pub name: String,
    /// How it is drawn.
    pub kind: Kind,
    /// Steps and values.
    pub points: Vec<(f64, f64)>,
}

impl Series {
    /// A series.
    pub fn new(name: &str, kind: Kind, points: impl IntoIterator<Item = (f64, f64)>) -> Series {
        Series { name: name.to_owned(), kind, points: points.into_iter().collect() }
    }
}

/// A range of values, their ticks, and the stretch of the drawing that they take.
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    ticks: Vec<f64>,
}

impl Axis {
    fn new(scale: Scale, (low, high): (f64, f64), (from, to): (f64, f64)) -> Axis {
        let (low, high, ticks) = match scale {
            Scale::Linear => {
                let step = nice_step((high - low) / 5.0);
                let first = (low / step).floor();
                let count = ((high / step).ceil() - first).clamp(1.0, 20.0);
                let ticks: Vec<f64> = (0..=count as u32).map(|i| (first + f64::from(i)) * step).collect();
                (first * step, (first + count) * step, ticks)
            }
            Scale::Log => log_ticks(low, high),
        };
        Axis { scale, low, high, from, to, ticks }
    }

    /// An axis that ends where its values do.
    fn tight(range: (f64, f64), stretch: (f64, f64)) -> Axis {
        let mut axis = Axis::new(Scale::Linear, range, stretch);
        (axis.low, axis.high) = range;
        axis.ticks.retain(|&t| range.0 <= t && t <= range.1);
        axis
    }

    fn at(&self, value: f64) -> f64 {
        let part = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        self.from + part * (self.to - self.from)
    }

    fn shows(&self, value: f64) -> bool {
        shows(self.scale, value)
    }
}

/// Whether a value has a place on a scale: numbers beyond [`HUGE`] are accidents, not measurements.
fn shows(scale: Scale, value: f64) -> bool {
    value.abs() <= HUGE && (scale == Scale::Linear || value >= 1.0 / HUGE)
}

/// 1, 2 or 5 times a power of ten, at least `rough`.
fn nice_step(rough: f64) -> f64 {
    let power = 10_f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|m| m * power).find(|&s| s >= rough * 0.999).unwrap_or(10.0 * power)
}

/// Ends and ticks of a logarithmic axis: 1, 2, 5, 10, ... over few decades, powers of ten over many.
fn log_ticks(low: f64, high: f64) -> (f64, f64, Vec<f64>) {
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let few = f64::from(last - first) <= 3.0;
    let steps: &[f64] = if few { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let stride = ((last - first) / 8).max(1) as usize;
    let all: Vec<f64> =
        (first..=last).step_by(stride).flat_map(|e| steps.iter().map(move |m| m * 10_f64.powi(e))).collect();
    let below = all.iter().copied().rfind(|&t| t <= low).unwrap_or(low);
    let above = all.iter().copied().find(|&t| t >= high).unwrap_or(high);
    (below, above, all.into_iter().filter(|t| (below..=above).contains(t)).collect())
}

/// Lowest and highest of some values, never equal; `empty` where there is none.
fn range(values: impl Iterator<Item = f64>, empty: (f64, f64)) -> (f64, f64) {
    let ends = values.fold(None, |ends: Option<(f64, f64)>, v| {
        Some(ends.map_or((v, v), |(low, high)| (low.min(v), high.max(v))))
    });
    match ends {
        None => empty,
        Some((low, high)) if high - low > 1e-12 * high.abs() => (low, high),
        Some((0.0, _)) => empty,
        Some((v, _)) => (v - v.abs() / 2.0, v + v.abs() / 2.0),
    }
}

pub(super) fn curve(title: &str, y: &str, scale: Scale, series: &[Series]) -> String {
    let lines: Vec<Vec<(f64, f64)>> = series.iter().map(|s| thin(&s.points)).collect();
    let drawn = |&&(x, y): &&(f64, f64)| shows(Scale::Linear, x) && shows(scale, y);
    let points = || lines.iter().flatten().filter(drawn);
    let (first, last) = range(points().map(|p| p.0), (0.0, 1.0));
    let first = if first > 0.0 && first < 0.1 * last { 0.0 } else { first };
    let xs = Axis::tight((first, last), (LEFT, RIGHT));
    let empty = if scale == Scale::Log { (0.1, 1.0) } else { (0.0, 1.0) };
    let (low, high) = range(points().map(|p| p.1), empty);
    // A linear axis starts at zero where that costs little of its height.
    let low = if scale == Scale::Linear && low > 0.0 && low < 0.4 * high { 0.0 } else { low };
    let ys = Axis::new(scale, (low, high), (BOTTOM, TOP));
    let mut svg = grid(&ys);
    for &tick in &xs.ticks {
        label(&mut svg, "x", xs.at(tick), BOTTOM + 18.0, &number(tick));
    }
    label(&mut svg, "x", RIGHT - (RIGHT - LEFT) / 2.0, HEIGHT - 3.0, "step");
    for (i, (s, points)) in series.iter().zip(&lines).enumerate() {
        let colour = i % COLOURS;
        match s.kind {
            Kind::Line => path(&mut svg, &xs, &ys, points, &format!("l c{colour}")),
            Kind::Dashed => path(&mut svg, &xs, &ys, points, &format!("l dash c{colour}")),
            Kind::Marked => path(&mut svg, &xs, &ys, points, &format!("l c{colour}")),
            Kind::Smoothed => {
                path(&mut svg, &xs, &ys, points, &format!("l raw c{colour}"));
                path(&mut svg, &xs, &ys, &smooth(points), &format!("l c{colour}"));
            }
        }
        if s.kind == Kind::Marked {
            marks(&mut svg, &xs, &ys, s, points, colour);
        }
    }
    let names = series.iter().map(|s| (s.name.as_str(), s.kind == Kind::Dashed));
    let unit = if scale == Scale::Log { format!("{y}, log scale") } else { y.to_owned() };
    figure(title, &unit, names, &svg)
}

pub(super) fn bars(title: &str, y: &str, groups: &[String], series: &[(String, Vec<f64>)]) -> String {
    let shown = |v: &f64| shows(Scale::Linear, *v);
    let heights = series.iter().flat_map(|(_, values)| values).copied().filter(shown);
    let (low, high) = range(heights.map(|v| v.max(0.0)).chain([0.0]), (0.0, 1.0));
    let ys = Axis::new(Scale::Linear, (low, high), (BOTTOM, TOP));
    let mut svg = grid(&ys);
    let slot = (RIGHT - LEFT) / groups.len().max(1) as f64;
    let width = slot * 0.76 / series.len().max(1) as f64;
    for (g, group) in groups.iter().enumerate() {
        let left = LEFT + slot * (g as f64 + 0.12);
        label(&mut svg, "x", LEFT + slot * (g as f64 + 0.5), BOTTOM + 18.0, group);
        for (s, (name, values)) in series.iter().enumerate() {
            let Some(&value) = values.get(g).filter(|v| shown(v)) else { continue };
            let (x, top) = (left + width * s as f64, ys.at(value.max(0.0)));
            let _ = writeln!(
                svg,
                "<rect class=\"c{}\" x=\"{x:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"1.5\">\
                 <title>{}, {}: {}</title></rect>",
                s % COLOURS,
                (width - 1.5).max(0.5),
                BOTTOM - top,
                escape(name),
                escape(group),
                number(value)
            );
        }
    }
    figure(title, y, series.iter().map(|(name, _)| (name.as_str(), false)), &svg)
}

/// Horizontal lines with their values.
fn grid(ys: &Axis) -> String {
    let mut svg = String::new();
    for (i, &tick) in ys.ticks.iter().enumerate() {
        let (y, class) = (ys.at(tick), if i == 0 { "axis" } else { "grid" });
        let _ = writeln!(svg, "<path class=\"{class}\" d=\"M{LEFT} {y:.1}H{RIGHT}\"/>");
        label(&mut svg, "y", LEFT - 7.0, y + 4.0, &number(tick));
    }
    svg
}

fn label(svg: &mut String, class: &str, x: f64, y: f64, text: &str) {
    let _ = writeln!(svg, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>", escape(text));
}

/// A line through the points, broken where one cannot be shown.
fn path(svg: &mut String, xs: &Axis, ys: &Axis, points: &[(f64, f64)], class: &str) {
    let (mut d, mut pen) = (String::new(), 'M');
    for &(x, y) in points {
        if xs.shows(x) && ys.shows(y) {
            let _ = write!(d, "{pen}{:.1} {:.1}", xs.at(x), ys.at(y));
            pen = 'L';
        } else {
            pen = 'M';
        }
    }
    if !d.is_empty() {
        let _ = writeln!(svg, "<path class=\"{class}\" d=\"{d}\"/>");
    }
}

fn marks(svg: &mut String, xs: &Axis, ys: &Axis, series: &Series, points: &[(f64, f64)], colour: usize) {
    let radius = if points.len() > 40 { 2.0 } else { 3.2 };
    for &(x, y) in points.iter().filter(|p| xs.shows(p.0) && ys.shows(p.1)) {
        let _ = writeln!(
            svg,
            "<circle class=\"c{colour}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius}\"><title>{}, step {}: {}</title></circle>",
            xs.at(x),
            ys.at(y),
            escape(&series.name),
            number(x),
            number(y)
        );
    }
}

/// The chart with its title, unit and legend.
fn figure<'a>(title: &str, unit: &str, names: impl Iterator<Item = (&'a str, bool)>, svg: &str) -> String {
    let entry = |(i, (name, dashed)): (usize, (&str, bool))| {
        let dash = if dashed { " dash" } else { "" };
        format!("<li><i class=\"c{}{dash}\"></i>{}</li>", i % COLOURS, escape(name))
    };
    let entries: Vec<String> = names.enumerate().map(entry).collect();
    // One series needs no legend: the title names it.
    let legend = if entries.len() > 1 {
        format!("<ul class=\"legend\">{}</ul>", entries.concat())
    } else {
        String::new()
    };
    let (title, unit) = (escape(title), escape(unit));
    format!(
        "<section class=\"chart\"><h3>{title} <small>{unit}</small></h3>{legend}\n\
         <svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">\n{svg}</svg></section>\n"
    )
}

/// At most [`POINTS`] points, each the mean of its neighbours; the last one stays.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let each = points.len().div_ceil(POINTS).max(1);
    let mean = |block: &[(f64, f64)]| {
        let finite: Vec<f64> = block.iter().map(|p| p.1).filter(|v| v.is_finite()).collect();
        let y = finite.iter().sum::<f64>() / finite.len() as f64;
        (block.last().map_or(0.0, |p| p.0), y)
    };
    points.chunks(each).map(mean).collect()
}

/// The mean over a fortieth of the points to either side, with their gaps. The window is centred, even
/// at the start, since one that only looks back draws a falling loss too high; at the end it must.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mean = |i: usize, &(x, y): &(f64, f64)| {
        let reach = (points.len() / 40).min(i);
        let near = points.iter().skip(i - reach).take(2 * reach + 1).map(|p| p.1);
        let near: Vec<f64> = near.filter(|&y| shows(Scale::Linear, y)).collect();
        let mean = near.iter().sum::<f64>() / near.len() as f64;
        (x, if shows(Scale::Linear, y) { mean } else { f64::NAN })
    };
    points.iter().enumerate().map(|(i, point)| mean(i, point)).collect()
}

/// A number as short as an axis wants it: `1.5k`, `0.25`, `3e-4`.
fn number(x: f64) -> String {
    let size = x.abs();
    let (divisor, suffix) = match size {
        s if s >= 9.995e14 => return format!("{x:.0e}"),
        s if s >= 9.995e8 => (1e9, "G"),
        s if s >= 9.995e5 => (1e6, "M"),
        s if s >= 9_999.5 => (1e3, "k"),
        0.0 => return "0".to_owned(),
        s if s < 9.995e-5 => {
            let text = format!("{x:.2e}");
            let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            return format!("{}e{exponent}", trim(digits));
        }
        _ => (1.0, ""),
    };
    let value = x / divisor;
    let decimals = (3 - value.abs().log10().floor() as i32).clamp(0, 6) as usize;
    format!("{}{suffix}", trim(&format!("{value:.decimals$}")))
}

/// Without zeros at the end of a fraction.
fn trim(digits: &str) -> &str {
    if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits }
}
