//! Masquerade comes and goes with the pods that need it: what is written for them, by
//! whom it is missed, and what is left.

use std::{collections::BTreeMap, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Attachment, Network, Node, Snapshot, wait_for};
use serde_json::{Value, json};

const PINS: &str = "/sys/fs/bpf/bpf-bridge/v1";

/// A dual-stack network that is masqueraded, of version 1.1.0.
fn config(node: &Node, more: &Value) -> Value {
    let mut config = Network::dual_stack(node);
    config["cniVersion"] = json!("1.1.0");
    config["ipMasq"] = json!(true);
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    config
}

fn network<'node>(node: &'node Node, more: &Value) -> Network<'node> {
    Network::new(node, config(node, more))
}

/// How many entries each map of masquerade has.
fn entries(node: &Node) -> Result<BTreeMap<&'static str, usize>> {
    ["MASQUERADED", "EXEMPT", "UPLINKS"]
        .into_iter()
        .map(|map| {
            let path = format!("{PINS}/maps/{map}");
            let count = match node.run(&format!("ls {path}")) {
                Err(_) => 0,
                Ok(_) => node
                    .json(&format!("bpftool -j map dump pinned {path}"))?
                    .as_array()
                    .context("no list")?
                    .len(),
            };
            Ok((map, count))
        })
        .collect()
}

fn has(node: &Node, masqueraded: usize, exempt: usize, uplinks: usize) -> Result<()> {
    let expected = BTreeMap::from([
        ("MASQUERADED", masqueraded),
        ("EXEMPT", exempt),
        ("UPLINKS", uplinks),
    ]);
    let found = entries(node)?;
    ensure!(found == expected, "{found:?} instead of {expected:?}");
    Ok(())
}

/// The pins of what masquerade alone needs.
fn pins(node: &Node) -> Result<Vec<String>> {
    let snapshot = Snapshot::take(node)?;
    Ok(["links/", "nat/uplink", "nat/egress"]
        .iter()
        .flat_map(|pin| snapshot.matching(&format!("v1/{pin}")))
        .collect())
}

/// The chains of our table in netfilter.
fn chains(node: &Node) -> Result<Vec<String>> {
    let listed = node.json("nft -j list ruleset")?;
    let all = listed["nftables"].as_array().context("no list")?;
    Ok(all
        .iter()
        .filter_map(|object| object["chain"]["name"].as_str())
        .map(str::to_owned)
        .collect())
}

fn fault(result: Result<()>) -> Result<String> {
    Ok(format!("{:#}", result.err().context("nobody noticed")?))
}

#[test]
fn each_address_has_an_entry_and_pods_share_their_exemptions() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let network = network(&node, &json!({"ipMasqExempt": ["203.0.113.0/24"]}));
    let pod = network.pod("pod")?;
    has(&node, 2, 3, 1)?;
    let other = network.pod("other")?;
    has(&node, 4, 3, 1)?;
    network.check(pod.attachment())?;
    for reply in network.status()? {
        ensure!(reply.status.success(), "{}", reply.stdout);
    }
    network.del(pod.attachment())?;
    has(&node, 2, 3, 1)?;
    network.check(other.attachment())?;

    // GC leaves what is in use, and takes the rest.
    network.gc(&[other.attachment()])?;
    has(&node, 2, 3, 1)?;
    ensure!(pins(&node)?.len() == 4, "{:?}", pins(&node)?);
    network.del(other.attachment())?;
    network.gc(&[])?;
    has(&node, 0, 0, 0)?;
    ensure!(pins(&node)?.is_empty(), "{:?}", pins(&node)?);
    Ok(())
}

/// What a network is not asked for is not there.
#[test]
fn networks_without_it_have_nothing() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    for (name, more) in [
        ("plain", json!({"ipMasq": false, "ipMasqBackend": "ebpf"})),
        ("rules", json!({"ipMasqBackend": "iptables"})),
    ] {
        let network = network(&node, &more);
        let pod = network.pod(name)?;
        has(&node, 0, 0, 0)?;
        ensure!(pins(&node)?.is_empty(), "{name}: {:?}", pins(&node)?);
        ensure!(chains(&node)?.len() == usize::from(name == "rules"));
        network.del(pod.attachment())?;
    }
    Ok(())
}

/// The last step of ADD fails, when all is claimed.
#[test]
fn a_failed_add_leaves_nothing() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    for backend in ["ebpf", "nftables"] {
        let more = json!({"ipMasqBackend": backend});
        let mut bad = config(&node, &more);
        bad["ipam"]["routes"] = json!([{"dst": "203.0.113.0/24", "gw": "192.0.2.1"}]);
        let bad = Network::new(&node, bad);
        for first in [true, false] {
            let good = network(&node, &more);
            let other = (!first).then(|| good.pod("other")).transpose()?;
            let sandbox = node.sandbox("pod")?;
            let before = (entries(&node)?, pins(&node)?, chains(&node)?);
            let error = fault(bad.add(&sandbox.attachment()).map(drop))?;
            ensure!(
                error.contains("203.0.113.0/24") && !error.contains("cleaning up"),
                "{error}"
            );
            let after = (entries(&node)?, pins(&node)?, chains(&node)?);
            ensure!(before == after, "{backend}: {before:?} became {after:?}");
            if let Some(other) = other {
                good.check(other.attachment())?;
                good.del(other.attachment())?;
                good.gc(&[])?;
                node.ip("link del cni0")?;
            }
        }
    }
    Ok(())
}

#[test]
fn check_and_status_miss_a_lost_entry() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let network = network(&node, &json!({}));
    let pod = network.pod("pod")?;
    let path = format!("{PINS}/maps/MASQUERADED");
    let all = node.json(&format!("bpftool -j map dump pinned {path}"))?;
    let key: Vec<&str> = all[0]["key"]
        .as_array()
        .context("no key")?
        .iter()
        .filter_map(Value::as_str)
        .collect();
    node.run(&format!(
        "bpftool map delete pinned {path} key hex {}",
        key.join(" ")
    ))?;
    let error = fault(network.check(pod.attachment()))?;
    ensure!(error.contains("is not masqueraded any more"), "{error}");
    for reply in network.status()? {
        let error = reply.failure()?;
        ensure!(
            error.code == 51 && error.msg.contains("masqueraded"),
            "{error:?}"
        );
    }
    // What is left goes with the pod.
    network.del(pod.attachment())?;
    has(&node, 0, 2, 1)
}

/// Devices come and go, and change their addresses.
#[test]
fn uplinks_are_followed() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let network = network(&node, &json!({}));
    let pod = network.pod("pod")?;
    has(&node, 2, 2, 1)?;
    let elsewhere = node.machine()?;
    node.connect("uplink1", &elsewhere, "eth0")?;
    node.ip("addr add 192.0.2.1/24 dev uplink1")?;
    network.check(pod.attachment())?;
    has(&node, 2, 2, 2)?;
    let addresses = || node.json(&format!("bpftool -j map dump pinned {PINS}/maps/UPLINKS"));
    let before = addresses()?;
    node.ip("addr flush dev uplink1\naddr add 192.0.2.2/24 dev uplink1")?;
    network.status()?;
    ensure!(before != addresses()?, "{before}");
    node.ip("link del uplink1")?;
    network.gc(&[pod.attachment()])?;
    has(&node, 2, 2, 1)
}

/// A sandbox that went without a DEL, and the next owner of its address.
#[test]
fn an_address_of_the_dead_is_taken_over() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    for backend in ["ebpf", "nftables"] {
        let network = network(&node, &json!({"ipMasqBackend": backend}));
        let ip = "IP=10.77.0.50";
        let dead = node.sandbox(&format!("dead-{backend}"))?;
        network.add(&dead.attachment().args(ip))?;
        node.run(&format!("umount {}", dead.path().display()))?;
        drop(dead);
        wait_for("the end of the sandbox", Duration::from_secs(5), || {
            let devices = node.device_names()?;
            Ok(!devices.iter().any(|device| device.starts_with("veth")))
        })?;
        // Its lease is given back by hand, as a reboot does.
        node.run("rm -rf /var/lib/cni/networks/net")?;
        let heir = node.sandbox(&format!("heir-{backend}"))?;
        let attachment = heir.attachment().args(ip);
        network.add(&attachment)?;
        network.check(&attachment)?;
        network.gc(&[&attachment])?;
        network.check(&attachment)?;
        let expected = if backend == "ebpf" { (2, 0) } else { (0, 1) };
        let found = (entries(&node)?["MASQUERADED"], chains(&node)?.len());
        ensure!(found == expected, "{backend}: {found:?}");
        network.del(&attachment)?;
        network.gc(&[])?;
        ensure!(chains(&node)?.is_empty());
        has(&node, 0, 0, 0)?;
    }
    Ok(())
}

#[test]
fn a_network_has_one_chain_that_goes_with_its_last_pod() -> Result<()> {
    let node = Node::new()?;
    let more = json!({"ipMasqBackend": "nftables", "ipMasqExempt": ["203.0.113.7"]});
    let first = network(&node, &more);
    let mut other = config(&node, &more);
    other["name"] = json!("net-2");
    other["bridge"] = json!("cni1");
    other["ipam"]["ranges"] = json!([[{"subnet": "10.78.0.0/16"}]]);
    let other = Network::new(&node, other);
    let others = other.pod("others")?;
    let kept = chains(&node)?;
    ensure!(kept.len() == 1, "{kept:?}");

    let one = first.pod("one")?;
    let rules = node.run("nft list ruleset")?;
    let two = first.pod("two")?;
    ensure!(rules == node.run("nft list ruleset")?, "it is not constant");
    for part in [
        "ip daddr 203.0.113.7 return",
        "ip saddr 10.77.0.0/16 masquerade",
        "ip6 saddr fd77::/64 masquerade",
    ] {
        ensure!(rules.contains(part), "{rules}");
    }
    first.del(one.attachment())?;
    first.gc(&[two.attachment()])?;
    ensure!(rules == node.run("nft list ruleset")?);

    // Somebody flushes all: the next ADD makes it good.
    for change in ["flush ruleset", "flush table inet bpf-bridge"] {
        node.run(&format!("nft {change}"))?;
        let error = fault(first.check(two.attachment()))?;
        ensure!(error.contains("masquerade-net-"), "{error}");
        let reply = first.status()?.remove(0).failure()?;
        ensure!(reply.code == 51, "{reply:?}");
        let three = first.pod("three")?;
        first.check(two.attachment())?;
        first.del(three.attachment())?;
        first.check(two.attachment())?;
    }
    first.del(two.attachment())?;
    first.del(two.attachment())?;
    other.del(others.attachment())?;
    let left = node.run("nft list ruleset")?;
    ensure!(left.is_empty(), "{left}");
    Ok(())
}

/// Whoever goes last takes the chain along.
#[test]
fn pods_that_come_and_go_at_once_leave_no_chain() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node, &json!({"ipMasqBackend": "nftables"}));
    let sandboxes = (0..8)
        .map(|number| node.sandbox(&format!("pod{number}")))
        .collect::<Result<Vec<_>>>()?;
    let attachments: Vec<Attachment> = sandboxes.iter().map(|one| one.attachment()).collect();
    let at_once = |work: &(dyn Fn(&Attachment) -> Result<()> + Sync)| -> Result<()> {
        thread::scope(|scope| {
            let threads: Vec<_> = attachments
                .iter()
                .map(|attachment| scope.spawn(move || work(attachment)))
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().ok().context("a panic")?)
        })
    };
    for _ in 0..3 {
        at_once(&|attachment| network.add(attachment).map(drop))?;
        ensure!(chains(&node)?.len() == 1, "{:?}", chains(&node)?);
        at_once(&|attachment| network.check(attachment))?;
        at_once(&|attachment| network.del(attachment))?;
        ensure!(chains(&node)?.is_empty(), "{:?}", chains(&node)?);
    }
    Ok(())
}
