//! What the programs cost by the kernel's own account.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    programs::ProgramInfo,
    sys::{Stats, enable_stats},
};
use bpf_bridge_tests::Node;
use serde_json::{Value, json};

use super::traffic::{Pair, UDP_FLOW, UDP_RR};

/// Where bpf-bridge pins what it loads.
const PINS: &str = "/sys/fs/bpf/bpf-bridge";
/// The program on every port.
const PORT: &str = "port";
/// All that is loaded, by the names of the pins.
const PROGRAMS: [&str; 3] = [PORT, "responder", "flood"];

/// One program.
pub(super) struct Program {
    pub(super) name: String,
    /// Instructions that the verifier went through.
    pub(super) verified: Option<u32>,
    /// Bytes of machine code.
    pub(super) jited: u32,
}

/// What there is to say of the programs.
pub(super) struct Programs {
    pub(super) programs: Vec<Program>,
    /// Traffic, and the mean run time of the program on the port with it, in ns.
    /// It has the two clock readings in it that measure it.
    pub(super) runs: Vec<(&'static str, f64)>,
}

impl Programs {
    pub(super) fn to_json(&self) -> Value {
        let programs: Vec<Value> = self
            .programs
            .iter()
            .map(|program| {
                json!({"name": program.name, "verifiedInstructions": program.verified, "jitedBytes": program.jited})
            })
            .collect();
        let runs: Vec<Value> = self
            .runs
            .iter()
            .map(|(traffic, time)| json!({"traffic": traffic, "nanosecondsPerRun": time}))
            .collect();
        json!({"programs": programs, "runs": runs})
    }
}

/// Looks at the programs of a node of bpf-bridge's while it has traffic.
pub(super) fn measure(pair: &Pair, slice: Duration, cpu: usize) -> Result<Programs> {
    let node = &pair.arena.node;
    let pins = node.within(|| {
        let mut pins = Vec::new();
        find(Path::new(PINS), &mut pins)?;
        Ok(pins)
    })?;
    let mut programs = Vec::new();
    let pin = |name: &str| {
        let named = |pin: &&PathBuf| pin.file_name().is_some_and(|file| file == name);
        pins.iter()
            .find(named)
            .with_context(|| format!("no program {name} below {PINS}"))
    };
    for name in PROGRAMS {
        let info = open(node, pin(name)?)?;
        programs.push(Program {
            name: name.to_owned(),
            verified: info.verified_instruction_count(),
            jited: info.size_jitted(),
        });
    }
    let port = pin(PORT)?;
    // Switched on for as long as the descriptor is open, in place of the
    // machine's sysctl.
    let _statistics = enable_stats(Stats::RunTime).context("switching run time statistics on")?;
    let mut runs = Vec::new();
    for (name, transport, to_host) in [
        ("pod to pod, UDP_RR", UDP_RR, false),
        ("pod to pod, UDP, 64 bytes", UDP_FLOW, false),
        ("pod to host, UDP_RR", UDP_RR, true),
    ] {
        let mut flow = pair.flow(transport, to_host, cpu)?;
        flow.run(slice)?;
        let before = open(node, port)?;
        flow.run(slice)?;
        let after = open(node, port)?;
        let count = after.run_count() - before.run_count();
        ensure!(count > 0, "the program {PORT} did not run for {name}");
        let time = after.run_time() - before.run_time();
        runs.push((name, time.as_nanos() as f64 / count as f64));
    }
    Ok(Programs { programs, runs })
}

fn open(node: &Node, pin: &Path) -> Result<ProgramInfo> {
    node.within(|| {
        ProgramInfo::from_pin(pin).with_context(|| format!("opening the pin {}", pin.display()))
    })
}

fn find(directory: &Path, pins: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find(&entry.path(), pins)?;
        } else {
            pins.push(entry.path());
        }
    }
    Ok(())
}
