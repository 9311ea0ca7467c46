//! `cargo xtask build`: the plugin, one static binary.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::{
    process::{cargo, line, target_directory},
    setup,
};

/// Tells which plugin binary to call: tests read it, and commands take the binary
/// that it names instead of building one.
pub(crate) const BINARY_VARIABLE: &str = "BPF_BRIDGE_BIN";

/// Plugins that only tests call: the feature of the package that makes each, and the
/// variable that names it to them.
pub(crate) const TEST_PLUGINS: [(&str, &str); 2] = [
    ("faults", "BPF_BRIDGE_FAULTS_BIN"),
    ("next-layout", "BPF_BRIDGE_NEXT_BIN"),
];

/// `cargo xtask build`.
pub(crate) fn run() -> Result<()> {
    let binary = build()?;
    let size = fs::metadata(&binary)
        .with_context(|| format!("reading {}", binary.display()))?
        .len();
    println!("{} ({size} bytes, static)", binary.display());
    Ok(())
}

/// The plugin to call: the one that [`BINARY_VARIABLE`] names, or a new one.
pub(crate) fn plugin() -> Result<PathBuf> {
    match env::var_os(BINARY_VARIABLE) {
        Some(binary) if !binary.is_empty() => Ok(binary.into()),
        _ => build(),
    }
}

/// Builds the plugin in release mode, after what that needs; returns the path of
/// the binary.
fn build() -> Result<PathBuf> {
    setup::build()?;
    let target = setup::static_target()?;
    let mut cargo = cargo();
    cargo
        .args(["build", "--release"])
        // With an explicit target the flags below are for the plugin and not for
        // proc macros, which must be dynamic.
        .arg(format!("--target={target}"))
        .env("CARGO_ENCODED_RUSTFLAGS", static_flags());
    let binary = executable(cargo)?;
    ensure_static(&binary)?;
    Ok(binary)
}

/// Builds a plugin with a feature that is for tests, which need not be fast nor static;
/// returns the path of a copy, as the next build takes the place of this one.
pub(crate) fn test_plugin(feature: &str) -> Result<PathBuf> {
    setup::build()?;
    let mut cargo = cargo();
    cargo.arg("build").arg(format!("--features={feature}"));
    let built = executable(cargo)?;
    let directory = target_directory().join(feature);
    let binary = directory.join("bpf-bridge");
    fs::create_dir_all(&directory)
        .and_then(|()| fs::copy(&built, &binary))
        .with_context(|| format!("copying {} to {}", built.display(), binary.display()))?;
    Ok(binary)
}

/// Has cargo build the plugin, and returns the path of the binary.
fn executable(mut cargo: Command) -> Result<PathBuf> {
    cargo
        .args(["--package=bpf-bridge", "--bin=bpf-bridge"])
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    let output = cargo
        .output()
        .with_context(|| format!("running {}", line(&cargo)))?;
    ensure!(
        output.status.success(),
        "{} failed ({})",
        line(&cargo),
        output.status
    );
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|message| serde_json::from_str::<Value>(message).ok())
        .find_map(|message| message.get("executable")?.as_str().map(PathBuf::from))
        .ok_or_else(|| anyhow!("{} told no executable", line(&cargo)))
}

/// The flags that the user asked for, if any, and the one for a static binary,
/// encoded as cargo wants them.
fn static_flags() -> String {
    let mut flags = match (env::var("CARGO_ENCODED_RUSTFLAGS"), env::var("RUSTFLAGS")) {
        (Ok(flags), _) => flags,
        (_, Ok(flags)) => flags.split_whitespace().collect::<Vec<_>>().join("\x1f"),
        _ => String::new(),
    };
    if !flags.is_empty() {
        flags.push('\x1f');
    }
    flags + "-Ctarget-feature=+crt-static"
}

/// The target triple of this machine.
pub(crate) fn host() -> Result<String> {
    let rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .arg("-vV")
        .output()
        .context("running rustc -vV")?;
    String::from_utf8_lossy(&rustc.stdout)
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .map(str::to_owned)
        .ok_or_else(|| anyhow!("rustc -vV told no host"))
}

/// Fails if `binary` needs a dynamic loader, which a node may not have.
fn ensure_static(binary: &Path) -> Result<()> {
    let elf = fs::read(binary).with_context(|| format!("reading {}", binary.display()))?;
    let interpreter = has_interpreter(&elf)
        .ok_or_else(|| anyhow!("{} is not a 64 bit ELF file", binary.display()))?;
    if interpreter {
        bail!(
            "{} is not static: it names a dynamic loader",
            binary.display()
        );
    }
    Ok(())
}

/// Whether one of the program headers of a 64 bit ELF file of this machine's
/// byte order is PT_INTERP.
fn has_interpreter(elf: &[u8]) -> Option<bool> {
    const ELFCLASS64: u8 = 2;
    const PT_INTERP: u32 = 3;
    let half = |at: usize| Some(u16::from_ne_bytes(*elf.get(at..)?.first_chunk()?).into());
    let word = |at: usize| Some(u32::from_ne_bytes(*elf.get(at..)?.first_chunk()?));
    let address =
        |at: usize| usize::try_from(u64::from_ne_bytes(*elf.get(at..)?.first_chunk()?)).ok();
    if !elf.starts_with(b"\x7fELF") || elf.get(4) != Some(&ELFCLASS64) {
        return None;
    }
    let (table, entry_size, entries): (usize, usize, usize) =
        (address(0x20)?, half(0x36)?, half(0x38)?);
    let mut found = false;
    for entry in 0..entries {
        found |= word(table.checked_add(entry * entry_size)?)? == PT_INTERP;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_executable_has_an_interpreter() {
        let this = fs::read(env::current_exe().unwrap()).unwrap();
        assert_eq!(
            has_interpreter(&this),
            Some(cfg!(not(target_feature = "crt-static")))
        );
        assert_eq!(has_interpreter(&this[..0x30]), None);
        assert_eq!(has_interpreter(b"#!/bin/sh"), None);
    }
}
