//! Published ports under attack: calls that are killed or race, failures halfway,
//! and what is left of those who went without a word.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Attachment, Call, Client, Network, Node, Pod, Sandbox, Snapshot, Verb, at_once, wait_for,
};
use serde_json::{Value, json};

use crate::{
    HOST_PORT, NODE, PATIENCE, POD_PORT, Server, conflist, mapping, meets, network, other_network,
    ports, ports_at,
};

const PINS: &str = "/sys/fs/bpf/bpf-bridge/v1";
const RECORDS: &str = "/run/bpf-bridge/attachments";
const SECOND: &str = "198.51.100.22";

/// A call with an attachment's ports.
fn call(network: &Network, verb: Verb, attachment: &Attachment) -> Result<Call> {
    let configs = network.configs(Some(attachment))?;
    let config = configs.first().context("an empty list")?;
    Ok(network.call(config, verb)?.attachment(attachment))
}

fn with_ports(sandbox: &Sandbox, ports: &Value) -> Attachment {
    sandbox
        .attachment()
        .capability("portMappings", ports.clone())
}

/// [`HOST_PORT`], on everything (UDP) and on two addresses (TCP).
fn mixed() -> Value {
    json!([
        mapping("udp", ""),
        mapping("tcp", "198.51.100.2"),
        mapping("tcp", SECOND),
        mapping("tcp", "127.0.0.1"),
        mapping("tcp", "::1"),
    ])
}

fn many(ports: std::ops::Range<u16>) -> Value {
    ports
        .map(|port| json!({"hostPort": port, "containerPort": POD_PORT, "protocol": "tcp"}))
        .collect()
}

/// What is published, by key (address, port, protocol) as written in the table, with
/// the owner and the count. Every count must be true, and every owner be a device.
fn published(node: &Node) -> Result<BTreeMap<Vec<u8>, u32>> {
    let path = format!("{PINS}/maps/PUBLISHED");
    if !node.within(|| Ok(Path::new(&path).exists()))? {
        return Ok(BTreeMap::new());
    }
    let bytes = |value: &Value| -> Option<Vec<u8>> {
        let hex = |byte: &Value| u8::from_str_radix(byte.as_str()?.get(2..)?, 16).ok();
        value.as_array()?.iter().map(hex).collect()
    };
    let int = |bytes: &[u8], at| -> Result<u32> {
        let bytes = bytes.get(at..at + 4).context("too short")?;
        Ok(u32::from_ne_bytes(bytes.try_into()?))
    };
    let devices: BTreeSet<u64> = (node.json("ip -j link")?.as_array())
        .context("no list")?
        .iter()
        .filter_map(|device| device["ifindex"].as_u64())
        .collect();
    let (mut owners, mut counts, mut counted) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for entry in (node
        .json(&format!("bpftool -j map dump pinned {path}"))?
        .as_array())
    .context("no list")?
    {
        let key = bytes(&entry["key"]).context("no key")?;
        let value = bytes(&entry["value"]).context("no value")?;
        let (owner, count) = (int(&value, 32)?, int(&value, 40)?);
        if count != 0 {
            counts.insert(key, count);
            continue;
        }
        ensure!(devices.contains(&owner.into()), "{key:?} is of no device");
        let v4 = key[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        let specific = if v4 { 12..16 } else { 0..16 };
        if key[specific.clone()].iter().any(|&byte| byte != 0) {
            let mut everywhere = key.clone();
            everywhere[specific].fill(0);
            *counted.entry(everywhere).or_insert(0_u32) += 1;
        }
        owners.insert(key, owner);
    }
    ensure!(counts == counted, "counts {counts:?}, in truth {counted:?}");
    Ok(owners)
}

/// The pins of what is there for published ports alone.
fn publishing_pins(node: &Node) -> Result<Vec<String>> {
    let snapshot = Snapshot::take(node)?;
    let mut pins = snapshot.matching("v1/links/");
    for program in ["uplink", "egress", "from_pod", "xdp"] {
        pins.extend(snapshot.matching(&format!("v1/nat/{program}")));
    }
    // Those of a node with gateways, which bring the maps.
    for map in ["PUBLISHED", "ADDRESSES", "UPLINKS"] {
        let mut entries = snapshot.matching(&format!("maps/{map}"));
        entries.retain(|map| !map.ends_with(" 0 keys:"));
        pins.extend(entries);
    }
    Ok(pins)
}

/// That the node has nothing of published ports any more.
fn none_left(node: &Node) -> Result<()> {
    let pins = publishing_pins(node)?;
    ensure!(pins.is_empty(), "{pins:#?}");
    Ok(())
}

/// That all of [`mixed`] is served by the pod of this name.
fn serves(node: &Node, outside: &bpf_bridge_tests::Outside, name: &str) -> Result<()> {
    let here: &bpf_bridge_tests::Namespace = outside;
    for (from, client, address) in [
        (here, Client::Udp, "198.51.100.2"),
        (here, Client::Tcp, "198.51.100.2"),
        (here, Client::Tcp, SECOND),
        (node, Client::Tcp, "127.0.0.1"),
        (node, Client::Tcp, "::1"),
    ] {
        let address: std::net::IpAddr = address.parse()?;
        let met = from
            .meet(client, (address, HOST_PORT).into(), PATIENCE)
            .with_context(|| format!("{client:?} to {address}"))?;
        ensure!(met.server == name, "{client:?} to {address} met {met:?}");
    }
    Ok(())
}

/// What differs, but for files that stay where a network was.
fn differs(before: &Snapshot, after: &Snapshot) -> Result<()> {
    let mut changes = before.changes(after);
    changes.retain(|change| {
        ["/bridges/", "/.bpf-bridge/", "last_reserved_ip"]
            .iter()
            .all(|word| !change.contains(word))
    });
    ensure!(changes.is_empty(), "{changes:#?}");
    Ok(())
}

// Calls that are killed.

#[test]
fn what_a_killed_add_claimed_is_free_for_all() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    node.ip(&format!("addr add {SECOND}/24 dev uplink0"))?;
    let network = network(&node);
    let neighbour = network.pod_with_ports("neighbour", many(9000..9002))?;
    let mut whole = Duration::MAX;
    for _ in 0..3 {
        let sandbox = node.sandbox("whole")?;
        let attachment = with_ports(&sandbox, &mixed());
        let reply = call(&network, Verb::Add, &attachment)?.run(&node)?;
        reply.success()?;
        whole = whole.min(reply.duration);
        network.del(&attachment)?;
    }
    let before = Snapshot::take(&node)?;
    let devices = node.device_names()?.len();
    let steps = 32;
    let mut killed = 0;
    for step in 0..steps {
        let what = format!("killed in step {step} of {steps}");
        let sandbox = node.sandbox("pod")?;
        let attachment = with_ports(&sandbox, &mixed());
        let reply = call(&network, Verb::Add, &attachment)?
            .run_until_killed(&node, whole * step / steps)?;
        killed += u32::from(reply.status.code().is_none());
        match step % 4 {
            0 => network.del(&attachment).context(what.clone())?,
            1 => network
                .gc(&[neighbour.attachment()])
                .context(what.clone())?,
            2 => {
                if reply.status.code().is_none() {
                    match network.add(&attachment) {
                        // It was killed when all was done and said.
                        Err(_) if serde_json::from_str::<Value>(&reply.stdout).is_ok() => {}
                        again => drop(again.context(what.clone())?),
                    }
                    network.check(&attachment).context(what.clone())?;
                }
                network.del(&attachment).context(what.clone())?;
            }
            _ => {
                drop(sandbox);
                wait_for("end of the sandbox", PATIENCE, || {
                    Ok(node.device_names()?.len() == devices)
                })?;
                let heir = Server::publishing(&network, "heir", mixed()).context(what.clone())?;
                serves(&node, &outside, "heir").context(what.clone())?;
                // Late, and of no consequence.
                network.del(&attachment.without_netns())?;
                serves(&node, &outside, "heir").context(what.clone())?;
                network.del(heir.attachment())?;
            }
        }
        ensure!(published(&node).context(what.clone())?.len() == 4, "{what}");
        before.ensure_same(&Snapshot::take(&node)?).context(what)?;
    }
    ensure!(killed > steps / 3, "only {killed} of {steps} were killed");
    network.check(neighbour.attachment())
}

#[test]
fn a_killed_del_of_ports_is_finished_by_the_next() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    node.ip(&format!("addr add {SECOND}/24 dev uplink0"))?;
    let network = network(&node);
    let _neighbour = network.pod_with_ports("neighbour", many(9000..9002))?;
    let pod = network.pod_with_ports("whole", mixed())?;
    let whole = call(&network, Verb::Del, pod.attachment())?.run(&node)?;
    whole.success()?;
    let before = Snapshot::take(&node)?;
    for step in 0..24 {
        let pod = network.pod_with_ports("pod", mixed())?;
        call(&network, Verb::Del, pod.attachment())?
            .run_until_killed(&node, whole.duration * step / 24)?;
        network.del(pod.attachment())?;
        // What is left is at most a count, and that is in nobody's way.
        let heir = network.pod_with_ports("heir", ports())?;
        network.del(heir.attachment())?;
        ensure!(published(&node)?.len() == 4, "killed in step {step}");
        before
            .ensure_same(&Snapshot::take(&node)?)
            .with_context(|| format!("killed in step {step}"))?;
    }
    Ok(())
}

/// The programs are loaded by the first ADD with ports, and go with a GC.
#[test]
fn a_killed_load_or_unload_is_finished_by_the_next() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    node.ip(&format!("addr add {SECOND}/24 dev uplink0"))?;
    let network = network(&node);
    let mut neighbour = None;
    // With all the rest loaded already, and without.
    for round in 0..2 {
        let mut gc = Duration::ZERO;
        let mut load = Duration::ZERO;
        let steps = 6;
        for step in 0..=steps {
            let what = format!("round {round}, step {step}");
            let sandbox = node.sandbox("pod")?;
            let attachment = with_ports(&sandbox, &mixed());
            let reply = call(&network, Verb::Add, &attachment)?;
            let reply = match step {
                0 => reply.run(&node)?,
                _ => reply.run_until_killed(&node, load * step / steps)?,
            };
            if step == 0 {
                load = reply.duration;
            }
            network.del(&attachment).context(what.clone())?;
            drop(sandbox);
            let server = Server::publishing(&network, "server", mixed()).context(what.clone())?;
            serves(&node, &outside, "server").context(what.clone())?;
            network.del(server.attachment())?;
            // Now the unload.
            if round == 1 {
                node.ip("link del cni0")?;
            }
            let valid: Vec<&Attachment> = neighbour.iter().map(Pod::attachment).collect();
            let list = network.configs(None)?;
            let mut config = list.first().context("an empty list")?.clone();
            config["cni.dev/valid-attachments"] = valid
                .iter()
                .map(|valid| json!({"containerID": valid.container_id, "ifname": valid.ifname}))
                .collect();
            let reply = network.call(&config, Verb::Gc)?;
            if step == 0 {
                let reply = reply.run(&node)?;
                reply.success()?;
                gc = reply.duration;
            } else {
                reply.run_until_killed(&node, gc * (step - 1) / steps)?;
                if step % 2 == 0 {
                    network.gc(&valid).context(what.clone())?;
                    none_left(&node).context(what.clone())?;
                }
            }
        }
        network.gc(&[])?;
        none_left(&node)?;
        if round == 0 {
            neighbour = Some(network.pod("neighbour")?);
            let valid = neighbour.as_ref().context("no neighbour")?;
            network.gc(&[valid.attachment()])?;
            network.del(valid.attachment())?;
            neighbour = None;
        }
    }
    Ok(())
}

/// What a call leaves that is killed between the entry of a single address and its
/// count.
#[test]
fn a_count_without_an_entry_is_in_nobodys_way() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let pod = network.pod_with_ports("pod", json!([mapping("tcp", "198.51.100.2")]))?;
    let owners = published(&node)?;
    let key: Vec<String> = (owners.keys().next().context("nothing is published")?)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    node.run(&format!(
        "bpftool map delete pinned {PINS}/maps/PUBLISHED key hex {}",
        key.join(" ")
    ))?;
    network.del(pod.attachment())?;
    // It goes with who was counted.
    ensure!(published(&node)?.is_empty());
    let server = Server::new(&network, "server")?;
    meets(&outside, NODE[0], "server")?;
    published(&node)?;
    network.del(server.attachment())?;
    network.gc(&[])?;
    none_left(&node)
}

// Records.

/// A pod of more ports than anybody has, whose record is accordingly long.
#[test]
fn two_thousand_ports_come_and_go() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    network.del(network.pod_with_ports("before", ports())?.attachment())?;
    let before = Snapshot::take(&node)?;
    let server = Server::publishing(&network, "server", many(10_000..12_000))?;
    ensure!(published(&node)?.len() == 4000);
    network.check(server.attachment())?;
    for reply in network.status()? {
        reply.success()?;
    }
    // It is known, so a second ADD does it no harm.
    ensure!(network.add(server.attachment()).is_err());
    for address in NODE {
        let met = outside.meet(Client::Tcp, (address, 11_999).into(), PATIENCE)?;
        ensure!(met.server == "server");
    }
    network.del(server.attachment())?;
    before.ensure_same(&Snapshot::take(&node)?)
}

#[test]
fn a_pod_without_a_record_gives_its_ports_back() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let network = network(&node);
    network.del(network.pod_with_ports("before", ports())?.attachment())?;
    let before = Snapshot::take(&node)?;
    for record in [None, Some(""), Some("{\"complete\": tr")] {
        let pod = network.pod_with_ports("pod", mixed())?;
        let path = format!("{RECORDS}/net/pod:eth0");
        node.within(|| {
            match record {
                None => std::fs::remove_file(&path)?,
                Some(text) => std::fs::write(&path, text)?,
            }
            Ok(())
        })?;
        network.del(pod.attachment())?;
        let left = published(&node)?;
        ensure!(left.is_empty(), "{record:?}: {left:?}");
        network.gc(&[])?;
        none_left(&node)?;
    }
    // As it was, but for the programs, and what they know of the node.
    let left = before.changes(&Snapshot::take(&node)?);
    ensure!(
        left.iter().all(|change| change.starts_with("-pin ")
            || change.ends_with(" 0 keys:")
            || change.contains("/PROGRAMS ")),
        "{left:#?}"
    );
    Ok(())
}

/// As an older plugin wrote them, before ports could be published.
#[test]
fn a_record_that_tells_nothing_of_ports_is_one() -> Result<()> {
    let node = Node::new()?;
    let network = network(&node);
    let pod = network.pod("pod")?;
    let path = format!("{RECORDS}/net/pod:eth0");
    node.within(|| {
        let mut record: Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
        let told = record
            .as_object_mut()
            .context("no object")?
            .remove("published");
        ensure!(told.is_some());
        Ok(std::fs::write(&path, record.to_string())?)
    })?;
    network.check(pod.attachment())?;
    ensure!(network.add(pod.attachment()).is_err(), "a second ADD");
    network.del(pod.attachment())?;
    ensure!(pod.device_names()? == ["lo"]);
    Ok(())
}

/// Its address goes to the next pod, and its ports must not follow.
#[test]
fn a_pod_whose_sandbox_went_leaves_no_port_to_its_heir() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let mut config = Network::dual_stack(&node);
    config["ipam"] = json!({"type": "static", "addresses": [{"address": "10.77.0.9/24"}]});
    let mut list = conflist(config);
    list["cniVersion"] = json!("1.0.0");
    let network = Network::from_list(&node, list);
    let sandbox = node.sandbox("gone")?;
    let attachment = with_ports(&sandbox, &ports());
    network.add(&attachment)?;
    let devices = node.device_names()?.len();
    drop(sandbox);
    wait_for("end of the sandbox", PATIENCE, || {
        Ok(node.device_names()?.len() < devices)
    })?;
    let heir = network.pod("heir")?;
    let _listeners = crate::listen(&heir, "heir", POD_PORT)?;
    let left = published(&node)?;
    ensure!(left.is_empty(), "{left:?}");
    crate::meets_nobody(&node, "127.0.0.1".parse::<std::net::IpAddr>()?)?;
    network.del(&attachment.without_netns())?;
    network.check(heir.attachment())
}

// Storms.

/// Of all who want a number at once one gets it. Nobody else gets anything, and all
/// are told who has it.
#[test]
fn of_those_who_race_for_a_port_one_wins() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    node.ip(&format!("addr add {SECOND}/24 dev uplink0"))?;
    let networks = [network(&node), other_network(&node)];
    for round in 0..4 {
        // Also to be the first who loads the programs.
        let wanted = |number: usize| -> Value {
            let free = 9000 + u16::try_from(number).unwrap_or(0);
            let on = if round % 2 == 1 && number % 2 == 1 {
                SECOND
            } else {
                ""
            };
            json!([
                {"hostPort": free, "containerPort": POD_PORT},
                mapping("tcp", on), mapping("udp", on),
            ])
        };
        let pods: Vec<(usize, Result<Pod>)> = at_once(16, |number| {
            let name = format!("pod-{number}");
            let network = &networks[number % 2];
            (number, network.pod_with_ports(&name, wanted(number)))
        });
        let (won, lost): (Vec<_>, Vec<_>) = pods.into_iter().partition(|(_, pod)| pod.is_ok());
        let error = || format!("{lost:#?}");
        if round % 2 == 0 {
            ensure!(won.len() == 1, "{} won: {}", won.len(), error());
        } else {
            ensure!(!won.is_empty(), "{}", error());
        }
        let (winner, pod) = won.into_iter().next().context("nobody")?;
        let pod = pod?;
        for (number, error) in lost {
            let error = format!("{:#}", error.err().context("it won")?);
            ensure!(error.contains("8080") && error.contains("pod-"), "{error}");
            ensure!(!error.contains("cleaning up"), "pod {number}: {error}");
        }
        let owners = published(&node)?;
        let devices: BTreeSet<u32> = owners.values().copied().collect();
        ensure!(devices.len() == 1, "{owners:?}");
        let _listeners = crate::listen(&pod, "winner", POD_PORT)?;
        let met = outside.meet(
            Client::Tcp,
            (SECOND.parse::<std::net::IpAddr>()?, HOST_PORT).into(),
            PATIENCE,
        )?;
        ensure!(met.server == "winner");
        networks[winner % 2].check(pod.attachment())?;
        networks[winner % 2].del(pod.attachment())?;
        for network in &networks {
            network.gc(&[])?;
        }
        none_left(&node).with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

#[test]
fn pods_with_ports_come_and_go_among_gcs() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let networks = [network(&node), other_network(&node)];
    let started = Instant::now();
    at_once(16, |number| {
        let network = &networks[number % 2];
        for step in 0..5 {
            if number == 0 {
                // It knows nobody of its network, which has other pods of its own.
                networks[0].gc(&[])?;
                for reply in networks[1].status()? {
                    // One may be half made, but what is wrong is told in words.
                    ensure!(reply.status.code().is_some(), "{}", reply.stderr);
                }
                continue;
            }
            if number % 2 == 0 {
                continue;
            }
            let port = 9000 + u16::try_from(number)?;
            let name = format!("pod-{number}-{step}");
            let pod = network.pod_with_ports(&name, many(port..port + 1))?;
            let _listeners = crate::listen(&pod, &name, POD_PORT)?;
            let met = outside.meet(Client::Tcp, (NODE[0], port).into(), PATIENCE)?;
            ensure!(met.server == name, "{name}: {met:?}");
            network.check(pod.attachment())?;
            network.del(pod.attachment())?;
        }
        Ok(())
    })
    .into_iter()
    .collect::<Result<Vec<()>>>()?;
    let took = started.elapsed();
    ensure!(took < Duration::from_secs(20), "took {took:?}");
    ensure!(published(&node)?.is_empty());
    for network in &networks {
        network.gc(&[])?;
    }
    none_left(&node)
}

// What belongs to others.

#[test]
fn gc_leaves_the_ports_of_other_networks_and_takes_the_last_programs() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let (network, other) = (network(&node), other_network(&node));
    let keep = network.pod("keep")?;
    let pristine = Snapshot::take(&node)?;
    let server = Server::new(&network, "server")?;
    let gone = other.pod_with_ports("gone", many(9000..9003))?;
    other.gc(&[])?;
    ensure!(gone.device_names()? == ["lo"]);
    ensure!(published(&node)?.len() == 4);
    meets(&outside, NODE[0], "server")?;
    meets(&node, NODE[1], "server")?;
    network.check(server.attachment())?;
    network.gc(&[keep.attachment()])?;
    none_left(&node)?;
    node.ip("link del cni1")?;
    other.gc(&[])?;
    differs(&pristine, &Snapshot::take(&node)?)
}

/// Each network with a log level has programs of its own.
#[test]
fn programs_that_are_loaded_later_serve_what_was_published_before() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let server = Server::new(&network, "server")?;
    let mut config = Network::dual_stack(&node);
    config["name"] = json!("loud");
    config["bridge"] = json!("cni1");
    config["logLevel"] = json!("debug");
    config["ipam"]["ranges"] = json!([[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]]);
    let loud = Network::from_list(&node, conflist(config));
    // Once without ports of its own, once with.
    let client = loud.pod("client")?;
    for address in NODE {
        meets(&client, address, "server")?;
    }
    let others = json!([{"hostPort": 9000, "containerPort": POD_PORT}]);
    let second = Server::publishing(&loud, "second", others)?;
    for address in NODE {
        let met = outside.meet(Client::Tcp, (address, 9000).into(), PATIENCE)?;
        ensure!(met.server == "second");
        meets(&outside, address, "server")?;
    }
    // Gone, and come again, while the others' programs stay.
    loud.del(second.attachment())?;
    network.del(server.attachment())?;
    drop(server);
    loud.gc(&[client.attachment()])?;
    none_left(&node)?;
    let server = Server::new(&network, "server")?;
    for address in NODE {
        meets(&client, address, "server")?;
        meets(&outside, address, "server")?;
    }
    network.check(server.attachment())
}

/// Where a network's ports are served is that network's matter.
#[test]
fn uplinks_are_not_undone_by_networks_that_have_none() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let machine = node.machine()?;
    node.connect("second0", &machine, "eth0")?;
    node.ip("addr add 192.0.2.1/24 dev second0\nlink set second0 up")?;
    machine.ip("addr add 192.0.2.2/24 dev eth0\nlink set eth0 up")?;
    let mut config = Network::dual_stack(&node);
    config["uplinks"] = json!(["uplink0"]);
    let network = Network::from_list(&node, conflist(config));
    let mut config = Network::dual_stack(&node);
    config["name"] = json!("plain");
    config["bridge"] = json!("cni1");
    config["ipam"]["ranges"] = json!([[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]]);
    config["uplinks"] = json!(["nowhere0"]);
    let missing = Network::from_list(&node, conflist(config.clone()));
    if let Some(config) = config.as_object_mut() {
        config.remove("uplinks");
    }
    let plain = Network::from_list(&node, conflist(config));
    let _server = Server::new(&network, "server")?;
    let pod = plain.pod("pod")?;
    for other in [&plain, &missing] {
        for reply in other.status()? {
            reply.success()?;
        }
        plain.check(pod.attachment())?;
        other.gc(&[pod.attachment()])?;
    }
    for reply in network.status()? {
        reply.success()?;
    }
    meets(&outside, NODE[0], "server")?;
    crate::meets_nobody(&machine, "192.0.2.1".parse::<std::net::IpAddr>()?)?;
    let links = Snapshot::take(&node)?.matching("links/uplink-");
    ensure!(links.len() == 1, "{links:?}");
    // To publish by a device that does not exist is refused, and leaves nothing.
    let before = Snapshot::take(&node)?;
    let sandbox = node.sandbox("refused")?;
    let free = many(9000..9003);
    let error = missing.add(&with_ports(&sandbox, &free)).err();
    let error = format!("{:#}", error.context("it was accepted")?);
    ensure!(
        error.contains("uplinks") && error.contains("nowhere0"),
        "{error}"
    );
    before.ensure_same(&Snapshot::take(&node)?)?;
    Ok(())
}

/// A device that came after the pod is no fault of the pod's.
#[test]
fn check_and_status_serve_on_a_device_that_came_later() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let network = network(&node);
    let server = Server::new(&network, "server")?;
    type Look = fn(&Network, &Server) -> Result<()>;
    let looks: [(&str, Look); 3] = [
        ("CHECK", |network, server| {
            network.check(server.attachment())
        }),
        ("STATUS", |network, _| {
            for reply in network.status()? {
                reply.success()?;
            }
            Ok(())
        }),
        ("GC", |network, server| network.gc(&[server.attachment()])),
    ];
    for (number, (name, look)) in looks.into_iter().enumerate() {
        let machine = node.machine()?;
        let device = format!("later{number}");
        node.connect(&device, &machine, "eth0")?;
        node.ip(&format!(
            "addr add 192.0.2.1/24 dev {device}\nlink set {device} up"
        ))?;
        machine.ip("addr add 192.0.2.2/24 dev eth0\nlink set eth0 up")?;
        look(&network, &server).context(name)?;
        meets(&machine, "192.0.2.1".parse::<std::net::IpAddr>()?, "server").context(name)?;
        node.ip(&format!("link del {device}"))?;
    }
    network.gc(&[server.attachment()])?;
    let links = Snapshot::take(&node)?.matching("links/uplink-");
    ensure!(links.len() == 1, "{links:?}");
    Ok(())
}

// Failures halfway.

/// The table has room for 65,536 entries.
#[test]
fn a_full_table_is_told_and_leaves_nothing() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    let _server = Server::new(&network, "server")?;
    let first = network.pod_with_ports("first", many(10_000..40_000))?;
    let before = Snapshot::take(&node)?;
    for (ports, refused) in [(many(40_000..50_000), true), (many(40_000..41_000), false)] {
        let sandbox = node.sandbox("second")?;
        let attachment = with_ports(&sandbox, &ports);
        match network.add(&attachment) {
            Ok(_) => {
                ensure!(!refused);
                network.del(&attachment)?;
            }
            Err(error) => {
                let error = format!("{error:#}");
                ensure!(refused && error.contains("PUBLISHED"), "{error}");
                ensure!(!error.contains("cleaning up"), "{error}");
            }
        }
        ensure!(sandbox.device_names()? == ["lo"]);
        before.ensure_same(&Snapshot::take(&node)?)?;
    }
    meets(&outside, NODE[0], "server")?;
    network.del(first.attachment())?;
    ensure!(published(&node)?.len() == 4);
    Ok(())
}

/// Something else is where a map should be, so that the programs are refused.
#[test]
fn a_load_that_is_refused_leaves_nothing_and_can_be_tried_again() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let network = network(&node);
    // One of a network without a gateway, for which nothing is translated.
    let mut config = Network::dual_stack(&node);
    config["isDefaultGateway"].take();
    config["name"] = json!("quiet");
    config["bridge"] = json!("quiet0");
    let quiet = Network::from_list(&node, conflist(config));
    for attached in [false, true] {
        let neighbour = attached.then(|| quiet.pod("neighbour")).transpose()?;
        let before = Snapshot::take(&node)?;
        let sandbox = node.sandbox("pod")?;
        let attachment = with_ports(&sandbox, &ports());
        node.run(&format!("mkdir -p {PINS}/maps"))?;
        node.run(&format!(
            "bpftool map create {PINS}/maps/PUBLISHED type array key 4 value 4 entries 1 name x"
        ))?;
        let error = network.add(&attachment).err().context("it was loaded")?;
        let error = format!("{error:#}");
        ensure!(!error.contains("cleaning up"), "{error}");
        // Whose it is is not for the plugin to say.
        ensure!(error.contains("maps/PUBLISHED"), "{error}");
        node.run(&format!("rm {PINS}/maps/PUBLISHED"))?;
        differs(&before, &Snapshot::take(&node)?)
            .with_context(|| format!("neighbour: {attached}"))?;
        let server = Server::new(&network, "server")?;
        meets(&outside, NODE[0], "server")?;
        network.del(server.attachment())?;
        network.gc(&[])?;
        none_left(&node)?;
        node.ip("link del cni0")?;
        network.gc(&[])?;
        drop(neighbour);
    }
    Ok(())
}

/// The last step of ADD fails, when all is claimed.
#[test]
fn an_add_that_fails_at_its_end_gives_its_ports_back() -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let good = network(&node);
    let mut config = Network::dual_stack(&node);
    config["ipam"]["routes"] = json!([{"dst": "203.0.113.0/24", "gw": "192.0.2.1"}]);
    let bad = Network::from_list(&node, conflist(config));
    let pristine = Snapshot::take(&node)?;
    let sandbox = node.sandbox("bad")?;
    let attachment = with_ports(&sandbox, &ports_at("198.51.100.2"));
    // The first of the node.
    let error = format!("{:#}", bad.add(&attachment).err().context("it succeeded")?);
    ensure!(
        error.contains("203.0.113.0/24") && !error.contains("cleaning up"),
        "{error}"
    );
    differs(&pristine, &Snapshot::take(&node)?)?;
    let server = Server::new(&good, "server")?;
    let before = Snapshot::take(&node)?;
    let attachment = with_ports(&sandbox, &many(9000..9100));
    ensure!(bad.add(&attachment).is_err());
    before.ensure_same(&Snapshot::take(&node)?)?;
    published(&node)?;
    meets(&outside, NODE[0], "server")?;
    good.check(server.attachment())
}
