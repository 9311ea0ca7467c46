//! A node that comes up again: what is on its disk is of a world that is gone. The maps
//! are empty, no namespace and no device is left, and the kernel gives the same numbers
//! to others.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Attachment, Call, Client, EchoServer, Network, Node, Outside, Pod, Snapshot, Tables, Verb,
    at_once,
};
use serde_json::{Value, json};

const LEASES: &str = "/var/lib/cni/networks/net";
const RECORDS: &str = "/run/bpf-bridge/attachments/net";
const PORT: u16 = 8080;
const PATIENCE: Duration = Duration::from_secs(10);

/// How a node comes up again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Boot {
    /// By a boot of the machine.
    Machine,
    /// As a container that is made anew: the kernel runs on.
    Container,
}

/// A node whose disk is that of `old`: `kept` is on it.
fn boot_again(old: &Node, boot: Boot, kept: &[&str]) -> Result<Node> {
    let node = Node::new()?;
    if boot == Boot::Machine {
        node.install_script(
            "name-boot",
            "#!/bin/sh\necho 5ea5c0de-0000-4000-8000-000000000002 \
             >/run/boot && mount --bind /run/boot /proc/sys/kernel/random/boot_id\n",
        )?;
        node.run(&format!("{}/name-boot", Node::CNI_PATH))?;
    }
    // Both nodes see it.
    let disk = old.run("mktemp -d")?.trim().to_owned();
    for (number, directory) in kept.iter().enumerate() {
        // With all times: the address store lives by them.
        old.run(&format!("cp -a {directory} {disk}/{number}"))?;
        node.run(&format!("mkdir -p {directory}"))?;
        node.run(&format!("cp -a {disk}/{number}/. {directory}"))?;
    }
    old.run(&format!("rm -r {disk}"))?;
    Ok(node)
}

/// A network that is masqueraded and publishes ports, in a range of so many addresses
/// from .2 on.
fn network(node: &Node, addresses: usize) -> Network<'_> {
    let mut config = plain(node, addresses);
    config["ipMasq"] = json!(true);
    config["capabilities"] = json!({"portMappings": true});
    Network::new(node, config)
}

/// The same without either.
fn plain(node: &Node, addresses: usize) -> Value {
    let mut config = Network::dual_stack(node);
    config["cniVersion"] = json!("1.1.0");
    let last = addresses + 1;
    config["ipam"]["ranges"] = json!([
        [{"subnet": Network::V4_SUBNET, "rangeStart": "10.77.0.2", "rangeEnd": format!("10.77.0.{last}")}],
        [{"subnet": Network::V6_SUBNET, "rangeStart": "fd77::2", "rangeEnd": format!("fd77::{last:x}")}],
    ]);
    config
}

fn ports(port: u16) -> Value {
    json!([{"hostPort": port, "containerPort": port, "protocol": "tcp"}])
}

fn both_ways(pod: &Pod, node: &Node) -> Result<()> {
    for address in pod.addresses() {
        node.ping(address, 1)?;
    }
    Ok(())
}

/// The owner of each IPv4 address.
fn leases(node: &Node) -> Result<BTreeMap<String, String>> {
    node.within(|| {
        let mut leases = BTreeMap::new();
        for entry in std::fs::read_dir(LEASES)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            if let Some(address) = name.filter(|name| name.starts_with("10.")) {
                let text = std::fs::read_to_string(&path)?;
                let owner = text.lines().next().unwrap_or_default().to_owned();
                leases.insert(address.to_owned(), owner);
            }
        }
        Ok(leases)
    })
}

/// A call of the stock address store, as a chain with the stock bridge makes it.
fn stock(network: &Network, verb: Verb, id: &str) -> Result<Value> {
    let mut config = network.configs(None)?.remove(0);
    config["cniVersion"] = json!("1.0.0");
    let attachment = Attachment::new(id, &format!("/run/netns/{id}"), "eth0");
    Call::new("host-local", verb)
        .attachment(&attachment)
        .stdin(&config)
        .run(network.node())?
        .success()
}

#[test]
fn the_next_add_works_and_orphaned_leases_come_back() -> Result<()> {
    let old = Node::new()?;
    let before = Network::new(&old, plain(&old, 6));
    for id in ["s1", "s2"] {
        stock(&before, Verb::Add, id)?;
    }
    for id in ["a", "b", "c"] {
        before.pod(id)?;
    }
    ensure!(leases(&old)?.len() == 5);

    let node = boot_again(&old, Boot::Machine, &["/var/lib/cni"])?;
    let network = Network::new(&node, plain(&node, 6));
    ensure!(network.status()?[0].success()?.is_null());
    // Of this boot, by the stock plugin: nobody can know whether it lives.
    stock(&network, Verb::Add, "lives")?;
    let mut pods = vec![network.pod("new")?];
    both_ways(&pods[0], &node)?;
    let owners: BTreeSet<String> = leases(&node)?.into_values().collect();
    ensure!(
        owners == ["s1", "s2", "lives", "new"].map(str::to_owned).into(),
        "{owners:?}"
    );
    // As many as there are addresses that nobody living has.
    for number in 0..4 {
        pods.push(network.pod(&format!("pod-{number}"))?);
    }
    let error = network.pod("one-too-many").err().context("it succeeded")?;
    ensure!(
        format!("{error:#}").contains("no IP addresses available"),
        "{error:#}"
    );
    let all: BTreeSet<_> = pods.iter().flat_map(Pod::addresses).collect();
    ensure!(all.len() == 10, "{all:?}");
    // The runtime now forgets what the boot ended.
    for id in ["s1", "s2", "a", "b", "c"] {
        network.del(&Attachment::new(id, "", "eth0"))?;
    }
    let mut valid: Vec<&Attachment> = pods.iter().map(Pod::attachment).collect();
    let lives = Attachment::new("lives", "", "eth0");
    valid.push(&lives);
    network.gc(&valid)?;
    let owners: BTreeSet<String> = leases(&node)?.into_values().collect();
    ensure!(owners.len() == 6 && owners.contains("lives"), "{owners:?}");
    for pod in &pods {
        network.check(pod.attachment())?;
        both_ways(pod, &node)?;
    }
    Tables::read(&node)?.ensure_consistent()
}

/// What the record says that the kernel and the maps know the attachment by.
fn numbers(node: &Node, id: &str) -> Result<Value> {
    let record: Value = serde_json::from_str(&node.read(format!("{RECORDS}/{id}:eth0"))?)?;
    Ok(json!([
        record["segment"],
        record["hostIfindex"],
        record["mac"],
        record["addresses"],
        record["published"],
    ]))
}

/// Attachments from before, and pods of today that have all their numbers, addresses and
/// ports: one each for DEL, ADD and GC.
const OLD: [&str; 3] = ["old-1", "old-2", "old-3"];
const NEW: [&str; 3] = ["new-1", "new-2", "new-3"];

/// Whatever is done about attachments from before, nothing is done to those who have
/// their numbers now.
fn nothing_that_lives_is_touched(old: &Node, boot: Boot) -> Result<()> {
    let node = boot_again(old, boot, &["/var/lib/cni", "/run/bpf-bridge"])?;
    let outside = node.outside()?;
    let network = network(&node, 5);
    let mut pods = Vec::new();
    let mut servers = Vec::new();
    for (number, name) in (0..).zip(NEW) {
        let sandbox = node.sandbox(name)?;
        let at = 2 + number;
        let attachment = sandbox
            .attachment()
            .args(&format!("IP=10.77.0.{at},fd77::{at}"))
            .capability("portMappings", ports(PORT + number));
        let pod = network.pod_with(sandbox, attachment)?;
        servers.push(EchoServer::start_as(
            &pod,
            (pod.v4()?, PORT + number).into(),
            name,
        )?);
        pods.push(pod);
    }
    for (new, old_name) in NEW.iter().zip(OLD) {
        // Or this would show nothing.
        let (is, was) = (numbers(&node, new)?, numbers(old, old_name)?);
        ensure!(is == was, "{new} is {is}, {old_name} was {was}");
    }
    let valid: Vec<Attachment> = pods.iter().map(|pod| pod.attachment().clone()).collect();
    let unharmed = || -> Result<()> {
        Tables::read(&node)?.ensure_consistent()?;
        ensure!(network.status()?[0].success()?.is_null());
        for ((number, name), pod) in (0..).zip(NEW).zip(&pods) {
            network.check(pod.attachment())?;
            both_ways(pod, &node)?;
            pod.ping(Outside::V4.into(), 1).context("masqueraded")?;
            let published = SocketAddr::new(Outside::NODE_V4.into(), PORT + number);
            let met = outside.meet(Client::Tcp, published, PATIENCE)?;
            ensure!(met.server == name, "{met:?}");
        }
        Ok(())
    };
    unharmed()?;

    let before = Snapshot::take(&node)?;
    let ensure_forgotten = |name: &str| -> Result<()> {
        let changes = before.changes(&Snapshot::take(&node)?);
        let record = |change: &String| change.contains("attachments/net/old");
        let index = |change: &String| change.contains("/.bpf-bridge/");
        ensure!(
            changes.iter().all(|change| record(change) || index(change)),
            "{changes:#?}"
        );
        ensure!(node.read(format!("{RECORDS}/{name}:eth0")).is_err());
        Ok(())
    };
    network.del(&Attachment::new(OLD[0], "/run/netns/old", "eth0"))?;
    ensure_forgotten(OLD[0])?;
    unharmed().context("DEL")?;

    // It wants the port, which another has now: nothing comes of it, and then without.
    let error = network.pod_with_ports(OLD[1], ports(PORT + 1)).err();
    let error = format!("{:#}", error.context("both have the port")?);
    ensure!(error.contains(&(PORT + 1).to_string()), "{error}");
    ensure_forgotten(OLD[1])?;
    let again = network.pod(OLD[1])?;
    both_ways(&again, &node)?;
    unharmed().context("ADD")?;
    network.del(again.attachment())?;

    network.gc(&valid.iter().collect::<Vec<_>>())?;
    ensure_forgotten(OLD[2])?;
    unharmed().context("GC")
}

#[test]
fn a_record_of_before_touches_nothing_that_lives() -> Result<()> {
    let old = Node::new()?;
    let _outside = old.outside()?;
    let before = network(&old, 5);
    for (number, name) in (0..).zip(OLD) {
        before.pod_with_ports(name, ports(PORT + number))?;
    }
    let boots = [Boot::Machine, Boot::Container];
    at_once(boots.len(), |number| {
        let boot = boots[number];
        nothing_that_lives_is_touched(&old, boot).with_context(|| format!("{boot:?}"))
    })
    .into_iter()
    .collect()
}

#[test]
fn a_node_that_is_made_anew_in_the_same_boot_has_all_its_addresses() -> Result<()> {
    let old = Node::new()?;
    let before = Network::new(&old, plain(&old, 3));
    for id in ["a", "b", "c"] {
        before.pod(id)?;
    }
    let node = boot_again(&old, Boot::Container, &["/var/lib/cni"])?;
    ensure!(leases(&node)?.len() == 3);
    let network = Network::new(&node, plain(&node, 3));
    let pods: Vec<Pod> = (0..3)
        .map(|number| network.pod(&format!("new-{number}")))
        .collect::<Result<_>>()?;
    ensure!(network.pod("one-too-many").is_err());
    for pod in &pods {
        network.check(pod.attachment())?;
        both_ways(pod, &node)?;
    }
    Tables::read(&node)?.ensure_consistent()
}
