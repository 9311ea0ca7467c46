//! The means of the plots: scales, colours, markers, and files.

use maud::{Markup, PreEscaped, html};

use super::words;
use crate::bench::measurement::Contender;

/// All plots are so wide.
pub(super) const WIDTH: f64 = 960.0;

/// Colours that colour-blind people tell apart (after Okabe and Ito), darker on white and
/// lighter on black; each contender has a shape of its own besides. No variables: not all
/// that shows an SVG file knows them.
pub(super) const STYLE: &str = "
svg.plot { background: #ffffff; }
svg.plot text { font: 12px system-ui, 'DejaVu Sans', sans-serif; fill: #1f2328; }
svg.plot .title { font-size: 16px; font-weight: 600; }
svg.plot .bold { font-weight: 600; }
svg.plot .dim { fill: #59636e; }
svg.plot .small { font-size: 11px; }
svg.plot .paper { fill: #ffffff; }
svg.plot .grid { stroke: #d9dee3; }
svg.plot .axis { stroke: #59636e; }
svg.plot .bpf-bridge { color: #0067a5; }
svg.plot .xdp { color: #007a58; }
svg.plot .no-netfilter { color: #a8407b; }
svg.plot .stock { color: #c04a00; }
svg.plot .floor { color: #6e7781; }
svg.plot .user { fill: #b9a7d6; }
svg.plot .system { fill: #7a5ba8; }
svg.plot .softirq { fill: #3a2065; }
@media (prefers-color-scheme: dark) {
svg.plot { background: #15191e; }
svg.plot text { fill: #e6edf3; }
svg.plot .dim { fill: #9aa4af; }
svg.plot .paper { fill: #15191e; }
svg.plot .grid { stroke: #2f363e; }
svg.plot .axis { stroke: #9aa4af; }
svg.plot .bpf-bridge { color: #56b4e9; }
svg.plot .xdp { color: #2fcf9f; }
svg.plot .no-netfilter { color: #e59ac6; }
svg.plot .stock { color: #f08a3c; }
svg.plot .floor { color: #a8b0b8; }
svg.plot .user { fill: #5c4689; }
svg.plot .system { fill: #9a80cc; }
svg.plot .softirq { fill: #dccdf5; }
}
";

/// The whole of a plot.
pub(super) fn plot(title: &str, height: f64, content: &Markup) -> Markup {
    html! {
        svg class="plot" xmlns="http://www.w3.org/2000/svg" role="img" aria-label=(title)
            viewBox=(format!("0 0 {WIDTH} {}", height.ceil()))
            width=(WIDTH) height=(height.ceil()) {
            title { (title) }
            rect class="paper" width=(WIDTH) height=(height.ceil()) {}
            (content)
        }
    }
}

/// A plot as a file of its own, which brings its style along.
pub(super) fn file(plot: &Markup) -> String {
    let style = html! { style { (PreEscaped(STYLE)) } }.into_string();
    let text = plot.clone().into_string();
    match text.find("<title>") {
        Some(at) => format!("{}{style}{}\n", &text[..at], &text[at..]),
        None => text,
    }
}

/// The class of a contender.
pub(super) fn class(contender: Contender) -> &'static str {
    match contender {
        Contender::BpfBridge => "bpf-bridge",
        Contender::Xdp => "xdp",
        Contender::NoNetfilter => "no-netfilter",
        Contender::Stock => "stock",
        Contender::Floor => "floor",
    }
}

/// The shape of a contender, filled or not, in the colour of what is around it.
pub(super) fn marker(contender: Contender, x: f64, y: f64, filled: bool) -> Markup {
    let (x, y) = (px(x), px(y));
    let fill = if filled { "currentColor" } else { "none" };
    let path = |d: String| {
        html! { path d=(d) fill=(fill) stroke="currentColor" stroke-width="1.5" {} }
    };
    match contender {
        Contender::BpfBridge => html! {
            circle cx=(x) cy=(y) r="4" fill=(fill) stroke="currentColor" stroke-width="1.5" {}
        },
        Contender::Xdp => path(format!("M{x} {y}m0-5l5 5l-5 5l-5-5z")),
        Contender::NoNetfilter => path(format!("M{x} {y}m-3.7-3.7h7.4v7.4h-7.4z")),
        Contender::Stock => path(format!("M{x} {y}m0-4.6l4.6 8h-9.2z")),
        Contender::Floor => path(format!("M{x} {y}m-5 0h10m-5-5v10")),
    }
}

/// How the lines of a contender are drawn.
pub(super) fn dashes(contender: Contender) -> &'static str {
    match contender {
        Contender::BpfBridge | Contender::Stock => "none",
        Contender::Xdp => "7 3",
        Contender::NoNetfilter => "3 3",
        Contender::Floor => "1 4",
    }
}

/// Who is who, in one line that begins at (`x`, `y`).
pub(super) fn legend(contenders: &[(Contender, &str)], x: f64, y: f64) -> Markup {
    let mut at = x;
    html! {
        @for (contender, name) in contenders {
            g class=(class(*contender)) {
                (marker(*contender, at, y - 4.0, true))
                text x=(px(at + 10.0)) y=(px(y)) { (name) }
            }
            @let () = at += 34.0 + wide(name);
        }
    }
}

/// About how wide a text is.
pub(super) fn wide(text: &str) -> f64 {
    text.chars().count() as f64 * 6.9
}

/// Tenths of pixels are enough.
pub(super) fn px(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// Where values are on an axis.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
    log: bool,
}

impl Scale {
    /// A linear scale of all `values`; they lie between the pixels `start` and `end`.
    pub(super) fn linear(values: impl Iterator<Item = f64>, start: f64, end: f64) -> Option<Self> {
        let (from, to) = span(values)?;
        let room = ((to - from) * 0.04).max(f64::EPSILON * to.abs().max(1.0));
        // What begins at 0 is shown from there.
        let from = if from == 0.0 { 0.0 } else { from - room };
        Some(Self {
            from,
            to: to + room,
            start,
            end,
            log: false,
        })
    }

    /// A logarithmic one, of those above 0.
    pub(super) fn log(values: impl Iterator<Item = f64>, start: f64, end: f64) -> Option<Self> {
        let (from, to) = span(values.filter(|value| *value > 0.0))?;
        let room = (to / from).powf(0.04).max(1.02);
        Some(Self {
            from: from / room,
            to: to * room,
            start,
            end,
            log: true,
        })
    }

    /// From 0, or logarithmic if the values are of different sizes.
    pub(super) fn of_costs(values: &[f64], start: f64, end: f64) -> Option<Self> {
        let (from, to) = span(values.iter().copied())?;
        if from > 0.0 && to / from > 12.0 {
            Self::log(values.iter().copied(), start, end)
        } else {
            Self::linear(values.iter().copied().chain([0.0]), start, end)
        }
    }

    pub(super) fn is_log(&self) -> bool {
        self.log
    }

    pub(super) fn at(&self, value: f64) -> f64 {
        let share = if self.log {
            (value.max(self.from) / self.from).ln() / (self.to / self.from).ln()
        } else {
            (value - self.from) / (self.to - self.from)
        };
        self.start + share.clamp(0.0, 1.0) * (self.end - self.start)
    }

    /// Round values of the scale, some six of them.
    pub(super) fn ticks(&self) -> Vec<f64> {
        let decades = (self.to / self.from).log10();
        if self.log && decades > 0.5 {
            let steps: &[f64] = match decades {
                d if d > 4.0 => &[1.0],
                d if d > 2.0 => &[1.0, 3.0],
                d if d > 1.2 => &[1.0, 2.0, 5.0],
                _ => &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
            };
            let first = self.from.log10().floor() as i32;
            let last = self.to.log10().ceil() as i32;
            let ticks = (first..=last)
                .flat_map(|exponent| steps.iter().map(move |step| step * 10_f64.powi(exponent)));
            return ticks.filter(|tick| self.has(*tick)).collect();
        }
        let step = round_step((self.to - self.from) / 6.0);
        let first = (self.from / step).ceil() as i64;
        let last = (self.to / step).floor() as i64;
        (first..=last).map(|number| number as f64 * step).collect()
    }

    fn has(&self, value: f64) -> bool {
        (self.from..=self.to).contains(&value)
    }
}

fn span(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values
        .filter(|value| value.is_finite())
        .fold(None, |span, value| {
            let (low, high) = span.unwrap_or((value, value));
            Some((value.min(low), value.max(high)))
        })
}

/// 1, 2 or 5 times a power of ten, not less than `step`.
fn round_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|round| *round >= step)
        .unwrap_or(10.0 * power)
}

/// A tick's text: no more digits than it has.
pub(super) fn tick(value: f64) -> String {
    let rounded = (value * 1e6).round() / 1e6;
    if rounded >= 1000.0 {
        words::count(rounded as u64)
    } else {
        format!("{rounded}").replace('-', "−")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within() {
        let linear = Scale::linear([0.0, 47.0].into_iter(), 0.0, 100.0).unwrap();
        assert_eq!(linear.ticks(), [0.0, 10.0, 20.0, 30.0, 40.0]);
        let log = Scale::log([0.8, 250.0].into_iter(), 0.0, 100.0).unwrap();
        assert_eq!(log.ticks(), [1.0, 3.0, 10.0, 30.0, 100.0, 300.0]);
        let narrow = Scale::log([0.95, 1.12].into_iter(), 0.0, 100.0).unwrap();
        let ticks: Vec<_> = narrow.ticks().into_iter().map(tick).collect();
        assert_eq!(ticks, ["0.95", "1", "1.05", "1.1"]);
        assert!(Scale::log([0.0].into_iter(), 0.0, 1.0).is_none());
    }

    #[test]
    fn a_single_value_has_a_scale_too() {
        let one = Scale::linear([5.0].into_iter(), 10.0, 20.0).unwrap();
        assert!((10.0..=20.0).contains(&one.at(5.0)));
        let one = Scale::log([5.0].into_iter(), 10.0, 20.0).unwrap();
        assert!((10.0..=20.0).contains(&one.at(5.0)));
    }
}
