//! `cargo xtask test`: unit tests, then the real binary in nodes of its own.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, anyhow};
use serde_json::Value;

use crate::{
    build::{self, BINARY_VARIABLE, TEST_PLUGINS},
    process::{cargo, output, run},
    setup::{self, Purpose},
};

/// Tells the tests of the commands where the commands are.
const XTASK_VARIABLE: &str = "BPF_BRIDGE_XTASK";

/// Runs all tests, and fails if one of them does; `arguments` are for the test
/// binaries.
pub(crate) fn run_all(arguments: &[String]) -> Result<()> {
    setup::programs(Purpose::Test)?;
    run(all()
        .envs(environment()?)
        .args(["--no-fail-fast", "--"])
        .args(arguments))
}

/// `cargo test` of everything.
fn all() -> Command {
    let mut cargo = cargo();
    cargo.args(["test", "--workspace", "--exclude=bpf-bridge-ebpf"]);
    cargo
}

/// Builds what tests call, and returns the variables that tell them of it.
fn environment() -> Result<Vec<(&'static str, PathBuf)>> {
    let xtask = env::current_exe().context("looking for this program")?;
    let mut environment = vec![(BINARY_VARIABLE, build::plugin()?), (XTASK_VARIABLE, xtask)];
    for (feature, variable) in TEST_PLUGINS {
        environment.push((variable, build::test_plugin(feature)?));
    }
    Ok(environment)
}

/// Test programs that are built, for whoever runs them somewhere else.
pub(crate) struct Tests {
    /// The variables that they need.
    pub(crate) environment: Vec<(&'static str, PathBuf)>,
    /// Their names and paths.
    pub(crate) programs: Vec<(String, PathBuf)>,
}

impl Tests {
    /// Builds all of them.
    pub(crate) fn build() -> Result<Self> {
        setup::programs(Purpose::Test)?;
        Ok(Self {
            environment: environment()?,
            programs: programs(all())?,
        })
    }

    /// The path of one.
    pub(crate) fn program(&self, name: &str) -> Result<&Path> {
        self.programs
            .iter()
            .find(|(there, _)| there == name)
            .map(|(_, path)| path.as_path())
            .ok_or_else(|| anyhow!("there are no tests {name:?}"))
    }
}

/// The tests of the plugin's own code.
pub(crate) fn unit_tests() -> Result<PathBuf> {
    setup::build()?;
    let mut cargo = cargo();
    cargo.args(["test", "--package=bpf-bridge", "--lib"]);
    let programs = programs(cargo)?;
    programs
        .into_iter()
        .next()
        .map(|(_, path)| path)
        .ok_or_else(|| anyhow!("the plugin has no tests"))
}

/// Has `cargo test` build and not run; returns the names and paths of the programs.
fn programs(mut cargo: Command) -> Result<Vec<(String, PathBuf)>> {
    let messages = output(cargo.args(["--no-run", "--message-format=json-render-diagnostics"]))?;
    Ok(messages
        .lines()
        .filter_map(|message| serde_json::from_str::<Value>(message).ok())
        .filter_map(|message| {
            let name = message.get("target")?.get("name")?.as_str()?.to_owned();
            Some((name, message.get("executable")?.as_str()?.into()))
        })
        .collect())
}
