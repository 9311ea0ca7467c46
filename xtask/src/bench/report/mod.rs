//! What a run leaves behind: a table on the terminal, a file with every sample, an HTML
//! page with plots, and the pages of the documentation. All but the samples follow from
//! that file.

mod docs;
mod headline;
mod html;
mod plots;
mod svg;
mod table;
#[cfg(test)]
mod tests;
mod words;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    measurement::{Contender, Measurement},
    run::Found,
};

/// The layout of the file: other versions of the bench may read another one.
const FORMAT: u32 = 1;

/// Everything that was found, and by what.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Report {
    format: u32,
    machine: Value,
    settings: Value,
    /// The build of bpf-bridge that stood in for the stock plugins.
    against: Option<PathBuf>,
    #[serde(flatten)]
    found: Found,
}

/// What has a table of its own: the measurements of one path, or of one verb.
struct Group<'a> {
    name: &'a str,
    /// Those who took part.
    contenders: Vec<Contender>,
    /// With what their names have after the group's.
    rows: Vec<(&'a str, &'a Measurement)>,
}

impl Report {
    pub(super) fn new(
        machine: Value,
        settings: Value,
        against: Option<PathBuf>,
        found: Found,
    ) -> Self {
        Self {
            format: FORMAT,
            machine,
            settings,
            against,
            found,
        }
    }

    /// Reads a file that [`Self::write`] has written.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let say = || format!("reading the result {}", path.display());
        let text = fs::read_to_string(path).with_context(say)?;
        let value: Value = serde_json::from_str(&text).with_context(say)?;
        ensure!(
            value["format"] == FORMAT,
            "{} is no result of this version of the bench: its `format` is {}, and not {FORMAT}",
            path.display(),
            value["format"],
        );
        serde_json::from_value(value).with_context(say)
    }

    /// Writes every sample.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        write(path, &(serde_json::to_string(self)? + "\n"))
    }

    /// Writes the page with the plots.
    pub(super) fn write_html(&self, path: &Path) -> Result<()> {
        write(path, &html::page(self))
    }

    fn name(&self, contender: Contender) -> &'static str {
        match contender {
            Contender::Stock if self.against.is_some() => "the other build",
            other => other.name(),
        }
    }

    /// Those of whom there are facts.
    fn fact_contenders(&self) -> Vec<Contender> {
        let values = self.found.facts.iter().flat_map(|fact| &fact.values);
        let contenders: BTreeSet<Contender> = values.map(|(contender, _)| *contender).collect();
        contenders.into_iter().collect()
    }

    /// Whom bpf-bridge is compared with.
    fn beside(&self) -> String {
        match &self.against {
            Some(other) => format!("the build {}", other.display()),
            None => "the stock plugins".to_owned(),
        }
    }

    /// When and on what, in one sentence.
    fn about(&self) -> String {
        let said = |key: &str| html::plain(&self.machine[key]);
        format!(
            "Taken {}, revision {}, on {} CPUs ({}), Linux {}, beside {} ({}).",
            said("taken"),
            said("revision"),
            said("cpus"),
            said("cpu"),
            said("kernel"),
            self.beside(),
            said("stock"),
        )
    }

    /// The measurements by their verb or else what their names begin with, in the order in
    /// which they came.
    fn groups(&self) -> Vec<Group<'_>> {
        let mut groups: Vec<Group<'_>> = Vec::new();
        for measurement in &self.found.measurements {
            let (name, what) = split(&measurement.name);
            let at = groups.iter().position(|group| group.name == name);
            let at = at.unwrap_or_else(|| {
                groups.push(Group {
                    name,
                    contenders: Vec::new(),
                    rows: Vec::new(),
                });
                groups.len() - 1
            });
            let group = &mut groups[at];
            group.rows.push((what, measurement));
            let values = measurement.values.iter();
            let with = values.filter(|(_, values)| !values.is_empty());
            group
                .contenders
                .extend(with.map(|(contender, _)| contender));
            group.contenders.sort_unstable();
            group.contenders.dedup();
        }
        groups
    }
}

/// The verbs whose calls are measured.
const VERBS: [&str; 3] = ["ADD", "CHECK", "DEL"];

/// What a measurement is grouped by, and what it is called in its group.
fn split(name: &str) -> (&str, &str) {
    let (group, what) = name.split_once(", ").unwrap_or(("others", name));
    match verb(name) {
        Some(verb) => (verb, what),
        None => (group, what),
    }
}

/// The verb whose calls a measurement is about, if it is one of calls: in the singular or
/// not, and however many there are.
fn verb(name: &str) -> Option<&'static str> {
    let (about, _) = name.split_once(", ").unwrap_or((name, ""));
    let mut words = about.split(' ');
    words.find_map(|word| {
        let one = word.strip_suffix('s').unwrap_or(word);
        VERBS.into_iter().find(|verb| *verb == one)
    })
}

fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)
            .with_context(|| format!("creating {}", directory.display()))?;
    }
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
