//! `cargo xtask lint`: format, lints and documentation, all without a warning.

use anyhow::Result;

use crate::{
    process::{cargo, run, workspace},
    setup,
};

/// Runs every check, the quick ones first; stops at the first that fails.
pub(crate) fn run_all() -> Result<()> {
    let toolchain = setup::lint()?;
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo()
        .args(["clippy", "--workspace", "--exclude=bpf-bridge-ebpf"])
        .args(["--all-targets", "--", "-Dwarnings"]))?;
    // What the kernel runs exists for the bpf target alone.
    run(toolchain
        .command("cargo")
        .args(["clippy", "--package=bpf-bridge-ebpf", "--release"])
        .args(["--target=bpfel-unknown-none", "-Zbuild-std=core"])
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
