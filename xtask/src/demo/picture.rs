//! What the plugin set up, read back from the kernel.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context as _, Result, anyhow};
use bpf_bridge_common::drops::DropReason;
use bpf_bridge_tests::{Namespace, Node, Outside, Pod};
use serde_json::Value;

use super::{list, text};

/// The directory that the plugin pins its maps in, for this ABI.
const MAPS: &str = "/sys/fs/bpf/bpf-bridge/v1/maps";
/// The programs that are shown: of every port, built without log lines, and those
/// that came with the first published port.
const PROGRAMS: [&str; 7] = [
    "/sys/fs/bpf/bpf-bridge/v1/off/port",
    "/sys/fs/bpf/bpf-bridge/v1/off/guard",
    "/sys/fs/bpf/bpf-bridge/v1/off/responder",
    "/sys/fs/bpf/bpf-bridge/v1/off/flood",
    "/sys/fs/bpf/bpf-bridge/v1/nat/uplink",
    "/sys/fs/bpf/bpf-bridge/v1/nat/from_pod",
    "/sys/fs/bpf/bpf-bridge/v1/nat/from_host",
];
/// Where the links to devices are, by ifindex.
const UPLINK: &str = "/sys/fs/bpf/bpf-bridge/v1/links/uplink-";

/// Prints the devices and their addresses, the programs, and the map entries.
pub(super) fn draw(node: &Node, outside: &Outside, pods: &[Pod], gateway: &str) -> Result<()> {
    println!("\nDevices:\n");
    println!("  outside  {}", device(outside, "eth0")?);
    println!("     │");
    println!("  node     {}", uplink(node, Outside::UPLINK)?);
    println!("     │     the node's stack: routes, firewall, services");
    println!("  node     {}", device(node, gateway)?);
    println!("     │");
    let far_end = node.device(gateway)?;
    println!("     ├── {}", port(node, text(&far_end, "link")?)?);
    for (at, pod) in pods.iter().enumerate() {
        println!("     │");
        let corner = if at + 1 == pods.len() { '╰' } else { '├' };
        println!(
            "     {corner}── {} ── {}  {}",
            port(node, pod.host_veth()?)?,
            pod.name(),
            device(pod, "eth0")?
        );
    }

    println!(
        "\nPrograms, loaded once and shared by all ports; the last three with the first published \
         port:\n"
    );
    for path in PROGRAMS {
        let program = node.json(&format!("bpftool -j prog show pinned {path}"))?;
        println!(
            "  {:10} id {:<5} {:>5} bytes of machine code",
            text(&program, "name")?,
            program["id"].to_string(),
            program["bytes_jited"].to_string(),
        );
    }

    println!("\nMap entries:\n");
    let names = device_names(node)?;
    for (key, value) in entries(node, "SEGMENTS")? {
        println!(
            "  SEGMENTS   {} has {} ports, the gateway's is {}",
            name_of(&names, &key),
            value["members"],
            name_of(&names, &value["gateway_port"]),
        );
    }
    for (key, value) in entries(node, "ENDPOINTS")? {
        println!(
            "  ENDPOINTS  {} is at {}",
            mac(&key["mac"]),
            name_of(&names, &value["port"])
        );
    }
    for (key, value) in entries(node, "NEIGHBORS")? {
        println!(
            "  NEIGHBORS  {} has {} at {}",
            mac(&value["mac"]),
            address(&key["address"])?,
            name_of(&names, &value["port"]),
        );
    }
    for (key, value) in entries(node, "PUBLISHED")? {
        let socket = |at: &Value, port: &str| -> Result<SocketAddr> {
            let number = at[port].as_u64().and_then(|port| port.try_into().ok());
            let number: u16 = number.with_context(|| format!("no {port} in {at}"))?;
            Ok((address(&at["address"])?, number).into())
        };
        println!(
            "  PUBLISHED  {} is {} at {}",
            socket(&key, "port")?,
            socket(&value, "pod_port")?,
            name_of(&names, &value["port"]),
        );
    }
    Ok(())
}

/// Prints what the program counted at each port.
pub(super) fn counters(node: &Node, pods: &[Pod]) -> Result<()> {
    println!("\nCounted by the program, by the port that a frame came from:\n");
    println!(
        "  {:24} {:>9} {:>14} {:>8} {:>9}  dropped",
        "", "frames", "bytes", "flooded", "answered"
    );
    let names = device_names(node)?;
    for entry in dump(node, "STATS")? {
        let (key, cpus) = (&entry["key"], &entry["values"]);
        let sum = |counter: &dyn Fn(&Value) -> Option<u64>| -> u64 {
            list(cpus).filter_map(|cpu| counter(&cpu["value"])).sum()
        };
        let field = |name: &str| sum(&|value| value[name].as_u64());
        let dropped: Vec<_> = DropReason::ALL
            .into_iter()
            .map(|reason| {
                (
                    reason.name(),
                    sum(&|value| value["drops"][reason as usize].as_u64()),
                )
            })
            .filter(|(_, drops)| *drops > 0)
            .map(|(reason, drops)| format!("{drops} ({reason})"))
            .collect();
        // The kernel's number for no device: what came from devices that are no ports.
        if *key == 0 && dropped.is_empty() {
            continue;
        }
        let name = name_of(&names, key);
        let pod = pods
            .iter()
            .find(|pod| pod.host_veth().is_ok_and(|veth| veth == name));
        println!(
            "  {:24} {:>9} {:>14} {:>8} {:>9}  {}",
            pod.map_or(name.clone(), |pod| format!("{name} ({})", pod.name())),
            field("packets"),
            field("bytes"),
            field("flooded"),
            field("answered"),
            if dropped.is_empty() {
                "0".to_owned()
            } else {
                dropped.join(", ")
            },
        );
    }
    Ok(())
}

/// A device with its global addresses and its MAC.
fn device(namespace: &Namespace, name: &str) -> Result<String> {
    let device = namespace.device(name)?;
    let mut words = vec![name.to_owned()];
    for address in list(&device["addr_info"]).filter(|address| address["scope"] == "global") {
        words.push(format!(
            "{}/{}",
            text(address, "local")?,
            address["prefixlen"]
        ));
    }
    words.push(text(&device, "address")?.to_owned());
    Ok(words.join("  "))
}

/// An uplink with the program at its ingress.
fn uplink(node: &Node, name: &str) -> Result<String> {
    let index = &node.device(name)?["ifindex"];
    let link = node.json(&format!("bpftool -j link show pinned {UPLINK}{index}"))?;
    let program = node.json(&format!("bpftool -j prog show id {}", link["prog_id"]))?;
    let program = text(&program, "name")?;
    Ok(format!("{}  [eBPF: {program}]", device(node, name)?))
}

/// A port with the program at its ingress.
fn port(node: &Node, name: &str) -> Result<String> {
    let filters = node.json(&format!("tc -j filter show dev {name} ingress"))?;
    let program = list(&filters)
        .find_map(|filter| filter["options"]["prog"]["name"].as_str())
        .with_context(|| format!("no program at {name}"))?;
    Ok(format!("{name}  [eBPF: {program}]"))
}

/// The names of the node's devices by ifindex.
fn device_names(node: &Node) -> Result<BTreeMap<u64, String>> {
    list(&node.json("ip -j link")?)
        .map(|device| {
            let index = device["ifindex"]
                .as_u64()
                .ok_or_else(|| anyhow!("no ifindex in {device}"))?;
            Ok((index, text(device, "ifname")?.to_owned()))
        })
        .collect()
}

fn name_of(names: &BTreeMap<u64, String>, ifindex: &Value) -> String {
    ifindex
        .as_u64()
        .and_then(|index| names.get(&index).cloned())
        .unwrap_or_else(|| format!("ifindex {ifindex}"))
}

/// The keys and values of a map, in the order of the keys, as its type
/// information (BTF) has them.
fn entries(node: &Node, map: &str) -> Result<Vec<(Value, Value)>> {
    Ok(dump(node, map)?
        .into_iter()
        .map(|mut entry| (entry["key"].take(), entry["value"].take()))
        .collect())
}

fn dump(node: &Node, map: &str) -> Result<Vec<Value>> {
    let mut dump = node.json(&format!("bpftool -j map dump pinned {MAPS}/{map}"))?;
    let entries = dump
        .as_array_mut()
        .with_context(|| format!("no entries in the dump of {map}"))?;
    // The bytes in hexadecimal: the order of text is theirs.
    entries.sort_by_cached_key(|entry| entry["key"].to_string());
    Ok(entries
        .iter_mut()
        .map(|entry| entry["formatted"].take())
        .collect())
}

fn bytes(value: &Value) -> impl Iterator<Item = u8> {
    list(value).filter_map(|byte| byte.as_u64()?.try_into().ok())
}

fn mac(value: &Value) -> String {
    let octets: Vec<_> = bytes(value).map(|octet| format!("{octet:02x}")).collect();
    octets.join(":")
}

/// An IP address as maps have it: IPv4 mapped into IPv6.
fn address(value: &Value) -> Result<IpAddr> {
    // Words, where the programs handle it by words.
    let octets: Vec<_> = match &value["__0"] {
        Value::Null => bytes(value).collect(),
        words => list(words)
            .filter_map(|word| u32::try_from(word.as_u64()?).ok())
            .flat_map(u32::to_ne_bytes)
            .collect(),
    };
    let octets: [u8; 16] = octets
        .try_into()
        .map_err(|_| anyhow!("{value} is no address"))?;
    Ok(Ipv6Addr::from(octets).to_canonical())
}
