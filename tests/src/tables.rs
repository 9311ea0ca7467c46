//! The datapath's maps, and whether they agree with each other and with the devices.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
    thread,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bpf_bridge_common::layout::{
    Address, Endpoint, IpKey, MacKey, Masqueraded, Member, MemberKey, Neighbor, PodKey, Port,
    Published, PublishedKey, Segment,
};
use bytemuck::AnyBitPattern;
use serde_json::Value;

use crate::Node;

const MAPS: &str = "/sys/fs/bpf/bpf-bridge/v1/maps";

/// Who is given which number, as it is on a node at one moment: what `bpftool` shows of
/// the maps that the plugin writes.
#[derive(Debug, Clone, Default)]
pub struct Tables {
    /// The ifindex of every device of the node.
    pub devices: BTreeSet<u32>,
    /// By ifindex.
    pub ports: BTreeMap<u32, Port>,
    /// By segment and slot.
    pub members: BTreeMap<(u32, u32), Member>,
    /// By number.
    pub segments: BTreeMap<u32, Segment>,
    /// In the order of the map.
    pub endpoints: Vec<(MacKey, Endpoint)>,
    /// In the order of the map.
    pub neighbors: Vec<(IpKey, Neighbor)>,
    /// The keys of the counters.
    pub counters: BTreeSet<u32>,
    /// In the order of the map; none if nothing translates.
    pub published: Vec<(PublishedKey, Published)>,
    /// In the order of the map; none if nothing translates.
    pub masqueraded: Vec<(PodKey, Masqueraded)>,
}

impl Tables {
    /// Looks at a node, where nobody changes anything meanwhile.
    ///
    /// # Errors
    ///
    /// That the maps are not pinned, or are not what this project makes.
    pub fn read(node: &Node) -> Result<Self> {
        let devices = node
            .json("ip -j link")?
            .as_array()
            .context("no list")?
            .iter()
            .filter_map(|device| u32::try_from(device["ifindex"].as_u64()?).ok())
            .collect();
        Ok(Self {
            devices,
            ports: table::<u32, Port>(node, "PORTS")?.into_iter().collect(),
            members: table::<MemberKey, Member>(node, "MEMBERS")?
                .into_iter()
                .map(|(key, member)| ((key.segment, key.slot), member))
                .collect(),
            segments: table::<u32, Segment>(node, "SEGMENTS")?
                .into_iter()
                .collect(),
            endpoints: table(node, "ENDPOINTS")?,
            neighbors: table(node, "NEIGHBORS")?,
            counters: dump(node, "STATS")?
                .iter()
                .map(|(key, _)| plain(key))
                .collect::<Result<_>>()?,
            published: optional(node, "PUBLISHED")?,
            masqueraded: optional(node, "MASQUERADED")?,
        })
    }

    /// That the tables agree with each other and with the devices that there are: every
    /// port is in its segment's list once, nothing belongs to nobody.
    ///
    /// # Errors
    ///
    /// What does not.
    pub fn ensure_consistent(&self) -> Result<()> {
        self.ensure_consistent_but(&BTreeSet::new())
    }

    /// As [`Self::ensure_consistent`], but for ports whose devices went without a DEL.
    ///
    /// # Errors
    ///
    /// What does not.
    pub fn ensure_consistent_but(&self, dead: &BTreeSet<u32>) -> Result<()> {
        for (ifindex, port) in &self.ports {
            ensure!(
                self.devices.contains(ifindex) || dead.contains(ifindex),
                "port {ifindex} has no device: {port:?}"
            );
            ensure!(
                self.devices.contains(&port.segment),
                "the segment of port {ifindex} has no device: {port:?}"
            );
        }
        self.ensure_lists()?;
        let owner = |port: u32, segment: u32| {
            self.ports
                .get(&port)
                .filter(|owner| owner.segment == segment)
        };
        ensure!(
            self.endpoints.len() == self.ports.len(),
            "{} MAC addresses of {} ports",
            self.endpoints.len(),
            self.ports.len()
        );
        for (key, endpoint) in &self.endpoints {
            ensure!(
                owner(endpoint.port, key.segment).is_some_and(|owner| owner.mac == key.mac),
                "{endpoint:?} of {key:?} is no port's"
            );
        }
        for (key, neighbor) in &self.neighbors {
            ensure!(
                owner(neighbor.port, key.segment).is_some_and(|owner| owner.mac == neighbor.mac),
                "{neighbor:?} of {key:?} is no port's"
            );
        }
        let expected: BTreeSet<u32> = self.ports.keys().copied().chain([0]).collect();
        ensure!(
            self.counters == expected,
            "counters {:?} of the ports {expected:?}",
            self.counters
        );
        for (key, masqueraded) in &self.masqueraded {
            ensure!(
                owner(masqueraded.port, key.segment).is_some(),
                "{masqueraded:?} of {key:?} is no port's"
            );
        }
        self.ensure_counted()
    }

    /// Each segment's list has its ports, each once, and no holes.
    fn ensure_lists(&self) -> Result<()> {
        let listed: BTreeMap<(u32, u32), u32> = self
            .members
            .iter()
            .map(|(place, member)| (*place, member.port))
            .collect();
        let expected: BTreeMap<_, _> = self
            .ports
            .iter()
            .map(|(ifindex, port)| ((port.segment, port.slot), *ifindex))
            .collect();
        ensure!(
            listed == expected && listed.len() == self.ports.len(),
            "members {listed:?}, ports {:?}",
            self.ports
        );
        let mut lengths = BTreeMap::new();
        for (segment, slot) in listed.keys() {
            let length = lengths.entry(*segment).or_insert(0_u32);
            ensure!(slot == length, "segment {segment} has no slot {length}");
            *length += 1;
        }
        let noted: BTreeMap<u32, u32> = self
            .segments
            .iter()
            .map(|(number, segment)| (*number, segment.members))
            .collect();
        ensure!(lengths == noted, "lengths {noted:?}, but {lengths:?}");
        for (number, segment) in &self.segments {
            ensure!(
                listed.get(&(*number, 0)) == Some(&segment.gateway_port),
                "the gateway port of segment {number} is not the first of its list"
            );
        }
        Ok(())
    }

    /// Each published port is one of a pod's, or counts those that are.
    fn ensure_counted(&self) -> Result<()> {
        let mut counts = BTreeMap::new();
        let mut noted = BTreeMap::new();
        for (key, published) in &self.published {
            let address = ip(key.address);
            let number = (address.is_ipv4(), key.port, key.protocol);
            if published.specific != 0 {
                noted.insert(number, published.specific);
                continue;
            }
            ensure!(
                self.ports
                    .get(&published.port)
                    .is_some_and(|port| port.segment == published.segment),
                "{published:?} of {key:?} is no port's"
            );
            if !address.is_unspecified() {
                *counts.entry(number).or_insert(0) += 1;
            }
        }
        ensure!(
            counts == noted,
            "published on single addresses: {counts:?}, noted: {noted:?}"
        );
        Ok(())
    }

    /// The addresses of a port, sorted.
    #[must_use]
    pub fn addresses(&self, ifindex: u32) -> BTreeSet<IpAddr> {
        self.neighbors
            .iter()
            .filter(|(_, neighbor)| neighbor.port == ifindex)
            .map(|(key, _)| Ipv6Addr::from(key.address).to_canonical())
            .collect()
    }

    /// The addresses by which a port is masqueraded, sorted.
    #[must_use]
    pub fn masqueraded(&self, ifindex: u32) -> BTreeSet<IpAddr> {
        self.masqueraded
            .iter()
            .filter(|(_, masqueraded)| masqueraded.port == ifindex)
            .map(|(key, _)| ip(key.address))
            .collect()
    }

    /// What a port has published: the address and port of the node, and the protocol.
    #[must_use]
    pub fn published(&self, ifindex: u32) -> BTreeSet<(IpAddr, u16, u8)> {
        self.published
            .iter()
            .filter(|(_, published)| published.port == ifindex && published.specific == 0)
            .map(|(key, _)| (ip(key.address), key.port, key.protocol))
            .collect()
    }
}

fn ip(address: Address) -> IpAddr {
    Ipv6Addr::from(address.octets()).to_canonical()
}

/// The entries of a pinned map.
fn table<K: AnyBitPattern, V: AnyBitPattern>(node: &Node, map: &str) -> Result<Vec<(K, V)>> {
    dump(node, map)?
        .iter()
        .map(|(key, value)| Ok((plain(key)?, plain(value)?)))
        .collect::<Result<_>>()
        .with_context(|| format!("reading {map}"))
}

/// The entries of a map that may not be there.
fn optional<K: AnyBitPattern, V: AnyBitPattern>(node: &Node, map: &str) -> Result<Vec<(K, V)>> {
    let pinned = node.within(|| Ok(std::path::Path::new(MAPS).join(map).exists()))?;
    if pinned {
        table(node, map)
    } else {
        Ok(Vec::new())
    }
}

fn plain<T: AnyBitPattern>(bytes: &[u8]) -> Result<T> {
    bytemuck::try_pod_read_unaligned(bytes)
        .map_err(|error| anyhow!("{} bytes: {error}", bytes.len()))
}

/// The entries of a pinned map, as bytes; those of a map with a value a CPU without it.
fn dump(node: &Node, map: &str) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let bytes = |value: &Value| -> Option<Vec<u8>> {
        value
            .as_array()?
            .iter()
            .map(|byte| u8::from_str_radix(byte.as_str()?.trim_start_matches("0x"), 16).ok())
            .collect()
    };
    node.json(&format!("bpftool -j map dump pinned {MAPS}/{map}"))?
        .as_array()
        .context("no list")?
        .iter()
        .map(|entry| {
            let value = bytes(&entry["value"]).unwrap_or_default();
            Ok((bytes(&entry["key"]).context("no key")?, value))
        })
        .collect()
}

/// Does `work` in `count` threads that begin together, and returns what each returned.
/// A panic goes on in the caller.
pub fn at_once<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let start = std::sync::Barrier::new(count);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|number| {
                let (start, work) = (&start, &work);
                scope.spawn(move || {
                    start.wait();
                    work(number)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    })
}
