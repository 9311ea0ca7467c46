//! `cargo xtask setup`: provides what this machine lacks.
//!
//! What is there is preferred. When nothing is missing nothing is installed and
//! looking takes a fraction of a second, so every other command begins with its
//! part of this one.

use std::{env, path::PathBuf, process::Command};

use anyhow::Result;

use crate::{
    build, debian,
    ebpf_toolchain::{self, DEBIAN_TOOLCHAIN, LlvmVersion, TOOLCHAIN_VARIABLE, Toolchain},
    process::{cargo, find, output, run, succeeds, target_directory},
};

/// The version of bpf-linker that is installed where there is none.
const BPF_LINKER: &str = "0.13.0";

/// What needs programs besides Rust's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// `cargo xtask demo`.
    Demo,
    /// `cargo xtask test`.
    Test,
    /// `cargo xtask bench`.
    Bench,
    /// `cargo xtask soak`.
    Soak,
    /// `cargo xtask test --kernel`.
    Kernel,
}

/// A program that a command runs: its name on the PATH or its absolute path,
/// the Debian package it is in, and what it is needed for.
type Program = (&'static str, &'static str, &'static [Purpose]);

/// Every program that tests and commands run, but Rust's and what every Debian
/// has.
const PROGRAMS: &[Program] = {
    use Purpose::{Bench, Demo, Kernel, Soak, Test};
    &[
        ("ip", "iproute2", &[Demo, Test, Bench, Soak]),
        ("ping", "iputils-ping", &[Demo, Test, Soak]),
        ("bpftool", "bpftool", &[Demo, Test, Soak]),
        ("iperf3", "iperf3", &[Demo, Bench]),
        ("wrk", "wrk", &[Bench]),
        ("nginx", "nginx-light", &[Bench]),
        ("strace", "strace", &[Test]),
        ("iptables", "iptables", &[Demo, Test, Bench]),
        ("nft", "nftables", &[Test, Soak]),
        ("busybox", "busybox-static", &[Demo, Test, Kernel]),
        ("runc", "runc", &[Test]),
        ("containerd", "containerd", &[Test]),
        ("podman", "podman", &[Test]),
        (
            "/usr/lib/cni/bridge",
            "containernetworking-plugins",
            &[Test, Bench],
        ),
        ("modprobe", "kmod", &[Kernel]),
        ("cpio", "cpio", &[Kernel]),
    ]
};

/// `cargo xtask setup`.
pub(crate) fn run_all() -> Result<()> {
    let toolchain = lint()?;
    programs(Purpose::Demo)?;
    programs(Purpose::Test)?;
    fuzz()?;
    println!(
        "setup: all there; {} (LLVM {}) compiles the eBPF programs",
        toolchain.name, toolchain.llvm
    );
    Ok(())
}

/// Provides what `purpose` runs.
pub(crate) fn programs(purpose: Purpose) -> Result<()> {
    let missing =
        |(file, _, purposes): &&Program| purposes.contains(&purpose) && find(file).is_none();
    let mut packages: Vec<_> = PROGRAMS
        .iter()
        .filter(missing)
        .map(|(_, package, _)| *package)
        .collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    debian::install(&packages)
}

/// Provides what building needs; returns what compiles the eBPF programs.
pub(crate) fn build() -> Result<Toolchain> {
    if let Ok(toolchain) = ebpf_toolchain::choose(&scratch()) {
        return Ok(toolchain);
    }
    match env::var(TOOLCHAIN_VARIABLE) {
        Ok(name) if !name.is_empty() => complete(&Toolchain::named(&name)?, Some(&name))?,
        _ => {
            if let Err(error) = complete(&Toolchain::current()?, None) {
                println!("setup: {error:#}; taking Debian's Rust for the eBPF programs");
                complete(&debian_toolchain()?, Some(DEBIAN_TOOLCHAIN))?;
            }
        }
    }
    ebpf_toolchain::choose(&scratch())
}

/// Provides what building the fuzz targets needs: libFuzzer is C++.
pub(crate) fn fuzz() -> Result<()> {
    if find("c++").is_none() {
        debian::install(&["g++"])?;
    }
    Ok(())
}

/// Provides what formatting and linting need; returns as [`build()`] does.
pub(crate) fn lint() -> Result<Toolchain> {
    let toolchain = build()?;
    for component in ["rustfmt", "clippy"] {
        let name = component.strip_prefix("rust").unwrap_or(component);
        if !succeeds(cargo().args([name, "--version"])) {
            add_component(component, None)?;
        }
    }
    if !succeeds(toolchain.command("cargo").args(["clippy", "--version"])) {
        if toolchain.name == DEBIAN_TOOLCHAIN {
            debian::install(&["rust-web-clippy"])?;
        } else {
            add_component("clippy", Some(&toolchain.name))?;
        }
    }
    Ok(toolchain)
}

/// Provides what `toolchain` lacks for compiling the programs: core's source
/// and a linker. `name` is rustup's, of one that is not the current.
fn complete(toolchain: &Toolchain, name: Option<&str>) -> Result<()> {
    if !toolchain.has_core_source() {
        add_component("rust-src", name)?;
    }
    let new_enough = || {
        toolchain
            .linker_llvm(&scratch())
            .is_ok_and(|llvm| llvm >= toolchain.llvm)
    };
    if new_enough() {
        return Ok(());
    }
    if find("cargo-binstall").is_some() {
        println!("setup: installing bpf-linker {BPF_LINKER} (cargo binstall)");
        let mut binstall = cargo();
        binstall.args(["binstall", "--no-confirm", "--force"]);
        binstall.arg(format!("bpf-linker@{BPF_LINKER}"));
        if run(&mut binstall).is_ok() && new_enough() {
            return Ok(());
        }
    }
    build_linker(toolchain.llvm)?;
    toolchain.check(&scratch())
}

/// Builds bpf-linker with Debian's LLVM of the same major version as `llvm`.
fn build_linker(llvm: LlvmVersion) -> Result<()> {
    let major = llvm.0;
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{major}"));
    if !prefix.join("include/llvm-c/Core.h").exists() {
        debian::install(&[&format!("llvm-{major}-dev")])?;
    }
    println!("setup: building bpf-linker {BPF_LINKER} with LLVM {major} (a minute or two)");
    run(cargo()
        .args(["install", "bpf-linker", "--version", BPF_LINKER])
        .args(["--locked", "--force", "--quiet", "--no-default-features"])
        .arg(format!("--features=llvm-{major}"))
        .env("LLVM_PREFIX", &prefix))
}

/// Debian's Rust, as a toolchain of rustup's.
fn debian_toolchain() -> Result<Toolchain> {
    if let Ok(toolchain) = Toolchain::named(DEBIAN_TOOLCHAIN)
        && toolchain.has_core_source()
    {
        return Ok(toolchain);
    }
    debian::install(&["rustc-web", "cargo-web", "rust-web-src"])?;
    run(Command::new("rustup").args(["toolchain", "link", DEBIAN_TOOLCHAIN, "/usr"]))?;
    Toolchain::named(DEBIAN_TOOLCHAIN)
}

/// The target of the static plugin: with musl, whose start takes a quarter of the time that
/// glibc's does on some machines, or this machine's own where rustup has no such target.
pub(crate) fn static_target() -> Result<String> {
    let host = build::host()?;
    let musl = host.replace("-gnu", "-musl");
    let list = ["target", "list", "--installed"];
    let is_there = |target: &str| {
        output(Command::new("rustup").args(list))
            .is_ok_and(|targets| targets.lines().any(|line| line == target))
    };
    if !is_there(&musl) {
        println!("setup: installing the target {musl} (rustup)");
        if !succeeds(Command::new("rustup").args(["target", "add", &musl])) {
            println!("setup: there is none; the plugin is built for {host}");
            return Ok(host);
        }
    }
    Ok(musl)
}

/// Adds a component to the toolchain that rustup knows by `name`, or to the
/// current one.
fn add_component(component: &str, name: Option<&str>) -> Result<()> {
    println!("setup: installing {component} (rustup)");
    let mut rustup = Command::new("rustup");
    rustup.args(["component", "add", component]);
    if let Some(name) = name {
        rustup.args(["--toolchain", name]);
    }
    run(&mut rustup)
}

/// A directory for the files of a trial link.
fn scratch() -> PathBuf {
    target_directory().join("xtask")
}
