//! What the figures were taken on, and with what.

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::Path,
    process::{Command, Stdio},
};

use nix::sys::{statfs::statfs, utsname::uname};
use serde_json::{Value, json};

use super::node::Recipe;

/// Hardware, kernel, settings and versions. What cannot be found out is `null`.
pub(super) fn describe(recipe: &Recipe, cpu: usize) -> Value {
    let kernel = uname().ok();
    let kernel = kernel.as_ref();
    json!({
        "cpu": field("/proc/cpuinfo", "model name"),
        "cpus": std::thread::available_parallelism().map(usize::from).ok(),
        "pinnedToCpu": cpu,
        "hypervisor": field("/proc/cpuinfo", "flags").map(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
        "memory": field("/proc/meminfo", "MemTotal"),
        "kernel": kernel.map(|kernel| kernel.release().to_string_lossy().into_owned()),
        "kernelVersion": kernel.map(|kernel| kernel.version().to_string_lossy().into_owned()),
        "clock": text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "jit": text("/proc/sys/net/core/bpf_jit_enable"),
        "jitHardening": text("/proc/sys/net/core/bpf_jit_harden"),
        "loadAverage": text("/proc/loadavg"),
        "addressesOn": statfs(&recipe.disk).ok().map(|disk| format!("{:?}", disk.filesystem_type())),
        "bpfBridge": env!("CARGO_PKG_VERSION"),
        "revision": revision(),
        "stock": banner(&recipe.stock.join("bridge")),
        "stockHostLocal": banner(&recipe.stock.join("host-local")),
        "stockPortmap": banner(&recipe.stock.join("portmap")),
        "iptables": line("iptables", "--version"),
    })
}

/// What must be the same for an interrupted run to go on.
pub(super) fn identity(recipe: &Recipe) -> Value {
    let build = |file: &Path| fs::read(file).ok().map(|bytes| checksum(&bytes));
    json!({
        "kernel": uname().ok().map(|kernel| kernel.version().to_string_lossy().into_owned()),
        "plugin": build(&recipe.plugin),
        "against": recipe.against.as_deref().map(build),
        "backend": recipe.backend.name(),
        "stock": build(&recipe.stock.join("bridge")),
        "bench": build(Path::new("/proc/self/exe")),
    })
}

/// Tells builds apart.
fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

fn text(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The value of the first line `NAME : VALUE` of a file.
fn field(path: &str, name: &str) -> Option<String> {
    text(path)?.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

/// The commit that was checked out, with a mark if there is more than it.
fn revision() -> Option<String> {
    let output = Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .current_dir(crate::process::workspace())
        .stderr(Stdio::null())
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The first line that a program prints.
fn line(program: &str, argument: &str) -> Option<String> {
    let output = Command::new(program)
        .arg(argument)
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Some(text.lines().next()?.to_owned())
}

/// What a plugin calls itself when nobody asks it anything.
fn banner(plugin: &Path) -> Option<String> {
    let output = Command::new(plugin)
        .env_remove("CNI_COMMAND")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let first = String::from_utf8_lossy(&output.stderr)
        .lines()
        .next()?
        .to_owned();
    Some(first)
}
