//! Whether the node has what the model has.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_bridge_common::layout::PORT_GATEWAY;
use serde_json::Value;

use super::{KINDS, Slot, State, Storm, Stormy, lock};
use crate::{Tables, at_once};

const LEASES: &str = "/var/lib/cni/networks";
const RECORDS: &str = "/run/bpf-bridge/attachments";
/// How many pings run at once.
const PINGS: usize = 8;

/// What the node has, where nobody changes anything meanwhile.
struct Found {
    tables: Tables,
    /// The ifindex of each device that has an alias.
    aliases: BTreeMap<String, u32>,
    /// The owner of each lease, by network.
    leases: BTreeMap<&'static str, BTreeMap<IpAddr, String>>,
    /// The ifindex in each record, by network and name.
    records: BTreeMap<&'static str, BTreeMap<String, u32>>,
    chains: String,
}

impl Storm<'_> {
    /// Compares at a pause: first with all orphans, whose records and leases must be there
    /// still; and then, after a GC, without them.
    ///
    /// # Errors
    ///
    /// What the node has too much or too little of.
    pub fn pause(&self) -> Result<()> {
        let pause = || {
            // After a killed call, GC alone finds what nobody has a record of.
            if !self.tally().done.contains_key("killed") {
                self.compare().context("before GC")?;
            }
            self.collect_orphans()?;
            self.compare().context("after GC")?;
            self.reach()
        };
        pause().with_context(|| {
            let rounds = *lock(&self.rounds);
            format!("at the pause after round {rounds} of seed {}", self.seed)
        })
    }

    /// Compares the devices, the leases, the records, the maps and netfilter's chains.
    fn compare(&self) -> Result<()> {
        let found = self.find()?;
        let mut living = BTreeSet::new();
        let mut dead = BTreeSet::new();
        for stormy in &self.networks {
            self.compare_network(stormy, &found, &mut living, &mut dead)
                .with_context(|| format!("network {}", stormy.kind.name))?;
        }
        for (ifindex, port) in &found.tables.ports {
            ensure!(
                port.flags & PORT_GATEWAY != 0
                    || living.contains(ifindex)
                    || dead.contains(ifindex),
                "port {ifindex} is nobody's: {port:?}"
            );
        }
        let lost: BTreeSet<_> = dead.difference(&living).copied().collect();
        found.tables.ensure_consistent_but(&lost)
    }

    fn find(&self) -> Result<Found> {
        let devices = self.node.json("ip -j link")?;
        let aliases = devices
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|device| {
                let alias = device["ifalias"].as_str()?.to_owned();
                Some((alias, u32::try_from(device["ifindex"].as_u64()?).ok()?))
            })
            .collect();
        let (mut leases, mut records) = (BTreeMap::new(), BTreeMap::new());
        self.node.within(|| {
            for kind in KINDS {
                leases.insert(kind.name, read_leases(kind.name)?);
                records.insert(kind.name, read_records(kind.name)?);
            }
            Ok(())
        })?;
        Ok(Found {
            tables: Tables::read(self.node)?,
            aliases,
            leases,
            records,
            chains: self.node.run("nft list ruleset")?,
        })
    }

    /// Compares one network, and says which ports its attachments have and had.
    fn compare_network(
        &self,
        stormy: &Stormy<'_>,
        found: &Found,
        living: &mut BTreeSet<u32>,
        dead: &mut BTreeSet<u32>,
    ) -> Result<()> {
        let name = stormy.kind.name;
        let records = &found.records[name];
        let (mut leases, mut recorded, mut veths) =
            (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        for (network, stayer) in &self.stayers {
            if network == name {
                let key = format!("{}:{}", stayer.container_id, stayer.ifname);
                let ifindex = records
                    .get(&key)
                    .with_context(|| format!("no record {key}"))?;
                living.insert(*ifindex);
                for address in found.tables.addresses(*ifindex) {
                    leases.insert(address, key.clone());
                }
                recorded.insert(key);
                veths.insert(alias(name, &stayer.container_id, &stayer.ifname));
            }
        }
        let mut attached = !veths.is_empty();
        for slot in &stormy.slots {
            let slot = lock(slot);
            if slot.state == State::Absent {
                continue;
            }
            let attachment = &slot.attachment;
            let key = format!("{}:{}", attachment.container_id, attachment.ifname);
            for address in slot.addresses() {
                let other = leases.insert(address, key.clone());
                ensure!(other.is_none(), "{key} and {other:?} both have {address}");
            }
            let alias = alias(name, &attachment.container_id, &attachment.ifname);
            let ifindex = records.get(&key).copied();
            if slot.state == State::Orphaned {
                dead.extend(ifindex);
            } else {
                attached = true;
                let ifindex = ifindex.with_context(|| format!("no record of {key}"))?;
                ensure!(
                    found.aliases.get(&alias) == Some(&ifindex),
                    "the host veth of {key} is {:?}, not {ifindex}",
                    found.aliases.get(&alias)
                );
                living.insert(ifindex);
                veths.insert(alias);
                compare_port(stormy, &slot, &found.tables, ifindex)
                    .with_context(|| format!("port {ifindex} of {key}"))?;
            }
            recorded.insert(key);
        }
        same("leases", &found.leases[name], &leases)?;
        same("records", &records.keys().cloned().collect(), &recorded)?;
        let prefix = format!("bpf-bridge {name} ");
        let aliases = found.aliases.keys();
        let there = aliases
            .filter(|alias| alias.starts_with(&prefix))
            .cloned()
            .collect();
        same("host veths", &there, &veths)?;
        let chain = found.chains.contains(&format!("chain masquerade-{name}-"));
        ensure!(
            chain == (attached && stormy.kind.masquerade == Some("nftables")),
            "a chain of netfilter: {chain}, attachments: {attached}"
        );
        Ok(())
    }

    /// That whoever is attached is reached, by the node or by another one.
    fn reach(&self) -> Result<()> {
        let mut pings = Vec::new();
        for stormy in &self.networks {
            let slots: Vec<_> = stormy.slots.iter().map(lock).collect();
            let attached: Vec<_> = slots
                .iter()
                .filter(|slot| slot.state == State::Attached)
                .collect();
            for (number, slot) in attached.iter().enumerate() {
                let next = attached[(number + 1) % attached.len()];
                // From one pod to the next, and from the node to one of both families.
                if let Some(sandbox) = &slot.sandbox {
                    pings.push((Some(namespace(sandbox)?), next.addresses(), number));
                }
                if stormy.kind.gateway {
                    pings.push((None, slot.addresses(), number));
                }
            }
        }
        let done = at_once(PINGS, |thread| {
            for (namespace, addresses, number) in pings.iter().skip(thread).step_by(PINGS) {
                let address = addresses.iter().nth(number % addresses.len().max(1));
                let Some(address) = address else { continue };
                let enter = match namespace {
                    Some(path) => format!("nsenter --net={path} "),
                    None => String::new(),
                };
                self.node
                    .run(&format!("{enter}ping -n -c 1 -W 5 {address}"))?;
            }
            Ok(())
        });
        done.into_iter().collect()
    }
}

fn namespace(sandbox: &crate::Sandbox) -> Result<String> {
    let path = sandbox.path().to_str().context("an odd path")?;
    Ok(path.to_owned())
}

/// What the maps have of a port that lives.
fn compare_port(stormy: &Stormy<'_>, slot: &Slot, tables: &Tables, ifindex: u32) -> Result<()> {
    ensure!(tables.ports.contains_key(&ifindex), "no such port");
    same("addresses", &tables.addresses(ifindex), &slot.addresses())?;
    let published = if stormy.kind.publishes {
        slot.published()
    } else {
        BTreeSet::new()
    };
    same("published", &tables.published(ifindex), &published)?;
    let masqueraded = match stormy.kind.masquerade {
        Some("ebpf") => slot.addresses(),
        _ => BTreeSet::new(),
    };
    same("masqueraded", &tables.masqueraded(ifindex), &masqueraded)
}

fn alias(network: &str, container_id: &str, ifname: &str) -> String {
    format!("bpf-bridge {network} {container_id} {ifname}")
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, expected: &T) -> Result<()> {
    if found != expected {
        bail!("{what}: there are {found:?}\nbut should be {expected:?}");
    }
    Ok(())
}

fn read_leases(network: &str) -> Result<BTreeMap<IpAddr, String>> {
    let mut leases = BTreeMap::new();
    for path in list(&Path::new(LEASES).join(network))? {
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(address) = name.and_then(|name| name.parse().ok()) else {
            continue;
        };
        let text = fs::read_to_string(&path)?;
        leases.insert(address, text.replace("\r\n", ":"));
    }
    Ok(leases)
}

fn read_records(network: &str) -> Result<BTreeMap<String, u32>> {
    let mut records = BTreeMap::new();
    for path in list(&Path::new(RECORDS).join(network))? {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.context("an odd name")?.to_owned();
        let text = fs::read_to_string(&path)?;
        let record: Value =
            serde_json::from_str(&text).with_context(|| format!("the record {name}: {text:?}"))?;
        ensure!(record["complete"] == true, "{name} is not complete: {text}");
        let ifindex = record["hostIfindex"].as_u64().context("no ifindex")?;
        records.insert(name, u32::try_from(ifindex)?);
    }
    Ok(records)
}

/// What is in a directory; nothing if there is none.
fn list(directory: &Path) -> Result<Vec<std::path::PathBuf>> {
    match fs::read_dir(directory) {
        Ok(entries) => Ok(entries
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("listing {}", directory.display())),
    }
}
