//! The five figures that matter, found by a rule that does not know how they turn out.

use std::cmp::Reverse;

use super::{Report, verb, words};
use crate::bench::{
    measurement::{Axis, Contender, Measurement},
    statistics::{Comparison, Summary},
};

/// One of them.
pub(super) struct Headline {
    pub(super) title: &'static str,
    /// `None` if it was not measured.
    pub(super) found: Option<Told>,
}

/// What is said.
pub(super) struct Told {
    /// The figure.
    pub(super) figure: String,
    /// The rest.
    pub(super) detail: String,
    pub(super) verdict: Verdict,
}

/// Whether it is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Better,
    Same,
    Worse,
}

impl Verdict {
    /// Of a ratio that is above 1 if it is good.
    fn of(found: &Comparison) -> Self {
        match found {
            Comparison::Same(_) => Self::Same,
            Comparison::Different(summary) if summary.median < 1.0 => Self::Worse,
            Comparison::Different(_) => Self::Better,
        }
    }
}

impl Headline {
    /// As a line on the terminal.
    fn plain(&self) -> String {
        self.line().replace("**", "")
    }

    /// As a line of Markdown.
    pub(super) fn line(&self) -> String {
        match &self.found {
            Some(told) => format!("- **{}: {}**; {}.", self.title, told.figure, told.detail),
            None => format!("- **{}**: not measured.", self.title),
        }
    }
}

impl Report {
    /// All five, in the order in which they are shown.
    pub(super) fn headlines(&self) -> [Headline; 5] {
        [
            ("Pod to pod, TCP round trip", self.pod_to_pod()),
            ("New connections to a published port", self.published()),
            ("New connections out, masqueraded", self.masquerade()),
            ("ADD and DEL of a pod", self.calls()),
            ("The worst of all", self.worst()),
        ]
        .map(|(title, found)| Headline { title, found })
    }

    /// All five, and what the words of the tables mean.
    pub(in crate::bench) fn headlines_for_terminal(&self) -> String {
        let lines = self.headlines().map(|headline| headline.plain());
        format!(
            "{}\n\nA comparison is the median of the paired ones, with its 95 % interval; \
             \"{}\": smaller than the noise; \"of 3\": so few turns have no interval.",
            lines.join("\n"),
            words::SAME,
        )
    }

    fn pod_to_pod(&self) -> Option<Told> {
        let measurement = self.first("pod to pod", &["TCP_RR"])?;
        let floor = measurement.distance()?;
        let stock = measurement.advantage();
        let figure = match &floor {
            Comparison::Same(_) => "the same as a raw veth pair".to_owned(),
            _ => format!(
                "{} to a raw veth pair",
                words::distance(measurement, &floor)
            ),
        };
        let stock = stock.map(|found| format!(", {}", self.against_stock(&found)));
        Some(Told {
            figure,
            detail: format!("{}{}", self.medians(measurement), stock.unwrap_or_default()),
            verdict: Verdict::of(&floor),
        })
    }

    fn published(&self) -> Option<Told> {
        let (least, most) = self.ends(Axis::Ports, |measurement| {
            measurement.name.starts_with("outside to published port") && connects(measurement)
        })?;
        self.range(least, most, "port", "ports")
    }

    fn masquerade(&self) -> Option<Told> {
        let measurement = self.first("pod to outside", &["TCP_CRR", "connections"])?;
        let found = measurement.advantage()?;
        let past = measurement.advantage_of(Contender::NoNetfilter);
        let past = past.map(|found| {
            let netfilter = Contender::NoNetfilter.kind();
            format!("; {netfilter}: {}", self.against_stock(&found))
        });
        Some(Told {
            figure: self.against_stock(&found),
            detail: format!("{}{}", self.medians(measurement), past.unwrap_or_default()),
            verdict: Verdict::of(&found),
        })
    }

    /// The two calls are taken together, turn by turn.
    fn calls(&self) -> Option<Told> {
        let alone = |measurement: &Measurement, verb: &str| {
            let mut axis = measurement.point.iter().map(|point| point.axis);
            axis.next() == Some(Axis::Pods) && measurement.name.split(", ").next() == Some(verb)
        };
        let (least, most) = self.ends(Axis::Pods, |measurement| alone(measurement, "ADD"))?;
        let both = |add: &Measurement| -> Option<Measurement> {
            let at = add.point.as_ref()?.at;
            let mut measurements = self.found.measurements.iter();
            let del = measurements.find(|other| {
                alone(other, "DEL") && other.point.as_ref().is_some_and(|point| point.at == at)
            })?;
            let mut both = add.clone();
            for (contender, values) in &mut both.values {
                let dels = del.values(*contender);
                *values = values
                    .iter()
                    .zip(dels)
                    .map(|(add, del)| add + del)
                    .collect();
            }
            Some(both)
        };
        let mut told = self.range(&both(least)?, &both(most)?, "pod", "pods")?;
        let mut measurements = self.found.measurements.iter();
        let crowd = measurements
            .find(|other| verb(&other.name) == Some("ADD") && other.name.contains("at a time"));
        if let Some((crowd, found)) = crowd.and_then(|crowd| Some((crowd, crowd.advantage()?))) {
            told.detail += &format!("; {}: {}", crowd.name, self.against_stock(&found));
        }
        Some(told)
    }

    /// What is farthest behind the stock plugins, or the least ahead.
    fn worst(&self) -> Option<Told> {
        let compared = self.found.measurements.iter().filter_map(|measurement| {
            let found = measurement.advantage()?;
            Some((measurement, found))
        });
        let median = |found: &Comparison| found.summary().median;
        let key = |found: &Comparison| (Verdict::of(found) != Verdict::Worse, median(found));
        let (measurement, found) = compared.min_by(|(_, a), (_, b)| {
            let ((a_good, a), (b_good, b)) = (key(a), key(b));
            a_good.cmp(&b_good).then(a.total_cmp(&b))
        })?;
        Some(Told {
            figure: self.against_stock(&found),
            detail: format!("{}: {}", measurement.name, self.medians(measurement)),
            verdict: Verdict::of(&found),
        })
    }

    /// How it is at both ends of a curve.
    fn range(
        &self,
        least: &Measurement,
        most: &Measurement,
        one: &str,
        many: &str,
    ) -> Option<Told> {
        let at = |measurement: &Measurement| {
            let at = measurement.point.as_ref().map_or(0, |point| point.at);
            let unit = if at == 1 { one } else { many };
            format!("with {} {unit}", words::count(at))
        };
        let (low, high) = (least.advantage()?, most.advantage()?);
        let verdicts = [Verdict::of(&low), Verdict::of(&high)];
        let verdict = [Verdict::Worse, Verdict::Same]
            .into_iter()
            .find(|verdict| verdicts.contains(verdict));
        let figure = format!("{} {}", self.against_stock(&low), at(least));
        let detail = format!("{} {}", self.medians(least), at(least));
        let single = at(least) == at(most);
        Some(Told {
            figure: if single {
                figure
            } else {
                format!("{figure}, {} {}", words::ratio(&high), at(most))
            },
            detail: if single {
                detail
            } else {
                format!("{detail}; {} {}", self.medians(most), at(most))
            },
            verdict: verdict.unwrap_or(Verdict::Better),
        })
    }

    /// The first measurement of a path that has one of `works` in its name; IPv4 goes
    /// before IPv6, and a node of one's own before others.
    fn first(&self, path: &str, works: &[&str]) -> Option<&Measurement> {
        let matching = self.found.measurements.iter().filter(|measurement| {
            let mut parts = measurement.name.split(", ");
            parts.next() == Some(path)
                && parts
                    .next()
                    .is_some_and(|what| works.iter().any(|work| what.contains(work)))
        });
        matching.min_by_key(|measurement| {
            (
                measurement.name.contains("IPv6"),
                measurement.name.contains("beside"),
                measurement.name.contains("percentile"),
            )
        })
    }

    /// Where a curve begins and ends.
    fn ends(
        &self,
        axis: Axis,
        wanted: impl Fn(&Measurement) -> bool,
    ) -> Option<(&Measurement, &Measurement)> {
        let points = || {
            let measurements = self.found.measurements.iter();
            measurements.filter_map(|measurement| {
                let point = measurement.point.as_ref()?;
                (point.axis == axis && wanted(measurement)).then_some((point.at, measurement))
            })
        };
        let least = points().min_by_key(|(at, _)| *at)?;
        let most = points().min_by_key(|(at, _)| Reverse(*at))?;
        Some((least.1, most.1))
    }

    /// "1.20 (1.18 … 1.22) times better than stock".
    pub(super) fn against_stock(&self, found: &Comparison) -> String {
        let stock = self.name(Contender::Stock);
        match found {
            Comparison::Same(_) => format!("the same as {stock}"),
            Comparison::Different(Summary { median, .. }) if *median < 1.0 => {
                format!("behind {stock}, {} times as good", words::ratio(found))
            }
            Comparison::Different(_) => {
                format!("{} times better than {stock}", words::ratio(found))
            }
        }
    }

    /// What they took, of those who took part.
    fn medians(&self, measurement: &Measurement) -> String {
        let told = measurement.values.iter().filter_map(|(contender, values)| {
            let median = Summary::of(values)?.median;
            let name = match contender {
                ours if ours.is_ours() => ours.kind(),
                other => self.name(*other),
            };
            Some(format!("{name} {}", words::digits(median)))
        });
        let told: Vec<String> = told.collect();
        format!("{} ({})", told.join(", "), measurement.unit)
    }
}

fn connects(measurement: &Measurement) -> bool {
    ["TCP_CRR", "connections"]
        .iter()
        .any(|work| measurement.name.contains(work))
}
