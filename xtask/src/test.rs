//! `cargo xtask test`: unit tests, then the real binary in nodes of its own.

use std::env;

use anyhow::{Context as _, Result};

use crate::{
    build::{self, BINARY_VARIABLE, TEST_PLUGINS},
    process::{cargo, run},
    setup::{self, Purpose},
};

/// Tells the tests of the commands where the commands are.
const XTASK_VARIABLE: &str = "BPF_BRIDGE_XTASK";

/// Runs all tests, and fails if one of them does; `arguments` are for the test
/// binaries.
pub(crate) fn run_all(arguments: &[String]) -> Result<()> {
    setup::programs(Purpose::Test)?;
    let binary = build::plugin()?;
    let xtask = env::current_exe().context("looking for this program")?;
    let mut tests = cargo();
    for (feature, variable) in TEST_PLUGINS {
        tests.env(variable, build::test_plugin(feature)?);
    }
    run(tests
        .args(["test", "--workspace", "--exclude=bpf-bridge-ebpf"])
        .args(["--no-fail-fast", "--"])
        .args(arguments)
        .env(BINARY_VARIABLE, binary)
        .env(XTASK_VARIABLE, xtask))
}
