//! `cargo xtask fuzz`: the targets in `fuzz/`, each for some time.
//!
//! `cargo fuzz run TARGET` does the same for one target, with a compiler that lets it use
//! AddressSanitizer. This needs nothing but stable Rust and a C++ compiler: libFuzzer's
//! instrumentation is LLVM's, and what it looks for are panics and broken promises.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    build::host,
    process::{cargo, line, run, target_directory, workspace},
    setup,
};

/// How long each target runs for [`Arguments::short`].
const SHORT: Duration = Duration::from_secs(10);
/// One input that takes longer hangs, in seconds.
const HANGS: u32 = 20;
/// More memory than that is a leak, in megabytes.
const MEMORY_MAX: u32 = 2048;

/// LLVM's instrumentation, as cargo-fuzz asks for it.
const INSTRUMENTATION: &[&str] = &[
    "--cfg=fuzzing",
    "-Ccodegen-units=1",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
];

/// What to run, and how long.
#[derive(Args)]
pub(crate) struct Arguments {
    /// The targets; all if none is named.
    targets: Vec<String>,
    /// How long, all in all.
    #[arg(long, default_value_t = 10.0, conflicts_with = "short")]
    minutes: f64,
    /// Only some seconds a target, as in CI.
    #[arg(long)]
    short: bool,
}

/// Runs the targets; fails when one finds something.
pub(crate) fn run_all(arguments: &Arguments) -> Result<()> {
    let all = targets()?;
    for name in &arguments.targets {
        ensure!(
            all.contains(name),
            "there is no target {name:?}: they are {}",
            all.join(", ")
        );
    }
    let chosen = match arguments.targets.as_slice() {
        [] => &all,
        chosen => chosen,
    };
    setup::fuzz()?;
    let binaries = build()?;

    // As many at a time as there are processors; then each has its share of the time.
    let at_once = thread::available_parallelism().map_or(1, usize::from);
    let rounds = chosen.len().div_ceil(at_once);
    let time = if arguments.short {
        SHORT
    } else {
        let whole = Duration::try_from_secs_f64(arguments.minutes * 60.0)
            .context("--minutes must be a positive number")?;
        whole.div_f64(rounds as f64).max(Duration::from_secs(1))
    };
    let progress = progress(time * rounds as u32)?;
    for round in chosen.chunks(at_once) {
        progress.set_message(round.join(", "));
        let mut running = round
            .iter()
            .map(|name| Running::start(&binaries, name, time))
            .collect::<Result<Vec<_>>>()?;
        wait(&mut running, &progress)?;
        for target in &running {
            progress.suspend(|| println!("{}", target.summary()));
        }
    }
    progress.finish_and_clear();
    Ok(())
}

/// The targets that there are.
fn targets() -> Result<Vec<String>> {
    let path = directory().join("fuzz_targets");
    let entries = fs::read_dir(&path).with_context(|| format!("listing {}", path.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn directory() -> PathBuf {
    workspace().join("fuzz")
}

/// Builds all targets; returns the directory of the binaries.
fn build() -> Result<PathBuf> {
    let host = host()?;
    let target_directory = target_directory().join("fuzz");
    run(cargo()
        .args(["build", "--release", "--locked", "--manifest-path"])
        .arg(directory().join("Cargo.toml"))
        // With a target of its own, build scripts and macros are not instrumented.
        .arg(format!("--target={host}"))
        .arg("--target-dir")
        .arg(&target_directory)
        .env("CARGO_ENCODED_RUSTFLAGS", INSTRUMENTATION.join("\x1f")))?;
    Ok(target_directory.join(host).join("release"))
}

fn progress(whole: Duration) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:30} {elapsed} of {prefix}  {msg}")?;
    let minutes = whole.as_secs_f64() / 60.0;
    Ok(ProgressBar::new(whole.as_millis() as u64)
        .with_style(style)
        .with_prefix(format!("{minutes:.1} min")))
}

/// A target at work.
struct Running {
    name: String,
    command: String,
    child: Child,
    log: PathBuf,
    artifacts: PathBuf,
}

impl Running {
    fn start(binaries: &Path, name: &str, time: Duration) -> Result<Self> {
        let create = |kind: &str| {
            let path = directory().join(kind).join(name);
            fs::create_dir_all(&path)
                .with_context(|| format!("creating {}", path.display()))
                .map(|()| path)
        };
        let (corpus, artifacts) = (create("corpus")?, create("artifacts")?);
        let log = artifacts.join("log");
        let output =
            fs::File::create(&log).with_context(|| format!("creating {}", log.display()))?;

        let mut command = Command::new(binaries.join(name));
        command
            .arg(format!("-max_total_time={}", time.as_secs()))
            .arg(format!("-timeout={HANGS}"))
            .arg(format!("-rss_limit_mb={MEMORY_MAX}"))
            .arg(format!("-artifact_prefix={}/", artifacts.display()));
        let dictionary = directory().join("dictionaries").join(name);
        if dictionary.exists() {
            command.arg(format!("-dict={}", dictionary.display()));
        }
        // What is new goes to the first; the second is what everybody begins with.
        command.arg(corpus);
        let seeds = directory().join("seeds").join(name);
        if seeds.exists() {
            command.arg(seeds);
        }
        command
            .current_dir(env::temp_dir())
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("sharing a file")?)
            .stderr(output);
        Ok(Self {
            name: name.to_owned(),
            child: command
                .spawn()
                .with_context(|| format!("running {}", line(&command)))?,
            command: line(&command),
            log,
            artifacts,
        })
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// libFuzzer's last words on what was done.
    fn summary(&self) -> String {
        let log = self.log();
        let done = log.lines().rfind(|line| line.contains("DONE"));
        let words = done.unwrap_or("ended").trim_start_matches('#');
        format!("{}: {words}", self.name)
    }

    fn check(&mut self) -> Result<bool> {
        let Some(status) = self.child.try_wait().context("waiting for a target")? else {
            return Ok(false);
        };
        if status.success() {
            return Ok(true);
        }
        let log = self.log();
        let from = log
            .find("panicked at")
            .or_else(|| log.find("ERROR: libFuzzer"))
            .unwrap_or_default();
        let said: Vec<_> = log[from..].lines().take(12).collect();
        bail!(
            "the target {} has found something ({status}): the input is in {}, all that it said \
             in {}, it was run as `{}`\n{}",
            self.name,
            self.artifacts.display(),
            self.log.display(),
            self.command,
            said.join("\n")
        )
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until all have ended; fails as soon as one fails.
fn wait(running: &mut [Running], progress: &ProgressBar) -> Result<()> {
    let mut last = Instant::now();
    loop {
        let mut left = 0;
        for target in &mut *running {
            left += usize::from(!target.check()?);
        }
        if left == 0 {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(100));
        progress.inc(last.elapsed().as_millis() as u64);
        last = Instant::now();
    }
}
