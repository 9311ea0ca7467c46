//! `cargo xtask lint`: format, lints and documentation, all without a warning.

use std::process::Stdio;

use anyhow::Result;

use crate::{
    process::{cargo, run, target_directory, workspace},
    setup,
};

/// Runs every check, the quick ones first; stops at the first that fails.
pub(crate) fn run_all() -> Result<()> {
    let toolchain = setup::lint()?;
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["fmt", "--manifest-path=fuzz/Cargo.toml", "--check"]))?;
    // Its lock file must follow the plugin's dependencies.
    run(cargo()
        .args(["metadata", "--manifest-path=fuzz/Cargo.toml"])
        .args(["--locked", "--format-version=1"])
        .stdout(Stdio::null()))?;
    run(cargo()
        .args(["clippy", "--workspace", "--exclude=bpf-bridge-ebpf"])
        .args(["--all-targets", "--", "-Dwarnings"]))?;
    // As tests call it.
    run(cargo()
        .args(["clippy", "--package=bpf-bridge", "--bin=bpf-bridge"])
        .args(["--features=faults", "--", "-Dwarnings"]))?;
    // What the kernel runs exists for the bpf target alone. It is checked where
    // the build script builds it: with RUSTC_BOOTSTRAP some dependencies are
    // built otherwise, and would be built again for each change of it.
    run(toolchain
        .command("cargo")
        .args(["clippy", "--package=bpf-bridge-ebpf", "--release"])
        .args(["--target=bpfel-unknown-none", "-Zbuild-std=core"])
        .arg("--target-dir")
        .arg(target_directory().join("ebpf/bpf-bridge-ebpf"))
        .args(["--", "-Dwarnings"])
        .env("RUSTC_BOOTSTRAP", "1")
        .current_dir(workspace()))?;
    run(cargo()
        .args([
            "doc",
            "--workspace",
            "--exclude=bpf-bridge-ebpf",
            "--no-deps",
        ])
        .env("RUSTDOCFLAGS", "-Dwarnings"))
}
