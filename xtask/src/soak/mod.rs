//! `cargo xtask soak`: a storm of calls, some of which are killed, upgrades, and traffic,
//! for minutes or for hours; and whether anything leaks.
//!
//! The storm is that of the tests ([`bpf_bridge_tests::storm`]): at each pause the node has
//! what the model has. Then all is taken away but the pods that stay and talk, and what the
//! kernel and this process have is counted: it must be what it was.

mod kernel;
mod leaks;
mod report;
mod traffic;

use std::{
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_bridge_tests::{
    Node, Snapshot, another_build,
    storm::{self, Storm, Weather},
};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    build,
    process::target_directory,
    setup::{self, Purpose},
};

use self::{
    kernel::{METRICS, Watch},
    leaks::Sample,
    report::Report,
    traffic::{Said, Stayers},
};

/// How long a storm rages between two pauses, of which there are so many in a shorter time.
const LAP: Duration = Duration::from_secs(20);
const LAPS: u32 = 8;
/// But no shorter than this.
const LEAST: Duration = Duration::from_secs(5);
/// How often there is another binary.
const UPGRADE: Duration = Duration::from_secs(4);
/// How often running calls are looked at.
const LOOK: Duration = Duration::from_millis(10);
const MINUTE: Duration = Duration::from_secs(60);

/// How long, and how.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// For so many minutes.
    #[arg(long, default_value_t = 5.0, conflicts_with = "hours")]
    minutes: f64,
    /// For so many hours.
    #[arg(long)]
    hours: Option<f64>,
    /// What the callers do, as an earlier soak has told it.
    #[arg(long)]
    seed: Option<u64>,
    /// How many call at once.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u8).range(1..))]
    callers: u8,
    /// The file for all samples, as JSON [default: soak.json where cargo builds].
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Arguments {
    fn duration(&self) -> Result<Duration> {
        let minutes = self.hours.map_or(self.minutes, |hours| hours * 60.0);
        let duration = Duration::try_from_secs_f64(minutes * 60.0)
            .ok()
            .filter(|duration| !duration.is_zero());
        duration.with_context(|| {
            format!("soaking for {minutes} minutes: a number above zero would be right")
        })
    }
}

/// `cargo xtask soak`.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let duration = arguments.duration()?;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "not root: nodes are namespaces, which only root can make"
    );
    setup::programs(Purpose::Soak)?;
    let binary = build::plugin()?;
    let seed = match arguments.seed {
        Some(seed) => seed,
        None => storm::seed()?,
    };
    println!("--seed {seed} lets the callers do the same again");
    let directory = target_directory().join("xtask/soak");
    // Where one build is upgraded to, and where from.
    let builds = [1, 2]
        .map(|number| another_build(&binary, &directory.join(number.to_string()), number))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;

    let soak = Soak {
        duration,
        seed,
        weather: Weather {
            callers: arguments.callers.into(),
            kills: true,
        },
        builds,
    };
    let output = match &arguments.output {
        Some(path) => path.clone(),
        None => target_directory().join("soak.json"),
    };
    soak.run(&binary, &output)
}

struct Soak {
    duration: Duration,
    seed: u64,
    weather: Weather,
    builds: Vec<PathBuf>,
}

/// What those who run beside the storm found.
#[derive(Default)]
struct Beside {
    stop: AtomicBool,
    said: Said,
    /// Held by whoever upgrades, and by whoever counts.
    upgrading: Mutex<()>,
    upgrades: AtomicU64,
    upgrade_error: Mutex<Option<String>>,
    /// The most that a call was seen to have.
    descriptors: AtomicU64,
    memory: AtomicU64,
}

impl Soak {
    fn run(&self, binary: &Path, output: &Path) -> Result<()> {
        let node = Node::with_plugin(binary)?;
        let outside = node.outside()?;
        let mut storm = Storm::new(&node, self.seed);
        let stayers = Stayers::new(&storm, &outside)?;
        for (network, attachment) in stayers.attachments() {
            storm.spare(network, &attachment);
        }
        let beside = Beside::default();
        let mut samples = Vec::new();
        let done = thread::scope(|scope| {
            let done = stayers
                .talk(scope, &node, &outside, &beside.stop, &beside.said)
                .and_then(|()| {
                    scope.spawn(|| self.upgrade_again_and_again(&node, &beside));
                    scope.spawn(|| look_at_calls(&node, &beside));
                    self.laps(&node, &storm, &beside, &mut samples)
                });
            beside.stop.store(true, Ordering::Relaxed);
            done
        });
        let leaks = leaks::judge(&METRICS, &samples);
        let talks = beside.said.tell();
        let mut errors: Vec<String> = done
            .err()
            .map(|error| format!("{error:#}"))
            .into_iter()
            .collect();
        errors.extend(lock(&beside.upgrade_error).take());
        errors.extend(talks.iter().filter_map(|(name, talk)| {
            let why = talk.why.as_ref()?;
            Some(format!(
                "{name}: {} of {} failed: {why}",
                talk.bad,
                talk.good + talk.bad
            ))
        }));
        errors.extend(
            leaks
                .iter()
                .map(|leak| format!("a leak: {} {}", leak.metric, leak.words)),
        );
        let report = Report {
            seed: self.seed,
            samples: &samples,
            leaks: &leaks,
            tally: &storm.tally(),
            talks: &talks,
            upgrades: beside.upgrades.load(Ordering::Relaxed),
            error: (!errors.is_empty()).then(|| errors.join("; ")),
        };
        report.write(output)?;
        println!("{}\n\nAll samples: {}", report.table(), output.display());
        match report.error {
            Some(error) => bail!("seed {}: {error}", self.seed),
            None => Ok(()),
        }
    }

    /// Storm, pause, storm, pause.
    fn laps(
        &self,
        node: &Node,
        storm: &Storm<'_>,
        beside: &Beside,
        samples: &mut Vec<Sample>,
    ) -> Result<()> {
        let bar = progress(self.duration)?;
        let began = Instant::now();
        let lap = (self.duration / LAPS).clamp(LEAST, LAP);
        let mut watch = Watch::default();
        let mut first = None;
        let mut told = Duration::ZERO;
        // A leak is what differs from one pause to another.
        while began.elapsed() < self.duration || samples.len() < 2 {
            bar.set_message("storm");
            self.rage(storm, &bar, began, lap)?;
            bar.set_message("pause");
            storm.pause()?;
            storm.calm()?;
            let still = lock(&beside.upgrading);
            let tally = storm.tally();
            let seen = kernel::Seen {
                descriptors: beside.descriptors.load(Ordering::Relaxed),
                memory: beside.memory.load(Ordering::Relaxed),
            };
            let sample = watch.sample(node, began.elapsed(), seen)?;
            let snapshot = Snapshot::take(node)?;
            drop(still);
            let at = sample.at;
            if at.saturating_sub(told) >= MINUTE {
                told = at;
                bar.suspend(|| println!("{}", report::line(at, &tally, &sample)));
            }
            samples.push(sample);
            // The first lap has loaded what is loaded once, and made the gateways.
            let first: &Snapshot = first.get_or_insert_with(|| snapshot.clone());
            first.ensure_same(&snapshot).context("a leak on the node")?;
            if let Some(error) = &*lock(&beside.upgrade_error) {
                bail!("{error}");
            }
            bar.set_position(millis(at));
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// The storm itself, while the bar moves.
    fn rage(
        &self,
        storm: &Storm<'_>,
        bar: &ProgressBar,
        began: Instant,
        lap: Duration,
    ) -> Result<()> {
        thread::scope(|scope| {
            let storm = scope.spawn(|| storm.rage(self.weather, lap));
            while !storm.is_finished() {
                thread::sleep(Duration::from_millis(200));
                bar.set_position(millis(began.elapsed()));
            }
            storm
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Another binary, and another again.
    fn upgrade_again_and_again(&self, node: &Node, beside: &Beside) {
        for build in self.builds.iter().cycle() {
            let next = Instant::now() + UPGRADE;
            while Instant::now() < next {
                if beside.stop.load(Ordering::Relaxed) {
                    return;
                }
                thread::sleep(Duration::from_millis(100));
            }
            let _alone = lock(&beside.upgrading);
            match upgrade(node, build) {
                Ok(()) => beside.upgrades.fetch_add(1, Ordering::Relaxed),
                Err(error) => {
                    *lock(&beside.upgrade_error) = Some(format!("an upgrade: {error:#}"));
                    return;
                }
            };
        }
    }
}

/// Puts another binary in the plugin's place, at no moment without one, and upgrades.
fn upgrade(node: &Node, build: &Path) -> Result<()> {
    let plugin = format!("{}/{}", Node::CNI_PATH, node.plugin());
    node.run(&format!("ln -sfn {} {plugin}.new", build.display()))?;
    node.run(&format!("mv -T {plugin}.new {plugin}"))?;
    node.run(&format!("{plugin} upgrade")).map(drop)
}

/// Looks at calls while they run: none lives long enough to be asked.
fn look_at_calls(node: &Node, beside: &Beside) {
    while !beside.stop.load(Ordering::Relaxed) {
        for pid in kernel::plugin_processes(node.plugin()) {
            if let Some(seen) = kernel::look_at(pid) {
                beside
                    .descriptors
                    .fetch_max(seen.descriptors, Ordering::Relaxed);
                beside.memory.fetch_max(seen.memory, Ordering::Relaxed);
            }
        }
        thread::sleep(LOOK);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn progress(whole: Duration) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:30} {percent:>3} %, {eta} left: {msg}")?;
    Ok(ProgressBar::new(millis(whole)).with_style(style))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_are_minutes_and_nothing_is_too_little() {
        let arguments = |minutes, hours| Arguments {
            minutes,
            hours,
            seed: None,
            callers: 16,
            output: None,
        };
        let hour = Duration::from_secs(3600);
        assert_eq!(arguments(5.0, Some(1.0)).duration().unwrap(), hour);
        assert_eq!(arguments(60.0, None).duration().unwrap(), hour);
        for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            arguments(wrong, None).duration().unwrap_err();
        }
    }
}
