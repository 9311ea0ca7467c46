//! The plots.

use maud::{Markup, html};

use super::{
    Report,
    svg::{self, Scale, WIDTH, class, dashes, legend, marker, px, tick, wide},
    verb, words,
};
use crate::bench::{
    measurement::{Axis, Better, Contender, Cpu, Measurement},
    statistics::{Comparison, Summary},
};

/// Panels stand side by side, so many.
const COLUMNS: usize = 3;
const PANEL: (f64, f64) = (312.0, 236.0);

/// A plot and what it is called.
pub(super) struct Plot {
    /// Of the file.
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    pub(super) svg: Markup,
}

impl Plot {
    fn new(name: &'static str, title: &'static str, svg: Option<Markup>) -> Option<Self> {
        svg.map(|svg| Self { name, title, svg })
    }
}

/// A part of the CPU's time: its name and class, and how much of it there is.
type Time = (&'static str, fn(&Cpu) -> f64);

/// A comparison as it is drawn.
struct Mark {
    contender: Contender,
    found: Comparison,
    told: String,
}

/// A row of a plot of comparisons.
struct Line<'a> {
    group: &'a str,
    what: String,
    marks: Vec<Mark>,
}

/// A curve, or what else stands for a contender in a panel.
struct Curve {
    contender: Contender,
    /// With the interval of y.
    points: Vec<(f64, f64, (f64, f64))>,
    markers: bool,
}

/// A small plot among others.
struct Panel {
    title: String,
    x_title: &'static str,
    y_title: String,
    /// Where x has a number: the place, and what stands there.
    x_ticks: Vec<(f64, String)>,
    curves: Vec<Curve>,
}

impl Report {
    /// Those of the page: all that there is something for.
    pub(super) fn plots(&self) -> Vec<Plot> {
        self.plots_with(self.latencies(true), self.cpu(|_| true))
    }

    /// Those of the documentation: of latencies one panel for each path and verb, and the
    /// CPU of one family.
    pub(super) fn few_plots(&self) -> Vec<Plot> {
        let cpu = self.cpu(|measurement| !measurement.name.contains("IPv6"));
        self.plots_with(self.latencies(false), cpu)
    }

    fn plots_with(&self, latencies: Option<Markup>, cpu: Option<Markup>) -> Vec<Plot> {
        let plots = [
            Plot::new("packets", "Packets beside stock", self.ratios(false)),
            Plot::new("calls", "Calls beside stock", self.ratios(true)),
            Plot::new("floor", "Packets beside the floor", self.shares()),
            Plot::new("calls-floor", "Calls beside the floor", self.differences()),
            Plot::new("pods", "With more and more pods", self.curves(Axis::Pods)),
            Plot::new(
                "ports",
                "With more and more published ports",
                self.curves(Axis::Ports),
            ),
            Plot::new("latencies", "Latencies", latencies),
            Plot::new("cpu", "CPU", cpu),
        ];
        plots.into_iter().flatten().collect()
    }

    /// How much better than stock, of packets or of calls.
    fn ratios(&self, calls: bool) -> Option<Markup> {
        let lines = self.lines(calls, |measurement, contender| {
            let found = contender
                .is_ours()
                .then(|| measurement.advantage_of(contender))??;
            let told = words::ratio(&found);
            Some(Mark {
                contender,
                found,
                told,
            })
        });
        let stock = self.name(Contender::Stock);
        let title = format!(
            "{}: how many times better than {stock}",
            if calls { "Calls" } else { "Packets" }
        );
        self.forest(&lines, &title, "right of 1 is better", 1.0, Scale::log)
    }

    /// How far packets are from the floor, in per cent.
    fn shares(&self) -> Option<Markup> {
        let lines = self.lines(false, |measurement, contender| {
            let found = measurement.distance_of(contender)?;
            let told = words::distance(measurement, &found);
            let percent = |value: f64| (value - 1.0) * 100.0;
            let found = found.map(percent);
            Some(Mark {
                contender,
                found,
                told,
            })
        });
        let title = "Packets: how far from a raw veth pair, in %";
        self.forest(
            &lines,
            title,
            "0 is the floor, to the left is worse",
            0.0,
            Scale::linear,
        )
    }

    /// How far calls are from the floor, in their unit.
    fn differences(&self) -> Option<Markup> {
        let lines = self.lines(true, |measurement, contender| {
            measurement.additive.then_some(())?;
            let found = measurement.distance_of(contender)?;
            let told = words::distance(measurement, &found);
            Some(Mark {
                contender,
                found,
                told,
            })
        });
        let title = "Calls: what is added to the bare netlink requests, in ms";
        self.forest(&lines, title, "to the left is better", 0.0, Scale::linear)
    }

    fn lines(
        &self,
        calls: bool,
        mark: impl Fn(&Measurement, Contender) -> Option<Mark>,
    ) -> Vec<Line<'_>> {
        let groups = self.groups();
        let rows = groups.iter().flat_map(|group| {
            let rows = group.rows.iter();
            rows.map(move |(what, measurement)| (group.name, *what, *measurement))
        });
        let lines = rows.filter(|(.., measurement)| verb(&measurement.name).is_some() == calls);
        let lines = lines.map(|(group, what, measurement)| {
            let values = measurement.values.iter().map(|(contender, _)| *contender);
            let others = values.filter(|contender| *contender != Contender::Floor);
            Line {
                group,
                what: what.to_owned(),
                marks: others.filter_map(|who| mark(measurement, who)).collect(),
            }
        });
        lines.filter(|line| !line.marks.is_empty()).collect()
    }

    /// Medians with their intervals, one below the other, by `neutral`.
    fn forest<S>(
        &self,
        lines: &[Line<'_>],
        title: &str,
        hint: &str,
        neutral: f64,
        scale: S,
    ) -> Option<Markup>
    where
        S: FnOnce(std::vec::IntoIter<f64>, f64, f64) -> Option<Scale>,
    {
        const ROW: f64 = 20.0;
        const APART: f64 = 6.0;
        const TOP: f64 = 94.0;
        let marks = || lines.iter().flat_map(|line| &line.marks);
        let left = lines
            .iter()
            .map(|line| wide(&line.what))
            .fold(120.0, f64::max)
            + 34.0;
        // Of the first of each row there is room to tell it in words.
        let told = lines.iter().filter_map(|line| line.marks.first());
        let right = told.map(|mark| wide(&mark.told)).fold(40.0, f64::max) + 14.0;
        let mut values = vec![neutral];
        for mark in marks() {
            let (low, high) = mark.found.summary().interval;
            values.extend([low, high]);
        }
        let scale = scale(values.into_iter(), left, WIDTH - right)?;
        let contenders = self.named(marks().map(|mark| mark.contender));
        let mut headings = Vec::new();
        let mut at = TOP + 10.0;
        let mut places = Vec::new();
        for line in lines {
            if headings
                .last()
                .is_none_or(|(group, _)| *group != line.group)
            {
                at += 8.0;
                headings.push((line.group, at));
                at += ROW;
            }
            let below = line.marks.len().saturating_sub(1) as f64 * APART;
            places.push(at + below / 2.0);
            at += ROW + below;
        }
        (!lines.is_empty()).then(|| {
            let content = html! {
                text class="title" x="14" y="24" { (title) }
                text class="dim" x="14" y="44" {
                    "Median of paired comparisons, 95 % interval; " (hint)
                    "; hollow: the same, smaller than the noise; in words: bpf-bridge"
                }
                (legend(&contenders, 20.0, 66.0))
                (axis_lines(&scale, TOP, at))
                line class="axis" x1=(px(scale.at(neutral))) x2=(px(scale.at(neutral)))
                    y1=(TOP) y2=(px(at)) stroke-width="1.5" {}
                @for (group, y) in &headings {
                    text class="bold" x="14" y=(px(*y + 4.0)) { (group) }
                }
                @for (line, y) in lines.iter().zip(&places) {
                    text x="28" y=(px(y + 4.0)) { (line.what) }
                    line class="grid" x1=(px(left)) x2=(px(WIDTH - right)) y1=(px(*y)) y2=(px(*y)) stroke-dasharray="1 4" {}
                    @for (number, mark) in line.marks.iter().enumerate() {
                        @let from_middle = number as f64 - (line.marks.len() - 1) as f64 / 2.0;
                        (self.draw_mark(line, mark, &scale, y + from_middle * APART))
                    }
                    @if let Some(mark) = line.marks.first() {
                        text x=(px(WIDTH - right + 12.0)) y=(px(y + 4.0)) { (mark.told) }
                    }
                }
            };
            svg::plot(title, at + 28.0, &content)
        })
    }

    fn draw_mark(&self, line: &Line<'_>, mark: &Mark, scale: &Scale, y: f64) -> Markup {
        let summary = mark.found.summary();
        let (low, high) = summary.interval;
        let different = matches!(mark.found, Comparison::Different(_));
        let name = self.name(mark.contender);
        html! {
            g class=(class(mark.contender)) {
                title { (name) ", " (line.group) ", " (line.what) ": " (mark.told) }
                line x1=(px(scale.at(low))) x2=(px(scale.at(high))) y1=(px(y)) y2=(px(y))
                    stroke="currentColor" stroke-width="2" {}
                (marker(mark.contender, scale.at(summary.median), y, different))
            }
        }
    }

    /// Contenders, each once, with their names.
    fn named(&self, contenders: impl Iterator<Item = Contender>) -> Vec<(Contender, &'static str)> {
        let mut contenders: Vec<_> = contenders.collect();
        contenders.sort_unstable();
        contenders.dedup();
        contenders
            .into_iter()
            .map(|contender| (contender, self.name(contender)))
            .collect()
    }

    /// What the measurements of a curve are with more and more pods, or ports.
    fn curves(&self, axis: Axis) -> Option<Markup> {
        let mut names: Vec<&str> = Vec::new();
        let points = || {
            self.found.measurements.iter().filter_map(|measurement| {
                let point = measurement
                    .point
                    .as_ref()
                    .filter(|point| point.axis == axis)?;
                Some((measurement, point))
            })
        };
        for (_, point) in points() {
            if !names.contains(&point.curve.as_str()) {
                names.push(&point.curve);
            }
        }
        let (title, x_title) = match axis {
            Axis::Pods => ("Cost against the number of pods on the node", "pods"),
            Axis::Ports => (
                "Cost against the number of published ports on the node",
                "published ports",
            ),
        };
        let panels = names.into_iter().filter_map(|name| {
            let mut points: Vec<_> = points().filter(|(_, point)| point.curve == name).collect();
            points.sort_by_key(|(_, point)| point.at);
            let (measurement, _) = points.first()?;
            let least = points
                .iter()
                .map(|(_, point)| point.at)
                .find(|at| *at > 0)?;
            let most = points.last()?.1.at;
            // One point is no curve.
            (points.first()?.1.at < most).then_some(())?;
            // Logarithmic; 0 has a place before the others.
            let place = |at: u64| {
                if at == 0 {
                    (least as f64 / 10.0).log10()
                } else {
                    (at as f64).log10()
                }
            };
            let contenders = self.named(points.iter().flat_map(|(measurement, _)| {
                measurement.values.iter().map(|(contender, _)| *contender)
            }));
            let curves = contenders.into_iter().map(|(contender, _)| Curve {
                contender,
                points: points
                    .iter()
                    .filter_map(|(measurement, point)| {
                        let summary = Summary::of(measurement.values(contender))?;
                        Some((place(point.at), summary.median, summary.interval))
                    })
                    .collect(),
                markers: true,
            });
            Some(Panel {
                title: name.to_owned(),
                x_title,
                y_title: format!("{}, {}", measurement.unit, better(measurement.better)),
                x_ticks: points
                    .iter()
                    .map(|(_, point)| (place(point.at), words::count(point.at)))
                    .collect(),
                curves: curves.filter(|curve| !curve.points.is_empty()).collect(),
            })
        });
        let hint =
            "Medians with their 95 % intervals; flat is good; the axis of numbers is logarithmic";
        self.panels(title, hint, panels.collect())
    }

    /// The share of transactions and calls that take no longer; of `all`, or the first of
    /// each path and verb.
    fn latencies(&self, all: bool) -> Option<Markup> {
        let mut panels = Vec::new();
        for group in self.groups() {
            let mut of_group = group
                .rows
                .iter()
                .filter_map(|(_, measurement)| latency(measurement));
            if all {
                panels.extend(of_group);
            } else {
                panels.extend(of_group.next());
            }
        }
        let hint =
            "How long the given share of them took at most; lower is better; the tail is stretched";
        self.panels("Latencies of single transactions and calls", hint, panels)
    }

    fn panels(&self, title: &str, hint: &str, panels: Vec<Panel>) -> Option<Markup> {
        let curves = panels.iter().flat_map(|panel| &panel.curves);
        let contenders = self.named(curves.map(|curve| curve.contender));
        let rows = panels.len().div_ceil(COLUMNS) as f64;
        let place = |number: usize| {
            let (row, column) = ((number / COLUMNS) as f64, (number % COLUMNS) as f64);
            (8.0 + column * (PANEL.0 + 4.0), 80.0 + row * PANEL.1)
        };
        (!panels.is_empty()).then(|| {
            let content = html! {
                text class="title" x="14" y="24" { (title) }
                text class="dim" x="14" y="44" { (hint) }
                (legend(&contenders, 20.0, 66.0))
                @for (number, panel) in panels.iter().enumerate() {
                    (panel.draw(place(number)))
                }
            };
            svg::plot(title, 80.0 + rows * PANEL.1 + 6.0, &content)
        })
    }

    /// What transactions took of the CPU.
    fn cpu(&self, wanted: impl Fn(&Measurement) -> bool) -> Option<Markup> {
        const BAR: f64 = 17.0;
        const TIMES: [Time; 3] = [
            ("user", |cpu| cpu.user),
            ("system", |cpu| cpu.system),
            ("softirq", |cpu| cpu.softirq),
        ];
        let total = |cpu: &Cpu| TIMES.iter().map(|(_, time)| time(cpu)).sum::<f64>();
        let measurements = self.found.measurements.iter();
        let measured: Vec<_> = measurements
            .filter(|measurement| !measurement.cpu.is_empty() && wanted(measurement))
            .collect();
        let names = measured.iter().flat_map(|measurement| &measurement.cpu);
        let names = names
            .map(|(contender, _)| wide(self.name(*contender)))
            .fold(0.0, f64::max);
        let left = 38.0 + names;
        let room = WIDTH - left - 84.0;
        let mut at = 84.0;
        let title = "CPU of a transaction, a packet or a connection, in µs";
        (!measured.is_empty()).then(|| {
            let content = html! {
                text class="title" x="14" y="24" { (title) }
                text class="dim" x="14" y="44" {
                    "Of both ends and what is between; bars are relative to the longest of each kind; shorter is better"
                }
                @for (number, (name, _)) in TIMES.iter().enumerate() {
                    rect class=(name) x=(14 + number * 90) y="56" width="14" height="12" {}
                    text x=(34 + number * 90) y="66" { (name) }
                }
                @for measurement in &measured {
                    @let most = measurement.cpu.iter().map(|(_, cpu)| total(cpu)).fold(f64::MIN_POSITIVE, f64::max);
                    text class="bold" x="14" y=(px(at + 12.0)) { (measurement.name) }
                    @let () = at += 19.0;
                    @for (contender, cpu) in &measurement.cpu {
                        text x="28" y=(px(at + 11.0)) { (self.name(*contender)) }
                        @let mut x = left;
                        @for (name, time) in TIMES {
                            @let width = time(cpu) / most * room;
                            rect class=(name) x=(px(x)) y=(px(at)) width=(px(width)) height=(BAR - 4.0) {
                                title { (name) ": " (words::digits(time(cpu))) " µs" }
                            }
                            @let () = x += width;
                        }
                        text x=(px(x + 6.0)) y=(px(at + 11.0)) { (words::digits(total(cpu))) }
                        @let () = at += BAR;
                    }
                    @let () = at += 8.0;
                }
            };
            svg::plot(title, at + 6.0, &content)
        })
    }
}

/// How long single transactions, or else calls, took; `None` if nobody knows.
fn latency(measurement: &Measurement) -> Option<Panel> {
    // The nines on which a percentile lies: what is beyond 99 % has room.
    let place = |share: f64| -(1.0 - share).log10();
    let is_call = measurement.additive && verb(&measurement.name).is_some();
    let single: Vec<(Contender, Vec<(f64, f64)>)> = if is_call {
        let calls = measurement.values.iter();
        calls
            .map(|(contender, values)| (*contender, distribution(values)))
            .collect()
    } else {
        measurement.latencies.clone()
    };
    let curves: Vec<Curve> = single
        .into_iter()
        .map(|(contender, points)| Curve {
            contender,
            points: points
                .into_iter()
                .filter(|(share, time)| (0.0..1.0).contains(share) && *time > 0.0)
                .map(|(share, time)| (place(share), time, (time, time)))
                .collect(),
            markers: false,
        })
        .filter(|curve| curve.points.len() > 1)
        .collect();
    let most = curves.iter().flat_map(|curve| &curve.points);
    let most = most.map(|(x, ..)| *x).reduce(f64::max)?;
    let shares = [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999];
    let x_ticks = shares.map(|share| (place(share).max(0.0), tick(share * 100.0)));
    let unit = if is_call {
        measurement.unit.as_str()
    } else {
        "µs"
    };
    Some(Panel {
        title: measurement.name.clone(),
        x_title: "% of them",
        y_title: format!("{unit}, lower is better"),
        x_ticks: x_ticks.into_iter().filter(|(x, _)| *x <= most).collect(),
        curves,
    })
}

/// Which part of the values is not above each of them.
fn distribution(values: &[f64]) -> Vec<(f64, f64)> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len() as f64;
    let share = |at: usize| (at as f64 + 0.5) / count;
    sorted
        .iter()
        .enumerate()
        .map(|(at, &value)| (share(at), value))
        .collect()
}

fn better(better: Better) -> &'static str {
    match better {
        Better::Lower => "lower is better",
        Better::Higher => "higher is better",
    }
}

/// Lines at the ticks of a horizontal axis.
fn axis_lines(scale: &Scale, top: f64, bottom: f64) -> Markup {
    html! {
        // Above, too: some plots are longer than a screen.
        @for value in scale.ticks() {
            text class="dim small" x=(px(scale.at(value))) y=(px(top - 4.0)) text-anchor="middle" { (tick(value)) }
        }
        @for value in scale.ticks() {
            @let x = px(scale.at(value));
            line class="grid" x1=(x) x2=(x) y1=(px(top)) y2=(px(bottom)) {}
            text class="dim small" x=(x) y=(px(bottom + 16.0)) text-anchor="middle" { (tick(value)) }
        }
    }
}

impl Panel {
    fn draw(&self, (left, top): (f64, f64)) -> Markup {
        let (start, end) = (left + 52.0, left + PANEL.0 - 14.0);
        let (floor, ceiling) = (top + PANEL.1 - 48.0, top + 46.0);
        let points = || self.curves.iter().flat_map(|curve| &curve.points);
        let ticks = self.x_ticks.iter().map(|(x, _)| *x);
        let Some(across) = Scale::linear(points().map(|(x, ..)| *x).chain(ticks), start, end)
        else {
            return Markup::default();
        };
        let heights: Vec<f64> = points()
            .flat_map(|(_, y, (low, high))| [*y, *low, *high])
            .collect();
        let Some(up) = Scale::of_costs(&heights, floor, ceiling) else {
            return Markup::default();
        };
        let log = if up.is_log() { ", logarithmic" } else { "" };
        let mut free = f64::MIN;
        html! {
            text class="bold small" x=(px(left + 6.0)) y=(px(top + 16.0)) { (shortened(&self.title)) title { (self.title) } }
            text class="dim small" x=(px(left + 6.0)) y=(px(top + 32.0)) { (self.y_title) (log) }
            @for value in up.ticks() {
                @let y = px(up.at(value));
                line class="grid" x1=(px(start)) x2=(px(end)) y1=(y) y2=(y) {}
                text class="dim small" x=(px(start - 6.0)) y=(px(up.at(value) + 4.0)) text-anchor="end" { (tick(value)) }
            }
            line class="axis" x1=(px(start)) x2=(px(end)) y1=(px(floor)) y2=(px(floor)) {}
            @for (x, text) in &self.x_ticks {
                @let x = across.at(*x);
                line class="axis" x1=(px(x)) x2=(px(x)) y1=(px(floor)) y2=(px(floor + 4.0)) {}
                // Where there is no room a number is left out.
                @if x - wide(text) / 2.0 > free {
                    text class="dim small" x=(px(x)) y=(px(floor + 17.0)) text-anchor="middle" { (text) }
                    @let () = free = x + wide(text) / 2.0 + 4.0;
                }
            }
            text class="dim small" x=(px(end)) y=(px(floor + 33.0)) text-anchor="end" { (self.x_title) }
            @for curve in &self.curves {
                g class=(class(curve.contender)) {
                    @let line: Vec<String> = curve.points.iter()
                        .map(|(x, y, _)| format!("{},{}", px(across.at(*x)), px(up.at(*y))))
                        .collect();
                    polyline points=(line.join(" ")) fill="none" stroke="currentColor" stroke-width="1.8"
                        stroke-dasharray=(dashes(curve.contender)) {}
                    @if curve.markers {
                        @for (x, y, (low, high)) in &curve.points {
                            line x1=(px(across.at(*x))) x2=(px(across.at(*x))) y1=(px(up.at(*low))) y2=(px(up.at(*high)))
                                stroke="currentColor" stroke-width="1.5" {}
                            (marker(curve.contender, across.at(*x), up.at(*y), true))
                        }
                    }
                }
            }
        }
    }
}

/// No longer than a panel is wide.
fn shortened(title: &str) -> String {
    const MOST: usize = 44;
    if title.chars().count() <= MOST {
        return title.to_owned();
    }
    let begin: String = title.chars().take(MOST - 1).collect();
    format!("{begin}…")
}
