//! The table and the file.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{
    measurement::{Contender, Measurement},
    program::Programs,
    statistics::{Comparison, Summary},
};

/// Everything that was found.
pub(super) struct Report {
    pub(super) machine: Value,
    pub(super) settings: Value,
    /// The build of bpf-bridge that stood in for the stock plugins.
    pub(super) against: Option<PathBuf>,
    pub(super) measurements: Vec<Measurement>,
    /// What one must know to read them.
    pub(super) notes: Vec<String>,
    pub(super) programs: Option<Programs>,
    /// The most memory that a call had resident, in bytes: of the first pod of a
    /// node, and of a later one.
    pub(super) first_memory: Vec<(Contender, u64)>,
    pub(super) memory: Vec<(Contender, u64)>,
    /// The same of the first pod of a node, with a published port.
    pub(super) port_memory: Vec<(Contender, u64)>,
    /// The size of the binaries that are called, in bytes.
    pub(super) sizes: Vec<(Contender, u64)>,
}

impl Report {
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
        for measurement in &self.measurements {
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
        for (name, of) in [
            ("peak memory, first pod of a node (MB)", &self.first_memory),
            ("peak memory, later pods (MB)", &self.memory),
            ("peak memory, first published port (MB)", &self.port_memory),
            ("size on disk (MB)", &self.sizes),
        ] {
            let cell = |contender| {
                of.iter()
                    .find(|(whose, _)| *whose == contender)
                    .map_or_else(String::new, |(_, bytes)| {
                        format!("{:.1}", *bytes as f64 / 1e6)
                    })
            };
            if !of.is_empty() {
                let _ = writeln!(
                    text,
                    "| {name} | {} | {} | | | |",
                    cell(Contender::BpfBridge),
                    cell(Contender::Stock),
                );
            }
        }
        if let Some(programs) = &self.programs {
            for run in &programs.runs {
                let _ = writeln!(
                    text,
                    "| program `{}`, {} (ns a run) | {:.0} | | | | |",
                    run.program, run.traffic, run.time
                );
            }
            for program in &programs.programs {
                let verified = program
                    .verified
                    .map_or_else(|| "?".to_owned(), |count| count.to_string());
                let _ = writeln!(
                    text,
                    "| program `{}` (instructions verified; bytes of machine code) | {verified}; {} | | | | |",
                    program.name, program.jited
                );
            }
        }
        text
    }

    /// Everything, with every sample.
    pub(super) fn to_json(&self) -> Value {
        let bytes = |of: &[(Contender, u64)]| -> Value {
            of.iter()
                .map(|(contender, bytes)| (contender.name().to_owned(), (*bytes).into()))
                .collect::<serde_json::Map<String, Value>>()
                .into()
        };
        json!({
            "machine": self.machine,
            "settings": self.settings,
            "against": self.against,
            "measurements": self.measurements.iter().map(Measurement::to_json).collect::<Vec<_>>(),
            "notes": self.notes,
            "programs": self.programs.as_ref().map(Programs::to_json),
            "peakMemoryOfFirstBytes": bytes(&self.first_memory),
            "peakMemoryBytes": bytes(&self.memory),
            "peakMemoryOfFirstPortBytes": bytes(&self.port_memory),
            "binaryBytes": bytes(&self.sizes),
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
        let digits = |value: f64| match value {
            value if value >= 100.0 => format!("{value:.0}"),
            value if value >= 10.0 => format!("{value:.1}"),
            value => format!("{value:.2}"),
        };
        let (low, high) = summary.quartiles;
        format!(
            "{} ({}–{})",
            digits(summary.median),
            digits(low),
            digits(high)
        )
    })
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
