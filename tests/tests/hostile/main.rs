//! Pods that lie: about whose address is whose ([`claims`]), and about what is in a frame
//! ([`lies`]). Each test sends the frames for real, and looks at what others made of them.

mod claims;
mod lies;

use std::{
    net::IpAddr,
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_common::{drops::DropReason, layout::PortStats};
use bpf_bridge_tests::{MacAddr, Namespace, Network, Node, PacketSocket, Pod};
use serde_json::{Value, json};

/// Long enough for anything that does happen, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for what must not happen.
const SILENCE: Duration = Duration::from_millis(100);
/// The kernel has one table of IPv6 neighbours for all namespaces (`gc_thresh3` entries, 1,024
/// mostly), and a storm of senders fills it: nobody else looks for a neighbour meanwhile.
static NEIGHBOURS: RwLock<()> = RwLock::new(());
/// Where the counters are pinned.
const STATS: &str = "/sys/fs/bpf/bpf-bridge/v1/maps/STATS";

/// Held by every test but the storm.
fn peace() -> RwLockReadGuard<'static, ()> {
    NEIGHBOURS.read().unwrap_or_else(PoisonError::into_inner)
}

/// Held by the storm.
fn storm() -> RwLockWriteGuard<'static, ()> {
    NEIGHBOURS.write().unwrap_or_else(PoisonError::into_inner)
}

/// A pod, and what it is needed for.
struct Station {
    pod: Pod,
    mac: MacAddr,
    socket: PacketSocket,
}

impl Station {
    fn new(network: &Network<'_>, name: &str) -> Result<Self> {
        let pod = network.pod(name)?;
        Self::of(pod)
    }

    fn of(pod: Pod) -> Result<Self> {
        Ok(Self {
            mac: MacAddr::of_device(&pod, "eth0")?,
            socket: PacketSocket::open(&pod, "eth0")?,
            pod,
        })
    }

    fn addresses(&self) -> Result<[IpAddr; 2]> {
        Ok([self.pod.v4()?.into(), self.pod.v6()?.into()])
    }

    /// What was dropped of its frames for a reason.
    fn drops(&self, node: &Node, reason: DropReason) -> Result<u64> {
        Ok(self.stats(node)?.drops[reason as usize])
    }

    /// Its counters.
    fn stats(&self, node: &Node) -> Result<PortStats> {
        let port = node.device(self.pod.host_veth()?)?["ifindex"]
            .as_u64()
            .context("no ifindex")?;
        let entries = node.json(&format!("bpftool -j map dump pinned {STATS}"))?;
        let mut sum = PortStats::default();
        for entry in entries.as_array().into_iter().flatten() {
            if bytes(&entry["key"])? != u32::try_from(port)?.to_ne_bytes() {
                continue;
            }
            for cpu in entry["values"].as_array().into_iter().flatten() {
                let one: PortStats = bytemuck::pod_read_unaligned(&bytes(&cpu["value"])?);
                sum.flooded += one.flooded;
                sum.answered += one.answered;
                for (all, more) in sum.drops.iter_mut().zip(one.drops) {
                    *all += more;
                }
            }
        }
        Ok(sum)
    }
}

/// Bytes as bpftool shows them.
fn bytes(value: &Value) -> Result<Vec<u8>> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .map(|byte| {
            let text = byte.as_str().context("no byte")?;
            Ok(u8::from_str_radix(text.trim_start_matches("0x"), 16)?)
        })
        .collect()
}

/// A dual-stack network with more keys.
fn network<'node>(node: &'node Node, more: &Value) -> Network<'node> {
    let mut config = Network::dual_stack(node);
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    Network::new(node, config)
}

/// Another one, on a bridge of its own.
fn other_network(node: &Node) -> Network<'_> {
    network(
        node,
        &json!({
            "name": "other",
            "bridge": "cni1",
            "ipMasq": true,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.78.0.0/16"}], [{"subnet": "fd78::/64"}]],
            },
        }),
    )
}

/// Where a namespace would send a packet for an on-link address.
fn neighbour(namespace: &Namespace, address: IpAddr, device: &str) -> Result<Option<MacAddr>> {
    let entries = namespace.json(&format!("ip -j neigh show to {address} dev {device}"))?;
    entries
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| entry["lladdr"].as_str())
        .next()
        .map(str::parse)
        .transpose()
}

/// Works through all of them, and says which failed.
fn each<T: Copy + std::fmt::Debug>(
    all: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> Result<()>,
) -> Result<()> {
    let failed: Vec<String> = all
        .into_iter()
        .filter_map(|one| work(one).err().map(|error| format!("{one:?}: {error:#}")))
        .collect();
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}
