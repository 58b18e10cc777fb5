//! Lines over an axis, as SVG: just what the report needs.
//!
//! Colours are CSS variables (`--c` of the classes `c0` to `c7`), so that a page decides what they
//! are in light and dark. Runs differ by colour and by the shape of their marks.

use std::fmt::Write;

use super::text::{escape, plain};

/// Colours before they repeat; a repetition is dashed.
pub(super) const COLOURS: usize = 8;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;
const STRIP_HEIGHT: f64 = 84.0;
const STRIP_GAP: f64 = 40.0;
/// About the width of a letter of the labels.
const LETTER: f64 = 6.4;

/// What stands along an axis.
#[derive(Clone, Debug, Default)]
pub(super) struct Axis {
    /// With its unit.
    pub label: String,
    /// Shown at least.
    pub range: Option<(f64, f64)>,
    /// Positions with names, instead of round numbers.
    pub names: Vec<(f64, String)>,
    /// A logarithmic axis when the values span more than this factor.
    pub log_beyond: Option<f64>,
}

/// A mark and what it says when pointed at.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    /// Position.
    pub x: f64,
    /// Value.
    pub y: f64,
    /// Shown when pointed at.
    pub title: String,
    /// Written beside it, on a stem; else nothing.
    pub label: String,
}

/// One run.
#[derive(Clone, Debug, Default)]
pub(super) struct Series {
    /// In the legend.
    pub name: String,
    /// Position among the runs.
    pub colour: usize,
    /// Joined by a line.
    pub marks: Vec<Mark>,
    /// Range at each position: lowest, highest.
    pub band: Vec<(f64, f64, f64)>,
    /// Published values: hollow marks.
    pub hollow: Vec<Mark>,
}

/// Runs over one axis.
#[derive(Clone, Debug, Default)]
pub(super) struct Plot {
    /// Above it.
    pub title: String,
    /// Along.
    pub x: Axis,
    /// Up.
    pub y: Axis,
    /// One for each run.
    pub series: Vec<Series>,
}

/// Runs below each other over the same time.
#[derive(Clone, Debug, Default)]
pub(super) struct Strips {
    /// Above it.
    pub title: String,
    /// Along.
    pub x: Axis,
    /// Up, the same for all.
    pub y: Axis,
    /// One for each run.
    pub strips: Vec<Strip>,
}

/// One run over time.
#[derive(Clone, Debug, Default)]
pub(super) struct Strip {
    /// Above it.
    pub name: String,
    /// Position among the runs.
    pub colour: usize,
    /// Each with holes where nothing is known; the first is drawn strong, others faint.
    pub lines: Vec<Vec<Option<(f64, f64)>>>,
    /// Stages: from, to, short label, what it says when pointed at.
    pub stages: Vec<(f64, f64, String, String)>,
}

/// Values to positions.
#[derive(Clone, Copy, Debug)]
struct Scale {
    from: f64,
    to: f64,
    log: bool,
    /// Positions of `from` and `to`.
    at: (f64, f64),
}

impl Scale {
    fn position(&self, value: f64) -> f64 {
        let of = |v: f64| if self.log { v.max(f64::MIN_POSITIVE).ln() } else { v };
        let share = (of(value) - of(self.from)) / (of(self.to) - of(self.from));
        self.at.0 + share.clamp(-0.02, 1.02) * (self.at.1 - self.at.0)
    }

    /// A scale for these values, and about so many ticks.
    fn new(
        axis: &Axis,
        values: impl Iterator<Item = f64>,
        at: (f64, f64),
        about: f64,
    ) -> (Scale, Vec<f64>) {
        let values: Vec<f64> = values.filter(|v| v.is_finite()).collect();
        let positive = || values.iter().copied().filter(|&v| v > 0.0);
        let (low, high) = (positive().fold(f64::MAX, f64::min), positive().fold(0.0, f64::max));
        if axis.log_beyond.is_some_and(|factor| high > low * factor) {
            let ticks = log_ticks(low, high);
            let (from, to) = (ticks[0], ticks[ticks.len() - 1]);
            return (Scale { from, to, log: true, at }, ticks);
        }
        let (mut from, mut to) = axis.range.unwrap_or((0.0, 0.0));
        for value in &values {
            (from, to) = (from.min(*value), to.max(*value));
        }
        if to - from < 1e-9 {
            to = from + 1.0;
        }
        let step = round_step((to - from) / about);
        if axis.range.is_none_or(|(_, high)| to > high) {
            to = (to / step - 1e-9).ceil() * step;
        }
        let first = (from / step - 1e-9).ceil() as i64;
        let last = (to / step + 1e-9).floor() as i64;
        let ticks = (first..=last).map(|i| i as f64 * step).collect();
        (Scale { from, to, log: false, at }, ticks)
    }
}

/// 1, 2, 2.5 or 5 times a power of ten, at least this.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powi(least.log10().floor() as i32);
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|factor| factor * power);
    steps.into_iter().find(|step| *step >= least * (1.0 - 1e-9)).unwrap_or(10.0 * power)
}

/// From at most `low` to at least `high`; two or more. Few decades: 1, 2, 5; many: powers of ten.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let factors: &[f64] = if high < low * 2000.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let mut ticks: Vec<f64> = (first..=last)
        .flat_map(|power| factors.iter().map(move |factor| factor * 10f64.powi(power)))
        .collect();
    let above = ticks.iter().position(|&t| t >= high * 0.999).unwrap_or(ticks.len() - 1);
    ticks.truncate((above + 1).max(2));
    let below = ticks.iter().rposition(|&t| t <= low * 1.001).unwrap_or(0);
    ticks.drain(..below.min(ticks.len() - 2));
    ticks
}

impl Plot {
    /// The picture.
    pub fn svg(&self) -> String {
        let legend = self.legend();
        let (top, bottom) = (54.0 + 18.0 * legend.rows as f64, 44.0);
        let height = top + HEIGHT + bottom;
        let points = || self.series.iter().flat_map(|s| s.marks.iter().chain(&s.hollow));
        let bands = || self.series.iter().flat_map(|s| &s.band);
        let ys = points().map(|p| p.y).chain(bands().flat_map(|b| [b.1, b.2]));
        let (y, y_ticks) = Scale::new(&self.y, ys, (top + HEIGHT, top), 5.0);
        let (x, x_ticks) =
            Scale::new(&self.x, points().map(|p| p.x), (LEFT + 8.0, WIDTH - RIGHT - 8.0), 8.0);
        let mut svg = open(&self.title, height);
        svg.push_str(&legend.svg);
        grid(&mut svg, &y, &y_ticks);
        let base = top + HEIGHT;
        x_axis(&mut svg, &self.x, &x, &x_ticks, (top, base));
        axis_label(&mut svg, &self.y.label, top - 14.0);
        for series in &self.series {
            series.draw(&mut svg, &x, &y);
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn legend(&self) -> Legend {
        let mut legend = Legend { x: LEFT, y: 34.0, rows: 1, svg: String::new() };
        for series in &self.series {
            legend.entry(series.colour, &series.name, false);
        }
        if self.series.iter().any(|series| !series.hollow.is_empty()) {
            legend.entry(usize::MAX, "hollow: published", true);
        }
        legend
    }
}

/// A legend on its way: wraps before it leaves the picture.
struct Legend {
    x: f64,
    y: f64,
    rows: usize,
    svg: String,
}

impl Legend {
    fn entry(&mut self, colour: usize, name: &str, hollow: bool) {
        let mut name = name.to_owned();
        if name.chars().count() > 60 {
            name = name.chars().take(59).chain(['…']).collect();
        }
        let width = 30.0 + LETTER * name.chars().count() as f64 + 14.0;
        if self.x > LEFT && self.x + width > WIDTH {
            (self.x, self.y, self.rows) = (LEFT, self.y + 18.0, self.rows + 1);
        }
        let (x, y) = (self.x, self.y);
        let class = if hollow { "neutral".to_owned() } else { class(colour) };
        let _ = write!(self.svg, "<g class=\"{class}\">");
        if !hollow {
            let _ = write!(self.svg, "<path class=\"line\" d=\"M{x:.1} {y:.1}h22\"/>");
        }
        let kind = if hollow { "hollow" } else { "mark" };
        let shape = if hollow { 0 } else { colour };
        let _ = write!(self.svg, "<path class=\"{kind}\" d=\"{}\"/>", outline(shape, x + 11.0, y));
        let _ = writeln!(
            self.svg,
            "<text class=\"name\" x=\"{:.1}\" y=\"{:.1}\">{}</text></g>",
            x + 28.0,
            y + 4.0,
            escape(&name)
        );
        self.x += width;
    }
}

impl Series {
    fn draw(&self, svg: &mut String, x: &Scale, y: &Scale) {
        let _ = write!(svg, "<g class=\"{}\">", class(self.colour));
        let usable = |value: f64| value.is_finite() && (!y.log || value > 0.0);
        let band: Vec<_> = self.band.iter().filter(|b| usable(b.1) && usable(b.2)).collect();
        match band[..] {
            [] => {}
            [&(at, low, high)] => {
                let (at, low, high) = (x.position(at), y.position(low), y.position(high));
                let _ = write!(svg, "<path class=\"range\" d=\"M{at:.1} {low:.1}V{high:.1}\"/>");
            }
            _ => {
                let upper = band.iter().map(|b| (x.position(b.0), y.position(b.2)));
                let lower = band.iter().rev().map(|b| (x.position(b.0), y.position(b.1)));
                let path = path(upper.chain(lower).map(Some));
                let _ = write!(svg, "<path class=\"band\" d=\"{path}Z\"/>");
            }
        }
        let marks = || self.marks.iter().filter(|mark| usable(mark.y));
        let line = path(marks().map(|mark| Some((x.position(mark.x), y.position(mark.y)))));
        if !line.is_empty() {
            let _ = write!(svg, "<path class=\"line\" d=\"{line}\"/>");
        }
        let hollow = self.hollow.iter().filter(|mark| usable(mark.y)).map(|mark| ("hollow", mark));
        for (kind, mark) in hollow.chain(marks().map(|mark| ("mark", mark))) {
            let (left, top) = (x.position(mark.x), y.position(mark.y));
            if !mark.label.is_empty() {
                let label = escape(&mark.label);
                let _ = write!(
                    svg,
                    "<path class=\"stem\" d=\"M{left:.1} {:.1}V{top:.1}\"/>\
                     <text class=\"tick\" x=\"{left:.1}\" y=\"{:.1}\">{label}</text>",
                    y.at.0,
                    top - 9.0
                );
            }
            let at = outline(self.colour, left, top);
            let title = escape(&mark.title);
            let _ = write!(svg, "<path class=\"{kind}\" d=\"{at}\"><title>{title}</title></path>");
        }
        svg.push_str("</g>\n");
    }
}

impl Strips {
    /// The picture.
    pub fn svg(&self) -> String {
        let top = 30.0 + STRIP_GAP - 12.0;
        let pitch = STRIP_HEIGHT + STRIP_GAP;
        let base = top + pitch * self.strips.len() as f64 - STRIP_GAP;
        let mut svg = open(&self.title, base + 44.0);
        let points = || self.strips.iter().flat_map(|s| s.lines.iter().flatten().flatten());
        let ends = self.strips.iter().flat_map(|s| s.stages.iter().map(|stage| stage.1));
        let xs = points().map(|p| p.0).chain(ends);
        let (x, x_ticks) = Scale::new(&self.x, xs, (LEFT, WIDTH - RIGHT), 8.0);
        for (at, strip) in self.strips.iter().enumerate() {
            let top = top + pitch * at as f64;
            let values = points().map(|p| p.1);
            let (y, ticks) = Scale::new(&self.y, values, (top + STRIP_HEIGHT, top), 2.0);
            grid(&mut svg, &y, &ticks);
            strip.draw(&mut svg, &x, &y);
        }
        x_axis(&mut svg, &self.x, &x, &x_ticks, (base, base));
        svg.push_str("</svg>\n");
        svg
    }
}

impl Strip {
    fn draw(&self, svg: &mut String, x: &Scale, y: &Scale) {
        let (base, top) = y.at;
        let _ = write!(
            svg,
            "<g class=\"{}\"><text class=\"name strong\" x=\"{LEFT}\" y=\"{:.1}\">{}</text>",
            class(self.colour),
            top - 20.0,
            escape(&self.name)
        );
        for (from, to, label, _) in &self.stages {
            let (from, to) = (x.position(*from), x.position(*to));
            let _ = write!(svg, "<path class=\"stage\" d=\"M{from:.1} {top:.1}V{base:.1}\"/>");
            if to - from > LETTER * label.chars().count() as f64 {
                let (at, y) = ((from + to) / 2.0, top - 5.0);
                let label = escape(label);
                let _ =
                    write!(svg, "<text class=\"tiny\" x=\"{at:.1}\" y=\"{y:.1}\">{label}</text>");
            }
        }
        for (at, line) in self.lines.iter().enumerate().rev() {
            let kind = if at == 0 { "trace" } else { "faint" };
            let line = path(line.iter().map(|p| p.map(|(a, b)| (x.position(a), y.position(b)))));
            if !line.is_empty() {
                let _ = write!(svg, "<path class=\"{kind}\" d=\"{line}\"/>");
            }
        }
        for (from, to, _, title) in &self.stages {
            let (from, to) = (x.position(*from), x.position(*to));
            let _ = write!(
                svg,
                "<rect class=\"touch\" x=\"{from:.1}\" y=\"{top:.1}\" width=\"{:.1}\" \
                 height=\"{:.1}\"><title>{}</title></rect>",
                (to - from).max(0.0),
                base - top,
                escape(title)
            );
        }
        svg.push_str("</g>\n");
    }
}

fn open(title: &str, height: f64) -> String {
    let title = escape(title);
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">\
         <text class=\"title\" x=\"4\" y=\"16\">{title}</text>\n"
    )
}

fn grid(svg: &mut String, y: &Scale, ticks: &[f64]) {
    for tick in ticks {
        let at = y.position(*tick);
        let _ = write!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{:.1}\"/>\
             <text class=\"tick up\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            plain(*tick)
        );
    }
    svg.push('\n');
}

fn x_axis(svg: &mut String, axis: &Axis, x: &Scale, ticks: &[f64], (top, base): (f64, f64)) {
    let rounded = || ticks.iter().map(|tick| (*tick, plain(*tick))).collect();
    let names: Vec<(f64, String)> =
        if axis.names.is_empty() { rounded() } else { axis.names.clone() };
    let _ = write!(svg, "<path class=\"axis\" d=\"M{LEFT} {base:.1}H{:.1}\"/>", WIDTH - RIGHT);
    let mut free = f64::MIN;
    for (value, name) in &names {
        let at = x.position(*value);
        if top < base && axis.names.is_empty() {
            let _ = write!(svg, "<path class=\"grid\" d=\"M{at:.1} {top:.1}V{base:.1}\"/>");
        }
        let half = LETTER * name.chars().count() as f64 / 2.0;
        if at - half < free {
            continue;
        }
        free = at + half + 4.0;
        let name = escape(name);
        let _ = write!(
            svg,
            "<path class=\"axis\" d=\"M{at:.1} {base:.1}v4\"/>\
             <text class=\"tick\" x=\"{at:.1}\" y=\"{:.1}\">{name}</text>",
            base + 17.0
        );
    }
    let _ = writeln!(
        svg,
        "<text class=\"label\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        base + 36.0,
        escape(&axis.label)
    );
}

fn axis_label(svg: &mut String, label: &str, y: f64) {
    let label = escape(label);
    let _ = writeln!(svg, "<text class=\"label left\" x=\"4\" y=\"{y:.1}\">{label}</text>");
}

/// The classes of a run.
pub(super) fn class(colour: usize) -> String {
    match colour / COLOURS {
        0 => format!("c{colour}"),
        _ => format!("c{} again", colour % COLOURS),
    }
}

/// A line through points, broken where there is none; a lonely point is a dot.
fn path(points: impl Iterator<Item = Option<(f64, f64)>>) -> String {
    let mut path = String::new();
    let mut length = 0;
    for point in points.chain([None]) {
        length = match point {
            Some((x, y)) => {
                let _ = write!(path, "{}{x:.1} {y:.1}", if length == 0 { "M" } else { "L" });
                length + 1
            }
            None => {
                if length == 1 {
                    path.push_str("h0");
                }
                0
            }
        };
    }
    path
}

/// A mark's outline around a position; the shape tells runs apart without colour.
fn outline(shape: usize, x: f64, y: f64) -> String {
    match shape % 4 {
        0 => format!("M{:.1} {y:.1}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z", x - 4.0),
        1 => format!("M{:.1} {:.1}h7v7h-7Z", x - 3.5, y - 3.5),
        2 => format!("M{x:.1} {:.1}l4.5 8h-9Z", y - 5.0),
        _ => format!("M{x:.1} {:.1}l5 5l-5 5l-5 -5Z", y - 5.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale(axis: &Axis, values: &[f64]) -> (Scale, Vec<f64>) {
        Scale::new(axis, values.iter().copied(), (0.0, 100.0), 5.0)
    }

    #[test]
    fn axes_are_round_and_hold_their_values() {
        let cases: [(&[f64], &[f64]); 4] = [
            (&[3.0, 47.0], &[0.0, 10.0, 20.0, 30.0, 40.0, 50.0]),
            (&[], &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
            (&[f64::NAN, f64::INFINITY, 0.0], &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
            (&[9000.0, 10_500.0], &[0.0, 2500.0, 5000.0, 7500.0, 10_000.0, 12_500.0]),
        ];
        for (values, expected) in cases {
            let (scale, ticks) = scale(&Axis::default(), values);
            assert_eq!(ticks.len(), expected.len(), "{values:?}: {ticks:?}");
            assert!(ticks.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9), "{ticks:?}");
            assert!(values.iter().all(|v| !v.is_finite() || *v <= scale.to));
        }
    }

    #[test]
    fn a_wide_span_is_logarithmic() {
        let axis = Axis { log_beyond: Some(20.0), ..Axis::default() };
        let (narrow, _) = scale(&axis, &[0.2, 3.0]);
        assert!(!narrow.log);
        let (wide, ticks) = scale(&axis, &[0.0, 0.23, 92.0]);
        assert!(wide.log && ticks[0] == 0.2 && *ticks.last().unwrap() == 100.0, "{ticks:?}");
        assert!((wide.position(0.2) - 0.0).abs() < 1e-9 && wide.position(100.0) > 99.9);
        let (deep, ticks) = scale(&axis, &[1e-6, 9e5]);
        assert!(deep.log && ticks.len() < 16, "{ticks:?}");
        assert!(log_ticks(2.0, 2.0).len() >= 2);
    }

    #[test]
    fn a_line_breaks_where_nothing_is_known() {
        let points = [Some((0.0, 1.0)), Some((1.0, 2.0)), None, Some((3.0, 4.0))];
        assert_eq!(path(points.into_iter()), "M0.0 1.0L1.0 2.0M3.0 4.0h0");
    }
}
