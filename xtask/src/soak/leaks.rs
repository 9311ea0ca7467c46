//! What grows without a reason.

use std::time::Duration;

/// When something counts as a leak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// It is the same at every pause: what the model explains was taken away before.
    Same,
    /// It never exceeds this.
    Most(u64),
    /// The rest of the machine changes it as well. It leaks if it grew by more than this
    /// from the first third of the pauses to the last, and most of the way.
    Grows(u64),
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Metric {
    pub(super) name: &'static str,
    pub(super) unit: &'static str,
    pub(super) rule: Rule,
}

/// All that was measured at one pause, in the order of the metrics.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// Since the beginning.
    pub(super) at: Duration,
    pub(super) values: Vec<u64>,
}

/// A metric that leaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leak {
    pub(super) metric: &'static str,
    pub(super) words: String,
}

/// With fewer samples there is no telling what grows.
const TREND: usize = 6;

/// Every metric that leaks, and how.
pub(super) fn judge(metrics: &[Metric], samples: &[Sample]) -> Vec<Leak> {
    metrics
        .iter()
        .enumerate()
        .filter_map(|(number, metric)| {
            let values: Vec<u64> = samples
                .iter()
                .filter_map(|sample| sample.values.get(number).copied())
                .collect();
            let words = grown(metric, &values)?;
            Some(Leak {
                metric: metric.name,
                words,
            })
        })
        .collect()
}

fn grown(metric: &Metric, values: &[u64]) -> Option<String> {
    let (first, unit) = (*values.first()?, metric.unit);
    match metric.rule {
        Rule::Same => {
            let other = values.iter().find(|&&value| value != first)?;
            Some(format!("was {first}{unit}, then {other}{unit}"))
        }
        Rule::Most(most) => {
            let peak = values.iter().max().filter(|&&peak| peak > most)?;
            Some(format!("was {peak}{unit}: more than {most}{unit}"))
        }
        Rule::Grows(tolerance) => {
            if values.len() < TREND {
                return None;
            }
            let third = values.len() / 3;
            let (before, after) = (
                median(&values[..third]),
                median(&values[values.len() - third..]),
            );
            let grew = after > before.saturating_add(tolerance) && rises(values);
            grew.then(|| format!("grew from {before}{unit} to {after}{unit}"))
        }
    }
}

fn median(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// Whether of any two values the later one is mostly the larger: what others do to the
/// machine goes up and down.
fn rises(values: &[u64]) -> bool {
    let (mut up, mut all) = (0_usize, 0_usize);
    for (number, earlier) in values.iter().enumerate() {
        for later in &values[number + 1..] {
            all += 1;
            up += usize::from(later > earlier);
        }
    }
    up * 10 >= all * 8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaks(rule: Rule, values: &[u64]) -> bool {
        let metric = Metric {
            name: "maps",
            unit: "",
            rule,
        };
        let samples: Vec<Sample> = values
            .iter()
            .map(|&value| Sample {
                at: Duration::ZERO,
                values: vec![7, value],
            })
            .collect();
        let steady = Metric {
            name: "steady",
            rule: Rule::Same,
            ..metric
        };
        let found = judge(&[steady, metric], &samples);
        assert!(found.iter().all(|leak| leak.metric == "maps"), "{found:?}");
        !found.is_empty()
    }

    #[test]
    fn what_must_stay_may_not_change_at_all() {
        assert!(!leaks(Rule::Same, &[3, 3, 3]));
        assert!(leaks(Rule::Same, &[3, 3, 4]));
        assert!(leaks(Rule::Same, &[3, 2, 3]));
        assert!(!leaks(Rule::Same, &[]));
    }

    #[test]
    fn a_bound_is_a_bound() {
        assert!(!leaks(Rule::Most(10), &[9, 10, 1]));
        assert!(leaks(Rule::Most(10), &[9, 11, 1]));
    }

    #[test]
    fn growth_is_told_from_noise() {
        let rule = Rule::Grows(10);
        assert!(leaks(rule, &[100, 105, 110, 115, 120, 125, 130, 135, 140]));
        // A little, and with noise.
        assert!(leaks(rule, &[100, 99, 110, 109, 120, 119, 130, 129, 140]));
        // Less than what is tolerated.
        assert!(!leaks(rule, &[100, 101, 102, 103, 104, 105, 106, 107, 108]));
        // Once, for good: a cache that was filled.
        assert!(!leaks(rule, &[100, 200, 200, 200, 200, 200, 200, 200, 200]));
        // Somebody else's work.
        assert!(!leaks(rule, &[100, 150, 90, 180, 100, 160, 95, 170, 130]));
        assert!(!leaks(rule, &[140, 130, 120, 110, 100, 90]));
        // Too few to tell.
        assert!(!leaks(rule, &[100, 200, 300]));
    }
}
