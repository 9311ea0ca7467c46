//! Masquerade: as whom pods appear outside of the node, what of their packets comes
//! back, and that no flow is ever taken for another.
//!
//! The tests run against the stock chain as well (the plugin `bridge`), to see whether
//! it is the test or the plugin that is wrong; some then fail, as they show what is
//! better here, and some cannot succeed, as they look at our own maps.

mod collisions;
mod errors;
mod flow;
mod hostile;
mod lifetime;
mod reach;
mod uplinks;

use std::{
    collections::BTreeSet,
    fmt::Debug,
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Namespace, Network, Node, Outside, Pod};
use serde_json::{Value, json};

use flow::{Kind, Remote};

/// Long enough for anything that does happen, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long to wait for what must not happen.
const SILENCE: Duration = Duration::from_millis(100);

/// The node's addresses towards the outside.
const NODE: [IpAddr; 2] = [IpAddr::V4(Outside::NODE_V4), IpAddr::V6(Outside::NODE_V6)];
/// The outside's.
const OUTSIDE: [IpAddr; 2] = [IpAddr::V4(Outside::V4), IpAddr::V6(Outside::V6)];
/// The gateway's in the network of [`network`].
const GATEWAYS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1)),
];

const PINS: &str = "/sys/fs/bpf/bpf-bridge/v1";

/// The kernel's own tables of addresses, in the order of [`NODE`] and the others.
const IPTABLES: [&str; 2] = ["iptables", "ip6tables"];

/// A dual-stack network whose pods are masqueraded.
fn network(node: &Node) -> Network<'_> {
    network_with(node, &json!({}))
}

/// As [`network`], with more keys.
fn network_with<'node>(node: &'node Node, more: &Value) -> Network<'node> {
    let mut config = Network::dual_stack(node);
    config["cniVersion"] = json!(if is_stock(node) { "1.0.0" } else { "1.1.0" });
    config["ipMasq"] = json!(true);
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    Network::new(node, config)
}

/// As [`network`], with pods that may publish ports, and more keys.
fn publishing_network<'node>(node: &'node Node, more: &Value) -> Network<'node> {
    let mut config = Network::dual_stack(node);
    let name = config["name"].take();
    config["cniVersion"].take();
    config["ipMasq"] = json!(true);
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    let publishes = json!({"portMappings": true});
    let mut plugins = vec![config];
    if is_stock(node) {
        plugins[0]["hairpinMode"] = json!(true);
        plugins.push(json!({"type": "portmap", "capabilities": publishes}));
    } else {
        plugins[0]["capabilities"] = publishes;
    }
    let list = json!({"cniVersion": "1.0.0", "name": name, "plugins": plugins});
    Network::from_list(node, list)
}

/// What a pod's packets pass on their way out of the node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum By {
    /// The host's stack.
    Stack,
    /// Our programs alone: `netfilter` is `none`.
    Programs,
}

impl By {
    /// As [`network`].
    fn network(self, node: &Node) -> Network<'_> {
        match self {
            Self::Stack => network(node),
            Self::Programs => network_with(node, &json!({"netfilter": "none"})),
        }
    }
}

/// Makes of each function a test with either of [`By`].
macro_rules! by_stack_and_programs {
    ($($name:ident)*) => {
        mod stack {$(
            #[test]
            fn $name() -> anyhow::Result<()> {
                super::$name(crate::By::Stack)
            }
        )*}
        mod programs {$(
            #[test]
            fn $name() -> anyhow::Result<()> {
                super::$name(crate::By::Programs)
            }
        )*}
    };
}
use by_stack_and_programs;

/// A second network, on a bridge of its own.
fn other_network(node: &Node) -> Network<'_> {
    network_with(
        node,
        &json!({
            "name": "other",
            "bridge": "cni1",
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]],
            },
        }),
    )
}

fn is_stock(node: &Node) -> bool {
    node.plugin() == "bridge"
}

/// A pod that can speak at once.
fn pod(network: &Network, name: &str) -> Result<Pod> {
    let pod = network.pod(name)?;
    settle(network.node());
    Ok(pod)
}

/// Lets IPv6 addresses of the stock bridge cease to be tentative.
fn settle(node: &Node) {
    if is_stock(node) {
        thread::sleep(Duration::from_secs(3));
    }
}

fn addresses(pod: &Pod) -> Result<[IpAddr; 2]> {
    Ok([pod.v4()?.into(), pod.v6()?.into()])
}

/// Both of the outside's own addresses.
fn remotes(outside: &Outside) -> Result<[Remote; 2]> {
    Ok([
        Remote::new(outside, OUTSIDE[0])?,
        Remote::new(outside, OUTSIDE[1])?,
    ])
}

/// Every kind, over IPv4 (0) and IPv6 (1).
fn both(kinds: &[Kind]) -> Vec<(Kind, usize)> {
    let with = |family| kinds.iter().map(move |&kind| (kind, family));
    with(0).chain(with(1)).collect()
}

/// Checks every row, to the last, and tells of all that failed.
fn each<T: Debug + Clone>(
    rows: impl IntoIterator<Item = T>,
    mut check: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    let mut failures = Vec::new();
    for row in rows {
        if let Err(error) = check(row.clone()) {
            failures.push(format!("{row:?}: {error:#}"));
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

/// That a pod reaches both remotes by every kind, and as whom.
fn reaches(pod: &Namespace, remotes: &[Remote; 2], seen: [IpAddr; 2]) -> Result<()> {
    reaches_by(&Kind::ALL, pod, remotes, seen)
}

/// As [`reaches`], by kinds of the caller's choice: only one pod at a time can speak
/// to one remote by a protocol without ports.
fn reaches_by(
    kinds: &[Kind],
    pod: &Namespace,
    remotes: &[Remote; 2],
    seen: [IpAddr; 2],
) -> Result<()> {
    each(both(kinds), |(kind, family)| {
        let met = remotes[family].meet(kind, pod, 0)?;
        ensure!(
            met.ip() == seen[family],
            "seen as {met}, not {}",
            seen[family]
        );
        Ok(())
    })
}

/// The entries of a pinned map, as bytes.
fn dump(node: &Node, map: &str) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let bytes = |value: &Value| -> Option<Vec<u8>> {
        let hex = |byte: &Value| u8::from_str_radix(byte.as_str()?.get(2..)?, 16).ok();
        value.as_array()?.iter().map(hex).collect()
    };
    let list = node.json(&format!("bpftool -j map dump pinned {PINS}/maps/{map}"))?;
    (list.as_array().context("no list")?.iter())
        .map(|entry| {
            let key = bytes(&entry["key"]).context("no key")?;
            // Of each CPU, if the map has it so.
            let value = match entry["values"].as_array() {
                Some(values) => (values.iter())
                    .map(|value| bytes(&value["value"]))
                    .collect::<Option<Vec<_>>>()
                    .map(|values| values.concat()),
                None => bytes(&entry["value"]),
            };
            Ok((key, value.context("no value")?))
        })
        .collect()
}

/// Why the programs drop packets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Drops {
    Exhausted = 10,
    NotTranslatable = 12,
}

/// How many of a pod's packets were dropped for these reasons.
fn drops(pod: &Pod, network: &Network, reasons: &[Drops]) -> Result<u64> {
    let device = network.node().device(pod.host_veth()?)?;
    let index = u32::try_from(device["ifindex"].as_u64().context("no index")?)?;
    let stats = dump(network.node(), "STATS")?;
    let (_, value) = (stats.iter())
        .find(|(key, _)| *key == index.to_ne_bytes())
        .context("the port has no counters")?;
    let cpus = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last: usize = cpus
        .trim()
        .rsplit(['-', ','])
        .next()
        .context("no CPU")?
        .parse()?;
    let mut count = 0;
    for cpu in value.chunks(value.len() / (last + 1)) {
        for &reason in reasons {
            // Two counters stand before those of drops.
            let counter = cpu
                .get((2 + reason as usize) * 8..)
                .and_then(|rest| rest.first_chunk());
            count += u64::from_ne_bytes(*counter.context("no such counter")?);
        }
    }
    Ok(count)
}

/// That these are all different.
fn all_differ<T: Ord + Debug>(items: &[T]) -> Result<()> {
    let set: BTreeSet<&T> = items.iter().collect();
    ensure!(set.len() == items.len(), "the same twice: {items:?}");
    Ok(())
}

/// Whether an error came from one of the kernel's, of this kind.
fn is(error: &anyhow::Error, kind: ErrorKind) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == kind)
}
