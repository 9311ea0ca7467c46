//! Pins that are not the plugin's, at its own paths: none is used, and none is removed.

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Network, Node, plugin_binary};

use crate::{
    ROOT, another_build, install, is_well, layouts, network, ports, upgrade, upgrade_error,
};

/// The number that the kernel gave the object behind a pin.
fn id(node: &Node, kind: &str, path: &str) -> Result<u64> {
    let object = node.json(&format!("bpftool -j {kind} show pinned {path}"))?;
    object["id"]
        .as_u64()
        .with_context(|| format!("{path} is no {kind}"))
}

/// That ADD fails, naming the pin and what is there, and leaves it and nothing else.
fn add_refuses(network: &Network, path: &str, kind: &str, words: &[&str]) -> Result<()> {
    let node = network.node();
    let before = id(node, kind, path)?;
    let sandbox = node.sandbox(&format!("s{before}"))?;
    let error = network.add(&sandbox.attachment()).err();
    let error = format!("{:#}", error.with_context(|| format!("ADD used {path}"))?);
    for word in [path].iter().chain(words) {
        ensure!(error.contains(word), "no {word:?} in {error}");
    }
    ensure!(id(node, kind, path)? == before, "{path} was replaced");
    ensure!(
        sandbox.device_names()? == ["lo"],
        "{:?}",
        sandbox.device_names()?
    );
    Ok(())
}

/// Before the first ADD, there are maps of the right names, of which something is wrong.
#[test]
fn a_map_of_another_shape_is_refused() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node, false);
    let maps = format!("{ROOT}/v1/maps");
    node.run(&format!("mkdir -p {maps}"))?;
    for (name, shape, word) in [
        (
            "PORTS",
            "type array key 4 value 20 entries 16 name PORTS",
            "kind 2",
        ),
        (
            "PORTS",
            "type hash key 8 value 20 entries 16 name PORTS flags 1",
            "bytes: 8",
        ),
        (
            "PORTS",
            "type hash key 4 value 24 entries 16 name PORTS flags 1",
            "bytes: 24",
        ),
        (
            "PORTS",
            "type hash key 4 value 20 entries 16 name PORTS",
            "flags 0",
        ),
        (
            "PORTS",
            "type hash key 4 value 20 entries 16 name OTHER flags 1",
            "OTHER",
        ),
        (
            "FLOWS",
            "type hash key 44 value 64 entries 16 name FLOWS",
            "kind 1",
        ),
    ] {
        let path = format!("{maps}/{name}");
        node.run(&format!("bpftool map create {path} {shape}"))?;
        add_refuses(&network, &path, "map", &[word])
            .with_context(|| format!("{name} as {shape}"))?;
        node.run(&format!("rm {path}"))?;
    }
    let pod = network.pod_with_ports("pod", ports())?;
    is_well(&network, &[&pod])
}

/// Fields of the same length in another order: only the type information tells. It is the
/// next layout's map at this one's path.
#[test]
fn a_map_of_other_fields_is_refused() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node, false);
    install(&node, &crate::next_binary()?)?;
    let pod = network.pod_with_ports("pod", ports())?;
    network.del(pod.attachment())?;
    node.run(&format!("mv {ROOT}/v2/maps/PUBLISHED {ROOT}/aside"))?;
    node.run(&format!("rm -r {ROOT}/v2"))?;
    node.run("ip link delete cni0")?;
    install(&node, &plugin_binary()?)?;
    let path = format!("{ROOT}/v1/maps/PUBLISHED");
    node.run(&format!("mkdir -p {ROOT}/v1/maps"))?;
    node.run(&format!("mv {ROOT}/aside {path}"))?;
    add_refuses(&network, &path, "map", &["segment: u32, address"])
}

/// Once loaded, each pin that a call opens is looked at.
#[test]
fn a_pin_in_the_place_of_ours_is_refused() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node, false);
    let pod = network.pod_with_ports("pod", ports())?;
    let root = format!("{ROOT}/v1");
    let aside = format!("{ROOT}/aside");
    for (pin, other, kind, words) in [
        // Another program, one of the same kind; a program for a map and the reverse.
        (
            "off/port",
            "prog pin pinned off/flood",
            "prog",
            ["flood", "port"],
        ),
        (
            "off/port",
            "prog pin pinned nat/from_pod",
            "prog",
            ["from_pod", "port"],
        ),
        (
            "off/port",
            "map pin pinned maps/SEGMENTS",
            "map",
            ["a map", "port"],
        ),
        (
            "maps/ENDPOINTS",
            "map pin pinned maps/XDP_UPLINKS",
            "map",
            ["XDP_UPLINKS", "ENDPOINTS"],
        ),
        (
            "maps/NEIGHBORS",
            "prog pin pinned off/flood",
            "prog",
            ["a program", "NEIGHBORS"],
        ),
        (
            "maps/PUBLISHED",
            "map pin pinned maps/PORTS",
            "map",
            ["PORTS", "PUBLISHED"],
        ),
        (
            "nat/uplink",
            "prog pin pinned nat/egress",
            "prog",
            ["egress", "uplink"],
        ),
    ] {
        let check = || {
            let path = format!("{root}/{pin}");
            node.run(&format!("mv {path} {aside}"))?;
            let other = other.replace("pinned ", &format!("pinned {root}/"));
            node.run(&format!("bpftool {other} {path}"))?;
            // A device that is new needs the uplinks' programs.
            node.run("ip link add late type veth peer name later")?;
            node.run("ip addr add 192.0.2.1/32 dev late")?;
            add_refuses(&network, &path, kind, &words)?;
            let error = upgrade_error(&node);
            node.run("ip link delete late")?;
            node.run(&format!("mv {aside} {path}"))?;
            is_well(&network, &[&pod])?;
            if pin.starts_with("maps/") {
                let error = error?;
                ensure!(error.contains(&path), "{error}");
            }
            Ok(())
        };
        check().with_context(|| format!("{pin} replaced by {other}"))?;
    }
    Ok(())
}

/// A link that is not of ours stays what it is.
#[test]
fn a_link_that_is_not_ours_is_refused() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let network = network(&node, false);
    let pod = network.pod_with_ports("pod", ports())?;
    let links = format!("{ROOT}/v1/links");
    node.run(&format!("mv {links}/connect4 {ROOT}/aside"))?;
    let all = node.run(&format!("ls {links}"))?;
    let other = all
        .split_whitespace()
        .find(|name| name.starts_with("egress-"))
        .context("no link of an uplink")?;
    node.run(&format!(
        "bpftool link pin pinned {links}/{other} {links}/connect4"
    ))?;
    install(&node, &another_build(&plugin_binary()?, 2)?)?;
    let error = upgrade_error(&node)?;
    for word in ["links/connect4", "\"egress\"", "\"connect4\""] {
        ensure!(error.contains(word), "no {word:?} in {error}");
    }
    node.run(&format!("rm {links}/connect4"))?;
    node.run(&format!("mv {ROOT}/aside {links}/connect4"))?;
    upgrade(&node)?;
    is_well(&network, &[&pod])
}

/// What lies about beside the layouts is nobody's.
#[test]
fn other_directories_are_left_alone() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node, false);
    for name in ["v", "v1x", "w9", "v99"] {
        node.run(&format!("mkdir -p {ROOT}/{name}/maps"))?;
    }
    let pod = network.pod("pod")?;
    ensure!(upgrade(&node)?.contains("the programs are those of this binary"));
    is_well(&network, &[&pod])?;
    let mut all = layouts(&node)?;
    all.sort();
    ensure!(all == ["v", "v1", "v1x", "v99", "w9"], "{all:?}");
    Ok(())
}
