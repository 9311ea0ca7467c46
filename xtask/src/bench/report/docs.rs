//! The page of the documentation, and the README's five lines.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{
    Report,
    html::{METHOD, plain},
    svg,
    table::FULL,
    verb, words, write,
};
use crate::bench::{
    measurement::{Contender, Fact, Measurement},
    statistics::Comparison,
};

/// Between these the README has its lines.
const BEGIN: &str = "<!-- bench: written by `cargo xtask bench --render FILE --docs` -->";
const END: &str = "<!-- end of bench -->";

impl Report {
    /// Writes `docs/benchmarks.md` with its plots below `workspace`, and the lines of the
    /// README, which are returned.
    pub(in crate::bench) fn write_docs(&self, workspace: &Path) -> Result<String> {
        let plots = workspace.join("docs/benchmarks");
        if plots.exists() {
            // Those of another run may have other names.
            fs::remove_dir_all(&plots).with_context(|| format!("removing {}", plots.display()))?;
        }
        for plot in self.few_plots() {
            let path = plots.join(format!("{}.svg", plot.name));
            write(&path, &svg::file(&plot.svg))?;
        }
        write(&workspace.join("docs/benchmarks.md"), &self.markdown())?;
        let readme = workspace.join("README.md");
        let text =
            fs::read_to_string(&readme).with_context(|| format!("reading {}", readme.display()))?;
        let lines = self.lines_of_readme();
        let text = between(&text, &lines)
            .with_context(|| format!("{} has no lines {BEGIN} and {END}", readme.display()))?;
        write(&readme, &text)?;
        Ok(lines)
    }

    fn lines_of_readme(&self) -> String {
        let lines = self.headlines().map(|headline| headline.line());
        lines.join("\n")
    }

    fn markdown(&self) -> String {
        let mut text = format!(
            "# Measured\n\nWritten by `cargo xtask bench --render FILE --docs` from one run. {}\n\n{}\n",
            self.about(),
            self.lines_of_readme(),
        );
        text += "\n## What is worse\n\n";
        text += &self.worse();
        text += "\n## Plots\n\n";
        for plot in self.few_plots() {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "![{}](benchmarks/{}.svg)\n", plot.title, plot.name);
        }
        text += "## All figures\n\nMedian (quartiles); comparisons with the 95 % interval of their median.\n";
        for group in self.groups() {
            let columns = group.columns();
            let titles = columns.iter().map(|column| column.title(self));
            let rows = group.rows.iter().map(|(what, measurement)| {
                let cells = columns.iter().map(|column| column.cell(measurement, FULL));
                std::iter::once((*what).to_owned()).chain(cells).collect()
            });
            text += &table(group.name, titles.collect(), rows.collect());
        }
        text += &self.facts_table();
        text += "\n## Method\n\n";
        let notes = self.found.notes.iter().map(String::as_str);
        for line in METHOD.into_iter().chain(notes) {
            let _ = writeln!(text, "- {line}");
        }
        text += &said("Machine and versions", &self.machine);
        text += &said("Settings", &self.settings);
        // What looks like HTML is none.
        text.replace('<', "&lt;")
    }

    fn facts_table(&self) -> String {
        let contenders = self.fact_contenders();
        if contenders.is_empty() {
            return String::new();
        }
        let titles = contenders.iter().map(|&contender| self.name(contender));
        let titles = std::iter::once("unit").chain(titles).map(str::to_owned);
        let rows = self.found.facts.iter().map(|fact| {
            let values = contenders
                .iter()
                .map(|&contender| words::fact(fact, contender));
            let named = [fact.name.clone(), fact.unit.clone()];
            named.into_iter().chain(values).collect()
        });
        table("Facts", titles.collect(), rows.collect())
    }

    /// All that is behind the stock plugins, the worst first, and what is farthest from
    /// the floor.
    fn worse(&self) -> String {
        let stock = self.name(Contender::Stock);
        let mut behind: Vec<(Comparison, String)> = Vec::new();
        for measurement in &self.found.measurements {
            for (contender, _) in &measurement.values {
                let found = measurement.advantage_of(*contender);
                let found = found.filter(|found| contender.is_ours() && is_behind(found));
                if let Some(found) = found {
                    let name = self.name(*contender);
                    let ratio = words::ratio(&found);
                    let line = format!("{}: {name} is {ratio} times as good", measurement.name);
                    behind.push((found, line));
                }
            }
        }
        let median = |found: &Comparison| found.summary().median;
        behind.sort_by(|(a, _), (b, _)| median(a).total_cmp(&median(b)));
        let mut text = if behind.is_empty() {
            format!("Nothing that was compared in turn is behind {stock}.\n")
        } else {
            format!("Behind {stock}, the farthest first:\n\n")
        };
        for (_, line) in &behind {
            let _ = writeln!(text, "- {line}.");
        }
        let larger: Vec<String> = self.found.facts.iter().filter_map(larger).collect();
        if !larger.is_empty() {
            let _ = writeln!(
                text,
                "\nMore of it than {stock} has:\n\n{}",
                larger.join("\n")
            );
        }
        let mut far: Vec<(f64, &Measurement, Comparison)> = Vec::new();
        for measurement in self
            .found
            .measurements
            .iter()
            .filter(|measurement| verb(&measurement.name).is_none())
        {
            let found = measurement.distance().filter(is_behind);
            far.extend(found.map(|found| (median(&found), measurement, found)));
        }
        far.sort_by(|(a, ..), (b, ..)| a.total_cmp(b));
        if !far.is_empty() {
            text += "\nFarthest from the floor:\n\n";
        }
        for (_, measurement, found) in far.iter().take(5) {
            let distance = words::distance(measurement, found);
            let _ = writeln!(text, "- {}: {distance}.", measurement.name);
        }
        text
    }
}

fn is_behind(found: &Comparison) -> bool {
    matches!(found, Comparison::Different(summary) if summary.median < 1.0)
}

/// A size of which bpf-bridge has more than the stock plugins.
fn larger(fact: &Fact) -> Option<String> {
    let ours = fact.value(Contender::BpfBridge)?;
    let stock = fact.value(Contender::Stock)?;
    (ours > stock).then(|| {
        format!(
            "- {}: {} {}, beside {}.",
            fact.name,
            words::fact(fact, Contender::BpfBridge),
            fact.unit,
            words::fact(fact, Contender::Stock),
        )
    })
}

/// `text` with `lines` in their place; `None` if it has no such place.
fn between(text: &str, lines: &str) -> Option<String> {
    let begin = text.find(BEGIN)? + BEGIN.len();
    let end = begin + text[begin..].find(END)?;
    Some(format!("{}\n{lines}\n{}", &text[..begin], &text[end..]))
}

/// A table in Markdown: the first two columns are words, the others numbers.
fn table(name: &str, titles: Vec<String>, rows: Vec<Vec<String>>) -> String {
    let line = |cells: &mut dyn Iterator<Item = &String>| {
        let cells: Vec<String> = cells.map(|cell| cell.replace('|', "\\|")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let numbers = titles.len().saturating_sub(1);
    let first = String::new();
    let mut text = format!("\n### {name}\n\n");
    text += &line(&mut std::iter::once(&first).chain(&titles));
    let _ = writeln!(text, "|---|---|{}", "--:|".repeat(numbers));
    for row in &rows {
        text += &line(&mut row.iter());
    }
    text
}

/// What an object says, key by key.
fn said(name: &str, value: &Value) -> String {
    let rows = value.as_object().into_iter().flatten();
    let rows = rows.map(|(key, value)| vec![key.clone(), plain(value)]);
    let text = table(name, vec![String::new()], rows.collect());
    text.replacen("###", "##", 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_has_a_place() {
        assert!(between(include_str!("../../../../README.md"), "lines").is_some());
    }

    #[test]
    fn lines_take_the_place_of_others() {
        let text = format!("a\n{BEGIN}\nold\nlines\n{END}\nb\n");
        let replaced = between(&text, "new").unwrap();
        assert_eq!(replaced, format!("a\n{BEGIN}\nnew\n{END}\nb\n"));
        assert_eq!(between(&replaced, "new").unwrap(), replaced);
        assert!(between("no place", "new").is_none());
        assert!(between(&format!("{END} {BEGIN}"), "new").is_none());
    }
}
