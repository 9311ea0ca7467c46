//! What the figures were taken on, and with what.

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::Path,
    process::{Command, Stdio},
};

use nix::sys::utsname::uname;
use serde_json::{Map, Value, json};

use super::node::{Recipe, STOCK_PLUGINS};
/// The programs that send, and the argument by which each tells its version.
const GENERATORS: [(&str, &str); 3] = [
    ("iperf3", "--version"),
    ("wrk", "--version"),
    ("nginx", "-v"),
];

/// Hardware, kernel, settings and versions. What cannot be found out is `null`.
pub(super) struct Machine(Map<String, Value>);

impl Machine {
    /// As it is before the run.
    pub(super) fn describe(recipe: &Recipe, cpu: usize) -> Self {
        let kernel = uname().ok();
        let kernel = kernel.as_ref();
        let said = json!({
            "taken": first_line("date", &["--utc", "+%F %R UTC"]),
            "cpu": field("/proc/cpuinfo", "model name"),
            "cpus": std::thread::available_parallelism().map(usize::from).ok(),
            "pinnedToCpu": cpu,
            "hypervisor": field("/proc/cpuinfo", "flags").map(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            "governor": text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            "memory": field("/proc/meminfo", "MemTotal"),
            "kernel": kernel.map(|kernel| kernel.release().to_string_lossy().into_owned()),
            "kernelVersion": kernel.map(|kernel| kernel.version().to_string_lossy().into_owned()),
            "mitigations": mitigations(),
            "clock": text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            "jit": text("/proc/sys/net/core/bpf_jit_enable"),
            "jitHardening": text("/proc/sys/net/core/bpf_jit_harden"),
            "loadAverageBefore": load(),
            "addressesOn": file_system(&recipe.disk),
            "bpfBridge": env!("CARGO_PKG_VERSION"),
            "revision": revision(),
            "stock": package(&recipe.stock.join("bridge")),
            "stockPlugins": STOCK_PLUGINS.into_iter().map(|plugin| (plugin.to_owned(), banner(&recipe.stock.join(plugin)).into())).collect::<Map<_, Value>>(),
            "stockBackend": recipe.backend.name(),
            "iptables": first_line("iptables", &["--version"]),
            "nft": first_line("nft", &["--version"]),
            "generators": GENERATORS.into_iter().map(|(program, argument)| (program.to_owned(), first_line(program, &[argument]).into())).collect::<Map<_, Value>>(),
        });
        match said {
            Value::Object(said) => Self(said),
            _ => Self(Map::new()),
        }
    }

    /// With what only shows after the run.
    pub(super) fn end(mut self) -> Value {
        self.0.insert("loadAverageAfter".to_owned(), json!(load()));
        self.0.into()
    }
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

fn text(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The value of the first line `NAME : VALUE` of a file.
fn field(path: &str, name: &str) -> Option<String> {
    text(path)?.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

/// The load of the last 1, 5 and 15 minutes.
fn load() -> Option<Vec<f64>> {
    let text = text("/proc/loadavg")?;
    text.split(' ')
        .take(3)
        .map(|load| load.parse().ok())
        .collect()
}

/// What the kernel does about the faults of this CPU; those that it does not have are
/// left out.
fn mitigations() -> Option<Map<String, Value>> {
    let files = fs::read_dir("/sys/devices/system/cpu/vulnerabilities").ok()?;
    let faults = files.flatten().filter_map(|file| {
        let said = text(file.path()).filter(|said| said != "Not affected")?;
        Some((file.file_name().to_string_lossy().into_owned(), said.into()))
    });
    Some(faults.collect())
}

/// The type of the file system that a file is on.
fn file_system(file: &Path) -> Option<String> {
    first_line("stat", &["--file-system", "--format=%T", file.to_str()?])
}

/// The commit that was checked out, with a mark if there is more than it.
fn revision() -> Option<String> {
    let workspace = crate::process::workspace();
    let describe = ["describe", "--always", "--dirty", "--abbrev=12"];
    let arguments: Vec<&str> = ["-C", workspace.to_str()?]
        .into_iter()
        .chain(describe)
        .collect();
    succeeding("git", &arguments)
}

/// The first line that a program prints, wherever it prints it.
fn first_line(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .ok()?;
    [output.stdout, output.stderr].iter().find_map(|text| {
        let line = String::from_utf8_lossy(text)
            .lines()
            .next()?
            .trim()
            .to_owned();
        (!line.is_empty()).then_some(line)
    })
}

/// The Debian package that a file is of, and its version.
fn package(file: &Path) -> Option<String> {
    let owner = succeeding("dpkg-query", &["--search", file.to_str()?])?;
    let (package, _) = owner.split_once(':')?;
    succeeding(
        "dpkg-query",
        &["--show", "--showformat=${Package} ${Version}", package],
    )
}

/// What a program prints that does not fail.
fn succeeding(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .stderr(Stdio::null())
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
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
