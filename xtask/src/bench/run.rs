//! A run of the bench: its steps, what they found, how far it is, and how it goes on
//! after an interrupt.
//!
//! A step is the smallest thing that is done whole: all contenders, in turn. What it found
//! is written down when it ends, and a run that is started again with the same build and
//! the same settings does not take it again.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::measurement::{Fact, Measurement};

/// What a step, or a whole run, has found.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Found {
    pub(super) measurements: Vec<Measurement>,
    pub(super) facts: Vec<Fact>,
    /// What one must know to read them; each is told once.
    pub(super) notes: Vec<String>,
}

impl Found {
    /// Adds what another step has found.
    pub(super) fn extend(&mut self, more: Self) {
        self.measurements.extend(more.measurements);
        self.facts.extend(more.facts);
        for note in more.notes {
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
    }
}

/// A step, as it is planned.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// By it the step is known again, and shown while it is taken.
    pub(super) name: String,
    /// How long it will take, in ms.
    pub(super) estimate: u64,
}

/// A line of the journal after its first.
#[derive(Serialize, Deserialize)]
struct Entry {
    step: String,
    found: Found,
}

/// A run that goes on.
pub(super) struct Run {
    bar: ProgressBar,
    path: PathBuf,
    journal: File,
    done: Vec<Entry>,
    found: Found,
}

impl Run {
    /// Goes on with the run whose journal is at `path`, if it was of the same `key`; begins
    /// a new one otherwise. `steps` is all that will be taken.
    pub(super) fn open(path: &Path, key: &Value, steps: &[Step]) -> Result<Self> {
        let done = read(path, key);
        let say = || format!("writing the journal {}", path.display());
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).with_context(say)?;
        }
        // Anew, and then in its place: the last line of what is there may be torn.
        let new = path.with_extension("new");
        let mut journal = File::create(&new).with_context(say)?;
        writeln!(journal, "{key}").with_context(say)?;
        for entry in &done {
            writeln!(journal, "{}", serde_json::to_string(entry)?).with_context(say)?;
        }
        fs::rename(&new, path).with_context(say)?;
        let left = steps
            .iter()
            .filter(|step| !done.iter().any(|entry| entry.step == step.name));
        let bar = ProgressBar::new(left.map(|step| step.estimate).sum());
        bar.set_style(ProgressStyle::with_template(
            "{bar:30} {percent:>3} %, {eta} left: {msg}",
        )?);
        if !done.is_empty() {
            bar.println(format!(
                "going on with the run that was interrupted: {} of {} steps are done ({})",
                done.len(),
                steps.len(),
                path.display()
            ));
        }
        Ok(Self {
            bar,
            path: path.to_owned(),
            journal,
            done,
            found: Found::default(),
        })
    }

    /// Whether there is one of `steps` yet to be taken: whether what they need must be made.
    pub(super) fn wants(&self, steps: &[Step]) -> bool {
        steps.iter().any(|step| self.done_before(step).is_none())
    }

    fn done_before(&self, step: &Step) -> Option<&Entry> {
        self.done.iter().find(|entry| entry.step == step.name)
    }

    /// Says what comes next.
    pub(super) fn say(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// Takes a step, unless it was taken before the interrupt.
    pub(super) fn step(
        &mut self,
        step: &Step,
        work: impl FnOnce(&Progress<'_>) -> Result<Found>,
    ) -> Result<()> {
        if let Some(entry) = self.done_before(step) {
            let found = entry.found.clone();
            self.found.extend(found);
            return Ok(());
        }
        self.say(&step.name);
        let start = self.bar.position();
        let end = start + step.estimate;
        let found = work(&Progress {
            bar: &self.bar,
            end,
        })
        .with_context(|| step.name.clone())?;
        self.bar.set_position(end);
        let entry = Entry {
            step: step.name.clone(),
            found,
        };
        // Written at once: an interrupt may come at any time.
        writeln!(self.journal, "{}", serde_json::to_string(&entry)?)
            .with_context(|| format!("writing the journal {}", self.path.display()))?;
        self.found.extend(entry.found);
        Ok(())
    }

    /// All that was found. The journal stays until [`Self::forget`].
    pub(super) fn end(&self) -> &Found {
        self.bar.finish_and_clear();
        &self.found
    }

    /// Removes the journal: the results are written.
    pub(super) fn forget(self) -> Result<()> {
        fs::remove_file(&self.path).with_context(|| format!("removing {}", self.path.display()))
    }
}

/// How far a step is.
pub(super) struct Progress<'a> {
    bar: &'a ProgressBar,
    end: u64,
}

impl Progress<'_> {
    /// Says what is being done within the step.
    pub(super) fn say(&self, what: String) {
        self.bar.set_message(what);
    }

    /// So much of the estimated time, in ms, has passed.
    pub(super) fn advance(&self, milliseconds: u64) {
        self.bar
            .set_position((self.bar.position() + milliseconds).min(self.end));
    }
}

/// The steps of an interrupted run of this key. A last line that was torn is left out.
fn read(path: &Path, key: &Value) -> Vec<Entry> {
    let Ok(file) = File::open(path) else {
        return Vec::new();
    };
    let mut lines = BufReader::new(file).lines().map_while(Result::ok);
    let same = lines
        .next()
        .and_then(|line| serde_json::from_str::<Value>(&line).ok())
        .is_some_and(|found| found == *key);
    if !same {
        return Vec::new();
    }
    lines
        .map_while(|line| serde_json::from_str(&line).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn steps() -> [Step; 2] {
        ["one", "two"].map(|name| Step {
            name: name.to_owned(),
            estimate: 5,
        })
    }

    fn noting(note: &str) -> Found {
        Found {
            notes: vec![note.to_owned()],
            ..Found::default()
        }
    }

    #[test]
    fn an_interrupted_run_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("results/unfinished.jsonl");
        let [one, two] = steps();
        let mut run = Run::open(&path, &json!({"build": 1}), &steps()).unwrap();
        run.step(&one, |_| Ok(noting("first"))).unwrap();
        assert!(run.step(&two, |_| anyhow::bail!("interrupted")).is_err());
        drop(run);
        // The line that was being written.
        let mut torn = File::options().append(true).open(&path).unwrap();
        torn.write_all(b"{\"step\": \"tw").unwrap();

        let mut run = Run::open(&path, &json!({"build": 1}), &steps()).unwrap();
        assert!(!run.wants(std::slice::from_ref(&one)));
        assert!(run.wants(std::slice::from_ref(&two)));
        run.step(&one, |_| panic!("taken twice")).unwrap();
        run.step(&two, |_| Ok(noting("second"))).unwrap();
        drop(run);
        let mut run = Run::open(&path, &json!({"build": 1}), &steps()).unwrap();
        for step in steps() {
            run.step(&step, |_| panic!("taken twice")).unwrap();
        }
        assert_eq!(run.end().notes, ["first", "second"]);
        run.forget().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_run_of_another_build_begins_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("unfinished.jsonl");
        let [one, _] = steps();
        let mut run = Run::open(&path, &json!({"build": 1}), &steps()).unwrap();
        run.step(&one, |_| Ok(noting("old"))).unwrap();
        drop(run);
        let mut run = Run::open(&path, &json!({"build": 2}), &steps()).unwrap();
        run.step(&one, |_| Ok(noting("new"))).unwrap();
        assert_eq!(run.end().notes, ["new"]);
    }
}
