//! What is on a node, to compare before and after.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::Node;

/// What a plugin can have left on a node: devices, addresses, routes,
/// neighbours, pins and the entries of pinned maps, leases and other state files.
///
/// What changes by itself is left out: device indices (a map's entry names the
/// device), counters, ages, and entries that a map may lose at any time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<String, String>);

impl Snapshot {
    /// Looks at a node; of maps, at the keys.
    ///
    /// # Errors
    ///
    /// That `ip` or `bpftool` is missing or failed.
    pub fn take(node: &Node) -> Result<Self> {
        Self::with(node, false)
    }

    /// As [`Self::take`], with the values of maps, but for counters.
    ///
    /// # Errors
    ///
    /// As [`Self::take`].
    pub fn exact(node: &Node) -> Result<Self> {
        Self::with(node, true)
    }

    fn with(node: &Node, values: bool) -> Result<Self> {
        let mut seen = BTreeMap::new();
        let script = "ip -j -d addr; echo; ip -j -4 route show table all; echo; \
                      ip -j -6 route show table all; echo; ip -j neigh show nud permanent";
        let answers = shell(node, script)?;
        // No output at all is an empty list.
        let mut answers = answers.split('\n').filter(|line| !line.is_empty());
        let mut next = || -> Result<Value> {
            let text = answers.next().context("an answer of ip is missing")?;
            serde_json::from_str(text).with_context(|| format!("ip printed {text:?}"))
        };
        let devices = next()?;
        let mut names = BTreeMap::new();
        for device in list(&devices) {
            let name = text(device, "ifname");
            let kind = device["linkinfo"]["info_kind"].as_str().unwrap_or("");
            let alias = device["ifalias"].as_str().unwrap_or("");
            names.extend(device["ifindex"].as_u64().map(|index| (index, name)));
            seen.insert(
                format!("device {name}"),
                format!("{kind} mtu {} {alias}", device["mtu"]),
            );
            for address in list(&device["addr_info"]) {
                // The kernel gives a device its link-local address when it likes.
                if address["scope"] != "link" {
                    let key = format!(
                        "address {}/{} on {}",
                        text(address, "local"),
                        address["prefixlen"],
                        text(device, "ifname")
                    );
                    seen.insert(key, String::new());
                }
            }
        }
        for family in ["-4", "-6"] {
            for route in list(&next()?) {
                let key = format!(
                    "route {family} {} {} via {} dev {} table {}",
                    text(route, "type"),
                    text(route, "dst"),
                    text(route, "gateway"),
                    text(route, "dev"),
                    text(route, "table"),
                );
                // Those that come and go with a link-local address or a carrier.
                let kernels_own = ["fe80", "ff00", "anycast", "multicast"]
                    .iter()
                    .any(|word| key.contains(word));
                if !kernels_own {
                    seen.insert(key, String::new());
                }
            }
        }
        for neighbour in list(&next()?) {
            let key = format!(
                "neighbour {} on {}",
                text(neighbour, "dst"),
                text(neighbour, "dev")
            );
            seen.insert(key, text(neighbour, "lladdr").to_owned());
        }
        for (path, content) in files(node, &["/var/lib/cni", "/run/bpf-bridge"])? {
            // A record, which names devices by their indices.
            let content = match serde_json::from_str(&content) {
                Ok(Value::Object(record)) => {
                    with_names(record.into(), &["segment", "hostIfindex"], &names).to_string()
                }
                _ => content.escape_debug().to_string(),
            };
            seen.insert(format!("file {}", path.display()), content);
        }
        let pins: Vec<PathBuf> = files(node, &["/sys/fs/bpf"])?
            .into_iter()
            .map(|(path, _)| path)
            .collect();
        let maps = maps(node, &pins, &names, values)?;
        for (pin, entries) in pins.iter().zip(maps) {
            seen.insert(format!("pin {}", pin.display()), entries);
        }
        Ok(Self(seen))
    }

    /// Everything that differs: `-` was there before, `+` is there after.
    #[must_use]
    pub fn changes(&self, after: &Self) -> Vec<String> {
        let one_way = |sign: &str, from: &Self, to: &Self| -> Vec<String> {
            from.0
                .iter()
                .filter(|(key, value)| to.0.get(*key) != Some(value))
                .map(|(key, value)| format!("{sign}{key} {value}").trim_end().to_owned())
                .collect()
        };
        let mut changes = one_way("-", self, after);
        changes.extend(one_way("+", after, self));
        changes
    }

    /// That nothing differs.
    ///
    /// # Errors
    ///
    /// Everything that does.
    pub fn ensure_same(&self, after: &Self) -> Result<()> {
        let changes = self.changes(after);
        ensure!(
            changes.is_empty(),
            "left behind or lost:\n{}",
            changes.join("\n")
        );
        Ok(())
    }

    /// The entries whose description holds `word`, such as `device veth`.
    #[must_use]
    pub fn matching(&self, word: &str) -> Vec<String> {
        self.0
            .iter()
            .map(|(key, value)| format!("{key} {value}").trim_end().to_owned())
            .filter(|entry| entry.contains(word))
            .collect()
    }
}

/// The files below some directories and what is in them.
fn files(node: &Node, roots: &[&str]) -> Result<Vec<(PathBuf, String)>> {
    fn walk(directory: &Path, found: &mut Vec<(PathBuf, String)>) -> Result<()> {
        let Ok(entries) = fs::read_dir(directory) else {
            return Ok(());
        };
        for entry in entries {
            let entry = entry.with_context(|| format!("listing {}", directory.display()))?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                walk(&path, found)?;
                continue;
            }
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // A lock is no state; what the stores keep beside the leases (the
            // position of the round robin) moves on.
            if name.contains("lock") {
                continue;
            }
            // Objects pinned in bpffs cannot be read.
            let bookkeeping = name.starts_with("last_reserved_ip.")
                || path.starts_with("/var/lib/cni/networks/.bpf-bridge");
            let content = if bookkeeping {
                String::new()
            } else {
                String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned()
            };
            found.push((path, content));
        }
        Ok(())
    }
    node.within(|| {
        let mut found = Vec::new();
        for root in roots {
            walk(Path::new(root), &mut found)?;
        }
        Ok(found)
    })
}

/// The entries of each pinned map that keeps them; nothing for other maps, programs
/// and links.
fn maps(
    node: &Node,
    pins: &[PathBuf],
    devices: &BTreeMap<u64, &str>,
    values: bool,
) -> Result<Vec<String>> {
    let mut entries = vec![String::new(); pins.len()];
    // What maps are called is in capitals.
    let is_map = |pin: &&PathBuf| {
        let name = pin.file_name().unwrap_or_default().to_string_lossy();
        !name.contains(|letter: char| letter.is_ascii_lowercase()) && !name.contains('.')
    };
    let maps: Vec<&PathBuf> = pins.iter().filter(is_map).collect();
    let shown = bpftool(node, "show", &maps)?;
    let kinds: BTreeMap<&PathBuf, &str> = maps
        .iter()
        .zip(&shown)
        .map(|(pin, map)| (*pin, text(map, "type")))
        .collect();
    // Not those that forget the oldest, nor those that always have all their entries.
    let lasting = ["hash", "percpu_hash", "lpm_trie", "prog_array"];
    let kept: Vec<&PathBuf> = maps
        .into_iter()
        .filter(|pin| lasting.contains(&kinds[pin]))
        .collect();
    for (pin, dump) in kept.iter().zip(bpftool(node, "dump", &kept)?) {
        // Counters, and numbers that the kernel gives.
        let values = values && ["hash", "lpm_trie"].contains(&kinds[pin]);
        let mut found: Vec<String> = list(&dump)
            .map(|entry| {
                let formatted = entry.get("formatted").unwrap_or(entry);
                let key = named(pin, &formatted["key"], devices, true);
                if values {
                    format!("{key}={}", named(pin, &formatted["value"], devices, false))
                } else {
                    key
                }
            })
            .collect();
        found.sort();
        if let Some(at) = pins.iter().position(|it| it == *pin) {
            entries[at] = format!("{} keys: {}", found.len(), found.join(" "));
        }
    }
    Ok(entries)
}

/// A key or value with the names of devices for their indices.
fn named(pin: &Path, value: &Value, devices: &BTreeMap<u64, &str>, is_key: bool) -> String {
    const BY_DEVICE: [&str; 5] = ["PORTS", "STATS", "SEGMENTS", "UPLINKS", "XDP_UPLINKS"];
    let map = pin.file_name().unwrap_or_default().to_string_lossy();
    let named = match is_key {
        true if BY_DEVICE.contains(&&*map) => name(value, devices),
        // The port of a key is one of the transport layer.
        true => with_names(value.clone(), &["segment"], devices),
        false => with_names(value.clone(), &["segment", "port", "gateway_port"], devices),
    };
    named.to_string()
}

/// With the names of devices for their indices in these fields.
fn with_names(mut value: Value, fields: &[&str], devices: &BTreeMap<u64, &str>) -> Value {
    for field in fields {
        if let Some(index) = value.get_mut(*field) {
            *index = name(index, devices);
        }
    }
    value
}

/// The name of a device by its index; one that no device has stays.
fn name(index: &Value, devices: &BTreeMap<u64, &str>) -> Value {
    let name = index.as_u64().and_then(|index| devices.get(&index));
    name.map_or_else(|| index.clone(), |name| (*name).into())
}

/// What `bpftool -j map VERB` says of each of these maps, or nothing: of what is no map,
/// and of an empty trie.
fn bpftool(node: &Node, verb: &str, maps: &[&PathBuf]) -> Result<Vec<Value>> {
    let mut answers = Vec::new();
    // It stops where one fails.
    while answers.len() < maps.len() {
        let lines: Vec<String> = maps[answers.len()..]
            .iter()
            .map(|pin| format!("map {verb} pinned {}", pin.display()))
            .collect();
        let lines = lines.join("\n");
        let script = format!("bpftool -j batch file - <<'END' || true\n{lines}\nEND");
        let text = shell(node, &script)?;
        let more: Value =
            serde_json::from_str(&text).with_context(|| format!("bpftool printed {text:?}"))?;
        let before = answers.len();
        answers.extend(list(&more).map(|one| one["output"].clone()));
        ensure!(answers.len() > before, "bpftool says nothing of {lines}");
    }
    Ok(answers)
}

/// The output of a shell script that must succeed.
fn shell(node: &Node, script: &str) -> Result<String> {
    let output = node.output(Command::new("sh").args(["-ec", script]))?;
    ensure!(
        output.status.success(),
        "{script}: {}{}",
        String::from_utf8_lossy(&output.stderr).trim(),
        String::from_utf8_lossy(&output.stdout).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("")
}
