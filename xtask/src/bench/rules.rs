//! The iptables rules of the stock chain: those that it has written for one pod are written
//! again for others, for a thousand calls of it would take longer than the bench may.
//!
//! Nothing is known of them here but what all rules of a pod have: its container id, its
//! addresses, its ports and its chains are somewhere in them.

use std::{
    collections::HashSet,
    fmt::Write as _,
    fs,
    net::IpAddr,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::Node;

use super::node::{Added, Arena, Slot};

/// Their programs by family.
const PROGRAMS: [&str; 2] = ["iptables", "ip6tables"];
/// So many characters of a chain's name are replaced by a number: the rest of it is a hash.
const NUMBER: usize = 8;

/// Whose rules they are.
#[derive(Clone, Debug)]
pub(super) struct Pod {
    id: String,
    /// IPv4 and IPv6.
    addresses: [IpAddr; 2],
    /// The first of its ports.
    port: usize,
}

impl Pod {
    pub(super) fn new(id: &str, added: &Added, port: usize) -> Result<Self> {
        Ok(Self {
            id: id.to_owned(),
            addresses: [added.v4("address")?, added.v6("address")?],
            port,
        })
    }

    /// One that does not exist.
    pub(super) fn imagined(id: String, addresses: [IpAddr; 2], port: usize) -> Self {
        Self {
            id,
            addresses,
            port,
        }
    }
}

/// What the chain has written for a pod.
pub(super) struct Rules {
    of: Pod,
    /// How many ports it has, one after another.
    ports: usize,
    /// By family.
    families: [Vec<Table>; 2],
    /// Copies are numbered.
    written: AtomicU32,
}

/// What was added to a table.
#[derive(Debug, PartialEq, Eq)]
struct Table {
    name: String,
    chains: Vec<String>,
    rules: Vec<String>,
}

impl Rules {
    /// Attaches and detaches `slot`, which has `ports` ports from `port` on, and sees what
    /// is written for it. A pod with a port must have been on the node before: the first
    /// one makes what all others use, and leaves it.
    pub(super) fn learn(arena: &Arena, slot: &Slot, port: usize, ports: usize) -> Result<Self> {
        let node = &arena.node;
        let save = || -> Result<[String; 2]> {
            Ok([
                node.run(&format!("{}-save", PROGRAMS[0]))?,
                node.run(&format!("{}-save", PROGRAMS[1]))?,
            ])
        };
        let before = save()?;
        let added = node.within(|| arena.attach_here(slot))?;
        let after = save()?;
        node.within(|| arena.detach_here(slot, &added))?;
        let families = [
            added_to(&before[0], &after[0]),
            added_to(&before[1], &after[1]),
        ];
        ensure!(
            families
                .iter()
                .flatten()
                .any(|table| !table.rules.is_empty()),
            "the stock chain has written no iptables rules for {}",
            slot.attachment.container_id
        );
        Ok(Self {
            of: Pod::new(&slot.attachment.container_id, &added, port)?,
            ports,
            families,
            written: AtomicU32::new(0),
        })
    }

    /// How many rules a pod has, in both families.
    pub(super) fn count(&self) -> usize {
        let tables = self.families.iter().flatten();
        tables.map(|table| table.rules.len()).sum()
    }

    /// Writes the rules of pods that have as many ports, one restore a family.
    pub(super) fn write(&self, node: &Node, pods: &[Pod]) -> Result<()> {
        let Some(first) = pods.first() else {
            return Ok(());
        };
        let count = u32::try_from(pods.len())?;
        let start = self.written.fetch_add(count, Ordering::Relaxed);
        for (tables, program) in self.families.iter().zip(PROGRAMS) {
            let mut text = String::new();
            for table in tables {
                // Writing to a string cannot fail.
                let _ = writeln!(text, "*{}", table.name);
                for number in start..start + count {
                    for chain in &table.chains {
                        let _ = writeln!(text, ":{} - [0:0]", numbered(chain, number));
                    }
                }
                for (number, pod) in (start..).zip(pods) {
                    for rule in &table.rules {
                        let _ = writeln!(text, "{}", self.copy(&table.chains, rule, number, pod));
                    }
                }
                let _ = writeln!(text, "COMMIT");
            }
            node.within(|| fs::write("/run/rules", &text).context("writing /run/rules"))?;
            node.run(&format!("{program}-restore --noflush /run/rules"))
                .with_context(|| format!("writing the rules of {} pods", pods.len()))?;
            let saved = node.run(&format!("{program}-save"))?;
            let saved: HashSet<&str> = saved.lines().collect();
            for table in tables {
                for rule in &table.rules {
                    let copy = self.copy(&table.chains, rule, start, first);
                    ensure!(
                        saved.contains(copy.as_str()),
                        "{program} has made something else of the rule {copy:?}"
                    );
                }
            }
        }
        Ok(())
    }

    /// A rule, as another pod would have it.
    fn copy(&self, chains: &[String], rule: &str, number: u32, pod: &Pod) -> String {
        let mut copy = with_ports(rule, self.of.port..self.of.port + self.ports, pod.port);
        for chain in chains {
            copy = copy.replace(chain.as_str(), &numbered(chain, number));
        }
        // As iptables quotes them.
        copy = copy.replace(
            &format!("\\\"{}\\\"", self.of.id),
            &format!("\\\"{}\\\"", pod.id),
        );
        for (of, other) in self.of.addresses.iter().zip(&pod.addresses) {
            for (before, behind) in [(" ", "/"), (" ", ":"), ("[", "]")] {
                copy = copy.replace(
                    &format!("{before}{of}{behind}"),
                    &format!("{before}{other}{behind}"),
                );
            }
        }
        copy
    }
}

fn numbered(chain: &str, number: u32) -> String {
    let kept = chain.len().saturating_sub(NUMBER);
    format!("{}{number:0NUMBER$x}", &chain[..kept])
}

/// What is in the second of two outputs of `iptables-save` and not in the first.
fn added_to(before: &str, after: &str) -> Vec<Table> {
    let chain = |line: &str| -> Option<String> {
        Some(line.strip_prefix(':')?.split(' ').next()?.to_owned())
    };
    // A rule of a pod is in no two tables.
    let rules: HashSet<&str> = before.lines().collect();
    let chains: HashSet<String> = before.lines().filter_map(chain).collect();
    let mut tables: Vec<Table> = Vec::new();
    for line in after.lines() {
        if let Some(name) = line.strip_prefix('*') {
            tables.push(Table {
                name: name.to_owned(),
                chains: Vec::new(),
                rules: Vec::new(),
            });
        }
        let Some(table) = tables.last_mut() else {
            continue;
        };
        if let Some(name) = chain(line) {
            if !chains.contains(&name) {
                table.chains.push(name);
            }
        } else if line.starts_with("-A ") && !rules.contains(line) {
            table.rules.push(line.to_owned());
        }
    }
    tables.retain(|table| !table.rules.is_empty());
    tables
}

/// A rule in which the ports of `range` are those from `other` on: numbers that follow a
/// space, a comma or a colon and are followed by none but the first two.
fn with_ports(rule: &str, range: std::ops::Range<usize>, other: usize) -> String {
    let mut copy = String::with_capacity(rule.len());
    let mut last = ' ';
    let mut rest = rule;
    while let Some(character) = rest.chars().next() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let begins = [' ', ',', ':'].contains(&last);
        let ends = rest[digits..]
            .chars()
            .next()
            .is_none_or(|c| [' ', ','].contains(&c));
        let port = rest[..digits].parse::<usize>().ok();
        if let Some(port) = port.filter(|port| begins && ends && range.contains(port)) {
            copy += &(other + port - range.start).to_string();
            rest = &rest[digits..];
            last = '0';
        } else {
            copy.push(character);
            rest = &rest[character.len_utf8()..];
            last = character;
        }
    }
    copy
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "\
# Generated by iptables-save
*filter
:FORWARD ACCEPT [0:0]
:CNI-FORWARD - [0:0]
-A CNI-FORWARD -s 10.77.0.2/32 -j ACCEPT
COMMIT
*nat
:POSTROUTING ACCEPT [3:180]
:CNI-HOSTPORT-DNAT - [0:0]
COMMIT
*mangle
:PREROUTING ACCEPT [0:0]
COMMIT
";
    const AFTER: &str = "\
# Generated by iptables-save
*filter
:FORWARD ACCEPT [7:99]
:CNI-FORWARD - [0:0]
-A CNI-FORWARD -s 10.77.0.2/32 -j ACCEPT
-A CNI-FORWARD -s 10.77.0.3/32 -j ACCEPT
COMMIT
*nat
:POSTROUTING ACCEPT [4:240]
:CNI-11abd909fca2fb0c9ad7bc19 - [0:0]
:CNI-DN-11abd909fca2fb0c9ad7b - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
-A POSTROUTING -s 10.77.0.3/32 -m comment --comment \"name: \\\"bench\\\" id: \\\"two\\\"\" -j CNI-11abd909fca2fb0c9ad7bc19
-A CNI-DN-11abd909fca2fb0c9ad7b -p tcp -m tcp --dport 22001 -j DNAT --to-destination 10.77.0.3:22001
-A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 22000,22001 -j CNI-DN-11abd909fca2fb0c9ad7b
COMMIT
*mangle
:PREROUTING ACCEPT [9:9]
COMMIT
";

    fn pod(id: &str, v4: &str, v6: &str, port: usize) -> Pod {
        let addresses = [v4.parse().unwrap(), v6.parse().unwrap()];
        Pod::imagined(id.to_owned(), addresses, port)
    }

    #[test]
    fn what_was_added_is_found_by_table() {
        let tables = added_to(BEFORE, AFTER);
        let names: Vec<_> = tables.iter().map(|table| table.name.as_str()).collect();
        assert_eq!(names, ["filter", "nat"]);
        assert_eq!(tables[0].chains, [""; 0]);
        assert_eq!(
            tables[0].rules,
            ["-A CNI-FORWARD -s 10.77.0.3/32 -j ACCEPT"]
        );
        assert_eq!(
            tables[1].chains,
            [
                "CNI-11abd909fca2fb0c9ad7bc19",
                "CNI-DN-11abd909fca2fb0c9ad7b"
            ]
        );
        assert_eq!(tables[1].rules.len(), 3);
        assert_eq!(added_to(AFTER, AFTER), []);
    }

    #[test]
    fn a_copy_is_another_pods() {
        let rules = Rules {
            of: pod("two", "10.77.0.3", "fd77::3", 22_000),
            ports: 2,
            families: [added_to(BEFORE, AFTER), Vec::new()],
            written: AtomicU32::new(0),
        };
        assert_eq!(rules.count(), 4);
        let other = pod("other7", "10.77.128.8", "fd77::1:7", 10_014);
        let copies: Vec<_> = rules.families[0]
            .iter()
            .flat_map(|table| table.rules.iter().map(move |rule| (table, rule)))
            .map(|(table, rule)| rules.copy(&table.chains, rule, 0x17, &other))
            .collect();
        assert_eq!(
            copies,
            [
                "-A CNI-FORWARD -s 10.77.128.8/32 -j ACCEPT",
                "-A POSTROUTING -s 10.77.128.8/32 -m comment --comment \
                 \"name: \\\"bench\\\" id: \\\"other7\\\"\" -j CNI-11abd909fca2fb0c00000017",
                "-A CNI-DN-11abd909fca2f00000017 -p tcp -m tcp --dport 10015 -j DNAT \
                 --to-destination 10.77.128.8:10015",
                "-A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 10014,10015 \
                 -j CNI-DN-11abd909fca2f00000017",
            ]
        );
        let six = "-A CNI-DN-x -s fd77::/64 -p tcp --dport 22000 -j DNAT --to-destination [fd77::3]:22000";
        assert_eq!(
            rules.copy(&[], six, 0, &other),
            "-A CNI-DN-x -s fd77::/64 -p tcp --dport 10014 -j DNAT --to-destination [fd77::1:7]:10014"
        );
        assert_eq!(
            rules.copy(&[], "-A X -s fd77::3/128 -d 10.77.0.30/32 -j Y", 0, &other),
            "-A X -s fd77::1:7/128 -d 10.77.0.30/32 -j Y"
        );
    }

    #[test]
    fn only_ports_are_taken_for_ports() {
        let same = "--mark 0x22000 -s 22000.1/22000 -d fd77:22000::1 --dport 22005";
        assert_eq!(with_ports(same, 22_000..22_005, 1), same);
        assert_eq!(
            with_ports("--dports 5,6,7 :6 [6:6]", 6..7, 80),
            "--dports 5,80,7 :80 [6:6]"
        );
    }
}
