//! What is looked at when the storm pauses, and nothing is attached but who stays.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use bpf_bridge_tests::Node;
use serde_json::Value;

use super::leaks::{Metric, Rule, Sample};

/// Where the pins are.
const PINS: &str = "/sys/fs/bpf/bpf-bridge";
/// What a call may have resident at most, in MiB.
const MEMORY: u64 = 16;

/// What is measured, in the order of [`Watch::sample`].
pub(super) const METRICS: [Metric; 15] = [
    metric("eBPF programs", "", Rule::Same),
    metric("eBPF maps", "", Rule::Same),
    metric("eBPF links", "", Rule::Same),
    metric("pins", "", Rule::Same),
    metric("devices", "", Rule::Same),
    metric("cgroups", "", Rule::Same),
    metric("sandboxes", "", Rule::Same),
    metric("plugin processes left", "", Rule::Most(0)),
    metric("own descriptors", "", Rule::Grows(8)),
    metric("descriptors of a call", "", Rule::Most(192)),
    metric("memory of a call", " MiB", Rule::Most(MEMORY)),
    metric("network namespaces", "", Rule::Grows(64)),
    metric("per-CPU memory", " MiB", Rule::Grows(32)),
    metric("unreclaimable slab", " MiB", Rule::Grows(96)),
    metric("vmalloc", " MiB", Rule::Grows(96)),
];

const fn metric(name: &'static str, unit: &'static str, rule: Rule) -> Metric {
    Metric { name, unit, rule }
}

/// What must be remembered from pause to pause.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// The id of every map that was ever pinned on the node: programs that nobody can
    /// find any more have those of their time.
    maps: BTreeSet<u64>,
}

impl Watch {
    /// Measures. `seen` is the most that a call was seen to have.
    pub(super) fn sample(&mut self, node: &Node, at: Duration, seen: Seen) -> Result<Sample> {
        let pins = pins(node)?;
        for pin in &pins {
            // Fails for what is not a map.
            let map = node.json(&format!("bpftool -j map show pinned {}", pin.display()));
            self.maps
                .extend(map.ok().and_then(|map| map["id"].as_u64()));
        }
        let [programs, maps, links] = self.objects(node)?;
        let memory = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
        Ok(Sample {
            at,
            values: vec![
                programs,
                maps,
                links,
                count(pins.len()),
                count(node.device_names()?.len()),
                count(cgroups()?),
                count(node.run("ls /run/netns")?.lines().count()),
                count(plugin_processes(node.plugin()).len()),
                count(fs::read_dir("/proc/self/fd")?.count()),
                seen.descriptors,
                seen.memory.div_ceil(1024),
                namespaces().unwrap_or_default(),
                field(&memory, "Percpu") / 1024,
                field(&memory, "SUnreclaim") / 1024,
                field(&memory, "VmallocUsed") / 1024,
            ],
        })
    }

    /// How many programs use a map of the node, how many maps these or the node have, and
    /// how many links run these programs. Others on the machine have some as well.
    fn objects(&self, node: &Node) -> Result<[u64; 3]> {
        let ids = |list: &Value| -> BTreeSet<u64> {
            let list = list.as_array().into_iter().flatten();
            list.filter_map(Value::as_u64).collect()
        };
        let all = |what: &str| -> Result<Vec<Value>> {
            let listed = node.json(&format!("bpftool -j {what} show"))?;
            Ok(listed.as_array().cloned().unwrap_or_default())
        };
        let programs: Vec<Value> = all("prog")?
            .into_iter()
            .filter(|program| !ids(&program["map_ids"]).is_disjoint(&self.maps))
            .collect();
        let numbers: BTreeSet<u64> = programs
            .iter()
            .filter_map(|program| program["id"].as_u64())
            .collect();
        let used: BTreeSet<u64> = programs
            .iter()
            .flat_map(|program| ids(&program["map_ids"]))
            .chain(self.maps.iter().copied())
            .collect();
        let has = |object: &Value, key: &str, set: &BTreeSet<u64>| {
            object[key].as_u64().is_some_and(|id| set.contains(&id))
        };
        let maps = all("map")?;
        let links = all("link")?;
        Ok([
            count(programs.len()),
            count(maps.iter().filter(|map| has(map, "id", &used)).count()),
            count(
                links
                    .iter()
                    .filter(|link| has(link, "prog_id", &numbers))
                    .count(),
            ),
        ])
    }
}

fn count(number: usize) -> u64 {
    number as u64
}

/// Every file below the directory of the pins.
fn pins(node: &Node) -> Result<Vec<PathBuf>> {
    let found = node.run(&format!("find {PINS} -type f"))?;
    Ok(found.lines().map(PathBuf::from).collect())
}

/// How many cgroups are below this process's own parent, which nodes see as the root.
fn cgroups() -> Result<usize> {
    let own = fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::"));
    let path = path.context("no cgroup of version 2")?;
    let mut number = 0;
    let mut todo: Vec<PathBuf> = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .iter()
        .filter_map(|root| {
            Path::new(&format!("{root}{path}"))
                .parent()
                .map(Path::to_owned)
        })
        .filter(|path| path.join("cgroup.procs").exists())
        .take(1)
        .collect();
    while let Some(directory) = todo.pop() {
        number += 1;
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                todo.push(entry.path());
            }
        }
    }
    Ok(number)
}

/// The plugin's processes among this process's children.
pub(super) fn plugin_processes(plugin: &str) -> Vec<u32> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten();
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|children| {
            children
                .split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<u32>>()
        })
        .filter(|pid| {
            fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim_end() == plugin)
        })
        .collect()
}

/// What a process has, or the most of some.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) descriptors: u64,
    /// The most that was resident, in KiB.
    pub(super) memory: u64,
}

/// Looks at a process, if it is still there.
pub(super) fn look_at(pid: u32) -> Option<Seen> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(Seen {
        descriptors: count(descriptors),
        memory: field(&status, "VmHWM"),
    })
}

/// How many network namespaces the machine has.
fn namespaces() -> Option<u64> {
    let slabs = fs::read_to_string("/proc/slabinfo").ok()?;
    slabs
        .lines()
        .find_map(|line| line.strip_prefix("net_namespace "))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// A line of `/proc/meminfo`, in KiB.
fn field(memory: &str, name: &str) -> u64 {
    memory
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .find_map(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_found_by_its_whole_name() {
        let memory = "Slab:  5 kB\nSUnreclaim:   12 kB\nPercpu: 7 kB\n";
        assert_eq!(field(memory, "SUnreclaim"), 12);
        assert_eq!(field(memory, "Percpu"), 7);
        assert_eq!(field(memory, "Vmalloc"), 0);
    }
}
