//! The table and the file.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{
    measurement::{Contender, Fact, Measurement},
    run::Found,
    statistics::{Comparison, Summary},
};

/// Everything that was found.
pub(super) struct Report<'a> {
    pub(super) machine: Value,
    pub(super) settings: Value,
    /// The build of bpf-bridge that stood in for the stock plugins.
    pub(super) against: Option<PathBuf>,
    pub(super) found: &'a Found,
}

impl Report<'_> {
    /// In Markdown, as the README has it.
    pub(super) fn table(&self) -> String {
        let stock = match &self.against {
            Some(other) => other.display().to_string(),
            None => "stock".to_owned(),
        };
        let mut text = format!(
            "| median (quartiles) | bpf-bridge | {stock} | floor | times better than {stock} | to the floor |\n\
             |---|--:|--:|--:|--:|--:|\n",
        );
        for measurement in &self.found.measurements {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "| {} ({}) | {} | {} | {} | {} | {} |",
                measurement.name,
                measurement.unit,
                values(measurement, Contender::BpfBridge),
                values(measurement, Contender::Stock),
                values(measurement, Contender::Floor),
                measurement.advantage().map_or_else(String::new, |found| {
                    told(&found, |value| format!("{value:.2}"))
                }),
                measurement.distance().map_or_else(String::new, |found| {
                    if measurement.additive {
                        told(&found, |value| format!("{value:+.1} {}", measurement.unit))
                    } else {
                        told(&found, |value| format!("{:+.1} %", (value - 1.0) * 100.0))
                    }
                }),
            );
        }
        for fact in &self.found.facts {
            let cell = |contender| {
                let mut values = fact.values.iter();
                values
                    .find(|(whose, _)| *whose == contender)
                    .map_or_else(String::new, |(_, value)| digits(*value))
            };
            let _ = writeln!(
                text,
                "| {} ({}) | {} | {} | {} | | |",
                fact.name,
                fact.unit,
                cell(Contender::BpfBridge),
                cell(Contender::Stock),
                cell(Contender::Floor),
            );
        }
        for note in &self.found.notes {
            let _ = writeln!(text, "{note}");
        }
        text
    }

    /// Everything, with every sample.
    pub(super) fn to_json(&self) -> Value {
        json!({
            "machine": self.machine,
            "settings": self.settings,
            "against": self.against,
            "measurements": self.found.measurements.iter().map(Measurement::to_json).collect::<Vec<_>>(),
            "facts": self.found.facts.iter().map(Fact::to_json).collect::<Vec<_>>(),
            "notes": self.found.notes,
        })
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.to_json())?;
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)
                .with_context(|| format!("creating {}", directory.display()))?;
        }
        std::fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))
    }
}

fn values(measurement: &Measurement, contender: Contender) -> String {
    Summary::of(measurement.values(contender)).map_or_else(String::new, |summary| {
        let (low, high) = summary.quartiles;
        format!(
            "{} ({}–{})",
            digits(summary.median),
            digits(low),
            digits(high)
        )
    })
}

fn digits(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

/// A comparison with its interval, or that there is nothing to tell.
fn told(found: &Comparison, format: impl Fn(f64) -> String) -> String {
    match found {
        Comparison::Same(_) => "same".to_owned(),
        Comparison::Different(summary) => {
            let (low, high) = summary.interval;
            format!(
                "{} ({} … {})",
                format(summary.median),
                format(low),
                format(high)
            )
        }
    }
}
