//! `cargo xtask test`: unit tests, then the real binary in nodes of its own.

use anyhow::Result;

use crate::{
    build::{self, BINARY_VARIABLE},
    process::{cargo, run},
    setup::{self, Purpose},
};

/// Runs all tests, and fails if one of them does; `arguments` are for the test
/// binaries.
pub(crate) fn run_all(arguments: &[String]) -> Result<()> {
    setup::programs(Purpose::Test)?;
    let binary = build::plugin()?;
    run(cargo()
        .args(["test", "--workspace", "--exclude=bpf-bridge-ebpf"])
        .args(["--no-fail-fast", "--"])
        .args(arguments)
        .env(BINARY_VARIABLE, binary))
}
