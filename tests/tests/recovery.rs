//! Storms of calls and damage done by others: what is left, whether the tables
//! agree with each other, and whether the node can be used again without a reboot.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Attachment, Call, Network, Node, Pod, Reply, Snapshot, Tables, Verb, at_once,
};
use serde_json::{Value, json};

const RECORDS: &str = "/run/bpf-bridge/attachments";

fn config(node: &Node) -> Value {
    let mut config = Network::dual_stack(node);
    config["cniVersion"] = json!("1.1.0");
    config
}

/// A route through a next hop that no pod can reach: the last step of ADD fails.
fn failing(mut config: Value) -> Value {
    config["ipam"]["routes"] = json!([{"dst": "203.0.113.0/24", "gw": "192.0.2.1"}]);
    config
}

fn other(node: &Node, bridge: &str) -> Value {
    let mut other = config(node);
    other["name"] = json!("other");
    other["bridge"] = json!(bridge);
    other["isDefaultGateway"] = json!(false);
    other["ipam"]["ranges"] = json!([[{"subnet": "10.78.0.0/16"}]]);
    other
}

fn call(network: &Network, verb: Verb, attachment: &Attachment) -> Result<Call> {
    let configs = network.configs(Some(attachment))?;
    let config = configs.first().context("an empty list")?;
    Ok(network.call(config, verb)?.attachment(attachment))
}

fn status(network: &Network) -> Result<Reply> {
    network.status()?.pop().context("no plugin")
}

fn both_ways(pod: &Pod, node: &Node) -> Result<()> {
    for address in pod.addresses() {
        node.ping(address, 1)?;
    }
    Ok(())
}

/// That the tables agree with each other and with the devices.
fn consistent(node: &Node) -> Result<()> {
    Tables::read(node)?.ensure_consistent()
}

// Storms.

#[test]
fn first_adds_that_fail_do_no_harm_to_those_that_do_not() -> Result<()> {
    for round in 0..3 {
        let node = Node::new()?;
        let good = Network::new(&node, config(&node));
        let bad = Network::new(&node, failing(config(&node)));
        let elsewhere = Network::new(&node, failing(other(&node, "cni1")));
        let started = Instant::now();
        let pods: Vec<Result<Option<Pod>>> = at_once(60, |number| {
            let name = format!("pod-{number}");
            let network = match number % 4 {
                // In the last round all fail.
                0 if round < 2 => return good.pod(&name).map(Some),
                1 => &elsewhere,
                _ => &bad,
            };
            let error = network.pod(&name).err().context("it succeeded")?;
            let error = format!("{error:#}");
            // For the reason that it was given, and no other.
            let clean = error.contains("203.0.113.0/24") && !error.contains("cleaning up");
            ensure!(clean, "{error}");
            Ok(None)
        });
        let took = started.elapsed();
        let pods: Vec<Pod> = pods
            .into_iter()
            .filter_map(Result::transpose)
            .collect::<Result<_>>()?;
        ensure!(took < Duration::from_secs(15), "took {took:?}");
        for pod in &pods {
            good.check(pod.attachment())?;
            both_ways(pod, &node)?;
        }
        let again = good.pod("again")?;
        both_ways(&again, &node)?;
        consistent(&node)?;
        let snapshot = Snapshot::take(&node)?;
        ensure!(snapshot.matching("device veth").len() == pods.len() + 1);
        ensure!(snapshot.matching("networks/net/10.").len() == pods.len() + 1);
        ensure!(snapshot.matching("networks/other/10.").is_empty());
    }
    Ok(())
}

#[test]
fn networks_that_share_a_bridge_come_and_go_at_once() -> Result<()> {
    let node = Node::new()?;
    let mut second = other(&node, "cni0");
    second["isGateway"] = json!(false);
    let networks = [
        Network::new(&node, config(&node)),
        Network::new(&node, second),
        Network::new(&node, failing(config(&node))),
    ];
    let stayers: Vec<Pod> = (0..4)
        .map(|number| networks[0].pod(&format!("stay-{number}")))
        .collect::<Result<_>>()?;
    let valid: Vec<&Attachment> = stayers.iter().map(Pod::attachment).collect();
    at_once(24, |number| {
        let network = &networks[number % 3];
        for (step, stayer) in stayers.iter().enumerate() {
            let pod = network.pod(&format!("pod-{number}-{step}"));
            ensure!(
                pod.is_ok() == (number % 3 != 2),
                "pod {number}: {:?}",
                pod.err()
            );
            if number == 1 {
                // Of a network whose pods do not change meanwhile.
                status(&networks[0])?.success()?;
                networks[0].check(stayer.attachment())?;
            }
            if let Ok(pod) = pod {
                network.del(pod.attachment())?;
            }
        }
        Ok(())
    })
    .into_iter()
    .collect::<Result<Vec<()>>>()?;
    consistent(&node)?;
    networks[0].gc(&valid)?;
    consistent(&node)?;
    for pod in &stayers {
        networks[0].check(pod.attachment())?;
        both_ways(pod, &node)?;
    }
    Ok(())
}

#[test]
fn gc_among_adds_of_other_networks_takes_nothing_of_theirs() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let other = Network::new(&node, other(&node, "cni0"));
    let keep = network.pod("keep")?;
    at_once(12, |number| {
        for step in 0..4 {
            if number % 3 == 0 {
                other_is_unharmed(&network, &keep)?;
            } else {
                let pod = other.pod(&format!("pod-{number}-{step}"))?;
                other.check(pod.attachment())?;
                other.del(pod.attachment())?;
            }
        }
        Ok(())
    })
    .into_iter()
    .collect::<Result<Vec<()>>>()?;
    consistent(&node)?;
    both_ways(&keep, &node)
}

fn other_is_unharmed(network: &Network, keep: &Pod) -> Result<()> {
    network.gc(&[keep.attachment()])?;
    network.check(keep.attachment())
}

#[test]
fn an_attachment_can_be_added_and_deleted_at_once() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let neighbour = network.pod("neighbour")?;
    let before = Snapshot::take(&node)?;
    for round in 0..8 {
        let sandbox = node.sandbox("pod")?;
        let attachment = sandbox.attachment();
        let replies = at_once(4, |number| {
            let verb = if number % 2 == 0 {
                Verb::Add
            } else {
                Verb::Del
            };
            thread::sleep(Duration::from_millis(2 * round * (number as u64 % 2)));
            call(&network, verb, &attachment)?.run(&node)
        });
        for reply in replies {
            let reply = reply?;
            ensure!(reply.status.code().is_some(), "{}", reply.stderr);
        }
        network.del(&attachment)?;
        consistent(&node).with_context(|| format!("round {round}"))?;
        ensure!(sandbox.device_names()? == ["lo"]);
        before.ensure_same(&Snapshot::take(&node)?)?;
    }
    both_ways(&neighbour, &node)
}

// Records.

#[test]
fn del_cleans_the_tables_without_a_record_or_with_a_bad_one() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let neighbour = network.pod("neighbour")?;
    let before = Snapshot::take(&node)?;
    let hostile = json!({
        "complete": true, "bridge": "../../escaped", "segment": 1, "hostIfindex": 1,
        "mac": [2, 0, 0, 0, 0, 1], "addresses": ["10.77.0.2"], "logLevel": "off",
    });
    let records: [Option<String>; 6] = [
        None,
        Some(String::new()),
        Some("{\"complete\": tr".to_owned()),
        Some("{\"version\": 2, \"complete\": true}".to_owned()),
        Some("[".repeat(50_000)),
        Some(hostile.to_string()),
    ];
    for (number, record) in records.iter().enumerate() {
        let what = format!("record {number}");
        let pod = network.pod("pod")?;
        let path = format!("{RECORDS}/net/pod:eth0");
        node.within(|| {
            match record {
                None => std::fs::remove_file(&path)?,
                Some(text) => std::fs::write(&path, text)?,
            }
            Ok(())
        })?;
        network.del(pod.attachment()).context(what.clone())?;
        ensure!(pod.device_names()? == ["lo"], "{what}");
        // The addresses were known to the record alone: GC finds them.
        network
            .gc(&[neighbour.attachment()])
            .context(what.clone())?;
        consistent(&node).context(what.clone())?;
        before.ensure_same(&Snapshot::take(&node)?).context(what)?;
    }
    ensure!(node.run("ls /run/escaped /escaped").is_err());
    both_ways(&neighbour, &node)
}

#[test]
fn a_node_whose_records_were_wiped_recovers() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let pods: Vec<Pod> = ["a", "b", "c"]
        .into_iter()
        .map(|name| network.pod(name))
        .collect::<Result<_>>()?;
    node.run("rm -r /run/bpf-bridge")?;
    for pod in &pods {
        both_ways(pod, &node)?;
    }
    // One by DEL, one by GC, one by the end of its sandbox.
    network.del(pods[0].attachment())?;
    ensure!(pods[0].device_names()? == ["lo"]);
    network.gc(&[pods[2].attachment()])?;
    ensure!(pods[1].device_names()? == ["lo"]);
    both_ways(&pods[2], &node)?;
    consistent(&node)?;
    let again = network.pod_with(
        node.sandbox("a2")?,
        Attachment::new("a", "/run/netns/a2", "eth0"),
    )?;
    both_ways(&again, &node)?;
    pods[2].ping(again.v4()?.into(), 1)?;
    node.ip(&format!("link del {}", pods[2].host_veth()?))?;
    network.gc(&[again.attachment()])?;
    consistent(&node)?;
    both_ways(&again, &node)
}

#[test]
fn del_and_gc_find_a_host_veth_that_was_renamed() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let keep = network.pod("keep")?;
    let before = Snapshot::take(&node)?;
    for by_gc in [false, true] {
        let pod = network.pod("pod")?;
        let name = pod.host_veth()?.to_owned();
        node.ip(&format!(
            "link set {name} down\nlink set {name} name renamed0"
        ))?;
        if by_gc {
            node.run(&format!("rm {RECORDS}/net/pod:eth0"))?;
            network.gc(&[keep.attachment()])?;
        } else {
            network.del(pod.attachment())?;
        }
        ensure!(pod.device_names()? == ["lo"], "by GC: {by_gc}");
        before.ensure_same(&Snapshot::take(&node)?)?;
        consistent(&node)?;
    }
    Ok(())
}

// The gateway and the pins.

#[test]
fn a_gateway_that_was_deleted_is_made_anew_and_the_old_one_forgotten() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let pod = network.pod("pod")?;
    network.del(pod.attachment())?;
    drop(pod);
    // As container engines do when a network is removed: nobody is attached.
    for round in 0..3 {
        node.ip("link del cni0")?;
        let mut other = other(&node, &format!("cni{}", round + 1));
        other["ipam"]["ranges"] = json!([[{"subnet": format!("10.8{round}.0.0/16")}]]);
        let other = Network::new(&node, other);
        let pod = other.pod("pod")?;
        consistent(&node).with_context(|| format!("round {round}"))?;
        other.del(pod.attachment())?;
        drop(pod);
        let pod = network.pod("pod")?;
        both_ways(&pod, &node)?;
        network.del(pod.attachment())?;
    }
    // And with pods attached, which can still talk to each other.
    let (a, b) = (network.pod("a")?, network.pod("b")?);
    node.ip("link del cni0")?;
    ensure!(network.check(a.attachment()).is_err());
    ensure!(status(&network)?.failure()?.code == 51);
    let c = network.pod("c")?;
    both_ways(&c, &node)?;
    a.ping(b.v4()?.into(), 1)?;
    network.del(a.attachment())?;
    network.del(b.attachment())?;
    network.gc(&[c.attachment()])?;
    consistent(&node)?;
    both_ways(&c, &node)?;
    ensure!(status(&network)?.success()?.is_null());
    Ok(())
}

#[test]
fn a_gateway_that_was_set_down_or_lost_its_address_comes_back_with_the_next_add() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let first = network.pod("first")?;
    let mut pods = Vec::new();
    let port = node.device("cni0")?["link"]
        .as_str()
        .context("no peer")?
        .to_owned();
    for (number, damage) in [
        "link set cni0 down".to_owned(),
        format!("link set {port} down"),
        "addr flush dev cni0".to_owned(),
    ]
    .iter()
    .enumerate()
    {
        node.ip(damage)?;
        let pod = network.pod(&format!("pod-{number}"))?;
        both_ways(&pod, &node).with_context(|| damage.clone())?;
        both_ways(&first, &node).with_context(|| damage.clone())?;
        pods.push(pod);
    }
    consistent(&node)
}

#[test]
fn a_name_that_somebody_else_has_is_status_50_and_harms_nobody() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    node.ip("link add cni0 type bridge")?;
    let error = status(&network)?.failure()?;
    ensure!(
        error.code == 50 && error.text().contains("cni0"),
        "{error:?}"
    );
    ensure!(network.pod("pod").is_err());
    ensure!(node.device("cni0")?["linkinfo"]["info_kind"] != "veth");
    node.ip("link del cni0")?;
    ensure!(status(&network)?.success()?.is_null());
    // The pins went, and with them what could tell which ports there are.
    let pod = network.pod("pod")?;
    node.run("rm -r /sys/fs/bpf/bpf-bridge")?;
    network.del(pod.attachment())?;
    let error = status(&network)?.failure()?;
    ensure!(
        error.code == 50 && error.text().contains("cni0"),
        "{error:?}"
    );
    ensure!(network.pod("second").is_err());
    node.ip("link del cni0")?;
    ensure!(status(&network)?.success()?.is_null());
    let third = network.pod("third")?;
    both_ways(&third, &node)?;
    consistent(&node)
}

#[test]
fn a_load_that_was_killed_stands_in_nobodys_way() -> Result<()> {
    for lost in ["off/port", "off maps/ENDPOINTS maps/SEGMENTS"] {
        let node = Node::new()?;
        let network = Network::new(&node, config(&node));
        let pod = network.pod("pod")?;
        network.del(pod.attachment())?;
        drop(pod);
        node.ip("link del cni0")?;
        // What is pinned before the programs.
        for path in lost.split(' ') {
            node.run(&format!("rm -r /sys/fs/bpf/bpf-bridge/v1/{path}"))?;
        }
        let sandbox = node.sandbox("pod")?;
        ensure!(status(&network)?.success()?.is_null(), "{lost}");
        network.del(&sandbox.attachment())?;
        network.gc(&[])?;
        network.add(&sandbox.attachment())?;
        network.check(&sandbox.attachment())?;
    }
    Ok(())
}

// Addresses.

#[test]
fn a_gateway_that_ipam_leaves_open_is_the_stock_plugins() -> Result<()> {
    for (address, gateway) in [
        ("10.9.0.5/24", "10.9.0.1"),
        ("10.9.0.4/31", "10.9.0.5"),
        ("fd09::5/64", "fd09::1"),
        ("fd09::4/127", "fd09::5"),
    ] {
        let node = Node::new()?;
        let mut config = config(&node);
        config["cniVersion"] = json!("1.0.0");
        config["ipam"] = json!({"type": "static", "addresses": [{"address": address}]});
        let network = Network::new(&node, config);
        let pod = network.pod("pod")?;
        let ips = &pod.result()["ips"][0];
        ensure!(ips["gateway"] == gateway, "{address}: {ips}");
        both_ways(&pod, &node).context(address)?;
        pod.ping(gateway.parse()?, 1).context(address)?;
        network.check(pod.attachment())?;
        network.del(pod.attachment())?;
    }
    Ok(())
}
