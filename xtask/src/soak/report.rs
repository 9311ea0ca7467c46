//! The table and the file.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use bpf_bridge_tests::storm::Tally;
use serde_json::{Value, json};

use super::{
    kernel::METRICS,
    leaks::{Leak, Rule, Sample},
    traffic::Talk,
};

/// All that a soak found.
pub(super) struct Report<'a> {
    pub(super) seed: u64,
    pub(super) samples: &'a [Sample],
    pub(super) leaks: &'a [Leak],
    pub(super) tally: &'a Tally,
    pub(super) talks: &'a BTreeMap<&'static str, Talk>,
    pub(super) upgrades: u64,
    pub(super) error: Option<String>,
}

/// One line about a moment.
pub(super) fn line(at: Duration, tally: &Tally, sample: &Sample) -> String {
    let calls: u64 = tally.done.values().sum();
    let values: Vec<String> = METRICS
        .iter()
        .zip(&sample.values)
        .map(|(metric, value)| format!("{} {value}{}", metric.name, metric.unit))
        .collect();
    format!(
        "{:5.1} min  {calls} done; {}",
        at.as_secs_f64() / 60.0,
        values.join(", ")
    )
}

impl Report<'_> {
    /// For people.
    pub(super) fn table(&self) -> String {
        let mut lines = vec![format!("{:<28}{:>12}", "done", "times")];
        for (what, times) in &self.tally.done {
            lines.push(format!("{what:<28}{times:>12}"));
        }
        lines.push(format!("{:<28}{:>12}", "upgrades", self.upgrades));
        lines.push(String::new());
        lines.push(format!("{:<28}{:>12}{:>12}", "talk", "good", "failed"));
        for (name, talk) in self.talks {
            lines.push(format!("{name:<28}{:>12}{:>12}", talk.good, talk.bad));
        }
        lines.push(String::new());
        lines.push(format!(
            "{:<28}{:>12}{:>12}{:>12}",
            "at pauses", "first", "most", "last"
        ));
        for (number, metric) in METRICS.iter().enumerate() {
            let values: Vec<u64> = self
                .samples
                .iter()
                .filter_map(|sample| sample.values.get(number).copied())
                .collect();
            let cell = |value: Option<&u64>| {
                value.map_or_else(String::new, |value| format!("{value}{}", metric.unit))
            };
            let leak = self.leaks.iter().find(|leak| leak.metric == metric.name);
            let verdict = leak.map_or_else(String::new, |leak| format!("  LEAK: {}", leak.words));
            lines.push(format!(
                "{:<28}{:>12}{:>12}{:>12}{verdict}",
                metric.name,
                cell(values.first()),
                cell(values.iter().max()),
                cell(values.last()),
            ));
        }
        lines.join("\n")
    }

    /// For machines, with every sample.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)
                .with_context(|| format!("creating {}", directory.display()))?;
        }
        fs::write(path, format!("{:#}\n", self.to_json()))
            .with_context(|| format!("writing {}", path.display()))
    }

    fn to_json(&self) -> Value {
        let metrics: Vec<Value> = METRICS
            .iter()
            .enumerate()
            .map(|(number, metric)| {
                let rule = match metric.rule {
                    Rule::Same => json!("same"),
                    Rule::Most(most) => json!({"most": most}),
                    Rule::Grows(tolerance) => json!({"grows": tolerance}),
                };
                json!({
                    "name": metric.name,
                    "unit": metric.unit.trim(),
                    "rule": rule,
                    "values": self.samples.iter()
                        .filter_map(|sample| sample.values.get(number)).collect::<Vec<_>>(),
                })
            })
            .collect();
        let talks: BTreeMap<_, _> = self
            .talks
            .iter()
            .map(|(name, talk)| {
                let talk = json!({"good": talk.good, "failed": talk.bad, "why": talk.why});
                (*name, talk)
            })
            .collect();
        let longest: BTreeMap<_, _> = self
            .tally
            .longest
            .iter()
            .map(|(verb, longest)| (*verb, longest.as_secs_f64() * 1000.0))
            .collect();
        json!({
            "seed": self.seed,
            "error": self.error,
            "done": self.tally.done,
            "longestMs": longest,
            "upgrades": self.upgrades,
            "talk": talks,
            "secondsOfSamples": self.samples.iter()
                .map(|sample| sample.at.as_secs_f64()).collect::<Vec<_>>(),
            "metrics": metrics,
            "leaks": self.leaks.iter()
                .map(|leak| json!({"metric": leak.metric, "words": leak.words})).collect::<Vec<_>>(),
        })
    }
}
