//! What ADD says when a table is full, and that it leaves nothing behind.

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Attachment, CniError, Network, Node, Sandbox, Snapshot};
use serde_json::{Value, json};

use crate::{network, node, other_network, refused};

/// The code of an ADD that found a table full.
const FULL: u64 = 102;

/// A pod-to-be in a network.
struct Candidate<'n> {
    network: &'n Network<'n>,
    attachment: Attachment,
    _sandbox: Sandbox,
}

impl<'n> Candidate<'n> {
    fn new(network: &'n Network<'n>, name: &str) -> Result<Self> {
        let sandbox = network.node().sandbox(name)?;
        Ok(Self {
            network,
            attachment: sandbox.attachment(),
            _sandbox: sandbox,
        })
    }

    /// With TCP ports to publish.
    fn publishing(network: &'n Network<'n>, name: &str, ports: &[u16]) -> Result<Self> {
        let mappings: Vec<Value> = (ports.iter())
            .map(|port| json!({"hostPort": port, "containerPort": 80, "protocol": "tcp"}))
            .collect();
        let mut candidate = Self::new(network, name)?;
        let attachment = candidate.attachment;
        candidate.attachment = attachment.capability("portMappings", mappings.into());
        Ok(candidate)
    }

    fn add(&self) -> Result<()> {
        self.network.add(&self.attachment)?;
        self.network.check(&self.attachment)
    }

    fn del(&self) -> Result<()> {
        self.network.del(&self.attachment)
    }
}

/// A limit, its table, and how many entries that has.
type Limit<'l> = (&'l str, &'l str, u32);

fn says(error: &CniError, (key, table, entries): Limit<'_>) -> Result<()> {
    let key = format!("raise limits.{key} in /etc/bpf-bridge/node.json");
    let entries = format!("the table has {entries} entries");
    ensure!(error.code == FULL, "{error:?}");
    for said in [table, &key, &entries] {
        ensure!(error.msg.contains(said), "nothing of {said:?}: {error:?}");
    }
    // What could not be undone would be here.
    ensure!(error.details.is_empty(), "{error:?}");
    Ok(())
}

/// That nothing was left behind but what any ADD of a network may leave: its store's notes,
/// its bridge's lock, and the node's addresses as it saw them.
fn is_as_it_was(node: &Node, before: &Snapshot) -> Result<()> {
    const NOTES: [&str; 4] = [
        "/last_reserved_ip.",
        "/networks/.bpf-bridge/",
        "/run/bpf-bridge/bridges/",
        "/maps/ADDRESSES",
    ];
    let mut changes = before.changes(&Snapshot::take(node)?);
    changes.retain(|change| !NOTES.iter().any(|note| change.contains(note)));
    ensure!(changes.is_empty(), "left behind:\n{}", changes.join("\n"));
    Ok(())
}

/// With `before` attached, one more is refused as often as it is tried, and nothing is
/// left of it; the others are as they were. With the last of them gone, it is not.
fn is_whole_or_not_at_all(
    limit: Limit<'_>,
    before: &[Candidate<'_>],
    one_more: &Candidate<'_>,
) -> Result<()> {
    for pod in before {
        pod.add()?;
    }
    let node = one_more.network.node();
    let attached = Snapshot::take(node)?;
    for _ in 0..2 {
        says(&refused(one_more.network, &one_more.attachment)?, limit)?;
        is_as_it_was(node, &attached)?;
    }
    for pod in before {
        pod.network.check(&pod.attachment)?;
    }
    before.last().context("nobody is there")?.del()?;
    one_more.add()
}

#[test]
fn ports() -> Result<()> {
    let node = node(&json!({"ports": 3}))?;
    let network = network(&node, &json!({}));
    let before = [
        Candidate::new(&network, "a")?,
        Candidate::new(&network, "b")?,
    ];
    let one_more = Candidate::new(&network, "c")?;
    // Its first entry, of a table that has one for all that are no ports.
    is_whole_or_not_at_all(("ports", "STATS", 4), &before, &one_more)
}

/// In the middle of a pod, which has one of each family, as the gateway has.
#[test]
fn addresses() -> Result<()> {
    let node = node(&json!({"addresses": 5}))?;
    let network = network(&node, &json!({"ipMasq": true}));
    let before = [Candidate::new(&network, "a")?];
    let one_more = Candidate::new(&network, "b")?;
    is_whole_or_not_at_all(("addresses", "NEIGHBORS", 5), &before, &one_more)
}

/// In the middle of a gateway.
#[test]
fn addresses_of_a_gateway() -> Result<()> {
    let node = node(&json!({"addresses": 6}))?;
    let (network, other) = (network(&node, &json!({})), other_network(&node, &json!({})));
    let before = [
        Candidate::new(&network, "a")?,
        Candidate::new(&network, "b")?,
    ];
    let one_more = Candidate::new(&other, "c")?;
    let limit = ("addresses", "NEIGHBORS", 6);
    for pod in &before {
        pod.add()?;
    }
    let attached = Snapshot::take(&node)?;
    says(&refused(&other, &one_more.attachment)?, limit)?;
    is_as_it_was(&node, &attached)
}

#[test]
fn segments() -> Result<()> {
    let node = node(&json!({"segments": 1}))?;
    let (network, other) = (network(&node, &json!({})), other_network(&node, &json!({})));
    let before = [Candidate::new(&network, "a")?];
    let one_more = Candidate::new(&other, "b")?;
    for pod in &before {
        pod.add()?;
    }
    let attached = Snapshot::take(&node)?;
    let error = refused(&other, &one_more.attachment)?;
    says(&error, ("segments", "SEGMENTS", 1))?;
    is_as_it_was(&node, &attached)?;
    // A bridge goes when it is deleted and a GC sees it.
    before[0].del()?;
    node.ip("link del cni0")?;
    network.gc(&[])?;
    one_more.add()
}

/// In the middle of a pod's ports, each of which is published in both families.
#[test]
fn published() -> Result<()> {
    let node = node(&json!({"published": 7}))?;
    let network = network(&node, &json!({}));
    let before = [
        Candidate::publishing(&network, "a", &[8000])?,
        Candidate::publishing(&network, "b", &[8001])?,
    ];
    let one_more = Candidate::publishing(&network, "c", &[8002, 8003])?;
    is_whole_or_not_at_all(("published", "PUBLISHED", 7), &before, &one_more)
}

/// Of networks with different lists; those that no pod has any more make room.
#[test]
fn exempt() -> Result<()> {
    let node = node(&json!({"exempt": 5}))?;
    let own = |name, bridge, net: u8, exempt: &[&str]| {
        let config = json!({
            "bridge": bridge,
            "ipMasq": true,
            "ipMasqExempt": exempt,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": format!("10.{net}.0.0/16")}]]},
        });
        crate::named(&node, name, &config)
    };
    let a = own("a", "cni1", 81, &["192.0.2.0/24", "2001:db8::/32"]);
    let b = own("b", "cni2", 82, &["192.0.2.0/24", "203.0.113.0/24"]);
    let before = [Candidate::new(&a, "a")?, Candidate::new(&a, "b")?];
    let one_more = Candidate::new(&b, "c")?;
    for pod in &before {
        pod.add()?;
    }
    let attached = Snapshot::take(&node)?;
    for _ in 0..2 {
        let error = refused(&b, &one_more.attachment)?;
        says(&error, ("exempt", "EXEMPT", 5))?;
        is_as_it_was(&node, &attached)?;
    }
    // One of two has the list still.
    before[0].del()?;
    refused(&b, &one_more.attachment)?;
    before[0].add()?;
    before[0].del()?;
    before[1].del()?;
    one_more.add()
}

#[test]
fn uplinks() -> Result<()> {
    let node = node(&json!({"uplinks": 1}))?;
    let _outside = node.outside()?;
    let other = node.machine()?;
    node.connect("more0", &other, "eth0")?;
    node.ip("addr add 192.0.2.1/24 dev more0")?;
    let network = network(&node, &json!({"ipMasq": true}));
    let pod = Candidate::new(&network, "a")?;
    let empty = Snapshot::take(&node)?;
    let error = refused(&network, &pod.attachment)?;
    says(&error, ("uplinks", "UPLINKS", 1))?;
    is_as_it_was(&node, &empty)?;
    node.ip("link del more0")?;
    pod.add()
}

#[test]
fn addresses_of_the_node() -> Result<()> {
    let node = node(&json!({"nodeAddresses": 30}))?;
    let _outside = node.outside()?;
    let network = network(&node, &json!({"ipMasq": true}));
    let before = Candidate::new(&network, "a")?;
    before.add()?;
    for number in 1..=30 {
        node.ip(&format!("addr add 203.0.113.{number}/32 dev lo"))?;
    }
    let attached = Snapshot::take(&node)?;
    let pod = Candidate::new(&network, "b")?;
    let error = refused(&network, &pod.attachment)?;
    says(&error, ("nodeAddresses", "ADDRESSES", 30))?;
    // The node's addresses that had room are known, whoever has asked.
    for change in attached.changes(&Snapshot::take(&node)?) {
        ensure!(change.contains("/maps/ADDRESSES"), "left behind: {change}");
    }
    // Nobody else suffers.
    before.del()?;
    before.network.gc(&[])?;
    node.ip("addr flush dev lo scope global")?;
    before.add()?;
    pod.add()
}

/// The settings of a node that cannot be used are said before anything is made of them;
/// what is made already does not need them.
#[test]
fn settings_that_are_not_understood() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node, &json!({}));
    let pod = Candidate::new(&network, "a")?;
    for (text, said) in [
        (
            r#"{"limits": {"flows": 1}}"#,
            "node.json: limits.flows is 1, must be a whole number from 1024",
        ),
        (
            r#"{"limits": {"pods": 1}}"#,
            r#"node.json: a key of limits is "pods", must be one of ports"#,
        ),
        ("limits", "node.json: the file is no JSON"),
    ] {
        node.set_settings("")?;
        let empty = Snapshot::take(&node)?;
        node.set_settings(text)?;
        let error = refused(&network, &pod.attachment)?;
        ensure!(error.code == 7 && error.msg.contains(said), "{error:?}");
        let status = network.status()?.pop().context("no plugin")?.failure()?;
        ensure!(status.code == 50 && status.msg.contains(said), "{status:?}");
        is_as_it_was(&node, &empty)?;
    }
    node.set_settings("")?;
    pod.add()?;
    node.set_settings("no settings")?;
    Candidate::new(&network, "b")?.add()?;
    pod.del()
}

/// Tables that are there keep their size.
#[test]
fn limits_hold_for_tables_that_are_made() -> Result<()> {
    let node = node(&json!({"ports": 2}))?;
    let network = network(&node, &json!({}));
    let (a, b) = (
        Candidate::new(&network, "a")?,
        Candidate::new(&network, "b")?,
    );
    a.add()?;
    node.set_settings(r#"{"limits": {"ports": 3}}"#)?;
    says(&refused(&network, &b.attachment)?, ("ports", "STATS", 3))
}
