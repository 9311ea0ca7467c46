//! What is on a node, to compare before and after.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::Node;

/// What a plugin can have left on a node: devices, addresses, routes,
/// neighbours, pins and the entries of pinned hash maps, leases and other
/// state files.
///
/// What changes by itself is left out: device indices, counters, ages, and
/// entries that a map may lose at any time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<String, String>);

impl Snapshot {
    /// Looks at a node.
    ///
    /// # Errors
    ///
    /// That `ip` or `bpftool` is missing or failed.
    pub fn take(node: &Node) -> Result<Self> {
        let mut seen = BTreeMap::new();
        for device in list(&node.json("ip -j -d link")?) {
            let name = text(device, "ifname");
            let kind = device["linkinfo"]["info_kind"].as_str().unwrap_or("");
            let alias = device["ifalias"].as_str().unwrap_or("");
            seen.insert(
                format!("device {name}"),
                format!("{kind} mtu {} {alias}", device["mtu"]),
            );
        }
        for device in list(&node.json("ip -j addr")?) {
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
            for route in list(&node.json(&format!("ip -j {family} route show table all"))?) {
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
        for neighbour in list(&node.json("ip -j neigh show nud permanent")?) {
            let key = format!(
                "neighbour {} on {}",
                text(neighbour, "dst"),
                text(neighbour, "dev")
            );
            seen.insert(key, text(neighbour, "lladdr").to_owned());
        }
        for (path, content) in files(node, &["/var/lib/cni", "/run/bpf-bridge"])? {
            seen.insert(format!("file {}", path.display()), content);
        }
        for (path, _) in files(node, &["/sys/fs/bpf"])? {
            seen.insert(format!("pin {}", path.display()), entries(node, &path)?);
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
            // A lock is no state, and the position of the round robin moves on.
            if name.contains("lock") {
                continue;
            }
            // Objects pinned in bpffs cannot be read.
            let content = if name.starts_with("last_reserved_ip.") {
                String::new()
            } else {
                String::from_utf8_lossy(&fs::read(&path).unwrap_or_default())
                    .escape_debug()
                    .to_string()
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

/// The keys in a pinned hash map; nothing for other maps, programs and links.
fn entries(node: &Node, pin: &Path) -> Result<String> {
    let pin = pin.display();
    // Fails for everything that is not a map.
    let Ok(map) = node.json(&format!("bpftool -j map show pinned {pin}")) else {
        return Ok(String::new());
    };
    if map["type"] != "hash" {
        return Ok(String::new());
    }
    let dump = node.json(&format!("bpftool -j map dump pinned {pin}"))?;
    let mut keys: Vec<String> = list(&dump).map(|entry| entry["key"].to_string()).collect();
    keys.sort();
    Ok(format!("{} keys: {}", keys.len(), keys.join(" ")))
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("")
}
